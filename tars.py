"""TARS in one file: reinforcement learning that closes the modality reasoning gap of a speech LLM.

"Closing the Modality Reasoning Gap for Speech Large Language Models", Wang et al., arXiv 2601.05543, ACL 2026.

A speech LLM (audio encoder -> projector -> text LLM) answers a spoken question worse than the same
question in writing. Its hidden states drift away from those of the written run, layer by layer, and its
chain of thought drifts with them. TARS lets the model answer each question G times, half from speech and
half from text: a group. Every answer earns a task reward. A spoken answer also earns two dense rewards for
staying close to a *correct* written answer of its group: close in its hidden states, and close in what it
says. This reference comes from the model itself and improves with it. Advantages are centred within
each modality, and a GRPO step with DAPO's clipping updates LoRA weights of the LLM. The dense rewards
matter because they still differ when every spoken answer of a group is wrong.

  spoken prompt  --> G/2 spoken answers  --> R_base + alpha R_rep + beta R_beh --> R - mean of speech --+
                                                      (states)     (text)                             |
                                                         ^            ^                               +--> loss
                     y*, a correct one for each  --------+------------+                               |
                                    ^                                                                 |
  written prompt --> G/2 written answers --> R_base                            --> R - mean of text   --+

B questions, M modalities (0 speech, 1 text), G samples of a question (G/2 per modality), P prompt and
C completion tokens, T tokens, N rows of any kind, L layers, H hidden size, V vocabulary, D size of E.

  Eq.   function                  what it is                                         test in test_tars.py
  (1)   modality_recovery_rate    speech accuracy as a share of the text backbone's  test_eq1_*
  (2)   total_reward              R = R_base + alpha R_rep + beta R_beh              test_eq2_*
  (3)   base_reward               R_base = R_acc + lambda R_fmt                      test_eq3_*
  (4)   pool_hidden_states        mean of a layer's states over the answer's tokens  test_eq4_*
  (5)   representation_reward     mean over layers of cos(speech, text)              test_eq5_*
  (6)   behavior_reward           cos(E(speech answer), E(text answer))              test_eq6_*
  (7)   modality_advantages       A = r - mean of its own modality                   test_eq7_*
  loss  token_weights, grpo_loss  clipped surrogate over the tokens of the batch     test_loss_*
  all   train_step                one step of the algorithm, numbered                test_step_*

Where paper and official code differ, the paper is followed; README has the table. Chosen here: no LoRA
dropout, pooling with the end-of-turn, regular expressions extract the answer, no cut answer is a y*.

  python tars.py                                       # the whole method, offline on a laptop
  python tars.py --model Qwen/Qwen2.5-Omni-7B --data DIR --eval-data DIR
  python tars.py --help                                # every setting and where the paper gives it
"""

import json
import math
import os
import re
import subprocess
import sys
import time
import wave
import zlib
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import partial
from io import BytesIO
from itertools import islice, pairwise
from pathlib import Path

import datasets
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save
from torch.utils.checkpoint import checkpoint as recompute
from tqdm import tqdm

MODALITIES = ("speech", "text")
SPEECH, TEXT = 0, 1
LETTERS = "ABCD"
SAMPLE_RATE = 16_000
RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BFLOAT16 = DEVICE == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)  # no T4, no V100
transformers.logging.set_verbosity_error()  # load_model refuses what this would warn of


# ==== 1. Config: the paper's Table 5 ====
def setting(default, meaning, paper=""):
    """One Config field: default, meaning, place in the paper. HfArgumentParser makes a flag of it."""
    return field(default=default, metadata={"help": f"{meaning} [{paper}]" if paper else meaning})


@dataclass
class Config:
    """Every hyper-parameter, and a flag for each. Numbers are the paper's where a place is given.
    A model directory's tars_config.json replaces defaults, and flags replace both.
    """

    # what to train on
    model: str = setting("runs/demo/model", "directory or hub name", "Qwen2.5-Omni-7B, Phi-4-MM")
    data: str = setting("runs/data/train", "training questions, by data_prep.py", "9,953 of MMLU")
    eval_data: str = setting("runs/data/test", "held-out questions, likewise", "VoiceBench MMSU, OBQA")
    out: str = setting("runs/tars", "directory for adapter, logs and summary")
    seed: int = setting(0, "seed of LoRA, data order, sampling, references")
    # roll-out
    questions_per_step: int = setting(8, "B, questions per optimizer step", "Table 5: 64 completions")
    group_size: int = setting(8, "G, completions per question, half from speech", "Table 5")
    max_new_tokens: int = setting(1024, "longest completion; cut ones are not learnt", "Table 5")
    temperature: float = setting(1.0, "sampling temperature, no top-k or top-p", "Table 5")
    # rewards and advantages
    alpha: float = setting(1.0, "weight of R_rep", "Eq. (2)")
    beta: float = setting(1.0, "weight of R_beh", "Eq. (2)")
    lam: float = setting(0.5, "lambda, weight of R_fmt", "Eq. (3)")
    layers: str = setting("all", "layers in R_rep, `all` or such as 11-20", "Eq. (5), Figure 3")
    embedder: str = setting("Qwen/Qwen3-Embedding-0.6B", "E, a model, or `ngrams`", "Eq. (6)")
    extractor: str = setting("regex", "`regex` or xFinder", "IAAR-Shanghai/xFinder-qwen1505")
    aux_device: str = setting("", "device of E and extractor, such as cpu")
    base_text_accuracy: float = setting(0.0, "MRR's denominator in percent; 0: measured", "Eq. (1)")
    joint_norm: bool = setting(False, "one mean over both modalities", "ablation of Eq. (7)")
    # loss and optimizer
    eps_low: float = setting(0.2, "the ratio is clipped below 1 - eps_low", "Table 5")
    eps_high: float = setting(0.28, "the ratio is clipped above 1 + eps_high", "Table 5")
    epochs: int = setting(3, "passes over the training questions", "Table 5")
    steps: int = setting(0, "steps in all; 0 is as many as `epochs` takes")
    lr: float = setting(2e-5, "AdamW's peak learning rate", "Table 5")
    warmup: float = setting(0.01, "share of steps in which the rate rises", "Table 5")
    weight_decay: float = setting(0.01, "AdamW's weight decay", "Table 5")
    max_grad_norm: float = setting(1.0, "gradients are scaled down to this norm", "Table 5")
    lora_rank: int = setting(8, "r of LoRA on every linear layer of the LLM", "Table 5")
    lora_alpha: int = setting(32, "LoRA's update is scaled by lora_alpha / lora_rank", "Table 5")
    # memory and output
    tokens_per_micro_batch: int = setting(16384, "most tokens, with padding, of a forward pass")
    gradient_checkpointing: bool = setting(True, "recompute the layers in backward")
    eval_batch: int = setting(32, "questions per batch in evaluation")
    eval_every: int = setting(0, "evaluate every so many steps; 0 is never between")
    save_every: float = setting(20.0, "checkpoint after so many seconds")
    resume: bool = setting(False, "continue from --out's checkpoint, if there is one")
    sample_every: int = setting(20, "show a group every so many steps; 0 is never")

    def __post_init__(self):
        """Refuse numbers that would train wrongly."""
        for name, value in asdict(self).items():
            if isinstance(value, float | int) and not 0 <= value < math.inf:
                raise SystemExit(f"--{name} {value}: give a finite number, 0 or more")
        if self.group_size % 2 or self.group_size < 4:
            raise SystemExit(f"--group_size {self.group_size}: give 4, 6, ..., half for each modality")
        if self.questions_per_step % RANKS:
            raise SystemExit(f"--questions_per_step {self.questions_per_step}: give a multiple of {RANKS}")


