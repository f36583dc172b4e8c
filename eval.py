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

Imports: this file imports tars.py and data_prep.py; no program imports this file.
"""

import argparse
import json
import math
import re
import textwrap
import time
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils import cached_file

import tars
from data_prep import Listener, decode_clip, read_lines, resume, wav_bytes, word_error_rate
from tars import BFLOAT16, DEVICE, LETTERS, MODALITIES, SPEECH, TEXT, Config, SpeechLM, judge

# In place of SYSTEM_PROMPT, which asks for a thought and an answer in tags.
ASR_SYSTEM, ASR_REQUEST = "You are a helpful assistant.", "Transcribe the audio clip into text."


# ==== 1. Numbers ======================================================================================================
def wilson(right, n, z=1.96):
    """95 % Wilson interval of a share, `right` of `n` -> (low, high), each 0 to 1."""
    share, spread = right / n, z**2 / n
    half = z * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    return tuple((share + spread / 2 + sign * half) / (1 + spread) for sign in (-1, 1))


def mean_and_interval(values):
    """Mean of [n, ...] over n, and half the width of its 95 % interval (1.96 standard errors)."""
    return values.mean(0), 1.96 * values.std(0) / math.sqrt(len(values))


def table(head, rows):
    """Rows of strings under a head: columns as wide as needed, the first left-aligned, the others right-aligned."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(row):
        return "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))

    return "\n".join(map(line, [head, *rows]))


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

    def tail(name):  # where the decoder sits in the model differs between versions of transformers
        return name.split("layers.", 1)[-1].removesuffix(".weight")

    weights = {tail(name): weight for name, weight in lm.model.named_parameters() if weight.requires_grad}
    tensors = {tail(name): x for name, x in load_file(Path(path) / "adapter_model.safetensors").items()}
    here, there = ({(name, tuple(x.shape)) for name, x in some.items()} for some in (weights, tensors))
    if wrong := sorted(here ^ there):
        raise SystemExit(f"{path} is no adapter of this model: {len(wrong)} tensors differ, such as {wrong[0]}")
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(tensors[name])


def speech_lms(args):
    """Yield (name, SpeechLM) for the base model and for each adapter on it. The model is loaded once."""
    lm = SpeechLM.from_pretrained(args.model)
    for adapter in args.adapter:  # a wrong one is refused before anything is measured
        load_adapter(lm, adapter)
    detach_lora(lm)
    yield "base", lm
    for adapter in args.adapter:
        load_adapter(lm, adapter)
        yield adapter, lm


def fingerprint(path):
    """What tells the files of a model or an adapter from others: their names, sizes and times of change; on the hub
    the commit. Nothing is loaded for it.
    """
    if not Path(path).is_dir():
        return Path(cached_file(path, "config.json")).parent.name
    files = sorted(file for file in Path(path).iterdir() if file.suffix in (".json", ".safetensors"))
    return [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]


def cached_records(name, paths, data, questions, each, answer, args, cfg):
    """The records of one measurement, `each` of them a question, in the data's order; all are kept in args.out.
    Those of an earlier run are read from there, the rest come one by one from answer(questions). The file's name holds
    a hash of everything the answers depend on; paths: the models among it.
    """
    begun = {"model": args.model, "name": name, "data": data, "max_new_tokens": cfg.max_new_tokens,
             "eval_batch": cfg.eval_batch, "extractor": cfg.extractor, "questions": questions._fingerprint,
             "files": [fingerprint(path) for path in paths]}
    file = Path(args.out) / f"{Path(name).name}-{Path(data).name}-{zlib.crc32(json.dumps(begun).encode()):08x}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    done, order = resume(file, begun), np.argsort(questions["seconds"], kind="stable")
    if len(done) < each * len(questions):
        first = len(done) // (each * cfg.eval_batch) * cfg.eval_batch  # whole batches, to form the same ones again
        done = done[: each * first]
        tars.write_aside(file, "".join(json.dumps(line) + "\n" for line in [begun, *done]).encode())
        for record in answer(questions.select(order[first:])):
            tars.append_line(file, record)
            done.append(record)
    return [record for i in np.argsort(order) for record in done[each * i : each * (i + 1)]]


