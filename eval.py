"""The paper's measurements of a speech LLM, with and without adapters.

  python eval.py                                              # the demo's base model and runs/tars: Table 1
  python eval.py --model M --adapter A1 A2 --data D1 D2       # more rows and columns
  python eval.py --cascade openai/whisper-medium              # + Whisper transcribes, the model answers the transcript
  python eval.py --asr                                        # word error rate of the model as a transcriber
  python eval.py --ask clip.wav                               # what the models answer to a clip or a written question
  python eval.py --layers --plot layers.png                   # Figure 2: cosine of spoken and written states per layer
  python eval.py --curves runs/tars runs/grpo --plot curves.png   # accuracy, length, dense rewards over steps
  python eval.py --compare runs/*                             # runs of several seeds: means, paired differences, wins
  python eval.py --explain [RUN]                              # one group worked through, equation by equation
  python eval.py --random-weights Qwen/Qwen2.5-Omni-7B        # two steps on noise: seconds and memory, no download

Accuracies come with their 95 % Wilson intervals. Answers are greedy; each is kept in --out, one JSON line a question
and modality, and a run that was stopped continues from there. Another adapter, data set or setting gets another file.
Flags of tars.py work too: --extractor, --max-new-tokens, --eval-batch, --base-text-accuracy; --group-size on noise.
"""

import argparse
import json
import math
import re
import textwrap
import time
import zlib
from copy import copy
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas  # comes with datasets
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils import cached_file

import tars
from data_prep import Listener, decode_clip, read_lines, resume, wav_bytes, word_error_rate
from tars import BFLOAT16, DEVICE, LETTERS, MODALITIES, SPEECH, TEXT, Config, SpeechLM

# In place of SYSTEM_PROMPT, which asks for a thought and an answer in tags.
ASR_SYSTEM, ASR_REQUEST = "You are a helpful assistant.", "Transcribe the audio clip into text."
TAGS = re.compile(r"<think>.*</think>|</?(?:think|answer)>", re.DOTALL)  # a trained model may write them all the same


# ==== 1. Numbers ======================================================================================================
def wilson(right, n, z=1.96):
    """95 % Wilson interval of a share, `right` of `n` -> (low, high), each 0 to 1."""
    share, spread = right / n, z**2 / n
    half = z * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    return tuple((share + spread / 2 + sign * half) / (1 + spread) for sign in (-1, 1))


def mean_and_interval(values):
    """Mean of [n, ...] over n, and half the width of its 95 % interval (1.96 standard errors)."""
    return values.mean(0), 1.96 * values.std(0) / math.sqrt(len(values))


def table(rows):
    """{name: {column: cell}} -> aligned text; a dash where a row has no such cell, or nan."""
    return pandas.DataFrame.from_dict(rows, "index").to_string(na_rep="-", float_format="{:.1f}".format)


# ==== 2. Table 1: accuracy on speech (A) and on text (T), MRR =========================================================
def detach_lora(lm):
    """Put the frozen layers back in place of LoRA's: the base model."""
    for parent in list(lm.decoder.layers.modules()):
        for name, child in parent.named_children():
            if isinstance(child, tars.LoRALinear):
                setattr(parent, name, child.linear)


def load_adapter(lm, path):
    """Attach a saved adapter in place of any other; one of another model or rank is refused."""
    scale = json.loads((Path(path) / "adapter_config.json").read_text())
    detach_lora(lm)
    tars.attach_lora(lm, scale["r"], scale["lora_alpha"])
    # Names from the layers on: where the decoder sits in the model differs between versions of transformers.
    tail = partial(re.sub, r"^.*?layers\.|\.weight$", "")
    weights = {tail(name): weight for name, weight in lm.model.named_parameters() if weight.requires_grad}
    tensors = {tail(name): x for name, x in load_file(Path(path) / "adapter_model.safetensors").items()}
    here, there = ({(name, tuple(x.shape)) for name, x in some.items()} for some in (weights, tensors))
    if wrong := sorted(here ^ there):
        raise SystemExit(f"{path} is no adapter of this model: {len(wrong)} tensors differ, such as {wrong[0]}")
    for name, weight in weights.items():
        weight.data.copy_(tensors[name])


