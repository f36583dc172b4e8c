"""Questions in, spoken questions out: `python data_prep.py SOURCE --out DIR`.

  demo              sums spoken by a formant synthesiser, and the base model that tars.py trains by default; offline
  tars              the authors' own training set: MMLU questions with speech, ready made
  mmlu              the same made here: cais/mmlu, spoken by facebook/mms-tts-eng, checked by Whisper
  voicebench-mmsu   the paper's first evaluation set
  voicebench-obqa   its second

Every source writes `datasets` directories with the columns key, question, options, answer_index, prompt_for_tts and
audio (16 kHz mono WAV bytes), and where they are known tts_wer and category; tars.py and eval.py read them with
load_questions. A source's rows come from the hub or, with --origin, from local files of the same layout.

Imports: this file imports tars.py; eval.py imports this file.
"""

import argparse
import io
import json
import math
import re
import shutil
import unicodedata
import wave
from collections import Counter
from itertools import product
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchaudio
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    VitsModel,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from tars import (
    COLUMNS,
    DEVICE,
    LETTERS,
    SAMPLE_RATE,
    SYSTEM_PROMPT,
    ClipError,
    Qwen25Omni,
    SpeechLM,
    UserError,
    extract_answers,
    judge,
    load_helper,
    load_model,
    open_pretrained,
    read_clip,
    run,
    write_json,
    written_question,
)

# ======================================================================================================================
# 1. The demo's questions: two-step sums over 0..9, four options
#
# The demo needs no download. The questions are two-step sums, a small formant synthesiser speaks them, and the base
# model is a Qwen2.5-Omni thinker of 1.2 M parameters. It is trained as speech LLMs are: first the LLM learns to reason
# in writing; then it is frozen, and audio encoder and projector learn to feed it. Stage 2 is stopped early on purpose:
# the model then reasons well in writing and badly in speech, which is the gap that TARS closes.
# ======================================================================================================================
DIGITS = "zero one two three four five six seven eight nine".split()
SIGNS = {"plus": 1, "minus": -1}


def work_out(expression):
    """(a, sign, b, sign, c, ...) -> its steps, each (value so far, sign, number, new value)."""
    value, *rest = expression
    steps = []
    for sign, number in zip(rest[::2], rest[1::2]):
        steps.append((value, sign, number, value + SIGNS[sign] * number))
        value = steps[-1][3]
    return steps


def expressions():
    """All (a, sign, b, sign, c) whose value is within 0..9 after each step: 1,210 of them."""
    for expression in product(range(10), SIGNS, range(10), SIGNS, range(10)):
        if all(0 <= value <= 9 for *_, value in work_out(expression)):
            yield expression


def sum_question(expression, letter, rng, key):
    """One row (without audio), with the right answer under `letter` (0..3)."""
    result = work_out(expression)[-1][3]
    values = rng.choice([v for v in range(10) if v != result], 4, replace=False)
    values[letter] = result
    options = [DIGITS[v] for v in values]
    question = " ".join(x if x in SIGNS else DIGITS[x] for x in expression)
    spoken = f"{question}. " + ", ".join(f"{name} {option}" for name, option in zip(LETTERS, options))
    return {"key": key, "question": question, "options": options, "answer_index": letter, "prompt_for_tts": spoken}


def worked_answer(expression, letter):
    """The completion the base model learns to write."""
    sums = ". ".join(f"{DIGITS[value]} {sign} {DIGITS[number]} is {DIGITS[new]}"
                     for value, sign, number, new in work_out(expression))
    return f"<think>{sums} {LETTERS[letter]}</think><answer>The answer is {LETTERS[letter]}.</answer>"