# ==== 2. The equations, in the paper's order and notation. No gradient flows through a reward. ====
def modality_recovery_rate(speech_accuracy, base_text_accuracy):
    """Eq. (1): speech accuracy as a share of the text backbone's accuracy in writing, in percent.
    The backbone is the text LLM of which the speech LLM was made. In the paper it has 77.70 % in writing and
    Qwen2.5-Omni 76.17 %. Without --base-text-accuracy the latter is taken, before training, and never the
    trained policy's. nan if it is 0.
    MRR = Acc_speech(model) / Acc_text(backbone) * 100 %
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


def format_reward(completion):
    """R_fmt of Eq. (3): 1.0 if all of it is <think>...</think><answer>... The answer is X. ...</answer>, else 0.
    X is A, B, C or D; a colon or comma may replace the full stop, and white space may stand around parts.
    """
    form = r"(?s)<think>.*?</think>\s*<answer>.*?The answer is [ABCD][.:,].*</answer>"
    return 1.0 if re.fullmatch(form, completion.strip()) else 0.0


def pool_hidden_states(hidden, completion_mask):
    """Eq. (4): one vector for an answer and a layer. hidden [..., T, H], completion_mask [..., T] -> [..., H].
    The mask is 1 on generated positions, end-of-turn included. Without any the mean is 0.
    h_bar^(l) = (1 / |y|) sum_{t in y} h_t^(l)
    """
    mask = completion_mask.unsqueeze(-1).to(hidden.dtype)  # [..., T, 1]
    return (hidden * mask).sum(-2) / mask.sum(-2).clamp(min=1)


def pick_references(text_correct, generator=None):
    """y*_text of Eq. (5) and (6): for each spoken answer a correct written one of its group, drawn at random.
    text_correct: bool [B, G/2] -> index of a written answer, long [B, G/2]; -1 where none is correct.
    """
    none = ~text_correct.any(-1, keepdim=True)  # [B, 1]
    chances = text_correct.float() + none.float()  # [B, G/2]; without any, masked below
    drawn = torch.multinomial(chances, text_correct.shape[-1], replacement=True, generator=generator)  # [B, G/2]
    return drawn.masked_fill(none, -1)


def reference_features(written, references):
    """Features of each spoken answer's reference: [B, G/2, ...], references [B, G/2] -> [B, G/2, ...].
    Where the reference is -1 they are 0: so is the cosine with them.
    """
    chosen = written[torch.arange(len(written), device=written.device)[:, None], references]  # [B, G/2, ...]
    chosen[references < 0] = 0
    return chosen


def representation_reward(speech, text, weights=None):
    """Eq. (5): how near a spoken answer is to its reference in pooled states. [..., L, H] twice -> [...].
    All L transformer layers count alike; the embedding output does not count.
    `weights` [L], which sum to 1, make the mean a weighted one (layer bands of Figure 3).
    R_rep = (1 / L) sum_l cos(h_bar_speech^(l), h_bar_text^(l))
    """
    cosines = F.cosine_similarity(speech, text, dim=-1)  # [..., L]
    return cosines.mean(-1) if weights is None else cosines @ weights


def behavior_reward(speech, text):
    """Eq. (6): how near a spoken answer is to its reference in meaning. [..., D] twice -> [...].
    E embeds the whole completion, thought and answer.
    R_beh = cos(E(y_speech), E(y*_text))
    """
    return F.cosine_similarity(speech, text, dim=-1)


def modality_advantages(rewards, joint=False):
    """Eq. (7): how much better an answer is than its group's in the same modality. Both [B, M, G/2].
    GRPO would take the mean of the whole group and divide by its standard deviation. With one joint mean
    (`joint`) the modality with the higher mean reward gets positive advantages as a whole: text under R_base,
    speech once R_rep and R_beh are added.
    A_{i,m} = r_{i,m} - mu_m,  mu_m = mean_j r_{j,m}
    """
    return rewards - rewards.mean((-2, -1) if joint else -1, keepdim=True)


def token_weights(completion_mask, truncated):
    """DAPO's mean over tokens: each token's weight. completion_mask [..., T], truncated [...] -> [..., T].
    A cut answer keeps its reward and counts in Eq. (7), but not in the loss: DAPO's overlong filter.
    w_{i,t} = 1 / sum_{j not cut} |y_j|, and 0 where nothing is learnt: padding and cut answers
    """
    learnt = completion_mask * ~truncated[..., None]  # [..., T]
    return learnt / sum_over_ranks(learnt.sum()).clamp(min=1)  # of all processes


def grpo_loss(per_token_logps, old_per_token_logps, advantages, weights, eps_low=0.2, eps_high=0.28):
    """GRPO's surrogate with DAPO's clipping, no KL term: [..., T] twice, [...], [..., T] -> scalar.
    On-policy rho is 1, and the value is about 0 because advantages sum to 0 in a group.
    The gradient is not 0: each token adds A times the gradient of its log-prob.
    The paper makes one update on a roll-out (Table 5), so rho stays 1; from a second on the clip would act.
    loss = - sum_{i,t} w_{i,t} min(rho_{i,t} A_i, clip(rho_{i,t}, 1 - eps_low, 1 + eps_high) A_i),  rho = pi / pi_old
    """
    rho = torch.exp(per_token_logps - old_per_token_logps)  # [..., T]
    A = advantages[..., None]  # [..., 1]
    surrogate = torch.min(rho * A, rho.clamp(1 - eps_low, 1 + eps_high) * A)  # [..., T]
    return -(weights * surrogate).sum()


# ==== 3. One step of the algorithm ====
def train_step(lm, questions, embedder, extract, optimizer, cfg, generator):
    """One step of TARS on B questions -> numbers to log (step_means, loss, grad_norm, skipped), first_group.
    Tensors of answers are [B, M, G/2, ...]: question, modality (0 speech, 1 text), sample.
    """
    # 1. Embed both prompts of every question. The encoder is frozen: once is enough for a step.
    prompts = lm.embed_prompts(questions)  # B lists of M prompts [P, H]

    # 2. Roll out: the model answers every prompt G/2 times.
    rollout = lm.rollout(prompts, cfg.group_size // len(MODALITIES), cfg.max_new_tokens, cfg.temperature, generator)
    completion_ids, completion_mask, truncated = rollout  # [B, M, G/2, C] twice, [B, M, G/2]
    completions = lm.detokenize(completion_ids, completion_mask)  # B * M * G/2 strings
    token_w = token_weights(completion_mask, truncated)  # [B, M, G/2, C]

    # 3. From the text alone: R_base, Eq. (3); y*, never a cut answer; R_beh, Eq. (6), of spoken answers.
    letters, acc, fmt = judge(questions, completions, extract)  # `extract`: the answer extractor
    acc, fmt = (x.to(lm.device).view(truncated.shape) for x in (acc, fmt))  # [B, M, G/2]
    base = base_reward(acc, fmt, cfg.lam)  # [B, M, G/2]
    references = pick_references((acc[:, TEXT] == 1) & ~truncated[:, TEXT], generator)  # [B, G/2]
    rep, beh, rewards, advantages, entropy = (torch.zeros_like(base) for _ in range(5))  # [B, M, G/2]
    if cfg.beta:
        sentences = embedder(completions).to(lm.device).unflatten(0, base.shape)  # [B, M, G/2, D]
        beh[:, SPEECH] = behavior_reward(sentences[:, SPEECH], reference_features(sentences[:, TEXT], references))

    loss, layer_w = 0.0, layer_weights(cfg.layers, len(lm.decoder.layers)).to(lm.device)  # [L]
    for batch in micro_batches(prompts, completion_mask, cfg.tokens_per_micro_batch):  # b questions
        # 4. One forward: log-probs [b, M, G/2, C] with gradient; Eq. (4) [b, M, G/2, L, H] without.
        ids, mask = completion_ids[batch], completion_mask[batch]  # [b, M, G/2, C]
        logps, states = lm.score([prompts[q] for q in batch], ids, mask, cfg.temperature)
        # 5. R_rep, Eq. (5), of the spoken answers, and the reward, Eq. (2).
        if cfg.alpha:
            y_star = reference_features(states[:, TEXT], references[batch])  # [b, G/2, L, H]
            rep[batch, SPEECH] = representation_reward(states[:, SPEECH], y_star, layer_w)  # [b, G/2]
        rewards[batch] = total_reward(base[batch], rep[batch], beh[batch], cfg.alpha, cfg.beta)
        # 6. Advantages, Eq. (7).
        advantages[batch] = modality_advantages(rewards[batch], cfg.joint_norm)
        # 7. Loss of these questions, and its gradient. pi_old is the policy itself: the ratio is 1.
        part = grpo_loss(logps, logps.detach(), advantages[batch], token_w[batch], cfg.eps_low, cfg.eps_high)
        part.backward()
        loss += part.item()
        entropy[batch] = -logps.detach().sum(-1) / mask.sum(-1)  # mean of -log pi, an estimate

    # 8. Update LoRA, unless loss or gradient norm is not finite.
    parameters = optimizer.param_groups[0]["params"]
    for p in parameters:  # a sum over processes: the loss is already divided by the tokens of all
        sum_over_ranks(p.grad)
    loss = sum_over_ranks(torch.tensor(loss, dtype=torch.float64, device=lm.device)).item()
    grad_norm = nn.utils.clip_grad_norm_(parameters, cfg.max_grad_norm).item()
    finite = math.isfinite(loss) and math.isfinite(grad_norm)
    if finite:
        optimizer.step()
    optimizer.zero_grad()

    terms = {"acc": acc, "fmt": fmt, "rep": rep, "beh": beh, "reward": rewards}  # each [B, M, G/2]
    group = first_group(questions[0], completions, terms | {"base": base, "advantage": advantages}, references)
    terms |= {"truncated": truncated, "length": completion_mask.sum(-1), "entropy": entropy}
    metrics = step_means(terms, letters, references) | {"loss": loss, "grad_norm": grad_norm, "skipped": not finite}
    return metrics, group


def judge(questions, completions, extract):
    """The letters that answers choose (None where none is found), R_acc and R_fmt of Eq. (3).
    B questions, B * n completions in their order -> B * n letters, float [B, n], float [B, n].
    """
    n = len(completions) // len(questions)
    asked = [question for question in questions for _ in range(n)]  # the question of each completion
    letters = extract(asked, completions)
    acc = [letter == LETTERS[question["answer_index"]] for letter, question in zip(letters, asked, strict=True)]
    fmt = [format_reward(completion) for completion in completions]
    return letters, torch.tensor(acc).float().view(-1, n), torch.tensor(fmt).view(-1, n)


def layer_weights(layers, L):
    """Weights [L] of Eq. (5), summing to 1: `all`, or a range from 1 on such as 11-20."""
    match = re.fullmatch(r"(\d+)-(\d+)", f"1-{L}" if layers == "all" else layers)
    if not match or not 1 <= int(match[1]) <= int(match[2]) <= L:
        raise SystemExit(f"--layers {layers}: give `all` or a range within 1-{L}, such as 1-{L}")
    chosen = torch.zeros(L)  # [L]
    chosen[int(match[1]) - 1 : int(match[2])] = 1
    return chosen / chosen.sum()


def micro_batches(prompts, completion_mask, budget):
    """Questions in passes of at most `budget` tokens, a longer one alone; similar lengths share one.
    prompts: B lists of M prompts [P, H], completion_mask [B, M, G/2, C] -> lists of question indices.
    """
    tokens = [sum(map(len, prompts[q])) + n for q, n in enumerate(completion_mask.sum((1, 2, 3)).tolist())]
    batches = []
    for q in sorted(range(len(tokens)), key=tokens.__getitem__, reverse=True):
        if not batches or (len(batches[-1]) + 1) * tokens[batches[-1][0]] > budget:
            batches.append([])
        batches[-1].append(q)
    return batches


# ==== 4. SpeechLM: encoder -> projector -> LLM ====
SYSTEM_PROMPT = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant "
    "first thinks about the reasoning process in the mind and then provides the user with the answer. The reasoning "
    "process and answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e., "
    "<think>[THINKING PROCESS]</think><answer>The answer is [CHOICE].</answer>")


def written_question(question):
    """The user turn of a written question. That of a spoken one is the clip alone."""
    options = "\n".join(f"Option {LETTERS[i]}: {option}" for i, option in enumerate(question["options"]))
    return f"{question['question']}\n\n{options}"


class SpeechLM:
    """A speech LLM that embeds prompts, samples answers and scores them, whatever its family."""

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
        """A model directory or hub name -> SpeechLM."""
        family = family_of(path)
        options = {"revision": family.revision} if path == family.repository else {}
        # AutoTokenizer may build another class, and ignore half of tokenizer.json.
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(path, **options)
        feature_extractor = family.feature_extractor_class.from_pretrained(path, **options)
        return cls(family, family.load(path, **options), tokenizer, feature_extractor)

    @torch.no_grad()
    def embed_prompts(self, questions):
        """The prompts of B questions, spoken and written: B lists of M prompts [P, H] of any lengths."""
        return [[self.prompt(spoken), self.prompt(self.embed_text(written_question(question)))]
                for question, spoken in zip(questions, self.spoken_turns(questions), strict=True)]

    def prompt(self, user_turn):
        """User turn [tokens, H] -> [P, H], with the family's template around it."""
        return torch.cat([self.embed_text(self.family.before_user, special=True), user_turn,
                          self.embed_text(self.family.after_user, special=True)])

    def spoken_turns(self, questions):
        """User turns of spoken questions: B of [tokens, H]. Encoder and projector run here alone."""
        clips = [read_clip(q["audio"]["bytes"], q["key"]) for q in questions]  # B of [samples]
        features = [self.family.features(self.feature_extractor, clip) for clip in clips]
        before = self.embed_text(self.family.before_audio, special=True)  # [tokens, H]
        after = self.embed_text(self.family.after_audio, special=True)  # [tokens, H]
        return [torch.cat([before, clip, after]) for clip in self.family.encode(self.model, features)]

    def embed_text(self, text, special=False):
        """Text -> [tokens, H]. Control tokens are parsed with `special`, and else plain text."""
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=not special).input_ids
        return self.embed_tokens(torch.tensor(ids, dtype=torch.long, device=self.device))

    def logits(self, hidden, temperature):
        """Last hidden states [N, H] -> logits [N, V] over temperature: the roll-out's distribution."""
        logits = self.model.lm_head(hidden).float()
        logits[:, self.placeholder_ids] = -torch.inf  # a sampled <|AUDIO|> would stand for a clip
        return logits / (temperature or 1.0)  # temperature 0 is greedy: the argmax needs no scaling

    def run_decoder(self, embeds, mask, position_ids, **options):
        """The LLM on embeddings [N, T, H]; mask: of padding [N, T], or [N, 1, queries, keys]."""
        return self.decoder(inputs_embeds=embeds, attention_mask=mask, position_ids=position_ids,
                            use_cache="past_key_values" in options, **options)

    @torch.no_grad()
    def rollout(self, prompts, samples, max_new_tokens, temperature, generator=None):
        """Sample completions, greedily if `temperature` is 0. prompts: B lists of M prompts [P, H].
        Returns completion_ids and completion_mask [B, M, samples, C] and truncated [B, M, samples]. The mask
        includes the first end-of-turn, so that ending a turn is learnt too. The samples of a prompt share a row
        and its cache: each step adds a token of each. A row leaves when all its samples have ended.
        """
        embeds, prompt_mask = pad_left([prompt for question in prompts for prompt in question])  # [N, P, H], [N, P]
        cache = transformers.DynamicCache()
        output = self.run_decoder(embeds, prompt_mask, positions(prompt_mask), past_key_values=cache)
        hidden = output.last_hidden_state[:, -1:].expand(-1, samples, -1)  # [N, P, H] -> [N, samples, H]
        ids = torch.full((len(embeds), samples, max_new_tokens), self.pad_id, device=self.device)  # [N, samples, C]
        mask = torch.zeros_like(ids)  # [N, samples, C]
        finished = torch.zeros_like(ids[..., 0], dtype=torch.bool)  # [N, samples]
        row = torch.arange(len(embeds), device=self.device)  # [n], the rows still in the batch
        sees = prompt_mask.bool()[:, None].expand(-1, samples, -1)  # [n, samples, keys]
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
            sees = torch.cat([sees, itself.expand(len(row), -1, -1)], dim=-1)  # [n, samples, keys]
            position_ids = (prompt_mask[row].sum(-1, keepdim=True) + t).expand(-1, samples)  # [n, samples]
            embeds = self.embed_tokens(ids[row, :, t])  # [n, samples, H]
            hidden = self.run_decoder(embeds, sees[:, None], position_ids, past_key_values=cache).last_hidden_state
        return [x.unflatten(0, (len(prompts), -1)) for x in (ids[..., : t + 1], mask[..., : t + 1], ~finished)]

    def score(self, prompts, completion_ids, completion_mask, temperature):
        """Log-probs and pooled states of completions in one pass. A question is one row: paired_rows.
        prompts: b lists of M prompts [P, H], completion_ids and completion_mask [b, M, G/2, C] ->
        per_token_logps [b, M, G/2, C] with gradient, and Eq. (4) [b, M, G/2, L, H] without.
        """
        is_token = completion_mask.bool()  # [b, M, G/2, C]
        lengths = [[len(prompt) for prompt in question] for question in prompts]  # [b, M]
        attention_mask, position_ids, predictor = paired_rows(torch.tensor(lengths, device=self.device), is_token)
        answers = self.embed_tokens(completion_ids)  # [b, M, G/2, C, H]
        rows = [torch.cat([part for m, prompt in enumerate(question)  # a prompt, its answers, the next prompt, ...
                           for part in (prompt, answers[q, m][is_token[q, m]])]) for q, question in enumerate(prompts)]
        embeds = nn.utils.rnn.pad_sequence(rows, batch_first=True)  # [b, T, H], padded on the right
        output = self.run_decoder(embeds, attention_mask, position_ids, output_hidden_states=True)
        is_answer = predictor >= 0  # [b, T]
        # The state before a token predicts it.
        predicts = output.last_hidden_state[is_answer.nonzero()[:, 0], predictor[is_answer]]  # [n, H], n tokens
        # Logits of 1,024 tokens at a time, and again in backward.
        logps = [recompute(self._token_logps, h, tokens, temperature, use_reentrant=False)
                 for h, tokens in zip(predicts.split(1024), completion_ids[is_token].split(1024), strict=True)]
        per_token_logps = predicts.new_zeros(is_token.shape, dtype=torch.float32)  # [b, M, G/2, C], 0 at padding
        per_token_logps[is_token] = torch.cat(logps)

        def pooled(layer):  # [b, T, H] -> Eq. (4), [b, M, G/2, H]
            states = layer.new_zeros(*is_token.shape, layer.shape[-1])  # [b, M, G/2, C, H]
            states[is_token] = layer[is_answer]
            return pool_hidden_states(states, completion_mask)

        # Entry 0 is the embedding; the last layer's comes after the final norm.
        return per_token_logps, torch.stack([pooled(x.detach()) for x in output.hidden_states[1:]], dim=-2).float()

    def _token_logps(self, hidden, ids, temperature):
        return self.logits(hidden, temperature).log_softmax(-1).gather(-1, ids[:, None])[:, 0]  # [N]

    def detokenize(self, completion_ids, completion_mask):
        """Completions [..., C] -> strings in row order, without the end of turn."""
        rows = zip(completion_ids.flatten(0, -2).tolist(), completion_mask.flatten(0, -2).sum(-1).tolist(), strict=True)
        return self.tokenizer.batch_decode([ids[:n] for ids, n in rows], skip_special_tokens=True)


