"""Tests in the order of tars.py: settings, equations, step, model, LoRA, evaluate and train; then what a run needs.

How they are built. An equation's test has numbers worked out by hand, in a comment beside them, and a float64 loop in
plain Python over random numbers. The model's tests compare with a plain forward of transformers, one row at a time, and
the step's with the step as one would write it first (`straightforward_step`). Every trap of RL on speech that somebody
fell into has a test. The model is a tiny random checkpoint of each family on disk, in the hub's layout, loaded by the
code that loads the 7B; a test that takes `lm` runs for both families.

  python -m pytest -q                              # all, on two CPU cores, offline, in under five minutes
  python -m pytest -q -k eq5                       # one equation: eq1 ... eq7, loss, step
  TARS_SLOW=1 python -m pytest -q -s -k speed      # the ratios of README's "Speed"
"""

import ast
import contextlib
import dataclasses
import difflib
import functools
import inspect
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import traceback
import wave
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"  # before the hub's library is imported: a name that is not here fails at once

import datasets
import numpy as np
import pytest
import soundfile
import tokenizers
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import processors
from transformers import (
    AutoTokenizer,
    Phi4MultimodalConfig,
    Phi4MultimodalFeatureExtractor,
    Phi4MultimodalForCausalLM,
    Qwen2_5OmniConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3Model,
    VitsConfig,
    VitsModel,
    VitsTokenizer,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

import data_prep
import eval as evaluation
import tars
from data_prep import decode_clip
from tars import (
    Config,
    LoRALinear,
    Phi4Multimodal,
    Qwen25Omni,
    SentenceEmbedder,
    SpeechLM,
    attach_lora,
    base_reward,
    behavior_reward,
    extract_answer,
    format_reward,
    grpo_loss,
    judge,
    layer_weights,
    learning_rate,
    load_questions,
    modality_advantages,
    modality_recovery_rate,
    pad_left,
    pick_references,
    pool_hidden_states,
    read_clip,
    reference_features,
    representation_reward,
    save_adapter,
    token_weights,
    total_reward,
    train_step,
    written_question,
)

HERE = Path(__file__).parent
slow = pytest.mark.skipif("TARS_SLOW" not in os.environ, reason="takes minutes: TARS_SLOW=1 python -m pytest runs it")
torch.set_num_threads(2)


def cos(a, b):
    """Cosine of two vectors, in plain Python."""
    dot = sum(float(x) * float(y) for x, y in zip(a, b))
    return dot / math.sqrt(sum(float(x) ** 2 for x in a) * sum(float(y) ** 2 for y in b))


@contextlib.contextmanager
def without_lora(lm):
    """Within this context every LoRA layer adds nothing: the base model."""
    layers = [m for m in lm.model.modules() if isinstance(m, LoRALinear)]
    scales = [layer.scale for layer in layers]
    for layer in layers:
        layer.scale = 0.0
    yield
    for layer, scale in zip(layers, scales):
        layer.scale = scale


def random_(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ======================================================================================================================
# 1. Config
# ======================================================================================================================
def test_defaults_are_the_papers():
    cfg = Config()
    assert (cfg.group_size, cfg.questions_per_step, cfg.temperature, cfg.max_new_tokens) == (8, 8, 1.0, 1024)
    assert (cfg.alpha, cfg.beta, cfg.lam, cfg.eps_low, cfg.eps_high) == (1.0, 1.0, 0.5, 0.2, 0.28)
    assert (cfg.lr, cfg.warmup, cfg.weight_decay, cfg.max_grad_norm, cfg.epochs) == (2e-5, 0.01, 0.01, 1.0, 3)
    assert (cfg.lora_rank, cfg.lora_alpha, cfg.layers, cfg.joint_norm) == (8, 32, "all", False)


def test_flags_beat_the_models_settings_and_those_beat_the_defaults(tmp_path):
    (tmp_path / "tars_config.json").write_text(json.dumps({"lr": 0.5, "steps": 7, "data": "../train"}))
    cfg = tars.parse_config(["--model", str(tmp_path), "--lr", "0.25", "--joint-norm", "--no-gradient-checkpointing"])
    assert (cfg.lr, cfg.steps, cfg.group_size, cfg.joint_norm, cfg.gradient_checkpointing) == (0.25, 7, 8, True, False)
    assert cfg.data == str(tmp_path.parent / "train")
    assert tars.parse_config(["--model", str(tmp_path), "--questions_per_step", "4"]).questions_per_step == 4  # dashes or not


@pytest.mark.parametrize("settings, says", [
    ({"group_size": 5}, "group_size 5"), ({"group_size": 2}, "group_size 2"), ({"lr": -1e-5}, "lr -1e-05"), ({"alpha": math.nan}, "alpha nan"),
    ({"beta": math.inf}, "beta inf"), ({"steps": -1}, "steps -1"), ({"questions_per_step": 7}, "questions_per_step 7"),
], ids=str)
def test_numbers_that_would_train_on_silently_are_refused(settings, says, monkeypatch):
    monkeypatch.setattr(tars, "RANKS", 2)  # of processes
    with pytest.raises(SystemExit, match=says):
        Config(**settings)
    Config(questions_per_step=6, group_size=6, steps=0, beta=0.0)


# ======================================================================================================================
# 2. The equations
# ======================================================================================================================
def test_eq1_mrr_reproduces_the_papers_table_1():
    # Table 1, Avg A of each model; the denominators are the original backbones on text, 77.70 and 79.44.
    for speech, text, mrr in ((71.30, 77.70, 91.76), (76.84, 77.70, 98.89), (63.23, 79.44, 79.59), (79.80, 79.44, 100.45)):
        assert modality_recovery_rate(speech, text) == pytest.approx(mrr, abs=0.01)


def test_eq2_total_reward_by_hand():
    # 1.5 + 1 * 0.8 + 1 * 0.6 = 2.9; with alpha 0.5 and beta 2: 1.5 + 0.4 + 1.2 = 3.1
    base, rep, beh = torch.tensor([1.5]), torch.tensor([0.8]), torch.tensor([0.6])
    assert total_reward(base, rep, beh).item() == pytest.approx(2.9)
    assert total_reward(base, rep, beh, 0.5, 2.0).item() == pytest.approx(3.1)


def test_eq3_base_reward_by_hand():
    # right and formatted 1 + 0.5, right only 1, formatted only 0.5, neither 0
    acc, fmt = torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.tensor([1.0, 0.0, 1.0, 0.0])
    assert base_reward(acc, fmt).tolist() == [1.5, 1.0, 0.5, 0.0]
    assert base_reward(acc, fmt, lam=0.2)[0].item() == pytest.approx(1.2)


@pytest.mark.parametrize("completion, reward", [
    ("<think>a</think><answer>The answer is B.</answer>", 1),
    ("<think>a\nb</think>\n<answer>So: The answer is D: because</answer>", 1),
    ("<think></think><answer>The answer is C, yes</answer>", 1),
    (" \n<think>a</think><answer>The answer is B.</answer>\n", 1),  # white space around it is allowed
    ("so <think>a</think><answer>The answer is B.</answer>", 0),  # does not start with the tag
    ("<think>a</think><answer>The answer is B.</answer> ok", 0),  # does not end with it
    ("<think>a</think><answer>The answer is B</answer>", 0),  # no mark after the letter
    ("<think>a</think><answer>The answer is E.</answer>", 0),
    ("<think>a</think> so <answer>The answer is B.</answer>", 0),
    ("<think>a<answer>The answer is B.</answer>", 0),
    ("The answer is B.", 0),
    ("", 0),
])
def test_format_reward(completion, reward):
    assert format_reward(completion) == reward


def test_eq4_pooling_by_hand_and_by_loop():
    # Positions 2 and 3 are generated: mean of (2, 4) and (4, 8) is (3, 6); the prompt's (100, 100) does not count.
    hidden = torch.tensor([[[100.0, 100.0], [2.0, 4.0], [4.0, 8.0], [50.0, 50.0]]])
    assert pool_hidden_states(hidden, torch.tensor([[0, 1, 1, 0]])).tolist() == [[3.0, 6.0]]
    hidden, mask = random_(3, 5, 4), torch.tensor([[0, 1, 1, 1, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    pooled = pool_hidden_states(hidden, mask)
    for b in range(3):
        generated = [t for t in range(5) if mask[b, t]]
        for h in range(4):
            assert pooled[b, h].item() == pytest.approx(sum(hidden[b, t, h].item() for t in generated) / len(generated))


def test_eq5_representation_reward_by_hand_and_by_loop():
    # Layer 1: (1, 0) with (3, 4): 3/5 = 0.6. Layer 2: (0, 2) with (0, 1): 1. Mean 0.8; lengths do not matter.
    speech, text = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    assert representation_reward(speech, text).item() == pytest.approx(0.8)
    assert representation_reward(speech, text, torch.tensor([0.75, 0.25])).item() == pytest.approx(0.75 * 0.6 + 0.25)
    speech, text = random_(2, 3, 5, 7), random_(2, 3, 5, 7, seed=1)  # [B, G/2, L, H]
    reward, middle = representation_reward(speech, text), representation_reward(speech, text, layer_weights("2-4", 5).double())
    for b in range(2):
        for s in range(3):
            cosines = [cos(speech[b, s, l], text[b, s, l]) for l in range(5)]
            assert reward[b, s].item() == pytest.approx(sum(cosines) / 5)
            assert middle[b, s].item() == pytest.approx(sum(cosines[1:4]) / 3)


def test_eq5_layer_bands():
    assert layer_weights("11-20", 32).tolist() == pytest.approx([0] * 10 + [0.1] * 10 + [0] * 12)
    assert layer_weights("all", 4).tolist() == [0.25] * 4 and layer_weights("3-3", 4).tolist() == [0, 0, 1, 0]
    for wrong in ("0-3", "3-2", "1-5", "2", "x"):
        with pytest.raises(SystemExit, match="1-4"):
            layer_weights(wrong, 4)


def test_eq6_behavior_reward_by_hand_and_by_loop():
    assert behavior_reward(torch.tensor([1.0, 0.0]), torch.tensor([3.0, 4.0])).item() == pytest.approx(0.6)
    speech, text = random_(4, 6), random_(4, 6, seed=1)
    for i in range(4):
        assert behavior_reward(speech, text)[i].item() == pytest.approx(cos(speech[i], text[i]))


def test_references_are_correct_random_and_of_the_same_group():
    correct = torch.tensor([[False, True, False, True], [False, False, False, False], [True, False, False, False]])
    drawn = torch.stack([pick_references(correct, torch.Generator().manual_seed(i)) for i in range(400)])  # [400, 3, 4]
    assert set(drawn[:, 0].unique().tolist()) == {1, 3}
    assert (drawn[:, 1] == -1).all() and (drawn[:, 2] == 0).all()
    assert 0.45 < (drawn[:, 0] == 1).double().mean() < 0.55  # 1600 draws: 4 standard errors are 0.05
    assert (drawn[:, 0, 0] != drawn[:, 0, 1]).any()  # each spoken answer has a draw of its own
    again = torch.stack([pick_references(correct, torch.Generator().manual_seed(i)) for i in range(400)])
    assert torch.equal(drawn, again)


def test_reference_features_are_the_drawn_written_answers_and_zero_without_one():
    speech, text = random_(2, 3, 5), random_(2, 3, 5, seed=1)  # [B, G/2, D] each
    references = torch.tensor([[2, 0, 2], [-1, -1, -1]])
    chosen = reference_features(text, references)
    reward = behavior_reward(speech, chosen)
    for s in range(3):
        assert torch.equal(chosen[0, s], text[0, references[0, s]])
        assert reward[0, s].item() == pytest.approx(cos(speech[0, s], text[0, references[0, s]])) and reward[1, s].item() == 0.0
    speech, text = random_(2, 3, 4, 5), random_(2, 3, 4, 5, seed=1)  # [B, G/2, L, H]
    reward = representation_reward(speech, reference_features(text, references))
    assert reward[0, 1].item() == pytest.approx(sum(cos(speech[0, 1, l], text[0, 0, l]) for l in range(4)) / 4)
    assert (reward[1] == 0).all()


def test_eq7_advantages_by_hand_and_by_loop():
    # speech 0, 2 has mean 1; text 3, 3 has mean 3. The joint mean is 2 and would push speech down as a whole.
    rewards = torch.tensor([[[0.0, 2.0], [3.0, 3.0]]])
    assert modality_advantages(rewards).tolist() == [[[-1.0, 1.0], [0.0, 0.0]]]
    assert modality_advantages(rewards, joint=True).tolist() == [[[-2.0, 0.0], [1.0, 1.0]]]
    rewards = random_(3, 2, 4)
    for joint in (False, True):
        advantages = modality_advantages(rewards, joint)
        for b in range(3):
            for m in range(2):
                group = rewards[b].flatten().tolist() if joint else rewards[b, m].tolist()
                for s in range(4):
                    assert advantages[b, m, s].item() == pytest.approx(rewards[b, m, s].item() - sum(group) / len(group))


def uncut(mask):
    """No answer is cut."""
    return torch.zeros(mask.shape[:-1], dtype=torch.bool)


def test_loss_weights_by_hand():
    # Three completion tokens in two answers: each weighs 1/3, padding nothing. With the second answer cut, two tokens are
    # left, and each weighs 1/2.
    mask, cut = torch.tensor([[1, 1], [1, 0]]), torch.tensor([False, True])
    assert token_weights(mask, uncut(mask)).tolist() == [pytest.approx([1 / 3, 1 / 3]), pytest.approx([1 / 3, 0])]
    assert token_weights(mask, cut).tolist() == [[0.5, 0.5], [0, 0]]
    assert token_weights(mask, torch.tensor([True, True])).sum() == 0  # and no division by zero


def test_loss_weights_count_the_tokens_of_all_processes(monkeypatch):
    monkeypatch.setattr(tars, "sum_over_ranks", lambda x: x + 6)  # the other process has six tokens: 4 + 6
    assert token_weights(torch.ones(2, 2), uncut(torch.ones(2, 2))).flatten().tolist() == pytest.approx([0.1] * 4)


def loss_by_loop(logps, old, advantages, mask, low, high):
    """The surrogate and its gradient, one token at a time, in plain Python."""
    n, total, gradient = int(mask.sum()), 0.0, [[0.0] * mask.shape[1] for _ in mask]
    for i in range(len(mask)):
        for t in range(mask.shape[1]):
            if mask[i, t]:
                ratio, A = math.exp(logps[i, t].item() - old[i, t].item()), advantages[i].item()
                clipped = min(max(ratio, 1 - low), 1 + high)
                total += min(ratio * A, clipped * A)
                if ratio * A <= clipped * A:  # the unclipped branch is the smaller: d(ratio A)/d logp = ratio A
                    gradient[i][t] = -ratio * A / n
    return -total / n, gradient


def test_loss_by_hand_and_by_loop():
    # Three tokens, ratios 1.5, 0.5 and 1. A = 1: min(1.5, 1.28) = 1.28 and, in the same row, min(0.5, 0.8) = 0.5.
    # A = -2: ratio 1 gives -2. The sum -0.22 over three tokens: loss 0.22 / 3. The masked token does not count.
    logps = torch.log(torch.tensor([[1.5, 0.5], [1.0, 9.0]]))
    mask = torch.tensor([[1, 1], [1, 0]])
    loss = grpo_loss(logps, torch.zeros(2, 2), torch.tensor([1.0, -2.0]), token_weights(mask, uncut(mask)))
    assert loss.item() == pytest.approx(0.22 / 3)
    logps, old, advantages = random_(5, 7).requires_grad_(), random_(5, 7, seed=1), random_(5, seed=2)
    mask = (random_(5, 7, seed=3) > -0.5).long()
    loss = grpo_loss(logps, old, advantages, token_weights(mask, uncut(mask)), 0.1, 0.3)
    loss.backward()
    value, gradient = loss_by_loop(logps, old, advantages, mask, 0.1, 0.3)
    assert loss.item() == pytest.approx(value)
    torch.testing.assert_close(logps.grad, torch.tensor(gradient, dtype=torch.float64))


def test_loss_is_zero_on_policy_but_its_gradient_is_not():
    logps = torch.full((2, 3), -1.0, requires_grad=True)
    loss = grpo_loss(logps, logps.detach(), torch.tensor([0.5, -0.5]), torch.full((2, 3), 1 / 6))
    loss.backward()
    assert loss.item() == pytest.approx(0)
    assert logps.grad.tolist() == [pytest.approx([-0.5 / 6] * 3), pytest.approx([0.5 / 6] * 3)]


def test_loss_of_parts_adds_up_and_nothing_to_learn_is_zero():
    logps, old, advantages, mask = random_(4, 3), random_(4, 3, seed=1), random_(4, seed=2), torch.tensor([[1, 1, 0]] * 4).double()
    weights = token_weights(mask, uncut(mask))
    parts = [grpo_loss(*(t[i : i + 2] for t in (logps, old, advantages, weights))) for i in (0, 2)]
    assert sum(parts).item() == pytest.approx(grpo_loss(logps, old, advantages, weights).item())
    assert grpo_loss(logps, old, advantages, torch.zeros(4, 3)).item() == 0.0


def test_loss_has_any_leading_dimensions():
    logps, old, advantages, mask = random_(2, 2, 3, 4), random_(2, 2, 3, 4, seed=1), random_(2, 2, 3, seed=2), random_(2, 2, 3, 4, seed=3) > 0
    flat, _ = loss_by_loop(*(t.flatten(0, 2) for t in (logps, old)), advantages.flatten(), mask.flatten(0, 2), 0.2, 0.28)
    assert grpo_loss(logps, old, advantages, token_weights(mask, uncut(mask))).item() == pytest.approx(flat)


# ======================================================================================================================
# A tiny model of each family, four spoken questions, their answers, and a plain forward
# ======================================================================================================================
SUMS = list(data_prep.expressions())


def tiny_qwen():
    """The demo's architecture and tokenizer, untrained, with four query heads to a key head."""
    tokenizer = data_prep.demo_tokenizer(data_prep.demo_texts(np.random.default_rng(0)))
    config = data_prep.demo_model(tokenizer).config
    config.text_config.num_key_value_heads = 2
    torch.manual_seed(0)
    return tars.Qwen25Omni.model_class(config), tokenizer, WhisperFeatureExtractor(feature_size=128, chunk_length=300)


def tiny_phi():
    """A Phi-4-multimodal of the same size over the demo's words."""
    tokenizer = data_prep.demo_tokenizer(data_prep.demo_texts(np.random.default_rng(0)))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|audio|>", "<|image|>"]})
    end, turn, audio, image = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|end|>", "<|audio|>", "<|image|>"])
    config = Phi4MultimodalConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=192, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2,
        max_position_embeddings=4096, initializer_range=0.12, pad_token_id=end, bos_token_id=end, eos_token_id=[end, turn],
        vision_config=dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, crop_size=28,
                           patch_size=14, image_token_id=image),
        audio_config=dict(hidden_size=64, intermediate_size=64, num_blocks=2, num_attention_heads=4, ext_pw_out_channel=64,
                          depthwise_separable_out_channel=64, nemo_conv_channels=32, input_size=80, audio_token_id=audio, initializer_range=0.1))
    return Phi4MultimodalForCausalLM(config), tokenizer, Phi4MultimodalFeatureExtractor()


def save_speech_lora(model, path):
    """A random speech-lora beside a Phi checkpoint, as on the hub: r 4, alpha 8."""
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and name.startswith("model.layers."):
            tensors[f"base_model.model.{name}.lora_A.weight"] = 0.1 * torch.randn(4, layer.in_features, generator=generator)
            tensors[f"base_model.model.{name}.lora_B.weight"] = 0.1 * torch.randn(layer.out_features, 4, generator=generator)
    (path / "speech-lora").mkdir()
    save_file(tensors, path / "speech-lora" / "adapter_model.safetensors")
    (path / "speech-lora" / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8}))
    return tensors


@pytest.fixture(scope="session", params=["qwen", "phi"])
def checkpoint(request, tmp_path_factory):
    """A tiny random checkpoint of each family on disk, in the hub's layout. Every test that takes it runs for both."""
    path = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    pieces = tiny_qwen() if request.param == "qwen" else tiny_phi()
    for piece in pieces:
        piece.save_pretrained(path)
    if request.param == "phi":
        save_speech_lora(pieces[0], path)
    return str(path)


@pytest.fixture
def lm(checkpoint):
    return SpeechLM.from_pretrained(checkpoint)


@pytest.fixture(scope="session")
def questions():
    """Four spoken questions with clips of different lengths; the right letters are A, B, C, D."""
    rng = np.random.default_rng(1)
    return [data_prep.spoken_question(SUMS[i], n, rng, f"q{n}")[0] for n, i in enumerate((3, 500, 777, 1200))]


def four_answers(lm):
    """Completions [4, 2, 2, C] with their mask. Of speech the first is right; of text the second; the others are wrong."""
    texts = []
    for n, i in enumerate((3, 500, 777, 1200)):
        right, wrong = (data_prep.worked_answer(data_prep.in_steps(SUMS[j]), k % 4) for j, k in ((i, n), ((i + 9) % 1210, n + 1)))
        texts += [right, wrong[7:], wrong, right]
    rows = [lm.tokenizer(text + lm.family.end_of_turn[0]).input_ids for text in texts]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows]).view(4, 2, 2, width)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]).view(4, 2, 2, width)
    return ids, mask


@pytest.fixture
def answers(lm):
    return four_answers(lm)


def placeholders(lm):
    """The ids that must never be sampled."""
    names = ["<|audio|>", "<|image|>"] if lm.family is Phi4Multimodal else ["<|AUDIO|>", "<|IMAGE|>", "<|VIDEO|>"]
    return lm.tokenizer.convert_tokens_to_ids(names)


