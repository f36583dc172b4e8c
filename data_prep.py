"""Questions in, spoken questions out: `python data_prep.py SOURCE --out DIR`.

  demo              sums spoken by a formant synthesiser, and the base model that tars.py trains by default; offline
  tars              the authors' own training set: MMLU questions with speech, ready made
  mmlu              the same made here: cais/mmlu, spoken by facebook/mms-tts-eng, checked by Whisper
  voicebench-mmsu   the paper's first evaluation set
  voicebench-obqa   its second
  csv               one's own questions: columns question, A, B, C, D, answer (a letter), and wav if they are recorded

Every source writes `datasets` directories with the columns key, question, options, answer_index, prompt_for_tts and
audio (16 kHz mono WAV bytes), seconds, and where they are known tts_wer and category; tars.py and eval.py read them
with load_questions. A source's rows come from the hub or, with --origin, from local files of the same layout.
"""

import argparse
import csv
import io
import json
import math
import re
import shutil
import unicodedata
import wave
from collections import Counter, namedtuple
from itertools import pairwise, product
from pathlib import Path

import datasets
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchaudio
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

import tars
from tars import DEVICE, LETTERS, SAMPLE_RATE, SYSTEM_PROMPT, Qwen25Omni, SpeechLM, load_model, read_clip, write_aside

# ==== 1. The demo's questions: two-step sums over 0..9, four options ==================================================
# The demo needs no download. The questions are two-step sums, a small formant synthesiser speaks them, and the base
# model is a Qwen2.5-Omni thinker of 1.2 M parameters. It is trained as speech LLMs are: first the LLM learns to reason
# in writing; then it is frozen, and audio encoder and projector learn to feed it. Stage 2 is stopped early on purpose:
# the model then reasons well in writing and badly in speech, which is the gap that TARS closes.
DIGITS = "zero one two three four five six seven eight nine".split()
SIGNS = {"plus": 1, "minus": -1}


def work_out(expression):
    """(a, sign, b, sign, c, ...) -> its steps, each (value so far, sign, number, new value)."""
    value, *rest = expression
    steps = []
    for sign, number in zip(rest[::2], rest[1::2], strict=True):
        steps.append((value, sign, number, value + SIGNS[sign] * number))
        value = steps[-1][3]
    return steps


# All (a, sign, b, sign, c) whose value is within 0..9 after each step: 1,210 of them.
SUMS = [expression for expression in product(range(10), SIGNS, range(10), SIGNS, range(10))
        if all(0 <= value <= 9 for *_, value in work_out(expression))]


def sum_question(expression, letter, rng, key):
    """One row (without audio), with the right answer under `letter` (0..3)."""
    result = work_out(expression)[-1][3]
    values = rng.choice([v for v in range(10) if v != result], 4, replace=False)
    values[letter] = result
    options = [DIGITS[v] for v in values]
    question = " ".join(x if x in SIGNS else DIGITS[x] for x in expression)
    spoken = f"{question}. " + ", ".join(f"{name} {option}" for name, option in zip(LETTERS, options, strict=True))
    return {"key": key, "question": question, "options": options, "answer_index": letter, "prompt_for_tts": spoken}


def in_steps(expression, worked_out=1.0, rng=None):
    """The thought: five minus one is four. four plus two is six
    With a probability of 1 - worked_out both steps are done in the head: five minus one plus two is six
    """
    thought = ". ".join(f"{DIGITS[value]} {sign} {DIGITS[number]} is {DIGITS[new]}"
                        for value, sign, number, new in work_out(expression))
    in_the_head = worked_out < 1 and rng.random() >= worked_out
    return re.sub(r" is (\w+)\. \1", "", thought) if in_the_head else thought


def worked_answer(thought, letter):
    """What the base model learns to write; `letter` is 0..3."""
    return f"<think>{thought} {LETTERS[letter]}</think><answer>The answer is {LETTERS[letter]}.</answer>"


