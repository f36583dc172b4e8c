"""TARS in one file: reinforcement learning that closes the modality reasoning gap of a speech LLM.

"Closing the Modality Reasoning Gap for Speech Large Language Models", Wang et al., arXiv 2601.05543, ACL 2026.

A speech LLM (audio encoder -> projector -> text LLM) answers a spoken question worse than the same question in writing:
its hidden states drift away from those of the written run, and its chain of thought drifts with them. TARS lets the
model answer each question G times, half from speech and half from text. Every answer earns a task reward, Eq. (3). A
spoken answer also earns two dense rewards for staying close to a *correct* written answer of the same group: close in
its hidden states, Eq. (5), and close in what it says, Eq. (6). The reference comes from the model itself and improves
with it. Advantages are centred within each modality, Eq. (7), and a GRPO step with DAPO's clipping updates LoRA weights
of the LLM. Dense rewards matter because they still differ when every spoken answer of a group is wrong.

  Eq.   function here            what it is                                        test in test_tars.py
  (1)   modality_recovery_rate   speech accuracy in percent of the text backbone   test_eq1_*
  (2)   total_reward             R = R_base + alpha R_rep + beta R_beh (speech)    test_eq2_*
  (3)   base_reward              R_base = R_acc + lambda R_fmt                     test_eq3_*, test_format_*
  (4)   pool_hidden_states       mean over the generated positions of a layer      test_eq4_*
  (5)   representation_reward    mean over layers of cos(speech, text)             test_eq5_*
  (6)   behavior_reward          cos(E(speech answer), E(text answer))             test_eq6_*
  (7)   modality_advantages      A = r - mean of its own modality                  test_eq7_*
  loss  grpo_loss                clipped surrogate over the tokens of the batch    test_loss_*
  all   train_step               one step of the algorithm, numbered               test_step_*

Where we chose (the paper is followed wherever it speaks):

  what                   paper                         official code                      here
  prompt of a text row   the written question          rolled out from text, but scored   written question in roll-out,
                                                       under the audio prompt             log-probs and hidden states
  R_rep reference        drawn at random from the      cycled in order, not matched to    drawn at random from the
                         group's correct text answers  the question                       group's correct text answers
  R_beh reference        the same as for R_rep         popped in order                    the same as for R_rep
  text reward            R_base only                   + mean speech alignment reward,    R_base only
                                                       which Eq. (7) cancels
  R_fmt                  0 or 1, weight 0.5            0, 0.5 or 1, weight 1              0 or 1, weight 0.5
  answer's letter        xFinder                       -                                  regular expressions that never
                                                                                          guess; xFinder on request
  pooled positions       all generated positions       last prompt position and final     all generated positions,
                                                       end-of-turn dropped                end-of-turn included
  max completion         1024                          512                                1024
  LoRA dropout           not given                     0.05                               none: roll-out and update see
                                                                                          the same policy
  learning rate          1 % warm-up                   warm-up, then linear to zero       warm-up, then linear to zero
  one step's passes      not given                     log-probs and hidden states in     one forward for both; states
                                                       two, all layers x tokens kept      pooled as they are produced
  old log-probs          pi_old                        the forward's, corrected for       the first forward's, detached
                                                       vLLM's sampling

Commands (README.md has more):

  python tars.py                                               # the whole method, offline on a laptop
  python tars.py --alpha 0 --beta 0 --out runs/grpo            # plain GRPO, to compare with
  python eval.py --explain                                     # one group worked through, equation by equation
  python tars.py --model Qwen/Qwen2.5-Omni-7B --data DIR --eval-data DIR
  python tars.py --help                                        # every setting and where the paper gives it

Sections 3 to 9 are the paper; what comes before and after them is reading questions and running for a day.

Imports: data_prep.py and eval.py import this file, never the other way round. (This file runs `data_prep.py demo` as a
command when the offline demo is not there yet.)
"""

import argparse
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import wave
import zlib
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchaudio
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint as recompute
from tqdm import tqdm
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    Phi4MultimodalFeatureExtractor,
    Phi4MultimodalForCausalLM,
    PretrainedConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    WhisperFeatureExtractor,
)
from transformers.utils import cached_file

# Letters for shapes, here and in every comment below:
#   B questions, G samples of a question (G/2 per modality), N rows of any kind, P prompt and C completion tokens,
#   L layers, H hidden size, V vocabulary, D sentence-embedding size. Modality 0 is speech, 1 is text.
MODALITIES = ("speech", "text")
LETTERS = "ABCD"


# ======================================================================================================================
# 1. Config: the paper's Table 5
# ======================================================================================================================
def setting(default, meaning, paper="", **flag):
    """A field of Config: its default, what it is, where the paper gives it (empty: nowhere), more for its flag."""
    note = "; ".join(str(part) for part in (default, paper) if part != "")
    return field(default=default, metadata={"help": f"{meaning} [{note}]" if note else meaning, "flag": flag})


@dataclass
class Config:
    """Every hyper-parameter once; the command line is made from these fields, so flag and field cannot disagree.

    The defaults are the paper's. A model directory may carry its own in `tars_config.json`, as it may carry a
    `generation_config.json`; a flag on the command line beats both.
    """

    # what to train on
    model: str = setting("runs/demo/model", "checkpoint directory or hub name", "the paper: Qwen2.5-Omni-7B, Phi-4-MM")
    data: str = setting("runs/data/train", "training questions, written by data_prep.py", "the paper: 9,953 of MMLU")
    eval_data: str = setting("runs/data/test", "held-out questions, likewise", "the paper: VoiceBench MMSU and OBQA")
    out: str = setting("runs/tars", "where adapter, logs and summary go")
    seed: int = setting(0, "seed of LoRA's initial weights, data order, sampling and references")
    # roll-out
    questions_per_step: int = setting(8, "B, questions per optimizer step", "Table 5: 64 completions")
    group_size: int = setting(8, "G, completions per question: half from speech, half from text", "Table 5")
    max_new_tokens: int = setting(1024, "longest completion; a cut one is masked out of the loss", "Table 5")
    temperature: float = setting(1.0, "sampling temperature, no top-k, no top-p", "Table 5")
    # rewards and advantages
    alpha: float = setting(1.0, "weight of R_rep", "Eq. (2)")
    beta: float = setting(1.0, "weight of R_beh", "Eq. (2)")
    lam: float = setting(0.5, "lambda, weight of R_fmt", "Eq. (3)")
    layers: str = setting("all", "layers in R_rep, `all` or a range counted from 1 such as 11-20", "Eq. (5), Figure 3")
    embedder: str = setting("Qwen/Qwen3-Embedding-0.6B", "E, a sentence-embedding model, or `ngrams`", "Eq. (6)")
    extractor: str = setting("regex", "who reads an answer's letter", "the paper: IAAR-Shanghai/xFinder-qwen1505")
    aux_device: str = setting("", "device of embedder and extractor, such as cpu; empty: the model's own")
    joint_norm: bool = setting(False, "one mean over both modalities instead of one for each", "ablation of Eq. (7)")
    # loss and optimizer
    eps_low: float = setting(0.2, "the ratio is clipped below 1 - eps_low", "Table 5")
    eps_high: float = setting(0.28, "the ratio is clipped above 1 + eps_high", "Table 5")
    updates_per_rollout: int = setting(1, "optimizer steps on each roll-out; with 1 the ratio is 1", "Table 5")
    epochs: int = setting(3, "passes over the training questions", "Table 5")
    steps: int = setting(0, "roll-outs in all; 0 means as many as `epochs` takes")
    lr: float = setting(2e-5, "AdamW's peak learning rate", "Table 5")
    warmup: float = setting(0.01, "share of steps in which the learning rate rises from 0", "Table 5")
    weight_decay: float = setting(0.01, "AdamW's weight decay", "Table 5")
    max_grad_norm: float = setting(1.0, "gradients are scaled down to this norm", "Table 5")
    lora_rank: int = setting(8, "r of LoRA on every linear layer of the LLM", "Table 5")
    lora_alpha: int = setting(32, "LoRA's update is scaled by lora_alpha / lora_rank", "Table 5")
    # memory and output
    tokens_per_micro_batch: int = setting(16384, "paired forward: whole groups, up to so many tokens at once")
    gradient_checkpointing: bool = setting(True, "recompute the layers in backward instead of keeping them")
    eval_batch: int = setting(8, "questions per batch in evaluation")
    eval_every: int = setting(0, "evaluate every so many steps; 0 means only before and after")
    save_every: int = setting(50, "checkpoint every so many steps; the last two are kept")
    resume: str = setting("", "go on from --out's last checkpoint; `--resume auto`: if there is one", nargs="?",
                          const="last", choices=("last", "auto"), metavar="auto")
    sample_every: int = setting(20, "show and save one group every so many steps; 0 means never")


# ======================================================================================================================
# 2. The equations, in the paper's order
# ======================================================================================================================
def modality_recovery_rate(speech_accuracy, base_text_accuracy):
    """Eq. (1), in percent: speech accuracy over that of the *original* text backbone on text (nan if that is 0)."""
    return 100 * speech_accuracy / base_text_accuracy if base_text_accuracy else float("nan")


