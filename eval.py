"""The paper's measurements of a speech LLM, with and without adapters.

  python eval.py                                              # the demo's base model and runs/tars: Table 1
  python eval.py --model M --adapter A1 A2 --data D1 D2       # more rows and columns
  python eval.py --cascade openai/whisper-medium              # + Whisper transcribes, the model answers the transcript
  python eval.py --asr                                        # word error rate of the model as a transcriber
  python eval.py --layers --plot layers.png                   # Figure 2: cosine of spoken and written states per layer
  python eval.py --curves runs/tars runs/grpo --plot curves.png   # rewards, accuracy and MRR over training steps

Accuracies come with their 95 % Wilson intervals. Answers are greedy; each is kept in --out, one JSON line a question
and modality, and a run that was stopped continues from there. Another adapter, data set or setting gets another file.

Imports: this file imports tars.py and data_prep.py; nothing imports this file.
"""

import argparse
import json
import math
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data_prep import Listener, resume, word_error_rate
from tars import (
    LETTERS,
    MODALITIES,
    SpeechLM,
    UserError,
    answer_greedily,
    default_device,
    eval_batches,
    load_adapter,
    load_extractor,
    load_helper,
    load_questions,
    modality_recovery_rate,
    parse_config,
    positions,
    read_clip,
    run,
)

ASR_REQUEST = "Transcribe the audio clip into text."


# ======================================================================================================================
# 1. Numbers
# ======================================================================================================================
def wilson(right, n, z=1.96):
    """95 % Wilson interval of a share, `right` of `n` -> (low, high), each 0 to 1."""
    share, spread = right / n, z**2 / n
    half = z * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    return tuple((share + spread / 2 + sign * half) / (1 + spread) for sign in (-1, 1))


def mean_and_interval(values):
    """Mean of [n, ...] over n, and half the width of its 95 % interval (1.96 standard errors)."""
    return values.mean(0), 1.96 * values.std(0) / math.sqrt(len(values))


