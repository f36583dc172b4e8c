"""Questions in, spoken questions out: `python data_prep.py SOURCE --out DIR`. SOURCE `demo` also makes a base model.

Every source writes `datasets` directories with the columns key, question, options, answer_index, prompt_for_tts and
audio (WAV bytes); tars.py and eval.py read them with load_questions.

The demo needs no download. Its questions are spoken two-step sums, its voice a small formant synthesiser, and its base
model a 1.2 M parameter Qwen2.5-Omni thinker made the way speech LLMs are made: first the LLM learns to reason in
writing, then it is frozen and the audio encoder and projector learn to feed it. The second stage is cut short on
purpose: the model that results reasons well in writing and stumbles over speech, which is what TARS is for.

Imports: this file imports tars.py; nothing imports this file.
"""

import argparse
import io
import math
import shutil
import sys
import wave
from itertools import product
from pathlib import Path

import datasets
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    WhisperFeatureExtractor,
)

from tars import (
    LETTERS,
    SAMPLE_RATE,
    SYSTEM_PROMPT,
    Config,
    Qwen25Omni,
    SpeechLM,
    UserError,
    evaluate,
    extract_answers,
    read_clip,
    wav_bytes,
    write_json,
    written_question,
)

# ======================================================================================================================
# 1. The demo's questions: two-step sums over 0..9, four options
# ======================================================================================================================
DIGITS = "zero one two three four five six seven eight nine".split()
SIGNS = {"plus": 1, "minus": -1}


def expressions():
    """All (a, sign, b, sign, c) whose value is within 0..9 after each step: 1,210 of them."""
    for a, s, b, t, c in product(range(10), SIGNS, range(10), SIGNS, range(10)):
        if 0 <= a + SIGNS[s] * b <= 9 and 0 <= a + SIGNS[s] * b + SIGNS[t] * c <= 9:
            yield a, s, b, t, c


def sum_question(expression, letter, rng, key):
    """One row (without audio), with the right answer under `letter` (0..3)."""
    a, s, b, t, c = expression
    result = a + SIGNS[s] * b + SIGNS[t] * c
    values = rng.choice([v for v in range(10) if v != result], 4, replace=False)
    values[letter] = result
    options = [DIGITS[v] for v in values]
    question = f"{DIGITS[a]} {s} {DIGITS[b]} {t} {DIGITS[c]}"
    spoken = f"{question}. " + ", ".join(f"{name} {option}" for name, option in zip(LETTERS, options))
    return {"key": key, "question": question, "options": options, "answer_index": letter, "prompt_for_tts": spoken}


def worked_answer(expression, letter):
    """The completion the base model learns to write."""
    a, s, b, t, c = expression
    first = a + SIGNS[s] * b
    result = first + SIGNS[t] * c
    sums = f"{DIGITS[a]} {s} {DIGITS[b]} is {DIGITS[first]}. {DIGITS[first]} {t} {DIGITS[c]} is {DIGITS[result]}"
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
    track = lambda values: np.repeat(np.array(values, np.float32), lengths, axis=0)
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


# ======================================================================================================================
# 3. The demo's base model
# ======================================================================================================================
PAUSE = " …"  # what the LLM's own vocabulary has for silence


def demo_texts(rng):
    """Everything the demo's model will ever read or write, for its tokenizer."""
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