# ==== 2. The demo's voice: each letter of a word is a triple of formants ==============================================
# Spread over the vowel plane by an irrational step, so that no two letters share a triple.
FORMANTS = {letter: (250 + 650 * (i * 0.618 % 1), 950 + 1450 * (i * 0.382 % 1), 2500 + 1200 * (i * 0.786 % 1))
            for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz")} | {None: (500.0, 1500.0, 2500.0)}  # silence


def speak(text, rng):
    """A text in letters -> (waveform float32 [T] at 16 kHz, [(word, end in seconds)]). Speaker and noise are drawn."""
    pitch, speed, tract = rng.uniform(90, 240), rng.uniform(0.9, 1.15), rng.uniform(0.93, 1.08)
    snr, gain = rng.uniform(12, 28), rng.uniform(-20, 0)
    segments, ends, now = [(None, 0.08)], [], 0.08  # (letter or None for silence, seconds)
    for word in text.lower().split():
        spoken = word.strip(".,")
        seconds = (0.03 + 0.010 * len(spoken)) / speed
        segments += [(letter, seconds / len(spoken)) for letter in spoken]
        now += seconds
        ends.append((spoken, now))
        pause = (0.05 if word != spoken else 0.01) / speed
        segments.append((None, pause))
        now += pause
    lengths = [round(seconds * SAMPLE_RATE) for _, seconds in segments]

    def track(values):
        return np.repeat(np.array(values, np.float32), lengths, axis=0)

    formants = tract * track([FORMANTS[letter] for letter, _ in segments])  # [T, 3]
    voiced = track([1.0 if letter in {*"aeiou"} else 0.25 for letter, _ in segments])  # [T]
    loud = track([0.0 if letter is None else 1.0 for letter, _ in segments])
    smooth = np.hanning(161).astype(np.float32)
    smooth /= smooth.sum()
    formants = np.stack([np.convolve(np.pad(f, 80, "edge"), smooth, "valid") for f in formants.T])  # [3, T], gliding
    loud = np.convolve(loud, smooth, "same")
    time = np.arange(len(loud)) / SAMPLE_RATE
    pulses = (0.5 + 0.5 * np.cos(2 * np.pi * pitch * time)) ** 4  # glottal pulses, as an envelope
    breath = np.abs(rng.standard_normal(len(loud)))
    carriers = np.sin(2 * np.pi * np.cumsum(formants, axis=1) / SAMPLE_RATE)  # [3, T]
    wave_ = loud * (voiced * pulses + (1 - voiced) * 0.5 * breath) * (np.array([1.0, 0.7, 0.5]) @ carriers)
    level = np.sqrt(np.mean(wave_**2))
    wave_ = wave_ + level * 10 ** (-snr / 20) * rng.standard_normal(len(wave_))
    return (wave_ / np.abs(wave_).max() * 0.9 * 10 ** (gain / 20)).astype(np.float32), ends


def wav_bytes(waveform):
    """Waveform [T] in -1..1, 16 kHz -> 16-bit mono WAV file as bytes."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as clip:
        clip.setparams((1, 2, SAMPLE_RATE, 0, "NONE", ""))  # channels, bytes a sample, samples a second
        clip.writeframes((np.asarray(waveform) * 32767).astype("<i2").tobytes())
    return buffer.getvalue()


# ==== 3. The demo's base model ========================================================================================
PAUSE = " …"  # what the LLM's own vocabulary has for silence


def demo_tokenizer(rng):
    """Every word of the demo (with the space before it), mark and tag is one token; decoding gives the exact string."""
    texts = [Qwen25Omni.before_user.replace(SYSTEM_PROMPT, ""), Qwen25Omni.after_user, "<think>that", PAUSE]
    for i, expression in enumerate(SUMS):
        texts.append(tars.written_question(sum_question(expression, i % 4, rng, "")))
        texts.append(worked_answer(in_steps(expression), i % 4))
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>",
               "<|IMAGE|>", "<|VIDEO|>"]
    piece = r"(?:system|user|assistant)\n|</?(?:think|answer)>|Option [ABCD]:| ?[\w…]+|\n+|[^\w\s]"
    split = pre_tokenizers.Split(Regex(piece), "isolated")
    pieces = sorted({piece for text in texts for piece, _ in split.pre_tokenize_str(text)})
    # The system prompt never changes: as one token it leaves the demo's short prompts short.
    vocabulary = {token: i for i, token in enumerate([*control, "<unk>", SYSTEM_PROMPT, *pieces])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = split, decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    tokenizer.add_tokens([AddedToken(SYSTEM_PROMPT, normalized=False)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|endoftext|>",
                                                eos_token="<|im_end|>", unk_token="<unk>")


def demo_model(tokenizer):
    """An untrained thinker of Qwen2.5-Omni's own class with about 1.2 M parameters."""
    token = tokenizer.convert_tokens_to_ids
    return transformers.Qwen2_5OmniThinkerForConditionalGeneration(transformers.Qwen2_5OmniThinkerConfig(
        text_config=dict(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4,
            num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=2048, initializer_range=0.12,
            tie_word_embeddings=False,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}),
        audio_config=dict(
            d_model=128, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=256, num_mel_bins=128,
            n_window=100, output_dim=128, initializer_range=0.1),
        vision_config=dict(  # unused, as small as it goes
            depth=1, hidden_size=16, intermediate_size=16, num_heads=2, patch_size=2, temporal_patch_size=1,
            out_hidden_size=128, fullatt_block_indexes=[0]),
        audio_token_index=token("<|AUDIO|>"), image_token_index=token("<|IMAGE|>"),
        video_token_index=token("<|VIDEO|>"), audio_start_token_id=token("<|audio_bos|>"),
        audio_end_token_id=token("<|audio_eos|>"), vision_start_token_id=token("<|IMAGE|>"), initializer_range=0.12))


def lesson(expressions, rng, learnt):
    """24 exercises (kind, expression) when the share `learnt` of stage 1 is over.
    "look up": the result is given, only its letter must be found. It comes first and alone: mixed with sums from the
    start it is learnt much later. "add": six sums in a row and no question, so that the LLM takes each sum from the
    words just written; from the questions alone it memorises. "solve": the whole task, twice with a single sum.
    """

    def draw(kind, count):
        return [(kind, expressions[i]) for i in rng.integers(len(expressions), size=count)]

    if learnt < 0.28:
        return draw("look up", 24)
    chains = []
    for values in rng.integers(10, size=(6, 7)):
        steps = [("minus" if new < value else "plus", abs(new - value)) for value, new in pairwise(values)]
        chains.append(("add", (values[0], *(x for step in steps for x in step))))
    return (draw("look up", 5) + chains + draw("solve", 11) +
            [("solve", expression[:3]) for _, expression in draw("solve", 2)])


def text_batch(tokenizer, exercises, rng, pauses, worked_out=1.0):
    """Training rows for the LLM -> ids, attention mask and loss weights, each [rows, T].
    With `pauses` above 0 the questions look like speech: no line breaks, and up to that many pause tokens a word on
    average. This makes the LLM robust to audio embeddings, most of which stand for no word.
    """
    token = tokenizer.convert_tokens_to_ids
    letters = [token(f" {letter}") for letter in LETTERS]
    breaks = (token("\n"), token("\n\n"))
    rate = rng.uniform(0, pauses)
    rows = []
    for kind, expression in exercises:
        letter = int(rng.integers(4))
        question = sum_question(expression, letter, rng, key="")
        thought = in_steps(expression, worked_out if kind == "solve" else 1.0, rng)
        if kind == "look up":
            question["question"] = question["options"][letter]
            thought = f"that is {question['question']}"
        user = tokenizer(tars.written_question(question)).input_ids
        if pauses:
            user = [t for u in user if u not in breaks for t in [token(PAUSE)] * rng.poisson(rate) + [u]]
        answer = tokenizer(worked_answer(thought, letter) + Qwen25Omni.end_of_turn[0]).input_ids
        # The option's letter is the hard part and only one token of twenty: it has three times the weight.
        weights = [3.0 if t in letters else 1.0 for t in answer]
        if kind == "add":  # the results alone count
            user, answer = [], tokenizer(f"<think>{thought}").input_ids
            weights = [float(before == token(" is")) for before in [None, *answer[:-1]]]
        prompt = tokenizer(Qwen25Omni.before_user).input_ids + user + tokenizer(Qwen25Omni.after_user).input_ids
        ids, weights = torch.tensor(prompt + answer), torch.tensor([0.0] * len(prompt) + weights)
        rows.append((ids, torch.ones_like(ids), weights))
    return [nn.utils.rnn.pad_sequence(x, batch_first=True) for x in zip(*rows, strict=True)]