def table(head, rows):
    """Rows of strings under a head, columns as wide as they need, the first to the left."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    line = lambda row: "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths)))
    return "\n".join(map(line, [head, *rows]))


# ======================================================================================================================
# 2. Table 1: accuracy on speech (A) and on text (T), MRR
# ======================================================================================================================
def models(args, cfg):
    """Yield (name, SpeechLM) for the base model and for each adapter on it, one in memory at a time."""
    for adapter in [None, *args.adapter]:
        lm = SpeechLM.from_pretrained(args.model)
        if adapter:
            load_adapter(lm, adapter)
        yield adapter or "base", lm


def kept(name, data, questions, each, answer, args, cfg):
    """The records of one measurement, `each` of them a question, in order; every one is written to a file in args.out.

    Those of an earlier run are read from there, the rest come in batches from answer(first question). The file is told
    from others by all that the answers depend on.
    """
    weights = Path(name) / "adapter_model.safetensors"
    begun = {"model": args.model, "name": name, "data": data, "max_new_tokens": cfg.max_new_tokens,
             "eval_batch": cfg.eval_batch, "extractor": cfg.extractor,
             "weights": zlib.crc32(weights.read_bytes()) if weights.exists() else None,
             "questions": zlib.crc32("\n".join([*questions["key"], *questions["question"]]).encode())}
    file = Path(args.out) / f"{Path(name).name}-{data}-{zlib.crc32(json.dumps(begun).encode()):08x}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    done = resume(file, begun)
    if len(done) < each * len(questions):
        first = len(done) // (each * cfg.eval_batch) * cfg.eval_batch  # whole batches, to form the same ones again
        done = done[: each * first]
        file.write_text("".join(json.dumps(line) + "\n" for line in [begun, *done]))
        with open(file, "a") as records:
            for batch in answer(first):
                records.write("".join(json.dumps(record) + "\n" for record in batch))
                records.flush()
                done += batch
    return done


def cascade(lm, listener, questions, extract, cfg, start):
    """Whisper transcribes each clip, the model answers the transcript in writing: batches of records."""
    for batch in eval_batches(questions, cfg, "cascade", start):
        heard = [listener.transcribe(read_clip(q["audio"]["bytes"], q["key"])) for q in batch]
        with torch.no_grad():
            prompts = lm.prompts([[lm.embed_text(text)] for text in heard])  # [b, 1, P, H]
        completions = lm.decode(*lm.rollout(prompts, 1, cfg.max_new_tokens, temperature=0)[:2])
        yield [{"key": q["key"], "modality": "speech", "completion": completion, "answer": answer,
                "right": answer == LETTERS[q["answer_index"]], "heard": text}
               for q, text, completion, answer in zip(batch, heard, completions, extract(batch, completions))]


def accuracy_cell(records):
    """Records -> (accuracy in percent, the cell that shows it)."""
    right, n = sum(r["right"] for r in records), len(records)
    low, high = wilson(right, n)
    return 100 * right / n, f"{100 * right / n:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def compare(args, cfg, sets):
    """Print Table 1: one row a model, two columns a data set, averages, unparsed share, MRR."""
    extract = load_extractor(cfg, default_device())
    rows, base_text = [], args.base_text_accuracy
    for name, lm in models(args, cfg):
        measured = {}
        for data, questions in sets.items():
            records = kept(name, data, questions, 2, partial(answer_greedily, lm, questions, extract, cfg), args, cfg)
            measured[data] = {m: [r for r in records if r["modality"] == m] for m in MODALITIES}
        if base_text is None:
            base_text = np.mean([accuracy_cell(by["text"])[0] for by in measured.values()])
        rows.append(row_of(name, measured, base_text))
        if name == "base" and args.cascade:
            listener = load_helper(Listener, "--cascade", args.cascade, default_device())
            name = f"cascade {args.cascade}"
            rows.append(row_of(name, {data: {"speech": kept(
                name, data, questions, 1, partial(cascade, lm, listener, questions, extract, cfg), args, cfg)}
                for data, questions in sets.items()}, base_text))
    sizes = ", ".join(f"{data}: {len(questions)} questions" for data, questions in sets.items())
    columns = [f"{data} {column}" for data in sets for column in ("A %", "T %")]
    head = ["model", *columns, "avg A", "avg T", "unparsed A/T %", "MRR %"]
    print(f"{sizes}; A speech, T text, [95 % interval]\n" + table(head, rows))


def row_of(name, measured, base_text):
    """One row of Table 1 from {data set: {modality: records}}."""
    cells, columns, unparsed = [], {m: [] for m in MODALITIES}, {m: [] for m in MODALITIES}
    for by in measured.values():
        for m in MODALITIES:
            percent, cell = accuracy_cell(by[m]) if m in by else (float("nan"), "-")
            cells.append(cell)
            columns[m].append(percent)
            unparsed[m] += [r["answer"] is None for r in by.get(m, [])]
    average = {m: np.mean(columns[m]) for m in MODALITIES}
    shown = lambda x: "-" if math.isnan(x) else f"{x:.1f}"
    lost = "/".join(f"{100 * np.mean(unparsed[m]):.1f}" if unparsed[m] else "-" for m in MODALITIES)
    mrr = modality_recovery_rate(average["speech"], base_text)
    return [name, *cells, *map(shown, average.values()), lost, shown(mrr)]


# ======================================================================================================================
# 3. Recognition: is it what improved?
# ======================================================================================================================
def transcribe(args, cfg, sets):
    """Print the word error rate of each model as a transcriber of the clips, against the text they were spoken from."""
    rows = []
    for name, lm in models(args, cfg):
        if lm.tokenizer.unk_token_id in lm.tokenizer(ASR_REQUEST).input_ids:
            raise UserError(f"--asr: the tokenizer of {args.model} cannot even write the request {ASR_REQUEST!r}: "
                            "this model (the demo's, say) was never taught to transcribe")
        cells = []
        for questions in sets.values():
            errors = []
            for batch in eval_batches(questions, cfg, "asr"):
                with torch.no_grad():
                    request = lm.embed_text(ASR_REQUEST)
                    prompts = lm.prompts([[torch.cat([lm.spoken_turn(q), request])] for q in batch])  # [b, 1, P, H]
                heard = lm.decode(*lm.rollout(prompts, 1, cfg.max_new_tokens, temperature=0)[:2])
                errors += [word_error_rate(q["prompt_for_tts"], text) for q, text in zip(batch, heard)]
            mean, half = mean_and_interval(100 * np.array(errors))
            cells.append(f"{mean:.1f} +- {half:.1f}")
        rows.append([name, *cells])
    print("word error rate in percent, mean over clips and its 95 % interval\n" + table(["model", *sets], rows))


# ======================================================================================================================
# 4. Figure 2: how far spoken and written states drift apart, layer by layer
# ======================================================================================================================
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
    for batch in eval_batches(questions, cfg, "layers"):
        prompts = lm.embed(batch)  # [b, 2, P, H]
        written = prompts._replace(embeds=prompts.embeds[:, 1:], mask=prompts.mask[:, 1:])  # [b, 1, P, H]
        ids, mask, _ = lm.rollout(written, 1, cfg.max_new_tokens, temperature=0)  # [b, 1, 1, C]
        answer = lm.embed_tokens(ids[:, :, 0]).expand(-1, 2, -1, -1)  # [b, 2, C, H]
        embeds = torch.cat([prompts.embeds, answer], dim=2).flatten(0, 1)  # [b * 2, P + C, H]
        seen = torch.cat([prompts.mask, mask[:, :, 0].expand(-1, 2, -1)], dim=2).flatten(0, 1)  # [b * 2, P + C]
        states = lm.decoder(inputs_embeds=embeds, attention_mask=seen, position_ids=positions(seen), use_cache=False,
                            output_hidden_states=True).hidden_states[1:]  # L of [b * 2, P + C, H]
        states = torch.stack([h[:, prompts.mask.shape[-1] :].unflatten(0, (-1, 2)) for h in states])  # [L, b, 2, C, H]
        cosines.append(token_cosines(states[:, :, 0], states[:, :, 1], mask[:, 0, 0]).cpu())
    return torch.cat(cosines)


def drift(args, cfg, sets):
    """Print the cosine per layer of every model over all data sets; with --plot, draw it."""
    lines = {}
    for name, lm in models(args, cfg):
        lines[name] = mean_and_interval(torch.cat([layer_cosines(lm, q, cfg) for q in sets.values()]).numpy())
    layers = range(1, len(next(iter(lines.values()))[0]) + 1)
    rows = [[str(l), *(f"{mean[l - 1]:.4f} +- {half[l - 1]:.4f}" for mean, half in lines.values())] for l in layers]
    print("cosine of spoken and written states on the model's own text answers, mean over questions, 95 % interval")
    print(table(["layer", *lines], rows))
    if args.plot:
        plt = pyplot()
        figure, axis = plt.subplots(figsize=(6, 4))
        for name, (mean, half) in lines.items():
            axis.plot(layers, mean, marker="o", markersize=3, label=name)
            axis.fill_between(layers, mean - half, mean + half, alpha=0.2)
        axis.set(xlabel="layer", ylabel="cosine of spoken and written states", xticks=ticks(layers))
        axis.legend()
        save(figure, args.plot)


# ======================================================================================================================
# 5. Curves over training
# ======================================================================================================================
def curves(args):
    """Draw reward terms, accuracy in roll-outs and on the evaluation set, and MRR over steps, from each run's log."""
    plt = pyplot()
    figure, axes = plt.subplots(2, 3, figsize=(13, 7), constrained_layout=True)
    panels = (("reward_speech", "reward of spoken answers"), ("rep_speech", "R_rep (cosine)"),
              ("beh_speech", "R_beh (cosine)"), ("acc_speech", "spoken accuracy, %"),
              ("acc_text", "written accuracy, %"), ("mrr", "MRR, %"))
    for folder in args.curves:
        log, base_text = read_run(folder)
        steps = np.array([line["step"] for line in log])
        for axis, (key, label) in zip(axes.flat, panels):
            values = np.array([line["acc_speech"] / base_text if key == "mrr" else line[key] for line in log])
            if not values.any():  # a reward that this run did not compute
                continue
            values = values * (100 if key == "mrr" or key.startswith("acc") else 1)
            smooth = np.convolve(values, np.ones(window := min(20, len(values))) / window, "valid")
            drawn = axis.plot(steps[window - 1 :], smooth, label=Path(folder).name)[0]
            axis.set(xlabel="step", ylabel=label)
            points = [(line["step"], line[f"eval_{key[4:]}"] if key != "mrr" else line["eval_speech"] / base_text)
                      for line in log if "eval_speech" in line and (key == "mrr" or key.startswith("acc"))]
            if points:
                axis.plot(*zip(*[(step, 100 * value) for step, value in points]), "o", color=drawn.get_color())
    axes.flat[0].legend()
    figure.suptitle("Lines: roll-outs at the training temperature, mean of 20 steps. Dots: greedy, evaluation set.")
    save(figure, args.plot)


