"""TARS in one file: reinforcement learning that closes the modality reasoning gap of a speech LLM.

"Closing the Modality Reasoning Gap for Speech Large Language Models", Wang et al., arXiv 2601.05543, ACL 2026.

A speech LLM (audio encoder -> projector -> text LLM) answers a spoken question worse than the same question in writing.
Its hidden states drift away from those of the written run, layer by layer, and its chain of thought drifts with them.
TARS lets the model answer each question G times, half from speech and half from text: a group. Every answer earns a
task reward. A spoken answer also earns two dense rewards for staying close to a *correct* written answer of its group:
close in its hidden states, and close in what it says. This reference comes from the model itself and improves with it.
Advantages are centred within each modality, and a GRPO step with DAPO's clipping updates LoRA weights of the LLM. The
dense rewards matter because they still differ when every spoken answer of a group is wrong.

  spoken prompt  -->  G/2 spoken answers   -->  R_base + alpha R_rep + beta R_beh  -->  R - mean of speech  --+
                                                         (states)     (text)                                  |
                                                            ^            ^                                    +--> loss
                        y*, a correct one for each  --------+------------+                                    |
                                       ^                                                                      |
  written prompt -->  G/2 written answers  -->  R_base                             -->  R - mean of text    --+

B questions, M modalities (0 speech, 1 text), G samples of a question (G/2 per modality), P prompt and C completion
tokens, T tokens, N rows of any kind, L layers, H hidden size, V vocabulary, D size of a sentence embedding.

  Eq.   function                  what it is                                         test in test_tars.py
  (1)   modality_recovery_rate    speech accuracy / base model's text accuracy       test_eq1_*
  (2)   total_reward              R = R_base + alpha R_rep + beta R_beh              test_eq2_*
  (3)   base_reward               R_base = R_acc + lambda R_fmt                      test_eq3_*
  (4)   pool_hidden_states        mean of a layer's states over the answer's tokens  test_eq4_*
  (5)   representation_reward     mean over layers of cos(speech, text)              test_eq5_*
  (6)   behavior_reward           cos(E(speech answer), E(text answer))              test_eq6_*
  (7)   modality_advantages       A = r - mean of its own modality                   test_eq7_*
  loss  token_weights, grpo_loss  clipped surrogate over the tokens of the batch     test_loss_*
  all   train_step                one step of the algorithm, numbered                test_step_*

Where paper and official code differ, the paper is followed (README has the table). Chosen here: LoRA has no dropout, so
that roll-out and update see one policy; pooling includes the end-of-turn; one forward pass gives log-probs and hidden
states; regular expressions extract the answer (the paper: xFinder, here `--extractor`).

  python tars.py                                       # the whole method, offline on a laptop
  python tars.py --model Qwen/Qwen2.5-Omni-7B --data DIR --eval-data DIR
  python tars.py --help                                # every setting and where the paper gives it
"""

import argparse
import io
import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
import unicodedata
import wave
import zlib
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from functools import partial
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pyarrow.compute as compute
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint as recompute
from tqdm import tqdm
from transformers import AttentionInterface, AttentionMaskInterface, Cache, DynamicLayer, Phi4MultimodalFeatureExtractor
from transformers import Phi4MultimodalForCausalLM, PretrainedConfig
from transformers import PreTrainedTokenizerFast, Qwen2_5OmniThinkerForConditionalGeneration, Qwen2ForCausalLM
from transformers import Qwen3Model, WhisperFeatureExtractor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import cached_file

MODALITIES = ("speech", "text")
TEXT = 1
LETTERS = "ABCD"
RANK, RANKS = 0, 1  # of processes; join_processes() sets them under torchrun


# ==== 1. Config: the paper's Table 5 ==================================================================================
def setting(default, meaning, paper="", within=None, **flag):
    """One Config field: default, meaning, place in the paper, extra argparse keywords.
    within: the allowed range of a number; without one an int is at least 1 and a float at least 0.
    """
    note = "; ".join(str(part) for part in (default, paper) if part != "")
    within = within or {int: "[1, inf)", float: "[0, inf)"}.get(type(default))
    flag |= {"help": f"{meaning} [{note}]" if note else meaning}
    return field(default=default, metadata={"within": within, "flag": flag})


@dataclass
class Config:
    """Every hyper-parameter; its default is the paper's value where a place is given. The flags are these fields.
    A model directory may hold a tars_config.json with other defaults. Flags override it, it overrides these.
    """

    given = frozenset()  # the names of those that were given on the command line

    # what to train on
    model: str = setting("runs/demo/model", "model directory or hub name", "the paper: Qwen2.5-Omni-7B, Phi-4-MM")
    data: str = setting("runs/data/train", "training questions, written by data_prep.py", "the paper: 9,953 of MMLU")
    eval_data: str = setting("runs/data/test", "held-out questions, likewise", "the paper: VoiceBench MMSU and OBQA")
    out: str = setting("runs/tars", "directory for adapter, logs and summary")
    seed: int = setting(0, "seed of LoRA's weights, data order, sampling and references", within="[0, 4294967295]")
    # roll-out
    questions_per_step: int = setting(8, "B, questions per optimizer step", "Table 5: 64 completions")
    group_size: int = setting(8, "G, completions per question: half from speech, half from text", "Table 5", "[4, inf)")
    max_new_tokens: int = setting(1024, "longest completion; a cut one is masked out of the loss", "Table 5")
    temperature: float = setting(1.0, "sampling temperature, no top-k, no top-p", "Table 5", "(0, inf)")
    # rewards and advantages
    alpha: float = setting(1.0, "weight of R_rep", "Eq. (2)")
    beta: float = setting(1.0, "weight of R_beh (not GRPO's KL weight: there is no KL term)", "Eq. (2)")
    lam: float = setting(0.5, "lambda, weight of R_fmt", "Eq. (3)")
    layers: str = setting("all", "layers in R_rep, `all` or a range counted from 1 such as 11-20", "Eq. (5), Figure 3")
    embedder: str = setting("Qwen/Qwen3-Embedding-0.6B", "E, a sentence-embedding model, or `ngrams`", "Eq. (6)")
    extractor: str = setting("regex", "answer extractor", "the paper: IAAR-Shanghai/xFinder-qwen1505")
    aux_device: str = setting("", "device of embedder and extractor, such as cpu; empty: the model's own")
    joint_norm: bool = setting(False, "one mean over both modalities instead of one for each", "ablation of Eq. (7)")
    # loss and optimizer
    eps_low: float = setting(0.2, "the ratio is clipped below 1 - eps_low", "Table 5", "[0, 1]")
    eps_high: float = setting(0.28, "the ratio is clipped above 1 + eps_high", "Table 5")
    updates_per_rollout: int = setting(1, "optimizer steps on each roll-out; with 1 the ratio is 1", "Table 5")
    epochs: int = setting(3, "passes over the training questions", "Table 5")
    steps: int = setting(0, "roll-outs in all; 0 means as many as `epochs` takes", within="[0, inf)")
    lr: float = setting(2e-5, "AdamW's peak learning rate", "Table 5")
    warmup: float = setting(0.01, "share of steps in which the learning rate rises from 0", "Table 5", "[0, 1]")
    weight_decay: float = setting(0.01, "AdamW's weight decay", "Table 5")
    max_grad_norm: float = setting(1.0, "gradients are scaled down to this norm", "Table 5", "(0, inf)")
    lora_rank: int = setting(8, "r of LoRA on every linear layer of the LLM", "Table 5")
    lora_alpha: int = setting(32, "LoRA's update is scaled by lora_alpha / lora_rank", "Table 5")
    # memory and output
    tokens_per_micro_batch: int = setting(16384, "most tokens, with padding, of one forward pass; groups stay whole")
    gradient_checkpointing: bool = setting(True, "recompute the layers in backward instead of keeping them")
    eval_batch: int = setting(32, "questions per batch in evaluation")
    eval_every: int = setting(0, "evaluate every so many steps; 0 means only before and after", within="[0, inf)")
    save_every: float = setting(20.0, "checkpoint after a step if so many seconds have passed; the last two are kept")
    resume: str = setting("", "continue from --out's last checkpoint; `--resume auto`: if there is one", nargs="?",
                          const="last", choices=("last", "auto"), metavar="auto")
    sample_every: int = setting(20, "show and save one group every so many steps; 0 means never", within="[0, inf)")


# ==== 2. The equations, in the paper's order and notation. No gradient flows through a reward. ========================
def modality_recovery_rate(speech_accuracy, base_text_accuracy):
    """Eq. (1): speech accuracy as a share of what the original text backbone reaches in writing; numbers -> percent.
    The denominator is fixed: the base model before training, not the trained policy. If it is 0 the rate is nan.
    MRR = Acc_speech(model) / Acc_text(base) * 100 %
    """
    return 100 * speech_accuracy / base_text_accuracy if base_text_accuracy else math.nan


def total_reward(base, rep, beh, alpha=1.0, beta=1.0):
    """Eq. (2): the reward of each answer. Three tensors [...] -> [...].
    A written answer has R_rep = R_beh = 0 and earns R_base alone: that is the asymmetry of the method.
    R_i = R_base,i + alpha R_rep,i + beta R_beh,i
    """
    return base + alpha * rep + beta * beh


def base_reward(acc, fmt, lam=0.5):
    """Eq. (3): the task reward of each answer, spoken or written. Two tensors [...] of 0 and 1 -> [...].
    R_acc is 1 if the extracted option is the right one; R_fmt is format_reward.
    R_base,i = R_acc,i + lambda R_fmt,i
    """
    return acc + lam * fmt


ANSWER_FORMAT = re.compile(r"<think>.*?</think>\s*<answer>.*?The answer is [ABCD][.:,].*</answer>", re.DOTALL)


def format_reward(completion):
    """R_fmt of Eq. (3): 1.0 if all of it is <think>...</think><answer>... The answer is X. ...</answer>, else 0.0.
    X is A, B, C or D; a colon or a comma may stand for the full stop, and white space around thought and answer.
    """
    return 1.0 if ANSWER_FORMAT.fullmatch(completion.strip()) else 0.0


def pool_hidden_states(hidden, completion_mask):
    """Eq. (4): one vector for an answer and a layer. hidden [..., T, H], completion_mask [..., T] -> [..., H].
    The mask is 1 on generated positions, end-of-turn included; the prompt's do not count. Without any the mean is 0.
    h_bar^(l) = (1 / |y|) sum_{t in y} h_t^(l)
    """
    mask = completion_mask.unsqueeze(-1).to(hidden.dtype)  # [..., T, 1]
    return (hidden * mask).sum(-2) / mask.sum(-2).clamp(min=1)


def pick_references(text_correct, generator=None):
    """y*_text of Eq. (5) and (6): for each spoken answer a correct written answer of its group, drawn at random.
    text_correct: bool [B, G/2] -> index of a written answer, long [B, G/2]; -1 in a group without a correct one.
    """
    none = ~text_correct.any(-1, keepdim=True)  # [B, 1]
    chances = text_correct.float() + none.float()  # [B, G/2]; where none is correct the draw is overwritten with -1
    drawn = torch.multinomial(chances, text_correct.shape[-1], replacement=True, generator=generator)  # [B, G/2]
    return drawn.masked_fill(none, -1)


def reference_features(features, references):
    """States or embeddings of each answer's reference: features [B, M, G/2, ...], references [B, G/2] -> as features.
    Written answers, and spoken ones whose reference is -1, get zeros: the cosine with zeros is 0.
    """
    question = torch.arange(len(features), device=features.device)[:, None, None]  # [B, 1, 1]
    references = references[:, None].repeat(1, features.shape[1], 1)  # [B, M, G/2]
    references[:, TEXT] = -1
    chosen = features[question, TEXT, references.clamp(min=0)]  # [B, M, G/2, ...]
    chosen[references < 0] = 0
    return chosen