def total_reward(base, rep, beh, alpha=1.0, beta=1.0):
    """Eq. (2), speech branch. R = R_base + alpha R_rep + beta R_beh. A written answer's reward is its R_base alone."""
    return base + alpha * rep + beta * beh


ANSWER_FORMAT = re.compile(r"<think>.*?</think>\s*<answer>.*?The answer is [ABCD][.:,].*</answer>", re.DOTALL)


def format_reward(completion):
    """R_fmt of Eq. (3): 1.0 if all of it is <think>...</think><answer>... The answer is X. ...</answer>, else 0.0."""
    return 1.0 if ANSWER_FORMAT.fullmatch(completion) else 0.0


def base_reward(acc, fmt, lam=0.5):
    """Eq. (3). acc and fmt in {0, 1}, any shape. R_base = R_acc + lambda R_fmt."""
    return acc + lam * fmt


def pool_hidden_states(hidden, completion_mask):
    """Eq. (4). hidden [..., T, H], completion_mask [..., T] (1 on generated positions) -> their mean [..., H]."""
    mask = completion_mask.unsqueeze(-1).to(hidden.dtype)  # [..., T, 1]
    return (hidden * mask).sum(-2) / mask.sum(-2).clamp(min=1)


def representation_reward(speech, text):
    """Eq. (5). Pooled states [..., L, H] of both -> [...]. R_rep = (1/L) sum_l cos(h_speech^(l), h_text^(l))."""
    return F.cosine_similarity(speech, text, dim=-1).mean(-1)


def pick_references(text_correct, generator=None):
    """y*_text of Eq. (5) and (6): for each spoken answer one correct written answer of its group, drawn at random.

    text_correct: bool [B, G/2] -> index into the group's text answers, long [B, G/2]; -1 where none is correct.
    """
    weights = text_correct.float() + (~text_correct.any(-1, keepdim=True)).float()  # uniform where there is no choice
    drawn = torch.multinomial(weights, text_correct.shape[-1], replacement=True, generator=generator)
    return drawn.masked_fill(~text_correct.any(-1, keepdim=True), -1)


def against_references(reward, features, references):
    """An alignment reward, Eq. (5) or (6), of every spoken answer with its reference; 0 where there is none.

    features: [B, 2, G/2, ...] of both modalities, references: [B, G/2] -> [B, G/2].
    """
    group = torch.arange(len(features), device=features.device)[:, None]  # [B, 1]
    speech, text = features[:, 0], features[group, 1, references.clamp(min=0)]  # [B, G/2, ...]
    return torch.where(references >= 0, reward(speech, text), 0.0)


def behavior_reward(speech, text):
    """Eq. (6). Sentence embeddings [..., D] of both answers -> [...]. R_beh = cos(E(y_speech), E(y*_text))."""
    return F.cosine_similarity(speech, text, dim=-1)


def modality_advantages(rewards, joint=False):
    """Eq. (7). rewards [B, 2, G/2] -> same. A_{i,m} = r_{i,m} - mu_m, mu_m the mean of modality m in the group.

    Not divided by the standard deviation. With one joint mean the modality with the higher rewards is pushed up as a
    whole and the other down, whatever they answer: text under R_base alone, speech where Eq. (2) adds to its rewards.
    """
    return rewards - rewards.mean((1, 2) if joint else -1, keepdim=True)


def grpo_loss(per_token_logps, old_per_token_logps, advantages, completion_mask, eps_low=0.2, eps_high=0.28,
              n_tokens=None):
    """- sum over tokens of min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A) / number of completion tokens.

    log-probs [N, T], advantages [N], completion_mask [N, T] -> scalar. `n_tokens` is the count of the whole step where
    these rows are only a part of it. On-policy rho is 1 and, as advantages sum to about 0, so is the value; its
    gradient, A times the gradient of each log-prob, is not.
    """
    ratio = torch.exp(per_token_logps - old_per_token_logps)  # [N, T], rho = pi_theta / pi_old
    A = advantages[:, None]  # [N, 1]
    surrogate = torch.min(ratio * A, ratio.clamp(1 - eps_low, 1 + eps_high) * A)  # [N, T]
    n_tokens = completion_mask.sum() if n_tokens is None else n_tokens
    return -(surrogate * completion_mask).sum() / max(n_tokens, 1)


# ======================================================================================================================
# 3. One step of the algorithm
# ======================================================================================================================
def train_step(lm, questions, embedder, extract, optimizer, cfg, generator):
    """One step of TARS on B questions. Returns the numbers to log and the first group for a person to read.

    Every tensor of the step is laid out [B, 2, G/2, ...]: question, modality (0 speech, 1 text), sample.
    """
    half = cfg.group_size // 2
    parameters = optimizer.param_groups[0]["params"]
    clock = Clock(lm.device)

    # 1. Embed both prompts of every question. Encoder and projector are frozen: once serves roll-out and update.
    prompts = lm.embed(questions)  # [B, 2, P, H]
    clock("embed")

    # 2. Roll out: the model answers each question G/2 times from speech and G/2 times from text.
    rollout = lm.rollout(prompts, half, cfg.max_new_tokens, cfg.temperature, generator)
    completion_ids, completion_mask, truncated = rollout  # [B, 2, G/2, C] twice, [B, 2, G/2]
    loss_mask = completion_mask * ~truncated[..., None]  # [B, 2, G/2, C]; a cut answer teaches nothing
    n_tokens = sum_over_ranks(loss_mask.sum())
    clock("rollout")

    # 3. Score the texts: Eq. (3), the references, Eq. (6).
    texts = score_texts(lm, questions, completion_ids, completion_mask, embedder, extract, cfg, generator)
    base, beh, references = texts.base, texts.beh, texts.references
    clock("rewards")

    rep = torch.zeros_like(beh)  # [B, G/2]
    rewards, advantages = base.clone(), torch.zeros_like(base)  # [B, 2, G/2]
    old_logps = torch.zeros_like(loss_mask, dtype=torch.float32)  # [B, 2, G/2, C]
    batches = micro_batches(prompts.mask, completion_mask, cfg.tokens_per_micro_batch)
    for update in range(cfg.updates_per_rollout):
        loss = 0.0
        for micro_batch in batches:  # b questions
            # 4. The paired forward: log-probs with gradient and, from the same pass, pooled hidden states, Eq. (4).
            longest = completion_mask[micro_batch].sum(-1).max()
            part_of = lambda x: x[micro_batch, ..., :longest]  # [B, 2, G/2, C] -> [b, 2, G/2, longest]
            ids, mask = part_of(completion_ids).flatten(0, 1), part_of(completion_mask).flatten(0, 1)
            logps, states = lm.forward(prompts.rows(micro_batch), ids, mask, cfg.temperature, pool=cfg.alpha != 0)
            clock("forward")
            if update == 0:
                # 5. Rewards: Eq. (5), and Eq. (2) for speech only. Written answers keep R_base.
                if cfg.alpha:
                    states = states.unflatten(0, (-1, 2)).float()  # [b, 2, G/2, L, H]
                    states = states[..., layer_slice(cfg.layers, states.shape[-2]), :]
                    rep[micro_batch] = against_references(representation_reward, states, references[micro_batch])
                rewards[micro_batch, 0] = total_reward(base[micro_batch, 0], rep[micro_batch], beh[micro_batch],
                                                       cfg.alpha, cfg.beta)
                # 6. Advantages: Eq. (7).
                advantages[micro_batch] = modality_advantages(rewards[micro_batch], cfg.joint_norm)
                # On-policy, pi_old is the policy that just ran: the ratio is 1 until the first update is made.
                old_logps[micro_batch, ..., :longest] = logps.detach().view_as(part_of(old_logps))
                clock("rewards")
            # 7. Loss, normalised by the tokens of the whole step, and its gradient.
            share = grpo_loss(logps.flatten(0, 1), part_of(old_logps).flatten(0, 2), advantages[micro_batch].flatten(),
                              part_of(loss_mask).flatten(0, 2), cfg.eps_low, cfg.eps_high, n_tokens)
            share.backward()
            loss += share.item()
            clock("backward")
        # 8. Update LoRA's weights, unless a number ran away.
        loss = sum_gradients_over_ranks(parameters, loss)
        grad_norm = nn.utils.clip_grad_norm_(parameters, cfg.max_grad_norm).item()
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if finite:
            optimizer.step()
        optimizer.zero_grad()
        clock("optimizer")

    terms = {"acc": texts.acc, "fmt": texts.fmt, "reward": rewards, "advantage": advantages}
    group = first_group(questions[0], texts.completions, terms, rep, beh, references)
    metrics = step_means({"reward": rewards, "acc": texts.acc, "fmt": texts.fmt, "truncated": truncated,
                          "unparsed": texts.unparsed, "length": completion_mask.sum(-1)}, rep, beh, references)
    metrics |= {"loss": loss, "grad_norm": grad_norm, "skipped": float(not finite)}
    metrics["tokens"] = sum_over_ranks(completion_mask.sum()).item()
    return metrics | {f"seconds_{phase}": seconds for phase, seconds in clock.seconds.items()}, group