def speech_lms(args):
    """Yield (name, SpeechLM, the models it is made of): the base, which is loaded once, the cascade, each adapter."""
    lm = SpeechLM.from_pretrained(args.model)
    listener = Listener(args.cascade, DEVICE) if args.cascade and not args.asr else None
    for adapter in args.adapter:  # a wrong one is refused before anything is measured
        load_adapter(lm, adapter)
    detach_lora(lm)
    yield "base", lm, [args.model]
    if listener:
        yield f"cascade of {args.cascade}", cascade(lm, listener), [args.model, args.cascade]
    for adapter in args.adapter:
        load_adapter(lm, adapter)
        yield adapter, lm, [args.model, adapter]


def cascade(lm, listener):
    """The same model behind a recogniser: in place of the clip it reads the transcript."""
    reader = copy(lm)
    reader.spoken_turns = lambda questions: [
        lm.embed_text(listener.transcribe(tars.read_clip(q["audio"]["bytes"], q["key"]))) for q in questions]
    return reader


def fingerprint(path):
    """Names, sizes and times of change of a model's or an adapter's files; of one on the hub, its commit."""
    if not Path(path).is_dir():
        return Path(cached_file(path, "config.json")).parent.name
    files = sorted(file for file in Path(path).iterdir() if file.suffix in (".json", ".safetensors"))
    return [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]


def cached_records(name, parts, data, questions, answer, args, cfg):
    """The records of one measurement, one for each modality of each question, in the data's order.
    All are kept in args.out: those of an earlier run are read from there, the rest come one by one from
    answer(questions). The file's name holds a hash of everything the answers depend on; parts: the models among it.
    """
    begun = {"model": args.model, "name": name, "data": Path(data).name, "max_new_tokens": cfg.max_new_tokens,
             "eval_batch": cfg.eval_batch, "extractor": cfg.extractor, "questions": questions._fingerprint,
             "files": [fingerprint(path) for path in parts]}
    file = Path(args.out) / f"{Path(name).name}-{Path(data).name}-{zlib.crc32(json.dumps(begun).encode()):08x}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    done, order = resume(file, begun), np.argsort(questions["seconds"], kind="stable")
    if len(done) < 2 * len(questions):
        first = len(done) // (2 * cfg.eval_batch) * cfg.eval_batch  # whole batches, to form the same ones again
        done = done[: 2 * first]
        tars.write_aside(file, "".join(json.dumps(line) + "\n" for line in [begun, *done]).encode())
        for record in answer(questions.select(order[first:])):
            tars.append_line(file, record)
            done.append(record)
    return [record for i in np.argsort(order) for record in done[2 * i : 2 * i + 2]]


def table_1(args, cfg, sets):
    """Print Table 1: one row a model, two columns a data set, averages, unparsed and cut answers, length, MRR."""
    extract, rows = tars.load_extractor(cfg), {}
    for name, lm, parts in speech_lms(args):
        answer = partial(tars.answer_greedily, lm, extract=extract, cfg=cfg)
        rows[name] = row = row_of({data: cached_records(name, parts, data, questions, answer, args, cfg)
                                   for data, questions in sets.items()})
        row["MRR %"] = tars.modality_recovery_rate(row["avg A"], cfg.base_text_accuracy or rows["base"]["avg T"])
    sizes = ", ".join(f"{data}: {len(questions)} questions" for data, questions in sets.items())
    print(f"{sizes}; A speech, T text, [95 % interval]\n{table(rows)}")


def row_of(measured):
    """{data set: records} -> {column: cell} of Table 1, without MRR."""
    records = pandas.DataFrame([{"data": data} | record for data, some in measured.items() for record in some])
    right, row = records.groupby(["data", "modality"], sort=False)["right"], {}
    for (data, modality), some in right:
        low, high = (100 * x for x in wilson(some.sum(), len(some)))
        row[f"{data} {'AT'[MODALITIES.index(modality)]} %"] = f"{100 * some.mean():.1f} [{low:.1f}, {high:.1f}]"
    average = 100 * right.mean().groupby("modality").mean()
    row |= {"avg A": average["speech"], "avg T": average["text"]}
    told = pandas.DataFrame({"unparsed A/T %": 100 * records["answer"].isna(), "cut A/T %": 100 * records["cut"],
                             "tokens A/T": records["tokens"]}).groupby(records["modality"]).mean()
    return row | {column: f"{mean['speech']:.1f}/{mean['text']:.1f}" for column, mean in told.items()}