def cascade(lm, listener, questions, extract, cfg):
    """Whisper transcribes each clip, the model answers the transcript in writing. Yields records."""
    for batch in tars.question_batches(questions, cfg.eval_batch, "cascade"):
        transcripts = [listener.transcribe(tars.read_clip(q["audio"]["bytes"], q["key"])) for q in batch]
        with torch.no_grad():
            prompts = [[lm.prompt(lm.embed_text(text))] for text in transcripts]  # b lists of one prompt [P, H]
        ids, mask, cut = lm.rollout(prompts, 1, cfg.max_new_tokens, temperature=0)  # [b, 1, 1, C]
        completions = lm.detokenize(ids, mask)
        letters, acc, _ = judge(batch, completions, extract)
        columns = ("key", "heard", "completion", "answer", "right", "tokens", "cut")
        numbers = (x.flatten().tolist() for x in (acc == 1, mask.sum(-1), cut))
        for values in zip([q["key"] for q in batch], transcripts, completions, letters, *numbers, strict=True):
            yield {"modality": "speech", **dict(zip(columns, values, strict=True))}


def table_1(args, cfg, sets):
    """Print Table 1: one row a model, two columns a data set, averages, unparsed and cut answers, length, MRR."""
    extract, listener = tars.load_extractor(cfg), Listener(args.cascade, DEVICE) if args.cascade else None
    rows, base_text = [], cfg.base_text_accuracy or None
    for name, lm in speech_lms(args):
        paths, answer = [args.model], partial(tars.answer_greedily, lm, extract=extract, cfg=cfg)
        paths += [name] * (name in args.adapter)
        records = {data: cached_records(name, paths, data, questions, len(MODALITIES), answer, args, cfg)
                   for data, questions in sets.items()}
        if base_text is None:  # of the base; 0 is a number too
            base_text = np.mean([accuracy(some, "text")[0] for some in records.values()])
        rows.append(row_of(name, records, base_text))
        if name == "base" and listener:
            name, paths = f"cascade {args.cascade}", [args.model, args.cascade]
            answer = partial(cascade, lm, listener, extract=extract, cfg=cfg)
            rows.append(row_of(name, {data: cached_records(name, paths, data, questions, 1, answer, args, cfg)
                                      for data, questions in sets.items()}, base_text))
    sizes = ", ".join(f"{data}: {len(questions)} questions" for data, questions in sets.items())
    columns = [f"{data} {column}" for data in sets for column in ("A %", "T %")]
    head = ["model", *columns, "avg A", "avg T", "unparsed A/T %", "cut A/T %", "tokens A/T", "MRR %"]
    print(f"{sizes}; A speech, T text, [95 % interval]\n" + table(head, rows))


def accuracy(records, modality):
    """Records of one data set -> (accuracy in percent, the table's cell with its interval)."""
    right = [r["right"] for r in records if r["modality"] == modality]
    if not right:  # the cascade does not write
        return math.nan, "-"
    low, high = wilson(sum(right), len(right))
    return 100 * np.mean(right), f"{100 * np.mean(right):.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def row_of(name, measured, base_text):
    """One row of Table 1 from {data set: records}."""
    cells = [accuracy(records, m) for records in measured.values() for m in MODALITIES]
    average = [np.mean([percent for percent, _ in cells[i :: len(MODALITIES)]]) for i in range(len(MODALITIES))]
    told = []
    for value in (lambda r: 100 * (r["answer"] is None), lambda r: 100 * r["cut"], lambda r: r["tokens"]):
        both = [[value(r) for some in measured.values() for r in some if r["modality"] == m] for m in MODALITIES]
        told.append("/".join(f"{np.mean(values):.1f}" if values else "-" for values in both))
    numbers = [*average, tars.modality_recovery_rate(average[SPEECH], base_text)]
    shown = ["-" if math.isnan(x) else f"{x:.1f}" for x in numbers]
    return [name, *(cell for _, cell in cells), *shown[:-1], *told, shown[-1]]