class Texts(NamedTuple):
    """What the answers of a step, as texts, are worth."""

    completions: list  # B * 2 * G/2 strings, in row order
    answers: list  # of each the option it settles on, "A".."D" or None
    acc: torch.Tensor  # [B, 2, G/2], R_acc
    fmt: torch.Tensor  # [B, 2, G/2], R_fmt
    unparsed: torch.Tensor  # [B, 2, G/2], 1 where there is no option
    base: torch.Tensor  # [B, 2, G/2], R_base of Eq. (3)
    references: torch.Tensor  # [B, G/2], y*_text of each spoken answer, -1 where there is none
    beh: torch.Tensor  # [B, G/2], R_beh of Eq. (6); 0 where its weight is 0, for plain GRPO pays for none of it


def score_texts(lm, questions, completion_ids, completion_mask, embedder, extract, cfg, generator):
    """All rewards that the completions [B, 2, G/2, C] earn as texts -> Texts."""
    group = completion_ids.shape[:-1]  # B, 2, G/2
    completions = lm.detokenize(completion_ids, completion_mask)  # B * 2 * G/2 strings
    asked = [question for question in questions for _ in range(group[1] * group[2])]  # the question of each string
    answers = extract(asked, completions)
    as_group = lambda values: torch.tensor(values, dtype=torch.float32, device=lm.device).view(group)
    acc = as_group([answer == LETTERS[question["answer_index"]] for answer, question in zip(answers, asked)])
    fmt = as_group([format_reward(completion) for completion in completions])
    references = pick_references(acc[:, 1] == 1, generator)  # [B, G/2]
    beh = torch.zeros_like(acc[:, 0])  # [B, G/2]
    if cfg.beta:
        sentences = embedder.embed(completions).to(lm.device).view(*group, -1)  # [B, 2, G/2, D]
        beh = against_references(behavior_reward, sentences, references)
    unparsed = as_group([answer is None for answer in answers])
    return Texts(completions, answers, acc, fmt, unparsed, base_reward(acc, fmt, cfg.lam), references, beh)


def micro_batches(prompt_mask, completion_mask, budget):
    """Pack a step's questions into paired forwards of at most `budget` tokens, padding included, the longest first.

    prompt_mask: [B, 2, P], completion_mask: [B, 2, G/2, C]. Returns index tensors that hold each question once: groups
    stay whole. A group that is longer than the budget goes alone. Longest first, a step that does not fit the memory
    fails at once; and questions of a length go together, with little padding.
    """
    P, C = prompt_mask.sum(-1).amax(1).tolist(), completion_mask.sum(-1).amax((1, 2)).tolist()  # longest of each group
    width = lambda batch: max(P[q] for q in batch) + completion_mask.shape[2] * max(C[q] for q in batch)
    batches = []
    for q in sorted(range(len(P)), key=lambda q: -width([q])):
        if batches and 2 * (len(batches[-1]) + 1) * width([*batches[-1], q]) <= budget:
            batches[-1].append(q)
        else:
            batches.append([q])
    return [torch.tensor(batch, device=prompt_mask.device) for batch in batches]


def layer_slice(layers, count):
    """`all` or a range such as 11-20, counted from 1 -> slice. Raises UserError if the model has no such layers."""
    if layers == "all":
        return slice(0, count)
    match = re.fullmatch(r"(\d+)-(\d+)", layers)
    if not match or not 1 <= int(match[1]) <= int(match[2]) <= count:
        raise UserError(f"--layers {layers}: give `all` or a range within 1-{count}, such as 1-{count}")
    return slice(int(match[1]) - 1, int(match[2]))


# ======================================================================================================================
# 4. SpeechLM: encoder -> projector -> LLM
# ======================================================================================================================
class SpeechLM:
    """A speech LLM in three stages. Everything after `embed` is the same for every model family."""

    def __init__(self, family, model, tokenizer, feature_extractor):
        self.family, self.tokenizer, self.feature_extractor = family, tokenizer, feature_extractor
        self.model = model.eval().requires_grad_(False)
        self.decoder, self.embed_tokens = model.get_decoder(), model.get_input_embeddings()
        self.device = model.device
        *_, self.pad_id = eos_ids = tokenizer.convert_tokens_to_ids(list(family.end_of_turn))
        self.eos_ids = torch.tensor(eos_ids, device=self.device)
        self.placeholder_ids = torch.tensor(family.placeholders(model.config), device=self.device)

    @classmethod
    def from_pretrained(cls, path):
        """A checkpoint directory or hub name -> SpeechLM; bfloat16 on a GPU, float32 on the CPU.

        Raises UserError if there is no checkpoint at `path`, a part of it is missing or its family is unknown.
        """
        try:
            family = family_of(path)
            model = family.load(path, revision=family.revision, dtype=precision(), attn_implementation="sdpa")
            tokenizer = AutoTokenizer.from_pretrained(path, revision=family.revision)
            feature_extractor = family.feature_extractor_class.from_pretrained(path, revision=family.revision)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{path} is no usable checkpoint, here or on the hub: {reason}") from error
        return cls(family, to_device(model, family), tokenizer, feature_extractor)

    def part(self, name):
        """Which part of the speech LLM the parameter `name` belongs to."""
        modules = name.split(".")
        if self.family.vision_part in modules:
            return "vision (unused, kept on the CPU)"
        if self.family.audio_part in modules:
            return "audio encoder and projector"
        return "lm_head" if "lm_head" in modules else "LLM"

    @torch.no_grad()
    def embed(self, questions):
        """Both prompts of every question -> Prompts [B, 2, P, H]; encoder and projector run here and nowhere else."""
        return self.prompts([[self.spoken_turn(question), self.embed_text(written_question(question))]
                             for question in questions])

    def spoken_turn(self, question):
        """What the user says, [tokens, H]: the clip alone."""
        clip = read_clip(question["audio"]["bytes"], question["key"])  # [T]
        return torch.cat([self.embed_text(self.family.before_audio, special=True),
                          self.family.encode(self.model, self.feature_extractor, clip),
                          self.embed_text(self.family.after_audio, special=True)])

    def embed_text(self, text, special=False):
        """Text -> [tokens, H]. Control tokens are only read as such in our own template (`special`)."""
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=not special).input_ids
        return self.embed_tokens(torch.tensor(ids, dtype=torch.long, device=self.device))

    def prompts(self, user_turns):
        """User turns [tokens, H], a list of B lists of M -> Prompts [B, M, P, H] around them, padded on the left."""
        before = self.embed_text(self.family.before_user, special=True)
        after = self.embed_text(self.family.after_user, special=True)
        rows = [torch.cat([before, turn, after]) for turns in user_turns for turn in turns]  # B*M of [P, H]
        embeds = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left")  # [B*M, P, H]
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        from_end = embeds.shape[1] - torch.arange(embeds.shape[1], device=self.device)  # [P]: P, ..., 2, 1
        mask = (from_end <= lengths[:, None]).long()  # [B*M, P]
        return Prompts(embeds.unflatten(0, (len(user_turns), -1)), mask.unflatten(0, (len(user_turns), -1)))

    def logits(self, hidden, temperature):
        """Last hidden states [N, H] -> logits [N, V] of the very distribution that roll-outs are drawn from."""
        logits = self.model.lm_head(hidden).float()
        logits[:, self.placeholder_ids] = -torch.inf
        return logits / (temperature or 1.0)  # temperature 0 is greedy: the argmax needs no scaling

    @torch.no_grad()
    def rollout(self, prompts, repeats, max_new_tokens, temperature, generator=None):
        """Sample `repeats` completions of each prompt; greedily if `temperature` is 0.

        prompts: [B, M, P, H], M is 2 in training. Returns completion_ids and completion_mask [B, M, repeats, C] (the
        mask runs through the first end-of-turn, inclusive, so that ending a turn is learnt too) and truncated
        [B, M, repeats]. As in `forward`, the samples of a prompt share its row: each step reads `repeats` tokens side
        by side, and the cache holds a prompt once. A row whose samples have all ended leaves the batch.
        """
        embeds, mask = prompts.rows()  # [N, P, H], [N, P] with N = B * M
        cache = DynamicCache(config=self.decoder.config)
        hidden = self._run_decoder(embeds, mask, positions(mask), cache)  # [N, P, H]
        hidden = hidden[:, -1:].expand(-1, repeats, -1)  # [N, repeats, H]
        ids = torch.full((len(mask), repeats, max_new_tokens), self.pad_id, device=self.device)  # [N, repeats, C]
        alive = torch.zeros_like(ids, dtype=torch.bool)  # [N, repeats, C]
        finished = torch.zeros_like(ids[..., 0], dtype=torch.bool)  # [N, repeats]
        row = torch.arange(len(mask), device=self.device)  # [n], the rows still in the batch
        sees = mask.bool()[:, None].expand(-1, repeats, -1)  # [n, repeats, P and the tokens since]
        itself = torch.eye(repeats, dtype=torch.bool, device=self.device)
        for t in range(max_new_tokens):
            logits = self.logits(hidden.flatten(0, 1), temperature)  # [n * repeats, V]
            token = torch.multinomial(logits.softmax(-1), 1, generator=generator) if temperature else logits.argmax(-1)
            token = token.view(-1, repeats)  # [n, repeats]
            alive[row, :, t] = ~finished[row]
            ids[row, :, t] = token.masked_fill(finished[row], self.pad_id)
            finished[row] |= torch.isin(token, self.eos_ids)
            going = ~finished[row].all(-1)  # [n]
            if not going.any():
                break
            if not going.all():
                row, sees = row[going], sees[going]
                cache.batch_select_indices(going)
            sees = torch.cat([sees, itself.expand(len(row), -1, -1)], dim=-1)
            position_ids = (mask[row].sum(-1, keepdim=True) + t).expand(-1, repeats)  # [n, repeats]
            hidden = self._run_decoder(self.embed_tokens(ids[row, :, t]), sees[:, None], position_ids, cache)
        shape = lambda x: x.view(*prompts.mask.shape[:2], *x.shape[1:])  # rows: question, modality, sample
        return shape(ids[..., : t + 1]), shape(alive[..., : t + 1].long()), shape(~finished)

    def _run_decoder(self, embeds, mask, position_ids, cache=None):
        """Run the LLM on [N, T, H]; `mask` is [N, T], or [N, 1, T, cached + T]: who sees whom."""
        return self.decoder(inputs_embeds=embeds, attention_mask=mask, position_ids=position_ids, past_key_values=cache,
                            use_cache=cache is not None).last_hidden_state

    def forward(self, prompts, completion_ids, completion_mask, temperature, pool=True):
        """The paired forward: log-probs and pooled hidden states of given completions, in one pass.

        prompts: [N, P, H], completion_ids and completion_mask: [N, G/2, C]. Returns per_token_logps [N, G/2, C] with
        gradient and, detached, Eq. (4) for every layer [N, G/2, L, H] (None without `pool`). Neither all layers of all
        tokens nor logits of all tokens ever exist. The completions of a prompt share its row, so that the prompt is
        read once for them all:

            row          prompt          | answer 1        | answer 2        | ...
            positions    0 1 2 ... p-1   | p p+1 p+2 ...   | p p+1 p+2 ...   | ...
            sees         prompt so far   | prompt, itself  | prompt, itself  | ...   never a sibling
        """
        (N, half, C), P = completion_ids.shape, prompts.mask.shape[1]
        embeds = torch.cat([prompts.embeds, self.embed_tokens(completion_ids.flatten(1))], dim=1)  # [N, T, H]
        present = torch.cat([prompts.mask, completion_mask.flatten(1)], dim=1).bool()  # [N, T] with T = P + G/2 * C
        step = torch.arange(C, device=self.device)
        answer_positions = (prompts.mask.sum(-1, keepdim=True) + step).repeat(1, half)  # [N, G/2 * C]
        position_ids = torch.cat([positions(prompts.mask), answer_positions], dim=1)  # [N, T]
        part = torch.cat([step.new_full((P,), -1), torch.arange(half, device=self.device).repeat_interleave(C)])  # [T]
        sees = ((part == -1) | (part[:, None] == part)).tril()  # [T, T], query x key
        # A padded position sees itself: softmax over nothing would be NaN.
        itself = torch.eye(len(part), dtype=torch.bool, device=self.device)  # [T, T]
        mask = (sees & present[:, None, None, :]) | itself  # [N, 1, T, T]
        with self._pooling(P, completion_mask) if pool else nullcontext() as pooled:
            hidden = self._run_decoder(embeds, mask, position_ids)  # [N, T, H]
        answers = hidden[:, P:].unflatten(1, (half, C))  # [N, G/2, C, H]
        # The state before a token predicts it; before an answer's first token stands the prompt's last.
        first = hidden[:, None, P - 1 : P].expand(-1, half, -1, -1)  # [N, G/2, 1, H]
        predicts = torch.cat([first, answers[:, :, :-1]], dim=2).flatten(0, 2)  # [N * G/2 * C, H]
        logps = [recompute(self._token_logps, h, ids, temperature, use_reentrant=False)
                 for h, ids in zip(predicts.split(1024), completion_ids.flatten().split(1024))]
        return torch.cat(logps).view(N, half, C), torch.stack(pooled, dim=2) if pool else None

    def _token_logps(self, hidden, ids, temperature):
        return self.logits(hidden, temperature).log_softmax(-1).gather(-1, ids[:, None])[:, 0]  # [N]

    @contextmanager
    def _pooling(self, P, completion_mask):
        """While open, Eq. (4) is applied to each layer's output the moment it appears: a list of L tensors [N, G/2, H].

        It closes before backward, where gradient checkpointing runs every layer again. The last layer is read after
        the final norm, so that the list is what transformers calls hidden_states[1:].
        """
        pooled = []

        def keep(module, inputs, hidden):  # hidden: [N, P + G/2 * C, H]
            answers = hidden[:, P:].detach().unflatten(1, completion_mask.shape[1:])  # [N, G/2, C, H]
            pooled.append(pool_hidden_states(answers, completion_mask))

        hooks = [m.register_forward_hook(keep) for m in (*self.decoder.layers[:-1], self.decoder.norm)]
        try:
            yield pooled
        finally:
            for hook in hooks:
                hook.remove()

    def recompute_layers(self):
        """Gradient checkpointing: keep only each layer's input, and run the layer once more in backward."""
        for layer in self.decoder.layers:
            layer.forward = partial(recompute, layer.forward, use_reentrant=False, preserve_rng_state=False)

    def detokenize(self, completion_ids, completion_mask):
        """Completions [..., C] -> list of strings in row order, without the end of turn."""
        rows = zip(completion_ids.flatten(0, -2).tolist(), completion_mask.flatten(0, -2).sum(-1).tolist())
        return self.tokenizer.batch_decode([ids[:n] for ids, n in rows], skip_special_tokens=True)