# ==== 3. Word error rate: did recognition improve, and not reasoning? =================================================
def transcribe(args, cfg, sets):
    """Print the word error rate of each model as a transcriber of the clips, against the text they were spoken from."""
    rows = {}
    for name, lm, _ in speech_lms(args):
        if lm.tokenizer.unk_token_id in lm.tokenizer(ASR_SYSTEM + ASR_REQUEST).input_ids:
            raise SystemExit(f"--asr: the tokenizer of {args.model} cannot write {ASR_REQUEST!r}; the demo's cannot")
        writer, rows[name] = copy(lm), {}
        writer.family = type("Transcriber", (lm.family,), {
            "before_user": lm.family.before_user.replace(tars.SYSTEM_PROMPT, ASR_SYSTEM),
            "after_user": ASR_REQUEST + lm.family.after_user})
        for data, questions in sets.items():
            errors = []
            for batch in tars.question_batches(questions, cfg.eval_batch, "asr"):
                prompts = [[writer.prompt(turn)] for turn in lm.spoken_turns(batch)]
                outputs = lm.detokenize(*lm.rollout(prompts, 1, cfg.max_new_tokens, temperature=0)[:2])
                errors += [word_error_rate(q["prompt_for_tts"], TAGS.sub(" ", text))
                           for q, text in zip(batch, outputs, strict=True)]
            mean, half = mean_and_interval(100 * np.array(errors))
            rows[name][data] = f"{mean:.1f} +- {half:.1f}"
    print(f"word error rate in percent, mean over clips and its 95 % interval\n{table(rows)}")


def ask(args, cfg):
    """Print what the base model and each adapter answer to a clip, or to a written question, with its options."""
    spoken = re.search(r"\.(wav|mp3|flac|ogg|opus|aiff?)$", args.ask, re.IGNORECASE)
    audio = {"bytes": wav_bytes(decode_clip({"bytes": None, "path": args.ask}))} if spoken else {}
    for name, lm, _ in speech_lms(args):
        turn = lm.spoken_turns([{"key": args.ask, "audio": audio}])[0] if spoken else lm.embed_text(args.ask)
        ids, mask, truncated = lm.rollout([[lm.prompt(turn)]], 1, cfg.max_new_tokens, temperature=0)
        print(f"{name}: {lm.detokenize(ids, mask)[0]}{' ... (cut)' if truncated else ''}")


# ==== 4. Figure 2: how far spoken and written states drift apart, layer by layer ======================================
@torch.no_grad()
def layer_cosines(lm, questions, cfg):
    """Teacher-force the model's own greedy text answers under both prompts -> cosine per question and layer [n, L]."""
    cosines = []
    for batch in tars.question_batches(questions, cfg.eval_batch, "layers"):
        prompts = lm.embed_prompts(batch)  # b lists of M prompts [P, H]
        ids, mask, _ = lm.rollout([[question[TEXT]] for question in prompts], 1, cfg.max_new_tokens, temperature=0)
        answer, mask = lm.embed_tokens(ids[:, 0, 0]), mask[:, 0, 0]  # [b, C, H], [b, C]
        states = []
        for m in (SPEECH, TEXT):
            embeds, prompt_mask = tars.pad_left([question[m] for question in prompts])  # [b, P, H], [b, P]
            embeds, seen = torch.cat([embeds, answer], dim=1), torch.cat([prompt_mask, mask], dim=1)  # P + C
            output = lm.run_decoder(embeds, seen, tars.positions(seen), output_hidden_states=True)
            states.append(torch.stack([h[:, -mask.shape[1] :] for h in output.hidden_states[1:]]))  # [L, b, C, H]
        cosine = F.cosine_similarity(states[SPEECH].float(), states[TEXT].float(), dim=-1) * mask  # [L, b, C]
        cosines.append((cosine.sum(-1) / mask.sum(-1)).T.cpu())  # the mean over an answer's tokens, [b, L]
    return torch.cat(cosines)