def representation_reward(speech, text, weights=None):
    """Eq. (5): how near the hidden states of a spoken answer are to its reference's. Pooled [..., L, H] twice -> [...].
    All L transformer layers count alike; the embedding output does not count.
    `weights` [L], which sum to 1, make the mean a weighted one (layer bands of Figure 3).
    R_rep = (1 / L) sum_l cos(h_bar_speech^(l), h_bar_text^(l))
    """
    cosines = F.cosine_similarity(speech, text, dim=-1)  # [..., L]
    return cosines.mean(-1) if weights is None else cosines @ weights


def behavior_reward(speech, text):
    """Eq. (6): how near a spoken answer is in meaning to its reference. Sentence embeddings [..., D] twice -> [...].
    E embeds the whole completion, thought and answer.
    R_beh = cos(E(y_speech), E(y*_text))
    """
    return F.cosine_similarity(speech, text, dim=-1)


def modality_advantages(rewards, joint=False):
    """Eq. (7): how much better an answer is than its group's answers in the same modality. Both [B, M, G/2].
    GRPO would take the mean of the whole group and divide by its standard deviation.
    With one joint mean (`joint`) the modality with the higher mean reward gets positive advantages as a whole: text
    under R_base, speech once R_rep and R_beh are added.
    A_{i,m} = r_{i,m} - mu_m,  mu_m = mean_j r_{j,m}
    """
    return rewards - rewards.mean((-2, -1) if joint else -1, keepdim=True)


def token_weights(completion_mask, n_tokens=None, truncated=None):
    """DAPO's mean over tokens: each token's weight in the loss. completion_mask [..., T], truncated [...] -> [..., T].
    A cut answer (truncated) keeps its reward and counts in the mean of Eq. (7), but not in the loss.
    n_tokens is the token count of the whole batch, if completion_mask is only a part of it.
    w_{i,t} = 1 / sum_{j not cut} |y_j|, and 0 where nothing is learnt: padding and cut answers
    """
    learnt = completion_mask if truncated is None else completion_mask * ~truncated[..., None]  # [..., T]
    n_tokens = sum_over_ranks(learnt.sum()) if n_tokens is None else n_tokens  # of all processes, if there are several
    return learnt / max(n_tokens, 1)


def grpo_loss(per_token_logps, old_per_token_logps, advantages, completion_mask, eps_low=0.2, eps_high=0.28,
              weights=None):
    """GRPO's surrogate with DAPO's clipping: [..., T] twice, [...], [..., T] -> scalar. No KL term, no reference model.
    On-policy rho is 1, and the value is about 0 because advantages sum to 0 in a group.
    The gradient is not 0: each token adds A times the gradient of its log-prob.
    `weights` [..., T] are token_weights(completion_mask) if None.
    loss = - sum_{i,t} w_{i,t} min(rho_{i,t} A_i, clip(rho_{i,t}, 1 - eps_low, 1 + eps_high) A_i),  rho = pi / pi_old
    """
    rho = torch.exp(per_token_logps - old_per_token_logps)  # [..., T]
    A = advantages[..., None]  # [..., 1]
    surrogate = torch.min(rho * A, rho.clamp(1 - eps_low, 1 + eps_high) * A)  # [..., T]
    weights = token_weights(completion_mask.to(rho.dtype)) if weights is None else weights
    return -(weights * surrogate).sum()