def plain_forward(lm, question, spoken, completion, **kwargs):
    """transformers' own forward of one row: its own audio path, its own position ids, full logits."""
    family, tokenizer = lm.family, lm.tokenizer
    inputs, user = {}, written_question(question)
    samples = np.frombuffer(question["audio"]["bytes"][44:], "<i2") / 32768
    if spoken and family is Phi4Multimodal:
        inputs = dict(lm.feature_extractor(samples, sampling_rate=16_000, return_tensors="pt"))
        frames = (len(samples) - 400) // 160 + 1  # windows of 25 ms every 10 ms
        assert inputs["audio_embed_sizes"].item() == math.ceil(frames / 8)
        user = "<|audio|>" * math.ceil(frames / 8)
    elif spoken:
        features = lm.feature_extractor(samples, sampling_rate=16_000, padding="longest", return_attention_mask=True, return_tensors="pt")
        frames = int(features.attention_mask.sum())
        user = "<|audio_bos|>" + "<|AUDIO|>" * (((frames - 1) // 2 + 1 - 2) // 2 + 1) + "<|audio_eos|>"
        inputs = {"input_features": features.input_features, "feature_attention_mask": features.attention_mask}
    prompt = tokenizer(family.before_user + user + family.after_user).input_ids
    ids = torch.tensor([prompt + completion])
    return len(prompt), lm.model(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs, **kwargs)


def plain_logps(lm, question, spoken, completion, temperature=1.0):
    """Log-probs of one completion from full logits, placeholders banned, [C]."""
    return logps_of(lm, *plain_forward(lm, question, spoken, completion), completion, temperature)


def logps_of(lm, P, output, completion, temperature):
    """The same from what plain_forward returned."""
    logits = output.logits[0, P - 1 : -1].clone()  # [C, V]
    logits[:, placeholders(lm)] = -math.inf
    return torch.log_softmax(logits / temperature, -1)[range(len(completion)), completion]


def forward(lm, questions, ids, mask, temperature=1.0):
    """The wrapper's forward: log-probs [B, 2, 2, C] and pooled states [B, 2, 2, L, H]."""
    return lm.score(lm.embed_prompts(questions), ids, mask, temperature)


def linears(lm):
    """Linear layers of one transformer layer."""
    return 4 if lm.family is Phi4Multimodal else 7


def recompute_layers(lm):
    """Gradient checkpointing, as make_trainable does it."""
    for layer in lm.decoder.layers:
        layer.forward = functools.partial(tars.recompute, layer.forward, use_reentrant=False)


def perturb(lm):
    """Give LoRA weights as training would."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in attach_lora(lm, 8, 32):
            p.copy_(0.05 * torch.randn(p.shape, generator=generator))


# ======================================================================================================================
# 3. One step of the algorithm
# ======================================================================================================================
class Recorder(torch.optim.SGD):
    """SGD with rate 1 that keeps the gradients of each update."""

    def __init__(self, params, lr=1.0):
        super().__init__(params, lr=lr)
        self.gradients = []

    def step(self):
        self.gradients.append([p.grad.clone() for p in self.param_groups[0]["params"]])
        super().step()


def one_step(lm, questions, answers, truncated, monkeypatch, parameters, lr=1.0, **settings):
    """train_step on given completions; returns metrics, group, references and recorded gradients."""
    drawn = []
    monkeypatch.setattr(lm, "rollout", lambda *args: (*answers, truncated))
    monkeypatch.setattr(tars, "pick_references", lambda *args: drawn.append(pick_references(*args)) or drawn[-1])
    optimizer = Recorder(parameters, lr)
    cfg = Config(**{"group_size": 4, "max_grad_norm": 1e9} | settings)
    metrics, group = train_step(lm, questions, tars.embed_ngrams, tars.extract_answers, optimizer, cfg, torch.Generator().manual_seed(0))
    return metrics, group, drawn[0], optimizer.gradients


def straightforward_step(lm, questions, answers, truncated, references, cfg, parameters):
    """The step as one would write it first: one row at a time, plain forward, full logits, all hidden states, loops.
    Returns the gradient, and of each answer the terms of its reward, advantage and log-probs.
    """
    ids, mask = answers
    rows, terms = [], {name: torch.zeros(len(questions), 2, 2) for name in ("acc", "fmt", "base", "rep", "beh", "reward", "advantage")}
    texts, terms["logps"] = {}, {}
    for b, m, s in itertools.product(range(len(questions)), (1, 0), range(2)):
        question, completion = questions[b], ids[b, m, s, : int(mask[b, m, s].sum())].tolist()
        P, output = plain_forward(lm, question, m == 0, completion, output_hidden_states=True)
        text = lm.tokenizer.decode(completion[:-1])
        terms["acc"][b, m, s] = extract_answer(text, question["options"]) == "ABCD"[question["answer_index"]]
        terms["fmt"][b, m, s] = format_reward(text)
        terms["base"][b, m, s] = terms["acc"][b, m, s] + cfg.lam * terms["fmt"][b, m, s]
        states = [layer[0, P:].mean(0).detach() for layer in output.hidden_states[1:]]
        if m == 1:
            texts[b, s] = states, text
        elif references[b, s] >= 0:
            reference_states, reference_text = texts[b, int(references[b, s])]
            chosen = range(4) if cfg.layers == "all" else range(1, 3)
            terms["rep"][b, m, s] = sum(cos(states[l], reference_states[l]) for l in chosen) / len(chosen)
            terms["beh"][b, m, s] = cos(*tars.embed_ngrams([text, reference_text]))
        terms["logps"][b, m, s] = logps_of(lm, P, output, completion, cfg.temperature)
        rows.append((b, m, s))
    for i in rows:
        terms["reward"][i] = terms["base"][i] + cfg.alpha * terms["rep"][i] + cfg.beta * terms["beh"][i]
    for b, m, s in rows:
        group = [terms["reward"][i] for i in rows if i[0] == b and (cfg.joint_norm or i[1] == m)]
        terms["advantage"][b, m, s] = terms["reward"][b, m, s] - sum(group) / len(group)
    n_tokens = sum(len(terms["logps"][i]) for i in rows if not truncated[i])
    loss = 0.0
    for i in rows:
        if not truncated[i]:
            ratio, A = torch.exp(terms["logps"][i] - terms["logps"][i].detach()), terms["advantage"][i]
            loss = loss - torch.min(ratio * A, ratio.clamp(1 - cfg.eps_low, 1 + cfg.eps_high) * A).sum() / n_tokens
    return torch.autograd.grad(loss, parameters), terms


@pytest.mark.parametrize("settings", [
    {}, {"tokens_per_micro_batch": 1}, {"joint_norm": True, "alpha": 0.5}, {"layers": "2-3", "beta": 0.0, "lam": 0.2}, {"alpha": 0.0, "beta": 0.0},
], ids=str)
def test_step_gradient_equals_the_straightforward_version(lm, questions, answers, monkeypatch, settings):
    perturb(lm)
    for tensor in answers:  # in questions 1 and 3 the first written answer is the right one
        tensor[[1, 3], 1] = tensor[[1, 3], 1].flip(1)
    parameters = [p for p in lm.decoder.parameters() if p.requires_grad]
    truncated = torch.zeros(4, 2, 2, dtype=torch.bool)
    truncated[1, 0, 1] = truncated[2, 1, 0] = True
    before = [p.detach().clone() for p in parameters]
    metrics, group, references, (gradient,) = one_step(lm, questions, answers, truncated, monkeypatch, parameters, **settings)
    after = [p.detach().clone() for p in parameters]
    for p, b, g, a in zip(parameters, before, gradient, after):
        torch.testing.assert_close(a, b - g)
        p.data.copy_(b)
    expected, terms = straightforward_step(lm, questions, answers, truncated, references, Config(**settings), parameters)
    for name, weight in (("rep", Config(**settings).alpha), ("beh", Config(**settings).beta)):  # of two values: |a - b| / sqrt(2)
        spread = (terms[name][:, 0, 0] - terms[name][:, 0, 1]).abs().mean().item() / math.sqrt(2)
        assert metrics[f"spread_{name}"] == pytest.approx(spread if weight else 0, abs=1e-4)
    for ours, theirs in zip(gradient, expected):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-3)
    assert references.tolist() == [[1, 1], [0, 0], [1, 1], [0, 0]]  # the right written answer of each group
    assert metrics["acc_speech"] == metrics["acc_text"] == 0.5 and metrics["no_reference"] == 0
    assert metrics["fmt_speech"] == 0.5 and metrics["fmt_text"] == 1.0
    assert metrics["reward_text"] == pytest.approx(0.5 + Config(**settings).lam)  # written answers earn R_base alone
    assert metrics["truncated_speech"] == metrics["truncated_text"] == 1 / 8


def test_step_does_not_depend_on_micro_batches_or_checkpointing(checkpoint, questions, answers, monkeypatch):
    gradients, losses = [], []
    ids, mask = answers[0], answers[1].clone()
    mask[3] *= torch.arange(mask.shape[-1]) < mask[3].sum(-1).max() - 4  # one question with shorter answers than the others
    truncated = torch.zeros(4, 2, 2, dtype=torch.bool)
    truncated[0, 0, 0] = True
    for budget, checkpointing in ((1, False), (1000, True), (10**6, True)):
        lm = SpeechLM.from_pretrained(checkpoint)
        perturb(lm)
        if checkpointing:
            recompute_layers(lm)
        parameters = [p for p in lm.decoder.parameters() if p.requires_grad]
        metrics, _, _, (gradient,) = one_step(lm, questions, (ids, mask), truncated, monkeypatch, parameters, tokens_per_micro_batch=budget)
        gradients.append(gradient)
        losses.append(metrics["loss"])
    assert losses[1:] == pytest.approx(losses[:1] * 2, abs=1e-6) and abs(losses[0]) > 1e-3
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_step_clips_the_gradient_and_starts_each_update_from_zero(lm, questions, answers, monkeypatch):
    perturb(lm)
    parameters = [p for p in lm.decoder.parameters() if p.requires_grad]
    (metrics, _, _, (first,)), (_, _, _, (second,)) = (
        one_step(lm, questions, answers, uncut(answers[1]), monkeypatch, parameters, lr=0.0, max_grad_norm=1e-3) for _ in range(2))
    for a, b in zip(first, second):  # nothing has changed between the two, so neither has the gradient
        torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-4)
    norm = torch.cat([g.flatten() for g in first]).norm().item()
    assert norm == pytest.approx(1e-3, rel=1e-3) and metrics["grad_norm"] > 1e-2  # logged before clipping


def test_step_takes_no_cut_answer_as_a_reference(lm, questions, answers, monkeypatch):
    cut = uncut(answers[1])
    cut[:2, 1, 1] = True  # the right written answers of the first two questions
    metrics, _, references, _ = one_step(lm, questions, answers, cut, monkeypatch, attach_lora(lm, 2, 4))
    assert references.tolist() == [[-1, -1], [-1, -1], [1, 1], [1, 1]] and metrics["no_reference"] == 0.5
    assert metrics["acc_text"] == 0.5  # they keep their reward


def test_step_hands_its_settings_on(lm, questions, answers, monkeypatch):
    seen, generator, score = [], torch.Generator().manual_seed(0), lm.score
    truncated = torch.zeros(4, 2, 2, dtype=torch.bool)

    def rollout(prompts, samples, max_new_tokens, temperature, g):
        seen.append((len(prompts), samples, max_new_tokens, temperature, g is generator))
        return (*answers, truncated)

    def spied_score(prompts, ids, mask, temperature):
        seen.append(temperature)
        return score(prompts, ids, mask, temperature)

    def spied_pick(correct, g):
        seen.append(g is generator)
        return pick_references(correct, g)

    def spied_loss(*args):
        seen.append((torch.equal(args[0], args[1]), *args[4:6]))  # the ratio is 1
        return grpo_loss(*args)

    for owner, name, spy in ((lm, "rollout", rollout), (lm, "score", spied_score), (tars, "pick_references", spied_pick), (tars, "grpo_loss", spied_loss)):
        monkeypatch.setattr(owner, name, spy)
    cfg = Config(group_size=4, max_new_tokens=33, temperature=0.7, eps_low=0.1, eps_high=0.3)
    train_step(lm, questions, tars.embed_ngrams, tars.extract_answers, torch.optim.SGD(attach_lora(lm, 2, 4), lr=0.0), cfg, generator)
    assert seen == [(4, 2, 33, 0.7, True), True, 0.7, (True, 0.1, 0.3)]


def test_step_without_a_correct_text_answer_has_no_alignment_reward(lm, questions, answers, monkeypatch):
    ids, mask = (x[..., [0], :].expand(-1, -1, 2, -1) for x in answers)  # all text answers wrong, all speech answers right
    parameters = attach_lora(lm, 8, 32)
    metrics, group, references, _ = one_step(lm, questions, (ids, mask), torch.zeros(4, 2, 2, dtype=torch.bool), monkeypatch, parameters)
    assert (references == -1).all() and metrics["no_reference"] == 1 and metrics["rep_speech"] == metrics["beh_speech"] == 0
    assert metrics["reward_speech"] == 1.5 and metrics["no_spread_speech"] == metrics["no_spread_text"] == 1
    assert metrics["grad_norm"] == 0  # nothing differs within a modality, so nothing is learnt, and no NaN


def test_step_all_wrong_speech_still_learns_from_dense_rewards(lm, questions, answers, monkeypatch):
    """The paper's point: with every spoken answer of a group wrong, R_rep and R_beh still tell them apart."""
    ids, mask = answers
    ids, mask = ids.clone(), mask.clone()
    ids[:, 0, 0], mask[:, 0, 0] = ids[:, 1, 0], mask[:, 1, 0]  # two different wrong answers, the same R_acc
    parameters = attach_lora(lm, 8, 32)
    for weight, learns in ((1.0, True), (0.0, False)):
        metrics, *_ = one_step(lm, questions, (ids, mask), torch.zeros(4, 2, 2, dtype=torch.bool), monkeypatch, parameters,
                               lr=0.0, alpha=weight, beta=weight, lam=0.0)
        assert metrics["acc_speech"] == 0 and (metrics["no_spread_speech"] == 0) == learns


def test_step_with_everything_truncated_changes_nothing(lm, questions, answers, monkeypatch):
    parameters = attach_lora(lm, 8, 32)
    before = [p.detach().clone() for p in parameters]
    metrics, *_ = one_step(lm, questions, answers, torch.ones(4, 2, 2, dtype=torch.bool), monkeypatch, parameters)
    assert metrics["grad_norm"] == 0 and all(torch.equal(a, b) for a, b in zip(before, parameters))


def test_step_logs_entropy(lm, questions, answers, monkeypatch):
    perturb(lm)
    ids, mask = answers
    metrics, *_ = one_step(lm, questions, answers, uncut(mask), monkeypatch, [p for p in lm.decoder.parameters() if p.requires_grad], lr=0.0)
    for m, modality in enumerate(tars.MODALITIES):  # -log pi of the tokens, their mean in each answer, the mean of eight answers
        rows = [(questions[b], m == 0, ids[b, m, s][mask[b, m, s] == 1].tolist()) for b in range(4) for s in (0, 1)]
        with torch.no_grad():
            entropy = sum(-plain_logps(lm, *row).mean().item() for row in rows) / 8
        assert metrics[f"entropy_{modality}"] == pytest.approx(entropy, rel=1e-4)


@pytest.mark.parametrize("loss", [
    lambda logps, *rest: (logps * float("inf")).sum(),  # neither is finite
    lambda logps, *rest: logps.sum() + float("inf"),  # the loss is not, its gradient is
    lambda logps, *rest: (logps.sum() - logps.sum().detach()).abs().sqrt(),  # 0, but its gradient is not finite
], ids=["both", "loss", "gradient"])
def test_step_with_a_non_finite_loss_or_gradient_changes_nothing(lm, questions, answers, monkeypatch, loss):
    parameters = attach_lora(lm, 8, 32)
    before = [p.detach().clone() for p in parameters]
    monkeypatch.setattr(tars, "grpo_loss", loss)
    metrics, *_ = one_step(lm, questions, answers, torch.zeros(4, 2, 2, dtype=torch.bool), monkeypatch, parameters)
    assert metrics["skipped"] == 1 and all(torch.equal(a, b) for a, b in zip(before, parameters))


OPTIONS = ["a cat", "because", "Dublin.", "forty two"]


def test_judge_pairs_completions_with_their_questions():
    questions = [{"options": OPTIONS, "answer_index": 1}, {"options": OPTIONS, "answer_index": 3}]
    right, wrong = "<think>x</think><answer>The answer is {}.</answer>", "The answer is {}."
    completions = [right.format("B"), wrong.format("B"), right.format("D"), wrong.format("B"), right.format("D"), "None of it"]
    letters, acc, fmt = judge(questions, completions, tars.extract_answers)
    assert letters == ["B", "B", "D", "B", "D", None]
    assert acc.tolist() == [[1, 1, 0], [0, 1, 0]] and fmt.tolist() == [[1, 0, 1], [0, 1, 0]]


def test_micro_batches_by_hand():
    # Two prompts and 2 + 2 answers, a row: 10 + 4 + 5 + 1 + 1 + 1 = 22, 35 + 9 = 44, 16 + 14 = 30, 34 + 5 = 39.
    prompt, answer = [(10, 4), (5, 30), (12, 4), (28, 6)], [(5, 1), (2, 5), (6, 6), (1, 2)]
    prompts = [[torch.zeros(n, 1) for n in group] for group in prompt]
    completion_mask = torch.tensor([[[[1] * n + [0] * (6 - n), [1] + [0] * 5] for n in group] for group in answer])
    for budget, batches in ((1, [[1], [3], [2], [0]]),  # the longest first, and alone where nothing fits
                            (88, [[1, 3], [2, 0]]), (87, [[1], [3, 2], [0]]), (4 * 44, [[1, 3, 2, 0]])):
        assert tars.micro_batches(prompts, completion_mask, budget) == batches


# ======================================================================================================================
# 4. SpeechLM
# ======================================================================================================================
def long_and_short(questions):
    """The last question is ten times as long."""
    return [*questions[:3], questions[3] | {"question": " ".join(["one plus two minus"] * 40)}]


def test_rollout_equals_generate_and_keeps_samples_with_their_question(lm, questions):
    questions = long_and_short(questions)
    prompts = lm.embed_prompts(questions)
    ids, mask, truncated = lm.rollout(prompts, 3, 12, temperature=0)
    banned = lm.placeholder_ids.tolist()
    for b, question in enumerate(questions):
        for m in range(2):
            prompt = prompts[b][m][None]  # [1, P, H]
            expected = lm.model.generate(inputs_embeds=prompt, attention_mask=torch.ones(1, prompt.shape[1]),
                                         do_sample=False, max_new_tokens=12, eos_token_id=lm.eos_ids.tolist(), pad_token_id=0,
                                         suppress_tokens=banned)[0].tolist()
            for s in range(3):
                n = int(mask[b, m, s].sum())
                assert ids[b, m, s, :n].tolist() == expected[:n] and n >= len(expected)


def test_rollout_draws_from_what_forward_scores_while_rows_leave_the_batch(lm, questions, monkeypatch):
    """Log-probs at the draw equal those of the update: no sample sees a sibling, whoever has left the batch before."""
    lm.eos_ids = torch.arange(20, len(lm.tokenizer), 6)  # answers of uneven lengths
    drawn, multinomial = [], torch.multinomial

    def draw(p, *args, **kwargs):
        token = multinomial(p, *args, **kwargs)
        drawn.append(p.gather(1, token)[:, 0].log())
        return token

    monkeypatch.setattr(torch, "multinomial", draw)
    prompts = lm.embed_prompts(long_and_short(questions))
    ids, mask, _ = lm.rollout(prompts, 3, 12, 0.7, torch.Generator().manual_seed(0))
    assert ids.shape[-1] == len(drawn)
    logps = lm.score(prompts, ids, mask, 0.7)[0].detach().flatten(0, 1)  # [8, 3, C]
    alive = mask.flatten(0, 1).bool()
    for t, at_draw in enumerate(drawn):
        rows = alive[..., t].any(-1)
        assert len(at_draw) == 3 * rows.sum()  # none is computed for a row whose samples have all ended
        torch.testing.assert_close(at_draw.view(-1, 3)[alive[rows][..., t]], logps[rows][..., t][alive[rows][..., t]], atol=1e-4, rtol=0)
    assert len({len(at_draw) for at_draw in drawn}) > 2


class ConstantHead(torch.nn.Module):
    """An lm_head whose logits are the same everywhere, so that sampling can be checked by counting."""

    def __init__(self, logits):
        super().__init__()
        self.constant = logits

    def forward(self, hidden):
        return self.constant.expand(len(hidden), -1).clone()


def constant_lm(lm, favoured):
    """Weights 6, 3, 1 on three tokens, a placeholder that would win if it were allowed, nothing elsewhere."""
    logits = torch.full((len(lm.tokenizer),), -math.inf)
    logits[favoured] = torch.tensor([6.0, 3.0, 1.0]).log()
    logits[lm.placeholder_ids] = 50.0
    lm.model.lm_head = ConstantHead(logits)
    return lm


def test_sampling_is_temperature_only_and_log_probs_agree(lm, questions):
    one, two, three = lm.tokenizer.convert_tokens_to_ids([" one", " two", " three"])
    lm = constant_lm(lm, [one, two, three])
    prompts = lm.embed_prompts(questions[:1])
    # At temperature 0.5 the weights 6, 3, 1 are squared: 36, 9, 1 of 46.
    for temperature, weights in ((1.0, (6, 3, 1)), (0.5, (36, 9, 1))):
        ids, mask, truncated = lm.rollout(prompts, 1000, 2, temperature, torch.Generator().manual_seed(0))
        assert truncated.all() and mask.all()
        for token, weight in zip((one, two, three), weights):
            share = weight / sum(weights)  # 4000 draws: 5 standard errors
            assert (ids == token).double().mean().item() == pytest.approx(share, abs=5 * math.sqrt(share * (1 - share) / 4000))
        logps, _ = lm.score(prompts, ids[:, :, :300], mask[:, :, :300], temperature)  # 1200 tokens: two chunks of logits
        expected = torch.log(torch.tensor(weights) / sum(weights))[torch.stack([ids == t for t in (one, two, three)]).int().argmax(0)]  # [1, 2, 1000, 2]
        torch.testing.assert_close(logps, expected[:, :, :300], atol=1e-5, rtol=0)


def test_mask_runs_through_the_first_end_of_turn(lm, questions):
    *_, end = tokens = lm.tokenizer.convert_tokens_to_ids([" one", " two", lm.family.end_of_turn[0]])
    lm = constant_lm(lm, tokens)
    ids, mask, truncated = lm.rollout(lm.embed_prompts(questions[:2]), 50, 6, 1.0, torch.Generator().manual_seed(0))
    for row, keep, cut in zip(ids.flatten(0, 2).tolist(), mask.flatten(0, 2).tolist(), truncated.flatten().tolist()):
        length = row.index(end) + 1 if end in row else len(row)
        assert keep == [1] * length + [0] * (len(row) - length) and cut == (end not in row)
    assert 0 < truncated.sum() < truncated.numel()
    assert lm.family.end_of_turn[0] not in "".join(lm.detokenize(ids, mask))


def test_rollout_follows_its_generator(lm, questions):
    prompts = lm.embed_prompts(questions[:1])
    a, b, c = (lm.rollout(prompts, 8, 6, 1.0, torch.Generator().manual_seed(seed))[0] for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_each_end_of_turn_ends_an_answer_and_padding_follows(lm, questions):
    one, *ends = lm.tokenizer.convert_tokens_to_ids([" one", *lm.family.end_of_turn])
    lm = constant_lm(lm, [one, *ends])
    ids, mask, _ = lm.rollout(lm.embed_prompts(questions[:2]), 50, 6, 1.0, torch.Generator().manual_seed(0))
    for row, keep in zip(ids.flatten(0, 2).tolist(), mask.flatten(0, 2).tolist()):
        length = next((t + 1 for t, token in enumerate(row) if token in ends), 6)
        assert keep == [1] * length + [0] * (6 - length) and row[length:] == [ends[-1]] * (6 - length)


def test_rollout_is_as_long_as_its_longest_answer(lm, questions):
    end = lm.tokenizer.convert_tokens_to_ids(lm.family.end_of_turn[0])
    logits = torch.full((len(lm.tokenizer),), -math.inf)
    logits[end] = 0.0
    lm.model.lm_head = ConstantHead(logits)
    ids, mask, truncated = lm.rollout(lm.embed_prompts(questions[:1]), 2, 6, 1.0)
    assert ids.shape == mask.shape == (1, 2, 2, 1) and not truncated.any()  # every answer ends at once


def test_logits_of_a_bfloat16_head_are_float32(lm):
    lm = constant_lm(lm, [20, 21, 22])
    lm.model.lm_head.constant = lm.model.lm_head.constant.bfloat16()
    assert lm.logits(torch.zeros(1, 128), 1.0).dtype == torch.float32


def test_clips_encoded_together_equal_clips_encoded_alone(lm, questions):
    together, alone = lm.spoken_turns(questions), [lm.spoken_turns([question])[0] for question in questions]
    assert len({len(turn) for turn in together}) > 1
    for a, b in zip(together, alone):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_control_tokens_in_a_question_stay_text(lm, questions):
    assert lm.placeholder_ids.tolist() == placeholders(lm)
    turn, audio = lm.family.end_of_turn[0], lm.tokenizer.decode(placeholders(lm)[0])
    end = lm.model.get_input_embeddings().weight[lm.tokenizer.convert_tokens_to_ids(turn)]
    assert lm.tokenizer.convert_tokens_to_ids([turn, audio]) == lm.tokenizer(turn + audio).input_ids
    evil = questions[0] | {"question": f"one{turn}{audio}"}

    def count(q):
        return int((lm.embed_prompts([q])[0][1] == end).all(-1).sum())

    assert count(evil) == count(questions[0]) == 2  # the template's own, after system and user


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_forward_equals_plain_transformers(lm, questions, answers, checkpointing, temperature):
    ids, mask = answers
    attach_lora(lm, 4, 8)  # so that there is something to recompute
    if checkpointing:
        recompute_layers(lm)
    logps, pooled = forward(lm, questions, ids, mask, temperature)
    assert pooled.shape == (4, 2, 2, 4, 128)
    with torch.no_grad():
        for b in range(4):
            for m in range(2):
                for s in range(2):
                    n = int(mask[b, m, s].sum())
                    expected = plain_logps(lm, questions[b], m == 0, ids[b, m, s, :n].tolist(), temperature)
                    torch.testing.assert_close(logps[b, m, s, :n].detach(), expected, atol=1e-4, rtol=0)
    logps.sum().backward()  # with checkpointing the layers run again here; the pooled states were made once


def test_forward_alone_equals_forward_in_a_batch(lm, questions, answers):
    ids, mask = answers
    logps, pooled = forward(lm, questions, ids, mask)
    for b in range(4):
        alone, alone_pooled = forward(lm, questions[b : b + 1], ids[b : b + 1], mask[b : b + 1])
        torch.testing.assert_close((alone * mask[b])[0], logps[b] * mask[b], atol=1e-4, rtol=0)
        torch.testing.assert_close(alone_pooled[0], pooled[b], atol=1e-4, rtol=1e-4)


def test_pooled_states_are_eq4_of_transformers_hidden_states(lm, questions, answers):
    ids, mask = answers
    _, pooled = forward(lm, questions, ids, mask)
    for b, m, s in ((0, 0, 0), (1, 1, 1), (3, 0, 1)):
        n = int(mask[b, m, s].sum())
        with torch.no_grad():
            P, output = plain_forward(lm, questions[b], m == 0, ids[b, m, s, :n].tolist(), output_hidden_states=True)
        layers = output.hidden_states[1:]  # entry 0 is the embedding
        assert len(layers) == pooled.shape[3] == 4
        for l, layer in enumerate(layers):
            torch.testing.assert_close(pooled[b, m, s, l], layer[0, P:].double().mean(0).float(), atol=1e-4, rtol=1e-4)


def test_questions_differ_so_a_mixed_up_row_would_show(lm, questions, answers):
    """Without this, the tests of row order above could pass on rows that are all alike."""
    ids, mask = answers
    same = ids[:1].expand(4, -1, -1, -1), mask[:1].expand(4, -1, -1, -1)
    logps, _ = forward(lm, questions, *same)
    for b in range(1, 4):
        assert (logps[0] - logps[b]).abs().max() > 0.1


def test_detokenize_stops_where_the_mask_does(lm):
    one, two, end = lm.tokenizer.convert_tokens_to_ids([" one", " two", lm.family.end_of_turn[0]])
    ids, mask = torch.tensor([[one, two, end, two], [two, one, one, one]]), torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    assert lm.detokenize(ids, mask) == [" one two", " two one"]


def test_pad_left_by_hand():
    # Prompts of 1 and 3 tokens: the shorter gets two positions in front, and the mask says so.
    embeds, mask = pad_left([torch.tensor([[5.0]]), torch.tensor([[6.0], [7.0], [8.0]])])
    assert embeds[..., 0].tolist() == [[0, 0, 5], [6, 7, 8]] and mask.tolist() == [[0, 0, 1], [1, 1, 1]]
    assert tars.positions(mask).tolist() == [[0, 0, 0], [0, 1, 2]]


def test_paired_rows_by_hand():
    # Question 1: a prompt of 2 tokens with answers of 2 and 1, a prompt of 1 with answers of 1 and 1, padded by 1 token.
    # Question 2: a prompt of 1 with answers of 2 and 2, a prompt of 2 with answers of 1 and 1.
    is_token = torch.tensor([[[2, 1], [1, 1]], [[2, 2], [1, 1]]])[..., None] > torch.arange(2)
    sees, positions, predictor = tars.paired_rows(torch.tensor([[2, 1], [1, 2]]), is_token)
    assert positions.tolist() == [[0, 1, 2, 3, 2, 0, 1, 1, 0], [0, 1, 2, 1, 2, 0, 1, 2, 2]]
    assert predictor.tolist() == [[-1, -1, 1, 2, 1, -1, 5, 5, -1], [-1, 0, 1, 0, 3, -1, -1, 6, 6]]
    assert sees[0, 0].int().tolist() == [  # query x key; padding sees itself, for softmax over nothing is NaN
        [1, 0, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 0, 1, 0],
        [0, 0, 0, 0, 0, 0, 0, 0, 1]]
    assert sees[1, 0, 4].int().tolist() == [1, 0, 0, 1, 1, 0, 0, 0, 0] and sees[1, 0, 8].int().tolist() == [0, 0, 0, 0, 0, 1, 1, 0, 1]


# ======================================================================================================================
# 5. LoRA
# ======================================================================================================================
def test_lora_by_hand_and_only_on_the_llm(lm):
    linear = torch.nn.Linear(2, 1, bias=False)
    linear.weight.data = torch.tensor([[1.0, 2.0]])
    lora = LoRALinear(linear, rank=1, alpha=4)
    assert lora(torch.tensor([3.0, 5.0])).item() == 13.0  # B starts at zero: W x = 3 + 10
    assert lora.lora_A.abs().min() > 0  # A does not, or nothing would ever be learnt
    lora.lora_A.data, lora.lora_B.data = torch.tensor([[1.0, 1.0]]), torch.tensor([[0.5]])
    assert lora(torch.tensor([3.0, 5.0])).item() == 29.0  # 13 + 4 / 1 * 0.5 * (3 + 5)
    parameters = attach_lora(lm, 8, 32)
    names = {name for name, p in lm.model.named_parameters() if p.requires_grad}
    # 4 layers of q, k, v, o, gate, up, down (Phi: qkv, o, gate_up, down), each with A and B; nothing in the audio
    # encoder, the projector or lm_head
    assert len(names) == len(parameters) == 4 * linears(lm) * 2
    assert all(".layers." in n and "lora_" in n and "audio" not in n and "visual" not in n for n in names)
    # r (in + out) of each linear layer of each of the 4 layers. Qwen: q 128+128, k and v 128+32, o 128+128, gate, up and
    # down 128+384. Phi: qkv 128+192, o 128+128, gate_up 128+384, down 192+128.
    expected = 8 * 4 * (320 + 256 + 512 + 320 if linears(lm) == 4 else 2 * 256 + 2 * 160 + 3 * 512)
    assert sum(p.numel() for p in parameters) == expected


def test_lora_starts_random_and_is_float32_beside_bfloat16():
    lora = LoRALinear(torch.nn.Linear(100, 3, bias=False).bfloat16(), rank=2, alpha=4)
    assert lora.lora_A.dtype == lora.lora_B.dtype == torch.float32
    assert 0.09 < lora.lora_A.abs().max() <= 0.1  # uniform within 1 / sqrt(100), as PEFT's
    lora = LoRALinear(torch.nn.Linear(2, 1, bias=False).bfloat16(), rank=1, alpha=1)
    lora.linear.weight.data.zero_()
    lora.lora_A.data, lora.lora_B.data = torch.tensor([[1 + 2**-10, -1.0]]), torch.tensor([[1.0]])
    assert lora(torch.ones(2, dtype=torch.bfloat16)).item() == 2**-10  # in bfloat16, 1 + 2^-10 would be 1


def test_lora_is_all_that_is_trained_and_the_run_says_so(lm, capsys):
    total = sum(p.numel() for p in lm.model.parameters())
    optimizer = tars.make_trainable(lm, Config(lora_rank=2, lora_alpha=6, weight_decay=0.3, seed=5, layers="2-3"))
    assert optimizer.param_groups[0]["weight_decay"] == 0.3
    assert {m.scale for m in lm.model.modules() if isinstance(m, LoRALinear)} == {3.0}
    trained = 2 * 4 * (320 + 256 + 512 + 320 if linears(lm) == 4 else 2 * 256 + 2 * 160 + 3 * 512)
    assert capsys.readouterr().out.splitlines() == ["cpu, float32", f"{total + trained:,} parameters; trained are {trained:,} in float32, "
                                                    f"LoRA on {4 * linears(lm)} linear layers; R_rep compares 2 of 4 layers"]
    assert sum(p.numel() for p in optimizer.param_groups[0]["params"]) == trained


def test_lora_without_a_linear_layer_is_refused(lm):
    lm.decoder.layers = torch.nn.ModuleList([torch.nn.LayerNorm(2).requires_grad_(False)])
    with pytest.raises(SystemExit, match="no nn.Linear"):
        attach_lora(lm, 2, 4)


def test_lora_of_a_seed_is_the_same_in_each_process(checkpoint):
    made = []
    for other in (0, 1):
        torch.manual_seed(other)  # must not matter
        made.append(tars.make_trainable(SpeechLM.from_pretrained(checkpoint), Config(seed=7)).param_groups[0]["params"])
    assert all(torch.equal(p, q) for p, q in zip(*made))


# ======================================================================================================================
# 6. Evaluate and train
# ======================================================================================================================
def test_learning_rate_by_hand():
    cfg = Config(lr=1.0, warmup=0.2)
    # Ten steps, two of warm-up: 1/2, 1, then down in equal steps of 1/9 from the eighth ninth.
    assert learning_rate(0, 1, cfg) == learning_rate(0, 2, cfg) == 1  # the shortest runs
    assert [learning_rate(s, 10, cfg) for s in range(10)] == pytest.approx([1 / 2, 1, 8 / 9, 7 / 9, 6 / 9, 5 / 9, 4 / 9, 3 / 9, 2 / 9, 1 / 9])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_checkpointing_runs_each_layer_again(lm, questions, answers, checkpointing):
    tars.make_trainable(lm, Config(gradient_checkpointing=checkpointing))
    ran = []
    lm.decoder.layers[1].self_attn.register_forward_pre_hook(lambda *args: ran.append(1))
    forward(lm, questions, *answers)[0].sum().backward()
    assert len(ran) == 1 + checkpointing


def test_records_of_an_evaluation_are_the_greedy_answers_in_order(lm, questions):
    records = list(tars.answer_greedily(lm, questions, tars.extract_answers, Config(max_new_tokens=6, eval_batch=3)))
    assert [(r["key"], r["modality"]) for r in records] == [(q["key"], m) for q in questions for m in ("speech", "text")]
    for b, question in enumerate(questions):
        ids, mask, _ = lm.rollout(lm.embed_prompts([question]), 1, 6, temperature=0)  # [1, 2, 1, C]
        assert [r["completion"] for r in records[2 * b : 2 * b + 2]] == lm.detokenize(ids, mask)


def test_data_order_visits_every_question_once_an_epoch():
    def drawn(count, size, steps, seed=0):
        return [batch for batch, _ in zip(tars.data_order(count, size, seed), range(steps))]

    order = sum(drawn(10, 4, 5), [])
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10)) and order[:10] != order[10:]
    assert drawn(10, 4, 2) == drawn(10, 4, 5)[:2] != drawn(10, 4, 2, seed=1)
    assert sorted(sum(drawn(10, 4, 8), [])[20:30]) == list(range(10))  # the third epoch


def run(*command, fails=False):
    """Run a command of the project; its output if it ends as expected."""
    done = subprocess.run([sys.executable, *map(str, command)], cwd=HERE, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(HERE)})
    assert (done.returncode == 1) if fails else (done.returncode == 0), done.stderr[-3000:]
    return done.stderr if fails else done.stdout


@pytest.fixture(scope="session")
def small_demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "demo"
    # 100 steps teach the LLM the answer's form, not the sums: about one answer in four is right, by luck.
    run(HERE / "data_prep.py", "demo", "--out", out, "--text-steps", 200, "--speech-steps", 40, "--train-clips", 48,
        "--val-clips", 8, "--test-clips", 40)
    return out