def read_run(run):
    """A run's log lines and the base model's text accuracy. Raises UserError if they are not there."""
    try:
        log = [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]
        return log, json.loads((Path(run) / "summary.json").read_text())["base_text"]
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} is not there: give the --out directory of a finished run") from error


def pyplot():
    """matplotlib.pyplot without a screen. Raises UserError if it is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("a figure needs matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def ticks(layers):
    """At most about ten layers to name on an axis."""
    return list(layers)[:: math.ceil(len(layers) / 10)]


def save(figure, path):
    """Write a figure. Raises UserError where that cannot be done."""
    try:
        figure.savefig(path, dpi=150, bbox_inches="tight")
    except (OSError, ValueError) as error:
        raise UserError(f"--plot {path}: {error}") from error
    print(f"figure: {path}")


# ======================================================================================================================
# 6. The command line
# ======================================================================================================================
def main(arguments=None):
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(prog="eval.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, default, help in (
        ("--model", "runs/demo/model", "base model"),
        ("--out", "runs/eval", "where every answer is kept"),
        ("--limit", 0, "only the first so many questions of each data set; 0 means all"),
        ("--extractor", "regex", "who reads an answer's letter"),
    ):
        parser.add_argument(flag, default=default, type=type(default), metavar="", help=f"{help} [{default}]")
    for flag, kind, help in (
        ("--max-new-tokens", int, "longest completion [the model's own, else 1024]"),
        ("--eval-batch", int, "questions per batch [the model's own, else 8]"),
        ("--base-text-accuracy", float, "MRR's denominator in percent [the base model's, measured]"),
        ("--cascade", str, "a Whisper model that transcribes the clips for the base model's text branch"),
        ("--plot", str, "file of the figure, such as layers.png"),
    ):
        parser.add_argument(flag, type=kind, metavar="", help=help)
    for flag, help in (("--adapter", "--out directories of tars.py [runs/tars with the demo's model]"),
                       ("--data", "data sets [the model's own]"), ("--curves", "runs whose logs are drawn")):
        parser.add_argument(flag, nargs="+", metavar="", help=help)
    for flag, help in (("--asr", "measure the model as a transcriber"), ("--layers", "Figure 2")):
        parser.add_argument(flag, action="store_true", help=help)
    args = parser.parse_args(arguments)
    if args.curves:
        args.plot = args.plot or "curves.png"
        return curves(args)
    own = [f"--{flag.replace('_', '-')}={value}" for flag in ("model", "extractor", "max_new_tokens", "eval_batch")
           if (value := getattr(args, flag)) is not None]
    cfg = parse_config(own, not_built)
    if args.adapter is None:
        args.adapter = ["runs/tars"] if args.model == "runs/demo/model" else []
    sets = {}
    for path in args.data or [cfg.eval_data]:
        questions = load_questions(path)
        sets[Path(path).name] = questions.select(range(min(args.limit or len(questions), len(questions))))
    (transcribe if args.asr else drift if args.layers else compare)(args, cfg, sets)


def not_built(folder):
    """parse_config would build the demo here; measuring needs one that was trained."""
    raise UserError(f"{folder} is not there yet: run `python tars.py` first, or give --model")


if __name__ == "__main__":
    run("eval.py", main)