class Muon(torch.optim.SGD):
    """Muon in float32: torch.optim.Muon computes in bfloat16, which takes many times as long on a CPU without it."""

    def step(self):
        """Each matrix moves by its momentum with all singular values near 1; rate and weight decay are SGD's."""
        for p in self.param_groups[0]["params"]:
            momentum = self.state[p].setdefault("momentum", torch.zeros_like(p)).lerp_(p.grad, 0.05)
            x = p.grad.lerp(momentum, 0.95)
            x = x.T if len(p) > p.shape[1] else x
            x = x / x.norm().clamp(min=1e-7)
            for _ in range(5):  # Newton-Schulz
                gram = x @ x.T
                x = 3.4445 * x + (2.0315 * gram @ gram - 4.775 * gram) @ x
            p.grad = 0.2 * max(p.shape) ** 0.5 * (x.T if len(p) > p.shape[1] else x)
        super().step()


def train_llm(model, tokenizer, expressions, rng, steps, worked_out):
    """Stage 1: teach the LLM to look options up, then to reason in writing.
    Muon learns the matrices of the layers, in half the steps that AdamW takes; AdamW learns the rest. Without strong
    weight decay the LLM memorises the training sums and fails on new ones.
    """
    decoder, embeddings = model.get_decoder(), model.get_input_embeddings()
    matrices = [p for p in decoder.layers.parameters() if p.ndim == 2]
    others = [embeddings.weight, model.lm_head.weight, *(p for p in decoder.parameters() if p.ndim == 1)]
    muon = Muon(matrices, weight_decay=0.3)
    adamw = torch.optim.AdamW(others, weight_decay=0.3)
    bar = tqdm(range(steps), desc="base model 1/2: LLM learns to reason in writing", unit="step")
    for step in bar:
        pauses = 0.8 * min(1.0, max(0.0, (step / steps - 0.1) / 0.2)) if step % 2 else 0.0
        exercises = lesson(expressions, rng, step / steps)
        ids, mask, weights = text_batch(tokenizer, exercises, rng, pauses, worked_out)
        hidden = decoder(inputs_embeds=embeddings(ids), attention_mask=mask, use_cache=False).last_hidden_state
        answer = weights[:, 1:] > 0
        nll = F.cross_entropy(model.lm_head(hidden[:, :-1][answer]), ids[:, 1:][answer], reduction="none")
        loss = (nll * weights[:, 1:][answer]).sum() / weights.sum()
        for optimizer, peak in ((muon, 5e-3), (adamw, 2e-3)):
            optimizer.param_groups[0]["lr"] = peak * min(1, (step + 1) / 20, (1 - step / steps) / 0.4)
        descend(loss, muon, adamw)
        bar.set_postfix_str(f"loss {loss.item():.3f}")


def descend(loss, *optimizers):
    """One step of the optimizers, with the gradient clipped to norm 1."""
    loss.backward()
    nn.utils.clip_grad_norm_([p for optimizer in optimizers for p in optimizer.param_groups[0]["params"]], 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def spoken_question(expression, letter, rng, key):
    """One complete row, and for each spoken word the token it stands for and when it ends."""
    row = sum_question(expression, letter, rng, key)
    waveform, ends = speak(row["prompt_for_tts"], rng)
    words = [row["question"].split()[0]] + [f" {word}" for word, _ in ends[1:]]
    words = [f"Option {word.strip().upper()}:" if len(word) == 2 else word for word in words]
    row |= {"audio": {"bytes": wav_bytes(waveform), "path": None}, "seconds": len(waveform) / SAMPLE_RATE}
    return row, [(word, end) for word, (_, end) in zip(words, ends, strict=True)]


def nearness_loss(states, targets, table, pause):
    """How far audio embeddings [n, H] are from the word embeddings of their targets [n]; pauses weigh a fifth.
    Cross-entropy against the embedding table plus squared distance.
    """
    weight = torch.where(targets == pause, 0.2, 1.0)
    named = F.cross_entropy(states @ table.T, targets, reduction="none")
    return ((named + (states - table[targets]).square().mean(-1)) * weight).sum() / weight.sum()


def answer_loss(lm, spoken, answers):
    """Mean loss of the worked answers' tokens under the spoken prompts; both are lists, [n, H] and [C] a question."""
    table = lm.model.get_input_embeddings().weight  # [V, H]
    before = table[lm.tokenizer(lm.family.before_user + lm.family.before_audio).input_ids]  # [tokens, H]
    after = table[lm.tokenizer(lm.family.after_audio + lm.family.after_user).input_ids]  # [tokens, H]
    rows = [torch.cat([before, clip, after, table[answer]]) for clip, answer in zip(spoken, answers, strict=True)]
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)  # padded on the right, which causal attention ignores
    hidden = lm.decoder(inputs_embeds=padded, use_cache=False).last_hidden_state
    predicts = [h[len(row) - len(a) - 1 : len(row) - 1] for h, row, a in zip(hidden, rows, answers, strict=True)]
    return F.cross_entropy(lm.model.lm_head(torch.cat(predicts)), torch.cat(answers))


@torch.no_grad()
def spoken_accuracy(lm, questions):
    """Share of spoken questions that greedy answers get right."""
    right = 0
    for batch in tars.question_batches(questions, 64, "stage 2, accuracy"):
        prompts = [[lm.prompt(turn)] for turn in lm.spoken_turns(batch)]  # b lists of one prompt [P, H]
        completions = lm.detokenize(*lm.rollout(prompts, 1, 26, temperature=0)[:2])
        right += tars.judge(batch, completions, tars.extract_answers)[1].sum().item()
    return right / len(questions)