def text_batch(tokenizer, expressions, rng, rows, drills, pauses):
    """Training rows for the LLM -> ids, attention mask and loss weights, each [rows, T].

    `drills` of the rows only look an option up: a number, four options, its letter. With `pauses` above 0 the questions
    are written as speech sounds: without line breaks, and with up to that many pauses a word on average. So the LLM
    survives audio embeddings, most of which stand for no word, without ever having met one.
    """
    token = tokenizer.convert_tokens_to_ids
    letters = [token(f" {letter}") for letter in LETTERS]
    breaks = (token("\n"), token("\n\n"))
    prompts, answers = [], []
    for i in range(rows):
        expression, letter = expressions[rng.integers(len(expressions))], int(rng.integers(4))
        question, answer = sum_question(expression, letter, rng, key=""), worked_answer(expression, letter)
        if i < drills:
            question["question"], name = question["options"][letter], LETTERS[letter]
            answer = f"<think>that is {question['question']} {name}</think><answer>The answer is {name}.</answer>"
        user = tokenizer(written_question(question)).input_ids
        if pauses:
            rate = rng.uniform(0, pauses)
            user = [t for u in user if u not in breaks for t in [token(PAUSE)] * rng.poisson(rate) + [u]]
        prompts.append(tokenizer(Qwen25Omni.before_user).input_ids + user + tokenizer(Qwen25Omni.after_user).input_ids)
        answers.append(tokenizer(answer + Qwen25Omni.end_of_turn[0]).input_ids)
    pad = lambda rows: nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    ids = pad([p + a for p, a in zip(prompts, answers)])
    mask = pad([[1] * (len(p) + len(a)) for p, a in zip(prompts, answers)])
    # The option's letter is the hard part and one token among twenty: it weighs three times as much.
    weights = pad([[0.0] * len(p) + [3.0 if t in letters else 1.0 for t in a] for p, a in zip(prompts, answers)])
    return ids, mask, weights


def train_llm(model, tokenizer, expressions, rng, steps):
    """Stage 1: teach the LLM to look options up, then to reason in writing."""
    decoder, embeddings = model.get_decoder(), model.get_input_embeddings()
    optimizer = torch.optim.AdamW([*decoder.parameters(), *model.lm_head.parameters()], lr=2e-3)
    bar = tqdm(range(steps), desc="base model 1/2: LLM learns to reason in writing", unit="step")
    for step in bar:
        # Looking up comes first and alone: mixed with sums from the start it is learnt much later.
        drills = 64 if step < 0.16 * steps else 16
        pauses = 1.5 * min(1.0, max(0.0, (step / steps - 0.1) / 0.2)) if step % 2 else 0.0
        ids, mask, weights = text_batch(tokenizer, expressions, rng, 64, drills, pauses)
        hidden = decoder(inputs_embeds=embeddings(ids), attention_mask=mask, use_cache=False).last_hidden_state
        learnt = weights[:, 1:] > 0
        nll = F.cross_entropy(model.lm_head(hidden[:, :-1][learnt]), ids[:, 1:][learnt], reduction="none")
        loss = (nll * weights[:, 1:][learnt]).sum() / weights.sum()
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
    """How far audio embeddings [n, H] are from the word embeddings of their targets [n]; pauses weigh a fifth."""
    weight = torch.where(targets == pause, 0.2, 1.0)
    named = F.cross_entropy(states @ table.T, targets, reduction="none")
    return ((named + (states - table[targets]).square().mean(-1)) * weight).sum() / weight.sum()


def answer_loss(lm, spoken, answers):
    """Mean loss of the worked answers' tokens under the spoken prompts; both are lists, [n, H] and [C] a question."""
    table = lm.model.get_input_embeddings().weight  # [V, H]
    embed = lambda text: table[lm.tokenizer(text).input_ids]  # [tokens, H]
    before = embed(lm.front.before_user + lm.front.before_audio)
    after = embed(lm.front.after_audio + lm.front.after_user)
    rows = [torch.cat([before, clip, after, table[answer]]) for clip, answer in zip(spoken, answers)]
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)  # padded on the right, where nothing looks
    hidden = lm.decoder(inputs_embeds=padded, use_cache=False).last_hidden_state
    predicts = [h[len(row) - len(a) - 1 : len(row) - 1] for h, row, a in zip(hidden, rows, answers)]
    return F.cross_entropy(lm.model.lm_head(torch.cat(predicts)), torch.cat(answers))