# ======================================================================================================================
# 2. The demo's voice: each letter of a word is a triple of formants
# ======================================================================================================================
VOWELS = "aeiou"
# Spread over the vowel plane by an irrational step, so that no two letters share a triple.
FORMANTS = {letter: (250 + 650 * (i * 0.618 % 1), 950 + 1450 * (i * 0.382 % 1), 2500 + 1200 * (i * 0.786 % 1))
            for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz")}


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
        ends.append((word.strip(".,"), now))
        pause = (0.05 if word != spoken else 0.01) / speed
        segments.append((None, pause))
        now += pause
    lengths = [round(seconds * SAMPLE_RATE) for _, seconds in segments]
    silence = (500.0, 1500.0, 2500.0)

    def track(values):
        return np.repeat(np.array(values, np.float32), lengths, axis=0)

    formants = tract * track([FORMANTS.get(letter, silence) for letter, _ in segments])  # [T, 3]
    voiced = track([1.0 if letter and letter in VOWELS else 0.25 for letter, _ in segments])  # [T]
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


# ======================================================================================================================
# 3. The demo's base model
# ======================================================================================================================
PAUSE = " …"  # what the LLM's own vocabulary has for silence


def demo_texts(rng):
    """All texts of the demo's prompts and answers, for its tokenizer."""
    texts = [Qwen25Omni.before_user.replace(SYSTEM_PROMPT, ""), Qwen25Omni.after_user, "<think>that", PAUSE]
    for i, expression in enumerate(expressions()):
        texts += [written_question(sum_question(expression, i % 4, rng, "")), worked_answer(expression, i % 4)]
    return texts


def demo_tokenizer(texts):
    """Every word of `texts` (with the space before it), mark and tag is one token; decoding gives the exact string."""
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
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|endoftext|>", eos_token="<|im_end|>",
                                   unk_token="<unk>")


def demo_model(tokenizer):
    """An untrained thinker of Qwen2.5-Omni's own class with about 1.2 M parameters."""
    token = tokenizer.convert_tokens_to_ids
    return Qwen2_5OmniThinkerForConditionalGeneration(Qwen2_5OmniThinkerConfig(
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


def lesson(expressions, rng, step, steps):
    """24 exercises (expression, look_up). With look_up the result is given; only its letter must be found.

    Looking up comes first and alone: mixed with sums from the start it is learnt much later. Then one-step sums are
    mixed with the two-step ones, so that the LLM learns to add instead of memorising the training sums.
    """

    def draw(count):
        return [expressions[i] for i in rng.integers(len(expressions), size=count)]

    if step < 0.16 * steps:
        return [(expression, True) for expression in draw(24)]
    return ([(expression, True) for expression in draw(4)] + [(expression[:3], False) for expression in draw(3)] +
            [(expression, False) for expression in draw(17)])


def text_batch(tokenizer, exercises, rng, pauses):
    """Training rows for the LLM -> ids, attention mask and loss weights, each [rows, T].

    With `pauses` above 0 the questions look like speech: no line breaks, and up to that many pause tokens a word on
    average. This makes the LLM robust to audio embeddings, most of which stand for no word.
    """
    token = tokenizer.convert_tokens_to_ids
    letters = [token(f" {letter}") for letter in LETTERS]
    breaks = (token("\n"), token("\n\n"))
    prompts, answers = [], []
    for expression, look_up in exercises:
        letter = int(rng.integers(4))
        question, answer = sum_question(expression, letter, rng, key=""), worked_answer(expression, letter)
        if look_up:
            question["question"], name = question["options"][letter], LETTERS[letter]
            answer = f"<think>that is {question['question']} {name}</think><answer>The answer is {name}.</answer>"
        user = tokenizer(written_question(question)).input_ids
        if pauses:
            rate = rng.uniform(0, pauses)
            user = [t for u in user if u not in breaks for t in [token(PAUSE)] * rng.poisson(rate) + [u]]
        prompts.append(tokenizer(Qwen25Omni.before_user).input_ids + user + tokenizer(Qwen25Omni.after_user).input_ids)
        answers.append(tokenizer(answer + Qwen25Omni.end_of_turn[0]).input_ids)

    def pad(rows):
        return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)

    ids = pad([p + a for p, a in zip(prompts, answers)])
    mask = pad([[1] * (len(p) + len(a)) for p, a in zip(prompts, answers)])
    # The option's letter is the hard part and only one token of twenty: it has three times the weight.
    weights = pad([[0.0] * len(p) + [3.0 if t in letters else 1.0 for t in a] for p, a in zip(prompts, answers)])
    return ids, mask, weights


def train_llm(model, tokenizer, expressions, rng, steps):
    """Stage 1: teach the LLM to look options up, then to reason in writing."""
    decoder, embeddings = model.get_decoder(), model.get_input_embeddings()
    # Without strong weight decay it memorises the training sums and fails on new ones.
    learnt = [*decoder.parameters(), *model.lm_head.parameters()]
    optimizer = torch.optim.AdamW(learnt, lr=2e-3, weight_decay=0.3)
    bar = tqdm(range(steps), desc="base model 1/2: LLM learns to reason in writing", unit="step")
    for step in bar:
        pauses = 1.5 * min(1.0, max(0.0, (step / steps - 0.1) / 0.2)) if step % 2 else 0.0
        ids, mask, weights = text_batch(tokenizer, lesson(expressions, rng, step, steps), rng, pauses)
        hidden = decoder(inputs_embeds=embeddings(ids), attention_mask=mask, use_cache=False).last_hidden_state
        answer = weights[:, 1:] > 0
        nll = F.cross_entropy(model.lm_head(hidden[:, :-1][answer]), ids[:, 1:][answer], reduction="none")
        loss = (nll * weights[:, 1:][answer]).sum() / weights.sum()
        decay = 0.5 + 0.5 * math.cos(math.pi * step / steps)
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 20) * decay
        descend(loss, optimizer)
        bar.set_postfix_str(f"loss {loss.item():.3f}")