def train_encoder(lm, rows, words, answers, val, rng, steps, stop_at):
    """Stage 2, the LLM frozen: audio encoder and projector are aligned with the LLM's embeddings, and stopped early.
    For the first third of the steps each audio embedding is aligned with a word embedding of the LLM: that of the word
    where a word ends, that of the pause elsewhere. Then the loss of the worked answer is added, at a twentieth of the
    learning rate, because it learns fast. Training stops when the accuracy on the spoken questions `val` reaches
    `stop_at`; a quarter of them tells when it is worth asking all.
    """
    lm.model.requires_grad_(False)
    tower = [p.requires_grad_(True) for name, p in lm.model.named_parameters() if "audio_tower" in name]
    optimizer = torch.optim.AdamW(tower, lr=3e-3)
    table, token = lm.model.get_input_embeddings().weight, lm.tokenizer.convert_tokens_to_ids
    pause, accuracy, order = token(PAUSE), 0.0, []
    answers = [torch.tensor(lm.tokenizer(answer + lm.family.end_of_turn[0]).input_ids) for answer in answers]
    bar = tqdm(range(1, steps + 1), desc="base model 2/2: encoder and projector, LLM frozen", unit="step")
    for step in bar:
        order = order if len(order) >= 16 else order + rng.permutation(len(rows)).tolist()
        batch, order = order[:16], order[16:]
        waveforms = [read_clip(rows[i]["audio"]["bytes"]) for i in batch]  # 16 of [samples]
        features = [lm.family.features(lm.feature_extractor, waveform) for waveform in waveforms]
        clips = lm.family.encode(lm.model, features)  # 16 of [tokens, H]
        states, counts = torch.cat(clips), [len(clip) for clip in clips]  # [n, H]
        targets = torch.full((len(states),), pause)
        for start, i, count in zip(np.cumsum([0, *counts]), batch, counts, strict=False):
            for word, end in words[i]:
                targets[start + min(count - 1, int(25 * end))] = token(word)
        loss = nearness_loss(states, targets, table, pause)
        if step > steps // 3:
            loss = loss + answer_loss(lm, clips, [answers[i] for i in batch])
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, step / 20) * (0.05 if step > steps // 3 else 1)
        descend(loss, optimizer)
        if step >= steps // 6 and step % 5 == 0:
            accuracy = spoken_accuracy(lm, val[: math.ceil(len(val) / 4)])
            if accuracy >= stop_at and (accuracy := spoken_accuracy(lm, val)) >= stop_at:
                break
        bar.set_postfix_str(f"loss {loss.item():.2f}, speech accuracy {100 * accuracy:.0f} %")
    bar.close()
    print(f"stage 2 ended after step {step}: {100 * accuracy:.1f} % of {len(val)} spoken validation questions right")


# ==== 4. The demo as a whole ==========================================================================================
# tars.py's defaults for this model instead of the paper's, saved beside it as tars_config.json. Within a group R_rep
# and R_beh of these short answers have a standard deviation of 0.03, and R_acc is 0 or 1: hence weights of 10.
DEMO_SETTINGS = {
    "data": "../train", "eval_data": "../test", "embedder": "ngrams", "questions_per_step": 16, "max_new_tokens": 26,
    "steps": 160, "lr": 1.6e-3, "alpha": 10.0, "beta": 10.0, "gradient_checkpointing": False, "eval_batch": 64,
}


def demo(args):
    """The offline demo under args.out: model/ (the base model), train/, val/ and test/ (spoken questions)."""
    out, rng = Path(args.out), np.random.default_rng(args.seed)
    torch.manual_seed(args.seed)
    sums = [SUMS[i] for i in rng.permutation(len(SUMS))]
    parts = {"test": (sums[:256], args.test_clips), "val": (sums[256:384], args.val_clips),
             "train": (sums[384:], args.train_clips)}  # no sum is in two parts
    rows, words, answers = {}, {}, {}
    for part, (chosen, clips) in parts.items():
        asked = [(chosen[i % len(chosen)], i % 4) for i in range(clips)]  # as many right answers under each letter
        spoken = [spoken_question(expression, letter, rng, f"{part}-{i}")
                  for i, (expression, letter) in enumerate(tqdm(asked, desc=f"speaking {part} questions", unit="clip"))]
        rows[part], words[part] = map(list, zip(*spoken, strict=True))
        answers[part] = [worked_answer(in_steps(expression, args.worked_out, rng), letter)
                         for expression, letter in asked]

    tokenizer = demo_tokenizer(rng)
    model = demo_model(tokenizer)
    train_llm(model, tokenizer, sums[384:], rng, args.text_steps, args.worked_out)
    feature_extractor = transformers.WhisperFeatureExtractor(feature_size=128, chunk_length=300)
    lm = SpeechLM(Qwen25Omni, model, tokenizer, feature_extractor)
    train_encoder(lm, rows["train"], words["train"], answers["train"], rows["val"], rng, args.speech_steps,
                  args.stop_at)

    aside = out.with_name(out.name + ".demo.part")  # renamed when all of it is written
    for part in parts:
        questions = datasets.Dataset.from_list(rows[part]).cast_column("audio", datasets.Audio(decode=False))
        questions.save_to_disk(aside / part)
    for piece in (model, tokenizer, feature_extractor):
        piece.save_pretrained(aside / "model")
    write_aside(aside / "model" / "tars_config.json", DEMO_SETTINGS)
    aside.rename(out)
    print(f"{out}: base model, {len(rows['train'])} training and {len(rows['test'])} test questions")


# ==== 5. Real questions: one function a source, which converts a row ==================================================
class Lost(Exception):
    """A row that is left out, for a reason. Rows are counted by it; what was found is printed with the row's key."""


def cell_text(cell, what):
    """A cell that must hold text, stripped. Raises Lost if it holds something else, or nothing that a person sees."""
    if not isinstance(cell, str) or all(unicodedata.category(c)[0] in "CZ" for c in cell):  # spaces, control characters
        raise Lost(f"no text as {what}", repr(cell))
    return cell.strip()


def checked(question, options, answer, prompt=""):
    """The text columns of a row. Raises Lost unless it is a question with four options and an answer.
    answer: an index from 0 to 3, or a letter as people write it: B, b, "B.", "(B)". prompt: what was read aloud; else
    it will be question and options as they are written, blanks as words.
    """
    if not isinstance(options, list) or len(options) != 4:
        raise Lost("other than four options", repr(options))
    letter = re.fullmatch(r"\W*([A-Da-d])\W*", answer) if isinstance(answer, str) else None
    index = LETTERS.index(letter[1].upper()) if letter else answer
    if type(index) is not int or index not in range(4):  # neither True nor 1.0 is an index
        raise Lost("the answer is none of the options", repr(answer))
    options = [cell_text(option, "option") for option in options]
    if len(set(options)) < 4:
        raise Lost("two equal options", repr(options))
    ours = {"question": cell_text(question, "question"), "options": options, "answer_index": index}
    aloud = prompt or tars.written_question(ours | {"question": without_blanks(ours["question"])})
    return ours | {"prompt_for_tts": aloud, "tts_wer": None, "category": None}


def decode_clip(audio, max_seconds=300.0):
    """{"bytes", "path"} of an audio file, of which one is enough -> float32 mono waveform [T] at 16 kHz, in -1..1.
    Raises Lost if there is none, or one that is unreadable, silent, too short or too long.
    """
    import soundfile

    if not audio or not (audio["bytes"] or Path(audio["path"] or "").is_file()):
        raise Lost("no clip", audio and audio["path"])
    try:  # samples are [T, channels]
        samples, rate = soundfile.read(io.BytesIO(audio["bytes"] or Path(audio["path"]).read_bytes()), always_2d=True)
    except soundfile.LibsndfileError as error:
        raise Lost("an unreadable clip", error) from error
    waveform, seconds = torch.from_numpy(samples).float().mean(-1), len(samples) / rate  # [T]
    if not 0.1 <= seconds <= (longest := min(max_seconds, 300)):  # which is the encoders' limit
        reason = "shorter than 0.1" if seconds < 0.1 else f"longer than {longest:g}"
        raise Lost(f"a clip {reason} s", f"{seconds:.2f} s")
    if not waveform.isfinite().all() or waveform.abs().max() < 1e-3:  # 60 dB below full scale
        raise Lost("a silent clip, or one with NaN samples")
    return torchaudio.functional.resample(waveform, rate, SAMPLE_RATE)


def from_tars(index, row, args):
    """A row of the authors' training set: same column names, the clip is converted."""
    ours = checked(row["question"], row["options"], row["answer_index"], cell_text(row["prompt_for_tts"], "prompt"))
    wer = row.get("tts_wer")
    ours["tts_wer"] = float(wer) if isinstance(wer, (int, float)) else None  # "n/a" is unknown too
    return ours | {"audio": decode_clip(row["audio"], args.max_seconds)}


# What VoiceBench asks after the options, and how a line opens an option: "A. ", "A.", "A) ", "(A) ", "Option A: ".
INSTRUCTION = re.compile(r"\s*^What is the answer to the above multiple choice question.*", re.MULTILINE | re.DOTALL)
OPENING = r"^[^\S\n]*(?:Option\s+{0}\s?[:.)]|\({0}\)|{0}[.):])(?![A-Z]\.)[^\S\n]*"
FOUR_OPTIONS = re.compile("(.*)" + "(.*)".join(map(OPENING.format, LETTERS)) + "(.*)", re.M | re.I | re.S)


def parse_prompt(prompt):
    """A VoiceBench prompt -> question and options. All of them may wrap over lines.
    The options are the last lines that open with A, B, C and D in this order; the question itself may have such lines.
    Raises Lost where there are none, or more, or where option D does not end clearly.
    """
    told = INSTRUCTION.search(prompt)
    match = FOUR_OPTIONS.fullmatch(prompt[: told.start()] if told else prompt)
    if not match or any(re.search(OPENING.format("[A-E]"), option, re.M | re.I) for option in match.groups()[1:]):
        raise Lost("no four options recognised")
    question, *options = match.groups()
    if not told:
        options[3], *more = re.split(r"\n\s*\n", options[3].strip())
        if len(more) > 1 or "\n" in options[3]:
            raise Lost("no telling where option D ends")
    question, *options = (" ".join(part.split()) for part in (question, *options))
    return question, options


def from_voicebench(index, row, args):
    """A row of VoiceBench's mmsu or openbookqa: question and options stand in the prompt, the answer is a letter."""
    prompt = cell_text(row["prompt"], "prompt")
    ours = checked(*parse_prompt(prompt), cell_text(row["reference"], "reference"), prompt)
    return ours | {"category": row.get("category"), "audio": decode_clip(row["audio"], args.max_seconds)}


ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth".split()
BLANK = r"(?<!\w)_{2,}(?!\w)"  # __init__ is none


def without_blanks(question):
    """The question as it is spoken: `____` at the end becomes "what?", one blank "what", several "first blank", ..."""
    question = re.sub(r"\s*_{2,}\.$", " what?", question)
    blanks = len(re.findall(BLANK, question))
    names = iter(["what"] if blanks == 1 else [f"{ordinal} blank" for ordinal in ORDINALS] + ["blank"] * blanks)
    return re.sub(rf"\s*{BLANK}\s*", lambda _: f" {next(names)} ", question).strip()


def from_mmlu(index, row, args):
    """A row of cais/mmlu, spoken."""
    ours = checked(row["question"], row["choices"], row["answer"])
    return spoken_row(ours, index, args) | {"category": row["subject"]}


def from_csv(index, row, args):
    """A row of one's own table: recorded in the file `wav`, a path relative to the table, or spoken.
    Where the table has a column wav, a row is spoken only if it holds a dash: an empty cell may be a mistake.
    """
    if row["more"]:
        raise Lost("more cells than columns", row["more"])
    ours = checked(row["question"], [row[letter] for letter in LETTERS], row["answer"])
    wav = row.get("wav", "-")
    if wav == "-":
        return spoken_row(ours, index, args)
    if not wav:
        raise Lost("no recording, and no dash that asks for a voice")
    clip = {"bytes": None, "path": str(Path(args.origin).parent / wav)}
    return ours | {"audio": decode_clip(clip, args.max_seconds)}


def spoken_row(ours, index, args):
    """The row, spoken up to args.tries times: the first clip that passes the paper's filter is kept."""
    if len(ours["prompt_for_tts"]) > 2000:
        raise Lost("longer than 2000 characters")
    if not hasattr(args, "voice"):
        args.voice, args.listener = Voice(args.tts, DEVICE), Listener(args.asr, DEVICE)
    for attempt in range(args.tries):
        waveform = args.voice.speak(ours["prompt_for_tts"], seed=(args.seed, index, attempt))
        heard = args.listener.transcribe(waveform)
        wer, missed = reading_error(ours["prompt_for_tts"], heard, args.listener.spelling)
        if wer < 0.1 and not missed:
            return ours | {"tts_wer": wer, "audio": decode_clip({"bytes": wav_bytes(waveform)}, args.max_seconds)}
    reason = "option d not heard" if missed else "word error rate of 10 % or more"
    raise Lost(f"{reason}, {args.tries} tries", f"at last {wer:.0%}: {heard}")


# ==== 6. Speech synthesis and recognition =============================================================================
NUMBER = r"\d+(?:,\d{3})*(?:\.\d+)?"
YEAR = r"(1\d\d\d|20\d\d)"
MONTH = "January|February|March|April|May|June|July|August|September|October|November|December"
UNITS = dict(pair.split(":") for pair in (
    "km:kilometers m:meters cm:centimeters mm:millimeters nm:nanometers kg:kilograms g:grams mg:milligrams s:seconds "
    "ms:milliseconds min:minutes h:hours L:liters mL:milliliters J:joules kJ:kilojoules N:newtons Pa:pascals W:watts "
    "V:volts Hz:hertz lb:pounds ft:feet m/s:meters_per_second km/h:kilometers_per_hour mph:miles_per_hour "
    "%:percent °C:degrees_celsius °F:degrees_fahrenheit °:degrees ¢:cents").split())
UNIT = "|".join(sorted(UNITS, key=len, reverse=True))
SYMBOLS = {"+": "plus", "=": "equals", "≠": "is not equal to", "<": "is less than", ">": "is greater than",
           "≤": "is less than or equal to", "≥": "is greater than or equal to", "≈": "is about", "×": "times",
           "÷": "divided by", "±": "plus or minus", "√": "square root of", "&": "and", "²": "squared", "³": "cubed",
           "½": "one half", "¼": "one quarter", "¾": "three quarters", "→": "to", "and/or": "and or"}
SHORT = {"Dr.": "doctor", "Mr.": "mister", "Mrs.": "missus", "Ms.": "miss", "Prof.": "professor",
         "vs.": "versus", "e.g.": "for example", "i.e.": "that is", "etc.": "et cetera"}
# What no rule reads: two signs in a row, chemistry, formulas, code, ratios, dates, Roman numbers, other scripts.
UNREAD = re.compile(r"[^A-Za-z0-9\s.,;:?!'\"()-]|\d!|\d\s?[:-]\d|\d,\d(?!\d\d)|\.\d+\.\d|\d[A-Za-z]|[A-Za-z]-?\d|"
                    r"\w\(|\)[\w(]|\b[IVXLC]{2,}\b|\b(?:St|Jr|Sr|v)\.")


def in_words(digits, to="cardinal"):
    """"1,984" or "3.14" -> words; one by one where a zero leads or there are too many. Needs num2words."""
    from num2words import num2words

    whole, _, fraction = digits.replace(",", "").partition(".")
    alone = (len(whole) > 1 and whole[0] == "0") or len(whole) > 15
    said = " ".join(map(in_words, whole)) if alone else re.sub(r"[-,]| and ", " ", num2words(int(whole), to=to))
    return " ".join(f"{said}{fraction and ' point '}{' '.join(map(in_words, fraction))}".split())


def counted(amount, name, article):
    """5, "meters" -> five meters; one of it, or after an article ("a 5 kg block"), in the singular."""
    singular = {"feet": "foot", "hertz": "hertz"}.get(name) or re.sub(r"s(?=_|$)", "", name, count=1)
    return f"{article or ''} {in_words(amount)} {singular if article or amount == '1' else name} ".replace("_", " ")


def money(m):
    """$5.50 -> five dollars and fifty cents; $3 million -> three million dollars; a $10 bill -> a ten dollar bill."""
    article, sign, whole, cents, scale = m.groups()
    name, small = {"$": ("dollars", "cents"), "€": ("euros", "cents"), "£": ("pounds", "pence")}[sign]
    if scale or len(cents or "00") != 2:
        return f"{article or ''} {in_words(whole + (f'.{cents}' if cents else ''))} {scale or ''} {name} "
    parts = [counted(n, word, article) for n, word in ((whole, name), ((cents or "0").lstrip("0"), small))
             if n not in ("", "0")]
    return " and ".join(parts) or f" zero {name} "


SAID = (  # forms, in this order, and how a person says them
    (r"\s*\n\s*", ". "), ("[\u00a0\u2009\u202f]", " "), ("[’‘]", "'"), ("[“”]", '"'), ("[–—−]", "-"),
    (r"(?<![\d.])\.(?=\d)", "0."), (r"\bNo\. (?=\d)", "number "), (r"\bSt\. (?=[A-Z])", "saint "),
    (r"(?:\b([Aa]n? ))?([$€£])(\d+(?:,\d{3})*)(?:\.(\d+))?(?![\d.,]*\d|[A-Za-z])(?: (thousand|[mb]illion|trillion)\b)?",
     money),
    (rf"'?\b({YEAR}|[2-9]0)s\b", lambda m: re.sub("y$", "ie", in_words(m[1], "year")) + "s"),
    (rf"\b{YEAR}-{YEAR}\b", lambda m: f"{in_words(m[1], 'year')} to {in_words(m[2], 'year')}"),
    (rf"\b((?:[Ii]n|[Ss]ince|[Uu]ntil|[Yy]ear|[Bb]efore|[Aa]fter|[Dd]uring|{MONTH})(?: \d\d?(?:st|nd|rd|th)?)?,?) "
     rf"{YEAR}\b(?![.,]\d|\s?(?:{UNIT})(?!\w))", lambda m: f"{m[1]} {in_words(m[2], 'year')}"),
    (r"\b(\d+)(?:st|nd|rd|th)\b", lambda m: in_words(m[1], "ordinal")),
    (r"(?<=\d)\s?(?=[½¼¾])", " and "),
    (rf"\b([Aa]n? )({NUMBER})[ -]?({UNIT})(?= [a-z])", lambda m: counted(m[2], UNITS[m[3]], m[1])),
    (rf"(?<![\w.,/])({NUMBER})-({NUMBER})(?= [a-z]| ?(?:{UNIT})(?!\w))", r"\1 to \2"),
    (rf"(?<![\w.,])({NUMBER}) ?({UNIT})(?![\w²³/^])", lambda m: counted(m[1], UNITS[m[2]], "")),
    (r"(?<=\d) - (?=\d)|(?<=\b[a-z]) - (?=[a-z0-9]\b)", " minus "), (r"(?<![\w.)-])-(?=\d)", " minus "),
    ("|".join(rf"(?<!\w){re.escape(short)}(?!\w)" for short in SHORT), lambda m: f" {SHORT[m[0]]} "),
    (r"\b([A-Za-z]\.){2,}", lambda m: m[0].replace(".", " ")),  # U.S., p.m.
    ("|".join(map(re.escape, SYMBOLS)), lambda m: f" {SYMBOLS[m[0]]} "),
    ("[Α-Ωα-ω]", lambda m: f" {unicodedata.name(m[0]).split()[-1].lower()} "),
)


def spell_out(text, strict=True):
    """Text -> lower-case words of a-z and apostrophes, as a person says them; line ends become ". ".
    Raises Lost where no rule says how. If not strict, what is not read is dropped.
    """
    signs = re.search(r"(?!--|!!)[-+=<>*/&|!^~]{2}", text)  # ++, ->, !=
    text = text.strip()
    for form, said in SAID:
        text = re.sub(form, said, text)
    text = "".join(c for c in unicodedata.normalize("NFKD", text) if unicodedata.category(c)[0] != "M")  # no accents
    if strict and (unread := signs or UNREAD.search(text)):
        raise Lost("a form that no rule reads aloud", unread[0])
    text = re.sub(NUMBER, lambda m: f" {in_words(m[0])} ", text)
    text = re.sub(r"[^A-Za-z'. ]|(?<![A-Za-z])'|'(?![A-Za-z])", " ", text)  # apostrophes stay, quotes go
    return re.sub(r"\s+(?=\.)", "", " ".join(text.lower().split()))


def spoken_words(text, spelling=None):
    """The words of a text as WER counts them: said, then as transformers' own normaliser for English has them.
    spelling: the recogniser's table of British and American spellings.
    """
    text = re.sub(r"[()\[\]{}<>]", " ", text)  # the normaliser would delete what stands in brackets
    text = spell_out(text, strict=False).replace("o'clock", "oclock")  # it takes an o beside a number for a zero
    return EnglishTextNormalizer(spelling or {})(text).replace("'", "").split()


def word_error_rate(reference, hypothesis, spelling=None):
    """Insertions, deletions and substitutions that turn one text into the other, per word of the reference."""
    words = spoken_words(reference, spelling)
    return torchaudio.functional.edit_distance(words, spoken_words(hypothesis, spelling)) / max(1, len(words))


def reading_error(prompt, transcript, spelling=None):
    """The paper's filter: the word error rate, and whether "option d" is not heard as often as the prompt has it."""
    asked, heard = (len(re.findall(r"\boption d\b", " ".join(spoken_words(text)))) for text in (prompt, transcript))
    return word_error_rate(prompt, transcript, spelling), heard < asked


class Voice:
    """Text to speech with a VITS model such as facebook/mms-tts-eng."""

    def __init__(self, name, device):
        self.model = load_model(transformers.VitsModel, name, device, torch.float32)  # too fine for bfloat16, and small
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(name)

    @torch.no_grad()
    def speak(self, text, seed):
        """Text -> waveform [T] at 16 kHz. `seed` (a tuple of integers) sets noise and speaking rate."""
        rng = np.random.default_rng(seed)
        torch.manual_seed(int(rng.integers(2**31)))
        self.model.speaking_rate, self.model.noise_scale = rng.uniform(0.85, 1.1), rng.uniform(0.4, 0.8)
        inputs = self.tokenizer(spell_out(text), return_tensors="pt").to(self.model.device)
        waveform = self.model(**inputs).waveform[0].float().cpu()  # [T]
        waveform = torchaudio.functional.resample(waveform, self.model.config.sampling_rate, SAMPLE_RATE)
        return waveform / waveform.abs().max().clamp(min=1.0)


class Listener:
    """Speech to text with Whisper."""

    def __init__(self, name, device):
        self.model = load_model(transformers.WhisperForConditionalGeneration, name, device)
        self.feature_extractor = transformers.WhisperFeatureExtractor.from_pretrained(name)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        self.spelling = getattr(self.tokenizer, "english_spelling_normalizer", None)  # its normalizer.json
        multilingual = getattr(self.model.generation_config, "is_multilingual", False)
        self.language = {"language": "en", "task": "transcribe"} if multilingual else {}

    @torch.no_grad()
    def transcribe(self, waveform):
        """Waveform [T] at 16 kHz, of any length -> text."""
        # Whisper takes windows of 30 s: a shorter clip is padded to one, a longer one is transcribed window by window.
        long = len(waveform) > self.feature_extractor.n_samples
        features = self.feature_extractor(np.asarray(waveform), sampling_rate=SAMPLE_RATE, truncation=not long,
                                  padding="longest" if long else "max_length", return_attention_mask=True,
                                  return_tensors="pt")
        features = features.to(self.model.device, self.model.dtype)  # casts what is no integer
        ids = self.model.generate(**features, return_timestamps=long, **self.language)
        return self.tokenizer.decode(ids[0], skip_special_tokens=True)


# ==== 7. From a source to a data set; a stopped run continues =========================================================
Source = namedtuple("Source", "origin config split make_row")  # split None: all of them; make_row converts a row
SOURCES = {
    "tars": Source("yuantuo666/MMLU_FULL-full_train_hf_format.merged.v1", None, "train", from_tars),
    "mmlu": Source("cais/mmlu", "all", "auxiliary_train", from_mmlu),
    "voicebench-mmsu": Source("hlt-lab/voicebench", "mmsu", None, from_voicebench),
    "voicebench-obqa": Source("hlt-lab/voicebench", "openbookqa", "test", from_voicebench),
    "csv": Source("questions.csv", None, None, from_csv),
}


def read_table(place):
    """The rows of a csv file, all cells as strings: "NA" and "007" stay. `more`: what a row has beyond its columns."""
    with open(place, encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file, restkey="more", restval=""))
    return [row | {"more": " ".join(row.get("more", []))} for row in rows]


