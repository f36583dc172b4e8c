"""SFT and DPO, the baselines of the paper's Table 2. Both imitate: they learn from the model's own sampled answers.

  python course/baselines.py sft --model M --seed S --out RUN    # learns its correct written answers
  python course/baselines.py dpo --lr 0.0005 ...                 # learns to prefer them to its wrong spoken answers
  python course/baselines.py sft --rounds 4 ...                  # rounds 2 to 4 sample from the trained model

Both learn under the spoken prompt. All but the step is tars.py's, and eval.py reads such a run like one of tars.py.
Answers are drawn from the base model, those of a question when its turn comes, which is the same as drawing all before
training. With --rounds N the sampler takes over the trained weights N - 1 times, after equal numbers of steps.
"""

import math
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import tars
from tars import SPEECH, TEXT, judge, setting

# What is learnt from: modality and R_acc of each answer, the one to imitate first.
ANSWERS = {"sft": ((TEXT, 1),), "dpo": ((TEXT, 1), (SPEECH, 0))}


@dataclass
class BaselineConfig(tars.Config):
    """tars.py's settings and two more."""

    method: str = setting("sft", "sft or dpo")
    rounds: int = setting(1, "rounds of sampling; the first uses the base model")


def sft_loss(logps, mask):
    """SFT: the mean negative log-likelihood of all tokens of the chosen answers. Both [N, C] -> scalar.
    loss = - sum_{i,t} log pi(y_{i,t}) / sum_i |y_i|
    """
    return -(logps * mask).sum() / mask.sum()


def dpo_loss(chosen, rejected, base_chosen, base_rejected, beta=0.1):
    """DPO: log-probs of whole answers under the model and under the base model, each [N] -> scalar.
    loss = - mean_i log sigmoid(beta (log pi(y_w) - log pi_base(y_w) - log pi(y_l) + log pi_base(y_l)))
    """
    return -F.logsigmoid(beta * (chosen - base_chosen - rejected + base_rejected)).mean()


@contextmanager
def lora_weights(lm, weights=None):
    """For a while LoRA has other weights, a list of tensors; with None they are 0, which is the base model."""
    trained = [p for p in lm.model.parameters() if p.requires_grad]
    own = [p.data for p in trained]
    for p, other in zip(trained, weights or map(torch.zeros_like, own), strict=True):
        p.data = other
    yield
    for p, data in zip(trained, own, strict=True):
        p.data = data


def offline_answers(method, lm, questions, prompts, extract, cfg, generator):
    """For each question the sampled answers of ANSWERS[method], ids [C] that end with the end-of-turn.
    At most 100 samples are drawn for each; None for a question that then lacks one. prompts: B lists of M [P, H].
    """
    found = [{} for _ in questions]  # of each question {k: ids}
    for k, (modality, right) in enumerate(ANSWERS[method]):
        for _ in range(100 // 4):
            missing = [i for i, answers in enumerate(found) if k not in answers]
            if not missing:
                break
            asked = [[prompts[i][modality]] for i in missing]
            ids, mask, cut = lm.rollout(asked, 4, cfg.max_new_tokens, cfg.temperature, generator)  # [n, 1, 4, C]
            acc = judge([questions[i] for i in missing], lm.detokenize(ids, mask), extract)[1]  # [n, 4]
            for n, s in ((acc.to(lm.device) == right) & ~cut[:, 0]).nonzero().tolist():
                found[missing[n]].setdefault(k, ids[n, 0, s][mask[n, 0, s] == 1])  # the first
    return [[*answers.values()] if len(answers) == len(ANSWERS[method]) else None for answers in found]


def offline_loss(method, lm, prompts, answers, beta=0.1):
    """The loss of b questions under the spoken prompt -> scalar. prompts: b lists of M prompts [P, H], answers: b lists
    of K answers, ids [C] each, as offline_answers finds them. DPO's base model is the model without its LoRA.
    """
    spoken = [[question[SPEECH]] for question in prompts]
    rows = [ids for question in answers for ids in question]  # b * K of [C]
    ids, mask = (torch.nn.utils.rnn.pad_sequence(x, batch_first=True).unflatten(0, (len(answers), 1, -1))
                 for x in (rows, [torch.ones_like(ids) for ids in rows]))  # [b, 1, K, C] each
    if method == "dpo":
        with torch.no_grad(), lora_weights(lm):
            base, _ = lm.score(spoken, ids, mask, 1.0)  # [b, 1, 2, C]
    logps, _ = lm.score(spoken, ids, mask, 1.0)  # [b, 1, K, C]
    if method == "sft":
        return sft_loss(logps[:, 0, 0], mask[:, 0, 0])
    return dpo_loss(*(x[:, 0, k].sum(-1) for x in (logps, base) for k in (0, 1)), beta)


def offline_step(sampler, calls, lm, questions, embedder, extract, optimizer, cfg, generator):
    """One step of SFT or DPO on B questions, in place of tars.train_step. Returns the numbers to log.
    sampler: the weights that answers are drawn with, empty for the base model's; calls counts the steps.
    """
    # 1. Draw answers; a new round begins with the weights as they are.
    parameters = optimizer.param_groups[0]["params"]
    step = next(calls)
    if cfg.rounds > 1 and step and step % math.ceil(cfg.steps / cfg.rounds) == 0:
        sampler[:] = [p.detach().clone() for p in parameters]
    prompts = lm.embed_prompts(questions)  # B lists of M prompts [P, H]
    with lora_weights(lm, sampler):
        answers = offline_answers(cfg.method, lm, questions, prompts, extract, cfg, generator)
    # 2. The loss of the questions that have their answers, and the update; without any the step is skipped.
    kept = [pair for pair in zip(prompts, answers, strict=True) if pair[1]]
    loss = torch.tensor(math.nan, requires_grad=True)
    if kept:
        loss = offline_loss(cfg.method, lm, *zip(*kept, strict=True))
    loss.backward()
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, cfg.max_grad_norm)
    finite = (loss + grad_norm).isfinite().item()
    if finite:
        optimizer.step()
    optimizer.zero_grad()
    left_out = 1 - len(kept) / len(questions)
    return {"left_out": left_out, "loss": loss.item(), "grad_norm": grad_norm.item(), "skipped": not finite}, {}


def main(arguments=None):
    """tars.py's main with another step."""
    method, *rest = (sys.argv[1:] if arguments is None else arguments) or [""]
    if method not in ANSWERS or tars.RANKS > 1 or "--resume" in rest and "--rounds" in rest:
        raise SystemExit("baselines.py sft|dpo ...: in one process; --resume is for one round, the sampler is not kept")
    rest = ["--method", method, "--out", f"runs/{method}", "--alpha", "0", "--beta", "0", "--sample-every", "0", *rest]
    with mock.patch.multiple(tars, Config=BaselineConfig, train_step=partial(offline_step, [], count())):
        tars.main(rest)


if __name__ == "__main__":
    main()