# ==== 3. One step of the algorithm ====================================================================================
def train_step(lm, questions, embedder, extract, optimizer, cfg, generator, with_kl=False):
    """One step of TARS on B questions. Returns the numbers to log (step_means; with_kl: also KL to the base model), and
    the first group for a person to read (first_group). Tensors of answers are [B, M, G/2, ...]: question, modality
    (0 speech, 1 text), sample.
    """
    clock, parameters = Clock(lm.device), optimizer.param_groups[0]["params"]  # the clock only measures

    # 1. Embed both prompts of every question. Encoder and projector are frozen, so one pass serves roll-out and update.
    prompts = lm.embed(questions)  # B lists of M prompts [P, H]
    clock.lap("embed")

    # 2. Roll out: the model answers every prompt G/2 times.
    rollout = lm.rollout(prompts, cfg.group_size // len(MODALITIES), cfg.max_new_tokens, cfg.temperature, generator)
    completion_ids, completion_mask, truncated = rollout  # [B, M, G/2, C] twice, [B, M, G/2]
    token_w = token_weights(completion_mask, truncated=truncated)  # [B, M, G/2, C], the normaliser of the whole step
    clock.lap("rollout")

    # 3. Rewards that need only the text: Eq. (3), the references y*, Eq. (6).
    completions = lm.detokenize(completion_ids, completion_mask)  # B * M * G/2 strings
    letters, acc, fmt = judge(questions, completions, extract)  # `extract`: the answer extractor
    acc, fmt = (x.to(lm.device).view(truncated.shape) for x in (acc, fmt))  # [B, M, G/2]
    base = base_reward(acc, fmt, cfg.lam)  # [B, M, G/2]
    references = pick_references(acc[:, TEXT] == 1, generator)  # [B, G/2]
    rep, beh, rewards, advantages = (torch.zeros_like(base) for _ in range(4))  # [B, M, G/2]
    if cfg.beta:
        sentences = embedder.embed(completions).to(lm.device).unflatten(0, base.shape)  # [B, M, G/2, D]
        beh = behavior_reward(sentences, reference_features(sentences, references))  # [B, M, G/2]
    clock.lap("rewards")

    layer_w = layer_weights(cfg.layers, len(lm.decoder.layers)).to(lm.device)  # [L]
    old_logps, new_logps = (torch.zeros_like(token_w) for _ in range(2))  # [B, M, G/2, C]
    batches, padding = micro_batches(prompts, completion_mask, cfg.tokens_per_micro_batch)  # lists of b questions
    for update in range(cfg.updates_per_rollout):
        loss = 0.0
        for batch in batches:
            # 4. One forward: log-probs [b, M, G/2, C] with gradient, pooled states [b, M, G/2, L, H] without, Eq. (4).
            ids, mask, w = (x[batch] for x in (completion_ids, completion_mask, token_w))  # [b, M, G/2, C]
            logps, states = lm.forward([prompts[q] for q in batch], ids, mask, cfg.temperature, pool=cfg.alpha != 0)
            clock.lap("forward")
            if update == 0:
                # 5. Rewards: Eq. (5) and Eq. (2).
                if cfg.alpha:
                    y_star = reference_features(states, references[batch])  # [b, M, G/2, L, H]
                    rep[batch] = representation_reward(states, y_star, layer_w)  # [b, M, G/2]
                rewards[batch] = total_reward(base[batch], rep[batch], beh[batch], cfg.alpha, cfg.beta)
                # 6. Advantages: Eq. (7).
                advantages[batch] = modality_advantages(rewards[batch], cfg.joint_norm)
                # On-policy, pi_old is the policy that just ran: the ratio is 1 until the first update is made.
                old_logps[batch] = logps.detach()
                clock.lap("rewards")
            # 7. Loss of these questions, and its gradient.
            part = grpo_loss(logps, old_logps[batch], advantages[batch], mask, cfg.eps_low, cfg.eps_high, w)
            part.backward()
            loss += part.item()
            new_logps[batch] = logps.detach()
            clock.lap("backward")
        # 8. Update, unless loss or gradient norm is not finite.
        loss = sum_gradients_over_ranks(parameters, loss)  # one process: as they are
        grad_norm = nn.utils.clip_grad_norm_(parameters, cfg.max_grad_norm).item()
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if finite:
            optimizer.step()
        optimizer.zero_grad()
        clock.lap("optimizer")

    terms = {"acc": acc, "fmt": fmt, "rep": rep, "beh": beh, "reward": rewards}  # each [B, M, G/2]
    group = first_group(questions[0], completions, terms | {"base": base, "advantage": advantages}, references)
    lengths = completion_mask.sum(-1)  # [B, M, G/2]
    entropy = -old_logps.sum(-1) / lengths  # [B, M, G/2], estimated: the mean of -log pi over sampled tokens
    metrics = step_means(terms | {"truncated": truncated, "length": lengths, "entropy": entropy}, letters, references)
    metrics |= {"loss": loss, "grad_norm": grad_norm, "skipped": float(not finite), "padding": padding,
                "clipped": clipped_share(new_logps, old_logps, advantages, completion_mask, cfg.eps_low, cfg.eps_high)}
    if with_kl:
        first = (x[:1] for x in (completion_ids, completion_mask, old_logps))  # [1, M, G/2, C] each
        metrics["kl"] = kl_to_base(lm, prompts[:1], *first, cfg.temperature)
    return metrics | clock.seconds, group


def judge(questions, completions, extract):
    """The letters that answers choose (None where none is found), R_acc and R_fmt of Eq. (3).
    B questions, B * n completions in the questions' order -> B * n letters, float [B, n], float [B, n].
    """
    n = len(completions) // len(questions)
    asked = [question for question in questions for _ in range(n)]  # the question of each completion
    letters = extract(asked, completions)
    acc = [letter == LETTERS[question["answer_index"]] for letter, question in zip(letters, asked)]
    fmt = [format_reward(completion) for completion in completions]
    return letters, torch.tensor(acc).float().view(-1, n), torch.tensor(fmt).view(-1, n)


def layer_weights(layers, L):
    """Weights [L] of Eq. (5), summing to 1: `all`, or a range from 1 on such as 11-20. Raises UserError for another."""
    match = re.fullmatch(r"(\d+)-(\d+)", f"1-{L}" if layers == "all" else layers)
    if not match or not 1 <= int(match[1]) <= int(match[2]) <= L:
        raise UserError(f"--layers {layers}: give `all` or a range within 1-{L}, such as 1-{L}")
    chosen = torch.zeros(L)  # [L]
    chosen[int(match[1]) - 1 : int(match[2])] = 1
    return chosen / chosen.sum()


def micro_batches(prompts, completion_mask, budget):
    """Group a step's questions into forward passes of at most `budget` tokens, padding included.
    prompts: B lists of M prompts [P, H], completion_mask [B, M, G/2, C] -> lists of question indices, and the ratio of
    computed to needed tokens. A question is one row and never split, because Eq. (5) compares its answers and Eq. (7)
    takes their mean; one longer than the budget goes alone. Sorted by length: similar lengths share a pass.
    """
    tokens = [sum(map(len, question)) + n for question, n in zip(prompts, completion_mask.sum((1, 2, 3)).tolist())]
    batches = []
    for q in sorted(range(len(tokens)), key=tokens.__getitem__, reverse=True):
        if not batches or (len(batches[-1]) + 1) * tokens[batches[-1][0]] > budget:
            batches.append([])
        batches[-1].append(q)
    return batches, sum(len(batch) * tokens[batch[0]] for batch in batches) / sum(tokens)


# ==== 4. SpeechLM: encoder -> projector -> LLM ========================================================================
class SpeechLM:
    """A speech LLM that embeds prompts, samples answers and scores them, in the same way for every model family."""

    def __init__(self, family, model, tokenizer, feature_extractor):
        self.family, self.tokenizer, self.feature_extractor = family, tokenizer, feature_extractor
        self.model = model.eval().requires_grad_(False)  # all is frozen; LoRA adds what is trained
        self.decoder, self.embed_tokens = model.get_decoder(), model.get_input_embeddings()
        self.device = model.device
        self.eos_ids = torch.tensor(tokenizer.convert_tokens_to_ids(list(family.end_of_turn)), device=self.device)
        self.pad_id = self.eos_ids[-1].item()  # padding after an answer; the mask leaves it out
        self.placeholder_ids = torch.tensor(family.placeholders(model.config), device=self.device)

    @classmethod
    def from_pretrained(cls, path):
        """A model directory or hub name -> SpeechLM. Raises UserError if a part is missing or broken."""
        family, _ = family_of(path)
        revision = revision_of(path)
        # AutoTokenizer would build the class that tokenizer_config.json names and ignore half of tokenizer.json.
        tokenizer = open_pretrained(PreTrainedTokenizerFast.from_pretrained, path, revision=revision)
        feature_extractor = open_pretrained(family.feature_extractor_class.from_pretrained, path, revision=revision)
        model = open_pretrained(family.load, path, revision=revision, dtype=DTYPE, attn_implementation="folded")
        return cls(family, to_device(model, family), tokenizer, feature_extractor)

    @torch.no_grad()
    def embed(self, questions):
        """The prompts of B questions, spoken and written: B lists of M prompts [P, H], each of its own length."""
        return [[self.prompt(spoken), self.prompt(self.embed_text(written_question(question)))]
                for question, spoken in zip(questions, self.spoken_turns(questions))]

    def prompt(self, user_turn):
        """User turn [tokens, H] -> [P, H], with the family's template around it."""
        return torch.cat([self.embed_text(self.family.before_user, special=True), user_turn,
                          self.embed_text(self.family.after_user, special=True)])

    def spoken_turns(self, questions):
        """The user turns of spoken questions, clips alone: list of [tokens, H]. Encoder and projector run only here."""
        clips = [read_clip(question["audio"]["bytes"], question["key"]) for question in questions]  # B of [samples]
        features = [self.family.features(self.feature_extractor, clip) for clip in clips]
        before = self.embed_text(self.family.before_audio, special=True)  # [tokens, H]
        after = self.embed_text(self.family.after_audio, special=True)  # [tokens, H]
        return [torch.cat([before, clip, after]) for clip in self.family.encode(self.model, features)]

    def embed_text(self, text, special=False):
        """Text -> [tokens, H]. Control tokens are parsed only with `special`; in a question they are ordinary text."""
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=not special).input_ids
        return self.embed_tokens(torch.tensor(ids, dtype=torch.long, device=self.device))

    def logits(self, hidden, temperature):
        """Last hidden states [N, H] -> logits [N, V], divided by temperature: the distribution of the roll-out."""
        logits = self.model.lm_head(hidden).float()
        logits[:, self.placeholder_ids] = -torch.inf  # a sampled <|AUDIO|> would stand for a clip
        return logits / (temperature or 1.0)  # temperature 0 is greedy: the argmax needs no scaling

    def run_decoder(self, embeds, mask, position_ids, **options):
        """The LLM on embeddings [N, T, H]; mask: of padding [N, T], or [N, 1, queries, keys] with all cached keys."""
        return self.decoder(inputs_embeds=embeds, attention_mask=mask, position_ids=position_ids,
                            use_cache="past_key_values" in options, **options)

    @torch.no_grad()
    def rollout(self, prompts, samples, max_new_tokens, temperature, generator=None):
        """Sample completions of each prompt, greedily if `temperature` is 0. prompts: B lists of M prompts [P, H].
        Returns completion_ids and completion_mask [B, M, samples, C] and truncated [B, M, samples]. The mask runs
        through the first end-of-turn, inclusive, so that ending a turn is learnt too. All samples of a prompt share one
        row, and its cache: each step adds one token per sample. The row is removed once every sample has ended.
        LoRA is not merged into W for it: in bfloat16 that is another policy (README, "Speed").
        """
        embeds, prompt_mask = pad_left([prompt for question in prompts for prompt in question])  # [N, P, H], [N, P]
        cache = Cache(layer_class_to_replicate=RoomyLayer)
        output = self.run_decoder(embeds, prompt_mask, positions(prompt_mask), past_key_values=cache)
        hidden = output.last_hidden_state[:, -1:].expand(-1, samples, -1)  # [N, P, H] -> [N, samples, H]
        ids = torch.full((len(embeds), samples, max_new_tokens), self.pad_id, device=self.device)  # [N, samples, C]
        mask = torch.zeros_like(ids)  # [N, samples, C]
        finished = torch.zeros_like(ids[..., 0], dtype=torch.bool)  # [N, samples]
        row = torch.arange(len(embeds), device=self.device)  # [n], the rows still in the batch
        sees = prompt_mask.bool()[:, None].expand(-1, samples, -1)  # [n, samples, P and the tokens since]
        itself = torch.eye(samples, dtype=torch.bool, device=self.device)  # no sample sees a sibling
        for t in range(max_new_tokens):
            logits = self.logits(hidden.flatten(0, 1), temperature)  # [n * samples, V]
            token = torch.multinomial(logits.softmax(-1), 1, generator=generator) if temperature else logits.argmax(-1)
            token = token.view(-1, samples).masked_fill(finished[row], self.pad_id)  # [n, samples]
            ids[row, :, t], mask[row, :, t] = token, (~finished[row]).long()
            finished[row] |= torch.isin(token, self.eos_ids)
            unfinished = ~finished[row].all(-1)  # [n]
            if not unfinished.any():
                break
            if not unfinished.all():
                row, sees = row[unfinished], sees[unfinished]
                cache.batch_select_indices(unfinished)
            sees = torch.cat([sees, itself.expand(len(row), -1, -1)], dim=-1)  # [n, samples, P + (t + 1) * samples]
            position_ids = (prompt_mask[row].sum(-1, keepdim=True) + t).expand(-1, samples)  # [n, samples]
            embeds = self.embed_tokens(ids[row, :, t])  # [n, samples, H]
            hidden = self.run_decoder(embeds, sees[:, None], position_ids, past_key_values=cache).last_hidden_state
        return [x.unflatten(0, (len(prompts), -1)) for x in (ids[..., : t + 1], mask[..., : t + 1], ~finished)]

    def forward(self, prompts, completion_ids, completion_mask, temperature, pool=True):
        """Log-probs and pooled hidden states of given completions in one pass; a question is one row, see paired_rows.
        prompts: b lists of M prompts [P, H], completion_ids and completion_mask [b, M, G/2, C] -> per_token_logps
        [b, M, G/2, C] with gradient, and Eq. (4) of every layer [b, M, G/2, L, H], detached (None without `pool`).
        """
        answered = completion_mask.bool()  # [b, M, G/2, C]
        lengths = [[len(prompt) for prompt in question] for question in prompts]  # [b, M]
        attention_mask, position_ids, previous = paired_rows(torch.tensor(lengths, device=self.device), answered)
        answers = self.embed_tokens(completion_ids)  # [b, M, G/2, C, H]
        rows = [torch.cat([part for m, prompt in enumerate(question)  # a prompt, its answers, the next prompt, ...
                           for part in (prompt, answers[q, m][answered[q, m]])]) for q, question in enumerate(prompts)]
        embeds = nn.utils.rnn.pad_sequence(rows, batch_first=True)  # [b, T, H], padded on the right
        output = self.run_decoder(embeds, attention_mask, position_ids, output_hidden_states=pool)
        is_answer = previous >= 0  # [b, T]
        # The state before each token of an answer predicts it.
        predicts = output.last_hidden_state[is_answer.nonzero()[:, 0], previous[is_answer]]  # [n, H], n answer tokens
        # Logits of 1,024 tokens at a time, recomputed in backward: those of all tokens are never in memory together.
        logps = [recompute(self._token_logps, h, tokens, temperature, use_reentrant=False)
                 for h, tokens in zip(predicts.split(1024), completion_ids[answered].split(1024))]
        per_token_logps = predicts.new_zeros(answered.shape, dtype=torch.float32)  # [b, M, G/2, C], 0 at padding
        per_token_logps[answered] = torch.cat(logps)
        if not pool:
            return per_token_logps, None

        def pooled(layer):  # [b, T, H] -> Eq. (4), [b, M, G/2, H]
            states = layer.new_zeros(*answered.shape, layer.shape[-1])  # [b, M, G/2, C, H]
            states[answered] = layer[is_answer]
            return pool_hidden_states(states, completion_mask)

        # Entry 0 is the embedding; the last layer's comes after the final norm.
        return per_token_logps, torch.stack([pooled(x.detach()) for x in output.hidden_states[1:]], dim=-2).float()

    def _token_logps(self, hidden, ids, temperature):
        return self.logits(hidden, temperature).log_softmax(-1).gather(-1, ids[:, None])[:, 0]  # [N]

    def recompute_layers(self):
        """Gradient checkpointing: keep only each layer's input, and run the layer once more in backward."""
        def forward(once, *args, **kwargs):
            if not torch.is_grad_enabled():  # in roll-out and evaluation there is nothing to keep
                return once(*args, **kwargs)
            return recompute(once, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

        for layer in self.decoder.layers:
            layer.forward = partial(forward, layer.forward)

    def detokenize(self, completion_ids, completion_mask):
        """Completions [..., C] -> list of strings in row order, without the end of turn."""
        rows = zip(completion_ids.flatten(0, -2).tolist(), completion_mask.flatten(0, -2).sum(-1).tolist())
        return self.tokenizer.batch_decode([ids[:n] for ids, n in rows], skip_special_tokens=True)


def pad_left(rows):
    """N sequences [P, H] of any lengths -> embeddings [N, P, H] and mask [N, P], padded on the left."""
    masks = [torch.ones(len(row), dtype=torch.long, device=row.device) for row in rows]
    return [nn.utils.rnn.pad_sequence(x, batch_first=True, padding_side="left") for x in (rows, masks)]


def positions(mask):
    """Mask [N, P] -> position ids [N, P]: a row padded on the left starts at 0 like any other."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def paired_rows(prompt_lengths, answered):
    """Each question as one row: spoken prompt, its answers, written prompt, its answers, end to end.
    prompt_lengths [b, M], answered: bool [b, M, G/2, C] -> who sees whom, bool [b, 1, T, T] (query x key), position ids
    [b, T], and for each token of an answer the index of the one that predicts it, -1 elsewhere [b, T]. A token sees
    itself and what stands before it in its part and in the prompt of its part. With prompts s of 2 tokens and t of 1,
    one answer to each, a of 2 tokens and b of 1, and one token of padding:

        query  key: s s a a t b -   part  position  previous
        s           1 . . . . . .   0     0         -1
        s           1 1 . . . . .   0     1         -1
        a           1 1 1 . . . .   1     2          1
        a           1 1 1 1 . . .   1     3          2
        t           . . . . 1 . .   2     0         -1
        b           . . . . 1 1 .   3     1          4
        -           . . . . . . 1   4     0         -1
    """
    b, M, samples, _ = answered.shape
    sizes = torch.cat([prompt_lengths[..., None], answered.sum(-1)], dim=-1).flatten(1)  # [b, K]: K = M * (1 + G/2)
    ends = sizes.cumsum(-1)  # [b, K]
    starts = F.pad(ends, (1, 1))  # [b, K + 2]: where each part begins; part K is the padding, the last 0 is never used
    index = torch.arange(ends.max(), device=answered.device).repeat(b, 1)  # [b, T]
    part = torch.searchsorted(ends, index, right=True)  # [b, T]
    prompt = part // (1 + samples) * (1 + samples)  # [b, T], the prompt that a token's part belongs to, or is
    begin, first, answers = (starts.gather(1, x) for x in (part, prompt, prompt + 1))  # [b, T]
    is_answer = part != prompt  # [b, T]
    position_ids = index - begin + is_answer * (answers - first)  # [b, T]
    previous = torch.where(index == begin, answers, index) - 1  # [b, T]; a first token follows the prompt's last
    own = (part[:, :, None] == part[:, None]) | (prompt[:, :, None] == part[:, None])  # [b, T, T]
    return own.tril()[:, None], position_ids, previous.masked_fill(~is_answer, -1)


# ==== 5. LoRA, on every linear layer of the LLM and nowhere else ======================================================
class LoRALinear(nn.Module):
    """y = W x + (alpha / r) B A x. W is frozen, A [r, in] starts random, B [out, r] at zero: at first y = W x."""

    enabled = True

    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.linear, self.scale = linear, alpha / rank
        self.lora_A = nn.Parameter(torch.empty(rank, linear.in_features, device=linear.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank, device=linear.weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)

    def forward(self, x):
        """x [..., in] -> [..., out]."""
        if not LoRALinear.enabled:
            return self.linear(x)
        delta = F.linear(F.linear(x.to(self.lora_A.dtype), self.lora_A), self.scale * self.lora_B)
        return self.linear(x) + delta.to(x.dtype)  # A and B are float32 also beside bfloat16 weights


@contextmanager
def without_lora():
    """Within this context every LoRALinear is its frozen layer: the base model, without loading it twice."""
    LoRALinear.enabled = False
    try:
        yield
    finally:
        LoRALinear.enabled = True


def attach_lora(lm, rank, alpha):
    """Wrap every linear layer of the LLM. Returns the trainable parameters.
    Only under `layers`: Phi's decoder also holds the audio encoder, and Qwen's audio encoder has a q_proj too.
    """
    for parent in list(lm.decoder.layers.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear):
                setattr(parent, name, LoRALinear(child, rank, alpha))
    return [p for p in lm.model.parameters() if p.requires_grad]


# ==== 6. Evaluate and train ===========================================================================================
def question_batches(questions, size, desc, start=0):
    """Lists of `size` questions from question `start` on, under a progress bar called `desc`."""
    for first in tqdm(range(start, len(questions), size), desc=desc, unit="batch", leave=False, disable=RANK > 0):
        yield [questions[i] for i in range(first, min(first + size, len(questions)))]


def answer_greedily(lm, questions, extract, cfg, start=0):
    """Yield batches of records, one a question and modality; an answer without one letter is None and wrong."""
    for batch in question_batches(questions, cfg.eval_batch, "evaluate", start):
        ids, mask, _ = lm.rollout(lm.embed(batch), 1, cfg.max_new_tokens, temperature=0)  # [b, M, 1, C]
        completions = lm.detokenize(ids, mask)  # b * M strings
        letters, acc, _ = judge(batch, completions, extract)
        rows = [(question["key"], modality) for question in batch for modality in MODALITIES]
        yield [{"key": key, "modality": modality, "completion": text, "answer": letter, "right": right == 1}
               for (key, modality), text, letter, right in zip(rows, completions, letters, acc.flatten().tolist())]


def evaluate(lm, questions, extract, cfg):
    """Accuracy of greedy answers to every question, spoken and written: {"speech": 0 to 1, "text": 0 to 1}."""
    mine = questions.select(by_length(questions)[RANK::RANKS])
    records = [record for batch in answer_greedily(lm, mine, extract, cfg) for record in batch]
    right = torch.tensor([sum(r["right"] for r in records if r["modality"] == m) for m in MODALITIES], device=lm.device)
    return {m: count / len(questions) for m, count in zip(MODALITIES, sum_over_ranks(right).tolist())}


def learning_rate(step, steps, cfg):
    """Linear warm-up over the first `warmup` share of steps, then linear decay to zero. Steps count from 0."""
    warmup = max(1, round(cfg.warmup * steps))
    return cfg.lr * min((step + 1) / warmup, (steps - step) / max(1, steps - warmup + 1))


def data_order(count, size, seed):
    """Yield the question indices of each step, `size` of `count`. Each epoch is a new seeded permutation."""
    generator, order = torch.Generator().manual_seed(seed), []
    while True:
        while len(order) < size:
            order += torch.randperm(count, generator=generator).tolist()
        yield order[:size]
        order = order[size:]


def make_trainable(lm, cfg):
    """Attach LoRA to a base model. Returns the optimizer of what is trained, and a generator for the roll-outs."""
    torch.manual_seed(cfg.seed)
    trained = attach_lora(lm, cfg.lora_rank, cfg.lora_alpha)
    if cfg.gradient_checkpointing:
        lm.recompute_layers()
    sizes = [sum(p.numel() for p in some) for some in (lm.model.parameters(), trained)]
    print("{:,} parameters, {:,} of them trained".format(*sizes))
    optimizer = torch.optim.AdamW(trained, lr=cfg.lr, weight_decay=cfg.weight_decay)
    return optimizer, torch.Generator(lm.device).manual_seed(cfg.seed + 1_000_003 * RANK)


def train(lm, questions, eval_questions, embedder, extract, optimizer, generator, step, state, cfg):
    """Train from `step` on, and write adapter and logs to cfg.out. Returns the last evaluation.
    state: what the last checkpoint holds beside tensors, or what a new run begins with.
    """
    out, count, B = Path(cfg.out), len(questions), cfg.questions_per_step
    steps = cfg.steps or max(1, cfg.epochs * count // B)
    order = islice(data_order(count, B, cfg.seed), step, None)
    log, samples = (open_log(out / name, state["sizes"].get(name, 0)) for name in ("log.jsonl", "samples.jsonl"))
    metrics, changed, signals, saved, skipped = state["metrics"], state["changed"], [], -math.inf, 0
    bar = tqdm(desc="TARS", unit="step", initial=step, total=steps, disable=RANK > 0)
    while True:
        # What follows a step, and precedes the first: checkpoint, evaluation, log. A resumed run begins here.
        evaluates = step == steps or (step and cfg.eval_every and step % cfg.eval_every == 0)
        stop = metrics.pop("stop", 0) > 0
        if stop or evaluates or time.perf_counter() - saved >= cfg.save_every:
            save_checkpoint(optimizer, step, state | {"metrics": metrics}, (log, samples), cfg)
            saved = time.perf_counter()
        if evaluates and not stop:
            on_signals(signal.default_int_handler)  # the checkpoint is there: an evaluation may end at once
            accuracy = evaluate(lm, eval_questions, extract, cfg)
            metrics |= {f"eval_{m}": accuracy[m] for m in MODALITIES}
        if step:
            write_line(log, metrics)
        if stop:
            raise KeyboardInterrupt(f"stopped after step {step} of {steps}")
        skipped = skipped + 1 if metrics.get("skipped") else 0
        if skipped == 10:
            raise UserError("ten steps in a row without a finite loss and gradient, none of which was applied: look at "
                            f"loss, grad_norm and rep_speech in {out}/log.jsonl, and lower --lr")
        if step == steps:
            break
        step += 1
        if not signals:
            on_signals(partial(note_signal, signals))
        start = time.perf_counter()
        batch = [questions[i] for i in next(order)[RANK::RANKS]]
        optimizer.param_groups[0]["lr"] = lr = learning_rate(step - 1, steps, cfg)
        # A seed for each step and process: a resumed run draws what it would have drawn.
        generator.manual_seed(int(np.random.SeedSequence((cfg.seed, step, RANK)).generate_state(1)[0]))
        sampled = cfg.sample_every and (step - 1) % cfg.sample_every == 0
        metrics, group = train_step(lm, batch, embedder, extract, optimizer, cfg, generator, sampled)
        seconds = time.perf_counter() - start
        metrics |= {"seconds": seconds, "tokens_per_second": metrics["tokens"] / seconds, "lr": lr,
                    "peak_gib": peak_memory(lm.device), "stop": len(signals)}
        metrics, changed = {"step": step} | mean_over_ranks(metrics) | changed, {}
        show_step(bar, metrics)
        if sampled:
            write_line(samples, {"step": step, **group})
            tqdm.write(show_group(step, group))
    if RANK == 0:
        save_adapter(lm, out, cfg)
    return accuracy


# ======================================================================================================================
# The paper ends here. What follows is what a run needs.
# ======================================================================================================================


# ==== 7. Questions ====================================================================================================
class UserError(Exception):
    """Something the user can mend. run() prints it as one line and exits with code 2."""


SAMPLE_RATE = 16_000
FEATURES = datasets.Features({  # the columns that are read here
    "key": datasets.Value("string"), "question": datasets.Value("string"),
    "options": datasets.List(datasets.Value("string")), "answer_index": datasets.Value("int64"),
    "prompt_for_tts": datasets.Value("string"), "audio": datasets.Audio(decode=False),
})
SYSTEM_PROMPT = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant "
    "first thinks about the reasoning process in the mind and then provides the user with the answer. The reasoning "
    "process and answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e., "
    "<think>[THINKING PROCESS]</think><answer>The answer is [CHOICE].</answer>"
)


def load_questions(path):
    """The `datasets` directory that data_prep.py wrote, audio left as encoded bytes. Raises UserError if it is none."""
    try:
        questions = datasets.load_from_disk(path)
        if "audio" in questions.column_names:  # encoded bytes: decoding in `datasets` would need FFmpeg
            questions = questions.cast_column("audio", datasets.Audio(decode=False))
    except Exception as error:  # `datasets` raises whatever a torn or empty folder leads to
        raise UserError(f"{path} is no data set directory, or an empty one: write one with data_prep.py") from error
    if not len(questions):
        raise UserError(f"{path} is an empty data set: write one with data_prep.py")
    if isinstance(questions, dict):
        raise UserError(f"{path} holds several data sets: give one of its parts, {', '.join(questions)}")
    types = {column.name: column.type for column in questions.data.schema}
    if wrong := [column.name for column in FEATURES.arrow_schema if types.get(column.name) != column.type]:
        raise UserError(f"{path} lacks the column(s) {', '.join(wrong)}, or has them in another type: write it anew "
                        "with data_prep.py")
    columns = ("key", "question", "options", "answer_index")
    for size, key, question, options, answer_index in zip(clip_sizes(questions), *(questions[c] for c in columns)):
        wrong = ("no four options" if len(options or []) != 4 or any(map(is_blank, options)) else
                 "no question" if is_blank(question) else "no clip" if not size else
                 f"the answer_index {answer_index}, not 0 to 3" if answer_index not in range(4) else None)
        if wrong:
            raise UserError(f"{path}: {key} has {wrong}: leave it out, as data_prep.py does")
    return questions


def is_blank(text):
    """Whether a person sees nothing in a text: None, or spaces, control and zero-width characters alone."""
    return all(unicodedata.category(c)[0] in "CZ" for c in text or "")


def by_length(questions):
    """Indices of questions, the shortest clip first: a batch of similar lengths has little padding."""
    sizes = clip_sizes(questions)
    return sorted(range(len(sizes)), key=sizes.__getitem__)


def clip_sizes(questions):
    """Bytes of each clip, None where there is none. No clip is read for it."""
    return compute.binary_length(compute.struct_field(questions.data["audio"], "bytes")).to_pylist()


def check_room(lm, questions, max_new_tokens):
    """Raise UserError unless the longest text, the longest clip and an answer fit the positions of the model."""
    texts = [len(written_question(question)) for question in questions.remove_columns("audio")]
    for lengths in (texts, clip_sizes(questions)):
        question = questions[lengths.index(max(lengths))]
        tokens, positions = max(map(len, lm.embed([question])[0])), lm.decoder.config.max_position_embeddings
        if tokens + max_new_tokens > positions:
            raise UserError(f"{question['key']} takes {tokens} tokens: with --max-new-tokens {max_new_tokens} that is "
                            f"more than the model's {positions} positions")


def written_question(question):
    """The user turn of a written question. That of a spoken question is the clip alone."""
    options = "\n".join(f"Option {letter}: {option}" for letter, option in zip(LETTERS, question["options"]))
    return f"{question['question']}\n\n{options}"


class ClipError(UserError):
    """A clip that cannot be used. data_prep.py counts left-out rows by `reason`."""

    def __init__(self, key, reason, advice=""):
        super().__init__(f"{key} has {reason}{advice}")
        self.reason = reason


def check_length(seconds, key):
    """Raise ClipError for a clip that the encoders cannot take."""
    if not 0.1 <= seconds <= 300:
        limit = "shorter than 0.1" if seconds < 0.1 else "longer than 300"
        raise ClipError(key, f"a clip {limit} s", f" ({seconds:.2f} s)")


def read_clip(data, key="clip"):
    """16-bit mono WAV bytes at 16 kHz, as data_prep.py writes them -> float32 waveform [T] in -1..1.
    Raises ClipError for other bytes, and for less than 0.1 s or more than 300 s, the encoders' limit.
    """
    try:
        with wave.open(io.BytesIO(data)) as clip:
            rate, width, channels = clip.getframerate(), clip.getsampwidth(), clip.getnchannels()
            samples = np.frombuffer(clip.readframes(clip.getnframes()), "<i2")
    except (wave.Error, EOFError, ValueError) as error:
        raise ClipError(key, "an unreadable clip", f" ({error}): convert it with data_prep.py") from error
    if (rate, width, channels) != (SAMPLE_RATE, 2, 1):
        raise ClipError(key, "a clip that is no 16-bit mono WAV at 16 kHz", ": convert it with data_prep.py")
    check_length(len(samples) / rate, key)
    return torch.from_numpy(samples.astype(np.float32) / 2**15)


# ==== 8. Model families ===============================================================================================
def open_pretrained(load, path, **options):
    """load(path), from a directory or the hub. Raises UserError with one line, whatever a library raises."""
    try:
        return load(path, **options)
    except UserError:
        raise
    except Exception as error:
        reason = (str(error) or repr(error)).splitlines()[0]
        raise UserError(f"{path} is no usable model, here or on the hub: {reason}") from error


def parse_json(text, place, *keys):
    """The JSON object in a text from `place`, which the UserError names if there is none, or one without these keys."""
    try:
        content = json.loads(text)
        if isinstance(content, dict) and content.keys() >= set(keys):
            return content
    except (ValueError, RecursionError):
        pass
    raise UserError(f"{place} is broken: no JSON object{' with ' if keys else ''}{', '.join(keys)}")


def load_tensors(path, expected=None, name_of=str):
    """Tensors {name: tensor} and notes {name: string} of a safetensors file. Raises UserError if it is torn, if a value
    is not finite, or if its tensors are not those of `expected`, {name: shape}; name_of maps its names to those there.
    """
    try:
        with safe_open(path, "pt") as file:
            tensors, notes = {name_of(name): file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is broken: {error}") from error
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    expected = shapes if expected is None else expected
    wrong = {name for name, _ in shapes.items() ^ expected.items()}
    if wrong := sorted(wrong | {name for name, tensor in tensors.items() if not tensor.isfinite().all()}):
        raise UserError(f"{path} does not fit: {len(wrong)} tensors, such as {wrong[0]}, are missing, unknown, of "
                        "another shape or not finite")
    return tensors, notes


def fingerprint(path):
    """What tells the files of a model, an adapter or a data set from others: a checksum of names, sizes, first and last
    MiB of each; on the hub the commit. Nothing is loaded for it.
    """
    if not Path(path).is_dir():
        return Path(open_pretrained(cached_file, path, filename="config.json", revision=revision_of(path))).parent.name
    total = 0
    for pattern in ("config.json", "tokenizer.json", "state.json", "*.safetensors", "*.arrow"):
        for file in sorted(Path(path).glob(pattern)):
            with open(file, "rb") as content:
                head, size = content.read(2**20), file.stat().st_size
                content.seek(max(0, size - 2**20))
                total = zlib.crc32(f"{file.name} {size}".encode() + head + content.read(), total)
    return total


def model_type_of(path, known):
    """The model_type in a model's config.json. Raises UserError if it is not among the known ones."""
    settings = open_pretrained(PretrainedConfig.get_config_dict, path)[0]
    model_type = settings.get("model_type") if isinstance(settings, dict) else None
    if model_type not in known:
        raise UserError(f"{path} is no usable model: it is of the family {model_type}; known are {', '.join(known)}")
    return model_type


def load_model(kind, path, device="cpu", dtype=None, model_types=None, **options):
    """A model of transformers' class `kind`, in bfloat16 or, on the CPU, float32 if no dtype is given. Raises UserError
    unless every tensor is there, of its shape and finite: transformers would fill in random numbers and only warn.
    """
    model_type_of(path, model_types or [kind.config_class.model_type])
    dtype = dtype or (torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16)
    model, found = open_pretrained(kind.from_pretrained, path, dtype=dtype, output_loading_info=True,
                                   ignore_mismatched_sizes=True, **options)
    wrong = {*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])}
    # Unused tensors of another part, such as the talker, are fine. A layer more means that config.json is another's.
    own = {re.sub(r"\.\d+\.", ".0.", name) for name in model.state_dict()}
    wrong |= {name for name in found["unexpected_keys"] if re.sub(r"\.\d+\.", ".0.", name) in own}
    wrong = sorted(wrong or {name for name, p in model.named_parameters() if not p.isfinite().all()})
    if wrong:
        raise UserError(f"{path} is no whole {kind.__name__}: missing, left over, of another shape or not finite are "
                        f"{len(wrong)} tensors, such as {', '.join(wrong[:3])}")
    return model.to(device).eval()