class Prompts(NamedTuple):
    """Left-padded prompt embeddings and their mask; any leading shape, [B, 2] in training."""

    embeds: torch.Tensor  # [..., P, H]
    mask: torch.Tensor  # [..., P], 1 where there is a token

    def rows(self, index=slice(None)):
        """The prompts of some questions, one row each: [len(index) * 2, P, H], P no longer than they need."""
        embeds, mask = self.embeds[index].flatten(0, 1), self.mask[index].flatten(0, 1)
        P = mask.sum(-1).max()
        return Prompts(embeds[:, -P:], mask[:, -P:])


def positions(mask):
    """Position ids [N, P] of left-padded rows: a padded row starts at 0 like any other."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


# ======================================================================================================================
# 5. LoRA, on every linear layer of the LLM and nowhere else
# ======================================================================================================================
class LoRALinear(nn.Module):
    """y = W x + (alpha / r) B A x. W is frozen, A [r, in] starts random, B [out, r] at zero: at first y = W x."""

    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.linear, self.scale = linear, alpha / rank
        self.lora_A = nn.Parameter(torch.empty(rank, linear.in_features, device=linear.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank, device=linear.weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)

    def forward(self, x):
        """x [..., in] -> [..., out]."""
        update = F.linear(F.linear(x.to(self.lora_A.dtype), self.lora_A), self.scale * self.lora_B)
        return self.linear(x) + update.to(x.dtype)  # A and B are float32 also beside bfloat16 weights


def attach_lora(lm, rank, alpha):
    """Wrap every linear layer of the LLM. Returns the trainable parameters.

    Only under `layers`: Phi's decoder also holds the audio encoder, and Qwen's audio encoder has a q_proj too.
    """
    for parent in list(lm.decoder.layers.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear):
                setattr(parent, name, LoRALinear(child, rank, alpha))
    return [p for p in lm.decoder.parameters() if p.requires_grad]


def lora_layers(lm):
    """{module name in the model: LoRALinear}"""
    return {name: m for name, m in lm.model.named_modules() if isinstance(m, LoRALinear)}


# ======================================================================================================================
# 6. Evaluate and train
# ======================================================================================================================
def eval_batches(questions, cfg, desc, start=0):
    """Lists of cfg.eval_batch questions from question `start` on, under a progress bar called `desc`."""
    for first in tqdm(range(start, len(questions), cfg.eval_batch), desc=desc, unit="batch", leave=False,
                      disable=RANK > 0):
        yield [questions[i] for i in range(first, min(first + cfg.eval_batch, len(questions)))]


def answer_greedily(lm, questions, extract, cfg, start=0):
    """Yield batches of records, one a question and modality: key, modality, completion, answer, right.

    Begins at question `start`. An output in which no option is found has the answer None and counts as wrong.
    """
    for batch in eval_batches(questions, cfg, "evaluate", start):
        ids, mask, _ = lm.rollout(lm.embed(batch), 1, cfg.max_new_tokens, temperature=0)  # [b, 2, 1, C]
        completions = lm.detokenize(ids, mask)  # b * 2 strings
        asked = [(question, modality) for question in batch for modality in MODALITIES]
        answers = extract([question for question, _ in asked], completions)
        yield [{"key": question["key"], "modality": modality, "completion": completion, "answer": answer,
                "right": answer == LETTERS[question["answer_index"]]}
               for (question, modality), completion, answer in zip(asked, completions, answers)]


def evaluate(lm, questions, extract, cfg):
    """Accuracy of greedy answers to every question, spoken and written: {"speech": 0 to 1, "text": 0 to 1}."""
    share = questions.select(range(RANK, len(questions), RANKS))
    records = [record for batch in answer_greedily(lm, share, extract, cfg) for record in batch]
    right = [sum(r["right"] for r in records if r["modality"] == m) for m in MODALITIES]
    right = sum_over_ranks(torch.tensor(right, device=lm.device)).tolist()
    return {m: count / len(questions) for m, count in zip(MODALITIES, right)}


def learning_rate(step, steps, cfg):
    """Linear warm-up over the first `warmup` share of steps, then linear decay to zero. Steps count from 0."""
    warmup = max(1, round(cfg.warmup * steps))
    return cfg.lr * min((step + 1) / warmup, (steps - step) / max(1, steps - warmup + 1))


def data_order(count, cfg):
    """Batches of question indices: every epoch a new seeded permutation, no question left out."""
    generator = torch.Generator().manual_seed(cfg.seed)
    steps = cfg.steps or max(1, cfg.epochs * count // cfg.questions_per_step)
    order = torch.empty(0, dtype=torch.long)
    while len(order) < steps * cfg.questions_per_step:
        order = torch.cat([order, torch.randperm(count, generator=generator)])
    return order.tolist(), steps


def make_trainable(lm, cfg):
    """Attach LoRA to a base model and say what is trained. Returns the optimizer and the roll-outs' generator."""
    torch.manual_seed(cfg.seed)
    parameters = attach_lora(lm, cfg.lora_rank, cfg.lora_alpha)
    if cfg.gradient_checkpointing:
        lm.recompute_layers()
    print(parameter_table(lm))
    optimizer = torch.optim.AdamW(parameters, lr=cfg.lr, weight_decay=cfg.weight_decay)
    return optimizer, torch.Generator(lm.device).manual_seed(cfg.seed + 1_000_003 * RANK)