def drift(args, cfg, sets):
    """Print the cosine per layer of every model over all data sets; with --plot, draw it."""
    lines = {name: mean_and_interval(torch.cat([layer_cosines(lm, q, cfg) for q in sets.values()]).numpy())
             for name, lm, _ in speech_lms(args)}
    layers = range(1, len(next(iter(lines.values()))[0]) + 1)
    rows = {f"layer {n}": {name: f"{mean[n - 1]:.4f} +- {half[n - 1]:.4f}" for name, (mean, half) in lines.items()}
            for n in layers}
    print(f"cosine of spoken and written states on own text answers, mean and 95 % interval\n{table(rows)}")
    if args.plot:
        draw({name: (layers, *line) for name, line in lines.items()}, "layer", "cosine of spoken and written states",
             args.plot)


def draw(lines, x_label, y_label, path):
    """A figure of {name: (x, mean, half the height of the band around it)}."""
    import matplotlib.pyplot as plt  # optional

    figure, axis = plt.subplots(figsize=(7, 4))
    for name, (x, mean, half) in lines.items():
        axis.plot(x, mean, label=name)
        axis.fill_between(x, mean - half, mean + half, alpha=0.2)
    axis.set(xlabel=x_label, ylabel=y_label)
    axis.locator_params(axis="x", integer=True)
    axis.legend()
    figure.savefig(path, dpi=150, bbox_inches="tight")


# ==== 5. Curves over training =========================================================================================
def curves(args):
    """Plot accuracy, length of answers and dense rewards over steps: roll-outs as lines, evaluations as dots."""
    import matplotlib.pyplot as plt  # optional

    figure, axes = plt.subplots(2, 3, figsize=(13, 7), constrained_layout=True)
    panels = (("acc_speech", "spoken accuracy, %"), ("length_speech", "tokens of a spoken answer"),
              ("rep_speech", "R_rep (cosine)"), ("acc_text", "written accuracy, %"),
              ("length_text", "tokens of a written answer"), ("beh_speech", "R_beh (cosine)"))
    for folder in args.curves:
        log = pandas.DataFrame(read_lines(Path(folder) / "log.jsonl")).set_index("step")
        for axis, (key, label) in zip(axes.flat, panels, strict=True):
            scale = 100 if key.startswith("acc") else 1
            color = axis.plot([], label=Path(folder).name)[0].get_color()  # the same in each panel, drawn or not
            axis.set(xlabel="step", ylabel=label)
            if key in log and log[key].any():  # a baseline has no roll-outs of its own, plain GRPO no dense rewards
                axis.plot(scale * log[key].rolling(min(20, len(log))).mean(), color=color)
            if (dots := "eval_" + key.removeprefix("acc_")) in log:
                axis.plot(scale * log[dots].dropna(), "o", color=color)
    axes.flat[0].legend()
    figure.suptitle("Lines: roll-outs at the training temperature, mean of 20 steps. Dots: greedy, evaluation set.")
    figure.savefig(args.plot or "curves.png", dpi=150)


# 97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom; from 15 on they are near 2.1.
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14)


def paired_difference(differences):
    """Differences of n pairs -> their mean, half of its 95 % interval (nan if n is 0 or 1), how many are above 0."""
    d = np.array(differences)
    t = STUDENT[len(d) - 2] if len(d) < 16 else 2.1
    half = t * d.std(ddof=1) / math.sqrt(len(d)) if len(d) > 1 else math.nan
    return d.mean(), half, int((d > 0).sum())


def accuracies(log, summary, modality):
    """Accuracy in percent by step: of the base model at 0, then of each evaluation of a run."""
    steps = {line["step"]: line[f"eval_{modality}"] for line in log if "eval_speech" in line}
    return 100 * pandas.Series({0: summary[f"base_{modality}"]} | steps)