class Qwen25Omni:
    """Qwen2.5-Omni. A new family needs such a class, listed in FAMILIES below:

    repository, revision      place on the hub, and the branch to load of that place alone
    model_types               names in config.json
    model_class               with get_decoder(), which has `layers`, get_input_embeddings() and lm_head
    feature_extractor_class   transformers' class that `features` calls
    vision_part               module that stays on the CPU, since no question has a picture
    before_..., after_...     template around the user turn and around a clip
    end_of_turn               tokens that end an answer; the last one also pads
    load                      from a path to the model, on the CPU
    placeholders              ids that stand for audio or pictures in a prompt, never to be sampled
    features                  from a waveform to what the encoder takes
    encode                    from features of clips to the projector's output
    """

    repository, revision = "Qwen/Qwen2.5-Omni-7B", "main"
    model_types = ("qwen2_5_omni", "qwen2_5_omni_thinker")
    model_class = Qwen2_5OmniThinkerForConditionalGeneration
    feature_extractor_class = WhisperFeatureExtractor
    vision_part = "visual"
    before_user = f"<|im_start|>system\n{SYSTEM_PROMPT}<|im_end|>\n<|im_start|>user\n"
    after_user = "<|im_end|>\n<|im_start|>assistant\n"
    before_audio, after_audio = "<|audio_bos|>", "<|audio_eos|>"
    end_of_turn = ("<|im_end|>", "<|endoftext|>")
    load = staticmethod(partial(load_model, model_class, model_types=model_types))  # of a full checkpoint the thinker

    @staticmethod
    def placeholders(config):
        """Ids that stand for a clip, an image or a video in a prompt."""
        return [config.audio_token_id, config.image_token_id, config.video_token_id]

    @staticmethod
    def features(feature_extractor, waveform):
        """One clip [T] -> mel spectrogram [frames, 128]. One at a time: no padding can leak into a clip."""
        return feature_extractor(waveform.numpy(), sampling_rate=SAMPLE_RATE, padding="longest",
                                 return_tensors="pt").input_features[0].T

    @staticmethod
    def encode(model, mels):
        """Spectrograms of clips -> list of audio embeddings [25 per second, H]. The encoder packs clips end to end."""
        frames = torch.tensor([len(mel) for mel in mels])
        mel = nn.utils.rnn.pad_sequence(mels, batch_first=True).transpose(1, 2)  # [clips, 128, frames]
        mask = (torch.arange(mel.shape[2]) < frames[:, None]).long()  # [clips, frames]
        output = model.get_audio_features(mel.to(model.device, model.dtype), mask.to(model.device), return_dict=True)
        tokens = ((frames - 1) // 2 - 1) // 2 + 1  # a convolution of stride 2, then the mean of two
        return output.last_hidden_state.split(tokens.tolist())


class Phi4Multimodal:
    """Phi-4-multimodal. The hub's main branch is remote code; transformers' own class loads refs/pr/70."""

    repository, revision = "microsoft/Phi-4-multimodal-instruct", "refs/pr/70"
    model_types = ("phi4_multimodal", "phi4mm")  # the latter on the main branch
    model_class = Phi4MultimodalForCausalLM
    feature_extractor_class = Phi4MultimodalFeatureExtractor
    vision_part = "image_embed"
    before_user, after_user = f"<|system|>{SYSTEM_PROMPT}<|end|><|user|>", "<|end|><|assistant|>"
    before_audio = after_audio = ""
    end_of_turn = ("<|end|>", "<|endoftext|>")

    @staticmethod
    def load(path, revision, **options):
        """The model with its speech-lora merged: W += (alpha / r) B A. Unmerged, it understands speech badly."""
        fetch = partial(cached_file, path, revision=revision)
        file = fetch("speech-lora/adapter_config.json")
        settings = parse_json(Path(file).read_text(), file, "r", "lora_alpha")
        tensors, _ = load_tensors(fetch("speech-lora/adapter_model.safetensors"))
        options |= {"revision": revision, "model_types": Phi4Multimodal.model_types}
        model = load_model(Phi4Multimodal.model_class, path, **options)
        for name in [name for name in tensors if name.endswith(".lora_A.weight")]:
            layer = model.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
            A, B = tensors[name].float(), tensors[name.replace("lora_A", "lora_B")].float()  # [r, in], [out, r]
            layer.weight.data.copy_(layer.weight + settings["lora_alpha"] / settings["r"] * B @ A)
        return model

    @staticmethod
    def placeholders(config):
        """Ids that stand for a clip or an image in a prompt."""
        return [config.audio_config.audio_token_id, config.vision_config.image_token_id]

    @staticmethod
    def features(feature_extractor, waveform):
        """One clip [T] -> what Phi's encoder takes."""
        return feature_extractor(waveform, sampling_rate=SAMPLE_RATE, return_tensors="pt")

    @staticmethod
    def encode(model, clips):
        """Features of clips -> list of audio embeddings [12.5 per second, H]. One at a time: it would pad them."""
        audio, embeds = model.get_decoder().embed_tokens_extend.audio_embed, []
        for features in clips:
            n = int(features.audio_embed_sizes)
            # Its own forward writes the embeddings over placeholder tokens: let it write over nothing else.
            ids = torch.full((1, n), model.config.audio_config.audio_token_id, device=model.device)
            blank = torch.zeros(1, n, model.config.hidden_size, device=model.device, dtype=model.dtype)
            embeds += audio(ids, blank, features.audio_input_features, features.audio_embed_sizes)
        return embeds


FAMILIES = (Qwen25Omni, Phi4Multimodal)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float32
# cuDNN's attention, which torch prefers where there is a mask, plans anew for each shape: at each decoding step.
torch.backends.cuda.enable_cudnn_sdp(False)


def folded_attention(module, query, key, value, attention_mask, scaling=None, **options):
    """Attention of a few queries behind a long cache: query heads that share a key head become more queries of it, so
    that keys and values are read once where they lie; sdpa would copy them for each query head. query [N, heads, T, D],
    key and value [N, key heads, S, D], attention_mask [N, 1, T, S] -> [N, T, heads, D].
    """
    (_, heads, T, _), (_, key_heads, S, _) = query.shape, key.shape
    if heads == key_heads or attention_mask is None or 4 * T > S:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    shared = heads // key_heads  # query heads of a key head
    query = query.unflatten(1, (key_heads, shared)).flatten(2, 3)  # [N, key heads, shared * T, D]
    mask = attention_mask.repeat(1, 1, shared, 1)  # [N, 1, shared * T, S]
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    return output.unflatten(2, (shared, T)).flatten(1, 2).transpose(1, 2).contiguous(), None


AttentionInterface.register("folded", folded_attention)
AttentionMaskInterface.register("folded", sdpa_mask)  # a name without a mask function would drop 2-D masks


class RoomyLayer(DynamicLayer):
    """A cache layer with room for 256 more keys and values [N, key heads, S, D], copied only when that is full."""

    def update(self, key_states, value_states, *args, **kwargs):
        """Add the keys and values of new tokens. Returns all of both."""
        new, S = (key_states, value_states), self.get_seq_length()
        end = S + key_states.shape[-2]
        if not self.is_initialized or end > self.buffers[0].shape[-2]:
            old = (self.keys, self.values)
            self.buffers = [x.new_empty(*x.shape[:2], end + 256, x.shape[-1]) for x in new]
            for buffer, x in zip(self.buffers, old if self.is_initialized else ()):
                buffer[:, :, :S] = x
            self.is_initialized = True
        for buffer, x in zip(self.buffers, new):
            buffer[:, :, S:end] = x
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices):
        """Keep some rows."""
        S = self.get_seq_length()
        self.buffers = [buffer[indices] for buffer in self.buffers]
        self.keys, self.values = (buffer[:, :, :S] for buffer in self.buffers)