def train(lm, questions, eval_questions, embedder, extract, cfg, before, last):
    """Train LoRA and write adapter, log.jsonl and samples.jsonl to cfg.out. Returns the last evaluation.

    Goes on from the checkpoint `last` if it is not None. Ctrl-C and SIGTERM save a checkpoint before they end the run.
    Raises UserError after ten steps in a row without a finite loss and gradient.
    """
    out, B = Path(cfg.out), cfg.questions_per_step
    optimizer, generator = make_trainable(lm, cfg)
    order, steps = data_order(len(questions), cfg)
    done = load_checkpoint(last, optimizer, generator) if last else 0
    files = [cut_log(out / name, done) if RANK == 0 else Path(os.devnull) for name in ("log.jsonl", "samples.jsonl")]
    signals, skipped = [], 0

    def remember(number, frame):
        signals.append(number)
        signal.signal(number, signal.SIG_DFL)  # a second one does not wait for the end of the step

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, remember)
    with open(files[0], "a") as log, open(files[1], "a") as samples:
        bar = tqdm(range(done + 1, steps + 1), desc="TARS", unit="step", initial=done, total=steps, disable=RANK > 0)
        for step in bar:
            start = time.perf_counter()
            batch = [questions[i] for i in order[(step - 1) * B : step * B][RANK::RANKS]]
            optimizer.param_groups[0]["lr"] = lr = learning_rate(step - 1, steps, cfg)
            metrics, group = train_step(lm, batch, embedder, extract, optimizer, cfg, generator)
            seconds = time.perf_counter() - start
            metrics |= {"seconds": seconds, "tokens_per_second": metrics["tokens"] / seconds,
                        "peak_gib": peak_memory(lm.device), "stop": float(bool(signals))}
            metrics = mean_over_ranks(metrics)
            stop = metrics.pop("stop") > 0
            metrics = {"step": step, **metrics, "lr": lr}
            if step == steps or (cfg.eval_every and step % cfg.eval_every == 0):
                accuracy = evaluate(lm, eval_questions, extract, cfg)
                metrics |= {f"eval_{m}": accuracy[m] for m in MODALITIES}
            print(json.dumps({k: v if math.isfinite(v) else None for k, v in metrics.items()}), file=log, flush=True)
            bar.set_postfix_str(" | ".join(f"{m} R {metrics[f'reward_{m}']:.2f} acc {metrics[f'acc_{m}']:.2f}"
                                           for m in MODALITIES))
            if cfg.sample_every and (step - 1) % cfg.sample_every == 0:
                print(json.dumps({"step": step, **group}), file=samples, flush=True)
                tqdm.write(side_by_side(step, group))
            if step < steps and (stop or step % cfg.save_every == 0):
                save_checkpoint(optimizer, generator, step, before, cfg)
            if step < steps and stop:
                raise Stopped(f"stopped after step {step} of {steps}: the same command with --resume goes on there")
            skipped = skipped + 1 if metrics["skipped"] else 0
            if skipped == 10:
                raise UserError("ten steps in a row without a finite loss and gradient, none of which was applied: "
                                f"look at loss, grad_norm and rep_speech in {out}/log.jsonl, and lower --lr")
    if RANK == 0:
        save_adapter(lm, out, cfg)
        print(cost_table([json.loads(line) for line in files[0].read_text().splitlines()]))
    return accuracy


# ======================================================================================================================
# The paper ends here. Below stands what a run needs.
# ======================================================================================================================


# ======================================================================================================================
# 7. Questions
# ======================================================================================================================
class UserError(Exception):
    """Something the user can mend. main() prints it as one line and exits with code 2."""


SAMPLE_RATE = 16_000
COLUMNS = {"key", "question", "options", "answer_index", "prompt_for_tts", "audio"}
SYSTEM_PROMPT = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant "
    "first thinks about the reasoning process in the mind and then provides the user with the answer. The reasoning "
    "process and answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e., "
    "<think>[THINKING PROCESS]</think><answer>The answer is [CHOICE].</answer>"
)


def load_questions(path):
    """Questions written by data_prep.py: a `datasets` directory with at least COLUMNS, audio left as encoded bytes.

    Raises UserError if the directory is missing, is no data set, is empty, lacks a column or has a question without
    four options and an answer among them.
    """
    try:
        questions = datasets.load_from_disk(path)
    except (OSError, ValueError, IndexError) as error:  # the last: `datasets` cannot read back an empty one
        raise UserError(f"{path} is no data set directory, or an empty one: write one with data_prep.py") from error
    if isinstance(questions, dict):
        raise UserError(f"{path} holds several data sets: give one of its parts, {', '.join(questions)}")
    if missing := COLUMNS - set(questions.column_names):
        raise UserError(f"{path} lacks the column(s) {', '.join(sorted(missing))}: write it anew with data_prep.py")
    columns = (questions[column] for column in ("key", "question", "options", "answer_index"))
    for key, question, options, answer_index in zip(*columns):
        if not (question and question.strip() and options and len(options) == 4 and all(options)):
            raise UserError(f"{path}: {key} is no question with four options: leave it out, as data_prep.py does")
        if answer_index not in range(4):
            raise UserError(f"{path}: {key} has the answer_index {answer_index}: it counts the options from 0 to 3")
    return questions.cast_column("audio", datasets.Audio(decode=False))  # decoding in datasets would need FFmpeg


def written_question(question):
    """The user turn of a text prompt. The spoken question's user turn is the clip alone."""
    options = "\n".join(f"Option {letter}: {option}" for letter, option in zip(LETTERS, question["options"]))
    return f"{question['question']}\n\n{options}"


class ClipError(UserError):
    """A clip that no model can hear. `reason` is the short form, by which data_prep.py counts."""

    def __init__(self, key, reason, advice=""):
        super().__init__(f"{key} has {reason}{advice}")
        self.reason = reason


def read_clip(data, key="clip"):
    """Encoded audio bytes -> float32 mono waveform [T] at 16 kHz, in -1..1.

    PCM WAV is read by the standard library. Anything else goes to torchaudio, which wants torchcodec and FFmpeg.
    Raises ClipError naming the question's key if the clip cannot be decoded, holds NaN, or lasts less than 0.1 s or
    more than 300 s, which is all that the encoders take.
    """
    try:
        with wave.open(io.BytesIO(data)) as clip:
            rate, width, channels = clip.getframerate(), clip.getsampwidth(), clip.getnchannels()
            frames = np.frombuffer(clip.readframes(clip.getnframes()), np.uint8).reshape(-1, channels, width)
        if width == 1:  # 8-bit WAV is unsigned, silence at 128
            samples = (frames[..., 0].astype(np.float32) - 128) / 128
        else:  # left-align the little-endian bytes in 32 bits: one scale for 16, 24 and 32 bit
            padded = np.concatenate([np.zeros((*frames.shape[:2], 4 - width), np.uint8), frames], axis=-1)
            samples = padded.view("<i4")[..., 0].astype(np.float32) / 2**31
        waveform = torch.from_numpy(samples).mean(-1)  # [T]
    except (wave.Error, EOFError):
        try:
            waveform, rate = torchaudio.load(io.BytesIO(data))  # [channels, T]
            waveform = waveform.mean(0)
        except Exception as error:  # torchaudio raises whatever its back end raises
            advice = ("; it is no PCM WAV, and torchaudio cannot decode it: if it is no broken file, "
                      f"`pip install torchcodec` and install FFmpeg ({type(error).__name__})")
            raise ClipError(key, "an unreadable clip", advice) from error
    if not waveform.isfinite().all():
        raise ClipError(key, "a clip with NaN samples")
    if not 0.1 <= len(waveform) / rate <= 300:
        raise ClipError(key, f"a clip {'shorter than 0.1' if len(waveform) < 0.1 * rate else 'longer than 300'} s",
                        f" ({len(waveform) / rate:.2f} s)")
    return torchaudio.functional.resample(waveform, rate, SAMPLE_RATE)