def pad_left(rows):
    """N sequences [P, H] of any lengths -> embeddings [N, P, H] and mask [N, P], padded on the left."""
    masks = [torch.ones(len(row), dtype=torch.long, device=row.device) for row in rows]
    return [nn.utils.rnn.pad_sequence(x, batch_first=True, padding_side="left") for x in (rows, masks)]


def positions(mask):
    """Mask [N, P] -> position ids [N, P]: after padding on the left a row starts at 0."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def paired_rows(prompt_lengths, is_token):
    """Each question as one row: spoken prompt, its answers, written prompt, its answers, end to end.
    prompt_lengths [b, M], is_token: bool [b, M, G/2, C] -> who sees whom, bool [b, 1, T, T] (query x key), position ids
    [b, T], and for each token of an answer the index of the one that predicts it, -1 elsewhere [b, T]. A part is a
    prompt or an answer. A token sees itself, the tokens before it in its part, and the prompt that its part answers.
    With prompts s of 2 tokens and t of 1, one answer to each, a of 2 tokens and b of 1, and one token of padding:

        query  key: s s a a t b -   part  position  predictor
        s           1 . . . . . .   0     0         -1
        s           1 1 . . . . .   0     1         -1
        a           1 1 1 . . . .   1     2          1
        a           1 1 1 1 . . .   1     3          2
        t           . . . . 1 . .   2     0         -1
        b           . . . . 1 1 .   3     1          4
        -           . . . . . . 1   4     0         -1
    """
    b, M, samples, _ = is_token.shape
    sizes = torch.cat([prompt_lengths[..., None], is_token.sum(-1)], dim=-1).flatten(1)  # [b, K]: K = M * (1 + G/2)
    ends = sizes.cumsum(-1)  # [b, K]
    starts = F.pad(ends, (1, 1))  # [b, K + 2], where each part begins; part K is the padding
    index = torch.arange(ends.max(), device=is_token.device).repeat(b, 1)  # [b, T]
    part = torch.searchsorted(ends, index, right=True)  # [b, T]
    prompt = part // (1 + samples) * (1 + samples)  # [b, T], the prompt of a token's part
    begin, prompt_start, answers_start = (starts.gather(1, x) for x in (part, prompt, prompt + 1))  # [b, T]
    is_answer = part != prompt  # [b, T]
    position_ids = index - begin + is_answer * (answers_start - prompt_start)  # [b, T]
    predictor = torch.where(index == begin, answers_start, index) - 1  # [b, T]; the prompt's last for a first token
    own = (part[:, :, None] == part[:, None]) | (prompt[:, :, None] == part[:, None])  # [b, T, T]
    return own.tril()[:, None], position_ids, predictor.masked_fill(~is_answer, -1)


# ==== 5. LoRA, on every linear layer of the LLM and nowhere else ====
class LoRALinear(nn.Module):
    """y = W x + (alpha / r) B A x. W is frozen, A [r, in] starts random, B [out, r] at 0: at first y = W x."""

    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.linear, self.scale = linear, alpha / rank
        self.lora_A = nn.Parameter(torch.empty(rank, linear.in_features, device=linear.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank, device=linear.weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)

    def forward(self, x):
        """x [..., in] -> [..., out]."""
        delta = F.linear(F.linear(x.to(self.lora_A.dtype), self.lora_A), self.scale * self.lora_B)
        return self.linear(x) + delta.to(x.dtype)  # A and B are float32 also beside bfloat16 weights


def attach_lora(lm, rank, alpha):
    """Wrap every linear layer of the LLM. Returns the trainable parameters.
    Only under `layers`: Phi's decoder also holds the audio encoder.
    """
    for parent in list(lm.decoder.layers.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear):
                setattr(parent, name, LoRALinear(child, rank, alpha))
    trained = [p for p in lm.model.parameters() if p.requires_grad]
    if not trained:
        raise SystemExit("the LLM has no nn.Linear for LoRA: is it quantised?")
    return trained


# ==== 6. Answer extractor, Eq. (3), and E, Eq. (6) ====
# ANNOUNCED opens a statement of the answer, POINTED may open one.
ANNOUNCED = (
    r"(?i)\b(?:answer|solution|(?:correct|right|best) (?:option|choice|one))\b[^.:=\n]{,60}?"
    r"(?:\b(?:is|be)\b|[:=])(?! (?:correct|right)\b)")
POINTED = (
    r"(?i)\b(?:choose|pick|select|say|go with|(?:points|corresponds) to|matches|it's|it is|(?:must|has to) be)\b"
    r"|\b(?=[A-D]\b[^,;.\n]{,40}? is (?:the )?(?:only |most )?(?:correct|right|best|answer)\b)")
# FILLED is skipped before an answer. HEDGED denies, doubts or reports it. RETRACTED takes it back.
FILLED = (
    r"(?i)(?:[\s:(\[]|\b(?:so|thus|therefore|hence|no(?=,)|indeed|only|most|likely|probably|that"
    r"|option|choice|answer)\b,?)*")
HEDGED = (
    r"(?i)\b(?:if|whether|doubt|disagree|says|believes|claims|people|students|might|may|could|perhaps|either"
    r"|unlikely|hardly|least|not|never|cannot|neither|nobody|incorrect|wrong|except)\b|n't\b")
RETRACTED = (
    r"(?i)^\W*(?:no,? |oh,? )?wait\b|\b(?:not|no longer) sure\b|\b(?:second thought|mistake|forget|scratch)\b"
    r"|\bedit:|\b(?:that|this|it|so [A-D])(?:'s| is| was) (?:wrong|incorrect|not (?:correct|right))\b")
# ENDS may follow an option's words. LETTER, an answer: no article, no part of a name such as C# or A+.
ENDS = (
    r"(?=\W*$|[)\].:!]+(?:\s|$)| [–—-] "
    r"|,? (?:because|since|as|which|is|for|with|in|not|the|and it)\b)")
LETTER = rf"([A-Z]|a(?=[).])|[b-d](?=[).,:;]|\W*$))(?![\w'+#/&°*-]|\.\w|\W*(?:or|and)\b)(?:{ENDS}| ?\()"


def option_at(text, options, ends=ENDS):
    """The letter of the option whose words a text begins with: the longest; "" if none or two do."""
    words = ["(?:an? |the )?" + r"\s*".join(map(re.escape, "".join(option.split()))) for option in options]
    for case in ("", "(?i)"):
        found = [re.match(case + word + ends, text) for word in words]
        lengths = [len(match[0]) if match else 0 for match in found]
        if max(lengths) and lengths.count(max(lengths)) == 1:
            return LETTERS[lengths.index(max(lengths))]
    return ""


def extract_answer(completion, options):
    """The letter of the option that an output plainly chooses in its last statement, else None: no guess.
    A statement: a letter or an option's words after "the answer is" or the like, "B is correct", or a line
    that is a letter, alone or with its option's words. None: a list of options; what is denied, doubted,
    asked or taken back; two letters; a letter beside another option's words.
    """
    text = re.split("(?i)</think>", completion)[-1]
    if "<think>" in text.lower():
        return None  # a thought that does not end has no answer
    text = "\n".join(re.findall(r"(?is)<answer>(.*?)(?=</?answer|$)", text) or [text])
    markup = (r"</?\w+>|\\[()\[\]]|\\(?:text|math|d?frac)\w*|(?m:^#+ |^\s*\d+[.)](?= ))"
              r"|[*_`$\\{}\"“”]|(?<=\d),(?=\d{3})")  # and the commas of thousands
    written = [x.replace("’", "'").replace(r"\boxed", "answer: ") for x in (text, *options)]
    text, *options = (re.sub(markup, "", x) for x in written)
    options = [re.sub(r"(?i)^(?:an?|the) ", "", option.strip(" .\n")) for option in options]
    chosen = option_at(text.strip(), options, r"[\s.!]*$")
    text = re.sub(r"(?m)^.*\bA[.):] .*\bB[.):] .*\bC[.):] .*$", "", text)  # a list of options in one line
    text = re.sub(r"(?i)(\b(?:answer|is):?)\W*\n+(?!.*\n\W*[A-D][.):])", r"\1: ", text)  # a heading
    label = r"(?im)^\W*(?:Option )?([A-D])(?:[.):].*|\W*)$"
    if len({*re.findall(label, text.upper())}) > 1:
        text = re.sub(label, "", text)  # a list of options, cut or whole
    for clause in re.split(r"(?i)\n|(?<=[.!?;])(?<!\b[A-D]\.)\s+|[.,] (?=(?:so|but|thus|oh|wait|no)\b)", text):
        announced, pointed = ([None, *re.finditer(form, clause)][-1] for form in (ANNOUNCED, POINTED))
        opening = announced or pointed
        named = clause[opening.end() if opening else 0 :]
        named = named[re.match(FILLED, named).end() :]
        letter, said = re.match(LETTER, named), option_at(named, options)
        behind = named[letter.end() :] if letter else named
        beside = option_at(re.sub(r"^[\s).,:;(\]]*(?:[–—-] |which is )?", "", behind), options)
        if letter and (letter[1].upper() in LETTERS or not said):
            said = letter[1].upper() if letter[1].upper() in (said or beside or LETTERS) else ""
        stated = announced or said and (opening or letter and (beside or re.match(r"\W*(?:because|since|$)", behind)))
        asked = clause.endswith("?") and not re.match(r"\.\s", behind)
        if re.search(RETRACTED, clause) or stated and (asked or re.search(HEDGED, clause.removesuffix(named))):
            chosen = ""
        elif stated:
            chosen = said
    return chosen or None


def extract_answers(questions, completions):
    """The default extractor, regular expressions: letters, None where there is none."""
    return [extract_answer(text, q["options"]) for q, text in zip(questions, completions, strict=True)]


class XFinder:
    """The paper's answer extractor, xFinder-qwen1505: a small LLM that names the option."""

    prompt = (
        "<|System|>:You are a help assistant tasked with extracting the precise key answer from given output sentences."
        '\n<|User|>:Question: """{question}"""\n\nOutput sentences: """{output}"""\n\nAnswer range: {options}\n\n'
        "Key extracted answer: \n<|Bot|>:")

    def __init__(self, name, device):
        self.model = load_model(transformers.Qwen2ForCausalLM, name, device)
        self.tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(name, padding_side="left")

    @torch.no_grad()
    def __call__(self, questions, completions):
        """Questions and as many completions -> letters, None where the model names no option."""
        prompts = [self.prompt.format(question=q["question"], output=completion,
                                      options=json.dumps(list(zip(LETTERS, q["options"], strict=True))))
                   for q, completion in zip(questions, completions, strict=True)]
        inputs = self.tokenizer(prompts, padding=True, return_tensors="pt").to(self.model.device)
        output = self.model.generate(**inputs, max_new_tokens=64, do_sample=False)[:, inputs.input_ids.shape[1] :]
        said = self.tokenizer.batch_decode(output, skip_special_tokens=True)
        return extract_answers(questions, said)