def revision_of(path):
    """The branch to load: a family's own belongs to its repository alone, not to copies of it."""
    return next((family.revision for family in FAMILIES if family.repository == path), "main")


def family_of(path):
    """The family of a speech LLM and its number of layers, by config.json. Raises UserError for an unknown family."""
    known = {name: family for family in FAMILIES for name in family.model_types}
    family = known[model_type_of(path, known)]
    config_class = family.model_class.config_class
    config = open_pretrained(config_class.from_pretrained, path, revision=revision_of(path))
    return family, config.get_text_config().num_hidden_layers


def to_device(model, family):
    """Move a model to the GPU if there is one, all but its vision part."""
    if DEVICE == "cuda":
        model.to(DEVICE)
        next(m for name, m in model.named_modules() if name.split(".")[-1] == family.vision_part).to("cpu")
    return model


# ==== 9. Answer extractor, Eq. (3), and sentence embedder, Eq. (6) ====================================================
MARKUP = (  # what a person overlooks, and what is read in its place
    (r"[‘’]", "'"), (r"[–—−]", "-"), (r" *([→⇒]|[=-]+>) *", ": "), ("。", ". "), (r"\\boxed", "\nanswer: "),
    (r"<([A-D])>", r"\1"), (r"</?[A-Za-z\d]+( [^<>]*)?>?|\\\W|\\[a-z]+|[*_`$\"“”„«»#{}|~✅]", " "),
    (r"(?<![A-Za-z])'|'(?![A-Za-z])", " "), (r"(?<=[A-D一-鿿])(?=[一-鿿])|(?<=[一-鿿])(?=[A-D])", " "),
    (r"[^\S\n]+", " "), (r" ([.,;:!?)])", r"\1"), (r" ?\n\s*", "\n"), (r"(:|\b(is|be|[Aa]nswer))\n", r"\1 "))