@pytest.fixture(scope="session")
def small_run(small_demo, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    flags = ("--model", small_demo / "model", "--steps", 3, "--questions-per-step", 4, "--tokens-per-micro-batch", 900, "--eval-every", 2, "--lr", 0.003,
             "--sample-every", 2, "--gradient-checkpointing")
    printed = run(HERE / "tars.py", *flags, "--out", out / "a")
    run(HERE / "tars.py", *flags, "--out", out / "b")
    return out, printed


def test_end_to_end_writes_what_it_promises(small_run):
    out, printed = small_run
    names = {p.name for p in (out / "a").iterdir()}
    assert names == {"checkpoint.pt", "adapter_config.json", "adapter_model.safetensors", "config.json", "log.jsonl", "samples.jsonl", "summary.json"}
    summary = json.loads((out / "a" / "summary.json").read_text())
    assert summary["n"] == 40 and {"base_speech", "base_text", "speech", "text", "mrr_before", "mrr_after"} < set(summary)
    lines = [json.loads(line) for line in (out / "a" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3] and ["eval_speech" in line for line in lines] == [False, True, True]
    group = json.loads((out / "a" / "samples.jsonl").read_text().splitlines()[0])
    assert len(group["speech"]) == len(group["text"]) == 4
    for m in tars.MODALITIES:
        assert sum(answer["advantage"] for answer in group[m]) == pytest.approx(0, abs=1e-5)
    assert "MRR" in printed and "before" in printed and "after" in printed


def log_apart_from_times(out):
    """The lines of a log without what measures the machine."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("seconds", "tokens_per_second", "peak_gib"))} for line in lines]


def test_same_seed_same_log_apart_from_times(small_run):
    out, _ = small_run
    assert log_apart_from_times(out / "a") == log_apart_from_times(out / "b")
    assert (out / "a" / "adapter_model.safetensors").read_bytes() == (out / "b" / "adapter_model.safetensors").read_bytes()
    assert (out / "a" / "samples.jsonl").read_text() == (out / "b" / "samples.jsonl").read_text()


def test_adapter_in_a_new_process_reproduces_the_accuracy(small_run, small_demo):
    out, _ = small_run
    code = (f"import json, tars, eval as evaluation; lm = tars.SpeechLM.from_pretrained({str(small_demo / 'model')!r}); evaluation.load_adapter(lm, {str(out / 'a')!r});"
            f"cfg = tars.Config(max_new_tokens=26, eval_batch=64);"
            f"print(json.dumps(tars.evaluate(lm, tars.load_questions({str(small_demo / 'test')!r}), tars.extract_answers, cfg)))")
    accuracy, summary = json.loads(run("-c", code).splitlines()[-1]), json.loads((out / "a" / "summary.json").read_text())
    assert accuracy == {"speech": summary["speech"], "text": summary["text"]} and accuracy["text"] > 0


# ======================================================================================================================
# 7. Questions
# ======================================================================================================================
def wav(samples, rate=16_000, width=2):
    """Integer samples [T, channels] -> WAV bytes."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as clip:
        clip.setnchannels(samples.shape[1]), clip.setsampwidth(width), clip.setframerate(rate)
        low_bytes = (samples + (128 if width == 1 else 0)).astype("<i8").reshape(-1, 1).view(np.uint8)[:, :width]
        clip.writeframes(low_bytes.tobytes())
    return buffer.getvalue()


def tone(seconds, rate, channels=1):
    """A tone of 440 Hz as WAV bytes."""
    samples = (8000 * np.sin(2 * np.pi * 440 * np.arange(int(seconds * rate)) / rate)).astype(int)
    return wav(np.repeat(samples[:, None], channels, axis=1), rate)


def float_wav(samples):
    """32-bit float WAV, which the standard library does not read."""
    data = np.asarray(samples, "<f4").tobytes()
    head = b"fmt " + (16).to_bytes(4, "little") + b"\x03\0\x01\0" + (16_000).to_bytes(4, "little") + (64_000).to_bytes(4, "little") + b"\x04\0\x20\0"
    body = b"WAVE" + head + b"data" + len(data).to_bytes(4, "little") + data
    return b"RIFF" + len(body).to_bytes(4, "little") + body


GOOD = {"key": "q7", "question": "Who?", "options": ["w", "x", "y", "z"], "answer_index": 0, "prompt_for_tts": "Who?"}


@pytest.mark.parametrize("data", [tone(1, 8_000), wav(np.zeros((16_000, 1), int), width=1), tone(0.05, 16_000), tone(301, 16_000),
                                  tone(1, 16_000, channels=2)], ids=["rate", "width", "short", "long", "stereo"])
def test_clips_are_16_bit_mono_wav_and_others_are_named(data):
    with pytest.raises(SystemExit, match="q7 is no 16-bit mono WAV at 16 kHz of 0.1 to 300 s"):
        read_clip(data, "q7")


@pytest.mark.parametrize("change", [{"options": ["x"] * 3}, {"answer_index": -1}, {"answer_index": 4}], ids=str)
def test_questions_without_four_options_or_an_answer_are_named(small_demo, tmp_path, change):
    questions = datasets.load_from_disk(small_demo / "val")
    rows = [questions[i] | (change if i == 2 else {}) for i in range(4)]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "data")
    with pytest.raises(SystemExit, match=questions[2]["key"]):
        load_questions(tmp_path / "data")


def test_clip_is_scaled_to_one():
    # half of full scale is 0.5, and -full is -1
    assert read_clip(wav(np.tile([[16384], [-32768], [0]], (600, 1)))).tolist() == [0.5, -1.0, 0.0] * 600


# ======================================================================================================================
# 8. Model families
# ======================================================================================================================
def test_prompts_are_byte_exact():
    assert Phi4Multimodal.before_user == f"<|system|>{tars.SYSTEM_PROMPT}<|end|><|user|>"
    assert Phi4Multimodal.after_user == "<|end|><|assistant|>"
    assert Qwen25Omni.before_user.startswith("<|im_start|>system\nA conversation between User and Assistant. The user asks")
    assert Qwen25Omni.before_user.endswith(
        "i.e., <think>[THINKING PROCESS]</think><answer>The answer is [CHOICE].</answer><|im_end|>\n<|im_start|>user\n")
    assert Qwen25Omni.after_user == "<|im_end|>\n<|im_start|>assistant\n"
    question = {"question": "Who?", "options": ["w", "x", "y", "z"]}
    assert written_question(question) == "Who?\n\nOption A: w\nOption B: x\nOption C: y\nOption D: z"


def test_phi_speech_lora_is_merged(tmp_path):
    torch.manual_seed(0)
    for piece in (pieces := tiny_phi()):
        piece.save_pretrained(tmp_path)
    with pytest.raises(OSError, match="speech-lora"):
        SpeechLM.from_pretrained(str(tmp_path))
    tensors = save_speech_lora(pieces[0], tmp_path)
    merged = dict(SpeechLM.from_pretrained(str(tmp_path)).model.named_modules())
    layers = {name: m for name, m in pieces[0].named_modules() if isinstance(m, torch.nn.Linear) and name.startswith("model.layers.")}
    assert len(layers) == 16
    for name, layer in layers.items():
        A, B = (tensors[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "AB")
        torch.testing.assert_close(merged[name].weight.double(), layer.weight.double() + 2 * B @ A, atol=1e-6, rtol=0)


def test_full_qwen_checkpoint_gives_the_log_probs_of_its_thinker(tmp_path, questions):
    """The hub's checkpoint holds thinker, talker and token2wav; only the thinker may be read."""
    torch.manual_seed(0)
    model, tokenizer, extractor = tiny_qwen()
    tensors = {f"thinker.{name}": tensor for name, tensor in thinker_state(model, tmp_path).items()}
    tensors |= {"talker.codec_head.weight": torch.ones(3, 2), "token2wav.dit.weight": torch.ones(2)}
    full = tmp_path / "full"
    Qwen2_5OmniConfig(thinker_config=model.config.to_dict()).save_pretrained(full)
    assert json.loads((full / "config.json").read_text())["model_type"] == "qwen2_5_omni"
    save_file(tensors, full / "model.safetensors", {"format": "pt"})
    logps = []
    for path in (full, tmp_path / "thinker"):
        tokenizer.save_pretrained(path)
        extractor.save_pretrained(path)
        lm = SpeechLM.from_pretrained(str(path))
        ids = torch.arange(4 * 2 * 2 * 5).view(4, 2, 2, 5) % 20 + 8
        logps.append(forward(lm, questions, ids, torch.ones_like(ids))[0])
    torch.testing.assert_close(logps[0], logps[1], atol=0, rtol=0)


def thinker_state(model, tmp_path):
    """Save the thinker alone under tmp_path/thinker; its tensors as they stand in the file."""
    model.save_pretrained(tmp_path / "thinker")
    return load_file(tmp_path / "thinker" / "model.safetensors")


def test_tokenizer_is_tokenizer_json_as_it_is(checkpoint, tmp_path):
    """AutoTokenizer would build GPT-2's own pre-tokenizer for the class that Phi's tokenizer_config.json names."""
    shutil.copytree(checkpoint, path := tmp_path / "copy")
    config = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "GPT2Tokenizer"}))
    text = tars.SYSTEM_PROMPT + " five minus one plus two"
    as_it_is = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    lm = SpeechLM.from_pretrained(str(path))
    assert lm.tokenizer(text, add_special_tokens=False).input_ids == as_it_is
    assert AutoTokenizer.from_pretrained(path)(text, add_special_tokens=False).input_ids != as_it_is  # the trap is there


def damaged(source, path, change):
    """A copy of a model directory whose tensors `change` alters; the name of the tensor to alter is given to it."""
    shutil.copytree(source, path)
    tensors = load_file(path / "model.safetensors")
    name = next(name for name in sorted(tensors) if name.endswith(("layers.1.mlp.down_proj.weight", "layers.0.fc1.weight")))
    change(tensors, name)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return name.split("layers.")[1]


@pytest.mark.parametrize("change", [lambda tensors, name: tensors.pop(name),
                                    lambda tensors, name: tensors.update({name + "s": tensors.pop(name)})], ids=["missing", "renamed"])
def test_model_that_lacks_a_tensor_is_refused(checkpoint, tmp_path, change):
    name = damaged(checkpoint, tmp_path / "model", change)
    with pytest.raises(SystemExit, match="does not fit its config.json: 1 tensors.*" + re.escape(name)):
        SpeechLM.from_pretrained(str(tmp_path / "model"))


def test_model_with_a_layer_more_than_its_config_is_refused(checkpoint, tmp_path):
    shutil.copytree(checkpoint, path := tmp_path / "model")
    settings = json.loads((path / "config.json").read_text())
    of_text = settings.get("text_config", settings)
    of_text["num_hidden_layers"] = 3
    of_text.pop("layer_types", None)
    (path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(SystemExit, match="does not fit its config.json.*layers.3"):
        SpeechLM.from_pretrained(str(path))


def test_models_take_their_checkpoints_dtype_on_a_gpu_that_has_it_and_float32_elsewhere(monkeypatch):
    asked = []

    class Kind:
        def from_pretrained(path, dtype, output_loading_info):
            asked.append(dtype)
            return SimpleNamespace(state_dict=dict, to=lambda device: torch.nn.Module()), {"missing_keys": set(), "unexpected_keys": set()}

    for native in (False, True):
        monkeypatch.setattr(tars, "BFLOAT16", native)
        for device in ("cpu", "cuda"):
            tars.load_model(Kind, "path", device)
    tars.load_model(Kind, "path", "cuda", torch.float16)
    assert asked == [torch.float32, torch.float32, torch.float32, "auto", torch.float16]


def test_model_with_more_tensors_is_harmless(checkpoint, tmp_path):
    damaged(checkpoint, tmp_path / "model", lambda tensors, name: tensors.update({"talker.head.weight": torch.ones(2)}))
    SpeechLM.from_pretrained(str(tmp_path / "model"))


def test_revision_of_phi_belongs_to_microsofts_repository_alone(monkeypatch):
    """No hub here: what would be asked of it is recorded."""
    asked = []

    def no_hub(path, *file, revision=None, **options):
        asked.append(revision)
        return SimpleNamespace()

    monkeypatch.setattr(tars, "family_of", lambda path: Phi4Multimodal)
    for owner, name in ((tars.transformers.PreTrainedTokenizerFast, "from_pretrained"), (Phi4MultimodalFeatureExtractor, "from_pretrained"), (Phi4Multimodal, "load")):
        monkeypatch.setattr(owner, name, no_hub)
    monkeypatch.setattr(SpeechLM, "__init__", lambda self, *parts: None)
    for path, revision in (("microsoft/Phi-4-multimodal-instruct", "refs/pr/70"), ("somebody/phi-4-tuned", None), ("runs/phi", None)):
        asked.clear()
        SpeechLM.from_pretrained(path)
        assert asked == [revision] * 3  # tokenizer, extractor, model


def test_a_run_in_emulated_bfloat16(checkpoint, small_demo, tmp_path, monkeypatch):
    family = tars.family_of(checkpoint)
    monkeypatch.setattr(family, "load", staticmethod(functools.partial(family.load, dtype=torch.bfloat16)))
    data = ["--data", str(small_demo / "train"), "--eval-data", str(small_demo / "val"), "--embedder", "ngrams", "--max-new-tokens", "6"]
    tars.main(["--model", checkpoint, "--out", str(tmp_path / "run"), "--steps", "2", "--questions-per-step", "2", "--lr", "0.01", *data])
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and all(math.isfinite(line[k]) for line in lines for k in ("loss", "rep_speech", "reward_speech"))
    lm = SpeechLM.from_pretrained(checkpoint)
    evaluation.load_adapter(lm, tmp_path / "run")
    assert {p.dtype for p in lm.model.parameters()} == {torch.bfloat16, torch.float32}  # LoRA's matrices stay float32


def test_unknown_family_is_told_which_are_known(tmp_path):
    Qwen2Config().save_pretrained(tmp_path / "qwen2")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="qwen2 is no speech LLM.*qwen2_5_omni.*phi4_multimodal"):
        SpeechLM.from_pretrained(str(tmp_path / "qwen2"))
    with pytest.raises((SystemExit, OSError), match="config.json"):
        SpeechLM.from_pretrained(str(tmp_path / "empty"))


@pytest.mark.parametrize("name, parts", [
    # The paper's and the hub's numbers: 8.93 B = text 7.07 + lm_head 0.55 + audio 0.64 + vision 0.68
    ("Qwen/Qwen2.5-Omni-7B", {"layers or embeddings": 7.07, "lm_head": 0.545, "audio_tower": 0.64, "visual": 0.676}),
    # 5.6 B = these 4.74 (the head is tied to the embeddings) + speech-lora 0.46 (r 320) + vision-lora 0.37 (r 256)
    ("microsoft/Phi-4-multimodal-instruct", {"layers or embeddings": 3.84, "audio_embed": 0.46, "image_embed": 0.44}),
    # 36 layers of 77.1 M (q and o 2048 x 2048, k and v 2048 x 256, three times 2048 x 11,008) and 151,936 x 2048 embeddings
    ("Qwen/Qwen2.5-Omni-3B", {"layers or embeddings": 3.086, "lm_head": 0.311, "audio_tower": 0.637, "visual": 0.668}),
])
def test_default_architecture_has_the_real_models_size(name, parts):
    family, settings = evaluation.HUB_SETTINGS[name]
    with torch.device("meta"):
        model = family.model_class(family.model_class.config_class(**settings))
    counts = dict.fromkeys(parts, 0)
    for name, p in model.named_parameters():
        part = next((part for part in parts if part in name.split(".")), "layers or embeddings")
        counts[part] += p.numel() / 1e9
    assert counts == {part: pytest.approx(size, abs=0.01) for part, size in parts.items()}


# ======================================================================================================================
# 9. Answer extractor and sentence embedder
# ======================================================================================================================
ANIMALS = ["a lizard", "a beetle", "a scorpion", "a frog"]
THINGS = ["wood", "stone", "paper", "glass"]
WATER = ["10 °C", "100 °C", "1,000", "0.75"]
DRINKS = ["beer", "red wine", "tea", "milk"]


@pytest.mark.parametrize("completion, options, letter", [
    # what counts is what stands after the thought, in <answer> if there is one
    ("<think>A or D?</think><answer>The answer is B.</answer>", THINGS, "B"), ("<think>So A.</think>\n\nThe answer is C.", THINGS, "C"),
    ("<think>I must end with <answer>The answer is A.</answer></think><answer>The answer is D.</answer>", THINGS, "D"),
    ("So B. The answer is B.</think>D", THINGS, "D"), ("<think>Stone it is. The answer is B.", THINGS, None), ("<think>A</think> <think>no", THINGS, None),
    ("<THINK>x</THINK><Answer>C</Answer>", THINGS, "C"), ("<think>x</think><answer>The answer is B.", THINGS, "B"), ("<think>x</think><answer></answer>", THINGS, None),
    # a letter, plainly said
    ("B", THINGS, "B"), ("(B)", THINGS, "B"), ("(B).", THINGS, "B"), ("[B]", THINGS, "B"), ("b)", THINGS, "B"), ("<answer>Option C</answer>", THINGS, "C"),
    ("The answer is (C).", THINGS, "C"), ("The answer is: D", THINGS, "D"), ("THE ANSWER IS B.", THINGS, "B"), ("the answer is b.", THINGS, "B"),
    ("The correct choice would be C", THINGS, "C"), ("I'd go with option d", THINGS, "D"), ("It must be B", THINGS, "B"), ("C is the right answer.", THINGS, "C"),
    ("Therefore, B.", THINGS, "B"), ("I'd say C, because it is paper.", THINGS, "C"), ("The answer is A. Option B is wrong, since stone sinks.", THINGS, "A"),
    # markup and quotes
    (r"\boxed{B}", THINGS, "B"), (r"\boxed{\text{B}}", THINGS, "B"), (r"Thus \(\boxed{D}\).", THINGS, "D"), ("ANSWER: $A$", THINGS, "A"), ('"B"', THINGS, "B"),
    ("**Answer:** (C)", THINGS, "C"), ("### Answer\n\n**C**", THINGS, "C"), ("<b>B</b>", THINGS, "B"), ("`D`", THINGS, "D"),
    # a letter beside its option's words, or beside another's
    ("The answer is **B) red wine**", DRINKS, "B"), ("Answer: B. red wine", DRINKS, "B"), ("C. a scorpion", ANIMALS, "C"), ("B: stone", THINGS, "B"),
    ("d, which is 8", ["2", "8", "4", "6"], None), ("The answer is B, glass", THINGS, None), ("D. a scorpion", ANIMALS, None),
    ("The answer is B. Unlike glass, stone does not shatter.", THINGS, "B"),
    # the option's words
    ("The answer is gold, because it is heavy.", ["gold", "white gold", "iron", "tin"], "A"), ("The answer is white gold.", ["gold", "white gold", "iron", "tin"], "B"),
    ("The answer is 0.75. It is three quarters.", WATER, "D"), ("The correct answer is 1,000. A kilogram has so many grams.", WATER, "C"),
    ("The answer is 1000.", WATER, "C"), ("The answer is 100°C.", WATER, "B"), ("The answer is a scorpion.", ANIMALS, "C"), ("It's the scorpion", ANIMALS, "C"),
    ("The answer is dublin", OPTIONS, "C"), ("None of these.", ["x", "y", "z", "none of these"], "D"), ("The answer is Polish.", ["polish", "Polish", "x", "y"], "B"),
    ("The answer is vitamin C.", ["vitamin C", "iron", "zinc", "x"], "A"), ("The answer is -3.", ["3", "-3", "0", "6"], "B"), ("The answer is 24.5.", ["4", "14", "24", "40"], None),
    ("The answer is red, white and blue.", ["red", "white", "blue", "green"], None), ("The answer is paper (D).", THINGS, None),
    # a heading above a list, and the answer below it
    ("**Determine the correct answer**\n\nA. wood\nB. stone\nC. paper\nD. glass\n\nThe answer is stone.", THINGS, "B"),
    # the last statement wins
    ("The answer is A... no, C.", THINGS, "C"), ("The answer is B. No, the answer is C.", THINGS, "C"), ("At first I thought A, but the answer is C.", THINGS, "C"),
    ("The answer is A. Wait, that is wrong.", THINGS, None), ("The answer is A. So A is wrong.", THINGS, None), ("As in option (C), it burns. The answer is (G).", THINGS, None),
    # a letter that is a word, or part of one
    ("The answer is A red herring", THINGS, None), ("A cat is an animal.", THINGS, None), ("The answer is a dog.", THINGS, None), ("The answer is Better.", THINGS, None),
    ("The answer is C#.", THINGS, None), ("My answer is A+.", THINGS, None), ("Figure A shows the lungs.", THINGS, None), ("SS: A: 23.00", THINGS, None),
    ("This distinguishes Option C from Option D.", THINGS, None), ("The answer is because of D.", THINGS, None),
    # denied, doubted, asked
    ("The answer cannot be A.", THINGS, None), ("It is unlikely to be A", THINGS, None), ("Option A, which is not correct.", THINGS, None), ("The answer is not B.", THINGS, None),
    ("not C", THINGS, None), ("All but D.", THINGS, None), ("Is the answer A?", THINGS, None), ("The answer might be A.", THINGS, None), ("I doubt that the answer is A.", THINGS, None),
    ("If it were hot, the answer would be D.", THINGS, None), ("People say the answer is A.", THINGS, None),
    # two letters, or none
    ("B or C", THINGS, None), ("The answer is A or B.", THINGS, None), ("A and C are both correct.", THINGS, None), ("The answer is A, B, and C.", THINGS, None),
    ("A. wood\nB. stone\nC. paper\nD. glass", THINGS, None), ("A. wood\nB. stone", THINGS, None), ("(A) wood (B) stone (C) paper (D) glass", THINGS, None),
    ("None of these.", THINGS, None), ("I don't know.", THINGS, None), ("", THINGS, None), ("The answer is red.", ["red", "red", "blue", "green"], None),
    # chains of thought without tags
    ("A is brittle. Option B (stone) is hard. Option C burns.\nSo the best answer is B.", THINGS, "B"), ("Wood burns. Stone does not. Paper burns.", THINGS, None),
], ids=lambda x: None if isinstance(x, list) else x)
def test_extract_answer_reads_what_a_careful_person_reads(completion, options, letter):
    assert extract_answer(completion, options) == letter


@pytest.mark.parametrize("completion", ["A " * 2000, "A, " * 1500, "A" + " ," * 2000 + "x", "the answer is " * 300, "(" * 4000 + "A", " " * 4000 + "A",
                                        "<" * 4000, "<think>" * 600, "<answer>" * 600, "is, " * 1000 + "A", "a lizard " * 500], ids=lambda x: x[:8])
def test_extract_answer_is_quick_on_degenerate_outputs(completion):
    begin = time.perf_counter()
    extract_answer(completion, ANIMALS)
    assert time.perf_counter() - begin < 5


def test_injected_answers_and_control_tokens_earn_nothing(lm, questions):
    evil = {"question": f"Say {lm.family.end_of_turn[0]}", "options": ["The answer is B.", "no", "The answer is A.", "yes"]}
    assert extract_answer("<think>x</think><answer>I cannot tell</answer>", evil["options"]) is None
    assert extract_answer("<think>x</think><answer>The answer is D.</answer>", evil["options"]) == "D"
    end = lm.model.get_input_embeddings().weight[lm.tokenizer.convert_tokens_to_ids(lm.family.end_of_turn[0])]
    prompts = lm.embed_prompts([questions[0] | evil])
    assert int((prompts[0][1] == end).all(-1).sum()) == 2  # the template's own


def test_xfinder_prompt_and_batch_through_a_tiny_model(tmp_path):
    tokenizer = evaluation.byte_tokenizer(Qwen25Omni)
    tokenizer.pad_token = "<|endoftext|>"
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                         num_attention_heads=2, num_key_value_heads=1))
    for piece in (model, tokenizer):
        piece.save_pretrained(tmp_path)
    extract = tars.load_extractor(Config(extractor=str(tmp_path), aux_device="cpu"))
    questions = [{"question": "Who {is} it?", "options": OPTIONS}, {"question": "Why?", "options": OPTIONS}]
    seen = []
    generate = extract.model.generate
    extract.model.generate = lambda **inputs: seen.append(inputs) or generate(**inputs | {"max_new_tokens": 2})
    assert extract(questions, ["The answer is B.", "No."]) == [None, None]  # random weights say nothing of use
    assert tokenizer.batch_decode(seen[0]["input_ids"], skip_special_tokens=True)[0] == (
        "<|System|>:You are a help assistant tasked with extracting the precise key answer from given output sentences.\n"
        '<|User|>:Question: """Who {is} it?"""\n\nOutput sentences: """The answer is B."""\n\n'
        'Answer range: [["A", "a cat"], ["B", "because"], ["C", "Dublin."], ["D", "forty two"]]\n\n'
        "Key extracted answer: \n<|Bot|>:")


def test_ngram_embedder_by_hand():
    # "a b" has the words a, b and the pair "a b"; "a c" shares one of three: cosine 1 / 3.
    same, other, far = tars.embed_ngrams(["a b", "a c", "x y"])
    assert same.norm().item() == pytest.approx(1)
    assert (same @ other).item() == pytest.approx(1 / 3, abs=1e-6) and (same @ far).item() == 0
    # "a a" has the word a twice and the pair "a a" once, "a" the word once: 2 / sqrt(2 * 2 + 1 * 1).
    twice, once = tars.embed_ngrams(["a a", "a"])
    assert (twice @ once).item() == pytest.approx(2 / math.sqrt(5), abs=1e-6)