def embed_ngrams(texts):
    """An offline stand-in for E: counts of hashed words and pairs. Strings -> unit vectors [N, 512]."""
    vectors = []
    for text in texts:
        words = re.findall(r"\w+|[^\w\s]", text.lower())
        grams = words + [f"{a} {b}" for a, b in pairwise(words)]
        hashes = torch.tensor([zlib.crc32(gram.encode()) % 512 for gram in grams], dtype=torch.long)
        vectors.append(torch.bincount(hashes, minlength=512))
    return F.normalize(torch.stack(vectors).float(), dim=-1)


class SentenceEmbedder:
    """E of the paper, Qwen3-Embedding: the last token's state. Documents take no instruction."""

    def __init__(self, name, device):
        self.model = load_model(transformers.Qwen3Model, name, device)
        self.tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(name, padding_side="left")

    @torch.no_grad()
    def __call__(self, texts):
        """Strings -> unit vectors [N, D]."""
        inputs = self.tokenizer(texts, padding=True, truncation=True, max_length=8192, return_tensors="pt")
        hidden = self.model(**inputs.to(self.model.device), use_cache=False).last_hidden_state  # [N, T, D]
        return F.normalize(hidden[:, -1].float(), dim=-1)


def load_embedder(cfg):
    """E of Eq. (6), by cfg.embedder: texts -> unit vectors [N, D]."""
    return embed_ngrams if cfg.embedder == "ngrams" else SentenceEmbedder(cfg.embedder, cfg.aux_device or DEVICE)