def train_encoder(lm, rows, words, answers, val, rng, steps, stop_at):
    """Stage 2, the LLM frozen: audio encoder and projector learn to speak the LLM's language, and are stopped early.

    For the first third of the steps each audio embedding is drawn to a word embedding of the LLM: to the word's where
    a word ends, to the pause elsewhere. Then the loss of the worked answer is added. Training stops as soon as the
    accuracy on spoken questions `val` reaches `stop_at`: the starved regime that the demo is about.
    """
    lm.model.requires_grad_(False)
    tower = [p.requires_grad_(True) for name, p in lm.model.named_parameters() if "audio_tower" in name]
    optimizer = torch.optim.AdamW(tower, lr=3e-3)
    table, token = lm.model.get_input_embeddings().weight, lm.tokenizer.convert_tokens_to_ids
    pause, accuracy, order = token(PAUSE), 0.0, []
    answers = [torch.tensor(lm.tokenizer(answer + lm.front.end_of_turn[0]).input_ids) for answer in answers]
    mels = [lm.extractor(read_clip(row["audio"]["bytes"]).numpy(), sampling_rate=SAMPLE_RATE, padding="longest",
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
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, step / 20) * (0.1 if step > steps // 3 else 1)
        descend(loss, optimizer)
        if step >= steps // 6 and step % 10 == 0:
            accuracy = evaluate(lm, val, extract_answers, Config(max_new_tokens=26, eval_batch=64))["speech"]
            if accuracy >= stop_at:
                break
        bar.set_postfix_str(f"loss {loss.item():.2f}, speech accuracy {100 * accuracy:.0f} %")
    bar.close()
    print(f"stage 2 ended after step {step}: {100 * accuracy:.1f} % of {len(val)} spoken validation questions right")


# ======================================================================================================================
# 4. The demo, and the command line
# ======================================================================================================================
# What tars.py should use with this model instead of the paper's settings, written beside the checkpoint.
DEMO_SETTINGS = {
    "data": "../train", "eval_data": "../test", "embedder": "ngrams", "questions_per_step": 16, "max_new_tokens": 26,
    "steps": 260, "lr": 1.6e-3, "micro_batch": 16, "gradient_checkpointing": False, "eval_batch": 64,
}


def demo(args):
    """The offline demo under args.out: model/ (base checkpoint), train/ and test/ (spoken questions)."""
    out = Path(args.out)
    if out.exists():
        raise UserError(f"{out} is there already: remove it to build the demo anew, or give another --out")
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
    for part in ("train", "test"):
        questions = datasets.Dataset.from_list(rows[part]).cast_column("audio", datasets.Audio(decode=False))
        questions.save_to_disk(aside / part)
    for piece in (model, tokenizer, lm.extractor):
        piece.save_pretrained(aside / "model")
    write_json(aside / "model" / "tars_config.json", DEMO_SETTINGS)
    aside.rename(out)
    print(f"{out}: base model, {len(rows['train'])} training and {len(rows['test'])} test questions")


def main(arguments=None):
    """Build the data set that the command line names."""
    parser = argparse.ArgumentParser(prog="data_prep.py", description=__doc__.split("\n")[0])
    parser.add_argument("source", choices=["demo"], help="what to build")
    for flag, default, help in (
        ("--out", "runs/demo", "directory to write"),
        ("--seed", 0, "seed of questions, voices and base model"),
        ("--text-steps", 600, "steps of the base model's stage 1"),
        ("--speech-steps", 600, "steps of its stage 2 at most"),
        ("--stop-at", 0.37, "speech accuracy at which stage 2 stops"),
        ("--train-clips", 2000, "spoken training questions"),
        ("--val-clips", 256, "spoken questions that decide when stage 2 stops"),
        ("--test-clips", 512, "held-out spoken questions"),
    ):
        parser.add_argument(flag, type=type(default), default=default, metavar="", help=f"{help} [{default}]")
    demo(parser.parse_args(arguments))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(print(f"data_prep.py: {error}", file=sys.stderr) or 2)