# ==== 3. Word error rate: did recognition improve, and not reasoning? =================================================
def transcribe(args, cfg, sets):
    """Print the word error rate of each model as a transcriber of the clips, against the text they were spoken from."""
    rows = []
    for name, lm in speech_lms(args):
        before = lm.family.before_user.replace(tars.SYSTEM_PROMPT, ASR_SYSTEM)
        if lm.tokenizer.unk_token_id in lm.tokenizer(ASR_SYSTEM + ASR_REQUEST).input_ids:
            raise SystemExit(f"--asr: the tokenizer of {args.model} cannot even write the request {ASR_REQUEST!r}: "
                             "this model (the demo's, say) was never taught to transcribe")
        with torch.no_grad():
            before, request, after = (lm.embed_text(part, special=True)
                                      for part in (before, ASR_REQUEST, lm.family.after_user))
        cells = []
        for questions in sets.values():
            errors = []
            for batch in tars.question_batches(questions, cfg.eval_batch, "asr"):
                with torch.no_grad():
                    prompts = [[torch.cat([before, turn, request, after])] for turn in lm.spoken_turns(batch)]
                outputs = lm.detokenize(*lm.rollout(prompts, 1, cfg.max_new_tokens, temperature=0)[:2])
                errors += [word_error_rate(q["prompt_for_tts"], transcript(text))
                           for q, text in zip(batch, outputs, strict=True)]
            mean, half = mean_and_interval(100 * np.array(errors))
            cells.append(f"{mean:.1f} +- {half:.1f}")
        rows.append([name, *cells])
    print("word error rate in percent, mean over clips and its 95 % interval\n" + table(["model", *sets], rows))


def transcript(output):
    """An output without the tags, and the thought, of a model that was trained to write them."""
    return re.sub(r"</?(think|answer)>", " ", re.sub(r"<think>.*</think>", "", output, flags=re.DOTALL)).strip()


def ask(args, cfg):
    """Print what the base model and each adapter answer to a clip, or to a written question, with its options."""
    spoken = re.search(r"\.(wav|mp3|flac|ogg|opus|aiff?)$", args.ask, re.IGNORECASE)
    clip = wav_bytes(decode_clip(Path(args.ask).read_bytes())) if spoken else None
    for name, lm in speech_lms(args):
        asked = {"key": args.ask, "audio": {"bytes": clip}}
        with torch.no_grad():
            turn = lm.spoken_turns([asked])[0] if spoken else lm.embed_text(args.ask)
        ids, mask, truncated = lm.rollout([[lm.prompt(turn)]], 1, cfg.max_new_tokens, temperature=0)
        print(f"{name}: {lm.detokenize(ids, mask)[0]}{' ... (cut)' if truncated else ''}")


# ==== 4. Figure 2: how far spoken and written states drift apart, layer by layer ======================================
def token_cosines(speech, text, completion_mask):
    """States [L, b, C, H] of the same tokens under both prompts, mask [b, C] -> cosine per layer, [b, L].
    Token by token, then averaged over the tokens of an answer.
    """
    cosines = F.cosine_similarity(speech.float(), text.float(), dim=-1) * completion_mask  # [L, b, C]
    return (cosines.sum(-1) / completion_mask.sum(-1)).T


@torch.no_grad()
def layer_cosines(lm, questions, cfg):
    """Teacher-force the model's own greedy text answers under both prompts -> cosine per question and layer [n, L]."""
    cosines = []
    for batch in tars.question_batches(questions, cfg.eval_batch, "layers"):
        prompts = lm.embed_prompts(batch)  # b lists of M prompts [P, H]
        ids, mask, _ = lm.rollout([[question[TEXT]] for question in prompts], 1, cfg.max_new_tokens, temperature=0)
        answer, mask = lm.embed_tokens(ids[:, 0, 0]), mask[:, 0, 0]  # [b, C, H], [b, C]
        embeds, prompt_mask = tars.pad_left([prompt for question in prompts for prompt in question])  # [b * M, P, H]
        M, P = len(prompts[0]), prompt_mask.shape[1]
        embeds = torch.cat([embeds, answer.repeat_interleave(M, 0)], dim=1)  # [b * M, P + C, H]
        seen = torch.cat([prompt_mask, mask.repeat_interleave(M, 0)], dim=1)  # [b * M, P + C]
        states = lm.run_decoder(embeds, seen, tars.positions(seen), output_hidden_states=True).hidden_states[1:]
        states = torch.stack([h[:, P:].unflatten(0, (-1, M)) for h in states])  # [L, b, M, C, H]
        cosines.append(token_cosines(states[:, :, SPEECH], states[:, :, TEXT], mask).cpu())
    return torch.cat(cosines)