NOUN = (r"(\bans(wers?|\.)|\b(correct|right|best|final|likely|suitable|appropriate|my|chosen|closest) (option|choice|"
        r"letter|one|pick|vote|match)s?|答 案|^(option|choice|letter|selection|pick)(?=:))")
FILL = (r"( ?\b(most|likely|probably|therefore|then|thus|clearly|definitely|simply|typically|just|still|indeed|only|so|"
        r"actually|as|hence|yes|option|choice|letter|answer|the|to|be|that|follow\w+|in fact|of course)\b| ?[:,(\n-]|"
        r" 选 项|就|应 该)* ?$")
ANNOUNCED = rf"{NOUN}(?!\w)([^.\n]{{0,80}}?(\b(is|are|be|was|to)\b|'s\b|[:=是选为]))?{FILL}"
FORMS = (  # how a letter is named, the strongest form first: what stands before it, what behind it
    ("refused", r"(\b(not|never|nor|neither|wrong|worst|incorrect|except|than|instead of|unlike|without|(all|anything) "
     r"but|no longer|eliminat\w*|exclud\w*|rul\w* out|reject\w*|doubt that|whether|mistake|thought|might think|"
     r"otherwise|going to say|some|many|tempt\w*|if it|(could|may|might) (also )?be)\b|n't\b|[错误])"
     r"((?!\bbut )[^,])*$|\b(figure|point|key of|[A-D] (to|through)) $", ""),
    ("refused", "", r" (\w+ )?(is|are|can|could|must|does|would|seems|was)\b(?<!it is)([^.,;\n]{0,30}\b(not|wrong|out|"
     r"also|incorrect|false|unlikely|worst|tempting|if|possible|eliminated|excluded)\b|n't)| (also )?(might|may|could|"
     r"if)\b|.*\b(in the text|actually,? no|can('t|not) decide)\b"),
    ("concluded", rf"^(so|therefore|thus|hence|final|in conclusion|overall)\b.*{ANNOUNCED}", ""),
    ("announced", ANNOUNCED, ""),
    ("announced", "", r" ?([是为最]|(is|was|would|must|should|seems|has|it|fits|makes)\b)[^.,;\n]{0,40}?(it is|正 确|合 适|"
     r"(correct|right|best|true|answer|choice|option|appropriate|suitable|likely|sense|fits)\b)"),
    ("stated", r"(\b(is|are|be|was|to|as|with|for|choose|pick|select|say|suggests?|indicates?|guess|go|prefer|take|"
     rf"mark|leaves|therefore|thus|hence|so|then)\b|'s|[是选为:=]){FILL}|\bnot [^,.]{{1,30}},? but $", ""),
    ("alone", rf"^(\d+[.)] )?{FILL}", r"\W*$|\W*\n|,? (because|since)\b"),
    ("titled", r"\b(option|choice) $", ""))
WORD = (r" (?!(because|since|as|and|or|for|with|is|was|which|would|must|in|on|by|if|seems|fits|it|best|can|could|"
        r"should|has|are|but|makes|when|here|might|may|option|choice|also|[是最])\b)\w")  # "a dog", "C major"
LETTER = r"[(\[]*(?<![\w'.-])([A-D]|[a-d](?=[✓✗)\].:,;?]|$|\n| (is|was|would|or|and)\b))(?![\w'+]|[.-]\w)[✓✗]?[)\]]*"
JOINED = rf"{LETTER}(( ?[,/&]| or| and)+ ?((or|and|maybe|perhaps|both|option|choice|either|the) )*{LETTER})*"


def extract_answer(completion, options):
    """The letter of the option that an output chooses; None if it names none or more than one: never a guess.
    What counts stands after the thought, in <answer> blocks, which must agree, or without them anywhere; a thought
    that does not end has no answer.
    """
    answer = re.split("</think>", completion, flags=re.I)[-1]
    blocks = re.findall(r"<answer>((?:(?!</?answer).)*)(?=</answer|$)", answer, re.S | re.I) or [answer]
    letters = {chosen_letter(block, options) for block in blocks if block.strip()}
    return letters.pop() if len(letters) == 1 and "<think>" not in answer.lower() else None


def chosen_letter(text, options):
    """The letter that is named in the strongest of FORMS, else that of the option whose words are said, else None."""
    text, options = plain(text), {letter: bare(plain(option)) or "\0" for letter, option in zip(LETTERS, options)}
    listed = re.findall(r"(?:^|: )\W*([A-D])(?:[.):]| -) ", text, re.M)
    if {*listed} == {*LETTERS}:  # the options, repeated
        text = re.sub(r"(^|: )\W*[A-D]([.):]| -) .*$", "", text, count=4, flags=re.M).strip()
    elif re.match(r"\W*[A-D]([.):]| -) ", text) and len(re.findall(r"\b[A-D](?:[.):]| -) ", text)) == 1:
        text = f"answer: {text}"  # "C. Because ..."
    marked = beside_options(text, options)
    named = {form: set() for form, *_ in FORMS}
    for m in re.finditer(JOINED, marked, re.M):
        letters = {*re.findall(r"\b[A-D]\b", m[0].upper())}
        before, behind = marked[max(0, m.start() - 200) : m.start()], marked[m.end() : m.end() + 200]
        before = re.split(r"[.;!?\n](?=\s|$)", before)[-1].lstrip()  # of this sentence
        form = next((form for form, ahead, after in FORMS if re.search(ahead, before, re.I)
                     and re.match(after, behind, re.I)), "titled" if "✓" in m[0] else None)
        if not form or (re.match(WORD, behind) and not re.search(r"✓|\b(option|choice|letter) $", before + m[0])):
            continue
        if form == "refused":  # what was named before is taken back
            named = {form: others - letters for form, others in named.items()}
        elif "✗" in m[0]:  # "B, glass" where glass is D
            return None
        else:
            named[form] |= letters
    letters = next(filter(None, named.values()), None) or said_options(text, options)
    return [*letters][0] if len(letters) == 1 else None


def plain(text):
    """Text as a person reads it, without MARKUP and invisible characters."""
    text = "".join(c for c in unicodedata.normalize("NFKC", text) if unicodedata.category(c) != "Cf")
    for pattern, instead in MARKUP:
        text = re.sub(pattern, instead, text)
    return text.strip()


def bare(text):
    """Text to compare with an option: without case, article, and punctuation at its ends."""
    return re.sub(r"^(an?|the) ", "", re.sub(r"\s+", " ", text.casefold()).strip(" .,:;!?()[]'"))


def beside_options(text, options):
    """"C. a scorpion" and "a scorpion (C)" become C✓ if that is option C, and C✗ if it is another."""
    words = "|".join(rf"((an?|the) )?{re.escape(option)}" for option in sorted(options.values(), key=len, reverse=True))

    def mark(m):
        letter, option = m["l"] or m["r"], bare(m["right"] or m["left"])
        article = m["gap"] == " " and letter in "Aa"
        return m[0] if article else letter + ("✓" if option == options[letter.upper()] else "✗")

    return re.sub(
        rf"(?<![\w'.-])(?P<l>[A-D]|[a-d](?=[.):,]))(?P<gap>[\s.):,(\]=-]+)(?P<right>(?i:{words}))"
        r"(?= ?([.,;:!?)(\n\]]|$| (?i:or|and|option|because|since|as|is the)\b))|"
        rf"(?<![\w.-])(?P<left>(?i:{words}))[,:= ]*( [(\[](?i:option |choice )?|: |(?i:, (which is )?option ))"
        r"(?P<r>[A-D])\b",
        mark, text)


def said_options(text, options):
    """The letters of options whose words are the answer: the whole of it, what follows "the answer is", or, without
    such an announcement, the only option that its text names at all, in an ending that neither denies nor doubts.
    """
    says = rf"{NOUN}[^.\n]*?(\b(is|be)\b|[:是])|\b(it|that|this)('s| is| must be)\b|\b(choose|pick|select|go with)\b"
    announced = [text[m.end():].strip(" :\n") for m in re.finditer(says, text, re.I)][-1:]
    announced += [re.split(r",|;|\.(?:\s|$)|\n| because | since ", part)[0] for part in announced]
    said = {bare(part) for part in (text, *announced)}
    ending = bare(re.split(r"(?<=[.!?])\s|\n", text)[-1])
    if not announced and not re.search(r"\b(or|not|no|nor|might|if|except|than|but)\b|n't|\?", ending):
        words = "|".join(re.escape(option) for option in sorted(options.values(), key=len, reverse=True))
        named = {m[0].lower() for m in re.finditer(rf"(?<![\w.-])({words})(?!\w|[.-]\w)", text, re.I)}
        said |= {option for option in named if len(named) == 1 and option in ending}
    return [letter for letter, option in options.items() if option in said]


def extract_answers(questions, completions):
    """The default extractor, the regular expressions of extract_answer: letters, None where there is none."""
    return [extract_answer(completion, question["options"]) for question, completion in zip(questions, completions)]


class XFinder:
    """The paper's answer extractor, xFinder-qwen1505: a small LLM that says which option an output chooses."""

    prompt = (
        "<|System|>:You are a help assistant tasked with extracting the precise key answer from given output sentences."
        '\n<|User|>:Question: """{question}"""\n\nOutput sentences: """{output}"""\n\nAnswer range: {options}\n\n'
        "Key extracted answer: \n<|Bot|>:"
    )

    def __init__(self, name, device):
        self.model = load_model(Qwen2ForCausalLM, name, device)
        self.tokenizer = open_pretrained(PreTrainedTokenizerFast.from_pretrained, name, padding_side="left")

    @torch.no_grad()
    def __call__(self, questions, completions):
        """Questions and as many completions -> letters, None where the model names no option."""
        prompts = [self.prompt.format(question=q["question"], output=completion,
                                      options=json.dumps([list(pair) for pair in zip(LETTERS, q["options"])]))
                   for q, completion in zip(questions, completions)]
        inputs = self.tokenizer(prompts, padding=True, return_tensors="pt").to(self.model.device)
        output = self.model.generate(**inputs, max_new_tokens=64, do_sample=False)[:, inputs.input_ids.shape[1] :]
        said = self.tokenizer.batch_decode(output, skip_special_tokens=True)
        return [self.letter(text, q["options"]) for text, q in zip(said, questions)]

    @staticmethod
    def letter(said, options):
        """The model's output -> the one letter that it names or whose option it repeats, else None."""
        said, *plain = (text.strip().removesuffix(".").lower() for text in (said, *options))
        letters = [letter for letter, option in zip(LETTERS, plain) if said in (letter.lower(), option)]
        return letters[0] if len(letters) == 1 else None