def descend(loss, optimizer):
    """One optimizer step with the gradient clipped to norm 1."""
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()


def spoken_question(expression, letter, rng, key):
    """One complete row, and for each spoken word the token it stands for and when it ends."""
    row = sum_question(expression, letter, rng, key)
    waveform, ends = speak(row["prompt_for_tts"], rng)
    words = [row["question"].split()[0]] + [f" {word}" for word, _ in ends[1:]]
    words = [f"Option {word.strip().upper()}:" if len(word) == 2 else word for word in words]
    row["audio"] = {"bytes": wav_bytes(waveform), "path": None}
    return row, [(word, end) for word, (_, end) in zip(words, ends)]


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
    rows = [torch.cat([before, clip, after, table[answer]]) for clip, answer in zip(spoken, answers)]
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)  # padded on the right, which causal attention ignores
    hidden = lm.decoder(inputs_embeds=padded, use_cache=False).last_hidden_state
    predicts = [h[len(row) - len(a) - 1 : len(row) - 1] for h, row, a in zip(hidden, rows, answers)]
    return F.cross_entropy(lm.model.lm_head(torch.cat(predicts)), torch.cat(answers))


@torch.no_grad()
def spoken_accuracy(lm, questions):
    """Share of spoken questions that greedy answers get right."""
    right = 0
    for first in range(0, len(questions), 64):
        batch = questions[first : first + 64]
        prompts = [[lm.prompt(lm.spoken_turn(question))] for question in batch]  # b lists of one prompt [P, H]
        completions = lm.detokenize(*lm.rollout(prompts, 1, 26, temperature=0)[:2])
        right += judge(batch, completions, extract_answers)[1].sum().item()
    return right / len(questions)