def wav_bytes(waveform):
    """Waveform [T] in -1..1, 16 kHz -> 16-bit mono WAV file as bytes."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as clip:
        clip.setnchannels(1), clip.setsampwidth(2), clip.setframerate(SAMPLE_RATE)
        clip.writeframes((np.asarray(waveform) * 32767).astype("<i2").tobytes())
    return buffer.getvalue()


# ======================================================================================================================
# 8. Model families
# ======================================================================================================================
class Qwen25Omni:
    """Front end of Qwen2.5-Omni: all that differs between model families.

    A new family needs one such class: its `repository` on the hub and the `revision` to take, its `model_types` in
    config.json, its model and feature extractor classes (`model_class` with get_decoder(), get_input_embeddings() and
    lm_head) with the settings that --random-weights gives them, the names of the audio and the vision part among the
    model's modules, the pieces of text around the user's turn and around a clip, the tokens that end a turn (the last
    one also pads), `load`, `placeholders` (ids that stand for audio or images in a prompt, never to be sampled) and
    `encode`, from a waveform to the projector's output.
    """

    repository, revision = "Qwen/Qwen2.5-Omni-7B", "main"
    model_types = ("qwen2_5_omni", "qwen2_5_omni_thinker")
    model_class = Qwen2_5OmniThinkerForConditionalGeneration
    feature_extractor_class = WhisperFeatureExtractor
    feature_extractor_defaults = {"feature_size": 128, "chunk_length": 300}
    config_defaults = {"vision_config": {"hidden_size": 1280}}  # where transformers' default is not the repository's
    audio_part, vision_part = "audio_tower", "visual"
    before_user = f"<|im_start|>system\n{SYSTEM_PROMPT}<|im_end|>\n<|im_start|>user\n"
    after_user = "<|im_end|>\n<|im_start|>assistant\n"
    before_audio, after_audio = "<|audio_bos|>", "<|audio_eos|>"
    end_of_turn = ("<|im_end|>", "<|endoftext|>")
    load = model_class.from_pretrained  # of a full checkpoint (thinker, talker, token2wav) the thinker alone

    @staticmethod
    def placeholders(config):
        """Ids that stand for a clip, an image or a video in a prompt."""
        return [config.audio_token_id, config.image_token_id, config.video_token_id]

    @staticmethod
    def encode(model, feature_extractor, waveform):
        """One clip [T] -> audio embeddings [25 per second, H]. One at a time: no padding can leak into a clip."""
        features = feature_extractor(waveform.numpy(), sampling_rate=SAMPLE_RATE, padding="longest",
                                     return_attention_mask=True, return_tensors="pt")
        mel = features.input_features.to(model.device, model.dtype)  # [1, 128, frames]
        mask = features.attention_mask.to(model.device)  # [1, frames]
        return model.get_audio_features(mel, mask, return_dict=True).last_hidden_state


class Phi4Multimodal:
    """Front end of Phi-4-multimodal. The hub's main branch is remote code; transformers' own class reads refs/pr/70."""

    repository, revision = "microsoft/Phi-4-multimodal-instruct", "refs/pr/70"
    model_types = ("phi4_multimodal", "phi4mm")  # the latter on the main branch
    model_class = Phi4MultimodalForCausalLM
    feature_extractor_class, feature_extractor_defaults = Phi4MultimodalFeatureExtractor, {}
    config_defaults = {"tie_word_embeddings": True, "num_attention_heads": 24}
    audio_part, vision_part = "audio_embed", "image_embed"
    before_user, after_user = f"<|system|>{SYSTEM_PROMPT}<|end|><|user|>", "<|end|><|assistant|>"
    before_audio = after_audio = ""
    end_of_turn = ("<|end|>", "<|endoftext|>")

    @staticmethod
    def load(path, revision, **options):
        """The model with its own speech-lora merged: W += (alpha / r) B A. Without it, it hears badly."""
        model = Phi4MultimodalForCausalLM.from_pretrained(path, revision=revision, **options)
        fetch = lambda name: cached_file(path, f"speech-lora/{name}", revision=revision)
        settings = json.loads(Path(fetch("adapter_config.json")).read_text())
        tensors = load_file(fetch("adapter_model.safetensors"))
        for name in [name for name in tensors if name.endswith(".lora_A.weight")]:
            layer = model.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
            A, B = tensors[name].float(), tensors[name.replace("lora_A", "lora_B")].float()  # [r, in], [out, r]
            layer.weight.data += (settings["lora_alpha"] / settings["r"] * B @ A).to(layer.weight.dtype)
        return model

    @staticmethod
    def placeholders(config):
        """Ids that stand for a clip or an image in a prompt."""
        return [config.audio_config.audio_token_id, config.vision_config.image_token_id]

    @staticmethod
    def encode(model, feature_extractor, waveform):
        """One clip [T] -> audio embeddings [12.5 per second, H]."""
        features = feature_extractor(waveform, sampling_rate=SAMPLE_RATE, return_tensors="pt")
        audio, n = model.get_decoder().embed_tokens_extend.audio_embed, int(features.audio_embed_sizes)
        # Its own forward writes the embeddings over placeholder tokens: let it write over nothing else.
        ids = torch.full((1, n), model.config.audio_config.audio_token_id, device=model.device)
        blank = torch.zeros(1, n, model.config.hidden_size, device=model.device, dtype=model.dtype)
        return audio(ids, blank, features.audio_input_features, features.audio_embed_sizes)[0]


FAMILIES = (Qwen25Omni, Phi4Multimodal)


def family_of(path):
    """The front end for a checkpoint, by config.json's model_type. Raises UserError naming the families it knows."""
    model_type = PretrainedConfig.get_config_dict(path)[0].get("model_type")
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    if model_type is None:
        raise UserError(f"{path} is no usable checkpoint: it has no config.json with a model_type")
    known = ", ".join(name for family in FAMILIES for name in family.model_types)
    raise UserError(f"{path} is of the family {model_type}; known are {known}")


def default_device():
    """The GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def precision():
    """Weights are bfloat16 on a GPU and float32 on the CPU."""
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def to_device(model, family):
    """Move a model to the GPU if there is one, all but its vision part, which no question needs."""
    if torch.cuda.is_available():
        model.to("cuda")
        next(m for name, m in model.named_modules() if name.split(".")[-1] == family.vision_part).to("cpu")
    return model


# ======================================================================================================================
# 9. Answer extractor, Eq. (3), and sentence embedder, Eq. (6)
# ======================================================================================================================
def extract_answer(completion, options):
    """The option an output settles on, "A".."D", or None where it names none or more than one: never a guess.

    Looks in the <answer> block if there is one, else in the whole output: first for letters ("The answer is B",
    "Option B", a bare "B" or "(B)"), then for an answer that is word for word one of the four `options`.
    """
    block = re.search(r"<answer>(.*?)</answer>", completion, re.DOTALL)
    answer = (block[1] if block else completion).strip()
    alone = re.fullmatch(r"\(?([ABCD])\)?[.:,]?", answer)
    stated = r"(?:\b[Aa]nswer is:?|\b[Oo]ption|(?<=\b[ABCD]) (?:or|and))\s*[(*]*([ABCD])\b"  # "A or B" states both
    letters = {alone[1]} if alone else set(re.findall(stated, answer))
    if not letters:
        plain = lambda text: text.strip().rstrip(".").strip().casefold()
        said = plain(re.sub(r"^.*\banswer is:?", "", answer, flags=re.DOTALL | re.IGNORECASE))
        letters = {letter for letter, option in zip(LETTERS, options) if plain(option) == said}
    return letters.pop() if len(letters) == 1 else None


def extract_answers(questions, completions):
    """The default extractor, the regular expressions of extract_answer: letters, None where there is none."""
    return [extract_answer(completion, question["options"]) for question, completion in zip(questions, completions)]


class XFinder:
    """The paper's answer extractor, xFinder-qwen1505: a small LLM that reads which option an output settles on."""

    prompt = (
        "<|System|>:You are a help assistant tasked with extracting the precise key answer from given output sentences."
        '\n<|User|>:Question: """{question}"""\n\nOutput sentences: """{output}"""\n\nAnswer range: {options}\n\n'
        "Key extracted answer: \n<|Bot|>:"
    )

    def __init__(self, name, device):
        self.tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
        self.model = AutoModelForCausalLM.from_pretrained(name, dtype=precision()).to(device).eval()

    @torch.no_grad()
    def __call__(self, questions, completions):
        """Questions and as many completions -> letters, None where what it says is no option."""
        prompts = [self.prompt.format(question=q["question"], output=completion,
                                      options=json.dumps([list(pair) for pair in zip(LETTERS, q["options"])]))
                   for q, completion in zip(questions, completions)]
        inputs = self.tokenizer(prompts, padding=True, return_tensors="pt").to(self.model.device)
        output = self.model.generate(**inputs, max_new_tokens=64, do_sample=False)[:, inputs.input_ids.shape[1] :]
        said = self.tokenizer.batch_decode(output, skip_special_tokens=True)
        return [self.letter(text, q["options"]) for text, q in zip(said, questions)]

    @staticmethod
    def letter(said, options):
        """What the extractor says -> the one letter it names or whose option it repeats, else None."""
        plain = lambda text: text.strip().removesuffix(".").lower()
        letters = [letter for letter, option in zip(LETTERS, options) if plain(said) in (letter.lower(), plain(option))]
        return letters[0] if len(letters) == 1 else None