class NGramEmbedder:
    """An offline stand-in for E: counts of hashed words and word pairs. It sees wording, not meaning."""

    def embed(self, texts):
        """Strings -> unit vectors [N, 512]."""
        vectors = []
        for text in texts:
            words = re.findall(r"\w+|[^\w\s]", text.lower())
            grams = words + [f"{a} {b}" for a, b in zip(words, words[1:])]
            hashes = torch.tensor([zlib.crc32(gram.encode()) % 512 for gram in grams], dtype=torch.long)
            vectors.append(torch.bincount(hashes, minlength=512))
        return F.normalize(torch.stack(vectors).float(), dim=-1)


class SentenceEmbedder:
    """E of the paper, Qwen3-Embedding: the last token's state, left padding, documents take no instruction."""

    def __init__(self, name, device):
        self.model = load_model(Qwen3Model, name, device)
        self.tokenizer = open_pretrained(PreTrainedTokenizerFast.from_pretrained, name, padding_side="left")
        if self.tokenizer("").input_ids != [self.tokenizer.convert_tokens_to_ids("<|endoftext|>")]:
            raise UserError(f"{name} is no Qwen3-Embedding: its tokenizer does not end a text with <|endoftext|>")

    @torch.no_grad()
    def embed(self, texts):
        """Strings -> unit vectors [N, D]."""
        inputs = self.tokenizer(texts, padding=True, truncation=True, max_length=8192, return_tensors="pt")
        hidden = self.model(**inputs.to(self.model.device), use_cache=False).last_hidden_state  # [N, T, D]
        return F.normalize(hidden[:, -1].float(), dim=-1)


def load_helper(kind, flag, name, device):
    """One of the helper models above, by name. Raises UserError, which starts with the flag, if it cannot be loaded."""
    try:
        return kind(name, device)
    except UserError as error:
        raise UserError(f"{flag} {error}") from error


def load_embedder(cfg, device):
    """E of Eq. (6), by cfg.embedder."""
    return NGramEmbedder() if cfg.embedder == "ngrams" else load_helper(
        SentenceEmbedder, "--embedder", cfg.embedder, cfg.aux_device or device)


def load_extractor(cfg, device):
    """The answer extractor, by cfg.extractor: a function (questions, completions) -> letters, None where none."""
    return extract_answers if cfg.extractor == "regex" else load_helper(
        XFinder, "--extractor", cfg.extractor, cfg.aux_device or device)


# ==== 10. Logs, adapter files and checkpoints =========================================================================
class Clock:
    """Where a step's time goes: lap(phase) adds the seconds since the last lap to the phase that just ended."""

    def __init__(self, device):
        self.device, self.seconds, self.last = device, {}, time.perf_counter()

    def lap(self, phase):
        """End a phase; `seconds` has one number for each."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        last, self.last = self.last, time.perf_counter()
        self.seconds[f"seconds_{phase}"] = self.seconds.get(f"seconds_{phase}", 0.0) + self.last - last


def step_means(terms, letters, references):
    """Means of a step for the log. terms: {name: [B, M, G/2]}, letters: as many, references [B, G/2]."""
    no_spread = terms["reward"].amax(-1) - terms["reward"].amin(-1) < 1e-6  # [B, M]
    unparsed = torch.tensor([letter is None for letter in letters]).view(terms["reward"].shape)
    means = {"no_spread": no_spread.all(-1).float().mean().item(),
             "no_reference": (references[:, 0] < 0).float().mean().item(),
             "tokens": sum_over_ranks(terms["length"].sum()).item()}
    for m, modality in enumerate(MODALITIES):
        for name, x in (terms | {"unparsed": unparsed, "no_spread": no_spread}).items():
            if m != TEXT or name not in ("rep", "beh"):  # written answers earn neither
                means[f"{name}_{modality}"] = x[:, m].float().mean().item()
    return means


def clipped_share(logps, old_logps, advantages, mask, eps_low, eps_high):
    """Share of the tokens whose ratio the loss clips, so that they are not learnt. Shapes as in grpo_loss."""
    rho, A = torch.exp(logps - old_logps), advantages[..., None]
    return ((rho.clamp(1 - eps_low, 1 + eps_high) * A < rho * A) * mask).sum().item() / mask.sum().item()


def kl_to_base(lm, prompts, ids, mask, logps, temperature):
    """KL of the policy to the base model, a mean over the tokens of sampled answers [b, M, G/2, C]: k3 = r - 1 - log r
    with r = pi_base / pi. It is never below 0, and right on average.
    """
    with torch.no_grad(), without_lora():
        base, _ = lm.forward(prompts, ids, mask, temperature, pool=False)  # [b, M, G/2, C]
    return ((torch.exp(base - logps) - 1 - (base - logps)) * mask).sum().item() / mask.sum().item()


def first_group(question, completions, terms, references):
    """The first group of a step in full, for a person. terms: {name: [B, M, G/2]}, references [B, G/2]."""
    group, samples = {key: question[key] for key in ("key", "question", "options", "answer_index")}, references.shape[1]
    for m, modality in enumerate(MODALITIES):
        group[modality] = [{"completion": completion} for completion in completions[m * samples : (m + 1) * samples]]
        for s, answer in enumerate(group[modality]):
            answer |= {name: x[0, m, s].item() for name, x in terms.items()}
            answer |= {"reference": references[0, s].item()} if m != TEXT else {}
    return group


def show_step(bar, metrics):
    """Move the progress bar on by a step, with its rewards and accuracies."""
    bar.update()
    bar.set_postfix_str(" | ".join(f"{m} R {metrics[f'reward_{m}']:.2f} acc {metrics[f'acc_{m}']:.2f}"
                                   for m in MODALITIES))


def show_group(step, group):
    """The first spoken answer of a group and its reference, each above its rewards, for the terminal."""
    spoken = group["speech"][0]
    shown = [spoken] if spoken["reference"] < 0 else [spoken, group["text"][spoken["reference"]]]
    lines = [f"step {step}, {group['key']}: {group['question']} ({LETTERS[group['answer_index']]})"]
    for modality, answer in zip(MODALITIES, shown):
        rewards = [f"{term} {answer[term]:.2f}" for term in ("acc", "fmt", "rep", "beh", "reward", "advantage")]
        lines += [f"  {modality:<8}{textwrap.shorten(answer['completion'], 400)}", " " * 10 + "  ".join(rewards)]
    return "\n".join(lines)


def peak_memory(device):
    """The most memory this process has held so far on `device`, in GiB; nan on Windows, which does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved() / 2**30
    try:
        import resource
    except ImportError:
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def check_writable(path, flag="--out"):
    """Raise UserError, which names the flag, unless a folder or the nearest above it that exists can be written."""
    above = next(place for place in (Path(path).absolute(), *Path(path).absolute().parents) if place.exists())
    if not path or not above.is_dir() or not os.access(above, os.W_OK):
        raise UserError(f"{flag} {path}: nothing can be written there")


def write_aside(path, write):
    """Write a file under another name, then rename it: `path` is never half-written, nor after a power cut."""
    aside = path.with_name(path.name + ".part")
    try:
        write(aside)
        with open(aside, "rb+") as file:
            os.fsync(file)
        os.replace(aside, path)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk without the file's name
        raise UserError(f"{path} cannot be written: {error}") from error
    finally:
        aside.unlink(missing_ok=True)


def write_json(path, content):
    """Write `content` as indented JSON, aside first."""
    write_aside(path, lambda aside: aside.write_text(json.dumps(finite(content), indent=2) + "\n"))


def finite(value):
    """The same with null in place of nan and inf, which JSON does not have; in dicts and lists too."""
    if isinstance(value, dict):
        return {name: finite(part) for name, part in value.items()}
    if isinstance(value, list):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def open_log(path, size):
    """A JSON-lines file to append to, cut back to `size` bytes: what comes later is done again."""
    file = open(os.devnull if RANK else path, "a")
    if RANK == 0:
        file.truncate(size)
    return file


def write_line(file, values):
    """Append one JSON line."""
    try:
        print(json.dumps(finite(values)), file=file, flush=True)
    except OSError as error:
        raise UserError(f"{file.name} cannot be written: {error}") from error


def save_adapter(lm, out, cfg):
    """Write adapter_model.safetensors and adapter_config.json in PEFT's format."""
    layers = {name: m for name, m in lm.model.named_modules() if isinstance(m, LoRALinear)}
    tensors = {f"base_model.model.{name}.{matrix}.weight": getattr(m, matrix).detach().contiguous().cpu()
               for name, m in layers.items() for matrix in ("lora_A", "lora_B")}
    # Also in the weights' file, so that they cannot come from another run's adapter_config.json.
    scale = {"r": cfg.lora_rank, "lora_alpha": cfg.lora_alpha}
    write_aside(out / "adapter_model.safetensors", lambda path: save_file(tensors, path, {"tars": json.dumps(scale)}))
    write_json(out / "adapter_config.json", {
        "peft_type": "LORA", "base_model_name_or_path": cfg.model, **scale,
        "lora_dropout": 0.0, "bias": "none", "inference_mode": True,
        "target_modules": list(layers),  # full names: the audio encoder has layers called q_proj too
    })


def on_signals(handler):
    """From now on Ctrl-C and SIGTERM call `handler`."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def note_signal(signals, number, frame):
    """Handler of the first signal during a step: it is only noted, in `signals`. A second one ends the run at once."""
    signals.append(number)
    on_signals(signal.SIG_DFL)
    if RANK == 0:  # by os.write: print may be what was interrupted
        os.write(2, b"\nstopping when this step is done and saved; a second signal stops at once and loses it\n")


def save_checkpoint(optimizer, step, state, logs, cfg):
    """Write trained weights, AdamW's state, `state` and sizes of logs after `step`, in rank 0; keep the last two."""
    if RANK:
        return
    tensors = {}
    for i, p in enumerate(optimizer.param_groups[0]["params"]):
        tensors |= {f"trained.{i}": p.detach()} | {f"adamw.{i}.{key}": x for key, x in optimizer.state[p].items()}
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    sizes = {Path(log.name).name: log.tell() for log in logs}
    state = state | {"sizes": sizes, "updated": any(optimizer.state.values())}
    folder = Path(cfg.out) / "checkpoints"
    folder.mkdir(exist_ok=True)
    write_aside(folder / f"step-{step:07}.safetensors",
                lambda path: save_file(tensors, path, {"tars": json.dumps(state)}))
    for old in checkpoints(cfg)[:-2]:
        old.unlink()


def checkpoints(cfg):
    """The checkpoints of cfg.out, the last one last."""
    return sorted((Path(cfg.out) / "checkpoints").glob(f"step-{'[0-9]' * 7}.safetensors"))


# May differ in a resumed run: no number depends on them beyond rounding.
FREE = {"out", "resume", "save_every", "eval_every", "sample_every", "aux_device", "tokens_per_micro_batch",
        "eval_batch", "gradient_checkpointing"}


def find_checkpoint(cfg):
    """Returns (last checkpoint, its state), or for a new run (None, the state that it begins with).
    Raises UserError where --resume does not fit: all that numbers depend on must be as it was, settings and files.
    """
    found, out = checkpoints(cfg), Path(cfg.out)
    if not found and cfg.resume == "last":
        raise UserError(f"--resume: {cfg.out} holds no checkpoint to continue from")
    if found and not cfg.resume and not (out / "summary.json").exists():
        raise UserError(f"{cfg.out} holds an unfinished run: continue with --resume, remove it, or give another --out")
    config = asdict(cfg) | {"ranks": RANKS}
    config |= {f"content of {path}": fingerprint(path) for path in (cfg.model, cfg.data, cfg.eval_data)}
    if not found or not cfg.resume:
        return None, {"before": None, "metrics": {}, "sizes": {}, "changed": {}, "config": config}
    state = parse_json(load_tensors(found[-1])[1].get("tars", ""), found[-1], "before", "metrics", "sizes", "updated",
                       "config")
    saved = asdict(Config()) | state["config"]  # a setting that is newer than the checkpoint had its default
    changed = {k: f"{saved.get(k)} -> {v}" for k, v in config.items() if saved.get(k) != v}
    free = FREE | ({"max_new_tokens"} & cfg.given)  # it moves numbers, and may differ if it is on the command line
    if other := changed.keys() - free:
        raise UserError(f"--resume: {found[-1]} was made with another {', '.join(sorted(other))}: give the same ones")
    for log in (out / name for name in state["sizes"]):
        if not log.exists() or log.stat().st_size < state["sizes"][log.name]:
            raise UserError(f"--resume: {log} is shorter than it was when {found[-1]} was written")
    changed = ", ".join(f"{k} {v}" for k, v in changed.items() if k not in ("out", "resume"))
    if changed:
        print(f"--resume with {changed}")
    return found[-1], state | {"config": config, "changed": {"resumed_with": changed} if changed else {}}