def train_encoder(lm, rows, words, answers, val, rng, steps, stop_at):
    """Stage 2, the LLM frozen: audio encoder and projector are aligned with the LLM's embeddings, and stopped early.

    For the first third of the steps each audio embedding is aligned with a word embedding of the LLM: that of the word
    where a word ends, that of the pause elsewhere. Then the loss of the worked answer is added, at a twentieth of the
    learning rate, because it learns fast. Training stops when the accuracy on the spoken questions `val` reaches
    `stop_at`.
    """
    lm.model.requires_grad_(False)
    tower = [p.requires_grad_(True) for name, p in lm.model.named_parameters() if "audio_tower" in name]
    optimizer = torch.optim.AdamW(tower, lr=3e-3)
    table, token = lm.model.get_input_embeddings().weight, lm.tokenizer.convert_tokens_to_ids
    pause, accuracy, order = token(PAUSE), 0.0, []
    answers = [torch.tensor(lm.tokenizer(answer + lm.family.end_of_turn[0]).input_ids) for answer in answers]
    mels = [lm.feature_extractor(read_clip(row["audio"]["bytes"]).numpy(), sampling_rate=SAMPLE_RATE, padding="longest",
                         return_tensors="pt").input_features[0].T for row in tqdm(rows, desc="features", unit="clip")]
    bar = tqdm(range(1, steps + 1), desc="base model 2/2: encoder and projector, LLM frozen", unit="step")
    for step in bar:
        order = order if len(order) >= 16 else order + rng.permutation(len(rows)).tolist()
        batch, order = order[:16], order[16:]
        frames = torch.tensor([len(mels[i]) for i in batch])
        mel = nn.utils.rnn.pad_sequence([mels[i] for i in batch], batch_first=True).transpose(1, 2)  # [16, 128, frames]
        mask = (torch.arange(mel.shape[2]) < frames[:, None]).long()  # [16, frames]
        states = lm.model.get_audio_features(mel, mask, return_dict=True).last_hidden_state  # [n, H], clip after clip
        counts = (((frames - 1) // 2 + 1 - 2) // 2 + 1).tolist()  # audio tokens of each clip
        targets = torch.full((len(states),), pause)
        for start, i, count in zip(np.cumsum([0, *counts]), batch, counts):
            for word, end in words[i]:
                targets[start + min(count - 1, int(25 * end))] = token(word)
        loss = nearness_loss(states, targets, table, pause)
        if step > steps // 3:
            loss = loss + answer_loss(lm, states.split(counts), [answers[i] for i in batch])
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, step / 20) * (0.05 if step > steps // 3 else 1)
        descend(loss, optimizer)
        if step >= steps // 4 and step % 5 == 0:
            accuracy = spoken_accuracy(lm, val)
            if accuracy >= stop_at:
                break
        bar.set_postfix_str(f"loss {loss.item():.2f}, speech accuracy {100 * accuracy:.0f} %")
    bar.close()
    print(f"stage 2 ended after step {step}: {100 * accuracy:.1f} % of {len(val)} spoken validation questions right")


# ======================================================================================================================
# 4. The demo as a whole
# ======================================================================================================================
# tars.py's defaults for this model instead of the paper's, saved beside it as tars_config.json.
DEMO_SETTINGS = {
    "data": "../train", "eval_data": "../test", "embedder": "ngrams", "questions_per_step": 16, "max_new_tokens": 26,
    "steps": 200, "lr": 1.6e-3, "gradient_checkpointing": False, "eval_batch": 64,
}


def demo(args):
    """The offline demo under args.out: model/ (the base model), train/, val/ and test/ (spoken questions)."""
    out = Path(args.out)
    if out.exists():
        raise UserError(f"{out} exists already: remove it to build the demo anew, or give another --out")
    rng = np.random.default_rng(args.seed)
    torch.manual_seed(args.seed)
    sums = list(expressions())
    sums = [sums[i] for i in rng.permutation(len(sums))]
    parts = {"test": (sums[:256], args.test_clips), "val": (sums[256:384], args.val_clips),
             "train": (sums[384:], args.train_clips)}  # no sum is in two parts
    rows, words, answers = {}, {}, {}
    for part, (chosen, clips) in parts.items():
        asked = [(chosen[i % len(chosen)], i % 4) for i in range(clips)]  # as many right answers under each letter
        spoken = [spoken_question(expression, letter, rng, f"{part}-{i}")
                  for i, (expression, letter) in enumerate(tqdm(asked, desc=f"speaking {part} questions", unit="clip"))]
        rows[part], words[part] = map(list, zip(*spoken))
        answers[part] = [worked_answer(*question) for question in asked]

    tokenizer = demo_tokenizer(demo_texts(rng))
    model = demo_model(tokenizer)
    train_llm(model, tokenizer, sums[384:], rng, args.text_steps)
    lm = SpeechLM(Qwen25Omni, model, tokenizer, WhisperFeatureExtractor(feature_size=128, chunk_length=300))
    train_encoder(lm, rows["train"], words["train"], answers["train"], rows["val"], rng, args.speech_steps,
                  args.stop_at)

    aside = out.with_name(out.name + ".part")  # renamed when all of it is written
    shutil.rmtree(aside, ignore_errors=True)
    for part in parts:
        questions = datasets.Dataset.from_list(rows[part]).cast_column("audio", datasets.Audio(decode=False))
        questions.save_to_disk(aside / part)
    for piece in (model, tokenizer, lm.feature_extractor):
        piece.save_pretrained(aside / "model")
    write_json(aside / "model" / "tars_config.json", DEMO_SETTINGS)
    aside.rename(out)
    print(f"{out}: base model, {len(rows['train'])} training and {len(rows['test'])} test questions")


# ======================================================================================================================
# 5. Real questions: one function a source, which converts a row
# ======================================================================================================================
class Lost(Exception):
    """A row that is left out. The message is the reason; rows are counted by it."""


def four(options):
    """The options as a list. Raises Lost unless there are four and none is empty."""
    options = [str(option).strip() for option in options]
    if len(options) != 4:
        raise Lost("other than four options")
    if not all(options):
        raise Lost("an empty option")
    return options


def checked(question, options, answer_index, prompt):
    """The text columns of a row. Raises Lost unless it is a question with four options and an answer."""
    if not question.strip():
        raise Lost("an empty question")
    options = four(options)
    if answer_index not in range(4):
        raise Lost("the answer is none of the options")
    return {"question": question.strip(), "options": options, "answer_index": answer_index, "prompt_for_tts": prompt}


def decode_clip(data, key="clip"):
    """Encoded audio bytes -> float32 mono waveform [T] at 16 kHz, in -1..1. All but PCM WAV needs torchcodec, FFmpeg.
    Raises ClipError if it cannot be decoded, has NaN, or lasts less than 0.1 s or more than 300 s, the encoders' limit.
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


def clean_clip(audio, key, max_seconds):
    """{"bytes", "path"} -> waveform [T] at 16 kHz. Raises Lost if it is unreadable, silent, too short or too long."""
    try:
        waveform = decode_clip(audio["bytes"] or Path(audio["path"] or "").read_bytes(), key)
    except ClipError as error:
        raise Lost(error.reason) from error
    except OSError as error:
        raise Lost("an unreadable clip") from error
    if waveform.abs().max() < 1e-3:  # 60 dB below full scale
        raise Lost("a silent clip")
    if len(waveform) > max_seconds * SAMPLE_RATE:
        raise Lost(f"a clip longer than {max_seconds:g} s")
    return waveform


def from_tars(index, row, args):
    """A row of the authors' training set: same column names, the clip is converted."""
    ours = checked(row["question"], row["options"], row["answer_index"], row["prompt_for_tts"])
    extra = {"tts_wer": float(row["tts_wer"])} if row.get("tts_wer") is not None else {}
    return ours | extra | {"audio": clean_clip(row["audio"], row["key"], args.max_seconds)}


INSTRUCTION = r"\n\s*\n|\nWhat is the answer to the above multiple choice question"  # a paragraph of its own


def parse_prompt(prompt):
    """A VoiceBench prompt -> question and options. All of them may wrap over lines.

    Raises Lost where the lines that open an option are not A, B, C and D in this order: nothing is cut silently.
    """
    openings = list(re.finditer(r"^[ \t]*([A-Z])\.[ \t]+", prompt, re.MULTILINE))
    letters = "".join(opening[1] for opening in openings)
    if letters != LETTERS:
        other = letters in ("AB", "ABC", "ABCDE", "ABCDEF")
        raise Lost("other than four options" if other else "options not recognised")
    ends = [opening.start() for opening in openings[1:]] + [len(prompt)]
    options = [prompt[opening.end() : end] for opening, end in zip(openings, ends)]
    options[3], *instruction = re.split(INSTRUCTION, options[3], maxsplit=1)
    if not instruction and "\n" in options[3].strip():
        raise Lost("no telling where option D ends")
    question, *options = (" ".join(text.split()) for text in (prompt[: openings[0].start()], *options))
    return question, options


def from_voicebench(index, row, args):
    """A row of VoiceBench's mmsu or openbookqa: question and options stand in the prompt, the answer is a letter."""
    question, options = parse_prompt(row["prompt"])
    letter = row["reference"].strip()
    ours = checked(question, options, LETTERS.index(letter) if letter in tuple(LETTERS) else -1, row["prompt"])
    extra = {"category": row["category"]} if "category" in row else {}
    return ours | extra | {"audio": clean_clip(row["audio"], f"row {index}", args.max_seconds)}


ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth".split()


def without_blanks(question):
    """The question as it is spoken: `____` at the end becomes "what?", one blank "what", several "first blank", ..."""
    question = re.sub(r"\s*_{2,}\.$", " what?", question)
    blanks = len(re.findall(r"_{2,}", question))
    names = iter(["what"] if blanks == 1 else [f"{ordinal} blank" for ordinal in ORDINALS] + ["blank"] * blanks)
    return re.sub(r"\s*_{2,}\s*", lambda _: f" {next(names)} ", question).strip()


def from_mmlu(index, row, args):
    """A row of cais/mmlu, spoken up to args.tries times: the first clip with a word error rate below 10 % is kept."""
    ours = checked(row["question"], row["choices"], row["answer"], "")
    ours["prompt_for_tts"] = written_question(ours | {"question": without_blanks(ours["question"])})
    if len(ours["prompt_for_tts"]) > 2000:
        raise Lost("longer than 2000 characters")
    for attempt in range(args.tries):
        waveform = args.voice.speak(ours["prompt_for_tts"], seed=(args.seed, index, attempt))
        wer = reading_error(ours["prompt_for_tts"], args.listener.transcribe(waveform))
        if wer < 0.1:
            audio = clean_clip({"bytes": wav_bytes(waveform)}, f"mmlu-{index}", args.max_seconds)
            return ours | {"tts_wer": wer, "category": row["subject"], "audio": audio}
    raise Lost(f"not understood by Whisper in {args.tries} tries")


# ======================================================================================================================
# 6. Speech synthesis and recognition
# ======================================================================================================================
ONES = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
        "seventeen eighteen nineteen").split()
TENS = "- - twenty thirty forty fifty sixty seventy eighty ninety".split()
SYMBOLS = {"%": "percent", "&": "and", "@": "at", "*": "times", "/": "over", "+": "plus", "=": "equals", "#": "number",
           "^": "to the power of", "<": "is less than", ">": "is greater than", "$": "dollar",
           "\N{MULTIPLICATION SIGN}": "times", "\N{DIVISION SIGN}": "divided by", "\N{DEGREE SIGN}": "degrees"}


def number_words(n):
    """A whole number below 10^15 in words: 342 -> three hundred forty two."""
    if n < 20:
        return ONES[n]
    if n < 100:
        return TENS[n // 10] + (f" {ONES[n % 10]}" if n % 10 else "")
    size, name = next((size, name) for size, name in ((10**12, "trillion"), (10**9, "billion"), (10**6, "million"),
                                                      (1000, "thousand"), (100, "hundred")) if n >= size)
    return f"{number_words(n // size)} {name}" + (f" {number_words(n % size)}" if n % size else "")


def spell_out(text):
    """Text -> lower-case words of a-z and apostrophes: numbers and symbols as they are spoken, line ends as ". ".

    A symbol that is not in SYMBOLS is spoken by its Unicode name: a Greek letter "alpha", a root "square root".
    """
    def number(match):
        whole, _, fraction = match[0].replace(",", "").partition(".")
        whole = one_by_one(whole) if len(whole) > 15 else number_words(int(whole))
        return f" {whole} " + (f"point {one_by_one(fraction)} " if fraction else "")

    def one_by_one(digits):
        return " ".join(ONES[int(d)] for d in digits)

    def symbol(c):
        if c in SYMBOLS:
            return f" {SYMBOLS[c]} "
        if c.isascii() and (c.isalpha() or c in "'. "):
            return c
        if unicodedata.category(c)[0] in "LS":  # letters and symbols; the rest is punctuation, which is not spoken
            name = unicodedata.name(c, "").lower()
            return f" {re.sub(r'^.* (letter|sign) (?=.)|^(greek|latin) small letter | (sign|symbol)$', '', name)} "
        return " "

    text = re.sub(r"\s*\n\s*", ". ", text.strip()).replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    text = re.sub(r"(?<![\w.])[-\N{MINUS SIGN}](?=\d)", " minus ", text)
    text = re.sub(r"\d+(?:,\d{3})*(?:\.\d+)?", number, unicodedata.normalize("NFKC", text))
    return re.sub(r"\s+(?=\.)", "", " ".join("".join(map(symbol, text)).lower().split()))


CONTRACTIONS = {"won't": "will not", "can't": "can not", "let's": "let us", "n't": " not", "'re": " are",
                "'ll": " will", "'ve": " have", "'m": " am", "'d": " would"}


def spoken_words(text):
    """The words of a text as WER counts them: spelled out, contractions expanded, no punctuation, lower case."""
    text = spell_out(text)
    text = re.sub(r"\b(it|he|she|that|there|what|who|where|how|here)'s\b", r"\1 is", text)
    for short, long in CONTRACTIONS.items():
        text = re.sub(rf"{short}\b", long, text)
    return re.sub(r"[^a-z ]", "", text).split()


def word_error_rate(reference, hypothesis):
    """Insertions, deletions and substitutions that turn one text into the other, per word of the reference."""
    words = spoken_words(reference)
    return torchaudio.functional.edit_distance(words, spoken_words(hypothesis)) / max(1, len(words))


def reading_error(prompt, transcript):
    """The paper's filter: the word error rate, or 1 if the transcript lacks "option d"."""
    return word_error_rate(prompt, transcript) if "option d" in " ".join(spoken_words(transcript)) else 1.0


class Voice:
    """Text to speech with a VITS model such as facebook/mms-tts-eng."""

    def __init__(self, name, device):
        self.model = load_model(VitsModel, name, device, torch.float32)  # too fine for bfloat16, and small
        self.tokenizer = open_pretrained(AutoTokenizer.from_pretrained, name)

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
        self.model = load_model(WhisperForConditionalGeneration, name, device)
        self.feature_extractor = open_pretrained(WhisperFeatureExtractor.from_pretrained, name)
        self.tokenizer = open_pretrained(AutoTokenizer.from_pretrained, name)
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


# ======================================================================================================================
# 7. From a source to a data set; a stopped run continues
# ======================================================================================================================
class Source(NamedTuple):
    """Where a source's rows are, which columns they must have, and the function that converts one."""

    origin: str
    config: str | None
    split: str | None  # None: all splits
    columns: tuple
    make_row: callable


HEARD = ("audio", "prompt", "reference")
SOURCES = {
    "tars": Source("yuantuo666/MMLU_FULL-full_train_hf_format.merged.v1", None, "train", tuple(COLUMNS), from_tars),
    "mmlu": Source("cais/mmlu", "all", "auxiliary_train", ("question", "subject", "choices", "answer"), from_mmlu),
    "voicebench-mmsu": Source("hlt-lab/voicebench", "mmsu", None, HEARD, from_voicebench),
    "voicebench-obqa": Source("hlt-lab/voicebench", "openbookqa", "test", HEARD, from_voicebench),
}


def open_source(source, origin):
    """A source's rows as one Dataset, clips undecoded: from the hub, a save_to_disk directory, or parquet/arrow files.

    Raises UserError if there is nothing at `origin` or a column is missing.
    """
    place = Path(origin)
    try:
        if (place / "dataset_info.json").exists() or (place / "dataset_dict.json").exists():
            rows = datasets.load_from_disk(origin)
        elif place.exists():
            files = [place] if place.is_file() else sorted(place.rglob("*"))
            files = [p for p in files if p.suffix in (".parquet", ".arrow")]
            # Of a copy of a whole repository, only this source's configuration.
            files = [p for p in files if source.config in p.parts] or files
            if not files:
                raise UserError(f"{origin} holds no parquet or arrow file and no datasets directory")
            kind = "parquet" if files[0].suffix == ".parquet" else "arrow"
            rows = datasets.load_dataset(kind, data_files=[str(p) for p in files], split="train")
        else:
            rows = datasets.load_dataset(origin, source.config, split=source.split)
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        raise UserError(f"{origin} cannot be read, here or on the hub: {str(error).splitlines()[0]}") from error
    if isinstance(rows, dict):  # several splits, such as one a subject
        rows = datasets.concatenate_datasets([rows[source.split]] if source.split in rows else list(rows.values()))
    if missing := set(source.columns) - set(rows.column_names):
        raise UserError(f"{origin} lacks the column(s) {', '.join(sorted(missing))}; "
                        f"it has {', '.join(rows.column_names)}")
    return rows.cast_column("audio", datasets.Audio(decode=False)) if "audio" in rows.column_names else rows


def resume(file, begun):
    """The finished rows of an interrupted run, from its rows.jsonl, whose first line holds the run's settings."""
    if not file.exists():
        file.write_text(json.dumps(begun) + "\n")
    text = file.read_text()
    whole = text[: text.rfind("\n") + 1]  # a line cut by a crash is done again
    file.write_text(whole)
    first, *lines = [json.loads(line) for line in whole.splitlines()] or [None]
    if first != begun:
        raise UserError(f"{file.parent} was begun with other settings: finish it with those, or remove it")
    return lines


def convert(name, args):
    """Make the data set `args.out` of source `name`. A stopped run continues: no clip is made twice."""
    source, out = SOURCES[name], Path(args.out)
    if out.exists():
        raise UserError(f"{out} exists already: remove it to make it anew, or give another --out")
    rows = open_source(source, args.origin or source.origin)
    count = min(len(rows), args.limit or len(rows))
    part = out.with_name(out.name + ".part")  # what is done so far
    part.mkdir(parents=True, exist_ok=True)
    settings = ("origin", "limit", "max_seconds", "seed", "tries", "tts", "asr")
    done = resume(part / "rows.jsonl", {"source": name} | {key: getattr(args, key, None) for key in settings})
    if name == "mmlu" and len(done) < count:
        args.voice, args.listener = load_speech_models(args)
    with open(part / "rows.jsonl", "a") as progress:
        for i in tqdm(range(len(done), count), initial=len(done), total=count, desc=name, unit="row"):
            key = str(rows[i].get("key") or f"{name}-{i}")
            try:
                row = {"key": key} | source.make_row(i, rows[i], args)
                waveform = row.pop("audio")
                (part / f"{i}.wav").write_bytes(wav_bytes(waveform.clamp(-1, 1)))
                line = {"row": row, "clip": f"{i}.wav", "seconds": len(waveform) / SAMPLE_RATE}
            except Lost as loss:
                line = {"lost": str(loss), "key": key}
                tqdm.write(f"{key} is left out: {loss}")
            done.append(line)
            print(json.dumps(line), file=progress, flush=True)
    kept = [line for line in done if "row" in line]
    if not kept:
        reasons = "; ".join(sorted({line["lost"] for line in done}))
        raise UserError(f"no row of {args.origin or source.origin} is left: {reasons}")

    def read(lines):
        for line in lines:
            yield {**line["row"], "audio": {"bytes": (part / line["clip"]).read_bytes(), "path": None}}

    questions = datasets.Dataset.from_generator(read, gen_kwargs={"lines": kept}, cache_dir=str(part / "cache"))
    questions.cast_column("audio", datasets.Audio(decode=False)).save_to_disk(part / "data")
    (part / "data").rename(out)
    shutil.rmtree(part)
    print(f"\n{'rows in':<44}{count:>8}")
    for reason, lost in Counter(line["lost"] for line in done if "lost" in line).most_common():
        print(f"{'  left out: ' + reason:<44}{lost:>8}")
    print(f"{'rows out':<44}{len(kept):>8}\n{'hours of audio':<44}{sum(line['seconds'] for line in kept) / 3600:>8.2f}")
    print(f"written to {out}")


def load_speech_models(args):
    """The speech synthesis and recognition models of `mmlu`."""
    return (load_helper(Voice, "--tts", args.tts, DEVICE),
            load_helper(Listener, "--asr", args.asr, DEVICE))


def main(arguments=None):
    """Build the data set that the command line names."""
    parser = argparse.ArgumentParser(prog="data_prep.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="source", required=True, metavar="SOURCE")
    of_demo = (
        ("--out", "runs/demo", "directory to write"),
        ("--seed", 0, "seed of questions, voices and base model"),
        ("--text-steps", 1600, "steps of the base model's stage 1"),
        ("--speech-steps", 600, "steps of its stage 2 at most"),
        ("--stop-at", 0.40, "speech accuracy at which stage 2 stops"),
        ("--train-clips", 4000, "spoken training questions"),
        ("--val-clips", 512, "spoken questions that decide when stage 2 stops"),
        ("--test-clips", 512, "held-out spoken questions"),
    )
    of_all = (
        ("--out", "runs/data", "directory to write"),
        ("--origin", "", "hub name or local files to read; empty: the source's own place on the hub"),
        ("--limit", 0, "only the first so many rows; 0 means all"),
        ("--max-seconds", 120.0, "longer clips are left out"),
    )
    of_mmlu = (
        ("--seed", 0, "seed of the voice's noise and speaking rate"),
        ("--tries", 10, "readings of a question before it is left out"),
        ("--tts", "facebook/mms-tts-eng", "the voice, a VITS model"),
        ("--asr", "openai/whisper-medium", "the listener, a Whisper model"),
    )
    for name, flags in (("demo", of_demo), *((name, of_all + (of_mmlu if name == "mmlu" else ())) for name in SOURCES)):
        command = commands.add_parser(name, allow_abbrev=False)
        for flag, default, help in flags:
            command.add_argument(flag, type=type(default), default=default, metavar="", help=f"{help} [{default}]")
    args = parser.parse_args(arguments)
    demo(args) if args.source == "demo" else convert(args.source, args)


if __name__ == "__main__":
    run("data_prep.py", main)