def read_groups(folders):
    """Finished runs by the settings in which they differ: {settings: {seed: (log, summary)}}, plain GRPO first.
    A run with another base model or data than its seed's other runs, or another number of steps, is refused.
    """
    runs, groups, first = [], {}, {}
    for folder in folders:
        if not (Path(folder) / "summary.json").exists():
            print(f"{folder} is left out: it is no finished run")
            continue
        cfg, summary = (json.loads((Path(folder) / name).read_text()) for name in ("config.json", "summary.json"))
        runs.append((folder, cfg, read_lines(Path(folder) / "log.jsonl"), summary))
    runs.sort(key=lambda run: bool(run[1]["alpha"] or run[1]["beta"] or "method" in run[1]))
    names = [name for name in dict.fromkeys(name for run in runs for name in run[1])
             if name not in tars.FREE | {"seed", "model"} and len({run[1].get(name) for run in runs}) > 1]
    for folder, cfg, log, summary in runs:
        hidden = {"alpha", "beta"} if "method" in cfg else {}  # a baseline of course/ has no rewards
        shown = [f"{name} {cfg[name]}".removesuffix(".0") for name in names if name in cfg.keys() - hidden]
        group, seed = groups.setdefault(", ".join(shown) or "default", {}), cfg["seed"]
        same = {seed: (cfg["model"], summary["content"]), "steps": log[-1]["step"]}
        if seed in group or any(first.setdefault(key, value) != value for key, value in same.items()):
            raise SystemExit(f"--compare: {folder} does not fit the other runs of seed {seed}: its base model, data"
                             " or number of steps differ, or nothing does")
        group[seed] = log, summary
    return groups


def compare_runs(args):
    """Print what each group of settings reached over its seeds, against plain GRPO or else the first group."""
    groups = read_groups(args.compare)
    plain, numbers = next(iter(groups)), {name: f"({n})" for n, name in enumerate(groups, 1)}
    rows, of_seed = {}, {}  # of both tables
    for name, runs in groups.items():
        row = rows[f"{numbers[name]} {name}"] = {"n": len(runs)}
        for m in MODALITIES:
            scores = [100 * summary[m] for _, summary in runs.values()]
            row[f"{m} %"] = f"{np.mean(scores):.1f} +- {np.std(scores):.1f}"
        both = runs.keys() & groups[plain].keys()
        mean, half, wins = paired_difference(
            [100 * runs[seed][1]["speech"] - 100 * groups[plain][seed][1]["speech"] for seed in both])
        interval = f" [{mean - half:+.1f}, {mean + half:+.1f}]" if len(both) > 1 else ""
        row["speech minus (1), wins"] = "-" if name == plain else f"{mean:+.1f}{interval}, {wins} of {len(both)}"
        for seed, (_, summary) in runs.items():
            cells = of_seed.setdefault(seed, dict.fromkeys(["base", *numbers.values()], "-"))
            for column, when in (("base", "base_"), (numbers[name], "")):
                cells[column] = " / ".join(f"{100 * summary[when + m]:.1f}" for m in MODALITIES)
    print(f"{table(rows)}\n\nspeech / text %\n{table(dict(sorted(of_seed.items())))}")
    if args.plot:  # straight lines between evaluations
        curves = {name: [accuracies(*run, "speech") for run in runs.values()] for name, runs in groups.items()}
        curves["in writing, all runs"] = [accuracies(*run, "text") for runs in groups.values() for run in runs.values()]
        lines = {name: pandas.concat(some, axis=1).sort_index().interpolate("index") for name, some in curves.items()}
        draw({name: (x.index, x.mean(axis=1), x.std(axis=1, ddof=0)) for name, x in lines.items()}, "step",
             "accuracy, %", args.plot)