def load_checkpoint(path, optimizer, state):
    """Put weights and AdamW's state back where they were. Returns the step. Raises UserError unless all are there."""
    parameters, moments = optimizer.param_groups[0]["params"], {}
    expected = {f"trained.{i}": p.shape for i, p in enumerate(parameters)}
    if state["updated"]:
        expected |= {f"adamw.{i}.{key}": torch.Size() if key == "step" else p.shape
                     for i, p in enumerate(parameters) for key in ("step", "exp_avg", "exp_avg_sq")}
    tensors, _ = load_tensors(path, expected)
    for i, p in enumerate(parameters):
        p.data.copy_(tensors[f"trained.{i}"])
        moments[i] = {name.split(".")[2]: x for name, x in tensors.items() if name.startswith(f"adamw.{i}.")}
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(path.stem.removeprefix("step-"))


OUTPUTS = ("summary.json", "adapter_config.json", "adapter_model.safetensors", "log.jsonl", "samples.jsonl")


def check_out(out):
    """Raise UserError if a run cannot write to the folder, or must not: if it has files, but no run's config.json."""
    check_writable(out)
    try:
        parse_json((Path(out) / "config.json").read_text(errors="replace"), out, "group_size")
    except (OSError, UserError) as error:
        if Path(out).exists() and any(path.suffix != ".part" for path in Path(out).iterdir()):
            raise UserError(f"--out {out}: files are in it, but not those of a run; give a new folder") from error


# ==== 11. Several processes, started by torchrun: rank r takes questions r, r + RANKS, ... ============================
def join_processes():
    """Under torchrun, meet the other processes, each on its own GPU. Only rank 0 prints."""
    global RANK, RANKS
    try:
        RANK, RANKS, local = (int(os.environ.get(name, only)) for name, only in
                              (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
        if RANKS == 1 and RANK == 0:
            return
        if DEVICE == "cuda" and local >= (gpus := torch.cuda.device_count()):
            raise UserError(f"more processes than GPUs: start torchrun with --nproc_per_node={gpus} at most")
        if DEVICE == "cuda":
            torch.cuda.set_device(local)
        dist.init_process_group(timeout=timedelta(days=1))  # ranks wait for each other while one loads or evaluates
    except ValueError as error:
        raise UserError(f"RANK and WORLD_SIZE are set, but not by torchrun ({error}): unset them") from error
    sys.stdout = sys.stdout if RANK == 0 else open(os.devnull, "w")


def sum_over_ranks(x, operation=dist.ReduceOp.SUM):
    """A tensor -> its sum over all processes, or another reduction of it."""
    if RANKS > 1:
        dist.all_reduce(x, operation)
    return x


def sum_gradients_over_ranks(parameters, loss):
    """Sum gradients and loss over all processes, not average: the loss is already divided by the tokens of all."""
    for p in parameters:
        sum_over_ranks(p.grad)
    return sum_over_ranks(torch.tensor(loss, dtype=torch.float64, device=parameters[0].device)).item()


def mean_over_ranks(metrics):
    """Numbers of this process -> their means over all; of peak_gib the largest."""
    means = sum_over_ranks(torch.tensor(list(metrics.values()), dtype=torch.float64, device=DEVICE)) / RANKS
    peak = sum_over_ranks(torch.tensor(metrics["peak_gib"], device=DEVICE), dist.ReduceOp.MAX)
    return dict(zip(metrics, means.tolist())) | {"peak_gib": peak.item()}


# ==== 12. The command =================================================================================================
class Parser(argparse.ArgumentParser):
    """argparse whose errors are UserErrors: one line, like all others."""

    def error(self, message):
        """Raise UserError."""
        raise UserError(message.removeprefix("argument "))


def number(kind, interval):
    """argparse's type for an int or a float in an interval such as "(0, 1]"; nan and inf are in none."""
    low, high = map(float, interval[1:-1].split(","))

    def parse(text):
        value = kind(text)
        if not low <= value <= high or value == low and interval[0] == "(" or value == high and interval[-1] == ")":
            raise ValueError
        return value

    parse.__name__ = f"{kind.__name__} in {interval}"  # as argparse will call it
    return parse


def config_parser():
    """The parser of Config's fields. argparse.SUPPRESS: what is not given does not appear."""
    parser = Parser(prog="tars.py", usage="tars.py [--setting value ...]", allow_abbrev=False,
                    description="setting: meaning [default; where the paper gives it]",
                    formatter_class=partial(argparse.HelpFormatter, max_help_position=28, width=120))
    for f in fields(Config):
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"metavar": ""}
        kind |= {"type": number(f.type, f.metadata["within"])} if f.metadata["within"] else {}
        parser.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS, **kind | f.metadata["flag"])
    return parser


def parse_config(arguments, build_demo):
    """Command line -> Config. `build_demo(path)` is called if the default model is asked for and does not exist."""
    parser = config_parser()
    given, own = vars(parser.parse_args(arguments)), {}
    model = Path(given.get("model", Config.model))
    if str(model) == Config.model and not model.exists():
        build_demo(model.parent)
    if (model / "tars_config.json").exists():
        own = read_settings(model / "tars_config.json", parser, "model", "out", "resume")
        own |= {k: os.path.normpath(model / own[k]) for k in ("data", "eval_data") if k in own}
    cfg = Config(**own | given)
    cfg.given = set(given)
    return cfg


def read_settings(file, parser, *forbidden):
    """A JSON file of settings, read as flags are: so are names, types and ranges checked. UserErrors name the file."""
    settings = parse_json(file.read_text(errors="replace"), file)
    if unknown := settings.keys() - {f.name for f in fields(Config) if f.name not in forbidden}:
        raise UserError(f"{file} has the unknown setting(s) {', '.join(sorted(unknown))}")
    flags = [(f"--{k.replace('_', '-')}", value) for k, value in settings.items() if value != ""]
    try:
        return vars(parser.parse_args([flag if value is True else flag.replace("--", "--no-", 1) if value is False
                                       else f"{flag}={value}" for flag, value in flags]))
    except UserError as error:
        raise UserError(f"{file}: {error}") from error


def build_demo(folder):
    """Make the offline demo's data and base model with data_prep.py."""
    if RANKS > 1:
        raise UserError(f"{folder} does not exist: make it first with `python data_prep.py demo`, in one process")
    print(f"{folder} does not exist: building the offline demo (once, about 2 minutes)")
    command = [sys.executable, Path(__file__).with_name("data_prep.py"), "demo", "--out", folder]
    if subprocess.run(command).returncode:
        raise UserError(f"the demo could not be built under {folder}: the reason is printed above")


def check(cfg):
    """Raise UserError for settings that do not go together."""
    if cfg.group_size % 2:
        raise UserError(f"--group-size {cfg.group_size}: give an even number, half is spoken and half written")
    try:
        torch.empty(0, device=cfg.aux_device or "cpu")
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--aux-device {cfg.aux_device}: {str(error).splitlines()[0]}") from error
    if cfg.questions_per_step % RANKS:
        raise UserError(f"--questions-per-step {cfg.questions_per_step}: give a multiple of the {RANKS} processes")


def main(arguments=None):
    """Evaluate, train, evaluate again, and print what became of the gap."""
    join_processes()
    cfg = parse_config(arguments, build_demo)
    check(cfg)
    layers = layer_weights(cfg.layers, family_of(cfg.model)[1])  # [L]
    questions, eval_questions = load_questions(cfg.data), load_questions(cfg.eval_data)
    if cfg.questions_per_step > len(questions):
        raise UserError(f"--questions-per-step {cfg.questions_per_step}: {cfg.data} has only {len(questions)}")
    print(f"R_rep compares {layers.count_nonzero()} of {len(layers)} layers")
    last, state = find_checkpoint(cfg)
    check_out(cfg.out)  # all that can be refused without the weights is refused before they are loaded
    embedder, extract = load_embedder(cfg, DEVICE) if cfg.beta else None, load_extractor(cfg, DEVICE)
    lm = SpeechLM.from_pretrained(cfg.model)
    for some in (questions, eval_questions):
        check_room(lm, some, cfg.max_new_tokens)
    optimizer, generator = make_trainable(lm, cfg)
    step = load_checkpoint(last, optimizer, state) if last else 0
    sum_over_ranks(torch.zeros(1, device=lm.device))  # a barrier: rank 0 removes files after all have looked
    out = Path(cfg.out)
    if RANK == 0:
        out.mkdir(parents=True, exist_ok=True)
        for old in [] if last else [*(out / name for name in OUTPUTS), *checkpoints(cfg)]:
            old.unlink(missing_ok=True)
        write_json(out / "config.json", asdict(cfg))

    try:
        with without_lora():
            before = state["before"] = state["before"] or evaluate(lm, eval_questions, extract, cfg)
        after = train(lm, questions, eval_questions, embedder, extract, optimizer, generator, step, state, cfg)
    except (RuntimeError, MemoryError, KeyboardInterrupt) as error:
        there = [f"{path} is there: the same command with --resume continues" for path in checkpoints(cfg)[-1:]]
        error.add_note(*(there or ["there is no checkpoint yet"]))
        raise
    if RANKS > 1:
        dist.destroy_process_group()
    if RANK:
        return
    mrr = [modality_recovery_rate(accuracy["speech"], before["text"]) for accuracy in (before, after)]
    write_json(out / "summary.json", {
        "base_speech": before["speech"], "base_text": before["text"], "speech": after["speech"], "text": after["text"],
        "mrr_before": mrr[0], "mrr_after": mrr[1], "n_speech": len(eval_questions), "n_text": len(eval_questions),
        "content": [value for name, value in state["config"].items() if name.startswith("content of ")],
    })
    print(f"\n{len(eval_questions)} held-out questions".ljust(28) + f"{'speech %':>10}{'text %':>10}{'MRR %':>10}")
    for name, accuracy, rate in zip(("before", "after"), (before, after), mrr):
        print(f"{name:<27}{100 * accuracy['speech']:>10.1f}{100 * accuracy['text']:>10.1f}{rate:>10.1f}")
    print(f"adapter, log and samples are in {out}/")


def run(program, main):
    """Run a program's main(): an error that its user can mend ends in one line on stderr and exit code 2."""
    on_signals(signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal may know less than Unicode
    for library in (datasets, transformers):
        library.logging.set_verbosity(logging.CRITICAL)  # what they would say beside our line
    try:
        return main()
    except UserError as error:
        message, code = str(error), 2
    except OSError as error:  # an unwritable folder, a full disk
        message, code = f"{error.filename or 'the disk'}: {error.strerror or error}", 2
    except KeyboardInterrupt as error:
        message, code = "; ".join([str(error) or "interrupted", *getattr(error, "__notes__", [])]), 130
    except (RuntimeError, MemoryError) as error:
        if not (isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(error)):
            raise
        message, code = "; ".join([f"out of memory at {peak_memory(torch.device(DEVICE)):.1f} GiB: lower "
                                   "--tokens-per-micro-batch, --eval-batch or --max-new-tokens",
                                   *getattr(error, "__notes__", [])]), 2
    print(f"{program}: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    run("tars.py", main)