def drift(args, cfg, sets):
    """Print the cosine per layer of every model over all data sets; with --plot, draw it."""
    lines = {}
    for name, lm in speech_lms(args):
        lines[name] = mean_and_interval(torch.cat([layer_cosines(lm, q, cfg) for q in sets.values()]).numpy())
    layers = range(1, len(next(iter(lines.values()))[0]) + 1)
    rows = [[str(n), *(f"{mean[n - 1]:.4f} +- {half[n - 1]:.4f}" for mean, half in lines.values())] for n in layers]
    print("cosine of spoken and written states on the model's own text answers, mean over questions, 95 % interval")
    print(table(["layer", *lines], rows))
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
        log = read_lines(Path(folder) / "log.jsonl")
        for axis, (key, label) in zip(axes.flat, panels, strict=True):
            scale = 100 if key.startswith("acc") else 1
            drawn = axis.plot([], label=Path(folder).name)[0]  # the same colour in each panel, drawn or not
            axis.set(xlabel="step", ylabel=label)
            values = np.array([scale * line.get(key, 0.0) for line in log])
            if values.any():  # a baseline has no roll-outs of its own, plain GRPO no dense rewards
                window = min(20, len(values))
                smooth = np.convolve(values, np.ones(window) / window, "valid")
                axis.plot(np.arange(window, len(values) + 1), smooth, color=drawn.get_color())
            key = "eval_" + key.removeprefix("acc_")
            dots = [(line["step"], scale * line[key]) for line in log if key in line]
            axis.plot(*zip(*dots, strict=True), "o", color=drawn.get_color()) if dots else None
    axes.flat[0].legend()
    figure.suptitle("Lines: roll-outs at the training temperature, mean of 20 steps. Dots: greedy, evaluation set.")
    figure.savefig(args.plot or "curves.png", dpi=150)


# 97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom; from 15 on they are near 2.1.
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14)


def paired_difference(values, others):
    """Two lists of n numbers, paired -> mean difference, half of its 95 % interval (nan if n is 0 or 1), wins."""
    d = np.array(values) - np.array(others)
    t = STUDENT[len(d) - 2] if len(d) < 16 else 2.1
    half = t * d.std(ddof=1) / math.sqrt(len(d)) if len(d) > 1 else math.nan
    return d.mean(), half, int((d > 0).sum())


def accuracy_curve(log, summary, modality):
    """Accuracy in percent after each step from 0, the base model, on: evaluations, joined by straight lines."""
    evaluated = [line for line in log if "eval_speech" in line]
    accuracies = [summary[f"base_{modality}"], *(line[f"eval_{modality}"] for line in evaluated)]
    steps = [0, *(line["step"] for line in evaluated)]
    return 100 * np.interp(np.arange(steps[-1] + 1), steps, accuracies)