def load_extractor(cfg):
    """The answer extractor, by cfg.extractor: questions and completions -> letters or None."""
    return extract_answers if cfg.extractor == "regex" else XFinder(cfg.extractor, cfg.aux_device or DEVICE)


# ==== 7. Evaluate and train ====
def question_batches(questions, size, desc):
    """Lists of `size` questions, in order, under a progress bar called `desc`."""
    with tqdm(total=len(questions), desc=desc, unit="question", leave=False, disable=RANK > 0) as bar:
        for first in range(0, len(questions), size):
            yield [questions[i] for i in range(first, min(first + size, len(questions)))]
            bar.update(min(size, len(questions) - first))


def answer_greedily(lm, questions, extract, cfg):
    """Yield records, one a question and modality; an answer of None is wrong."""
    for batch in question_batches(questions, cfg.eval_batch, "evaluate"):
        ids, mask, truncated = lm.rollout(lm.embed_prompts(batch), 1, cfg.max_new_tokens, temperature=0)
        completions = lm.detokenize(ids, mask)  # b * M strings
        letters, acc, _ = judge(batch, completions, extract)
        keys = [{"key": question["key"], "modality": m} for question in batch for m in MODALITIES]
        numbers = (x.flatten().tolist() for x in (acc == 1, mask.sum(-1), truncated))
        for key, text, letter, right, tokens, cut in zip(keys, completions, letters, *numbers, strict=True):
            yield key | {"completion": text, "answer": letter, "right": right, "tokens": tokens, "cut": cut}