class NGramEmbedder:
    """An offline stand-in for E: counts of hashed words and word pairs. It sees wording, not meaning."""

    def embed(self, texts):
        """Strings -> unit vectors [N, 512]."""
        vectors = []
        for text in texts:
            words = re.findall(r"\w+|[^\w\s]", text.lower())
            grams = words + [f"{a} {b}" for a, b in zip(words, words[1:])]
            hashes = [zlib.crc32(gram.encode()) % 512 for gram in grams]
            vectors.append(torch.bincount(torch.tensor(hashes, dtype=torch.long), minlength=512))
        return F.normalize(torch.stack(vectors).float(), dim=-1)


class SentenceEmbedder:
    """E of the paper: Qwen3-Embedding. Last-token pooling, left padding, documents take no instruction."""

    def __init__(self, name, device):
        self.tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
        self.model = AutoModel.from_pretrained(name, dtype=precision()).to(device).eval()
        if self.tokenizer("").input_ids != [self.tokenizer.convert_tokens_to_ids("<|endoftext|>")]:
            raise ValueError("its tokenizer does not end a text with <|endoftext|>, where the embedding is read")

    @torch.no_grad()
    def embed(self, texts):
        """Strings -> unit vectors [N, D]."""
        inputs = self.tokenizer(texts, padding=True, truncation=True, max_length=8192, return_tensors="pt")
        hidden = self.model(**inputs.to(self.model.device)).last_hidden_state  # [N, T, D]
        return F.normalize(hidden[:, -1].float(), dim=-1)


def load_helper(kind, flag, name, device):
    """One of the helper models above, by name. Raises UserError if it cannot be loaded."""
    try:
        return kind(name, device)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{flag} {name} is no usable model, here or on the hub: {reason}") from error


def load_embedder(cfg, device):
    """E of Eq. (6), by cfg.embedder."""
    if cfg.embedder == "ngrams":
        return NGramEmbedder()
    return load_helper(SentenceEmbedder, "--embedder", cfg.embedder, cfg.aux_device or device)


def load_extractor(cfg, device):
    """What reads the option from an output, by cfg.extractor: (questions, completions) -> letters, None where none."""
    if cfg.extractor == "regex":
        return extract_answers
    return load_helper(XFinder, "--extractor", cfg.extractor, cfg.aux_device or device)


# ======================================================================================================================
# 10. What a run logs and prints
# ======================================================================================================================
class Clock:
    """Where a step's time goes: each call gives the seconds since the last one to the phase that just ended."""

    def __init__(self, device):
        self.device, self.seconds, self.last = device, {}, time.perf_counter()

    def __call__(self, phase):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.last
        self.last = now


def step_means(terms, rep, beh, references):
    """Means over the step for the log: each of `terms` [B, 2, G/2] per modality, rep and beh [B, G/2] of speech."""
    no_spread = terms["reward"].amax(-1, keepdim=True) - terms["reward"].amin(-1, keepdim=True) < 1e-6  # [B, 2, 1]
    means = {"rep_speech": rep.mean().item(), "beh_speech": beh.mean().item(),
             "no_spread": no_spread.all(1).float().mean().item(),
             "no_reference": (references[:, 0] < 0).float().mean().item()}
    for name, values in (terms | {"no_spread": no_spread}).items():
        means |= {f"{name}_{m}": values[:, i].float().mean().item() for i, m in enumerate(MODALITIES)}
    return means


def first_group(question, completions, terms, rep, beh, references):
    """The first group of a step in full, for a person: each answer with its `terms` [B, 2, G/2], speech with more."""
    half = rep.shape[-1]
    group = {key: question[key] for key in ("key", "question", "options", "answer_index")}
    for i, m in enumerate(MODALITIES):
        group[m] = [{"completion": completions[i * half + s]} | {name: x[0, i, s].item() for name, x in terms.items()}
                    for s in range(half)]
    for s, answer in enumerate(group["speech"]):
        answer |= {"rep": rep[0, s].item(), "beh": beh[0, s].item(), "reference": references[0, s].item()}
    return group


def parameter_table(lm):
    """How many parameters each part of the speech LLM has, and how many of them are trained."""
    counts = {}
    for name, p in lm.model.named_parameters():
        total, trained = counts.get(lm.part(name), (0, 0))
        counts[lm.part(name)] = total + p.numel(), trained + p.numel() * p.requires_grad
    counts["all"] = tuple(map(sum, zip(*counts.values())))
    rows = [f"{part:<34}{total:>16,}{trained:>14,}" for part, (total, trained) in counts.items()]
    return "\n".join([f"{'part':<34}{'parameters':>16}{'trainable':>14}", *rows])


def cost_table(log):
    """Where a run's time went, from the lines of its log.jsonl."""
    phases = {name.removeprefix("seconds_"): [line[name] for line in log] for name in log[0] if "seconds_" in name}
    phases["whole steps"] = [line["seconds"] for line in log]
    total = sum(phases["whole steps"])
    rows = [f"{name:<14}{sum(s):>10.1f}{np.median(s):>16.3f}{100 * sum(s) / total:>9.1f}" for name, s in phases.items()]
    return "\n".join([f"\n{'phase':<14}{'seconds':>10}{'median a step':>16}{'share %':>9}", *rows,
                      f"{sum(line['tokens'] for line in log) / total:.0f} sampled tokens a second, peak memory "
                      f"{max(line['peak_gib'] or math.nan for line in log):.2f} GiB"])


def side_by_side(step, group):
    """One spoken answer and its text reference in two columns, each under its rewards, 100 characters wide."""
    spoken = group["speech"][0]
    if spoken["reference"] < 0:
        written = {"completion": "(no written answer of this group is correct)"}
    else:
        written = group["text"][spoken["reference"]]
    terms = ("acc", "fmt", "rep", "beh", "reward", "advantage")
    columns = [[name, *textwrap.wrap(textwrap.shorten(answer["completion"], 400), 48),
                "  ".join(f"{term[:6]} {answer[term]:.2f}" for term in terms[:4] if term in answer),
                "  ".join(f"{term} {answer[term]:+.2f}" for term in terms[4:] if term in answer)]
               for name, answer in (("spoken", spoken), ("written, its reference", written))]
    head = f"step {step}, {group['key']}: {group['question']} ({LETTERS[group['answer_index']]})"
    return "\n".join([head, *(f"  {a:<48}  {b}".rstrip() for a, b in zip_longest(*columns, fillvalue=""))])


def peak_memory(device):
    """The most memory this process has held so far on `device`, in GiB; nan on Windows, which does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved() / 2**30
    try:
        import resource
    except ImportError:
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


# ======================================================================================================================
# 11. Adapter files and checkpoints
# ======================================================================================================================
def write_aside(path, write):
    """Write a file under another name, then rename it: nothing half-written is ever left in its place."""
    aside = path.with_name(path.name + ".part")
    write(aside)
    os.replace(aside, path)


def write_json(path, content):
    """Write `content` as indented JSON, aside first."""
    write_aside(path, lambda aside: aside.write_text(json.dumps(content, indent=2) + "\n"))


def save_adapter(lm, out, cfg):
    """Write adapter_model.safetensors and adapter_config.json in PEFT's format."""
    layers = lora_layers(lm)
    tensors = {f"base_model.model.{name}.{part}.weight": getattr(m, part).detach().contiguous().cpu()
               for name, m in layers.items() for part in ("lora_A", "lora_B")}
    # A regular expression over whole names: the audio tower has layers called q_proj too.
    decoder = next(iter(layers)).split(".layers.")[0]
    suffixes = sorted({name.split(".layers.")[1].split(".", 1)[1] for name in layers})
    write_aside(out / "adapter_model.safetensors", lambda path: save_file(tensors, path, {"format": "pt"}))
    write_json(out / "adapter_config.json", {
        "peft_type": "LORA", "base_model_name_or_path": cfg.model, "r": cfg.lora_rank, "lora_alpha": cfg.lora_alpha,
        "lora_dropout": 0.0, "bias": "none", "inference_mode": True,
        "target_modules": re.escape(decoder) + r"\.layers\.\d+\.(" + "|".join(map(re.escape, suffixes)) + ")",
    })


class Stopped(UserError):
    """Ctrl-C or SIGTERM: the checkpoint is written, the run can go on."""


def save_checkpoint(optimizer, generator, step, before, cfg):
    """Write LoRA weights, AdamW's state and the generators' states after `step`; keep the last two checkpoints."""
    states = gather_over_ranks(generator.get_state())
    if RANK:
        return
    tensors = {f"generator.{rank}": state for rank, state in enumerate(states)}
    for i, p in enumerate(optimizer.param_groups[0]["params"]):
        tensors |= {f"lora.{i}": p.detach()} | {f"adamw.{i}.{key}": value for key, value in optimizer.state[p].items()}
    metadata = {"tars": json.dumps({"step": step, "before": before, "config": settings_to_match(cfg)})}
    folder = Path(cfg.out) / "checkpoints"
    folder.mkdir(exist_ok=True)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    write_aside(folder / f"step-{step:07}.safetensors", lambda path: save_file(tensors, path, metadata))
    for old in sorted(folder.glob("step-*.safetensors"))[:-2]:
        old.unlink()