def open_source(source, origin):
    """A source's rows as one Dataset, clips undecoded: from the hub, a local copy of its repository
    (CONFIG/SPLIT-00000-of-00001.parquet), one parquet file, a csv file, or a folder that save_to_disk wrote.
    """
    place = Path(origin)
    if place.suffix == ".csv":
        rows = datasets.Dataset.from_list(read_table(place))
    elif (place / "dataset_info.json").exists() or (place / "dataset_dict.json").exists():
        rows = datasets.load_from_disk(origin)
    elif place.exists():
        own = place / (source.config or "")
        files = place if place.is_file() else (own if own.exists() else place) / f"**/{source.split or ''}*.parquet"
        rows = datasets.load_dataset("parquet", data_files=str(files), split="train")
    else:
        rows = datasets.load_dataset(origin, source.config, split=source.split)
    if isinstance(rows, dict):  # several splits, such as one a subject
        rows = datasets.concatenate_datasets([rows[source.split]] if source.split in rows else list(rows.values()))
    return rows.cast_column("audio", datasets.Audio(decode=False)) if "audio" in rows.column_names else rows


def read_lines(file):
    """The JSON objects of a file with one a line."""
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def resume(file, begun):
    """The finished rows of an interrupted run, from its rows.jsonl, whose first line holds the run's settings."""
    text = file.read_bytes() if file.exists() else b""
    whole = text[: text.rfind(b"\n") + 1]  # not a line that was cut
    write_aside(file, whole or json.dumps(begun).encode() + b"\n")
    first, *lines = read_lines(file)
    if other := [key for key in begun if first.get(key) != begun[key]]:
        raise SystemExit(f"{file.parent} was begun with other settings ({', '.join(other)}): finish it with those, or "
                         "remove it")
    return lines