def read_groups(folders):
    """Finished runs by the settings in which they differ: {settings: {seed: (log, summary)}}, plain GRPO first, else as
    given. Unfinished ones are named. A run whose base model or data are not those of its seed's other runs, or whose
    number of steps is not that of the others, is refused.
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
        content, steps = (cfg["model"], summary["content"]), log[-1]["step"]
        fits = content == first.setdefault(seed, content) and steps == first.setdefault("steps", steps)
        if seed in group or not fits:
            raise SystemExit(f"--compare: {folder} does not fit the other runs of seed {seed}: its base model, data"
                             " or number of steps differ, or nothing does")
        group[seed] = log, summary
    if not groups:
        raise SystemExit("--compare: none of the folders holds a finished run")
    return groups


def compare_runs(args):
    """Print what each group of settings reached over its seeds, against plain GRPO or else the first group."""
    groups = read_groups(args.compare)
    plain, rows = next(iter(groups)), []
    raw = {}  # {seed: cells of the second table}
    for number, (name, runs) in enumerate(groups.items(), 1):
        scores = [[100 * summary[m] for _, summary in runs.values()] for m in MODALITIES]
        rows.append([f"({number}) {name}", str(len(runs)), *(f"{np.mean(x):.1f} +- {np.std(x):.1f}" for x in scores)])
        both = sorted(runs.keys() & groups[plain].keys())
        values, others = ([100 * groups[group][seed][1]["speech"] for seed in both] for group in (name, plain))
        mean, half, wins = paired_difference(values, others)
        interval = f" [{mean - half:+.1f}, {mean + half:+.1f}]" if len(both) > 1 else ""
        rows[-1].append("-" if name == plain else f"{mean:+.1f}{interval}, {wins} of {len(both)}")
        for seed, (_, summary) in runs.items():
            base = f"{100 * summary['base_speech']:.1f} / {100 * summary['base_text']:.1f}"
            raw.setdefault(seed, [str(seed), base, *["-"] * len(groups)])
            raw[seed][1 + number] = f"{100 * summary['speech']:.1f} / {100 * summary['text']:.1f}"
    print(table(["settings", "n", "speech %", "text %", "speech minus (1), wins"], rows))
    head = ["seed", "base", *(f"({number})" for number in range(1, len(groups) + 1))]
    print("\nspeech / text %\n" + table(head, [raw[seed] for seed in sorted(raw)]))
    if args.plot:
        curves = {name: [accuracy_curve(*run, "speech") for run in runs.values()] for name, runs in groups.items()}
        curves["in writing, all runs"] = [accuracy_curve(*run, "text") for runs in groups.values()
                                          for run in runs.values()]
        bands = {name: (np.arange(len(lines[0])), np.mean(lines, 0), np.std(lines, 0))
                 for name, lines in curves.items()}
        draw(bands, "step", "accuracy, %", args.plot)


# ==== 6. --explain: one group worked through, equation by equation ====================================================
def explain(args, cfg):
    """train_step on the first question, each equation with its numbers, within 100 columns.
    Settings, and the adapter once it is saved, are those of the run args.explain; without one, those of args.model.
    """
    lm, question = SpeechLM.from_pretrained(cfg.model), tars.load_questions(cfg.data)[0]
    trained = args.explain and (Path(args.explain) / "adapter_config.json").exists()
    if trained:
        load_adapter(lm, args.explain)
    generator, half = torch.Generator(lm.device).manual_seed(cfg.seed), cfg.group_size // 2
    prompts = lm.embed_prompts([question])
    ids, mask, cut = lm.rollout(prompts, half, cfg.max_new_tokens, cfg.temperature, generator)  # [1, M, G/2, C]
    completions = lm.detokenize(ids, mask)
    letters, acc, fmt = judge([question], completions, tars.load_extractor(cfg))
    acc, fmt = (x.to(lm.device).view(cut.shape) for x in (acc, fmt))  # [1, M, G/2]
    base = tars.base_reward(acc, fmt, cfg.lam)
    references = tars.pick_references((acc[:, TEXT] == 1) & ~cut[:, TEXT], generator)  # [1, G/2]
    with torch.no_grad():
        logps, states = lm.score(prompts, ids, mask, cfg.temperature)  # [1, M, G/2, C], [1, M, G/2, L, H]
    rep, beh = torch.zeros_like(base), torch.zeros_like(base)
    weights = tars.layer_weights(cfg.layers, states.shape[-2]).to(lm.device)  # [L]
    y_star = tars.reference_features(states[:, TEXT], references)  # [1, G/2, L, H]
    rep[:, SPEECH] = tars.representation_reward(states[:, SPEECH], y_star, weights)
    if cfg.beta:
        sentences = tars.load_embedder(cfg)(completions).to(lm.device).unflatten(0, base.shape)  # [1, M, G/2, D]
        of_y_star = tars.reference_features(sentences[:, TEXT], references)  # [1, G/2, D]
        beh[:, SPEECH] = tars.behavior_reward(sentences[:, SPEECH], of_y_star)
    reward = tars.total_reward(base, rep, beh, cfg.alpha, cfg.beta)
    advantage = tars.modality_advantages(reward, cfg.joint_norm).flatten()
    other = tars.modality_advantages(reward, not cfg.joint_norm).flatten()

    answers = [f"{m}{s + 1}" for m in "ST" for s in range(half)]  # as the tensors are flattened
    terms = [x.flatten().tolist() for x in (acc, fmt, base, rep, beh, reward, advantage, other)]
    rows = list(zip(answers, completions, letters, *terms, strict=True))
    of = [f"T{r + 1}" if r >= 0 else "none: 0" for r in references[0].tolist()]  # the reference of each spoken answer
    print(f"{question['key']}: {tars.written_question(question)}\n"
          f"The right answer is {LETTERS[question['answer_index']]}. S answers are to the spoken question, T answers "
          "to the written one." + (f"\nThe adapter of {args.explain} is loaded." if trained else ""))
    show("The model answers G times, half from speech, half from text", "rollout",
         [f"  {name}  {textwrap.shorten(text, 94, placeholder=' ...')}" for name, text, *_ in rows])
    show("Eq. (3)  R_base = R_acc + lambda R_fmt", "base_reward",
         [f"  {name}  answer {letter or '-'}:  {a:.0f} + {cfg.lam:g} * {f:.0f} = {b:.2f}"
          for name, _, letter, a, f, b, *_ in rows])
    show("Each spoken answer gets a correct written one, drawn at random", "pick_references",
         ["  " + "   ".join(f"{name} -> {reference}" for name, reference in zip(answers[:half], of, strict=True))])
    near = F.cosine_similarity(states[:, SPEECH], y_star, dim=-1)[0]  # [G/2, L]
    used = weights.nonzero()[:, 0].tolist()
    shown = sorted({used[0], used[len(used) // 2], used[-1]})
    show("Eq. (4), (5)  R_rep = mean over layers of cos(pooled states)", "representation_reward",
         [f"  {name}  cos with {of[s]}:  " + "  ".join(f"layer {layer + 1} {near[s, layer]:.3f}" for layer in shown)
          + f"   mean of {len(used)} layers {rows[s][6]:.3f}" for s, name in enumerate(answers[:half])])
    if cfg.beta:
        show("Eq. (6)  R_beh = cos(E(spoken), E(written))", "behavior_reward",
             [f"  {name}  cos with {of[s]}: {rows[s][7]:.3f}" for s, name in enumerate(answers[:half])])
    show("Eq. (2)  R = R_base + alpha R_rep + beta R_beh", "total_reward",
         [f"  {name}  {b:.2f} + {cfg.alpha:g} * {r:.3f} + {cfg.beta:g} * {h:.3f} = {R:.3f}"
          for name, _, _, _, _, b, r, h, R, *_ in rows])
    means = "a mean for each modality" if cfg.joint_norm else "one joint mean"
    show("Eq. (7)  A = R - mean" + (" of the group" if cfg.joint_norm else " of its modality"), "modality_advantages",
         [f"  {name}  {R:.3f} - {R - A:.3f} = {A:+.3f}    with {means}, {R - o:.3f}: {o:+.3f}"
          for name, *_, R, A, o in rows])
    # The token whose loss is shown: from the middle of the answer with the largest advantage.
    best = advantage.abs().argmax().item()
    A, n_tokens = advantage[best].item(), 1 / tars.token_weights(mask, cut).max()
    token = int(mask.flatten(0, 2)[best].sum()) // 2
    word, logp = lm.tokenizer.decode(ids.flatten(0, 2)[best, token].item()), logps.flatten(0, 2)[best, token].item()
    rho, clipped = torch.tensor([1.5]), min(1.5, 1 + cfg.eps_high)
    loss = tars.grpo_loss(rho.log(), torch.zeros(1), torch.tensor(A), 1 / n_tokens, cfg.eps_low, cfg.eps_high)
    show("Loss of one token, - min(rho A, clip(rho) A) / tokens", "grpo_loss",
         [f"  token {token + 1} of {answers[best]}, {word!r}: log pi = {logp:.3f}, rho = exp(0) = 1",
          f"  - min(1 * {A:+.3f}, 1 * {A:+.3f}) / {n_tokens:.0f} = {-A / n_tokens:+.5f}",
          "  before the first update rho is 1 and nothing is clipped; what counts is the gradient, A / tokens",
          f"  were rho 1.5: - min({1.5 * A:+.3f}, {clipped * A:+.3f}) / {n_tokens:.0f} = {loss:+.5f}"])


def show(title, function, rows):
    """A block of --explain: a title, the function of tars.py that it is about, lines cut at 100 columns."""
    print(f"\n{title:<64}{function + '()':>36}", *(row[:100] for row in rows), sep="\n")


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
    template = "".join([family.before_user, family.before_audio, family.after_audio, family.after_user,
                        *family.end_of_turn])
    control = sorted(set(re.findall(r"<\|\w+\|>", template)))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def with_random_weights(path):
    """The architecture of `path`, weights drawn at random, one token a byte: nothing is downloaded.
    `path` is a directory with a config.json or a name of HUB_SETTINGS. Answers never end by themselves.
    """
    if Path(path).is_dir():
        family = tars.family_of(path)
        config = family.model_class.config_class.from_pretrained(path)
    else:
        family, settings = HUB_SETTINGS[path]
        config = family.model_class.config_class(**settings)
    sizes = {"feature_size": config.audio_config.num_mel_bins, "chunk_length": 300} if family is tars.Qwen25Omni else {}
    with torch.device(DEVICE):
        model = family.model_class._from_config(config, dtype=torch.bfloat16 if BFLOAT16 else torch.float32)
    lm = SpeechLM(family, model, byte_tokenizer(family), family.feature_extractor_class(**sizes))
    lm.eos_ids = lm.eos_ids[:0]
    return lm


def timed(method, seconds, phase):
    """The same method; the seconds it takes are added to seconds[phase]."""
    def call(*args, **kwargs):
        start = clock()
        result = method(*args, **kwargs)
        seconds[phase] = seconds.get(phase, 0.0) + clock() - start
        return result

    return call


def clock():
    """Seconds, when all that was asked of the GPU is done."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def random_weights(args, cfg):
    """Two training steps on noise, to see seconds a phase and peak memory. Answers are cut, or end by chance.
    Nothing is evaluated or saved, and E is the n-gram one: Qwen3-Embedding-0.6B would take another 1.2 GB in bfloat16.
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
    methods = {"embed": "embed_prompts", "rollout": "rollout", "forward": "score"}
    print("".join(f"{name:>15}" for name in ("step", *methods, "backward, rest", "total s", "tokens/s", "peak GiB")))
    plain = {name: getattr(lm, name) for name in methods.values()}
    for step in range(2):
        phases, start = {}, clock()
        for phase, name in methods.items():
            setattr(lm, name, timed(plain[name], phases, phase))
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
    add("--cascade", help="a Whisper model that transcribes the clips for the base model's text branch")
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
    args, settings = parser.parse_known_args(arguments)  # what eval.py does not know is tars.py's
    if settings and (args.compare or args.curves or args.explain):
        parser.error(f"unrecognized arguments: {' '.join(settings)}")
    if args.compare or args.curves:
        return compare_runs(args) if args.compare else curves(args)
    name = args.random_weights or args.model
    if name == Config.model and not (args.explain or Path(name).exists()):  # an untrained demo is not worth measuring
        raise SystemExit(f"{name} does not exist: run `python tars.py` first, or give --model")
    if args.explain:  # the settings of that run
        cfg = Config(**json.loads((Path(args.explain) / "config.json").read_text()))
    else:
        cfg = tars.parse_config(["--model", name, *settings])
    if args.adapter is None:
        args.adapter = ["runs/tars"] if args.model == Config.model else []
    for chosen, command in ((args.random_weights, random_weights), (args.explain is not None, explain),
                            (args.ask, ask)):
        if chosen:
            return command(args, cfg)
    sets, paths = {}, {Path(path).resolve(): path for path in args.data or [cfg.eval_data]}  # each once
    names = [path.name for path in paths]
    for path, shown in paths.items():
        questions = tars.load_questions(shown)
        questions = questions.select(range(min(args.limit or len(questions), len(questions))))
        sets[path.name if names.count(path.name) == 1 else shown] = questions  # two folders of one name are told apart
    (transcribe if args.asr else drift if args.layers else table_1)(args, cfg, sets)


if __name__ == "__main__":
    main()