def settings_to_match(cfg):
    """The settings that a resumed run must share with the one it continues."""
    free = ("out", "resume", "save_every", "aux_device")
    return {k: v for k, v in asdict(cfg).items() if k not in free} | {"ranks": RANKS}


def find_checkpoint(cfg):
    """The checkpoint to go on from and its metadata, or None twice to begin at the beginning.

    Raises UserError if there is none to go on from, if it was made with other settings, or if it would be lost.
    """
    found = sorted((Path(cfg.out) / "checkpoints").glob("step-*.safetensors"))
    if not found:
        if cfg.resume == "last":
            raise UserError(f"--resume: {cfg.out} holds no checkpoint to go on from")
        return None, None
    if not cfg.resume:
        if not (Path(cfg.out) / "summary.json").exists():
            raise UserError(f"{cfg.out} holds the checkpoints of an unfinished run: go on with --resume, remove it, or "
                            "give another --out")
        return None, None
    with safe_open(found[-1], "pt") as file:
        metadata = json.loads(file.metadata()["tars"])
    if other := [k for k, v in settings_to_match(cfg).items() if metadata["config"].get(k) != v]:
        raise UserError(f"--resume: {found[-1]} was made with another {', '.join(other)}: give the same ones")
    return found[-1], metadata


def load_checkpoint(path, optimizer, generator):
    """Put weights, AdamW's state and the generator back where they were. Returns the step."""
    tensors, parameters = load_file(path), optimizer.param_groups[0]["params"]
    state = {i: {} for i in range(len(parameters))}
    for name, tensor in tensors.items():
        kind, i, *key = name.split(".")
        if kind == "lora":
            parameters[int(i)].data.copy_(tensor)
        elif kind == "adamw":
            state[int(i)][key[0]] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    generator.set_state(tensors[f"generator.{RANK}"])
    return int(path.stem.removeprefix("step-"))


def cut_log(file, step):
    """Cut a log back to the lines up to `step`: what came after the checkpoint is done again."""
    lines = file.read_text().splitlines(keepends=True) if step else []
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    write_aside(file, lambda aside: aside.write_text("".join(kept)))
    return file


# ======================================================================================================================
# 12. Several processes
# ======================================================================================================================
# Several processes, started by torchrun: each takes every RANKS-th question; LoRA's gradients are summed, since the
# loss is already divided by the tokens of all. One process needs none of it.
RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def sum_over_ranks(x):
    """A tensor -> its sum over all processes."""
    if RANKS > 1:
        dist.all_reduce(x)
    return x


def sum_gradients_over_ranks(parameters, loss):
    """Sum the gradients and the loss over all processes, in one message. Returns the loss."""
    if RANKS == 1:
        return loss
    flat = sum_over_ranks(torch.cat([*(p.grad.flatten() for p in parameters), parameters[0].new_tensor([loss])]))
    for p, gradient in zip(parameters, flat.split([p.numel() for p in parameters] + [1])):
        p.grad.copy_(gradient.view_as(p))
    return flat[-1].item()


def mean_over_ranks(metrics):
    """Numbers of this process's questions -> of all."""
    device = default_device() if RANKS > 1 else "cpu"
    means = sum_over_ranks(torch.tensor(list(metrics.values()), dtype=torch.float64, device=device)) / RANKS
    return dict(zip(metrics, means.tolist()))


def gather_over_ranks(state):
    """A CPU tensor -> the list of those of all processes."""
    if RANKS == 1:
        return [state]
    state = state.to(default_device())
    states = [torch.empty_like(state) for _ in range(RANKS)]
    dist.all_gather(states, state)
    return [state.cpu() for state in states]


# ======================================================================================================================
# 13. The command
# ======================================================================================================================
def parse_config(arguments, build_demo):
    """Config from the command line: a flag beats the model's own tars_config.json, which beats the default.

    `build_demo(path)` is called when the default model is asked for and is not there yet.
    """
    table = lambda prog: argparse.HelpFormatter(prog, max_help_position=28, width=120)
    parser = argparse.ArgumentParser(prog="tars.py", usage="tars.py [--setting value ...]", allow_abbrev=False,
                                     description="setting: meaning [default; where the paper gives it]",
                                     formatter_class=table)
    for f in fields(Config):
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type, "metavar": ""}
        flag = "--" + f.name.replace("_", "-")
        parser.add_argument(flag, default=argparse.SUPPRESS, help=f.metadata["help"], **kind | f.metadata["flag"])
    flags = vars(parser.parse_args(arguments))
    model = Path(flags.get("model", Config.model))
    if str(model) == Config.model and not model.exists():
        build_demo(model.parent)
    recommended = {}
    if (model / "tars_config.json").exists():
        recommended = json.loads((model / "tars_config.json").read_text())
        if unknown := recommended.keys() - {f.name for f in fields(Config)}:
            raise UserError(f"{model}/tars_config.json has the unknown setting(s) {', '.join(sorted(unknown))}")
        recommended |= {k: os.path.normpath(model / recommended[k]) for k in ("data", "eval_data") if k in recommended}
    return Config(**(recommended | flags))


def build_demo(folder):
    """Make the offline demo's data and base model with data_prep.py."""
    if RANKS > 1:
        raise UserError(f"{folder} is not there yet: make it first with `python data_prep.py demo`, in one process")
    print(f"{folder} is not there yet: building the offline demo (once, about 3 minutes)")
    command = [sys.executable, Path(__file__).with_name("data_prep.py"), "demo", "--out", folder]
    if subprocess.run(command).returncode:
        raise UserError(f"the demo could not be built under {folder}: the reason is printed above")


def check(cfg):
    """Raise UserError for settings that no run could make sense of."""
    if cfg.group_size < 4 or cfg.group_size % 2:
        raise UserError(f"--group-size {cfg.group_size}: give an even number from 4 on, half spoken and half written")
    for name in ("questions_per_step", "max_new_tokens", "tokens_per_micro_batch", "eval_batch", "lora_rank",
                 "updates_per_rollout", "temperature", "lora_alpha", "epochs", "save_every"):
        if getattr(cfg, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: give a number above 0")
    if cfg.questions_per_step % RANKS:
        raise UserError(f"--questions-per-step {cfg.questions_per_step}: give a multiple of the {RANKS} processes")


def main(arguments=None):
    """Evaluate, train, evaluate again, and print what became of the gap."""
    if RANKS > 1:
        torch.cuda.is_available() and torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group()
        sys.stdout = sys.stdout if RANK == 0 else open(os.devnull, "w")
    cfg = parse_config(arguments, build_demo)
    check(cfg)
    questions, eval_questions = load_questions(cfg.data), load_questions(cfg.eval_data)
    lm = SpeechLM.from_pretrained(cfg.model)
    embedder, extract = load_embedder(cfg, lm.device), load_extractor(cfg, lm.device)
    layer_slice(cfg.layers, len(lm.decoder.layers))
    last, metadata = find_checkpoint(cfg)
    sum_over_ranks(torch.zeros(1, device=lm.device))  # nobody removes anything before all have looked
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    if RANK == 0 and last is None:
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
        (out / "summary.json").unlink(missing_ok=True)
        write_json(out / "config.json", asdict(cfg))

    before = metadata["before"] if metadata else evaluate(lm, eval_questions, extract, cfg)
    after = train(lm, questions, eval_questions, embedder, extract, cfg, before, last)
    if RANK:
        return
    mrr = [modality_recovery_rate(accuracy["speech"], before["text"]) for accuracy in (before, after)]
    write_json(out / "summary.json", {
        "base_speech": before["speech"], "base_text": before["text"], "speech": after["speech"], "text": after["text"],
        "mrr_before": mrr[0], "mrr_after": mrr[1], "n_speech": len(eval_questions), "n_text": len(eval_questions),
    })
    print(f"\n{len(eval_questions)} held-out questions".ljust(28) + f"{'speech %':>10}{'text %':>10}{'MRR %':>10}")
    for name, accuracy, rate in zip(("before", "after"), (before, after), mrr):
        print(f"{name:<27}{100 * accuracy['speech']:>10.1f}{100 * accuracy['text']:>10.1f}{rate:>10.1f}")
    print(f"adapter, log and samples are in {out}/")


def run(program, main):
    """Run a program's main(): whatever its user can mend ends in one line on stderr and exit code 2."""
    try:
        return main()
    except UserError as error:
        message, code = str(error), 130 if isinstance(error, Stopped) else 2
    except torch.OutOfMemoryError:
        message, code = (f"out of GPU memory at {peak_memory(torch.device('cuda')):.1f} GiB: lower "
                         "--tokens-per-micro-batch, --max-new-tokens or --questions-per-step, or leave out long clips "
                         "(data_prep.py --max-seconds); the last checkpoint is good, --resume goes on from it"), 2
    except OSError as error:  # an unwritable folder, a full disk
        message, code = f"{error.filename or 'a file'}: {error.strerror or error}", 2
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    sys.exit(print(f"{program}: {message}", file=sys.stderr) or code)


if __name__ == "__main__":
    run("tars.py", main)