def convert(name, args):
    """Make the data set `args.out` of source `name`. A stopped run continues: no clip is made twice."""
    source, out = SOURCES[name], Path(args.out)
    rows = open_source(source, args.origin or source.origin)
    count = min(len(rows), args.limit or len(rows))
    part = out.with_name(out.name + ".part")  # what is done so far
    part.mkdir(parents=True, exist_ok=True)
    if any(part.iterdir()) and not (part / "rows.jsonl").exists():
        raise SystemExit(f"{part} is no stopped conversion: move it away, its place is needed")
    settings = {key: getattr(args, key, None) for key in ("max_seconds", "seed", "tries", "tts", "asr")}
    done = resume(part / "rows.jsonl", {"source": name, "content": rows._fingerprint} | settings)[:count]
    for i in tqdm(range(len(done), count), initial=len(done), total=count, desc=name, unit="row"):
        done.append({"key": str(rows[i].get("key") or f"{name}-{i}")})
        try:
            row = source.make_row(i, rows[i], args)
            waveform = row["audio"]
            write_aside(part / f"{i}.wav", wav_bytes(waveform.clamp(-1, 1)))
            done[-1] |= row | {"audio": f"{i}.wav", "seconds": len(waveform) / SAMPLE_RATE}
        except Lost as loss:
            reason, *found = loss.args
            done[-1]["lost"] = reason
            tqdm.write(f"{done[-1]['key']} is left out: {reason}" + "".join(f" ({x})" for x in found if x))
        tars.append_line(part / "rows.jsonl", done[-1])
    lost, kept = Counter(line["lost"] for line in done if "lost" in line), {}
    for line in done:
        if "lost" not in line:  # of rows that repeat each other word for word, the first
            kept.setdefault((line["question"], *line["options"], line["answer_index"]), line)
    if again := len(done) - lost.total() - len(kept):
        lost["word for word an earlier row"] += again
    if not kept:
        raise SystemExit(f"no row is left: {'; '.join(sorted(lost))}")
    # By path: `datasets` then takes the clips in where it writes, in batches of limited size.
    ready = [line | {"audio": {"bytes": None, "path": str(part.resolve() / line["audio"])}} for line in kept.values()]
    questions = datasets.Dataset.from_list(ready).cast_column("audio", datasets.Audio(decode=False))
    questions.save_to_disk(part / "data")
    (part / "data").rename(out)
    shutil.rmtree(part)
    hours = sum(line["seconds"] for line in kept.values()) / 3600
    counts = {"rows in": count} | {f"  left out: {reason}": n for reason, n in lost.most_common()}
    counts |= {"rows out": len(kept), "hours of audio": round(hours, 2)}
    print("", *(f"{what:<44}{n:>8}" for what, n in counts.items()), f"written to {out}", sep="\n")