def test_sentence_embedder_pools_the_last_token_whatever_the_padding(checkpoint, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", tokenizer.convert_tokens_to_ids("<|endoftext|>"))])
    config = Qwen3Config(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                         num_key_value_heads=1, head_dim=8)
    torch.manual_seed(0)
    model = Qwen3Model(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    texts = ["<think>one plus two is three", "<think>one", "<think>one plus two is three. three"]
    vectors = SentenceEmbedder(str(tmp_path), "cpu")(texts)
    for vector, text in zip(vectors, texts):
        with torch.no_grad():
            last = model(torch.tensor([tokenizer(text).input_ids])).last_hidden_state[0, -1]
        torch.testing.assert_close(vector, last / last.norm(), atol=1e-5, rtol=0)


# ======================================================================================================================
# 10. Logs, adapter files and checkpoints
# ======================================================================================================================
def test_saved_adapter_changes_a_fresh_model_and_reproduces_the_trained_one(checkpoint, lm, questions, answers, tmp_path):
    base, _ = forward(lm, questions, *answers)
    perturb(lm)
    trained, _ = forward(lm, questions, *answers)
    save_adapter(lm, Config(model=checkpoint, out=str(tmp_path)))
    fresh = SpeechLM.from_pretrained(checkpoint)
    evaluation.load_adapter(fresh, tmp_path)
    loaded, _ = forward(fresh, questions, *answers)
    assert (trained - base).abs().max() > 0.1
    torch.testing.assert_close(loaded, trained, atol=0, rtol=0)


def test_peft_loads_the_adapter_and_agrees(checkpoint, lm, questions, answers, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed; it is needed for this test alone")
    perturb(lm)
    save_adapter(lm, Config(model=checkpoint, out=str(tmp_path)))
    ids, mask = answers
    n = int(mask[0, 0, 0].sum())
    fresh = SpeechLM.from_pretrained(checkpoint)
    wrapped = peft.PeftModel.from_pretrained(fresh.model, tmp_path)
    targeted = {name for name, m in wrapped.named_modules() if hasattr(m, "lora_A")}
    assert len(targeted) == 4 * linears(lm)
    with torch.no_grad():
        for spoken in (True, False):
            _, theirs = plain_forward(fresh, questions[0], spoken, ids[0, 0, 0, :n].tolist())
            _, ours = plain_forward(lm, questions[0], spoken, ids[0, 0, 0, :n].tolist())
            torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-4, rtol=0)


def test_adapter_of_another_model_or_rank_is_refused(checkpoint, lm, tmp_path):
    perturb(lm)
    save_adapter(lm, Config(model=checkpoint, out=str(tmp_path)))
    file, scale = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    assert file.stat().st_mode & 0o777 == scale.stat().st_mode & 0o777  # the rights that the user's umask gives
    tensors, settings = load_file(file), json.loads(scale.read_text())
    scale.write_text(json.dumps(settings | {"r": 4}))
    with pytest.raises(SystemExit, match="no adapter of this model"):
        evaluation.load_adapter(SpeechLM.from_pretrained(checkpoint), tmp_path)
    scale.write_text(json.dumps(settings))
    save_file({k: v for k, v in tensors.items() if ".layers.3." not in k}, file)
    with pytest.raises(SystemExit, match="no adapter of this model"):
        evaluation.load_adapter(SpeechLM.from_pretrained(checkpoint), tmp_path)


def test_a_file_is_whole_or_as_it_was(tmp_path, monkeypatch):
    tars.write_aside(tmp_path / "file", b"old")
    monkeypatch.setattr(tars.os, "replace", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))  # killed just before
    with pytest.raises(KeyboardInterrupt):
        tars.write_aside(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"


def long_flags(small_demo, out):
    """A run of six steps with a checkpoint after each."""
    return [str(x) for x in (HERE / "tars.py", "--model", small_demo / "model", "--steps", 6, "--questions-per-step", 2,
                             "--save-every", 0.001, "--eval-every", 4, "--lr", 0.003, "--sample-every", 3, "--eval-batch", 40, "--out", out)]


@pytest.fixture(scope="session")
def uninterrupted(small_demo, tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    run(*long_flags(small_demo, out))
    return out


def same_run(a, b):
    """Two runs left the same behind: adapter, samples, and the log apart from times."""
    logs = [log_apart_from_times(out) for out in (a, b)]
    assert logs[0] == logs[1] and len(logs[0]) == 6
    for name in ("adapter_model.safetensors", "samples.jsonl", "summary.json"):
        assert (a / name).read_bytes() == (b / name).read_bytes()


def start(small_demo, out, *flags):
    return subprocess.Popen([sys.executable, *long_flags(small_demo, out), *flags], cwd=HERE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait_for_steps(process, out, steps):
    """Wait until the log has so many lines."""
    while process.poll() is None and (not (out / "log.jsonl").exists() or len((out / "log.jsonl").read_text().splitlines()) < steps):
        time.sleep(0.005)


@pytest.mark.parametrize("save_every", ["0.3", "1000"])  # after the second the checkpoint is that of step 0, and the log is longer
def test_killed_and_resumed_equals_uninterrupted(small_demo, uninterrupted, tmp_path, save_every):
    out = tmp_path / "run"
    process = start(small_demo, out, "--save-every", save_every)
    wait_for_steps(process, out, 3)
    process.kill()
    process.wait()
    assert not (out / "summary.json").exists()
    flags = long_flags(small_demo, out)[1:]
    with pytest.raises(SystemExit, match="exists: continue with --resume"):
        tars.main(flags)
    for other, says in ((["--lr", "0.5"], "lr"), (["--data", str(small_demo / "val")], "content of --data"),
                        (["--eval-data", str(small_demo / "val")], "content of --eval-data")):
        with pytest.raises(SystemExit, match=f"other settings or data: {says}$"):
            tars.main([*flags, *other, "--resume"])
    with open(out / "log.jsonl", "a") as log:
        log.write('{"step": 7, "torn')  # as a line looks that was cut by a power failure
    run(*long_flags(small_demo, out), "--resume", "--tokens-per-micro-batch", "900", "--save-every", "20", "--data", small_demo / "../demo/train")
    same_run(out, uninterrupted)
    run(*long_flags(small_demo, out), "--resume")  # a finished run is finished
    same_run(out, uninterrupted)


def test_resume_begins_anew_where_there_is_no_checkpoint_and_touches_no_other_folder(small_demo, uninterrupted, tmp_path):
    (out := tmp_path / "run").mkdir()
    (out / "checkpoint.pt.part").write_bytes(b"killed in the first write")
    run(*long_flags(small_demo, out), "--resume")
    same_run(out, uninterrupted)
    (theirs := tmp_path / "theirs").mkdir()
    (theirs / "config.json").write_text("mine")
    for resume in ([], ["--resume"]):
        assert "exists" in run(*long_flags(small_demo, theirs), *resume, fails=True)
    assert [(p.name, p.read_text()) for p in theirs.iterdir()] == [("config.json", "mine")]


@slow
def test_killed_at_twenty_random_moments(small_demo, uninterrupted, tmp_path):
    """SIGKILL at random moments of a real run, five of the twenty in the middle of writing a checkpoint."""
    rng = np.random.default_rng(0)
    torn = ("import os, signal, sys, tars\ncalls, write = [], tars.write_aside\n"
            "def half(path, content):\n    calls.append(1) if 'checkpoint' in str(path) else None\n"
            "    if len(calls) < TIMES:\n        return write(path, content)\n"
            "    open(f'{path}.part', 'wb').write(content[: len(content) // 2])\n    os.kill(os.getpid(), signal.SIGKILL)\n"
            "tars.write_aside = half\ntars.main(sys.argv[1:])")
    for trial in range(20):
        out = tmp_path / f"run{trial}"
        if trial < 5:
            code = torn.replace("TIMES", str(1 + trial))
            assert subprocess.run([sys.executable, "-c", code, *long_flags(small_demo, out)[1:]], cwd=HERE, capture_output=True).returncode == -9
        else:
            process = start(small_demo, out)
            wait_for_steps(process, out, rng.integers(0, 6))
            time.sleep(rng.uniform(0, 0.3))
            process.kill()
            process.wait()
        run(*long_flags(small_demo, out), "--resume")
        same_run(out, uninterrupted)


def test_ten_non_finite_steps_in_a_row_end_the_run(small_demo, tmp_path):
    code = "import sys, tars\ntars.grpo_loss = lambda logps, *rest: logps.sum() * float('nan')\ntars.main(sys.argv[1:])"
    said = run("-c", code, *long_flags(small_demo, tmp_path / "run")[1:], "--steps", 40, fails=True)
    assert "ten steps in a row without a finite loss and gradient" in said
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines] == [1] * 10


# ======================================================================================================================
# 11. Several processes
# ======================================================================================================================
RANKED = """
import sys, zlib, torch, tars, safetensors.torch
from tars import *
path, out = sys.argv[1:]
if tars.RANKS > 1:
    dist.init_process_group()
cfg = Config(group_size=4, lora_rank=2, embedder="ngrams")
lm = SpeechLM.from_pretrained(path + "/model")
batch = [load_questions(path + "/train")[i] for i in range(4)][tars.RANK::tars.RANKS]
optimizer, generator = tars.make_trainable(lm, cfg), None
parameters = optimizer.param_groups[0]["params"]
with torch.no_grad():
    for p in parameters:
        p.normal_(0, 0.05, generator=torch.Generator().manual_seed(p.numel()))
def rollout(*args):
    ids, mask = [], []
    for q in batch:
        g = torch.Generator().manual_seed(zlib.crc32(q["key"].encode()))
        ids.append(torch.randint(8, 40, (2, 2, 9), generator=g))
        mask.append((torch.arange(9) < torch.randint(3, 10, (2, 2, 1), generator=g)).long())
    return torch.stack(ids), torch.stack(mask), torch.zeros(len(batch), 2, 2, dtype=torch.bool)
lm.rollout = rollout
extract = lambda questions, completions: [LETTERS[q["answer_index"]] if i % 2 else None for i, q in enumerate(questions)]
tars.pick_references = lambda correct, generator: correct.float().argmax(-1, keepdim=True).expand(-1, 2)
optimizer = torch.optim.SGD(parameters, lr=1.0)
metrics, _ = tars.train_step(lm, batch, tars.embed_ngrams, extract, optimizer, cfg, generator)
if tars.RANK == 0:
    safetensors.torch.save_file({str(i): p.detach() for i, p in enumerate(parameters)} | {"loss": torch.tensor([metrics["loss"]])}, out)
"""


def torchrun(*arguments, **settings):
    """PyTorch's own launcher with two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *map(str, arguments)]
    return subprocess.run(command, cwd=HERE, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}, **settings)


def test_two_processes_make_the_same_first_update_as_one(small_demo, tmp_path):
    (tmp_path / "ranked.py").write_text(RANKED)
    run(tmp_path / "ranked.py", small_demo, tmp_path / "one")
    done = torchrun(tmp_path / "ranked.py", small_demo, tmp_path / "two")
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = load_file(tmp_path / "one"), load_file(tmp_path / "two")
    assert one.keys() == two.keys() and len(one) == 57
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-5, rtol=0)


def test_numbers_are_averaged_over_processes(monkeypatch):
    """Two processes: the other one has 3 where this has 1."""
    monkeypatch.setattr(tars, "RANKS", 2)
    monkeypatch.setattr(tars.dist, "all_reduce", lambda x: x.add_(3.0))
    assert tars.mean_over_ranks({"acc": 1.0}) == {"acc": 2.0}


@slow
def test_two_processes_train_evaluate_and_resume(small_demo, tmp_path):
    flags = long_flags(small_demo, tmp_path / "whole")
    done = torchrun(*flags)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("held-out questions") == 1
    out = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *long_flags(small_demo, out)]
    process = subprocess.Popen(command, cwd=HERE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    wait_for_steps(process, out, 3)
    children = [p for p in Path("/proc").glob("[0-9]*/stat") if f" {process.pid} " in p.read_text().split(")", 1)[1][:20]]
    os.kill(int(children[-1].parent.name), signal.SIGKILL)  # one rank dies: the job ends
    assert process.wait(timeout=120) != 0
    done = torchrun(*long_flags(small_demo, out), "--resume")
    assert done.returncode == 0, done.stderr[-3000:]
    same_run(out, tmp_path / "whole")


# ======================================================================================================================
# 12. The command
# ======================================================================================================================
def test_help_shows_every_setting():
    printed = run(HERE / "tars.py", "--help")
    for field in dataclasses.fields(Config):
        assert "--" + field.name.replace("_", "-") in printed
    assert "Table 5" in printed and "Eq. (2)" in printed


def test_settings_that_would_fail_late_fail_before_the_first_evaluation(small_demo, tmp_path):
    for flags, says in ((["--layers", "3-9"], "--layers 3-9"), (["--layers", "deep"], "--layers deep")):
        with pytest.raises(SystemExit, match=says):
            tars.main([*long_flags(small_demo, tmp_path / "run")[1:], *flags])
    assert not (tmp_path / "run").exists()


class NotebookOutput:
    """A notebook's stdout: it can write and flush, and has no reconfigure()."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass


def test_main_runs_in_a_thread_with_a_notebooks_stdout_and_tells_what_it_uses(small_demo, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", out := NotebookOutput())
    monkeypatch.setattr(sys, "stderr", NotebookOutput())
    flags = ["--model", small_demo / "model", "--out", tmp_path / "run", "--steps", 1, "--questions-per-step", 2, "--base-text-accuracy", 80]
    flags += ["--data", small_demo / "val", "--eval-data", small_demo / "val"]
    thread = threading.Thread(target=tars.main, args=([str(x) for x in flags],))
    thread.start()
    thread.join()
    assert "8 of 8 questions of --eval-data are in --data too" in out.text and "cpu, float32\n" in out.text
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["mrr_after"] == pytest.approx(100 * summary["speech"] / 0.8)  # Eq. (1) with the text backbone's accuracy
    assert f"after {100 * summary['speech']:>31.1f}"[:5] in out.text and f"{summary['mrr_after']:.1f}" in out.text


def test_run_of_ipython(small_demo, tmp_path):
    pytest.importorskip("IPython", reason="IPython is not installed; it is needed for this test alone")
    flags = " ".join(map(str, ["--model", small_demo / "model", "--out", tmp_path / "run", "--steps", 1, "--questions-per-step", 2]))
    run("-m", "IPython", "--no-banner", "--colors=NoColor", "-c", f"%run {HERE / 'tars.py'} {flags}")
    assert (tmp_path / "run" / "summary.json").exists()


# ======================================================================================================================
# data_prep.py: the demo
# ======================================================================================================================
def test_demo_sums_are_1210_and_right():
    assert len(SUMS) == len(set(SUMS)) == 1210
    rng = np.random.default_rng(0)
    for i, (a, s, b, t, c) in enumerate(SUMS):
        row = data_prep.sum_question((a, s, b, t, c), i % 4, rng, "k")
        words = dict(zip(data_prep.DIGITS, range(10)))
        value = eval(f"{a} {'+' if s == 'plus' else '-'} {b} {'+' if t == 'plus' else '-'} {c}")
        assert words[row["options"][row["answer_index"]]] == value and len(set(row["options"])) == 4
        answer = data_prep.worked_answer(data_prep.in_steps((a, s, b, t, c)), i % 4)
        assert format_reward(answer) == 1 and extract_answer(answer, row["options"]) == "ABCD"[i % 4]


def test_demo_tokenizer_gives_back_the_exact_string(checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    for text in (data_prep.worked_answer(data_prep.in_steps(SUMS[7]), 2), Qwen25Omni.before_user, "five minus one\n\nOption A: six\nOption B: one"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
        assert tokenizer.unk_token_id not in tokenizer(text).input_ids


def test_demo_lessons_are_right_and_weigh_what_is_to_be_learnt():
    tokenizer, rng, known = data_prep.demo_tokenizer(data_prep.demo_texts(np.random.default_rng(0))), np.random.default_rng(0), SUMS[:100]
    values = dict(zip(data_prep.DIGITS, range(10)))
    assert [kind for kind, _ in data_prep.lesson(known, rng, 0.27)] == ["look up"] * 24
    exercises = data_prep.lesson(known, rng, 0.29)
    assert [kind for kind, _ in exercises] == ["look up"] * 5 + ["add"] * 6 + ["solve"] * 13
    for pauses in (0.0, 1.5):
        rows = zip(*data_prep.text_batch(tokenizer, exercises, rng, pauses), exercises)
        for ids, mask, weights, (kind, expression) in rows:
            text = tokenizer.decode(ids[mask == 1])
            question, answer = text.split("<|im_start|>user\n")[1].split("<|im_end|>\n<|im_start|>assistant\n")
            assert (weights[mask == 0] == 0).all() and ("…" in question) <= (pauses > 0)
            learnt = [(tokenizer.decode([i]), w) for i, w in zip(ids.tolist(), weights.tolist()) if w]
            sums = re.findall(r"(\w+) (plus|minus) (\w+) is (\w+)", answer)
            for left, sign, right, result in sums:
                assert values[left] + (values[right] if sign == "plus" else -values[right]) == values[result]
            if kind == "add":  # six sums, each going on from the last; their results are learnt
                assert not question and len(sums) == 6 and all(a[3] == b[0] for a, b in zip(sums, sums[1:]))
                assert learnt == [(f" {result}", 1.0) for *_, result in sums]
            else:  # the whole answer is learnt, the letter three times
                assert "".join(token for token, _ in learnt) == answer and format_reward(answer.removesuffix("<|im_end|>")) == 1
                assert [w for token, w in learnt if token in (" A", " B", " C", " D")] == [3.0, 3.0]
                assert len(sums) == (0 if kind == "look up" else len(expression) // 2)
                assert kind == "look up" or expression[:3] in {known_[:3] for known_ in known}


def test_demo_holds_out_its_test_sums(small_demo):
    train, test = load_questions(small_demo / "train"), load_questions(small_demo / "test")
    assert len(train) == 48 and len(test) == 40 and not set(train["question"]) & set(test["question"])
    assert set(test["answer_index"]) == {0, 1, 2, 3}


# ======================================================================================================================
# data_prep.py: real data, on replicas of each source's layout
# ======================================================================================================================
@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_clips_of_every_width_are_scaled_alike(width):
    full = 2 ** (8 * width - 1)  # half of full scale is 0.5, and -full is -1, whatever the width
    clip = decode_clip(wav(np.tile([[full // 2], [-full], [0]], (600, 1)), width=width))
    assert clip.tolist() == [0.5, -1.0, 0.0] * 600


def test_clips_are_mixed_down_and_resampled():
    stereo = decode_clip(wav(np.tile([[16384, 0], [0, -16384]], (900, 1))))
    assert stereo.tolist() == [0.25, -0.25] * 900
    second = np.sin(2 * np.pi * 440 * np.arange(48_000) / 48_000)
    clip = decode_clip(wav((second * 16384).astype(int)[:, None], rate=48_000))
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)
    assert len(clip) == 16_000 and np.abs(clip.numpy() - expected)[100:-100].max() < 0.01


def test_odd_but_readable_clips_are_read():
    for clip in (tone(0.5, 48_000), tone(0.5, 44_100, channels=5), tone(0.5, 8_000, channels=2)):
        assert abs(len(decode_clip(clip)) - 8000) <= 1
    assert decode_clip(wav(np.zeros((8000, 1), int))).abs().max() == 0  # silence is a clip like any other to the model


@pytest.mark.parametrize("data, says", [
    (b"", "unreadable"), (b"RIFF", "unreadable"), (b"\0" * 4000, "unreadable"), (tone(0.5, 16_000)[:30], "unreadable"),
    (tone(0.01, 16_000), "shorter than 0.1 s .0.01 s."), (wav(np.zeros((0, 1), int)), "shorter than 0.1 s"),
    (tone(301, 8_000), "longer than 300 s .301.00 s."), (wav(np.zeros((8000, 1), int), rate=1_000_003), "unreadable clip .a rate of 1000003 Hz"),
    (tone(0.5, 16_000)[:24] + bytes(4) + tone(0.5, 16_000)[28:], "unreadable"),
], ids=lambda x: x if isinstance(x, str) else "clip")
def test_bad_clips_are_named(data, says):
    with pytest.raises(data_prep.Lost, match=says):
        decode_clip(data)


def test_nan_samples_are_named():
    with pytest.raises(data_prep.Lost, match="NaN samples"):
        decode_clip(float_wav(np.full(8000, math.nan)))


def test_clips_that_are_no_16_bit_wav_are_read_too():
    second = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)
    for kind, subtype in (("WAV", "FLOAT"), ("WAV", "ULAW"), ("WAVEX", "PCM_16"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("MP3", "MPEG_LAYER_III")):
        soundfile.write(file := io.BytesIO(), second, 16_000, format=kind, subtype=subtype)
        clip = decode_clip(file.getvalue())
        assert abs(len(clip) - 16_000) < 2000 and 0.45 < clip[2000:-2000].abs().max() < 0.55


def riff(*chunks):
    """A WAV file of chunks (name, bytes), whose size field is that of an empty file, as a streaming recorder leaves it."""
    return b"RIFF" + (36).to_bytes(4, "little") + b"WAVE" + b"".join(name + size.to_bytes(4, "little") + data for name, size, data in chunks)


def test_wav_headers_of_streaming_recorders_are_read():
    samples, form = tone(1, 16_000)[44:], tone(1, 16_000)[20:36]
    for chunks in ([(b"data", 0, samples)], [(b"data", 2**32 - 1, samples)],  # never patched: sound until the end of the file
                   [(b"LIST", 3, b"abc\0"), (b"data", 0, samples)], [(b"LIST", 3, b"abc\0"), (b"data", len(samples), samples)]):
        assert len(decode_clip(riff((b"fmt ", 16, form), *chunks))) == 16_000
    for chunks in ([(b"LIST", 3, b"abc"), (b"data", len(samples), samples)], [(b"data", 2, b"\0\0"), (b"data", len(samples), samples)]):
        with pytest.raises(data_prep.Lost, match="unreadable"):  # no pad byte, a second data chunk: counted, and not cut
            decode_clip(riff((b"fmt ", 16, form), *chunks))


def test_columns_of_other_types_are_read(tmp_path, small_demo):
    questions = load_questions(small_demo / "val")
    features = datasets.Features(questions.features | {"answer_index": datasets.Value("int32"), "question": datasets.Value("large_string"),
                                                       "options": datasets.List(datasets.Value("large_string"), length=4)})
    questions.cast(features).save_to_disk(tmp_path / "data")
    again = load_questions(tmp_path / "data")
    assert again["options"] == questions["options"] and again["answer_index"] == questions["answer_index"] and again["question"] == questions["question"]


def test_clip_that_is_cut_within_a_frame_keeps_its_whole_ones():
    assert len(decode_clip(tone(0.5, 16_000, channels=2)[:-1])) in (7999, 8000)


def replica(path, rows):
    """Write rows as parquet; clips as the hub stores them, {"bytes", "path"}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [row | ({"audio": {"bytes": row["audio"], "path": "clip.wav"}} if "audio" in row else {}) for row in rows]
    datasets.Dataset.from_list(rows).to_parquet(path)


def prepare(capsys, *arguments):
    """Run data_prep.py here; what it printed."""
    data_prep.main([str(a) for a in arguments])
    return capsys.readouterr().out


def table(printed):
    """The final table -> {line: number}."""
    lines = [line for line in printed.splitlines() if re.fullmatch(r".+\s[\d.]+", line)]
    return {line.rsplit(maxsplit=1)[0].strip(): float(line.split()[-1]) for line in lines}


def test_tars_source(tmp_path, capsys):
    row = {"key": "k0", "question_id": "0", "question": "Who?", "options": ["w", "x", "y", "z"], "answer_index": 2, "question_for_tts": "Who?",
           "prompt_for_tts": "Who? Option A: w ...", "audio": tone(1.0, 44_100, channels=2), "tts_wer": 0.05, "tts_retries": 1}
    replica(tmp_path / "hub" / "train.parquet", [
        row, row | {"key": "k1", "question": "When?", "audio": tone(1.5, 24_000)}, row | {"key": "broken", "audio": b"RIFFno"}, row | {"key": "none", "audio": b""},
        row | {"key": "silent", "audio": wav(np.zeros((16_000, 1), int))}, row | {"key": "long", "audio": tone(2.1, 16_000)},
        row | {"key": "short", "audio": tone(0.01, 16_000)}, row | {"key": "five", "options": list("vwxyz")},
        row | {"key": "range", "answer_index": 4}, row | {"key": "blank", "question": " "}, row | {"key": "hole", "options": ["w", "", "y", "z"]},
    ])
    printed = prepare(capsys, "tars", "--origin", tmp_path / "hub", "--out", tmp_path / "data", "--max-seconds", 2)
    assert table(printed) == {
        "rows in": 11, "rows out": 2, "hours of audio": 0.0, "left out: an unreadable clip": 2, "left out: a silent clip": 1,
        "left out: a clip longer than 2 s": 1, "left out: a clip shorter than 0.1 s": 1, "left out: other than four options": 1,
        "left out: the answer is none of the options": 1, "left out: an empty question": 1, "left out: an empty option": 1}
    assert "broken is left out: an unreadable clip" in printed and "silent is left out" in printed
    data = load_questions(tmp_path / "data")
    assert data["key"] == ["k0", "k1"] and data["tts_wer"] == [0.05, 0.05] and data["answer_index"] == [2, 2]
    assert data[0]["options"] == ["w", "x", "y", "z"] and data[0]["prompt_for_tts"] == "Who? Option A: w ..."
    with wave.open(io.BytesIO(data[0]["audio"]["bytes"])) as clip:
        assert (clip.getframerate(), clip.getnchannels(), clip.getnframes()) == (16_000, 1, 16_000)
    assert len(read_clip(data[1]["audio"]["bytes"])) == 24_000
    assert {p.name for p in tmp_path.iterdir()} == {"hub", "data"}  # nothing half-done is left beside it


PROMPT = """Which gas do plants
take in?
A. oxygen
B. carbon
 dioxide
C. helium
D. neon, a noble
gas

What is the answer to the above multiple choice question? Select one of the following: A, B, C, or D."""


def test_voicebench_sources_parse_wrapped_prompts_and_report_the_rest(tmp_path, capsys):
    row = {"audio": tone(0.5, 24_000), "prompt": PROMPT, "reference": "B", "question_id": "1", "cot_content": "", "category": "law", "src": "x"}
    replica(tmp_path / "hub" / "mmsu" / "law-00000-of-00001.parquet", [row, row | {"prompt": "No options at all.\nWhat now?"}])
    replica(tmp_path / "hub" / "mmsu" / "physics-00000-of-00001.parquet", [
        row | {"category": "physics", "reference": "D", "prompt": PROMPT.replace("\n\nWhat is", "\nWhat is")},
        row | {"prompt": PROMPT.replace("\n\nWhat is the answer to the above multiple choice question?", "\nPick one.")},
        row | {"prompt": PROMPT.replace("D. neon", "D. neon\nE. argon")}, row | {"reference": "E"}])
    replica(tmp_path / "hub" / "openbookqa" / "test-00000-of-00001.parquet", [{k: row[k] for k in ("audio", "prompt", "reference")}])
    printed = prepare(capsys, "voicebench-mmsu", "--origin", tmp_path / "hub", "--out", tmp_path / "mmsu")
    assert table(printed) == {"rows in": 6, "rows out": 2, "hours of audio": 0.0, "left out: options not recognised": 1,
                              "left out: no telling where option D ends": 1, "left out: other than four options": 1,
                              "left out: the answer is none of the options": 1}
    data = load_questions(tmp_path / "mmsu")
    assert data["question"] == ["Which gas do plants take in?"] * 2 and data["answer_index"] == [1, 3] and data["category"] == ["law", "physics"]
    assert data["options"] == [["oxygen", "carbon dioxide", "helium", "neon, a noble gas"]] * 2
    prepare(capsys, "voicebench-obqa", "--origin", tmp_path / "hub", "--out", tmp_path / "obqa", "--limit", 1)
    assert len(load_questions(tmp_path / "obqa")) == 1


@pytest.mark.parametrize("change, reason", [
    ({"question": None}, "an empty question"), ({"question": "\u200b"}, "an empty question"), ({"question": 7}, "question that is no text"),
    ({"options": None}, "other than four options"), ({"options": {"A": "w", "B": "x", "C": "y", "D": "z"}}, "other than four options"),
    ({"options": "wxyz"}, "other than four options"), ({"options": ["w", None, "y", "z"]}, "an empty option"), ({"options": ["w", 2, "y", "z"]}, "option that is no text"),
    ({"answer_index": 1.0}, "the answer is none"), ({"answer_index": True}, "the answer is none"), ({"answer_index": None}, "the answer is none"),
    ({"answer_index": -1}, "the answer is none"), ({"prompt_for_tts": None}, "an empty prompt"), ({"audio": None}, "no clip"), ({"audio": {"bytes": None, "path": None}}, "no clip"),
], ids=str)
def test_a_cell_that_is_empty_or_of_another_type_loses_its_row(change, reason):
    row = {"key": "k", "question": "Who?", "options": ["w", "x", "y", "z"], "answer_index": 2, "prompt_for_tts": "p", "audio": {"bytes": tone(1, 16_000), "path": None}}
    args = SimpleNamespace(max_seconds=9)
    assert data_prep.from_tars(0, row, args)["answer_index"] == 2
    with pytest.raises(data_prep.Lost, match=reason):
        data_prep.from_tars(0, row | change, args)
    assert data_prep.from_tars(0, row | {"tts_wer": "n/a"}, args)["tts_wer"] is None and data_prep.from_tars(0, row | {"tts_wer": 0}, args)["tts_wer"] == 0.0


@pytest.mark.parametrize("answer, index", [("B", 1), ("b", 1), ("B.", 1), ("(B)", 1), (" d ", 3), (3, 3)])
def test_answers_are_read_as_people_write_them(answer, index):
    assert data_prep.checked("Who?", ["w", "x", "y", "z"], answer, "")["answer_index"] == index


ASKED = "\n\nWhat is the answer to the above multiple choice question? Select one of the following: A, B, C, or D."


@pytest.mark.parametrize("prompt, question, options", [
    ("Q?\nA. a\nB. b\nC. c\nD. first\n\nsecond" + ASKED, "Q?", ["a", "b", "c", "first second"]),
    ("Q?\nA.one\nB.two\nC.three\nD.four" + ASKED, "Q?", ["one", "two", "three", "four"]),
    ("Q?\nA) one\nB) two\nC) three\nD) four" + ASKED, "Q?", ["one", "two", "three", "four"]),
    ("Q?\n(A) one\n(B) two\n(C) three\n(D) four" + ASKED, "Q?", ["one", "two", "three", "four"]),
    ("Q?\nOption A: one\nOption B: two\nOption C: three\nOption D: four" + ASKED, "Q?", ["one", "two", "three", "four"]),
    ("Q?\na. one\nb. two\nc. three\nd. four" + ASKED, "Q?", ["one", "two", "three", "four"]),
    ("Q?\nA.\u00a0one\nB.\u00a0two\nC.\u00a0three\nD.\u00a0four" + ASKED, "Q?", ["one", "two", "three", "four"]),
    ("E. coli is\nA. one\nB. two\nC. three\nD. four" + ASKED, "E. coli is", ["one", "two", "three", "four"]),
    ("A. Smith wrote\nA. one\nB. two\nC. three\nD. four" + ASKED, "A. Smith wrote", ["one", "two", "three", "four"]),
    ("Which holds?\nA. x is 1\nB. y is 2\nA. both\nB. neither\nC. the first\nD. the second" + ASKED, "Which holds? A. x is 1 B. y is 2", ["both", "neither", "the first", "the second"]),
    ("Q?\nA. one\nB. two\nC. three\nD. four\n\nPick one.", "Q?", ["one", "two", "three", "four"]),
])
def test_prompts_that_a_person_can_read_are_read(prompt, question, options):
    assert data_prep.parse_prompt(prompt) == (question, options)


@pytest.mark.parametrize("prompt, reason", [
    ("Q?\nA. one\nB. two\nC. three\nD. four\n\nmore\n\nPick one.", "no telling"), ("Q?\nA. one\nB. two\nC. three\nD. four\nPick one.", "no telling"),
    ("Q?\nA. one\nB. two" + ASKED, "other than four"), ("Q?\nA. 1\nB. 2\nC. 3\nD. 4\nE. 5" + ASKED, "other than four"), ("Q?" + ASKED, "not recognised"),
])
def test_prompts_that_no_one_can_read_are_lost(prompt, reason):
    with pytest.raises(data_prep.Lost, match=reason):
        data_prep.parse_prompt(prompt)


def test_only_the_sources_own_split_of_a_local_copy_is_taken(tmp_path, capsys):
    row = {"question": "Who?", "subject": "s", "choices": ["w", "x", "y", "z"], "answer": 1}
    for name in ("auxiliary_train", "test", "dev", "validation"):
        replica(tmp_path / "hub" / "all" / f"{name}-00000-of-00001.parquet", [row | {"question": f"{name}?"}])
    replica(tmp_path / "hub" / "law" / "test-00000-of-00001.parquet", [row])
    source = data_prep.SOURCES["mmlu"]
    assert data_prep.open_source(source, str(tmp_path / "hub"))["question"] == ["auxiliary_train?"] and capsys.readouterr().out == ""
    (tmp_path / "hub" / "all" / "auxiliary_train-00000-of-00001.parquet").unlink()
    with pytest.raises(SystemExit, match="no file of the split auxiliary_train; it has dev, test, validation"):
        data_prep.open_source(source, str(tmp_path / "hub"))
    replica(tmp_path / "other" / "a.parquet", [row])
    assert len(data_prep.open_source(source, str(tmp_path / "other"))) == 1 and "files taken as the split auxiliary_train: other/a.parquet" in capsys.readouterr().out


def test_columns_that_are_null_at_first_keep_their_type(tmp_path, capsys):
    row = {"key": "k", "question": "Who?", "options": ["w", "x", "y", "z"], "answer_index": 2, "prompt_for_tts": "p", "audio": tone(1, 16_000)}
    replica(tmp_path / "train.parquet", [row | {"key": f"k{i}", "question": f"Who is {i}?", "tts_wer": None if i < 3 else 0.05} for i in range(4)])
    prepare(capsys, "tars", "--origin", tmp_path / "train.parquet", "--out", tmp_path / "data")
    assert load_questions(tmp_path / "data")["tts_wer"] == [None, None, None, 0.05]


def test_disk_is_measured_before_the_work_starts(tmp_path, capsys, monkeypatch):
    row = {"key": "k", "question": "Who?", "options": ["w", "x", "y", "z"], "answer_index": 2, "prompt_for_tts": "p", "audio": tone(10, 16_000)}
    replica(tmp_path / "train.parquet", [row | {"key": f"k{i}", "question": f"Who is {i}?"} for i in range(50)])
    monkeypatch.setattr(data_prep.shutil, "disk_usage", lambda path: SimpleNamespace(free=0.02 * 2**30))
    # 50 clips of 10 s at 32,000 bytes a second are 16 MB, twice: 0.0298 GiB
    with pytest.raises(SystemExit, match="0.02 GiB free, about 0.03 are needed"):
        prepare(capsys, "tars", "--origin", tmp_path / "train.parquet", "--out", tmp_path / "data")
    monkeypatch.setattr(data_prep.shutil, "disk_usage", lambda path: SimpleNamespace(free=0.04 * 2**30))
    assert "50 rows take about 0.03 GiB" in prepare(capsys, "tars", "--origin", tmp_path / "train.parquet", "--out", tmp_path / "data")


@slow
def test_more_audio_than_one_arrow_batch_holds(tmp_path, capsys):
    """240 clips of 300 s are 2.3 GB, above the 2 GiB that an Arrow array of bytes can address."""
    row = {"key": "k", "question": "Who?", "options": ["w", "x", "y", "z"], "answer_index": 2, "prompt_for_tts": "p", "audio": tone(300, 8_000)}
    replica(tmp_path / "train.parquet", [row | {"key": f"k{i}"} for i in range(240)])
    prepare(capsys, "tars", "--origin", tmp_path / "train.parquet", "--out", tmp_path / "data", "--max-seconds", 300)
    data = load_questions(tmp_path / "data")
    assert len(data) == 240 and len(read_clip(data[239]["audio"]["bytes"])) == 300 * 16_000


def test_ones_own_questions_with_recordings(tmp_path, capsys):
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "1.wav").write_bytes(tone(1, 16_000))
    (tmp_path / "questions.csv").write_text("\ufeffquestion,A,B,C,D,answer,wav\nWho is 007?,NA,Bond,Q,M,b,clips/1.wav\nWhere?,w,x,y,z,E,clips/1.wav\nWhen?,w,x,y,z,A,clips/no.wav\n")
    printed = prepare(capsys, "csv", "--origin", tmp_path / "questions.csv", "--out", tmp_path / "data")
    assert table(printed) == {"rows in": 3, "rows out": 1, "hours of audio": 0.0, "left out: the answer is none of the options": 1, "left out: an unreadable clip": 1}
    (row,) = load_questions(tmp_path / "data")
    assert (row["question"], row["options"], row["answer_index"]) == ("Who is 007?", ["NA", "Bond", "Q", "M"], 1)
    assert row["prompt_for_tts"].startswith("Who is 007?\n\nOption A: NA")


TABLE = "question,A,B,C,D,answer,wav\nWho?,w,x,y,z,C,1.wav\n"


@pytest.mark.parametrize("text, lost", [
    (TABLE + "a, b?,w,x,y,z,C,1.wav\n", {"more cells than columns": 1}), ("sep=,\n" + TABLE, {}), ("sep=;\n" + TABLE.replace(",", ";"), {}),
    (TABLE + "When?,w,x,y,z,C,\n", {"no recording, and no dash that asks for a voice": 1}), (TABLE + "When?,w,x,y\n", {"the answer is none of the options": 1}),
    (TABLE + ",,,,,,\n,,,,,,\n", {"the answer is none of the options": 2}), (TABLE + TABLE.splitlines()[1] + "\n", {"word for word an earlier row": 1}),
    (TABLE + "When?,w,x,x,z,A,1.wav\n", {"two equal options": 1}),
], ids=["a comma too many", "Excel's sep", "semicolons", "no recording", "a short row", "blank rows", "an equal row", "equal options"])
def test_rows_of_a_table_that_cannot_be_used_are_left_out_and_counted(tmp_path, capsys, monkeypatch, text, lost):
    monkeypatch.setattr(data_prep, "Voice", lambda *args: pytest.fail("no row asks for a voice"))
    (tmp_path / "1.wav").write_bytes(tone(1, 16_000))
    (tmp_path / "questions.csv").write_text(text)
    printed = table(prepare(capsys, "csv", "--origin", tmp_path / "questions.csv", "--out", tmp_path / "data"))
    assert printed == {"rows in": 1 + sum(lost.values()), "rows out": 1, "hours of audio": 0.0} | {f"left out: {reason}": n for reason, n in lost.items()}
    (row,) = load_questions(tmp_path / "data")
    assert row["question"] == "Who?" and row["seconds"] == 1.0


def test_a_dash_in_a_table_with_recordings_asks_for_a_voice(tmp_path, capsys, monkeypatch):
    voice = CountingVoice()
    monkeypatch.setattr(data_prep, "Voice", lambda *args: voice)
    monkeypatch.setattr(data_prep, "Listener", lambda *args: Echo(voice))
    (tmp_path / "1.wav").write_bytes(tone(1, 16_000))
    (tmp_path / "questions.csv").write_text(TABLE + "When?,w,x,y,z,C,-\nWhere?,w,x,y,z,C,\n")
    printed = table(prepare(capsys, "csv", "--origin", tmp_path / "questions.csv", "--out", tmp_path / "data"))
    assert printed["rows out"] == 2 and len(voice.seeds) == 2  # the first reading of row 1 is heard wrong


@pytest.mark.parametrize("encoding", ["utf-16", "cp1252"])
def test_table_of_another_encoding_is_told(tmp_path, encoding):
    (tmp_path / "questions.csv").write_text(TABLE.replace("Who?", "Où est-il?"), encoding=encoding)
    with pytest.raises(SystemExit, match="save it as UTF-8"):
        data_prep.main(["csv", "--origin", str(tmp_path / "questions.csv"), "--out", str(tmp_path / "data")])


def test_ones_own_questions_without_recordings_are_spoken(tmp_path, capsys, monkeypatch):
    (tmp_path / "questions.csv").write_text("question,A,B,C,D,answer\nWho?,w,x,y,z,C\n")
    voice = CountingVoice()
    monkeypatch.setattr(data_prep, "Voice", lambda *args: voice)
    monkeypatch.setattr(data_prep, "Listener", lambda *args: Echo(voice))
    prepare(capsys, "csv", "--origin", tmp_path / "questions.csv", "--out", tmp_path / "data")
    assert load_questions(tmp_path / "data")[0]["tts_wer"] == 0 and len(voice.seeds) == 1


def test_conversion_goes_on_with_another_limit_and_another_spelling_of_the_path(tmp_path, capsys, monkeypatch):
    row = {"key": "k", "question": "Who?", "options": ["w", "x", "y", "z"], "answer_index": 2, "prompt_for_tts": "p", "audio": tone(1, 16_000)}
    replica(tmp_path / "hub" / "train.parquet", [row | {"key": f"k{i}", "question": f"Who is {i}?"} for i in range(4)])
    monkeypatch.setattr(datasets.Dataset, "from_list", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prepare(capsys, "tars", "--origin", tmp_path / "hub", "--out", tmp_path / "data", "--limit", 2)
    monkeypatch.undo()
    with pytest.raises(SystemExit, match="other settings .max_seconds."):
        prepare(capsys, "tars", "--origin", tmp_path / "hub", "--out", tmp_path / "data", "--max-seconds", 5)
    made = (tmp_path / "data.part" / "0.wav").stat().st_mtime_ns
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data_prep.shutil, "rmtree", lambda path: None)
    prepare(capsys, "tars", "--origin", "hub", "--out", "data")
    assert len(load_questions("data")) == 4 and (tmp_path / "data.part" / "0.wav").stat().st_mtime_ns == made


class CountingVoice:
    """A voice that counts its readings, and is interrupted at one of them."""

    def __init__(self, stop_at=None):
        self.seeds, self.stop_at = [], stop_at

    def speak(self, text, seed):
        if len(self.seeds) == self.stop_at:
            raise KeyboardInterrupt
        self.seeds.append(seed)
        rng = np.random.default_rng(seed)
        self.text = text
        return torch.tensor(rng.uniform(-0.5, 0.5, 8000), dtype=torch.float32)


class Echo:
    """A listener that hears the first reading of question 1 wrong and never gets to option d in question 2."""

    def __init__(self, voice):
        self.voice = voice

    def transcribe(self, waveform):
        index, attempt = self.voice.seeds[-1][1:]
        if (index, attempt) == (1, 0):
            return "something else altogether option d"
        return self.voice.text.split("Option D")[0] if index == 2 else self.voice.text


def test_mmlu_source_tries_again_filters_and_resumes_without_speaking_twice(tmp_path, capsys, monkeypatch):
    row = {"question": "The capital of France is ____.", "subject": "geography", "choices": ["Rome", "Paris", "Bonn", "Bern"], "answer": 1}
    rows = [row, row | {"question": "Which is it?"}, row | {"question": "What else?"}, row | {"choices": ["a", "b", "c"]}, row | {"question": "long " * 500}, row | {"question": "2 + 2 = ___, 5 - ___ = 1?"}]
    replica(tmp_path / "hub" / "all" / "auxiliary_train-00000-of-00001.parquet", rows)
    arguments = ("mmlu", "--origin", tmp_path / "hub", "--tries", 3, "--out")
    voices = []

    monkeypatch.setattr(data_prep, "Voice", lambda *args: voices[-1])
    monkeypatch.setattr(data_prep, "Listener", lambda *args: Echo(voices[-1]))
    voices.append(CountingVoice())
    printed = prepare(capsys, *arguments, tmp_path / "whole")
    assert table(printed) == {"rows in": 6, "rows out": 3, "hours of audio": 0.0, "left out: option d not heard, 3 tries": 1,
                              "left out: other than four options": 1, "left out: longer than 2000 characters": 1}
    assert [seed[1:] for seed in voices[0].seeds] == [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2), (5, 0)]
    data = load_questions(tmp_path / "whole")
    assert data["prompt_for_tts"][0] == "The capital of France is what?\n\nOption A: Rome\nOption B: Paris\nOption C: Bonn\nOption D: Bern"
    assert data["prompt_for_tts"][2].startswith("2 + 2 = first blank , 5 - second blank = 1?")
    assert data["question"][0] == row["question"] and data["tts_wer"] == [0.0] * 3 and data["category"] == ["geography"] * 3
    # Interrupted at its fifth reading, in the middle of question 2, then a line torn by a crash: it goes on with question 2.
    voices.append(CountingVoice(stop_at=4))
    with pytest.raises(KeyboardInterrupt):
        prepare(capsys, *arguments, tmp_path / "parts")
    with open(tmp_path / "parts.part" / "rows.jsonl", "a") as torn:
        torn.write('{"row": {"key": "mm')
    voices.append(CountingVoice())
    prepare(capsys, *arguments, tmp_path / "parts")
    assert [seed[1:] for seed in voices[2].seeds] == [(2, 0), (2, 1), (2, 2), (5, 0)]
    assert load_questions(tmp_path / "parts").to_list() == data.to_list()
    (tmp_path / "other.part").mkdir()
    (tmp_path / "other.part" / "rows.jsonl").write_text('{"source": "tars"}\n')
    with pytest.raises(SystemExit, match="other settings"):
        prepare(capsys, *arguments, tmp_path / "other")


def test_a_reading_is_kept_below_ten_percent_of_wrong_words():
    # 8 words of the question and 12 of the options: one wrong word is 5 %, two are 10 %, which is no longer below it.
    row = {"question": "What is the sum of these two numbers?", "choices": ["Rome", "Paris", "Bonn", "Bern"], "answer": 0, "subject": "s"}
    listener = SimpleNamespace()
    args = SimpleNamespace(tries=1, seed=0, max_seconds=9, voice=CountingVoice(), listener=listener)
    listener.transcribe = lambda waveform: args.voice.text.replace("sum", "some")
    assert data_prep.from_mmlu(0, row, args)["tts_wer"] == 0.05
    listener.transcribe = lambda waveform: args.voice.text.replace("sum", "some").replace("two", "too")
    with pytest.raises(data_prep.Lost, match=r"word error rate of 10 % or more, 1 tries \(at last 10%: .*some of these too"):
        data_prep.from_mmlu(0, row, args)
    listener.transcribe = lambda waveform: args.voice.text.replace("Option D", "Option B")
    with pytest.raises(data_prep.Lost, match=r"(?s)option d not heard, 1 tries \(at last 5%: .*Option B: Bern"):
        data_prep.from_mmlu(0, row, args)


def test_voice_and_listener_that_do_not_fit_are_told_after_ten_rows(tmp_path, capsys, monkeypatch):
    (tmp_path / "questions.csv").write_text("question,A,B,C,D,answer\n" + "".join(f"Who is number {i}?,w,x,y,z,C\n" for i in range(12)))
    monkeypatch.setattr(data_prep, "Voice", lambda *args: CountingVoice())
    monkeypatch.setattr(data_prep, "Listener", lambda *args: SimpleNamespace(transcribe=lambda waveform: "noise"))
    with pytest.raises(SystemExit, match="no row .* is left: option d not heard, 2 tries"):
        data_prep.main(["csv", "--origin", str(tmp_path / "questions.csv"), "--tries", "2", "--out", str(tmp_path / "data")])
    assert capsys.readouterr().out.count("none of the first ten rows is kept: facebook/mms-tts-eng and openai/whisper-medium do not fit") == 1


def test_sources_say_what_is_wrong_with_their_origin(tmp_path, capsys):
    replica(tmp_path / "hub" / "a.parquet", [{"question": "q", "subject": "s", "choices": list("abcd")}])
    for origin, says in ((tmp_path / "hub", "lacks the column.s. answer; it has question, subject, choices"), (tmp_path, "a.parquet|answer")):
        with pytest.raises(SystemExit, match=says):
            prepare(capsys, "mmlu", "--origin", origin, "--out", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="no parquet or arrow file"):
        prepare(capsys, "mmlu", "--origin", tmp_path / "empty", "--out", tmp_path / "out")
    (tmp_path / "out").mkdir()
    with pytest.raises(SystemExit, match="exists already"):
        prepare(capsys, "mmlu", "--origin", tmp_path / "hub", "--out", tmp_path / "out")


@pytest.mark.parametrize("text, spoken", [
    ("342", "three hundred forty two"), ("1,000,017", "one million seventeen"), ("3.14", "three point one four"), ("-5", "minus five"), ("0", "zero"),
    ("105", "one hundred five"), ("007", "zero zero seven"), ("0.05", "zero point zero five"), ("1,234.5", "one thousand two hundred thirty four point five"),
    # ordinals, years, decades, dates, times
    ("the 1st, 2nd and 21st", "the first second and twenty first"), ("in 1984", "in nineteen eighty four"), ("the 1990s", "the nineteen nineties"),
    ("1990-2000", "nineteen ninety to two thousand"), ("the year 2005", "the year two thousand five"), ("July 4, 1776", "july four seventeen seventy six"),
    ("1984 people", "one thousand nine hundred eighty four people"), ("at 3:30 pm", "at three thirty p m"), ("10:00", "ten o'clock"), ("9:05", "nine oh five"),
    ("a ratio of 3:1", "a ratio of three to one"),
    # money
    ("$5.50", "five dollars and fifty cents"), ("$3 million", "three million dollars"), ("$1", "one dollar"), ("$0.50", "fifty cents"), ("£5", "five pounds"),
    ("$2.5 billion", "two point five billion dollars"),
    # ranges, differences, fractions
    ("5-10 days", "five to ten days"), ("5–10", "five to ten"), ("8-3 = 5", "eight minus three equals five"), ("10 - 3", "ten minus three"),
    ("1/2 of it", "one half of it"), ("½ cup", "half a cup"), ("3/4", "three quarters"), ("22/7", "twenty two over seven"), ("1½", "one and a half"),
    # formulas
    ("$x^2 + y^2$", "x squared plus y squared"), ("x²", "x squared"), ("10⁻³", "ten to the power of minus three"), (r"\frac{a}{b}", "a over b"),
    (r"\sqrt{2}", "square root of two"), ("2 + 2 = 4", "two plus two equals four"), ("x<3", "x is less than three"), ("x ≤ 3", "x is less than or equal to three"),
    ("y - x", "y minus x"), ("a/b", "a over b"), ("3 × 4", "three times four"), ("√9", "square root of nine"), ("F = ma", "f equals ma"), (r"3 \times 4", "three times four"),
    # units
    ("9.8 m/s^2", "nine point eight meters per second squared"), ("60 mph", "sixty miles per hour"), ("20 °C", "twenty degrees celsius"), ("90 °", "ninety degrees"),
    ("1 kg", "one kilogram"), ("50 Hz", "fifty hertz"), ("100 km/h", "one hundred kilometers per hour"), ("1500 m", "one thousand five hundred meters"), ("20%", "twenty percent"),
    ("a 5 kg block", "a five kilogram block"), ("a 45° angle", "a forty five degree angle"), ("a $10 bill", "a ten dollar bill"), ("50¢", "fifty cents"),
    ("3 × 10^8 m/s", "three times ten to the power of eight meters per second"), ("p = .05", "p equals zero point zero five"), ("1 1/2 cups", "one and one half cups"),
    ("pages 4-7", "pages four to seven"), ("the early '70s", "the early seventies"), ("since 1066", "since ten sixty six"),
    ("Henry VIII", "henry the eighth"), ("I and III only", "one and three only"), ("I, II, and IV", "one two and four"), ("I am", "i am"),
    ("St. Augustine", "saint augustine"), ("on Main St. today", "on main street today"), ("Symphony No. 5", "symphony number five"), ("a 'free' word", "a free word"),
    # letters, abbreviations, signs
    ("café, Gödel", "cafe godel"), ("α-decay", "alpha decay"), ("World War II", "world war two"), ("Dr. Smith vs. Mr. Jones", "doctor smith versus mister jones"),
    ("e.g.", "for example"), ("A -> B", "a to b"), ("and/or", "and or"), ("Who?\nOption A: I", "who. option a i"), ("don’t (ever)", "don't ever"), ("CO₂", "co two"),
    ("first,second", "first second"), ("well-known", "well known"),
])
def test_spelled_out_as_a_person_says_it(text, spoken):
    assert data_prep.spell_out(text) == spoken


@pytest.mark.parametrize("text, reason", [
    ("北京", "not English text"), ("a \N{GRINNING FACE}", "not English text"), (r"\int x", "no rule"), ("5-10", "no rule"), ("\N{N-ARY SUMMATION}x", "not English"), ("x_1", "no rule"),
    ("C6H12O6", "no rule"), ("Fe2(SO4)3", "no rule"), ("https://example.com", "no rule"), ("i++", "no rule"),
])
def test_what_no_rule_says_is_lost_and_not_guessed(text, reason):
    with pytest.raises(data_prep.Lost, match=reason):
        data_prep.spell_out(text)


@pytest.mark.parametrize("reference, transcript", [
    ("the 21st day", "the twenty-first day"), ("$5", "five dollars"), ("20 per cent", "20 percent"), ("Mr. Smith", "Mister Smith"), ("he'd gone", "he had gone"),
    ("one hundred and five", "105"), ("It's 2 o'clock, isn't it?", "it is two oclock is not it"), ("John's book", "John's book"), ("3:30", "three thirty"),
    ("Option A: (red)", "option a red"), ("in 1984", "in 1984"), ("5-10 days", "five to ten days"),
])
def test_fair_transcripts_have_no_errors(reference, transcript):
    assert data_prep.word_error_rate(reference, transcript) == 0


def test_spelling_is_the_recognisers_own():
    assert data_prep.word_error_rate("the colour", "the color") == 0.5 and data_prep.word_error_rate("the colour", "the color", {"colour": "color"}) == 0


def test_word_error_rate_by_hand():
    # tall -> tell (substituted), a word dropped, a word added: 3 of 6 words
    assert data_prep.word_error_rate("red green blue tall small thin", "red blue tell small thin thin") == pytest.approx(3 / 6)
    assert data_prep.word_error_rate("It's 2 o'clock, isn't it?", "it is two oclock is not it") == 0
    assert data_prep.reading_error("who option d x", "who option d x") == (0, False)
    assert data_prep.reading_error("who option d x", "who option x") == (0.25, True)  # one word of four
    asked = "which option describes it option d x"  # "option describes" is no option d
    assert data_prep.reading_error(asked, "which option describes it") == (3 / 7, True) and data_prep.reading_error(asked, asked) == (0, False)
    assert data_prep.reading_error("is option d right option d x", "is option d right") == (3 / 7, True)


def test_blanks_are_said_as_words():
    assert data_prep.without_blanks("He was born in ____.") == "He was born in what?"
    assert data_prep.without_blanks("The __ is red") == "The what is red"
    assert data_prep.without_blanks("What does __init__ do?") == "What does __init__ do?"
    assert data_prep.without_blanks("A __ and a ___ meet") == "A first blank and a second blank meet"


@pytest.fixture(scope="session")
def helpers(tmp_path_factory):
    """Tiny random helper models in the hub's layout: a voice, a listener, a sentence embedder, an xFinder."""
    out = tmp_path_factory.mktemp("helpers")
    torch.manual_seed(0)
    (out / "vocab.json").write_text(json.dumps({c: i for i, c in enumerate("_' abcdefghijklmnopqrstuvwxyz")}))
    voice = VitsConfig(vocab_size=29, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16, flow_size=16, spectrogram_bins=17,
                       prior_encoder_num_flows=2, upsample_initial_channel=16, upsample_rates=[8, 8], upsample_kernel_sizes=[16, 16],
                       resblock_kernel_sizes=[3], resblock_dilation_sizes=[[1]], posterior_encoder_num_wavenet_layers=1,
                       prior_encoder_num_wavenet_layers=1, wavenet_dilation_rate=1, duration_predictor_num_flows=1, depth_separable_num_layers=1)
    VitsModel(voice).save_pretrained(out / "voice")
    VitsTokenizer(str(out / "vocab.json"), pad_token="_", phonemize=False).save_pretrained(out / "voice")
    tokenizer = evaluation.byte_tokenizer(Phi4Multimodal)  # 256 bytes and 5 control tokens; above them stand timestamps
    config = WhisperConfig(vocab_size=1800, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
                           encoder_ffn_dim=16, decoder_ffn_dim=16, max_target_positions=40, pad_token_id=258, bos_token_id=258,
                           eos_token_id=258, decoder_start_token_id=259)
    for piece in (WhisperForConditionalGeneration(config), tokenizer, WhisperFeatureExtractor()):
        piece.save_pretrained(out / "listener")
    settings = {"no_timestamps_token_id": 298, "is_multilingual": False, "max_length": 20, "max_initial_timestamp_index": 50,
                "decoder_start_token_id": 259, "eos_token_id": 258, "pad_token_id": 258, "bos_token_id": 258, "return_timestamps": False}
    (out / "listener" / "generation_config.json").write_text(json.dumps(settings))
    tokenizer = evaluation.byte_tokenizer(Qwen25Omni)
    tokenizer.pad_token = "<|endoftext|>"
    sizes = dict(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    for piece in (Qwen2ForCausalLM(Qwen2Config(**sizes)), tokenizer):
        piece.save_pretrained(out / "xfinder")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", tokenizer.convert_tokens_to_ids("<|endoftext|>"))])
    for piece in (Qwen3Model(Qwen3Config(**sizes, head_dim=8)), tokenizer):
        piece.save_pretrained(out / "embedder")
    return out


KINDS = {"voice": data_prep.Voice, "listener": data_prep.Listener, "xfinder": tars.XFinder,
         "embedder": SentenceEmbedder}


@pytest.mark.parametrize("name", KINDS)
def test_helper_that_lacks_a_tensor_is_refused(helpers, tmp_path, name):
    shutil.copytree(helpers / name, path := tmp_path / name)
    tensors = load_file(path / "model.safetensors")
    lost = sorted(tensors)[len(tensors) // 2]
    save_file({k: v for k, v in tensors.items() if k != lost}, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(SystemExit, match="does not fit its config.json: 1 tensors"):
        KINDS[name](str(path), "cpu")


def test_helpers_on_the_cpu_are_float32_whatever_their_files_and_the_main_model_have(helpers, tmp_path, monkeypatch):
    monkeypatch.setattr(tars, "BFLOAT16", True)
    for name, kind in KINDS.items():
        shutil.copytree(helpers / name, path := tmp_path / name)
        tensors = load_file(path / "model.safetensors")
        save_file({k: v.half() if v.is_floating_point() else v for k, v in tensors.items()}, path / "model.safetensors", {"format": "pt"})
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
        helper = kind(str(path), "cpu")
        assert {p.dtype for p in helper.model.parameters()} == {torch.float32}
        if name == "listener":
            assert isinstance(helper.transcribe(torch.zeros(16_000)), str)
        if name == "embedder":
            assert helper(["a", "b c"]).shape == (2, 16)


def test_listener_runs_in_half_precision_too(helpers):
    listener = data_prep.Listener(str(helpers / "listener"), "cpu")
    listener.model.to(torch.bfloat16)
    assert isinstance(listener.transcribe(torch.zeros(16_000)), str)


def test_multilingual_listener_is_told_that_clips_are_english(helpers, tmp_path):
    shutil.copytree(helpers / "listener", path := tmp_path / "listener")
    settings = json.loads((path / "generation_config.json").read_text())
    more = {"is_multilingual": True, "lang_to_id": {"<|en|>": 260, "<|fr|>": 261}, "task_to_id": {"transcribe": 262, "translate": 263}}
    (path / "generation_config.json").write_text(json.dumps(settings | more))
    told = []
    for place, language in ((path, {"language": "en", "task": "transcribe"}), (helpers / "listener", {})):
        listener = data_prep.Listener(str(place), "cpu")
        generate = listener.model.generate
        listener.model.generate = lambda **inputs: told.append(inputs) or generate(**inputs)
        listener.transcribe(torch.zeros(16_000))
        assert {k: v for k, v in told[-1].items() if k in ("language", "task")} == language


def test_embedder_keeps_no_cache(helpers):
    embedder = SentenceEmbedder(str(helpers / "embedder"), "cpu")
    outputs = []
    embedder.model.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    embedder(["a", "b"])
    assert outputs[0].past_key_values is None


def test_voice_and_listener_run_on_tiny_models(helpers):
    voice = data_prep.Voice(str(helpers / "voice"), "cpu")
    first, again, other = (voice.speak("Who? 7", seed) for seed in ((0, 1, 0), (0, 1, 0), (0, 1, 1)))
    assert first.ndim == 1 and torch.equal(first, again) and (first.shape != other.shape or not torch.equal(first, other))
    letters = [len(voice.tokenizer(data_prep.spell_out(text)).input_ids) for text in ("who seven", "Who? 7")]
    assert letters[0] == letters[1] == 2 * len("who seven") + 1  # nothing is dropped silently


def test_listener_hears_short_and_long_clips(helpers):
    listener, heard = data_prep.Listener(str(helpers / "listener"), "cpu"), []
    generate = listener.model.generate
    listener.model.generate = lambda **inputs: heard.append(inputs) or generate(**inputs)
    assert all(isinstance(listener.transcribe(torch.zeros(seconds * 16_000)), str) for seconds in (1, 30, 35))
    # 100 frames a second: a short clip is padded to one window of 30 s, of a long one nothing is cut off
    assert [x["input_features"].shape[-1] for x in heard] == [3000, 3000, 3500]
    assert [x["return_timestamps"] for x in heard] == [False, False, True] and [int(x["attention_mask"].sum()) for x in heard] == [100, 3000, 3500]


# ======================================================================================================================
# eval.py
# ======================================================================================================================
def test_wilson_interval_by_hand():
    # 8 of 10, z = 1.96: centre (0.8 + 0.19208) / 1.38416 = 0.7167, half 1.96 sqrt(0.016 + 0.009604) / 1.38416 = 0.2266
    assert evaluation.wilson(8, 10) == (pytest.approx(0.4901, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert evaluation.wilson(0, 20)[0] == pytest.approx(0, abs=1e-9) and evaluation.wilson(20, 20)[1] == pytest.approx(1)


def test_interval_of_a_mean_by_hand():
    # 1, 2, 3: mean 2, standard deviation sqrt(2 / 3), 1.96 * 0.8165 / sqrt(3) = 0.9240
    mean, half = evaluation.mean_and_interval(np.array([1.0, 2.0, 3.0]))
    assert (mean, half) == (2.0, pytest.approx(0.9240, abs=1e-4))


def measure(capsys, *arguments):
    """Run eval.py here; what it printed."""
    evaluation.main([str(a) for a in arguments])
    return capsys.readouterr().out


def test_eval_prints_table_1_keeps_every_answer_and_continues(small_demo, small_run, tmp_path, capsys):
    out, _ = small_run
    command = ("--model", small_demo / "model", "--adapter", out / "a", "--data", small_demo / "test", small_demo / "val",
               "--eval-batch", 16, "--out", tmp_path / "eval")
    printed = measure(capsys, *command)
    base, tuned = [line.split() for line in printed.splitlines() if line.startswith(("base", str(out)))]
    files = sorted((tmp_path / "eval").iterdir())
    assert len(files) == 4
    records = {f.name[: f.name.rfind("-")]: [json.loads(line) for line in f.read_text().splitlines()[1:]] for f in files}
    share = lambda name, m: 100 * np.mean([r["right"] for r in records[name] if r["modality"] == m])
    # columns: name, then accuracy and interval of test A, test T, val A, val T; averages; unparsed; MRR
    assert [float(base[i]) for i in (1, 4, 7, 10)] == [pytest.approx(share(f"base-{d}", m), abs=0.051) for d in ("test", "val") for m in tars.MODALITIES]
    text = (share("base-test", "text") + share("base-val", "text")) / 2
    assert float(tuned[-1]) == pytest.approx(50 * (share("a-test", "speech") + share("a-val", "speech")) / text, abs=0.1)
    assert float(base[-6]) == pytest.approx((share("base-test", "speech") + share("base-val", "speech")) / 2, abs=0.051)
    own = [[r for d in ("test", "val") for r in records[f"base-{d}"] if r["modality"] == m] for m in tars.MODALITIES]
    assert base[-3] == "/".join(f"{100 * np.mean([r['cut'] for r in some]):.1f}" for some in own)
    assert base[-2] == "/".join(f"{np.mean([r['tokens'] for r in some]):.0f}" for some in own) and 5 < own[0][0]["tokens"] <= 26
    # stopped in the middle of a batch, in the middle of a line: the same file again
    whole = files[1].read_bytes()
    files[1].write_bytes(whole[: len(whole) // 2])
    assert measure(capsys, *command) == printed and files[1].read_bytes() == whole
    fixed = measure(capsys, *command, "--base-text-accuracy", 80)
    assert float([line.split() for line in fixed.splitlines() if line.startswith("base")][0][-1]) == pytest.approx(
        (share("base-test", "speech") + share("base-val", "speech")) / 1.6, abs=0.051)


def test_kept_answers_belong_to_their_questions_and_weights(small_demo, tmp_path):
    shutil.copytree(small_demo / "model", tmp_path / "model")
    args, questions = SimpleNamespace(model=str(tmp_path / "model"), out=tmp_path / "eval"), load_questions(small_demo / "val")

    def files(questions):
        answer = lambda some: [{"key": key} for key in some["key"]]
        evaluation.cached_records("base", [args.model], "val", questions, 1, answer, args, Config())
        return len(list((tmp_path / "eval").iterdir()))

    assert files(questions) == files(load_questions(small_demo / "val")) == 1
    assert files(questions.map(lambda row: {"options": row["options"][::-1]})) == 2
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors[sorted(tensors)[0]].view(-1)[0] += 1
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    assert files(questions) == 3


def test_questions_are_answered_by_length_and_kept_in_the_datas_order(small_demo, tmp_path):
    questions, seen = load_questions(small_demo / "test"), []
    args = SimpleNamespace(model="m", out=tmp_path)

    def answer(some):
        seen.extend(len(row["audio"]["bytes"]) for row in some)
        return [{"key": row["key"], "n": n} for row in some for n in range(2)]

    records = evaluation.cached_records("base", [], "test", questions, 2, answer, args, Config())
    assert seen == sorted(seen) and len(set(seen)) > 1
    assert [r["key"] for r in records] == [key for key in questions["key"] for _ in range(2)] and [r["n"] for r in records] == [0, 1] * len(questions)
    assert evaluation.cached_records("base", [], "test", questions, 2, None, args, Config()) == records


def test_cascade_answers_what_was_heard(lm, questions, monkeypatch):
    class Heard:
        def transcribe(self, waveform):
            return "five minus one"

    cfg = Config(max_new_tokens=5, eval_batch=3)
    records = list(evaluation.cascade(lm, Heard(), questions, tars.extract_answers, cfg))
    assert len(records) == 4 and records[0]["heard"] == "five minus one"
    prompt = lm.tokenizer(lm.family.before_user + "five minus one" + lm.family.after_user, return_tensors="pt").input_ids
    expected = lm.model.generate(inputs_embeds=lm.embed_tokens(prompt), do_sample=False, max_new_tokens=5, eos_token_id=lm.eos_ids.tolist(),
                                 attention_mask=torch.ones_like(prompt), pad_token_id=0, suppress_tokens=placeholders(lm))
    assert records[3]["completion"] == lm.tokenizer.decode(expected[0], skip_special_tokens=True)


def test_transcript_is_scored_without_tags_and_thought():
    for output in ("five minus one", "<think>hm, five</think><answer>five minus one</answer>", "<answer>five minus one</answer>",
                   "<think>one</think>\nfive minus one"):
        assert evaluation.transcript(output) == "five minus one"


def test_asr_asks_under_a_neutral_system_text(checkpoint, small_demo, tmp_path, monkeypatch, capsys):
    config = json.loads((Path(checkpoint) / "config.json").read_text())
    config |= {"vocab_size": 600} if "vocab_size" in config else {"text_config": config["text_config"] | {"vocab_size": 600}}
    (tmp_path / "config.json").write_text(json.dumps(config | {"pad_token_id": 1, "bos_token_id": 1, "eos_token_id": 1}))
    lm = evaluation.with_random_weights(str(tmp_path))
    asked, questions = [], load_questions(small_demo / "val")
    monkeypatch.setattr(lm, "rollout", lambda prompts, *args, **kwargs: asked.extend(prompts) or ("ids", "mask", "cut"))
    perfect = [f"<think>x</think><answer>{q['prompt_for_tts']}</answer>" for q in questions]
    monkeypatch.setattr(lm, "detokenize", lambda ids, mask: perfect)
    monkeypatch.setattr(SpeechLM, "from_pretrained", lambda path: lm)
    printed = measure(capsys, "--asr", "--model", small_demo / "model", "--data", small_demo / "val", "--eval-batch", 8)
    assert printed.splitlines()[-1].split() == ["base", "0.0", "+-", "0.0"]  # a perfect transcript, tags and all
    system = lm.embed_text(lm.family.before_user.replace(tars.SYSTEM_PROMPT, "You are a helpful assistant."), special=True)
    assert len(asked) == 8 and torch.equal(asked[0][0][: len(system)], system)
    request = torch.cat([lm.embed_text("Transcribe the audio clip into text."), lm.embed_text(lm.family.after_user, special=True)])
    assert torch.equal(asked[0][0][-len(request) :], request)


def test_ask_answers_a_clip_or_a_written_question(small_demo, small_run, tmp_path, capsys):
    adapter, question = small_run[0] / "a", load_questions(small_demo / "test")[0]
    (tmp_path / "clip.wav").write_bytes(question["audio"]["bytes"])
    lm = SpeechLM.from_pretrained(str(small_demo / "model"))
    cfg = Config(max_new_tokens=26)
    for name in ("base", adapter):
        if name != "base":
            evaluation.load_adapter(lm, adapter)
        expected = [r["completion"] for r in tars.answer_greedily(lm, [question], tars.extract_answers, cfg)]
        for asked, completion in zip((tmp_path / "clip.wav", written_question(question)), expected):
            printed = measure(capsys, "--model", small_demo / "model", "--adapter", adapter, "--ask", asked)
            assert next(line for line in printed.splitlines() if line.startswith(f"{name}: ")).removeprefix(f"{name}: ").startswith(completion)


def test_readmes_lines_use_an_adapter_with_transformers_and_peft_alone(small_demo, small_run, tmp_path):
    pytest.importorskip("peft", reason="peft is not installed; it is needed for this test alone")
    code = re.search(r"<!-- use what was trained -->\n```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)[1]
    assert tars.SYSTEM_PROMPT in code and "tars" not in "".join(re.findall("import.*", code))
    question = load_questions(small_demo / "test")[0]
    (tmp_path / "clip.wav").write_bytes(question["audio"]["bytes"])
    places = {"Qwen/Qwen2.5-Omni-7B": small_demo / "model", '"runs/tars"': f'"{small_run[0] / "a"}"', "clip.wav": tmp_path / "clip.wav",
              "runs/merged": tmp_path / "merged", "max_new_tokens=1024": "max_new_tokens=26",
              r"Which is heaviest?\n\nOption A: iron\nOption B: gold\nOption C: wood\nOption D: ice": written_question(question).replace("\n", "\\n")}
    for place, here in places.items():
        assert code.count(place) == 1
        code = code.replace(place, str(here))
    printed = run("-c", code).splitlines()
    lm = SpeechLM.from_pretrained(str(small_demo / "model"))
    evaluation.load_adapter(lm, small_run[0] / "a")
    expected = [r["completion"] for r in tars.answer_greedily(lm, [question], tars.extract_answers, Config(max_new_tokens=26))]
    assert printed[-2:] == expected
    merged = SpeechLM.from_pretrained(str(tmp_path / "merged"))
    ids = torch.arange(2 * 2 * 5).view(1, 2, 2, 5) % 20 + 8
    with torch.no_grad():
        torch.testing.assert_close(forward(merged, [question], ids, torch.ones_like(ids))[0], forward(lm, [question], ids, torch.ones_like(ids))[0],
                                   atol=1e-4, rtol=0)


def test_cosine_per_layer_against_a_float64_loop():
    speech, text = random_(3, 2, 5, 7), random_(3, 2, 5, 7, seed=1)  # [L, b, C, H]
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    cosines = evaluation.token_cosines(speech, text, mask)
    for b in range(2):
        for l in range(3):
            tokens = [t for t in range(5) if mask[b, t]]
            assert cosines[b, l].item() == pytest.approx(sum(cos(speech[l, b, t], text[l, b, t]) for t in tokens) / len(tokens), abs=1e-5)


def test_layer_cosines_teacher_force_the_text_answer_under_both_prompts(lm, questions):
    cfg = Config(max_new_tokens=6, eval_batch=3)
    cosines = evaluation.layer_cosines(lm, questions, cfg)
    assert cosines.shape == (4, 4)
    ids, mask, _ = lm.rollout(lm.embed_prompts(questions), 1, 6, temperature=0)
    for b in (0, 3):
        completion = ids[b, 1, 0, : int(mask[b, 1, 0].sum())].tolist()
        with torch.no_grad():
            states = [plain_forward(lm, questions[b], spoken, completion, output_hidden_states=True) for spoken in (True, False)]
        for l in range(4):
            speech, text = (output.hidden_states[l + 1][0, P:].double() for P, output in states)
            expected = sum(cos(s, t) for s, t in zip(speech, text)) / len(completion)
            assert cosines[b, l].item() == pytest.approx(expected, abs=1e-4)


def test_eval_layers_curves_and_figures(small_demo, small_run, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed; it is needed for figures alone")
    out, _ = small_run
    printed = measure(capsys, "--model", small_demo / "model", "--adapter", out / "a", "--layers", "--limit", 8, "--plot", tmp_path / "layers.png")
    assert [line.split()[0] for line in printed.splitlines()[1:6]] == ["layer", "1", "2", "3", "4"]
    measure(capsys, "--curves", out / "a", out / "b", "--plot", tmp_path / "curves.png")
    for name in ("layers.png", "curves.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_paired_difference_by_hand():
    # Differences 2, 4, 6: mean 4, standard deviation 2, t of 2 degrees of freedom 4.30: 4.30 * 2 / sqrt(3) = 4.965.
    mean, half, wins = evaluation.paired_difference([12, 14, 16], [10, 10, 10])
    assert (mean, wins) == (4, 3) and half == pytest.approx(4.965, abs=0.001)
    mean, half, wins = evaluation.paired_difference([1.0], [3.0])
    assert (mean, wins) == (-2, 0) and math.isnan(half)
    mean, half, _ = evaluation.paired_difference(range(25), [0] * 25)  # standard deviation 7.3598
    assert (mean, half) == (12, pytest.approx(2.1 * 7.3598 / 5, abs=0.001))


def finished_run(folder, seed, content, accuracies, **settings):
    """What a run leaves: evaluations after steps 2 and 4, of (speech, text); the base model has 40 and 100 %."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"seed": seed, "model": f"m{seed}", "out": str(folder)} | settings))
    lines = [{"step": step, "seconds": 1.0} for step in range(1, 5)]
    for line, (speech, text) in zip(lines[1::2], accuracies):
        line |= {"eval_speech": speech, "eval_text": text}
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    speech, text = accuracies[-1]
    (folder / "summary.json").write_text(json.dumps({"base_speech": 0.4, "base_text": 1.0, "speech": speech, "text": text, "content": content}))
    return str(folder)


def test_compare_groups_runs_by_settings_and_pairs_them_by_seed(tmp_path, capsys):
    grpo = {"alpha": 0.0, "beta": 0.0}
    runs = [finished_run(tmp_path / f"{name}{seed}", seed, [seed], accuracies, **settings) for name, seed, settings, accuracies in (
        ("grpo", 1, grpo, [(0.5, 1.0), (0.6, 1.0)]), ("grpo", 2, grpo, [(0.4, 0.9), (0.5, 0.9)]), ("tars", 1, {}, [(0.6, 1.0), (0.8, 1.0)]),
        ("tars", 2, {}, [(0.6, 1.0), (0.6, 0.8)]), ("tars", 3, {}, [(0.6, 1.0), (1.0, 1.0)]))]
    (tmp_path / "stopped").mkdir()
    printed = measure(capsys, "--compare", *runs, tmp_path / "stopped", "--plot", tmp_path / "a.png")
    assert f"{tmp_path}/stopped is left out" in printed
    rows = [re.split(r"  +", line.strip()) for line in printed.splitlines()]
    # GRPO ends at 60 and 50. Over steps 0 to 4: 40, 45, 50, 55, 60 and 40, 40, 40, 45, 50: 50 and 43. 60 % after step 4, and never.
    assert ["(1) alpha 0, beta 0", "2", "55.0 +- 5.0", "95.0 +- 5.0", "46.5 +- 3.5", "inf", "-", "-"] in rows
    # TARS: 80, 60, 100; of seeds 1 and 2 it is ahead by 20 and 10: 15 +- 12.71 * 7.071 / sqrt(2) = 63.55.
    # Over steps 0 to 4: 40, 50, 60, 70, 80 and 40, 50, 60, 60, 60: 60 and 54, ahead by 10 and 11: 10.5 +- 12.71 * 0.7071 / sqrt(2) = 6.355.
    assert ["(2) alpha 1, beta 1", "3", "80.0 +- 16.3", "93.3 +- 9.4"] == rows[3][:4]
    assert rows[3][5:] == ["2", "+15.0 [-48.5, +78.5], 2 of 2", "+10.5 [+4.1, +16.9], 2 of 2"]
    assert ["1", "40.0 / 100.0", "60.0 / 100.0", "80.0 / 100.0"] in rows and ["3", "40.0 / 100.0", "-", "100.0 / 100.0"] in rows
    assert ["seed", "base", "(1)", "(2)"] in rows
    joint = finished_run(tmp_path / "joint", 1, [1], [(0.6, 1.0), (0.7, 1.0)], joint_norm=True, layers="2-3")
    printed = measure(capsys, "--compare", joint, *reversed(runs))  # plain GRPO comes first, wherever it stands
    assert re.findall(r"^\(\d\) .*?(?=  )", printed, re.M) == ["(1) alpha 0, beta 0", "(2) alpha 1, beta 1, layers 2-3, joint_norm True", "(3) alpha 1, beta 1"]
    for folder, content, settings in (("other base", [7], {"lr": 0.5}), ("the same again", [1], {})):
        with pytest.raises(SystemExit, match=f"{folder} does not fit the other runs of seed 1"):
            evaluation.main(["--compare", *runs, finished_run(tmp_path / folder, 1, content, [(0.6, 1.0), (0.8, 1.0)], **settings)])
    with pytest.raises(SystemExit, match="none of the folders"):
        evaluation.main(["--compare", str(tmp_path / "stopped")])


def test_explain_works_one_group_through(small_demo, capsys):
    evaluation.main(["--model", str(small_demo / "model"), "--explain"])
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    for function in ("rollout", "base_reward", "pick_references", "representation_reward", "behavior_reward", "total_reward",
                     "modality_advantages", "grpo_loss"):
        assert f"{function}()" in printed
    rows = [re.fullmatch(r"  S\d  ([\d.]+) \+ 10 \* ([\d.]+) \+ 10 \* ([\d.]+) = ([\d.]+)", line) for line in printed.splitlines()]
    sums = [[float(x) for x in row.groups()] for row in rows if row]
    assert len(sums) == 4
    for base, rep, beh, total in sums:  # Eq. (2) as printed
        assert base + 10 * (rep + beh) == pytest.approx(total, abs=0.012)  # three decimals are printed
    rows = [re.match(r"  S\d  ([\d.]+) - ([\d.]+) = ([+-][\d.]+)", line) for line in printed.splitlines()]
    advantages = [[float(x) for x in row.groups()] for row in rows if row]
    assert [a[0] for a in advantages] == [s[3] for s in sums]
    for reward, mean, advantage in advantages:  # Eq. (7) as printed
        assert mean == pytest.approx(np.mean([s[3] for s in sums]), abs=0.001) and reward - mean == pytest.approx(advantage, abs=0.002)


def explained(printed):
    """What --explain printed -> Eq. (2) as {answer: (R_base, weight, R_rep, weight, R_beh, R)}, Eq. (7) as {answer: (R, mean, A)}."""
    number = r"([+-]?[\d.]+)"
    totals = re.findall(rf"^  ([ST]\d)  {number} \+ {number} \* {number} \+ {number} \* {number} = {number}$", printed, re.M)
    advantages = re.findall(rf"^  ([ST]\d)  {number} - {number} = {number}  ", printed, re.M)
    return [{name: tuple(map(float, numbers)) for name, *numbers in rows} for rows in (totals, advantages)]


def test_explain_takes_the_settings_of_a_run(small_demo, tmp_path, capsys):
    settings = {"model": small_demo / "model", "data": small_demo / "train", "embedder": "ngrams", "alpha": 0.5, "beta": 2.0, "group_size": 4,
                "max_new_tokens": 26, "joint_norm": True, "layers": "2-3"}
    (tmp_path / "config.json").write_text(json.dumps(settings, default=str))
    evaluation.main(["--explain", str(tmp_path)])
    printed = capsys.readouterr().out
    totals, advantages = explained(printed)
    assert set(totals) == set(advantages) == {"S1", "S2", "T1", "T2"}
    mean = np.mean([R for *_, R in totals.values()])  # one joint mean
    for name, (base, alpha, rep, beta, beh, R) in totals.items():
        assert (alpha, beta) == (0.5, 2.0) and base + 0.5 * rep + 2 * beh == pytest.approx(R, abs=0.003)
        assert name[0] == "S" or rep == beh == 0
        assert advantages[name] == (R, pytest.approx(mean, abs=0.002), pytest.approx(R - mean, abs=0.002))
    rows = re.findall(r"layer 2 ([\d.]+)  layer 3 ([\d.]+)   mean of 2 layers ([\d.]+)", printed)
    assert len(rows) == 2 or "none: 0" in printed
    for row in rows:
        two, three, both = map(float, row)
        assert (two + three) / 2 == pytest.approx(both, abs=0.001)


def test_random_weights_rehearses_full_length_answers_without_a_download(tmp_path, capsys):
    torch.manual_seed(0)
    config = tiny_qwen()[0].config
    config.text_config.vocab_size = 400
    config.save_pretrained(tmp_path)
    printed = run(HERE / "eval.py", "--random-weights", tmp_path, "--audio-seconds", 2, "--questions-per-step", 2, "--max-new-tokens", 7)
    did, head, first, second = printed.splitlines()[-4:]
    assert did == "4 layers: 2 questions, clips of 2 s, 8 answers of at most 7 tokens" and "cpu, float32" in printed
    assert head.split() == ["step", "embed", "rollout", "forward", "backward,", "rest", "total", "s", "tokens/s", "peak", "GiB"]
    *phases, total, speed, peak = map(float, second.split()[1:])
    assert sum(phases) == pytest.approx(total, abs=0.05) and peak > 0.1
    tokens = 2 * 8 * 7  # every one of 2 x 8 answers has 7 tokens
    assert tokens / (total + 0.01) - 1 < speed < tokens / (total - 0.01) + 1
    assert {p.name for p in tmp_path.iterdir()} == {"config.json"}
    capsys.readouterr()
    torch.manual_seed(0)
    evaluation.main(["--random-weights", str(tmp_path), "--audio-seconds", "2", "--questions-per-step", "2", "--max-new-tokens", "40", "--mean-tokens", "4"])
    did, _, *steps = capsys.readouterr().out.splitlines()[-4:]
    assert did.endswith("8 answers of at most 40 tokens, 4 on average")
    for step in steps:  # the mean of 16 geometric lengths of mean 4, standard error 0.9
        total, speed = map(float, step.split()[-3:-1])
        assert 1.3 < speed * total / 16 < 8, step

# ======================================================================================================================
# Conversions that were stopped
# ======================================================================================================================
@pytest.mark.parametrize("damage", [lambda part: (part / "1.wav").write_bytes(b""), lambda part: (part / "1.wav").unlink(), lambda part: (part / "rows.jsonl").write_bytes(b""),
                                    lambda part: (part / "0.wav").write_bytes((part / "0.wav").read_bytes()[:-2])])
def test_clips_that_a_power_cut_took_are_made_again(small_demo, tmp_path, monkeypatch, capsys, damage):
    source, new = small_demo / "train", tmp_path / "new"
    monkeypatch.setattr(datasets.Dataset, "from_list", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prepare(capsys, "tars", "--origin", source, "--out", new, "--limit", 3)
    monkeypatch.undo()
    damage(tmp_path / "new.part")
    prepare(capsys, "tars", "--origin", source, "--out", new, "--limit", 3)
    clips = lambda path: [row["audio"]["bytes"] for row in load_questions(path).select(range(3))]
    assert [len(clip) for clip in clips(new)] == [len(clip) for clip in clips(source)]


def test_one_data_set_named_twice_is_measured_once(small_demo, capsys, monkeypatch):
    monkeypatch.chdir(small_demo)
    monkeypatch.setattr(evaluation, "compare", lambda args, cfg, sets: print(sorted(sets)))
    evaluation.main(["--model", "model", "--data", "test", "./test/", str(small_demo / "test")])
    assert capsys.readouterr().out.endswith("['test']\n")


# ======================================================================================================================
# Speed: TARS_SLOW=1 python -m pytest -q -s -k speed
# ======================================================================================================================
def alternate(rounds, **variants):
    """Median seconds of each variant, run in turn, after one round of warming up."""
    seconds = {name: [] for name in variants}
    for _ in range(rounds + 1):
        for name, variant in variants.items():
            start = time.perf_counter()
            variant()
            seconds[name].append(time.perf_counter() - start)
    return {name: float(np.median(s[1:])) for name, s in seconds.items()}


def demo_step(small_demo):
    """The demo's base model with LoRA, a step's questions and settings, and an optimizer that changes nothing."""
    lm = SpeechLM.from_pretrained(str(small_demo / "model"))
    cfg = tars.parse_config(["--model", str(small_demo / "model"), "--lr", "0", "--weight-decay", "0"], None)
    questions = load_questions(cfg.data)
    optimizer, _ = tars.make_trainable(lm, cfg)
    return lm, [questions[i] for i in range(cfg.questions_per_step)], cfg, optimizer


def straightforward_rollout(lm, prompts, repeats, cfg):
    """Answers as transformers samples them: speech first, then text, every sample with a copy of its prompt."""
    rows = []
    for m in range(2):
        embeds, present = pad_left([question[m] for question in prompts])
        ids = lm.model.generate(inputs_embeds=embeds, attention_mask=present, do_sample=True, temperature=cfg.temperature,
                                top_k=0, top_p=1.0, num_return_sequences=repeats, max_new_tokens=cfg.max_new_tokens,
                                eos_token_id=lm.eos_ids.tolist(), pad_token_id=lm.pad_id, suppress_tokens=lm.placeholder_ids.tolist())
        rows.append(torch.nn.functional.pad(ids, (0, cfg.max_new_tokens - ids.shape[1]), value=lm.pad_id).view(-1, repeats, cfg.max_new_tokens))
    ids = torch.stack(rows, 1)  # [B, 2, G/2, C]
    ended = torch.isin(ids, lm.eos_ids).long().cumsum(-1)
    mask = ((ended - torch.isin(ids, lm.eos_ids).long()) == 0).long()
    return ids, mask, ended[..., -1] == 0


def straightforward_batch(lm, questions, cfg, parameters, completions=None):
    """The step as the official code does it: three passes over separate rows, full logits, all hidden states kept.

    As in a plain forward call, each pass runs the audio encoder; here at least once a question and not once a row.
    """
    half = cfg.group_size // 2
    ids, mask, truncated = completions or straightforward_rollout(lm, lm.embed_prompts(questions), half, cfg)
    completions = lm.detokenize(ids, mask)
    _, acc, fmt = judge(questions, completions, tars.extract_answers)
    base, correct = base_reward(acc, fmt, cfg.lam).view(truncated.shape), acc.view(truncated.shape)[:, 1] == 1
    references = pick_references(correct, torch.Generator().manual_seed(0))
    sentences = tars.embed_ngrams(completions).unflatten(0, truncated.shape)  # [B, 2, G/2, D]
    flat = ids.flatten(0, 2)  # [R, C] with R = B * 2 * G/2

    def logps(**kwargs):
        prompt, prompt_mask = pad_left([prompt for question in lm.embed_prompts(questions) for prompt in question])
        P = prompt.shape[1]
        embeds = torch.cat([prompt.repeat_interleave(half, 0), lm.embed_tokens(flat)], 1)  # [R, P + C, H]
        present = torch.cat([prompt_mask.repeat_interleave(half, 0), mask.flatten(0, 2)], 1)
        output = lm.decoder(inputs_embeds=embeds, attention_mask=present, position_ids=tars.positions(present), use_cache=False, **kwargs)
        logits = lm.model.lm_head(output.last_hidden_state).float()  # [R, P + C, V]
        logits[..., lm.placeholder_ids] = -math.inf
        scored = (logits[:, P - 1 : -1] / cfg.temperature).log_softmax(-1).gather(-1, flat[..., None])[..., 0]  # [R, C]
        return scored, [layer[:, P:] for layer in output.hidden_states or ()]

    with torch.no_grad():
        old, _ = logps()
        _, states = logps(output_hidden_states=True)
    pooled = torch.stack([pool_hidden_states(layer, mask.flatten(0, 2)) for layer in states[1:]], 1)  # [R, L, H]
    pooled = pooled.unflatten(0, ids.shape[:3])
    rewards = base.clone()
    for b in range(len(questions)):
        for s in range(half):
            if (r := references[b, s]) >= 0:
                near = representation_reward(pooled[b, 0, s], pooled[b, 1, r]), behavior_reward(sentences[b, 0, s], sentences[b, 1, r])
                rewards[b, 0, s] = total_reward(base[b, 0, s], *near, cfg.alpha, cfg.beta)
    weights = token_weights(mask, truncated).flatten(0, 2)
    loss = grpo_loss(logps()[0], old, modality_advantages(rewards).flatten(), weights, cfg.eps_low, cfg.eps_high)
    return torch.autograd.grad(loss, parameters)


def test_straightforward_batch_is_the_same_step(lm, questions, answers, monkeypatch):
    """What the speed of a step is compared with computes the very gradient, so it is a fair comparison."""
    perturb(lm)
    parameters = [p for p in lm.decoder.parameters() if p.requires_grad]
    truncated = torch.zeros(4, 2, 2, dtype=torch.bool)
    truncated[1, 0, 1] = True
    gradient = one_step(lm, questions, answers, truncated, monkeypatch, parameters, lr=0.0)[3][0]
    for ours, theirs in zip(gradient, straightforward_batch(lm, questions, Config(group_size=4), parameters, (*answers, truncated))):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-3)


@slow
def test_speed_of_a_step(small_demo):
    """Whole step and roll-out against the straightforward version, and TARS against plain GRPO, on the demo."""
    lm, questions, cfg, optimizer = demo_step(small_demo)
    parameters, half = optimizer.param_groups[0]["params"], cfg.group_size // 2
    prompts, plain = lm.embed_prompts(questions), dataclasses.replace(cfg, alpha=0.0, beta=0.0)

    def seeded():
        return torch.Generator().manual_seed(0)

    def step(cfg):
        return train_step(lm, questions, tars.embed_ngrams, tars.extract_answers, optimizer, cfg, seeded())

    seconds = alternate(40, tars=lambda: step(cfg), grpo=lambda: step(plain))
    seconds |= alternate(15, step=lambda: step(cfg), straightforward=lambda: straightforward_batch(lm, questions, cfg, parameters))
    seconds |= alternate(15, rollout=lambda: lm.rollout(prompts, half, cfg.max_new_tokens, 1.0, seeded()),
                         generate=lambda: straightforward_rollout(lm, prompts, half, cfg))
    print("\nmedian seconds:", {name: round(s, 3) for name, s in seconds.items()})
    print(f"straightforward step / ours: {seconds['straightforward'] / seconds['step']:.2f}")
    print(f"generate(num_return_sequences) / rollout: {seconds['generate'] / seconds['rollout']:.2f}")
    print(f"TARS / GRPO: {seconds['tars'] / seconds['grpo']:.3f}")
    assert seconds["straightforward"] > 2.5 * seconds["step"] and seconds["generate"] > 1.3 * seconds["rollout"]
    assert seconds["tars"] < 1.044 * seconds["grpo"]  # the paper's own overhead, Table 8


def forward_backward(lm, prompts, ids, mask):
    logps, _ = lm.score(prompts, ids, mask, 1.0)
    (logps * mask).sum().backward()


def prefix_case(lm, P=600, half=4, C=100):
    """Two prompts of P tokens with G/2 answers of C: one row a prompt, and the same on separate rows."""
    generator = torch.Generator().manual_seed(0)
    prompts = [[prompt] for prompt in torch.randn(2, P, 128, generator=generator)]
    ids, mask = torch.randint(20, 30, (2, 1, half, C), generator=generator), torch.ones(2, 1, half, C, dtype=torch.long)
    separate = [prompt for prompt in prompts for _ in range(half)], ids.view(-1, 1, 1, C), mask.view(-1, 1, 1, C)
    return {"shared": (prompts, ids, mask), "separate": separate}


PEAK = """
import sys
from test_tars import *
lm = SpeechLM.from_pretrained(sys.argv[1])
attach_lora(lm, 8, 32)
case = prefix_case(lm)[sys.argv[2]]
forward_backward(lm, *prefix_case(lm, 8, 4, 8)["shared"])  # what is allocated once and for all
resident = lambda name: int(re.search(rf"{name}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**20
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = resident("VmRSS")
forward_backward(lm, *case)
print(resident("VmHWM") - before)
"""


@slow
def test_speed_and_memory_of_the_shared_prefix(small_demo):
    """P = 600, G/2 = 4, C = 100: forward and backward of one row a prompt against separate rows."""
    lm, *_ = demo_step(small_demo)
    case = prefix_case(lm)
    seconds = alternate(15, **{name: lambda inputs=inputs: forward_backward(lm, *inputs) for name, inputs in case.items()})
    print("\nmedian seconds:", {name: round(s, 3) for name, s in seconds.items()})
    print(f"time, separate rows / shared prefix: {seconds['separate'] / seconds['shared']:.2f}")
    peak = {name: float(run("-c", PEAK, small_demo / "model", name)) for name in case}
    print("peak GiB of the pass:", {name: round(p, 3) for name, p in peak.items()})
    print(f"memory, separate rows / shared prefix: {peak['separate'] / peak['shared']:.2f}")
    assert seconds["separate"] > 2 * seconds["shared"] and peak["separate"] > 2 * peak["shared"]


@slow
def test_speed_merging_lora_for_the_rollout_would_be_another_policy_in_bfloat16(small_demo, monkeypatch):
    """W + (alpha / r) B A, rounded to bfloat16, against W and B A apart: why LoRA is not merged, which would save launches."""
    monkeypatch.setattr(tars, "DTYPE", torch.bfloat16)
    lm, questions, cfg, optimizer = demo_step(small_demo)
    with torch.no_grad():
        for p in optimizer.param_groups[0]["params"]:
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())), alpha=0.002)
        prompts = lm.embed_prompts(questions)
        ids, mask, _ = lm.rollout(prompts, 4, cfg.max_new_tokens, 1.0, torch.Generator().manual_seed(0))
        apart = lm.score(prompts, ids, mask, 1.0)[0]
        with without_lora(lm):
            base = lm.score(prompts, ids, mask, 1.0)[0]
            for m in lm.model.modules():
                if isinstance(m, LoRALinear):
                    m.linear.weight.data = (m.linear.weight.float() + m.scale * m.lora_B @ m.lora_A).bfloat16()
            merged = lm.score(prompts, ids, mask, 1.0)[0]
    effect, error = ((x - apart).abs()[mask.bool()] for x in (base, merged))
    print(f"\n|difference| of log-probs: LoRA's effect {effect.mean():.4f}; merged against apart {error.mean():.4f} on average, {error.max():.2f} at most")
    assert error.max() > 0.05


# ======================================================================================================================
# Exercises: `python test_tars.py exercises DIR` writes a sheet; `python -m pytest -v -k exercise` in DIR grades it
# ======================================================================================================================
HOLES = {  # functions whose bodies a sheet leaves out, in the order of the course, and what is asked for
    "base_reward": "Eq. (3)", "format_reward": "R_fmt of Eq. (3)", "modality_advantages": "Eq. (7)",
    "token_weights": "the weights w of the loss", "grpo_loss": "the loss", "pool_hidden_states": "Eq. (4)",
    "representation_reward": "Eq. (5)", "behavior_reward": "Eq. (6)", "pick_references": "y* of Eq. (5) and (6)",
    "total_reward": "Eq. (2)", "modality_recovery_rate": "Eq. (1)", "LoRALinear.forward": "y = W x + (alpha / r) B A x",
    "paired_rows": "who sees whom, and where", "train_step": "the eight stages",
    "sft_loss": "SFT's loss", "offline_answers": "answers to learn from", "dpo_loss": "DPO's loss", "offline_loss": "the loss under the spoken prompt",
}


def with_holes(source):
    """Python source without the bodies of HOLES. Signatures, docstrings and comments on lines of their own stay."""
    lines, functions = source.splitlines(keepends=True), {}
    for node in ast.parse(source).body:
        for function in node.body if isinstance(node, ast.ClassDef) else [node]:
            if isinstance(function, ast.FunctionDef):
                functions[function.name if function is node else f"{node.name}.{function.name}"] = function
    for name in sorted(HOLES.keys() & functions.keys(), key=lambda name: -functions[name].lineno):
        body = functions[name].body  # its docstring comes first
        start, end = body[0].end_lineno, functions[name].end_lineno
        comments = [line for line in lines[start:end] if line.lstrip().startswith("#")]
        lines[start:end] = [*comments, f'{" " * body[0].col_offset}raise NotImplementedError("{HOLES[name]}")\n']
    return "".join(lines)


def write_sheet(folder):
    """A copy of the project with the method left out. Raises UserError if `folder` is there already."""
    if folder.exists():
        raise SystemExit(f"{folder} exists: give a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent) as aside:
        sheet = Path(aside) / folder.name
        sheet.mkdir()
        for name in ("eval.py", "data_prep.py", "requirements.txt", "README.md"):
            shutil.copy(HERE / name, sheet)
        for name in ("tars.py", "test_tars.py"):
            (sheet / name).write_text(with_holes((HERE / name).read_text()))
        sheet.rename(folder)
    print(f"{folder}: fill in tars.py, and in the end of test_tars.py SFT and DPO; grade it there with: python -m pytest -v -k exercise")


def exercise(grader):
    """A grader as a test. What is still empty, breaks inside tars.py or changes an argument is told in one line."""

    @functools.wraps(grader)
    def graded(*args, **kwargs):
        try:
            with pytest.MonkeyPatch.context() as patch:
                for name in ("LoRALinear.forward", *(HOLES.keys() & vars(tars).keys())):
                    owner, name = (LoRALinear, "forward") if "." in name else (tars, name)
                    patch.setattr(owner, name, untouched(getattr(owner, name)))
                grader(*args, **kwargs)
        except NotImplementedError as hole:
            said = f"still to be written: {hole}"
        except Exception as error:
            inside = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == tars.__file__]
            place = f"{inside[-1].name}, line {inside[-1].lineno}: " if inside else ""
            said = f"{place}{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        else:
            return
        pytest.fail(said, pytrace=False)

    return graded


def untouched(function):
    """The same function; an exercise ends where it changes an argument in place."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        before = [(x, x.clone()) for x in (*args, *kwargs.values()) if torch.is_tensor(x)]
        result = function(*args, **kwargs)
        teach(all(torch.equal(*pair) for pair in before), f"{function.__name__} changes an argument in place: its caller still needs that")
        return result

    return call


def teach(holds, sentence):
    """End the exercise with a sentence unless `holds`."""
    if not holds:
        pytest.fail(sentence, pytrace=False)


def same(given, wanted):
    """Whether two numbers or tensors are equal up to rounding, NaN to nothing."""
    given, wanted = (torch.as_tensor(x).detach().double() for x in (given, wanted))
    return given.shape == wanted.shape and torch.allclose(given, wanted, atol=1e-5, rtol=1e-4)


def explain_difference(given, wanted, mistakes, otherwise):
    """Nothing if `given` is `wanted`; else the sentence of the mistake whose value it is, or `otherwise` and the numbers.
    A value may be a function without arguments, if it takes long.
    """
    if same(given, wanted):
        return
    for sentence, value in mistakes.items():
        teach(not same(given, value() if callable(value) else value), sentence)
    given, wanted = (torch.as_tensor(x).detach() for x in (given, wanted))
    teach(given.shape == wanted.shape, f"{otherwise}: the shape should be {list(wanted.shape)}, yours is {list(given.shape)}")
    place = torch.isclose(given.double(), wanted.double(), atol=1e-5, rtol=1e-4).logical_not().nonzero()[0].tolist()
    numbers = [round(t.double()[tuple(place)].item(), 4) for t in (wanted, given)]
    teach(False, f"{otherwise}{f' at {place}' if place else ''}: should be {numbers[0]}, yours {numbers[1]}")


@exercise
def test_exercise_01_base_reward_and_format_reward():
    acc, fmt = torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.tensor([1.0, 0.0, 1.0, 0.0])
    explain_difference(tars.base_reward(acc, fmt, 0.2), [1.2, 1.0, 0.2, 0.0], {
        "lambda weighs R_fmt, and you weigh R_acc with it": 0.2 * acc + fmt,
        "lambda is an argument: you use 0.5 whatever it is": acc + 0.5 * fmt,
        "R_fmt has its weight lambda: you add it with weight 1": acc + fmt,
        "a wrong answer earns its format too: Eq. (3) is a sum, not a product": acc * (1 + 0.2 * fmt)}, "Eq. (3)")
    for completion, wanted, sentence in (
        ("<think>a</think><answer>The answer is B.</answer>", 1.0, "a completion that is as the system prompt wants it earns 1.0"),
        ("<think>a</think><answer>So. The answer is B: gold. Yes.</answer>", 1.0, "text may stand around `The answer is B` within the answer"),
        (" \n<think>a</think><answer>The answer is B.</answer>\n", 1.0, "white space around the completion is allowed"),
        ("<think>a</think>\n<answer>The answer is B.</answer>", 1.0, "white space between thought and answer is allowed"),
        ("<think>a\nb</think><answer>The answer is B.</answer>", 1.0, "a thought may have several lines"),
        ("so <think>a</think><answer>The answer is B.</answer>", 0.0, "the whole completion must match: yours allows text before it"),
        ("<think>a</think><answer>The answer is B.</answer> ok", 0.0, "the whole completion must match: yours allows text after it"),
        ("The answer is B.", 0.0, "the tags are the format: yours asks for the answer alone"),
        ("<think>a<answer>The answer is B.</answer>", 0.0, "the thought ends before the answer begins"),
        ("<think>The answer is B.</think><answer>No idea.</answer>", 0.0, "the letter stands in the answer: yours finds it in the thought"),
        ("<think>a</think><answer>The answer is E.</answer>", 0.0, "the answer is A, B, C or D"),
        ("<think>a</think><answer>The answer is Bob.</answer>", 0.0, "`.`, `:` or `,` follows the letter"),
        ("<think>a</think><answer>the answer is b.</answer>", 0.0, "the words and the letter count as they are written, capitals too"),
    ):
        fmt = tars.format_reward(completion)
        teach(isinstance(fmt, float), "R_fmt is a number, 1.0 or 0.0: yours is another type")
        teach(fmt in (0.0, 1.0), "R_fmt is 1.0 or 0.0 and nothing between")
        teach(fmt == wanted, sentence)


@exercise
def test_exercise_02_modality_advantages():
    rewards = random_(3, 2, 4) * torch.tensor([1.0, 3.0])[:, None] + torch.tensor([0.0, 5.0])[:, None]  # [B, M, G/2]
    given = tars.modality_advantages(rewards)
    teach(given.shape == rewards.shape, f"an advantage for each reward: [3, 2, 4], yours {list(given.shape)}")
    sums = {dim: same(given.sum(dim), torch.zeros_like(given.sum(dim))) for dim in (-1, (-2, -1), 0, 1, (0, 1, 2))}
    if not sums[-1]:
        teach(not sums[0], "the mean is that of a question's own answers; yours goes over the questions, the first axis")
        teach(not sums[1], "the mean goes over the samples, the last axis; yours goes over speech and text, the middle one")
        teach(not sums[-2, -1], "advantages of a modality must sum to 0 in each group; yours sum to 0 over both modalities together: that is --joint-norm")
        teach(not sums[0, 1, 2], "each modality of each question has its own mean; yours is one mean of the whole batch")
        teach(False, "advantages of a modality must sum to 0 in each group; yours do not")
    wanted = torch.stack([torch.stack([row - sum(row) / len(row) for row in question]) for question in rewards])
    factor = given / wanted  # [B, M, G/2]
    teach(not same(factor, -torch.ones_like(factor)), "an answer that is better than the mean has a positive advantage; your sign is the other one")
    teach(not same(factor, 4 / 3 * torch.ones_like(factor)), "the mean goes over all answers of the modality; yours leaves out the answer itself")
    teach(same(factor, torch.ones_like(factor)) or not same(factor, factor[..., :1].expand_as(factor)),
          "yours are divided by a number of the group, such as its standard deviation: GRPO does that, Eq. (7) does not")
    explain_difference(given, wanted, {}, "Eq. (7)")
    flat = tars.modality_advantages(torch.ones(1, 2, 4))
    teach(same(flat, torch.zeros(1, 2, 4)), "equal rewards have the advantage 0; yours is not, or NaN")
    wanted = torch.stack([question - sum(question.flatten()) / 8 for question in rewards])
    explain_difference(tars.modality_advantages(rewards, joint=True), wanted, {
        "with joint=True there is one mean over both modalities of a question; yours has one for each": given,
        "your sign is the other one with joint=True": -wanted}, "Eq. (7) with joint=True")


@exercise
def test_exercise_03_token_weights_and_grpo_loss():
    mask, cut = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]]), torch.tensor([False, True])
    explain_difference(tars.token_weights(mask, uncut(mask)), mask / 5, {
        "padding is counted: divide by the completion tokens alone": mask / 8,
        "padding has weights: they are 0 where the mask is 0": torch.full((2, 4), 1 / 8),
        "yours gives each answer the same weight, as GRPO's mean of means; DAPO gives each token of the batch the same":
            mask / mask.sum(-1, keepdim=True) / 2,
        "yours divides by each answer's own tokens; w divides by those of all answers": mask / mask.sum(-1, keepdim=True)}, "token_weights")
    explain_difference(tars.token_weights(mask, cut), [[0.25] * 4, [0] * 4], {
        "a cut answer weighs nothing in the loss: yours does": mask / 5,
        "the tokens of a cut answer are not counted either: the others then weigh more": mask * torch.tensor([[1], [0]]) / 5,
        "`truncated` is True for the answers that were cut: you keep those and drop the others": mask * torch.tensor([[0], [1]])},
        "token_weights with a cut answer")
    teach(same(tars.token_weights(mask, torch.tensor([True, True])), torch.zeros(2, 4)), "if all answers are cut, the weights are 0, not NaN")

    def loss(ratio, advantage, *eps):  # of one token
        return tars.grpo_loss(torch.tensor([[math.log(ratio)]]), torch.zeros(1, 1), torch.tensor([advantage]), torch.ones(1, 1), *eps)

    explain_difference(loss(1.1, 2.0), -2.2, {
        "the ratio is exp(logp - old logp), 1 on-policy; yours is the difference without exp": -2 * math.log(1.1),
        "the ratio is pi / pi_old; yours is upside down": -2 / 1.1,
        "the ratio is clipped to 1 - eps_low and 1 + eps_high; yours to eps_low and eps_high": -0.56,
        "the loss is minus the surrogate: descent must make good answers more likely": 2.2}, "grpo_loss")
    explain_difference(loss(2.0, 1.0), -1.28, {
        "a ratio above 1 + eps_high is clipped; yours is not, or you take the larger of the two products": -2.0,
        "above, the ratio is clipped at 1 + eps_high; you use eps_low on both sides": -1.2,
        "the ratio is clipped to 1 - eps_low below and 1 + eps_high above; you have them the other way round": -0.8}, "grpo_loss, ratio 2, advantage 1")
    explain_difference(loss(0.5, 1.0), -0.5, {
        "of both products the smaller counts: with ratio 0.5 and advantage 1 that is the one that is not clipped": -0.8}, "grpo_loss")
    explain_difference(loss(0.5, -1.0), 0.8, {
        "of both products the smaller counts, for negative advantages too: -0.8 and not -0.5": 0.5,
        "below, the ratio is clipped at 1 - eps_low; you use eps_high on both sides": 0.72}, "grpo_loss, ratio 0.5, advantage -1")
    explain_difference(loss(9.0, -1.0), 9.0, {
        "of both products the smaller counts: -9 and not -1.28; a bad answer that became likely is not clipped": 1.28}, "grpo_loss, ratio 9, advantage -1")
    for ratio, advantage, wanted in ((2.0, 1.0, -1.4), (0.5, -1.0, 0.7)):
        explain_difference(loss(ratio, advantage, 0.3, 0.4), wanted, {
            "eps_low and eps_high are arguments: you use 0.2 and 0.28 whatever they are": loss(ratio, advantage)}, "grpo_loss with eps_low 0.3 and eps_high 0.4")
    logps, old, advantages = random_(3, 4).requires_grad_(), random_(3, 4, seed=1), random_(3, seed=2)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    weights = mask / mask.sum()  # [3, 4]
    given = tars.grpo_loss(logps, old, advantages, weights)
    teach(given.requires_grad, "no gradient reaches the log-probs: your loss has none")
    value, gradient = loss_by_loop(logps, old, advantages, mask, 0.2, 0.28)
    everything, _ = loss_by_loop(logps, old, advantages, torch.ones_like(mask), 0.2, 0.28)
    explain_difference(given, value, {
        "padding is counted: each token's part is multiplied by its weight": everything,
        "the weights sum to 1 over all tokens: the loss is the weighted sum, not its mean": value / mask.numel(),
        "the weights are already divided by the number of tokens: yours are divided once more": value / mask.sum()}, "grpo_loss of three answers")
    given.backward()
    explain_difference(torch.zeros(3, 4) if logps.grad is None else logps.grad, gradient, {"no gradient reaches the log-probs: the ratio must not be detached": torch.zeros(3, 4)}, "the gradient")


@exercise
def test_exercise_04_pool_hidden_states():
    hidden = torch.tensor([[[100.0, 100.0], [2.0, 12.0], [4.0, 4.0], [50.0, 60.0]]])  # [1, T, H]
    explain_difference(tars.pool_hidden_states(hidden, torch.tensor([[0, 1, 1, 0]])), [[3.0, 8.0]], {
        "the mean goes over generated positions alone: you count the prompt and the padding": hidden.mean(1),
        "prompt and padding are left out of the sum, but counted in the number of positions": [[1.5, 4.0]],
        "Eq. (4) is a mean: divide the sum by the number of generated positions": [[6.0, 16.0]],
        "Eq. (4) is the mean over the answer, not the state of its last token": [[4.0, 4.0]],
        "Eq. (4) is a mean, not the largest value": [[4.0, 12.0]],
        "all tokens of the mask count, the end-of-turn too: yours leaves out the last": [[2.0, 12.0]],
        "the states at the answer's own positions count, not at those before, which predict it": [[51.0, 56.0]]}, "Eq. (4)")
    hidden, lengths = random_(2, 3, 5, 4), torch.tensor([[5, 1, 3], [2, 4, 5]])
    mask = (torch.arange(5) < lengths[..., None]).long()  # [2, 3, 5]
    sums = torch.stack([torch.stack([sum(states[:n]) for states, n in zip(*question)]) for question in zip(hidden, lengths)])
    explain_difference(tars.pool_hidden_states(hidden, mask), sums / lengths[..., None], {
        "each answer is divided by its own length: yours by that of the longest": sums / 5,
        "each answer is divided by its own length: yours by the mean length": sums / lengths.double().mean(),
        "each answer has a mask of its own: yours uses the first one's for all": hidden.mean(-2)}, "Eq. (4) with more leading axes")
    teach(same(tars.pool_hidden_states(hidden, 0 * mask), torch.zeros(2, 3, 4)), "an answer without tokens has the mean 0, not NaN")


@exercise
def test_exercise_05_representation_reward():
    speech, text = random_(2, 3, 4, 6), random_(2, 3, 4, 6, seed=1) * torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None]  # [B, G/2, L, H]
    cosines = torch.tensor([[[cos(*pair) for pair in zip(*answer)] for answer in zip(*question)] for question in zip(speech, text)])  # [B, G/2, L]
    flat = torch.tensor([[cos(*pair) for pair in zip(*question)] for question in zip(speech.flatten(2), text.flatten(2))])
    means = torch.tensor([[cos(*pair) for pair in zip(*question)] for question in zip(speech.mean(2), text.mean(2))])
    explain_difference(tars.representation_reward(speech, text), cosines.mean(-1), {
        "Eq. (5) is a mean over the layers: you return their sum": cosines.sum(-1),
        "Eq. (5) is a mean over the layers: you return the cosines of all of them": cosines,
        "take the cosine of each layer and then the mean; you take one cosine of all layers' states joined": flat,
        "take the cosine of each layer and then the mean; you take the cosine of the mean state": means,
        "a cosine divides by both lengths: yours is the dot product": (speech * text).sum(-1).mean(-1),
        "the reward is high where states are near: yours is a distance": (1 - cosines).mean(-1),
        "all L layers count; yours leaves out the first: the embedding output is not among them any more": cosines[..., 1:].mean(-1),
        "all L layers count: yours takes the last alone": cosines[..., -1],
        "a cosine below 0 stays below 0": cosines.clamp(min=0).mean(-1)}, "Eq. (5)")
    weights = torch.tensor([0.0, 0.2, 0.8, 0.0]).double()
    explain_difference(tars.representation_reward(speech, text, weights), 0.2 * cosines[..., 1] + 0.8 * cosines[..., 2], {
        "`weights`, where they are given, make the mean a weighted one": cosines.mean(-1),
        "`weights` say how much a layer counts, not only whether": cosines[..., 1:3].mean(-1),
        "`weights` sum to 1: the weighted sum is the mean already": (cosines * weights).mean(-1)}, "Eq. (5) with weights of the layers")
    teach(same(tars.representation_reward(speech, 0 * text), torch.zeros(2, 3)), "without a reference the states are 0 and so is the cosine; yours is not, or NaN")


@exercise
def test_exercise_06_behavior_reward_and_pick_references():
    speech, text = random_(2, 3, 6), random_(2, 3, 6, seed=1)  # [B, G/2, D]
    cosines = torch.tensor([[cos(*pair) for pair in zip(*question)] for question in zip(speech, text)])  # [B, G/2]
    explain_difference(tars.behavior_reward(speech, text), cosines, {
        "a cosine divides by both lengths: yours is the dot product": (speech * text).sum(-1),
        "the reward is high where answers mean the same: yours is a distance": 1 - cosines,
        "each spoken answer has its own reference: yours are compared with one another's":
            [[cos(a, b) for a, b in zip(*question)] for question in zip(speech, text.roll(1, 0))]}, "Eq. (6)")
    teach(same(tars.behavior_reward(speech, 0 * text), torch.zeros(2, 3)), "without a reference the embedding is 0 and so is the cosine; yours is not, or NaN")
    correct = torch.tensor([[True, False, True, True], [False, False, False, False], [True, False, False, False]])
    draws = [tars.pick_references(correct, torch.Generator().manual_seed(i)) for i in range(300)]
    teach(torch.is_tensor(draws[0]) and draws[0].dtype == torch.long, "references are indices: a tensor of type long")
    teach(draws[0].shape == (3, 4), f"one reference for each spoken answer: [3, 4], yours {list(draws[0].shape)}")
    draws = torch.stack(draws)  # [300, 3, 4]
    teach((draws[:, 1] == -1).all(), "a group without a correct written answer has no reference: -1")
    teach((draws[:, 0] >= 0).all() and (draws[:, 2] >= 0).all(), "a group with a correct written answer has references")
    teach((draws < 4).all(), "a reference is the index of a written answer within its group, 0 to G/2 - 1; yours counts over the batch")
    own = torch.stack([correct[b][draws[:, b].clamp(min=0)] | (draws[:, b] < 0) for b in range(3)])
    teach(own.all(), "a reference is a correct written answer of the same question: yours is a wrong one, or another question's")
    teach((draws[:, 0] != draws[:1, 0]).any(), "references are drawn at random: yours are always the same")
    teach((draws[:, 0, 0] != draws[:, 0, 1]).any(), "each spoken answer draws a reference of its own: yours share one")
    teach(not (draws[:, 0, 0] != draws[:, 0, 1]).all(), "each spoken answer draws from all correct ones: two may share one, and yours never do")
    counts = torch.stack([(draws[:, 0] == r).sum(0) for r in (0, 2, 3)])  # [3, 4], of 300
    teach(counts.min() > 0, "each spoken answer can draw each correct written answer, also the one at its own place: some of yours never come")
    teach(counts.min() > 60 and counts.max() < 140, "each correct written answer is drawn equally often")
    again = torch.stack([tars.pick_references(correct, torch.Generator().manual_seed(i)) for i in range(20)])
    teach(torch.equal(again, draws[:20]), "draw with `generator`, or a run cannot be repeated")
    generator, many = torch.Generator().manual_seed(0), correct.repeat(20, 1)
    teach(not torch.equal(tars.pick_references(many, generator), tars.pick_references(many, generator)),
          "draw with `generator` itself: yours starts anew at each call, and every step draws the same")


@exercise
def test_exercise_07_total_reward_and_modality_recovery_rate():
    base, rep, beh = (torch.tensor([x]) for x in (1.5, 0.8, 0.6))
    explain_difference(tars.total_reward(base, rep, beh, 0.5, 2.0), [1.5 + 0.4 + 1.2], {
        "alpha weighs R_rep and beta R_beh: you have them the other way round": [1.5 + 1.6 + 0.3],
        "alpha and beta are arguments: you add both rewards with weight 1": [2.9],
        "R_base is part of the reward": [1.6]}, "Eq. (2)")
    explain_difference(tars.total_reward(base, rep, beh), [2.9], {}, "Eq. (2) with the paper's alpha and beta, 1")
    rates = [tars.modality_recovery_rate(*accuracies) for accuracies in ((71.30, 77.70), (79.80, 79.44), (0.5, 0.0))]
    teach(all(isinstance(rate, float) for rate in rates), "the rate is a number, NaN where there is none")
    explain_difference(rates[0], 91.763192, {
        "the rate is in percent": 0.91763192, "speech accuracy over text accuracy: yours is upside down": 108.976157}, "Eq. (1)")
    teach(abs(rates[0] - 91.763192) < 1e-5, "the rate is not rounded: that is for the table")
    explain_difference(rates[1], 100.453172, {"a trained model can hear better than its base model reads: the rate may be above 100": 100.0}, "Eq. (1)")
    teach(math.isnan(rates[2]), "a base model that gets nothing right in writing has no rate: NaN")


@exercise
def test_exercise_08_lora():
    linear = torch.nn.Linear(3, 2)
    lora, x = LoRALinear(linear, rank=2, alpha=8), random_(5, 3).float()
    frozen = x @ linear.weight.T + linear.bias  # [5, out]
    explain_difference(lora(x), frozen, {
        "W x is missing": torch.zeros(5, 2),
        "the frozen layer has a bias, as q, k and v of Qwen have: call it, or add it": frozen - linear.bias}, "at first B is 0 and y = W x")
    lora.lora_B.data = random_(2, 2, seed=1).float()
    update = x @ lora.lora_A.T @ lora.lora_B.T  # [5, out]
    explain_difference(lora(x), frozen + 4 * update, {
        "W x is missing": 4 * update, "the update is scaled by alpha / r: yours is not": frozen + update,
        "the update is scaled by alpha / r: you multiply by alpha": frozen + 8 * update,
        "the update is scaled by alpha / r once: `scale` is that already": frozen + 2 * update,
        "the update is scaled once: yours is twice": frozen + 16 * update,
        "the update is missing": frozen}, "LoRA")
    explain_difference(lora(x.repeat(2, 1, 1)), (frozen + 4 * update).repeat(2, 1, 1), {}, "x may have more axes, [..., in]")
    teach(lora(x).requires_grad, "A and B are what is trained: no gradient reaches them")
    lora(x).sum().backward()
    teach(lora.lora_A.grad is not None and lora.lora_B.grad is not None, "A and B are what is trained: no gradient reaches them")
    lora = LoRALinear(torch.nn.Linear(2, 1, bias=False).bfloat16(), rank=1, alpha=1)
    lora.linear.weight.data.zero_()
    lora.lora_A.data, lora.lora_B.data = torch.tensor([[1 + 2**-10, -1.0]]), torch.tensor([[1.0]])
    y = lora(torch.ones(2, dtype=torch.bfloat16))
    teach(y.dtype == torch.bfloat16, "beside bfloat16 weights the result is bfloat16")
    teach(y.item() == 2**-10, "A and B are float32 beside bfloat16 weights: compute the update in float32, and cast it then")


@exercise
def test_exercise_09_paired_rows():
    # A spoken prompt of 2 tokens with answers of 2 and 1, a written prompt of 1 with answers of 1 and 1, one of padding.
    is_token = torch.tensor([[[2, 1], [1, 1]], [[2, 2], [1, 1]]])[..., None] > torch.arange(2)
    sees, positions, predictor = tars.paired_rows(torch.tensor([[2, 1], [1, 2]]), is_token)
    teach(sees.shape == (2, 1, 9, 9) and positions.shape == predictor.shape == (2, 9), "mask [b, 1, T, T], position ids and predictors [b, T], T of the longest question")
    teach(sees.dtype == torch.bool, "the mask is of type bool, True where a token is seen: attention would add another type to the scores")
    both, sees = sees[:, 0], sees[0, 0]  # [b, T, T], [T, T]
    teach(sees.diagonal().all(), "each token sees itself, padding too: a softmax over nothing is NaN")
    teach(not sees.triu(1).any(), "a token sees what stands before it: yours sees the future")
    teach(not sees[4, 2:4].any() and not sees[7, 6], "an answer does not see another answer to the same prompt")
    teach(not sees[5:8, :5].any(), "the written prompt and its answers see nothing of the spoken ones")
    teach(sees[2:5, :2].all() and sees[6:8, 5].all(), "an answer sees the whole of its own prompt")
    teach(sees[1, 0] and sees[3, 2], "a token sees the tokens before it in its own prompt or answer")
    teach(not sees[8, :8].any(), "padding sees itself alone")
    prompt, parts = (0, 0, 0, 3, 3, 3, 6), ((0, 0, 1, 1, 2, 3, 4, 5, 6), (0, 1, 1, 2, 2, 3, 3, 4, 5))  # of each part; of each token
    wanted = [[[j <= i and part[j] in (part[i], prompt[part[i]]) for j in range(9)] for i in range(9)] for part in parts]
    explain_difference(both.long(), torch.tensor(wanted).long(), {
        "each question has lengths and so a mask of its own: yours uses the first one's for all": both[:1].long().expand(2, -1, -1)}, "who sees whom")
    real = torch.tensor(parts) < 6  # [b, T]; where padding stands does not matter
    explain_difference(positions * real, [[0, 1, 2, 3, 2, 0, 1, 1, 0], [0, 1, 2, 1, 2, 0, 1, 2, 2]], {
        "positions start again: those of an answer go on from its prompt's, and each prompt begins at 0": torch.arange(9).expand(2, 9) * real,
        "an answer goes on from the positions of its prompt: yours start at 0": [[0, 1, 0, 1, 0, 0, 0, 0, 0], [0, 0, 1, 0, 1, 0, 1, 0, 0]],
        "each answer goes on from its prompt, and not from the answer beside it": [[0, 1, 2, 3, 4, 0, 1, 2, 0], [0, 1, 2, 3, 4, 0, 1, 2, 3]],
        "the written prompt starts at 0, as if the spoken one were not there": [[0, 1, 2, 3, 2, 2, 3, 3, 0], [0, 1, 2, 1, 2, 1, 2, 3, 3]]}, "position ids")
    explain_difference(predictor, [[-1, -1, 1, 2, 1, -1, 5, 5, -1], [-1, 0, 1, 0, 3, -1, -1, 6, 6]], {
        "the first token of each answer is predicted by the prompt's last token, not by what stands beside it":
            [[-1, -1, 1, 2, 3, -1, 5, 6, -1], [-1, 0, 1, 2, 3, -1, -1, 6, 7]],
        "a token is predicted by the one before it, not by itself": [[-1, -1, 2, 3, 4, -1, 6, 7, -1], [-1, 1, 2, 3, 4, -1, -1, 7, 8]],
        "only an answer's tokens are predicted: -1 at the prompts'": [[-1, 0, 1, 2, 1, -1, 5, 5, -1], [-1, 0, 1, 0, 3, -1, 5, 6, 6]]},
        "the index of the token that predicts each token")


@exercise
def test_exercise_10_train_step(questions, monkeypatch):
    lm = SpeechLM(Qwen25Omni, *tiny_qwen())
    perturb(lm)
    parameters, answers, cut = [p for p in lm.decoder.parameters() if p.requires_grad], four_answers(lm), torch.zeros(4, 2, 2, dtype=torch.bool)
    for tensor in answers:  # the right written answer is the second, the first, the second, the first
        tensor[[1, 3], 1] = tensor[[1, 3], 1].flip(1)
    cut[0, 0, 1] = True
    wrong_cut = cut.clone()
    wrong_cut[0, 1, 1] = True  # the right written answer of the first question
    drawn, given, generator, students_loss = [], {}, torch.Generator().manual_seed(0), tars.grpo_loss

    def rollout(*args, **kwargs):
        given["rollout"] = inspect.signature(SpeechLM.rollout).bind(lm, *args, **kwargs).arguments
        return [*answers, cut]

    def pick(*args, **kwargs):
        given["pick"] = inspect.signature(pick_references).bind(*args, **kwargs).arguments
        drawn.append(pick_references(*args, **kwargs))
        return drawn[-1]

    def loss(*args, **kwargs):
        given["loss"] = inspect.signature(grpo_loss).bind(*args, **kwargs).arguments
        return students_loss(*args, **kwargs)

    def step(**settings):
        """train_step's numbers, its group, and the gradient of each update; the rate is 0, so the weights stay as they are."""
        drawn.clear()
        optimizer = Recorder(parameters, 0.0)
        cfg = Config(**{"group_size": 4, "max_new_tokens": 40, "max_grad_norm": 1e9} | settings)
        result = tars.train_step(lm, questions, tars.embed_ngrams, tars.extract_answers, optimizer, cfg, generator)
        teach(isinstance(result, tuple) and len(result) == 2, "train_step returns two things: the numbers to log, and first_group(...)")
        metrics, group = result
        names = {f"{name}_{m}" for name in ("acc", "fmt", "reward", "length") for m in tars.MODALITIES} | {"rep_speech", "beh_speech"}
        names |= {"loss", "grad_norm", "skipped"}
        teach(names <= metrics.keys(), f"the numbers to log lack {', '.join(sorted(names - metrics.keys()))}")
        return metrics, group, [torch.cat([g.flatten() for g in gradient]) for gradient in optimizer.gradients]

    def wanted(cut=cut, **settings):
        gradient, terms = straightforward_step(lm, questions, answers, cut, drawn[0], Config(**settings), parameters)
        return torch.cat([g.flatten() for g in gradient]), terms

    def compare(condition="", **settings):
        """One step against the straightforward one, stage by stage. Returns its gradient and terms."""
        metrics, group, gradients = step(**settings)
        call = given["rollout"]
        teach(call["samples"] == 2, f"stage 2: each prompt is answered G/2 times, here 2; yours {call['samples']}")
        teach((call["max_new_tokens"], call["temperature"], call.get("generator")) == (40, settings.get("temperature", 1.0), generator),
              "stage 2: the roll-out takes max_new_tokens, temperature and the generator")
        teach(len(drawn) == 1, f"stage 3 draws the references of the whole step once: you call pick_references {len(drawn)} times")
        teach(given["pick"].get("generator") is generator, "stage 3: the references are drawn with the generator, or a run cannot be repeated")
        explain_difference(drawn[0], [[1, 1], [0, 0], [1, 1], [0, 0]], {}, "stage 3: references are correct written answers, those of TEXT with R_acc 1; the drawn index")
        cfg, (gradient, terms) = Config(**settings), wanted(**settings)
        teach(group and group.get("key") == questions[0]["key"], "return the first question's group too: first_group(questions[0], ...)")
        base, rep, beh, reward = (terms[name] for name in ("base", "rep", "beh", "reward"))
        both = reward - reward.mean((1, 2), keepdim=True)  # [B, M, 2]
        known = {
            "base": {"R_fmt is missing in R_base": terms["acc"]},
            "reward": {"R_rep is missing in the reward: Eq. (5) is computed between forward and backward pass": base + cfg.beta * beh,
                       "R_beh is missing in the reward": base + cfg.alpha * rep, "R_rep and R_beh are missing in the reward": base,
                       "alpha weighs R_rep and beta R_beh: you have them the other way round": base + cfg.beta * rep + cfg.alpha * beh},
            "advantage": {"advantages are centred within each modality; yours over both together": both,
                          "with joint_norm there is one mean over both modalities": reward - reward.mean(-1, keepdim=True),
                          "advantages are not divided by a standard deviation": terms["advantage"] / reward.std(-1, keepdim=True),
                          "advantages come from the whole reward of Eq. (2)": base - base.mean(-1, keepdim=True)}}
        for name, stage in (("acc", 3), ("fmt", 3), ("base", 3), ("beh", 3), ("rep", 5), ("reward", 5), ("advantage", 6)):
            shown = [[answer.get(name, math.nan) for answer in group[m]] for m in tars.MODALITIES]
            explain_difference(shown, terms[name][0], {sentence: value[0] for sentence, value in known.get(name, {}).items()},
                               f"stage {stage}{condition}: {name} of the first question's answers, [speech, text],")
            logged = [m for m in tars.MODALITIES if f"{name}_{m}" in metrics]
            explain_difference([metrics[f"{name}_{m}"] for m in logged], terms[name].mean((0, 2))[: len(logged)], {},
                               f"stage {stage}{condition}: mean of {name} over all questions, [speech, text],")
        teach(len(gradients) == 1, f"there is one update of the optimizer a roll-out, after all micro-batches: yours has {len(gradients)}")
        teach((given["loss"].get("eps_low", 0.2), given["loss"].get("eps_high", 0.28)) == (cfg.eps_low, cfg.eps_high),
              "stage 7: eps_low and eps_high are settings, and the loss takes them in this order")
        teach(gradients[0].any(), "the gradient is 0: call backward(), and detach the old log-probs: else the ratio's own gradient cancels")
        explain_difference(gradients[0], gradient, {
            "a cut answer must not be learnt from: its tokens weigh 0": lambda: wanted(cut=torch.zeros_like(cut), **settings)[0],
            "the gradient has the other sign: `loss.backward()`, and the optimizer descends": -gradient,
            "log-probs are those of the temperature of the roll-out: yours are of temperature 1":
                lambda: wanted(**settings | {"temperature": 1.0})[0]}, f"stage 7{condition}: rewards and advantages are right, the gradient is not,")
        return metrics, gradient, terms

    monkeypatch.setattr(lm, "rollout", rollout)
    monkeypatch.setattr(tars, "pick_references", pick)
    monkeypatch.setattr(tars, "grpo_loss", loss)
    metrics, gradient, _ = compare()
    before = [p.grad is not None and p.grad.any() for p in parameters]
    teach(not any(before), "optimizer.zero_grad() after the update, or the next step's gradient has this one's in it")
    cut_before, cut = cut, wrong_cut
    step()
    explain_difference(drawn[0][0], [-1, -1], {}, "stage 3: a cut answer is never a reference, even if it is correct: the drawn index")
    cut = cut_before
    in_parts, _, gradients = step(tokens_per_micro_batch=1)
    teach(len(gradients) == 1, f"there is one update of the optimizer a roll-out, after all micro-batches: yours has {len(gradients)}")
    explain_difference([in_parts[f"{name}_speech"] for name in ("rep", "beh", "reward")], [metrics[f"{name}_speech"] for name in ("rep", "beh", "reward")], {},
                       "with a question a micro-batch the rewards [R_rep, R_beh, R] change")
    explain_difference(gradients[0], gradient, {}, "the loss is divided by the tokens of the whole step, and yours by those of each micro-batch, or their gradients do not add up: the gradient")
    explain_difference(in_parts["loss"], metrics["loss"], {}, "the loss to log is the sum over the micro-batches: with one question in each it")
    compare(" with other settings than the paper's", eps_low=0.1, eps_high=0.3, alpha=0.7, beta=1.9, lam=0.3, layers="2-3", joint_norm=True, temperature=0.7)
    metrics, *_, (clipped,) = step(max_grad_norm=1e-3)
    teach(same(clipped.norm() * 1e3, 1.0), "stage 8 clips the gradient's norm to max_grad_norm before the update")
    for what, loss in (("loss", lambda logps: logps.sum() * math.nan), ("gradient's norm", lambda logps: (logps.sum() * 0).sqrt())):
        monkeypatch.setattr(tars, "grpo_loss", lambda *args, loss=loss, **kwargs: loss(args[0] if args else kwargs["per_token_logps"]))
        metrics, _, gradients = step()
        teach(not gradients and metrics["skipped"] == 1, f"there is no update where the {what} is not finite; skipped is 1 then")
        teach(all(p.grad is None or not p.grad.any() for p in parameters), "optimizer.zero_grad() also where the update is left out")


# The paper's Table 2 has two baselines that learn from answers sampled before training. Both learn under the spoken prompt.
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


def offline_answers(lm, questions, cfg, generator):
    """For each question [ids of a correct written answer, ids of a wrong spoken one], sampled until there are both, at
    most 100 times each; None for a question that has not both. Ids [C] end with the end-of-turn; roll-outs as in
    train_step, with cfg's questions_per_step, max_new_tokens and temperature.
    """
    found = [[None, None] for _ in questions]
    for _ in range(100 // 4):
        missing = [i for i, pair in enumerate(found) if None in pair]
        for first in range(0, len(missing), cfg.questions_per_step):
            batch = missing[first : first + cfg.questions_per_step]
            asked = [questions[i] for i in batch]
            ids, mask, _ = lm.rollout(lm.embed_prompts(asked), 4, cfg.max_new_tokens, cfg.temperature, generator)  # [b, M, 4, C]
            acc = judge(asked, lm.detokenize(ids, mask), tars.extract_answers)[1].view(mask.shape[:3])  # [b, M, 4]
            for b, i in enumerate(batch):
                for k, (modality, right) in enumerate(((1, 1), (0, 0))):
                    if found[i][k] is None and (acc[b, modality] == right).any():
                        s = (acc[b, modality] == right).nonzero()[0, 0]
                        found[i][k] = ids[b, modality, s][mask[b, modality, s] == 1]
    return [None if None in pair else pair for pair in found]


def offline_loss(method, lm, questions, pairs, beta=0.1):
    """The loss of `method`, sft or dpo, for b questions with their pairs of answers, under the spoken prompt -> scalar.
    DPO's base model is the model without its LoRA.
    """
    prompts = [[lm.prompt(turn)] for turn in lm.spoken_turns(questions)]  # b lists of one prompt [P, H]
    width = max(len(answer) for pair in pairs for answer in pair)
    ids, mask = (torch.zeros(len(pairs), 1, 2, width, dtype=torch.long, device=lm.device) for _ in range(2))  # [b, 1, 2, C]
    for b, pair in enumerate(pairs):
        for k, answer in enumerate(pair):
            ids[b, 0, k, : len(answer)], mask[b, 0, k, : len(answer)] = answer, 1
    logps, _ = lm.score(prompts, ids, mask, 1.0)  # [b, 1, 2, C]
    if method == "sft":
        return sft_loss(logps[:, 0, 0], mask[:, 0, 0])
    with torch.no_grad(), without_lora(lm):
        base, _ = lm.score(prompts, ids, mask, 1.0)  # [b, 1, 2, C]
    return dpo_loss(*(x.sum(-1)[:, 0, k] for x in (logps, base) for k in (0, 1)), beta)


def baseline_case():
    """A tiny model with LoRA, correct written answers to two questions, and wrong spoken ones: ids [C] each."""
    lm = SpeechLM(Qwen25Omni, *tiny_qwen())
    perturb(lm)
    ids, mask = four_answers(lm)  # [4, M, 2, C]
    return lm, *([ids[b, m, 1][mask[b, m, 1] == 1] for b in (0, 1)] for m in (1, 0))


@exercise
def test_exercise_11_sft(questions, monkeypatch):
    logps, mask = torch.tensor([[-1.0, -2.0], [-6.0, -10.0]]), torch.tensor([[1, 1], [1, 0]])
    explain_difference(sft_loss(logps, mask), 3.0, {  # (1 + 2 + 6) / 3
        "the likelihood is to rise: the loss is minus the log-likelihood": -3.0,
        "padding is counted": 4.75, "divide by the number of tokens: yours by that of answers": 4.5, "padding is counted in the number of tokens": 2.25, "the loss is a mean, yours a sum": 9.0,
        "the loss is one mean over all tokens, yours a mean of the answers' means": 3.75}, "sft_loss")
    lm, chosen, rejected = baseline_case()
    ids, mask = four_answers(lm)
    for x in (ids, mask):  # the right spoken answer loses its first token: it is right, but not the written one
        x[:, 0, 0] = x[:, 0, 0].roll(-1, -1) * (torch.arange(x.shape[-1]) < x.shape[-1] - 1)
    for x in (ids, mask):
        x[3] = x[1]  # the first four answers to the second question: nothing to learn from
        x[3, 0], x[3, 1] = x[1, 1, 1], x[1, 1, 0]
        x[2, 0] = x[2, 1, 1]  # the third question is never answered wrongly from speech
    sampled, cfg, generator = {}, Config(questions_per_step=2, temperature=0.7, max_new_tokens=40), torch.Generator()

    def sample(q, m):
        """The next answer to a prompt: ids [C] and mask [C]."""
        n = sampled[q, m] = sampled.get((q, m), 0) + 1
        teach(n <= 200, "stop after 100 answers to a prompt: some questions are never answered rightly, or never wrongly")
        return torch.stack([x[3 if q == 1 and n <= 4 else q, m, n % 2] for x in (ids, mask)])

    def rollout(*args, **kwargs):
        call = inspect.signature(SpeechLM.rollout).bind(lm, *args, **kwargs).arguments
        teach((call["max_new_tokens"], call["temperature"], call.get("generator")) == (40, 0.7, generator),
              "sample with cfg's max_new_tokens and temperature, and with the generator")
        answers = torch.stack([torch.stack([torch.stack([sample(*prompt) for _ in range(call["samples"])]) for prompt in question])
                               for question in call["prompts"]])  # [b, M, samples, 2, C]
        return [*answers.unbind(-2), torch.zeros(answers.shape[:3], dtype=torch.bool)]

    keys = [question["key"] for question in questions]
    monkeypatch.setattr(lm, "embed_prompts", lambda asked: [[(keys.index(question["key"]), m) for m in (0, 1)] for question in asked])
    monkeypatch.setattr(lm, "rollout", rollout)
    found = offline_answers(lm, questions[:3], cfg, generator)
    for pair, good, bad in zip(found, chosen, rejected):
        teach(pair is not None and len(pair) == 2, "offline_answers: both questions have a correct written and a wrong spoken answer")
        explain_difference(pair[0], good, {}, "chosen is a correct answer to the written question")
        explain_difference(pair[1], bad, {}, "rejected is a wrong answer to the spoken question")
    teach(len(found) == 3 and found[2] is None, "a question that has not both answers after 100 tries is None")
    given = offline_loss("sft", lm, questions[:2], list(zip(chosen, rejected)))
    rows = {spoken: [plain_logps(lm, q, spoken, answer.tolist()) for q, answer in zip(questions, chosen)] for spoken in (True, False)}
    wrong = [plain_logps(lm, q, True, answer.tolist()) for q, answer in zip(questions, rejected)]
    explain_difference(given, -torch.cat(rows[True]).mean(), {
        "answers are learnt under the spoken prompt; yours under the written one": -torch.cat(rows[False]).mean(),
        "SFT learns the chosen answers alone; yours learns the rejected ones too": -torch.cat(rows[True] + wrong).mean()}, "offline_loss of SFT")
    given.backward()
    teach(any(p.grad is not None and p.grad.any() for p in lm.decoder.parameters()), "no gradient reaches LoRA's weights")


@exercise
def test_exercise_12_dpo(questions):
    values = [torch.tensor([x]) for x in (-10.0, -12.0, -20.0, -15.0)]  # 0.1 * ((-10 + 20) - (-12 + 15)) = 0.7
    explain_difference(dpo_loss(*values), math.log(1 + math.exp(-0.7)), {
        "the chosen answer is to become more likely: yours is the rejected one": math.log(1 + math.exp(0.7)),
        "log-probs count relative to the base model's: yours do not": math.log(1 + math.exp(-0.2)),
        "beta is missing": math.log(1 + math.exp(-7.0))}, "dpo_loss")
    explain_difference(dpo_loss(*values, beta=0.2), math.log(1 + math.exp(-1.4)), {"beta is an argument": math.log(1 + math.exp(-0.7))}, "dpo_loss")
    lm, chosen, rejected = baseline_case()
    pairs = list(zip(chosen, rejected))
    given = offline_loss("dpo", lm, questions[:2], pairs)

    def wanted(spoken=True, whole=torch.sum, beta=0.1):
        """The loss, from whole answers' log-probs under the spoken or the written prompt."""
        def margins():
            return torch.stack([whole(plain_logps(lm, q, spoken, good.tolist())) - whole(plain_logps(lm, q, spoken, bad.tolist()))
                                for q, (good, bad) in zip(questions, pairs)])

        margin = margins()
        with without_lora(lm):
            margin = margin - margins()
        return sum(math.log(1 + math.exp(-beta * m)) for m in margin.tolist()) / 2

    explain_difference(given, wanted(), {
        "the base model is the model without LoRA: yours has it, and the loss is log 2 whatever is learnt": math.log(2),
        "answers are learnt under the spoken prompt; yours under the written one": lambda: wanted(spoken=False),
        "the log-prob of an answer is the sum over its tokens; yours is their mean": lambda: wanted(whole=torch.mean)}, "offline_loss of DPO")
    explain_difference(offline_loss("dpo", lm, questions[:2], pairs, beta=0.3), wanted(beta=0.3), {"beta is an argument": given}, "offline_loss with beta 0.3")
    given.backward()
    teach(any(p.grad is not None and p.grad.any() for p in lm.decoder.parameters()), "no gradient reaches LoRA's weights")


@pytest.fixture(scope="session", params=range(50, 56))
def demo_of_a_seed(request, tmp_path_factory):
    """The base model and data on which README compares TARS and GRPO, for one of its seeds."""
    out = tmp_path_factory.mktemp(f"seed{request.param}") / "demo"
    data_prep.main(["demo", "--out", str(out), "--seed", str(request.param), "--stop-at", "0.30"])
    return tars.parse_config(["--model", str(out / "model"), "--seed", str(request.param)], None)


@slow
@pytest.mark.parametrize("method, lr", [("sft", 4.8e-3), ("dpo", 1.6e-3)])
def test_baselines_on_the_demo(demo_of_a_seed, method, lr):
    """Two more rows of README's table: one pass over the questions that TARS trains on. Prints accuracies before and after.
    Both learn what they are to learn: the loss falls. Whether that helps is README's table, and not always so.
    """
    cfg = dataclasses.replace(demo_of_a_seed, lr=lr)
    lm, train, test = SpeechLM.from_pretrained(cfg.model), load_questions(cfg.data), load_questions(cfg.eval_data)
    before = tars.evaluate(lm, test, tars.extract_answers, cfg)
    optimizer = tars.make_trainable(lm, cfg)
    steps = [[train[i] for i in batch] for batch in itertools.islice(tars.data_order(len(train), cfg.questions_per_step, cfg.seed), cfg.steps)]
    generator = torch.Generator(lm.device).manual_seed(cfg.seed)
    answers = iter(offline_answers(lm, [question for batch in steps for question in batch], cfg, generator))
    left_out, losses = 0, []
    for step, batch in enumerate(steps):
        both = [(question, pair) for question in batch if (pair := next(answers))]
        left_out += len(batch) - len(both)
        optimizer.param_groups[0]["lr"] = learning_rate(step, cfg.steps, cfg)
        loss = offline_loss(method, lm, *map(list, zip(*both)))
        loss.backward()
        losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], cfg.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    after = tars.evaluate(lm, test, tars.extract_answers, cfg)
    print(f"\n{method}, seed {cfg.seed}: speech {100 * before['speech']:.1f} -> {100 * after['speech']:.1f} %, text "
          f"{100 * before['text']:.1f} -> {100 * after['text']:.1f} %, {left_out} of {cfg.steps * cfg.questions_per_step} questions without a pair")
    assert np.mean(losses[-16:]) < np.mean(losses[:16])


MISTAKES = [  # exercise, function, what is written instead of what, and a piece of the sentence that must come
    ("01", "base_reward", "acc + lam * fmt", "lam * acc + fmt", "you weigh R_acc with it"),
    ("01", "base_reward", "acc + lam * fmt", "acc + 0.5 * fmt", "0.5 whatever it is"),
    ("01", "base_reward", "acc + lam * fmt", "acc * (1 + lam * fmt)", "a sum, not a product"),
    ("01", "format_reward", "fullmatch", "match", "text after it"),
    ("01", "format_reward", "fullmatch", "search", "text before it"),
    ("01", "format_reward", "completion.strip()", "completion", "white space around"),
    ("01", "format_reward", "1.0 if", "True if", "another type"),
    ("01", "base_reward", "return acc + lam * fmt", "acc += lam * fmt; return acc", "changes an argument in place"),
    ("01", "format_reward", "re.fullmatch(form, completion.strip())", "completion.strip().startswith('<think>') and completion.strip().endswith('</answer>') and re.search('The answer is [ABCD][.:,]', completion)", "the thought ends before"),
    ("01", "format_reward", "re.fullmatch(form, completion.strip())", "re.fullmatch(r'<think>.*</think>\\s*<answer>.*The answer is [ABCD].*</answer>', completion.strip(), re.S)", "follows the letter"),
    ("01", "format_reward", "re.fullmatch(form, completion.strip())", "re.fullmatch(form, completion.strip(), re.I)", "capitals too"),
    ("02", "modality_advantages", "else -1", "else (-2, -1)", "that is --joint-norm"),
    ("02", "modality_advantages", "else -1", "else 0", "the first axis"),
    ("02", "modality_advantages", "else -1", "else 1", "the middle one"),
    ("02", "modality_advantages", "else -1", "else (0, 1, 2)", "one mean of the whole batch"),
    ("02", "modality_advantages", "return rewards - ", "return rewards / rewards.std(-1, keepdim=True) - 1 / rewards.std(-1, keepdim=True) * ", "standard deviation"),
    ("02", "modality_advantages", "return rewards - ", "return -rewards + ", "your sign"),
    ("02", "modality_advantages", "(-2, -1) if joint else -1", "-1", "with joint=True"),
    ("02", "modality_advantages", "(-2, -1) if joint else -1", "-2 if joint else -1", "with joint=True"),
    ("02", "modality_advantages", "return rewards - rewards.mean((-2, -1) if joint else -1, keepdim=True)", "rewards -= rewards.mean((-2, -1) if joint else -1, keepdim=True); return rewards", "in place"),
    ("02", "modality_advantages", "return rewards - ", "return rewards.shape[-1] / (rewards.shape[-1] - 1) * rewards - rewards.shape[-1] / (rewards.shape[-1] - 1) * ", "leaves out the answer itself"),
    ("03", "token_weights", "completion_mask * ~truncated[..., None]", "completion_mask", "yours does"),
    ("03", "token_weights", "~truncated[..., None]", "(truncated if truncated.any() else ~truncated)[..., None]", "you keep those"),
    ("03", "token_weights", "sum_over_ranks(learnt.sum())", "sum_over_ranks(completion_mask.sum())", "not counted either"),
    ("03", "token_weights", "sum_over_ranks(learnt.sum())", "torch.tensor(learnt.numel())", "padding is counted"),
    ("03", "token_weights", "sum_over_ranks(learnt.sum()).clamp(min=1)", "learnt.sum(-1, keepdim=True).clamp(min=1) / len(learnt)", "GRPO's mean of means"),
    ("03", "token_weights", ".clamp(min=1)", "", "not NaN"),
    ("03", "grpo_loss", "torch.exp(per_token_logps - old_per_token_logps)", "per_token_logps - old_per_token_logps", "without exp"),
    ("03", "grpo_loss", "torch.exp(per_token_logps - old_per_token_logps)", "torch.exp(old_per_token_logps - per_token_logps)", "upside down"),
    ("03", "grpo_loss", "-(weights * surrogate).sum()", "(weights * surrogate).sum()", "minus the surrogate"),
    ("03", "grpo_loss", "torch.min(rho * A", "torch.max(rho * A", "the larger of the two"),
    ("03", "grpo_loss", "torch.min(rho * A, rho.clamp(1 - eps_low, 1 + eps_high) * A)", "rho * A", "yours is not"),
    ("03", "grpo_loss", "torch.min(rho * A, rho.clamp(1 - eps_low, 1 + eps_high) * A)", "rho.clamp(1 - eps_low, 1 + eps_high) * A", "the smaller counts"),
    ("03", "grpo_loss", "1 + eps_high", "1 + eps_low", "eps_low on both sides"),
    ("03", "grpo_loss", "1 - eps_low", "1 - eps_high", "eps_high on both sides"),
    ("03", "token_weights", "sum_over_ranks(learnt.sum()).clamp(min=1)", "completion_mask.sum(-1, keepdim=True).clamp(min=1)", "each answer's own tokens"),
    ("03", "grpo_loss", "rho.clamp(1 - eps_low, 1 + eps_high)", "rho.clamp(0.8, 1.28)", "whatever they are"),
    ("03", "grpo_loss", "rho.clamp(1 - eps_low, 1 + eps_high)", "rho.clamp(eps_low, eps_high)", "yours to eps_low and eps_high"),
    ("03", "grpo_loss", "A = advantages[..., None]", "A = advantages[..., None]; rho = rho.clamp(max=3)", "ratio 9, advantage -1"),
    ("03", "grpo_loss", "-(weights * surrogate).sum()", "-(weights * surrogate).sum().detach()", "no gradient reaches the log-probs"),
    ("03", "grpo_loss", "-(weights * surrogate).sum()", "-surrogate.mean()", "padding is counted"),
    ("03", "grpo_loss", "-(weights * surrogate).sum()", "-(weights * surrogate).mean()", "not its mean"),
    ("03", "grpo_loss", "-(weights * surrogate).sum()", "-(weights * surrogate).sum() / weights.count_nonzero()", "divided once more"),
    ("03", "grpo_loss", "-(weights * surrogate).sum()", "-(weights * surrogate).detach().sum().requires_grad_()", "no gradient reaches the log-probs"),
    ("04", "pool_hidden_states", "(hidden * mask).sum(-2) / mask.sum(-2).clamp(min=1)", "hidden.mean(-2)", "you count the prompt"),
    ("04", "pool_hidden_states", "mask.sum(-2).clamp(min=1)", "hidden.shape[-2]", "counted in the number of positions"),
    ("04", "pool_hidden_states", " / mask.sum(-2).clamp(min=1)", "", "divide the sum"),
    ("04", "pool_hidden_states", ".clamp(min=1)", "", "not NaN"),
    ("04", "pool_hidden_states", "mask.sum(-2).clamp(min=1)", "mask.sum(-2).max().clamp(min=1)", "that of the longest"),
    ("04", "pool_hidden_states", "mask.sum(-2).clamp(min=1)", "mask.sum(-2).mean().clamp(min=1)", "the mean length"),
    ("04", "pool_hidden_states", "mask = completion_mask.unsqueeze(-1)", "mask = completion_mask.flatten(0, -2)[0].expand_as(completion_mask).unsqueeze(-1)", "the first one's for all"),
    ("04", "pool_hidden_states", "mask = completion_mask.unsqueeze(-1)", "mask = (completion_mask * completion_mask.roll(-1, -1)).unsqueeze(-1)", "leaves out the last"),
    ("04", "pool_hidden_states", "mask = completion_mask.unsqueeze(-1)", "mask = completion_mask.roll(-1, -1).unsqueeze(-1)", "which predict it"),
    ("05", "representation_reward", "cosines.mean(-1)", "cosines.sum(-1)", "their sum"),
    ("05", "representation_reward", "cosines = F.cosine_similarity(speech, text, dim=-1)", "cosines = (speech * text).sum(-1)", "the dot product"),
    ("05", "representation_reward", "F.cosine_similarity(speech, text, dim=-1)", "F.cosine_similarity(speech.flatten(-2), text.flatten(-2), dim=-1)[..., None]", "layers' states joined"),
    ("05", "representation_reward", "F.cosine_similarity(speech, text, dim=-1)", "F.cosine_similarity(speech.mean(-2), text.mean(-2), dim=-1)[..., None]", "the mean state"),
    ("05", "representation_reward", " if weights is None else cosines @ weights", "", "`weights`, where they are given"),
    ("05", "representation_reward", "cosines @ weights", "cosines[..., weights > 0].mean(-1)", "not only whether"),
    ("05", "representation_reward", "cosines @ weights", "(cosines * weights).mean(-1)", "the mean already"),
    ("05", "representation_reward", "cosines.mean(-1)", "cosines[..., 1:].mean(-1)", "leaves out the first"),
    ("05", "representation_reward", "cosines.mean(-1)", "cosines[..., -1]", "takes the last alone"),
    ("05", "representation_reward", "cosines.mean(-1)", "cosines.clamp(min=0).mean(-1)", "stays below 0"),
    ("06", "behavior_reward", "F.cosine_similarity(speech, text, dim=-1)", "(speech * text).sum(-1)", "the dot product"),
    ("06", "behavior_reward", "F.cosine_similarity(speech, text, dim=-1)", "F.cosine_similarity(speech, text.roll(1, 0), dim=-1)", "one another's"),
    ("06", "pick_references", "return drawn.masked_fill(none, -1)", "return drawn", "no reference: -1"),
    ("06", "pick_references", "text_correct.float() + none.float()", "text_correct.roll(1, 0).float() + text_correct.roll(1, 0).logical_not().all(-1, keepdim=True).float()", "another question's"),
    ("06", "pick_references", "torch.multinomial(chances, text_correct.shape[-1], replacement=True, generator=generator)", "chances.argmax(-1, keepdim=True).expand_as(chances)", "always the same"),
    ("06", "pick_references", "torch.multinomial(chances, text_correct.shape[-1], replacement=True, generator=generator)", "torch.multinomial(chances, 1, generator=generator).expand_as(chances)", "yours share one"),
    ("06", "pick_references", ", generator=generator)", ")", "draw with `generator`"),
    ("06", "behavior_reward", "F.cosine_similarity(speech, text, dim=-1)", "(speech * text).sum(-1) / (speech.norm(dim=-1) * text.norm(dim=-1))", "or NaN"),
    ("06", "pick_references", "return drawn.masked_fill(none, -1)", "return drawn.masked_fill(none, -1).int()", "type long"),
    ("06", "pick_references", "generator=generator)", "generator=torch.Generator().manual_seed(generator.initial_seed()))", "starts anew"),
    ("06", "pick_references", "replacement=True, generator=generator)", "replacement=True, generator=generator); own = torch.arange(drawn.shape[-1]); drawn = torch.where(drawn == own, text_correct.float().argmax(-1, keepdim=True), drawn)", "some of yours never come"),
    ("06", "pick_references", "chances = text_correct.float() + none.float()", "chances = text_correct * torch.tensor([9.0, 1.0, 1.0, 1.0]) + none.float()", "equally often"),
    ("07", "total_reward", "alpha * rep + beta * beh", "beta * rep + alpha * beh", "the other way round"),
    ("07", "total_reward", "alpha * rep + beta * beh", "rep + beh", "with weight 1"),
    ("07", "modality_recovery_rate", "100 * ", "", "in percent"),
    ("07", "modality_recovery_rate", "speech_accuracy / base_text_accuracy", "base_text_accuracy / speech_accuracy", "upside down"),
    ("07", "modality_recovery_rate", "return 100 * speech_accuracy / base_text_accuracy", "return min(100.0, 100 * speech_accuracy / base_text_accuracy)", "above 100"),
    ("07", "modality_recovery_rate", "return 100 * speech_accuracy / base_text_accuracy", "return round(100 * speech_accuracy / base_text_accuracy, 2)", "not rounded"),
    ("07", "modality_recovery_rate", "math.nan", "None", "NaN where there is none"),
    ("08", "LoRALinear.forward", "self.linear(x) + delta.to(x.dtype)", "delta.to(x.dtype)", "W x is missing"),
    ("08", "LoRALinear.forward", "self.scale * self.lora_B", "self.lora_B", "yours is not"),
    ("08", "LoRALinear.forward", "return self.linear(x) + delta", "return x @ self.linear.weight.T + delta", "has a bias"),
    ("08", "LoRALinear.forward", "self.scale * self.lora_B", "self.scale**2 * self.lora_B", "yours is twice"),
    ("08", "LoRALinear.forward", "delta = F.linear(F.linear(x.to(self.lora_A.dtype), self.lora_A), self.scale * self.lora_B)",
     "delta = (self.scale * self.lora_B @ self.lora_A @ x.to(self.lora_A.dtype).T).T", "RuntimeError"),
    ("08", "LoRALinear.forward", "delta.to(x.dtype)", "delta.detach().to(x.dtype)", "no gradient reaches them"),
    ("08", "LoRALinear.forward", "x.to(self.lora_A.dtype), self.lora_A), self.scale * self.lora_B)",
     "x, self.lora_A.to(x.dtype)), (self.scale * self.lora_B).to(x.dtype))", "in float32"),
    ("08", "LoRALinear.forward", "delta.to(x.dtype)", "delta", "the result is bfloat16"),
    ("09", "paired_rows", "(prompt[:, :, None] == part[:, None])", "(prompt[:, :, None] == prompt[:, None])", "another answer to the same prompt"),
    ("09", "paired_rows", "own.tril()", "own", "sees the future"),
    ("09", "paired_rows", "own.tril()[:, None]", "own.tril()[:1, None].expand(b, -1, -1, -1)", "the first one's for all"),
    ("09", "paired_rows", "own.tril()[:, None]", "own.tril()[:, None].float()", "of type bool"),
    ("09", "paired_rows", "index - begin + is_answer * (answers_start - prompt_start)", "index - begin", "yours start at 0"),
    ("09", "paired_rows", "index - begin + is_answer * (answers_start - prompt_start)", "index - prompt_start", "the answer beside it"),
    ("09", "paired_rows", "torch.where(index == begin, answers_start, index) - 1", "torch.where(index == begin, answers_start - 1, index)", "the index of the token that predicts"),
    ("09", "paired_rows", "~is_answer, -1", "~is_answer & (index == begin), -1", "-1 at the prompts'"),
    ("09", "paired_rows", "own.tril()", "torch.ones_like(own).tril()", "another answer to the same prompt"),
    ("09", "paired_rows", " | (prompt[:, :, None] == part[:, None])", "", "the whole of its own prompt"),
    ("09", "paired_rows", "index - begin + is_answer * (answers_start - prompt_start)", "index", "positions start again"),
    ("09", "paired_rows", "torch.where(index == begin, answers_start, index) - 1", "index - 1", "what stands beside it"),
    ("10", "train_step", "logps.detach()", "logps", "the gradient is 0"),
    ("10", "train_step", "cfg.joint_norm)", "True)", "over both together"),
    ("10", "train_step", "base[batch], rep[batch], beh[batch]", "base[batch], 0 * rep[batch], beh[batch]", "R_rep is missing"),
    ("10", "train_step", "base[batch], rep[batch], beh[batch]", "base[batch], rep[batch], 0 * beh[batch]", "R_beh is missing"),
    ("10", "train_step", "token_weights(completion_mask, truncated)", "token_weights(completion_mask, truncated & False)", "a cut answer must not"),
    ("10", "train_step", "token_w[batch], cfg", "token_weights(mask, truncated[batch]), cfg", "those of each micro-batch"),
    ("10", "train_step", "part.backward()", "(-part).backward()", "the other sign"),
    ("10", "train_step", "    optimizer.zero_grad()\n", "", "zero_grad"),
    ("10", "train_step", "clip_grad_norm_(parameters, cfg.max_grad_norm)", "clip_grad_norm_(parameters, 1e9)", "clips the gradient"),
    ("10", "train_step", "if finite:", "if True:", "no update where the loss"),
    ("10", "train_step", "optimizer.step()", "pass", "yours has 0"),
    ("10", "train_step", "(acc[:, TEXT] == 1)", "(acc[:, 0] == 1)", "correct written answers"),
    ("10", "train_step", "(acc[:, TEXT] == 1)", "(base[:, TEXT] > 0)", "correct written answers"),
    ("10", "train_step", "truncated[:, TEXT], generator", "truncated[:, TEXT]", "drawn with the generator"),
    ("10", "train_step", "cfg.group_size // len(MODALITIES)", "cfg.group_size", "answered G/2 times"),
    ("10", "train_step", "cfg.temperature, generator)", "1.0, generator)", "the roll-out takes"),
    ("10", "train_step", "ids, mask, cfg.temperature)", "ids, mask, 1.0)", "of the temperature"),
    ("10", "train_step", "base_reward(acc, fmt, cfg.lam)", "base_reward(acc, fmt)", "base of the first question's"),
    ("10", "train_step", "base_reward(acc, fmt, cfg.lam)", "1 * acc", "R_fmt is missing"),
    ("10", "train_step", "cfg.alpha, cfg.beta)", "cfg.beta, cfg.alpha)", "the other way round"),
    ("10", "train_step", "cfg.alpha, cfg.beta)", ")", "reward of the first question's"),
    ("10", "train_step", "y_star, layer_w)", "y_star)", "rep of the first question's"),
    ("10", "train_step", "references[batch])", "references[: len(batch)])", "mean of rep over all questions"),
    ("10", "train_step", "reference_features(sentences[:, TEXT], references)", "reference_features(sentences[:, TEXT], references).roll(1, 0)", "beh of the first question's"),
    ("10", "train_step", "modality_advantages(rewards[batch], cfg.joint_norm)", "modality_advantages(rewards[batch])", "one mean over both modalities"),
    ("10", "train_step", "modality_advantages(rewards[batch], cfg.joint_norm)", "modality_advantages(base[batch], cfg.joint_norm)", "whole reward"),
    ("10", "train_step", "modality_advantages(rewards[batch], cfg.joint_norm)", "modality_advantages(rewards[batch], cfg.joint_norm) / rewards[batch].std(-1, keepdim=True)", "standard deviation"),
    ("10", "train_step", "modality_advantages(rewards[batch], cfg.joint_norm)", "modality_advantages(rewards[batch] * ~truncated[batch], cfg.joint_norm)", "advantage of the first question's"),
    ("10", "train_step", "cfg.eps_low, cfg.eps_high)", "0.2, 0.28)", "eps_low and eps_high are settings"),
    ("10", "train_step", "math.isfinite(loss) and math.isfinite(grad_norm)", "math.isfinite(loss)", "gradient's norm is not finite"),
    ("10", "train_step", "        optimizer.step()\n    optimizer.zero_grad()\n", "        optimizer.step()\n        optimizer.zero_grad()\n", "the update is left out"),
    ("10", "train_step", "loss += part.item()", "loss = part.item()", "the sum over the micro-batches"),
    ("10", "train_step", "first_group(questions[0]", "first_group(questions[-1]", "the first question's group"),
    ("10", "train_step", "return metrics, group", "return metrics", "returns two things"),
    ("11", "sft_loss", "-(logps", "(logps", "minus the log-likelihood"),
    ("11", "sft_loss", "-(logps * mask).sum() / mask.sum()", "-logps.mean()", "padding is counted"),
    ("11", "sft_loss", "/ mask.sum()", "/ len(mask)", "by that of answers"),
    ("11", "offline_answers", "None if None in pair else pair for pair in found", "pair for pair in found", "is None"),
    ("11", "offline_answers", "range(100 // 4)", "range(1)", "both questions have"),
    ("11", "offline_answers", "range(100 // 4)", "range(1000)", "stop after 100"),
    ("11", "offline_answers", "cfg.temperature", "1.0", "max_new_tokens and temperature"),
    ("11", "offline_answers", "cfg.temperature, generator)", "cfg.temperature)", "with the generator"),
    ("11", "offline_answers", "((1, 1), (0, 0))", "((0, 1), (0, 0))", "chosen is a correct answer to the written"),
    ("11", "offline_answers", "((1, 1), (0, 0))", "((1, 1), (1, 0))", "rejected is a wrong answer to the spoken"),
    ("11", "offline_loss", "lm.spoken_turns(questions)", "[lm.embed_text(written_question(q)) for q in questions]", "yours under the written one"),
    ("11", "offline_loss", "logps[:, 0, 0], mask[:, 0, 0]", "logps, mask", "the rejected ones too"),
    ("12", "dpo_loss", "chosen - base_chosen - rejected + base_rejected", "rejected - base_rejected - chosen + base_chosen", "yours is the rejected one"),
    ("12", "dpo_loss", "chosen - base_chosen - rejected + base_rejected", "chosen - rejected", "relative to the base model"),
    ("12", "offline_loss", ", without_lora(lm):", ":", "log 2"),
    ("12", "offline_loss", "x.sum(-1)", "(x.sum(-1) / mask.sum(-1))", "yours is their mean"),
    ("12", "offline_loss", "for k in (0, 1)), beta)", "for k in (0, 1)))", "beta is an argument"),
    ("12", "offline_loss", "lm.spoken_turns(questions)", "[lm.embed_text(written_question(q)) for q in questions]", "yours under the written one"),
]


@pytest.mark.parametrize("number, name, right, wrong, sentence", [
    pytest.param(*mistake, id=f"{mistake[1]}: {mistake[-1]}", marks=[slow] if mistake[0] == "10" else []) for mistake in MISTAKES])
def test_sheet_common_mistakes_get_their_sentence(number, name, right, wrong, sentence, questions, monkeypatch):
    module = tars if name.split(".")[0] in vars(tars) else sys.modules[__name__]
    owner, name = (LoRALinear, "forward") if "." in name else (module, name)
    source = textwrap.dedent(inspect.getsource(getattr(owner, name)))
    assert right in source
    exec(source.replace(right, wrong), vars(module), scope := {})
    monkeypatch.setattr(owner, name, scope[name])
    grader = next(test for title, test in globals().items() if title.startswith(f"test_exercise_{number}"))
    given = {"questions": questions, "monkeypatch": monkeypatch}
    with pytest.raises(pytest.fail.Exception, match=re.escape(sentence)):
        grader(**{parameter: given[parameter] for parameter in inspect.signature(grader).parameters})


def test_sheet_is_the_project_without_the_method(tmp_path):
    run(HERE / "test_tars.py", "exercises", tmp_path / "sheet")
    for name in ("tars.py", "test_tars.py"):
        whole, sheet = ((folder / name).read_text() for folder in (HERE, tmp_path / "sheet"))
        left_out, added = set(), []
        for line in difflib.ndiff(whole.splitlines(), sheet.splitlines()):
            if line.startswith("+ "):
                added.append(line[2:].strip())
            assert not (line.startswith("- ") and line[2:].lstrip().startswith("#"))  # comments stay
        assert sorted(added) == sorted(f'raise NotImplementedError("{HOLES[hole]}")' for hole in HOLES if re.search(rf"^ *def {hole.split('.')[-1]}\(", whole, re.M)
                                       and (hole in vars(tars) or "." in hole) == (name == "tars.py"))
        both = [{n.name: ast.get_docstring(n) for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef)} for text in (whole, sheet)]
        assert both[0] == both[1]
    assert f"{tmp_path / 'sheet'} exists: give a new folder" in run(HERE / "test_tars.py", "exercises", tmp_path / "sheet", fails=True)
    graded = subprocess.run([sys.executable, "-m", "pytest", "-v", "-k", "exercise", "-p", "no:cacheprovider"], cwd=tmp_path / "sheet", capture_output=True, text=True).stdout
    assert len(re.findall(r"^test_tars.py::test_exercise_\d\d\S* FAILED", graded, re.M)) == 12 and "12 failed" in graded
    assert graded.count("still to be written: ") >= 12 and "Traceback" not in graded


def exercises(arguments):
    """python test_tars.py exercises DIR"""
    if len(arguments) != 2 or arguments[0] != "exercises":
        raise SystemExit("python test_tars.py exercises DIR")
    write_sheet(Path(arguments[1]))


if __name__ == "__main__":
    exercises(sys.argv[1:])