# ==== 6. --explain: one group worked through, equation by equation ====================================================
def explain(args, cfg):
    """train_step on the first question, each equation with its numbers.
    Settings, and the adapter once it is saved, are those of the run args.explain; without one, those of args.model.
    """
    lm, question = SpeechLM.from_pretrained(cfg.model), tars.load_questions(cfg.data)[0]
    optimizer = tars.make_trainable(lm, replace(cfg, lr=0.0))  # nothing is updated
    if trained := args.explain and (Path(args.explain) / "adapter_config.json").exists():
        load_adapter(lm, args.explain)
    embedder, extract = tars.load_embedder(cfg) if cfg.beta else None, tars.load_extractor(cfg)
    generator = torch.Generator(lm.device).manual_seed(cfg.seed)
    prompts, half = lm.embed_prompts([question]), cfg.group_size // 2
    ids, mask, cut = rollout = lm.rollout(prompts, half, cfg.max_new_tokens, cfg.temperature, generator)
    lm.rollout = lambda *args: rollout  # [1, M, G/2, C] twice, [1, M, G/2]; the step takes it too
    _, group = tars.train_step(lm, [question], embedder, extract, optimizer, cfg, generator)
    with torch.no_grad():
        logps, states = lm.score(prompts, ids, mask, cfg.temperature)  # [1, M, G/2, C], [1, M, G/2, L, H]
    answers, spoken = group["speech"] + group["text"], group["speech"]
    letters = extract([question] * len(answers), [a["completion"] for a in answers])
    reward = torch.tensor([a["reward"] for a in answers]).view(1, len(MODALITIES), half)
    other = tars.modality_advantages(reward, not cfg.joint_norm).flatten().tolist()
    for i, (a, letter, A) in enumerate(zip(answers, letters, other, strict=True)):
        r = a.get("reference", -1)
        a |= asdict(cfg) | {"name": f"{'ST'[i // half]}{i % half + 1}", "of": f"T{r + 1}" if r >= 0 else "none: 0",
                            "says": textwrap.shorten(a["completion"], 94, placeholder=" ..."), "letter": letter or "-",
                            "mean": a["reward"] - a["advantage"], "other_mean": a["reward"] - A, "other_A": A}
    references = torch.tensor([[a["reference"] for a in spoken]], device=lm.device)
    y_star = tars.reference_features(states[:, TEXT], references)  # [1, G/2, L, H]
    near = F.cosine_similarity(states[:, SPEECH], y_star, dim=-1)[0]  # [G/2, L]
    used = tars.layer_weights(cfg.layers, near.shape[-1]).nonzero()[:, 0].tolist()
    for a, cosines in zip(spoken, near, strict=True):
        shown = sorted({used[0], used[len(used) // 2], used[-1]})
        a |= {"some": "  ".join(f"layer {layer + 1} {cosines[layer]:.3f}" for layer in shown), "n": len(used)}

    print(f"{question['key']}: {tars.written_question(question)}\n"
          f"The right answer is {LETTERS[question['answer_index']]}. S answers are to the spoken question, T answers "
          "to the written one." + (f"\nThe adapter of {args.explain} is loaded." if trained else ""))
    show("The model answers G times, half from speech, half from text", "rollout", answers, "{says}")
    show("Eq. (3)  R_base = R_acc + lambda R_fmt", "base_reward", answers,
         "answer {letter}:  {acc:.0f} + {lam:g} * {fmt:.0f} = {base:.2f}")
    show("Each spoken answer gets a correct written one, drawn at random", "pick_references", spoken, "-> {of}")
    if cfg.alpha:
        show("Eq. (4), (5)  R_rep = mean over layers of cos(pooled states)", "representation_reward", spoken,
             "cos with {of}:  {some}   mean of {n} layers {rep:.3f}")
    if cfg.beta:
        show("Eq. (6)  R_beh = cos(E(spoken), E(written))", "behavior_reward", spoken, "cos with {of}: {beh:.3f}")
    show("Eq. (2)  R = R_base + alpha R_rep + beta R_beh", "total_reward", answers,
         "{base:.2f} + {alpha:g} * {rep:.3f} + {beta:g} * {beh:.3f} = {reward:.3f}")
    mean, other = ("group", "a mean for each modality") if cfg.joint_norm else ("modality", "one joint mean")
    show(f"Eq. (7)  A = R - mean of its {mean}", "modality_advantages", answers,
         f"{{reward:.3f}} - {{mean:.3f}} = {{advantage:+.3f}}    with {other}, {{other_mean:.3f}}: {{other_A:+.3f}}")
    # The token whose loss is shown: from the middle of the answer with the largest advantage.
    best = max(range(len(answers)), key=lambda i: abs(answers[i]["advantage"]))
    A, n = answers[best]["advantage"], 1 / tars.token_weights(mask, cut).max()
    t = int(mask.flatten(0, 2)[best].sum()) // 2
    clipped = min(1.5, 1 + cfg.eps_high) * A  # were the ratio 1.5
    answers[best] |= {"word": lm.tokenizer.decode(ids.flatten(0, 2)[best, t].item()), "t": t + 1,
                      "logp": logps.flatten(0, 2)[best, t].item()}
    show("Loss of one token, - min(rho A, clip(rho) A) / tokens", "grpo_loss", [answers[best]],
         "token {t}, {word!r}: log pi = {logp:.3f}, rho = exp(0) = 1\n"
         f"  - min(1 * {A:+.3f}, 1 * {A:+.3f}) / {n:.0f} = {-A / n:+.5f}\n"
         "  before the first update rho is 1 and nothing is clipped; what counts is the gradient, A / tokens\n"
         f"  were rho 1.5: - min({1.5 * A:+.3f}, {clipped:+.3f}) / {n:.0f} = {-min(1.5 * A, clipped) / n:+.5f}")


def show(title, function, answers, line):
    """A block of --explain: a title, the function of tars.py that it is about, a line for each answer."""
    print(f"\n{title:<64}{function + '()':>36}", *(f"  {a['name']}  {line.format(**a)}" for a in answers), sep="\n")


# ==== 7. --random-weights: does a run fit the GPU? ====================================================================
# Of each repository on the hub: its family, and the settings that differ from transformers' defaults.
HUB_SETTINGS = {
    "Qwen/Qwen2.5-Omni-7B": (tars.Qwen25Omni, {"vision_config": {"hidden_size": 1280}}),
    "Qwen/Qwen2.5-Omni-3B": (tars.Qwen25Omni, {
        "text_config": {"hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16,
                        "num_key_value_heads": 2, "intermediate_size": 11_008, "vocab_size": 151_936},
        "audio_config": {"output_dim": 2048}, "vision_config": {"hidden_size": 1280, "out_hidden_size": 2048}}),
    "microsoft/Phi-4-multimodal-instruct": (
        tars.Phi4Multimodal, {"tie_word_embeddings": True, "num_attention_heads": 24}),
}


def byte_tokenizer(family):
    """A stand-in tokenizer for random weights: one token a byte, and the control tokens of the family's template."""
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    turns = family.before_user, family.before_audio, family.after_audio, family.after_user, *family.end_of_turn
    control = sorted({*re.findall(r"<\|\w+\|>", "".join(turns))})
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def with_random_weights(path):
    """The architecture of `path`, weights drawn at random, one token a byte: nothing is downloaded.
    `path` is a directory with a config.json or a name of HUB_SETTINGS. Answers never end by themselves.
    """
    family, settings = HUB_SETTINGS.get(path) or (tars.family_of(path), None)
    kind = family.model_class.config_class
    config = kind(**settings) if settings else kind.from_pretrained(path)
    sizes = {"feature_size": config.audio_config.num_mel_bins, "chunk_length": 300} if family is tars.Qwen25Omni else {}
    with torch.device(DEVICE):
        model = family.model_class._from_config(config, dtype=torch.bfloat16 if BFLOAT16 else torch.float32)
    lm = SpeechLM(family, model, byte_tokenizer(family), family.feature_extractor_class(**sizes))
    lm.eos_ids = lm.eos_ids[:0]
    return lm


def timed(seconds, name, method, *args, **kwargs):
    """Call a method; the seconds it takes are added to seconds[name]."""
    start = clock()
    result = method(*args, **kwargs)
    seconds[name] += clock() - start
    return result


def clock():
    """Seconds, when all that was asked of the GPU is done."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def random_weights(args, cfg):
    """Two training steps on noise, to see seconds a phase and peak memory. Answers are cut, or end by chance.
    E is the n-gram one: Qwen3-Embedding-0.6B would take another 1.2 GB in bfloat16.
    """
    lm, seconds = with_random_weights(cfg.model), args.audio_seconds
    if args.mean_tokens:  # one token in so many ends an answer: the distribution over tokens is nearly uniform
        lm.eos_ids = torch.arange(0, lm.model.lm_head.out_features, args.mean_tokens, device=lm.device)
    rng = np.random.default_rng(cfg.seed)
    clips = rng.uniform(-0.5, 0.5, (cfg.questions_per_step, int(tars.SAMPLE_RATE * seconds)))
    # Written, a question of the paper's takes 340 tokens, and 73 s read aloud.
    questions = [{"key": f"noise-{i}", "question": "word " * int(340 / 73 / 5 * seconds), "options": list(LETTERS),
                  "answer_index": 0, "audio": {"bytes": wav_bytes(clip)}} for i, clip in enumerate(clips)]
    optimizer, generator = tars.make_trainable(lm, cfg), torch.Generator(lm.device).manual_seed(cfg.seed)
    phases = dict.fromkeys(("embed_prompts", "rollout", "score"), 0.0)
    print("".join(f"{name:>15}" for name in ("step", *phases, "backward, rest", "total s", "tokens/s", "peak GiB")))
    for name in phases:
        setattr(lm, name, partial(timed, phases, name, getattr(lm, name)))
    for step in range(2):
        phases |= dict.fromkeys(phases, 0.0)
        start = clock()
        metrics, _ = tars.train_step(lm, questions, tars.embed_ngrams, tars.extract_answers, optimizer, cfg, generator)
        total = clock() - start
        tokens = sum(metrics[f"length_{m}"] for m in MODALITIES) * len(questions) * cfg.group_size / 2
        peak = torch.cuda.max_memory_reserved() / 2**30 if DEVICE == "cuda" else math.nan
        numbers = (*phases.values(), total - sum(phases.values()), total, tokens / total, peak)
        print(f"{step + 1:>15}" + "".join(f"{x:>15.2f}" for x in numbers), flush=True)


# ==== 8. The command line =============================================================================================
def main(arguments=None):
    """Parse the command line and run one of the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add, add_list = partial(parser.add_argument, metavar=""), partial(parser.add_argument, metavar="", nargs="+")
    add("--model", default="runs/demo/model", help="base model [runs/demo/model]")
    add_list("--adapter", help="--out directories of tars.py [runs/tars with the demo's model]")
    add_list("--data", help="data sets [the model's own]")
    add("--limit", type=int, help="only the first so many questions of each data set [all]")
    add("--out", default="runs/eval", help="where every answer is kept [runs/eval]")
    add("--cascade", help="a Whisper model; the base model reads its transcripts in place of the clips")
    parser.add_argument("--asr", action="store_true", help="measure the model as a transcriber")
    parser.add_argument("--layers", action="store_true", help="Figure 2")
    add("--ask", help="a clip, or a written question with its options, that the models answer")
    add_list("--curves", help="runs whose logs are drawn")
    add_list("--compare", help="runs of several seeds, to compare by the settings in which they differ")
    add("--explain", nargs="?", const="", help="one group, equation by equation; of a run, if one is given")
    add("--plot", help="file of the figure, such as layers.png")
    add("--random-weights", help="two training steps of this architecture on noise: seconds a phase, peak memory")
    add("--audio-seconds", type=float, default=60.0, help="with --random-weights: length of its clips [60]")
    add("--mean-tokens", type=int, help="with --random-weights: an answer's mean length [all are cut]")
    args, settings = parser.parse_known_args(arguments)  # other flags are tars.py's
    if settings and (args.compare or args.curves or args.explain):
        parser.error(f"unrecognized arguments: {' '.join(settings)}")
    if args.compare or args.curves:
        return compare_runs(args) if args.compare else curves(args)
    name = args.random_weights or args.model
    if name == Config.model and not (args.explain or Path(name).exists()):  # an untrained demo is not worth measuring
        raise SystemExit(f"{name} does not exist: run `python tars.py` first, or give --model")
    run = args.explain and json.loads((Path(args.explain) / "config.json").read_text())  # the settings of that run
    cfg = Config(**run) if run else tars.parse_config(["--model", name, *settings])
    if args.adapter is None:
        args.adapter = ["runs/tars"] if args.model == Config.model else []
    if args.random_weights or args.explain is not None or args.ask:
        return (random_weights if args.random_weights else ask if args.ask else explain)(args, cfg)
    sets = {str(Path(path)): tars.load_questions(path) for path in args.data or [cfg.eval_data]}
    sets = {path: questions.select(range(len(questions))[: args.limit or None]) for path, questions in sets.items()}
    (transcribe if args.asr else drift if args.layers else table_1)(args, cfg, sets)


if __name__ == "__main__":
    main()