def main(arguments=None):
    """Build the data set that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="source", required=True, metavar="SOURCE")
    spoken = ("mmlu", "csv")
    flags = (  # name, default, of which sources, what it is
        ("--seed", 0, ("demo", *spoken), "seed of what is drawn: questions, weights, a voice's noise and rate"),
        ("--text-steps", 800, ("demo",), "steps of the base model's stage 1"),
        ("--speech-steps", 600, ("demo",), "steps of its stage 2 at most"),
        ("--stop-at", 0.40, ("demo",), "speech accuracy at which stage 2 stops"),
        ("--worked-out", 1.0, ("demo",), "share of the LLM's answers that write the result between down"),
        ("--train-clips", 4000, ("demo",), "spoken training questions"),
        ("--val-clips", 512, ("demo",), "spoken questions that decide when stage 2 stops"),
        ("--test-clips", 512, ("demo",), "held-out spoken questions"),
        ("--origin", "", SOURCES, "hub name or local files to read; empty: the source's own place on the hub"),
        ("--limit", 0, SOURCES, "only the first so many rows; 0 means all"),
        ("--max-seconds", 120.0, SOURCES, "longer clips are left out"),
        ("--tries", 10, spoken, "readings of a question before it is left out"),
        ("--tts", "facebook/mms-tts-eng", spoken, "the voice, a VITS model"),
        ("--asr", "openai/whisper-medium", spoken, "the listener, a Whisper model"))
    for source in ("demo", *SOURCES):
        command = commands.add_parser(source, allow_abbrev=False)
        out = "runs/demo" if source == "demo" else "runs/data"
        command.add_argument("--out", default=out, metavar="", help=f"directory to write [{out}]")
        for flag, default, sources, text in flags:
            if source in sources:
                command.add_argument(flag, type=type(default), default=default, metavar="", help=f"{text} [{default}]")
    args = parser.parse_args(arguments)
    if Path(args.out).exists():
        raise SystemExit(f"{args.out} exists already: remove it to make it anew, or give another --out")
    demo(args) if args.source == "demo" else convert(args.source, args)


if __name__ == "__main__":
    main()