def evaluate(lm, questions, extract, cfg):
    """Accuracy, 0 to 1, and mean length of greedy answers: {"speech", "text", "length_speech", "length_text"}."""
    order = np.argsort(questions["seconds"], kind="stable")  # similar lengths share a batch
    sums = dict.fromkeys(MODALITIES, 0) | {f"length_{m}": 0 for m in MODALITIES}
    for record in answer_greedily(lm, questions.select(order[RANK::RANKS]), extract, cfg):
        sums[record["modality"]] += record["right"]
        sums[f"length_{record['modality']}"] += record["tokens"]
    return {name: mean * RANKS / len(questions) for name, mean in mean_over_ranks(sums).items()}


def learning_rate(step, steps, cfg):
    """Linear warm-up over a share of the steps, then linear decay to zero. Steps count from 0."""
    warmup = max(1, round(cfg.warmup * steps))
    return cfg.lr * min((step + 1) / warmup, (steps - step) / max(1, steps - warmup + 1))


def data_order(count, size, seed):
    """Yield the question indices of each step, `size` of `count`; an epoch is a seeded permutation."""
    generator, order = torch.Generator().manual_seed(seed), []
    while True:
        while len(order) < size:
            order += torch.randperm(count, generator=generator).tolist()
        yield order[:size]
        order = order[size:]


def make_trainable(lm, cfg):
    """Attach LoRA and say what is trained, where and how. Returns the optimizer."""
    torch.manual_seed(cfg.seed)
    trained = attach_lora(lm, cfg.lora_rank, cfg.lora_alpha)
    for layer in lm.decoder.layers if cfg.gradient_checkpointing else ():  # backward runs it once more
        layer.forward = partial(recompute, layer.forward, use_reentrant=False, preserve_rng_state=False)
    device = f"cuda, {torch.cuda.get_device_name()}" if DEVICE == "cuda" else "cpu"
    size, new = (sum(p.numel() for p in some) for some in (lm.model.parameters(), trained))
    layers = layer_weights(cfg.layers, len(lm.decoder.layers))  # [L]
    print(f"{device}, {str(lm.model.dtype)[6:]}\n{size:,} parameters; trained are {new:,} in float32, LoRA on "
          f"{len(trained) // 2} linear layers; R_rep compares {layers.count_nonzero()} of {len(layers)} layers")
    return torch.optim.AdamW(trained, lr=cfg.lr, weight_decay=cfg.weight_decay)


def train(lm, questions, eval_questions, embedder, extract, optimizer, state, cfg):
    """Train on from where `state` is (open_run). The last evaluation is in state["after"]."""
    out, saved, generator = Path(cfg.out), time.time(), torch.Generator(lm.device)
    steps = cfg.steps or max(1, cfg.epochs * len(questions) // cfg.questions_per_step)
    order = islice(data_order(len(questions), cfg.questions_per_step, cfg.seed), state["step"], None)
    bar = tqdm(range(state["step"], steps), "TARS", steps, initial=state["step"], unit="step", disable=RANK > 0)
    for done in bar:
        step, start, indices = done + 1, time.time(), next(order)
        # A seed for each step and process: a resumed run draws what it would have drawn.
        generator.manual_seed(int(np.random.SeedSequence((cfg.seed, step, RANK)).generate_state(1)[0]))
        optimizer.param_groups[0]["lr"] = lr = learning_rate(done, steps, cfg)
        batch = [questions[i] for i in indices[RANK::RANKS]]
        metrics, group = train_step(lm, batch, embedder, extract, optimizer, cfg, generator)
        metrics = {"step": step, "lr": lr} | mean_over_ranks(metrics | {"seconds": time.time() - start})
        bar.set_postfix({name: metrics[name] for name in ("acc_speech", "acc_text") if name in metrics})
        state |= {"step": step, "skipped": state["skipped"] + 1 if metrics["skipped"] else 0}
        if step == steps or cfg.eval_every and step % cfg.eval_every == 0:
            state["after"] = evaluate(lm, eval_questions, extract, cfg)
            metrics |= {f"eval_{name}": value for name, value in state["after"].items()}
        append_line(out / "log.jsonl", metrics)
        if cfg.sample_every and done % cfg.sample_every == 0:
            append_line(out / "samples.jsonl", {"step": step, **group})
            tqdm.write(show_group(step, group))
        if state["skipped"] == 10:
            raise SystemExit(f"ten steps in a row without a finite loss and gradient: see {out}/log.jsonl")
        if step == steps or time.time() - saved >= cfg.save_every:
            save_checkpoint(optimizer, state, cfg)
            saved = time.time()
    save_adapter(lm, cfg)


# ==== The method ends here. What follows is what a run needs. ====
# ==== 8. Model families ====
def load_model(kind, path, device=DEVICE, dtype=None, **options):
    """A model of transformers' class `kind`: in its checkpoint's dtype if the GPU has bfloat16, else float32.
    Refused: a tensor that the checkpoint lacks (it would be random), a layer that config.json lacks (it would
    be left out). Tensors of other parts, such as the talker, may be left over.
    """
    dtype = dtype or ("auto" if BFLOAT16 and str(device) != "cpu" else torch.float32)
    model, found = kind.from_pretrained(path, dtype=dtype, output_loading_info=True, **options)
    own = {re.sub(r"\.\d+\.", ".0.", name) for name in model.state_dict()}
    left_over = {name for name in found["unexpected_keys"] if re.sub(r"\.\d+\.", ".0.", name) in own}
    if wrong := sorted(left_over | set(found["missing_keys"])):
        raise SystemExit(f"{path} does not fit its config.json: {len(wrong)} tensors, such as {wrong[0]}")
    return model.to(device).eval()


class Qwen25Omni:
    """Qwen2.5-Omni. A new family is such a class in FAMILIES."""

    repository, revision = "Qwen/Qwen2.5-Omni-7B", "main"
    model_types = ("qwen2_5_omni", "qwen2_5_omni_thinker")
    model_class = transformers.Qwen2_5OmniThinkerForConditionalGeneration
    feature_extractor_class = transformers.WhisperFeatureExtractor
    before_user = f"<|im_start|>system\n{SYSTEM_PROMPT}<|im_end|>\n<|im_start|>user\n"
    after_user = "<|im_end|>\n<|im_start|>assistant\n"
    before_audio, after_audio = "<|audio_bos|>", "<|audio_eos|>"
    end_of_turn = ("<|im_end|>", "<|endoftext|>")
    load = staticmethod(partial(load_model, model_class))  # a full checkpoint's thinker only

    @staticmethod
    def placeholders(config):
        """Ids that stand for a clip, an image or a video in a prompt."""
        return [config.audio_token_id, config.image_token_id, config.video_token_id]

    @staticmethod
    def features(feature_extractor, waveform):
        """A clip [T] -> mel spectrogram [frames, 128]. One at a time: no padding leaks into it."""
        return feature_extractor(waveform.numpy(), sampling_rate=SAMPLE_RATE, padding="longest",
                                 return_tensors="pt").input_features[0].T

    @staticmethod
    def encode(model, mels):
        """Spectrograms -> list of audio embeddings [25 per second, H]. The encoder packs them end to end."""
        frames = torch.tensor([len(mel) for mel in mels])
        mel = nn.utils.rnn.pad_sequence(mels, batch_first=True).transpose(1, 2)  # [clips, 128, frames]
        mask = (torch.arange(mel.shape[2]) < frames[:, None]).long()  # [clips, frames]
        mel, mask = mel.to(model.device, model.dtype), mask.to(model.device)
        output = model.get_audio_features(mel, mask, return_dict=True)
        tokens = ((frames - 1) // 2 - 1) // 2 + 1  # a convolution of stride 2, then the mean of two
        return output.last_hidden_state.split(tokens.tolist())


class Phi4Multimodal:
    """Phi-4-multimodal. The main branch is remote code; transformers' own class loads refs/pr/70."""

    repository, revision = "microsoft/Phi-4-multimodal-instruct", "refs/pr/70"
    model_types = ("phi4_multimodal", "phi4mm")  # the latter on the main branch
    model_class = transformers.Phi4MultimodalForCausalLM
    feature_extractor_class = transformers.Phi4MultimodalFeatureExtractor
    before_user, after_user = f"<|system|>{SYSTEM_PROMPT}<|end|><|user|>", "<|end|><|assistant|>"
    before_audio = after_audio = ""
    end_of_turn = ("<|end|>", "<|endoftext|>")

    @staticmethod
    def load(path, **options):
        """The model with its speech-lora merged, W += (alpha / r) B A, or it hears badly."""
        fetch = partial(transformers.utils.cached_file, path, **options)
        settings = json.loads(Path(fetch("speech-lora/adapter_config.json")).read_text())
        tensors = load_file(fetch("speech-lora/adapter_model.safetensors"))
        model = load_model(transformers.Phi4MultimodalForCausalLM, path, **options)
        for name in [name for name in tensors if name.endswith(".lora_A.weight")]:
            layer = model.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
            A, B = (tensors[name.replace("lora_A", x)].float().to(DEVICE) for x in ("lora_A", "lora_B"))
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
        """Features -> list of audio embeddings [12.5 per second, H]. One at a time, not padded."""
        audio, embeds = model.get_decoder().embed_tokens_extend.audio_embed, []
        for features in clips:
            n = int(features.audio_embed_sizes)
            # Its forward writes the embeddings over placeholder tokens: give it those alone.
            ids = torch.full((1, n), model.config.audio_config.audio_token_id, device=model.device)
            blank = torch.zeros(1, n, model.config.hidden_size, device=model.device, dtype=model.dtype)
            embeds += audio(ids, blank, features.audio_input_features, features.audio_embed_sizes)
        return embeds


FAMILIES = (Qwen25Omni, Phi4Multimodal)


def family_of(path):
    """The family of a model directory or hub name, by the model_type in its config.json."""
    known = {name: family for family in FAMILIES for name in family.model_types}
    model_type = transformers.PretrainedConfig.get_config_dict(path)[0].get("model_type")
    if model_type not in known:
        raise SystemExit(f"{path} is no speech LLM: config.json needs a model_type of {', '.join(known)}")
    return known[model_type]


# ==== 9. Questions and clips ====
def load_questions(path):
    """What data_prep.py wrote, audio left as encoded bytes: decoding would need FFmpeg."""
    questions = datasets.load_from_disk(path).cast_column("audio", datasets.Audio(decode=False))
    for key, options, index in zip(questions["key"], questions["options"], questions["answer_index"], strict=True):
        if len(options) != 4 or index not in range(4):
            raise SystemExit(f"{path}: {key} has {len(options)} options, not 4, or answer_index {index}")
    return questions


def read_clip(data, key="clip"):
    """WAV bytes as data_prep.py writes them, 16-bit mono at 16 kHz -> float32 [T] in -1..1."""
    with wave.open(BytesIO(data)) as clip:
        kind = clip.getframerate(), clip.getsampwidth(), clip.getnchannels()
        samples = np.frombuffer(clip.readframes(clip.getnframes()), "<i2")
    if kind != (SAMPLE_RATE, 2, 1) or not 0.1 <= len(samples) / SAMPLE_RATE <= 300:
        raise SystemExit(f"{key} is no 16-bit mono WAV at 16 kHz of 0.1 to 300 s: see data_prep.py")
    return torch.from_numpy(samples.astype(np.float32) / 2**15)


# ==== 10. Logs, adapter files and checkpoints ====
def step_means(terms, letters, references):
    """Means of a step for the log. terms: {name: [B, M, G/2]}, as many letters, references [B, G/2]."""
    unparsed = torch.tensor([letter is None for letter in letters]).view(terms["reward"].shape)
    no_spread = terms["reward"].amax(-1) - terms["reward"].amin(-1) < 1e-6  # [B, M]
    means = {f"spread_{name}": terms[name][:, SPEECH].std(-1).mean().item() for name in ("rep", "beh")}
    means["no_reference"] = (references[:, 0] < 0).float().mean().item()
    for m, modality in enumerate(MODALITIES):
        for name, x in (terms | {"unparsed": unparsed, "no_spread": no_spread}).items():
            if m != TEXT or name not in ("rep", "beh"):  # written answers earn neither
                means[f"{name}_{modality}"] = x[:, m].float().mean().item()
    return means


def first_group(question, completions, terms, references):
    """A step's first group. terms: acc, fmt, base, rep, beh, reward, advantage [B, M, G/2], references [B, G/2]."""
    group = {key: question[key] for key in ("key", "question", "options", "answer_index")}
    said = iter(completions)  # in the order of the loops
    for m, modality in enumerate(MODALITIES):
        group[modality] = []
        for s, reference in enumerate(references[0].tolist()):
            answer = {"completion": next(said)} | {name: x[0, m, s].item() for name, x in terms.items()}
            group[modality].append(answer | ({"reference": reference} if m != TEXT else {}))
    return group


def show_group(step, group):
    """A group's first spoken answer and its reference, each above its rewards."""
    spoken = group["speech"][0]
    shown = [spoken] if spoken["reference"] < 0 else [spoken, group["text"][spoken["reference"]]]
    lines = [f"step {step}, {group['key']}: {group['question']} ({LETTERS[group['answer_index']]})"]
    for modality, answer in zip(MODALITIES, shown, strict=False):
        rewards = [f"{term} {answer[term]:.2f}" for term in ("acc", "fmt", "rep", "beh", "reward", "advantage")]
        lines += [f"  {modality:<8}{' '.join(answer['completion'].split())[:400]}", " " * 10 + "  ".join(rewards)]
    return "\n".join(lines)


def append_line(path, values):
    """Append one JSON line; only the first process writes files."""
    if RANK == 0:
        with open(path, "a") as file:
            print(json.dumps(values), file=file)


def write_aside(path, content):
    """Write bytes, or a dict as JSON, aside, then rename: `path` is never half-written."""
    if RANK == 0:
        content = content if isinstance(content, bytes) else json.dumps(content, indent=2).encode()
        Path(f"{path}.part").write_bytes(content)
        os.replace(f"{path}.part", path)


def save_adapter(lm, cfg):
    """Write adapter_model.safetensors and adapter_config.json as PEFT does."""
    layers = {name: m for name, m in lm.model.named_modules() if isinstance(m, LoRALinear)}
    write_aside(Path(cfg.out) / "adapter_model.safetensors", save({
        f"base_model.model.{name}.{matrix}.weight": getattr(m, matrix).detach().contiguous().cpu()
        for name, m in layers.items() for matrix in ("lora_A", "lora_B")}))
    write_aside(Path(cfg.out) / "adapter_config.json", {
        "peft_type": "LORA", "base_model_name_or_path": cfg.model, "r": cfg.lora_rank, "lora_alpha": cfg.lora_alpha,
        "lora_dropout": 0.0, "bias": "none", "inference_mode": True,
        "target_modules": list(layers),  # full names: the audio encoder has q_proj too
    })


def save_checkpoint(optimizer, state, cfg):
    """Write `state` with trained weights, AdamW's moments and the sizes of the logs."""
    sizes = {log.name: log.stat().st_size for log in Path(cfg.out).glob("*.jsonl")}
    trained = [p.data for p in optimizer.param_groups[0]["params"]]
    torch.save(state | {"sizes": sizes, "trained": trained, "optimizer": optimizer.state_dict()}, buffer := BytesIO())
    write_aside(Path(cfg.out) / "checkpoint.pt", buffer.getvalue())


# May differ in a resumed run: no step depends on them beyond rounding; data has a fingerprint.
FREE = {"out", "resume", "data", "eval_data", "save_every", "eval_every", "sample_every", "aux_device",
        "base_text_accuracy", "tokens_per_micro_batch", "eval_batch", "gradient_checkpointing"}


def open_run(cfg, content):
    """The state of the run in cfg.out: its checkpoint's, or a new run's. content: fingerprints of its data."""
    path, run = Path(cfg.out) / "checkpoint.pt", asdict(cfg) | content | {"processes": RANKS}
    if not any(file.suffix != ".part" for file in Path(cfg.out).glob("*")):
        return {"run": run, "step": 0, "skipped": 0, "before": None, "after": None}
    if not (cfg.resume and path.exists()):
        raise SystemExit(f"{cfg.out} exists: continue with --resume, or give another --out")
    state = torch.load(path, map_location="cpu", weights_only=True)
    if other := sorted(name for name in run if name not in FREE and run[name] != state["run"].get(name)):
        raise SystemExit(f"--resume: {path} was made with other settings or data: {', '.join(other)}")
    for log in Path(cfg.out).glob("*.jsonl") if RANK == 0 else ():
        os.truncate(log, state["sizes"].get(log.name, 0))  # what follows is done again
    return state | {"run": run}


# ==== 11. Several processes under torchrun: rank r takes questions r, r + RANKS, ... ====
def sum_over_ranks(x):
    """A tensor -> its sum over all processes."""
    if RANKS > 1:
        dist.all_reduce(x)
    return x


def mean_over_ranks(metrics):
    """Numbers of this process -> their means over all."""
    means = sum_over_ranks(torch.tensor(list(metrics.values()), dtype=torch.float64, device=DEVICE)) / RANKS
    return dict(zip(metrics, means.tolist(), strict=True))


# ==== 12. The command ====
def parse_config(arguments=None):
    """Command line -> Config. The offline demo is built if its model is asked for but missing."""
    parser = transformers.HfArgumentParser(Config)
    model = Path(parser.parse_args(arguments).model)
    if str(model) == Config.model and not model.exists():
        print(f"{model.parent} does not exist: building the offline demo (once, some minutes)")
        build = [Path(__file__).with_name("data_prep.py"), "demo", "--out", model.parent]
        subprocess.run([sys.executable, *build], check=True)
    if (model / "tars_config.json").exists():
        own = json.loads((model / "tars_config.json").read_text())
        parser.set_defaults(**own | {k: os.path.normpath(model / own[k]) for k in ("data", "eval_data") if k in own})
    return Config(**vars(parser.parse_args(arguments)))


def main(arguments=None):
    """Evaluate, train, evaluate again, and print the gap."""
    cfg = parse_config(arguments)
    if RANKS > 1:  # under torchrun: a GPU each, and only the first prints
        if DEVICE == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(timeout=timedelta(days=1))  # ranks wait for each other
        sys.stdout = sys.stdout if RANK == 0 else open(os.devnull, "w")
    questions, eval_questions = load_questions(cfg.data), load_questions(cfg.eval_data)
    content = {"content of --data": questions._fingerprint, "content of --eval-data": eval_questions._fingerprint}
    state = open_run(cfg, content)
    known = set(questions["question"])
    if seen := sum(question in known for question in eval_questions["question"]):
        print(f"{seen} of {len(eval_questions)} questions of --eval-data are in --data too: not held out")
    embedder, extract = load_embedder(cfg) if cfg.beta else None, load_extractor(cfg)
    lm = SpeechLM.from_pretrained(cfg.model)
    optimizer = make_trainable(lm, cfg)
    if "trained" in state:
        for p, saved in zip(optimizer.param_groups[0]["params"], state.pop("trained"), strict=True):
            p.data.copy_(saved)
        optimizer.load_state_dict(state.pop("optimizer"))
    sum_over_ranks(torch.zeros(1, device=DEVICE))  # a barrier: all looked at --out
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    save_checkpoint(optimizer, state, cfg)
    write_aside(f"{cfg.out}/config.json", asdict(cfg))
    if not state["before"]:  # LoRA's B is still 0: this is the base model
        state["before"] = evaluate(lm, eval_questions, extract, cfg)
        save_checkpoint(optimizer, state, cfg)
    train(lm, questions, eval_questions, embedder, extract, optimizer, state, cfg)
    before, after, n = state["before"], state["after"], len(eval_questions)
    base_text = cfg.base_text_accuracy / 100 or before["text"]
    mrr = [modality_recovery_rate(accuracy["speech"], base_text) for accuracy in (before, after)]
    write_aside(f"{cfg.out}/summary.json", {
        **{f"base_{name}": value for name, value in before.items()}, **after, "mrr_before": mrr[0],
        "mrr_after": mrr[1], "n": n, "content": list(content.values())})
    print(f"\n{n} held-out questions".ljust(28) + f"{'speech %':>10}{'text %':>10}{'MRR %':>10}")
    for name, accuracy, rate in zip(("before", "after"), (before, after), mrr, strict=True):
        print(f"{name:<27}{100 * accuracy['speech']:>10.1f}{100 * accuracy['text']:>10.1f}{rate:>10.1f}")
    print(f"adapter, log and samples are in {cfg.out}/")
    if RANKS > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
