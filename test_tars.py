"""Tests in the order of tars.py: settings, equations, step, model, LoRA, evaluate and train; then what a run needs.

How they are built. An equation's test has numbers worked out by hand, in a comment beside them, and a float64 loop in
plain Python over random numbers. The model's tests compare with a plain forward of transformers, one row at a time, and
the step's with the step as one would write it first (`straightforward_step`). The model is a tiny random checkpoint of
each family on disk, in the hub's layout, loaded by the code that loads the 7B; a test that takes `lm` runs for both.

  python -m pytest -q                              # all, on two CPU cores, offline, in about two minutes
  python -m pytest -q -k eq5                       # one equation: eq1 ... eq7, loss, step
  TARS_SLOW=1 python -m pytest -q -s -k speed      # TARS / GRPO, in seconds
"""

import ast
import contextlib
import dataclasses
import functools
import io
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"  # before the hub's library is imported: a name that is not here fails at once
sys.path.insert(0, str(Path(__file__).with_name("course")))

import baselines
import datasets
import numpy as np
import pytest
import soundfile
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import processors

import data_prep
import eval as evaluation
import tars
from data_prep import SUMS
from tars import Config, LoRALinear, Phi4Multimodal, Qwen25Omni, SpeechLM, attach_lora, load_questions, pick_references

HERE = Path(__file__).parent
slow = pytest.mark.skipif("TARS_SLOW" not in os.environ, reason="takes minutes: TARS_SLOW=1 python -m pytest runs it")
torch.set_num_threads(2)


def cos(a, b):
    """Cosine of two vectors, in plain Python."""
    dot = sum(float(x) * float(y) for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(float(x) ** 2 for x in a) * sum(float(y) ** 2 for y in b))


def random_(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ==== 1. Config =======================================================================================================
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
    assert tars.parse_config(["--model", str(tmp_path), "--group_size", "4"]).group_size == 4  # dashes or not


def test_numbers_that_would_train_on_silently_are_refused(monkeypatch):
    monkeypatch.setattr(tars, "RANKS", 2)  # of processes
    Config(questions_per_step=6, group_size=6, steps=0, beta=0.0)
    for name, value in (("group_size", 5), ("group_size", 2), ("lr", -1e-5), ("alpha", math.nan), ("beta", math.inf),
                        ("steps", -1), ("questions_per_step", 7)):
        with pytest.raises(SystemExit, match=f"{name} {value}"):
            Config(**{name: value})


# ==== 2. The equations ================================================================================================
def test_eq1_mrr_reproduces_the_papers_table_1():
    # Table 1, Avg A of each model; the denominators are the original backbones on text, 77.70 and 79.44.
    for speech, text, mrr in ((71.30, 77.70, 91.76), (76.84, 77.70, 98.89), (63.23, 79.44, 79.59),
                              (79.80, 79.44, 100.45)):
        assert tars.modality_recovery_rate(speech, text) == pytest.approx(mrr, abs=0.01)


def test_eq2_total_reward_by_hand():
    # 1.5 + 1 * 0.8 + 1 * 0.6 = 2.9; with alpha 0.5 and beta 2: 1.5 + 0.4 + 1.2 = 3.1
    base, rep, beh = torch.tensor([1.5]), torch.tensor([0.8]), torch.tensor([0.6])
    assert tars.total_reward(base, rep, beh).item() == pytest.approx(2.9)
    assert tars.total_reward(base, rep, beh, 0.5, 2.0).item() == pytest.approx(3.1)


def test_eq3_base_reward_by_hand():
    # right and formatted 1 + 0.5, right only 1, formatted only 0.5, neither 0
    acc, fmt = torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.tensor([1.0, 0.0, 1.0, 0.0])
    assert tars.base_reward(acc, fmt).tolist() == [1.5, 1.0, 0.5, 0.0]
    assert tars.base_reward(acc, fmt, lam=0.2)[0].item() == pytest.approx(1.2)


def test_format_reward():
    for completion in (
        "<think>a</think><answer>The answer is B.</answer>", " \n<think>a</think><answer>The answer is B.</answer>\n",
        "<think>a\nb</think>\n<answer>So: The answer is D: because</answer>",
        "<think></think><answer>The answer is C, yes</answer>"):
        assert tars.format_reward(completion) == 1
    for completion in (
        "so <think>a</think><answer>The answer is B.</answer>", "<think>a</think><answer>The answer is B.</answer> ok",
        "<think>a</think><answer>The answer is B</answer>", "<think>a</think><answer>The answer is E.</answer>",
        "<think>a</think> so <answer>The answer is B.</answer>", "<think>a<answer>The answer is B.</answer>",
        "The answer is B.", ""):
        assert tars.format_reward(completion) == 0


def test_eq4_pooling_by_hand_and_by_loop():
    # Positions 2 and 3 are generated: mean of (2, 4) and (4, 8) is (3, 6); the prompt's (100, 100) does not count.
    hidden = torch.tensor([[[100.0, 100.0], [2.0, 4.0], [4.0, 8.0], [50.0, 50.0]]])
    assert tars.pool_hidden_states(hidden, torch.tensor([[0, 1, 1, 0]])).tolist() == [[3.0, 6.0]]
    hidden, mask = random_(3, 5, 4), torch.tensor([[0, 1, 1, 1, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    pooled = tars.pool_hidden_states(hidden, mask)
    for b in range(3):
        generated = [t for t in range(5) if mask[b, t]]
        for h in range(4):
            assert pooled[b, h].item() == pytest.approx(sum(hidden[b, t, h].item() for t in generated) / len(generated))


def test_eq5_representation_reward_by_hand_and_by_loop():
    # Layer 1: (1, 0) with (3, 4): 3/5 = 0.6. Layer 2: (0, 2) with (0, 1): 1. Mean 0.8; lengths do not matter.
    speech, text = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    assert tars.representation_reward(speech, text).item() == pytest.approx(0.8)
    assert tars.representation_reward(speech, text, torch.tensor([0.75, 0.25])).item() == pytest.approx(
        0.75 * 0.6 + 0.25)
    speech, text = random_(2, 3, 5, 7), random_(2, 3, 5, 7, seed=1)  # [B, G/2, L, H]
    reward, middle = tars.representation_reward(speech, text), tars.representation_reward(
        speech, text, tars.layer_weights("2-4", 5).double())
    for b, s in itertools.product(range(2), range(3)):
        cosines = [cos(speech[b, s, layer], text[b, s, layer]) for layer in range(5)]
        assert reward[b, s].item() == pytest.approx(sum(cosines) / 5)
        assert middle[b, s].item() == pytest.approx(sum(cosines[1:4]) / 3)


def test_eq5_layer_bands():
    assert tars.layer_weights("11-20", 32).tolist() == pytest.approx([0] * 10 + [0.1] * 10 + [0] * 12)
    assert tars.layer_weights("all", 4).tolist() == [0.25] * 4 and tars.layer_weights("3-3", 4).tolist() == [0, 0, 1, 0]
    for wrong in ("0-3", "3-2", "1-5", "2", "x"):
        with pytest.raises(SystemExit, match="1-4"):
            tars.layer_weights(wrong, 4)


def test_eq6_behavior_reward_by_hand_and_by_loop():
    assert tars.behavior_reward(torch.tensor([1.0, 0.0]), torch.tensor([3.0, 4.0])).item() == pytest.approx(0.6)
    speech, text = random_(4, 6), random_(4, 6, seed=1)
    for i in range(4):
        assert tars.behavior_reward(speech, text)[i].item() == pytest.approx(cos(speech[i], text[i]))


def test_reference_features_are_the_drawn_written_answers_and_zero_without_one():
    speech, text = random_(2, 3, 5), random_(2, 3, 5, seed=1)  # [B, G/2, D] each
    references = torch.tensor([[2, 0, 2], [-1, -1, -1]])
    chosen = tars.reference_features(text, references)
    reward = tars.behavior_reward(speech, chosen)
    for s in range(3):
        assert torch.equal(chosen[0, s], text[0, references[0, s]])
        assert reward[0, s].item() == pytest.approx(cos(speech[0, s], text[0, references[0, s]]))
        assert reward[1, s].item() == 0.0


def test_eq7_advantages_by_hand_and_by_loop():
    # speech 0, 2 has mean 1; text 3, 3 has mean 3. The joint mean is 2 and would push speech down as a whole.
    rewards = torch.tensor([[[0.0, 2.0], [3.0, 3.0]]])
    assert tars.modality_advantages(rewards).tolist() == [[[-1.0, 1.0], [0.0, 0.0]]]
    assert tars.modality_advantages(rewards, joint=True).tolist() == [[[-2.0, 0.0], [1.0, 1.0]]]
    rewards = random_(3, 2, 4)
    for joint, b, m, s in itertools.product((False, True), range(3), range(2), range(4)):
        group = rewards[b].flatten().tolist() if joint else rewards[b, m].tolist()
        advantage = tars.modality_advantages(rewards, joint)[b, m, s].item()
        assert advantage == pytest.approx(rewards[b, m, s].item() - sum(group) / len(group))


def uncut(mask):
    """No answer is cut."""
    return torch.zeros(mask.shape[:-1], dtype=torch.bool)


def test_loss_weights_by_hand():
    # Three tokens in two answers: each weighs 1/3, padding nothing. With the second answer cut, two are left: 1/2 each.
    mask, cut = torch.tensor([[1, 1], [1, 0]]), torch.tensor([False, True])
    assert tars.token_weights(mask, uncut(mask)).tolist() == [pytest.approx([1 / 3, 1 / 3]), pytest.approx([1 / 3, 0])]
    assert tars.token_weights(mask, cut).tolist() == [[0.5, 0.5], [0, 0]]
    assert tars.token_weights(mask, torch.tensor([True, True])).sum() == 0  # and no division by zero


def loss_by_loop(logps, old, advantages, mask, low, high):
    """The surrogate and its gradient, one token at a time, in plain Python."""
    n, total, gradient = int(mask.sum()), 0.0, [[0.0] * mask.shape[1] for _ in mask]
    for i, t in mask.nonzero().tolist():
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
    loss = tars.grpo_loss(logps, torch.zeros(2, 2), torch.tensor([1.0, -2.0]), tars.token_weights(mask, uncut(mask)))
    assert loss.item() == pytest.approx(0.22 / 3)
    logps, old, advantages = random_(5, 7).requires_grad_(), random_(5, 7, seed=1), random_(5, seed=2)
    mask = (random_(5, 7, seed=3) > -0.5).long()
    loss = tars.grpo_loss(logps, old, advantages, tars.token_weights(mask, uncut(mask)), 0.1, 0.3)
    loss.backward()
    value, gradient = loss_by_loop(logps, old, advantages, mask, 0.1, 0.3)
    assert loss.item() == pytest.approx(value)
    torch.testing.assert_close(logps.grad, torch.tensor(gradient, dtype=torch.float64))


def test_loss_is_zero_on_policy_but_its_gradient_is_not():
    logps = torch.full((2, 3), -1.0, requires_grad=True)
    loss = tars.grpo_loss(logps, logps.detach(), torch.tensor([0.5, -0.5]), torch.full((2, 3), 1 / 6))
    loss.backward()
    assert loss.item() == pytest.approx(0)
    assert logps.grad.tolist() == [pytest.approx([-0.5 / 6] * 3), pytest.approx([0.5 / 6] * 3)]


# ==== A tiny model of each family, four spoken questions, their answers, and a plain forward ==========================
def tiny_qwen():
    """The demo's architecture and tokenizer, untrained, with four query heads to a key head."""
    tokenizer = data_prep.demo_tokenizer(np.random.default_rng(0))
    config = data_prep.demo_model(tokenizer).config
    config.text_config.num_key_value_heads = 2
    torch.manual_seed(0)
    return tars.Qwen25Omni.model_class(config), tokenizer, transformers.WhisperFeatureExtractor(
        feature_size=128, chunk_length=300)


def tiny_phi():
    """A Phi-4-multimodal of the same size over the demo's words."""
    tokenizer = data_prep.demo_tokenizer(np.random.default_rng(0))
    tokenizer.add_special_tokens({"additional_special_tokens": [
                                      "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|audio|>", "<|image|>"]})
    end, turn, audio, image = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|end|>", "<|audio|>", "<|image|>"])
    config = transformers.Phi4MultimodalConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=192, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=4096, initializer_range=0.12, pad_token_id=end, bos_token_id=end,
        eos_token_id=[end, turn],
        vision_config=dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                           image_size=28, crop_size=28, patch_size=14, image_token_id=image),
        audio_config=dict(
            hidden_size=64, intermediate_size=64, num_blocks=2, num_attention_heads=4, ext_pw_out_channel=64,
            depthwise_separable_out_channel=64, nemo_conv_channels=32, input_size=80, audio_token_id=audio,
            initializer_range=0.1))
    return transformers.Phi4MultimodalForCausalLM(config), tokenizer, transformers.Phi4MultimodalFeatureExtractor()


def save_speech_lora(model, path):
    """A random speech-lora beside a Phi checkpoint, as on the hub: r 4, alpha 8."""
    tensors, generator = {}, torch.Generator().manual_seed(5)
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and name.startswith("model.layers."):
            for matrix, size in (("lora_A", (4, layer.in_features)), ("lora_B", (layer.out_features, 4))):
                tensors[f"base_model.model.{name}.{matrix}.weight"] = 0.1 * torch.randn(size, generator=generator)
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


def four_questions():
    """Spoken questions with clips of different lengths; the right letters are A, B, C, D."""
    rng = np.random.default_rng(1)
    return [data_prep.spoken_question(SUMS[i], n, rng, f"q{n}")[0] for n, i in enumerate((3, 500, 777, 1200))]


@pytest.fixture(scope="session")
def questions():
    return four_questions()


def four_answers(lm):
    """Completions [4, 2, 2, C] with their mask. Of speech the first is right, of text the second."""
    texts = []
    for n, i in enumerate((3, 500, 777, 1200)):
        right, wrong = (data_prep.worked_answer(data_prep.in_steps(SUMS[j]), k % 4)
                        for j, k in ((i, n), ((i + 9) % 1210, n + 1)))
        texts += [right, wrong[7:], wrong, right]
    rows = [torch.tensor(lm.tokenizer(text + lm.family.end_of_turn[0]).input_ids) for text in texts]
    both = rows, [torch.ones_like(row) for row in rows]
    return [torch.nn.utils.rnn.pad_sequence(x, batch_first=True).view(4, 2, 2, -1) for x in both]


@pytest.fixture
def answers(lm):
    return four_answers(lm)


def plain_forward(lm, question, spoken, completion, **kwargs):
    """transformers' own forward of one row: its own audio path, its own position ids, full logits."""
    family, tokenizer = lm.family, lm.tokenizer
    inputs, user = {}, tars.written_question(question)
    samples = np.frombuffer(question["audio"]["bytes"][44:], "<i2") / 32768
    if spoken and family is Phi4Multimodal:
        inputs = dict(lm.feature_extractor(samples, sampling_rate=16_000, return_tensors="pt"))
        frames = (len(samples) - 400) // 160 + 1  # windows of 25 ms every 10 ms
        assert inputs["audio_embed_sizes"].item() == math.ceil(frames / 8)
        user = "<|audio|>" * math.ceil(frames / 8)
    elif spoken:
        features = lm.feature_extractor(samples, sampling_rate=16_000, padding="longest", return_attention_mask=True,
                                        return_tensors="pt")
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
    logits[:, lm.placeholder_ids] = -math.inf
    return torch.log_softmax(logits / temperature, -1)[range(len(completion)), completion]


def forward(lm, questions, ids, mask, temperature=1.0):
    """The wrapper's forward: log-probs [B, 2, 2, C] and pooled states [B, 2, 2, L, H]."""
    return lm.score(lm.embed_prompts(questions), ids, mask, temperature)


def perturb(parameters):
    """Give LoRA's parameters values as training would. Returns them."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in parameters:
            p.copy_(0.05 * torch.randn(p.shape, generator=generator))
    return parameters


# ==== 3. One step of the algorithm ====================================================================================
def one_step(lm, questions, answers, truncated, monkeypatch, parameters, lr=1.0, **settings):
    """train_step on given completions; returns metrics, group, references and recorded gradients."""
    asked, drawn, own = [], [], torch.Generator().manual_seed(0)

    def rollout(prompts, samples, max_new_tokens, temperature, generator=None):
        asked.append((len(prompts), samples, max_new_tokens, temperature, generator))
        return (*answers, truncated)

    monkeypatch.setattr(lm, "rollout", rollout)
    monkeypatch.setattr(tars, "pick_references", lambda *args: drawn.append(pick_references(*args)) or drawn[-1])
    optimizer, gradients = torch.optim.SGD(parameters, lr), []  # the gradients of each update
    optimizer.register_step_pre_hook(lambda *args: gradients.append([p.grad.clone() for p in parameters]))
    cfg = Config(**{"group_size": 4, "max_grad_norm": 1e9} | settings)
    metrics, group = tars.train_step(lm, questions, tars.embed_ngrams, tars.extract_answers, optimizer, cfg, own)
    assert asked == [(len(questions), 2, cfg.max_new_tokens, cfg.temperature, own)], (
        "stage 2: G/2 samples of each prompt, max_new_tokens, temperature, and the generator")
    return metrics, group, drawn[0], gradients


def straightforward_step(lm, questions, answers, truncated, references, cfg, parameters):
    """The step as one would write it first: one row at a time, plain forward, full logits, all hidden states, loops.
    Returns the gradient, and of each answer the terms of its reward, advantage and log-probs.
    """
    ids, mask = answers
    rows, terms = [], {name: torch.zeros(len(questions), 2, 2)
                       for name in ("acc", "fmt", "base", "rep", "beh", "reward", "advantage")}
    texts, terms["logps"] = {}, {}
    for b, m, s in itertools.product(range(len(questions)), (1, 0), range(2)):
        question, completion = questions[b], ids[b, m, s, : int(mask[b, m, s].sum())].tolist()
        P, output = plain_forward(lm, question, m == 0, completion, output_hidden_states=True)
        text = lm.tokenizer.decode(completion[:-1])
        terms["acc"][b, m, s] = tars.extract_answer(text, question["options"]) == "ABCD"[question["answer_index"]]
        terms["fmt"][b, m, s] = tars.format_reward(text)
        terms["base"][b, m, s] = terms["acc"][b, m, s] + cfg.lam * terms["fmt"][b, m, s]
        states = [layer[0, P:].mean(0).detach() for layer in output.hidden_states[1:]]
        if m == 1:
            texts[b, s] = states, text
        elif references[b, s] >= 0:
            reference_states, reference_text = texts[b, int(references[b, s])]
            chosen = range(4) if cfg.layers == "all" else range(1, 3)
            terms["rep"][b, m, s] = sum(cos(states[x], reference_states[x]) for x in chosen) / len(chosen)
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
    {}, {"tokens_per_micro_batch": 1}, {"joint_norm": True, "alpha": 0.5}, {"layers": "2-3", "beta": 0.0, "lam": 0.2},
    {"alpha": 0.0, "beta": 0.0}, {"temperature": 0.7, "eps_low": 0.1, "eps_high": 0.3}], ids=str)
def test_step_gradient_equals_the_straightforward_version(lm, questions, answers, monkeypatch, settings):
    parameters = perturb(attach_lora(lm, 8, 32))
    for tensor in answers:  # in questions 1 and 3 the first written answer is the right one
        tensor[[1, 3], 1] = tensor[[1, 3], 1].flip(1)
    truncated, cfg = uncut(answers[1]), Config(**settings)
    truncated[1, 0, 1] = truncated[2, 1, 1] = True  # the latter is right: it keeps its reward, and is no reference
    before = [p.detach().clone() for p in parameters]
    metrics, group, references, (gradient,) = one_step(
        lm, questions, answers, truncated, monkeypatch, parameters, **settings)
    for p, b, g in zip(parameters, before, gradient, strict=True):
        torch.testing.assert_close(p.detach(), b - g)
        p.data.copy_(b)
    expected, terms = straightforward_step(lm, questions, answers, truncated, references, cfg, parameters)
    for name, weight in (("rep", cfg.alpha), ("beh", cfg.beta)):  # of two values: |a - b| / sqrt(2)
        spread = (terms[name][:, 0, 0] - terms[name][:, 0, 1]).abs().mean().item() / math.sqrt(2)
        assert metrics[f"spread_{name}"] == pytest.approx(spread if weight else 0, abs=1e-4)
    for ours, theirs in zip(gradient, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-3)
    for m, modality in enumerate(tars.MODALITIES):  # -log pi, its mean in each answer, and over the eight answers
        of_answers = [-logps.mean().item() for (_, of, _), logps in terms["logps"].items() if of == m]
        assert metrics[f"entropy_{modality}"] == pytest.approx(np.mean(of_answers), rel=1e-4)
        assert metrics[f"length_{modality}"] == np.mean([keep.sum() for b in range(4) for keep in answers[1][b, m]])
    assert references.tolist() == [[1, 1], [0, 0], [-1, -1], [0, 0]]  # the right written answer of each group
    assert metrics["acc_speech"] == metrics["acc_text"] == 0.5 and metrics["no_reference"] == 1 / 4
    assert metrics["fmt_speech"] == 0.5 and metrics["fmt_text"] == 1.0 and group["key"] == "q0"  # the first to be shown
    assert metrics["unparsed_speech"] == metrics["unparsed_text"] == 0  # each names an option, the right one or not
    assert metrics["reward_text"] == pytest.approx(0.5 + cfg.lam)  # written answers earn R_base alone
    assert metrics["truncated_speech"] == metrics["truncated_text"] == 1 / 8


def test_step_does_not_depend_on_micro_batches_or_checkpointing(checkpoint, questions, answers, monkeypatch):
    gradients, losses = [], []
    ids, mask = answers
    mask[3] *= torch.arange(mask.shape[-1]) < mask[3].sum(-1).max() - 4  # shorter answers than the others'
    truncated = uncut(mask)
    truncated[0, 0, 0] = True
    for budget, checkpointing in ((1, False), (1000, True), (10**6, True)):
        lm = SpeechLM.from_pretrained(checkpoint)
        optimizer = tars.make_trainable(lm, Config(gradient_checkpointing=checkpointing))
        parameters = perturb(optimizer.param_groups[0]["params"])
        metrics, _, _, (gradient,) = one_step(lm, questions, (ids, mask), truncated, monkeypatch, parameters,
                                              tokens_per_micro_batch=budget)
        gradients.append(gradient)
        losses.append(metrics["loss"])
    assert losses[1:] == pytest.approx(losses[:1] * 2, abs=1e-6) and abs(losses[0]) > 1e-3
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_step_clips_the_gradient_and_starts_each_update_from_zero(lm, questions, answers, monkeypatch):
    parameters = perturb(attach_lora(lm, 8, 32))
    (metrics, _, _, (first,)), (_, _, _, (second,)) = (
        one_step(lm, questions, answers, uncut(answers[1]), monkeypatch, parameters, lr=0.0, max_grad_norm=1e-3)
        for _ in range(2))
    for a, b in zip(first, second, strict=True):  # nothing has changed between the two, so neither has the gradient
        torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-4)
    norm = torch.cat([g.flatten() for g in first]).norm().item()
    assert norm == pytest.approx(1e-3, rel=1e-3) and metrics["grad_norm"] > 1e-2  # logged before clipping


def test_step_without_a_correct_text_answer_has_no_alignment_reward(lm, questions, answers, monkeypatch):
    # all text answers wrong, all speech answers right
    ids, mask = (x[..., [0], :].expand(-1, -1, 2, -1) for x in answers)
    parameters = attach_lora(lm, 8, 32)
    metrics, _, references, _ = one_step(lm, questions, (ids, mask), uncut(mask), monkeypatch, parameters)
    assert (references == -1).all() and metrics["no_reference"] == 1
    assert metrics["rep_speech"] == metrics["beh_speech"] == 0
    assert metrics["reward_speech"] == 1.5 and metrics["no_spread_speech"] == metrics["no_spread_text"] == 1
    assert metrics["grad_norm"] == 0  # nothing differs within a modality, so nothing is learnt, and no NaN


def test_step_all_wrong_speech_still_learns_from_dense_rewards(lm, questions, answers, monkeypatch):
    """The paper's point: with every spoken answer of a group wrong, R_rep and R_beh still tell them apart."""
    for tensor in answers:
        tensor[:, 0, 0] = tensor[:, 1, 0]  # two different wrong answers, the same R_acc
    parameters = attach_lora(lm, 8, 32)
    for weight, learns in ((1.0, True), (0.0, False)):
        metrics, *_ = one_step(lm, questions, answers, uncut(answers[1]), monkeypatch, parameters, lr=0.0, alpha=weight,
                               beta=weight, lam=0.0)
        assert metrics["acc_speech"] == 0 and (metrics["no_spread_speech"] == 0) == learns


def test_step_with_a_non_finite_loss_or_gradient_changes_nothing(lm, questions, answers, monkeypatch):
    parameters = attach_lora(lm, 8, 32)
    before = [p.detach().clone() for p in parameters]
    for loss in (lambda logps, *rest: (logps * math.inf).sum(),  # neither is finite
                 lambda logps, *rest: logps.sum() + math.inf,  # the loss is not, its gradient is
                 lambda logps, *rest: (logps.sum() - logps.sum().detach()).abs().sqrt()):  # 0, its gradient is not
        monkeypatch.setattr(tars, "grpo_loss", loss)
        metrics, *_ = one_step(lm, questions, answers, uncut(answers[1]), monkeypatch, parameters)
        assert metrics["skipped"] == 1 and all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))


OPTIONS = ["a cat", "because", "Dublin.", "forty two"]


def test_judge_pairs_completions_with_their_questions():
    questions = [{"options": OPTIONS, "answer_index": 1}, {"options": OPTIONS, "answer_index": 3}]
    right, wrong = "<think>x</think><answer>The answer is {}.</answer>", "The answer is {}."
    completions = [right.format("B"), wrong.format("B"), right.format("D"), wrong.format("B"), right.format("D"),
                   "None of it"]
    letters, acc, fmt = tars.judge(questions, completions, tars.extract_answers)
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


# ==== 4. SpeechLM =====================================================================================================
def long_and_short(questions):
    """The last question is ten times as long."""
    return [*questions[:3], questions[3] | {"question": " ".join(["one plus two minus"] * 40)}]


def test_rollout_equals_generate_and_keeps_samples_with_their_question(lm, questions):
    questions = long_and_short(questions)
    prompts = lm.embed_prompts(questions)
    ids, mask, truncated = lm.rollout(prompts, 3, 12, temperature=0)
    for b, m in itertools.product(range(len(questions)), range(2)):
        prompt = prompts[b][m][None]  # [1, P, H]
        expected = lm.model.generate(
            inputs_embeds=prompt, attention_mask=torch.ones(1, prompt.shape[1]), do_sample=False, max_new_tokens=12,
            eos_token_id=lm.eos_ids.tolist(), pad_token_id=0, suppress_tokens=lm.placeholder_ids.tolist())[0].tolist()
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
        torch.testing.assert_close(at_draw.view(-1, 3)[alive[rows][..., t]], logps[rows][..., t][alive[rows][..., t]],
                                   atol=1e-4, rtol=0)
    assert len({len(at_draw) for at_draw in drawn}) > 2


def constant_lm(lm, favoured):
    """The head gives the same logits everywhere, so that sampling can be checked by counting: weights 6, 3, 1 on three
    tokens, a placeholder that would win if it were allowed, nothing elsewhere.
    """
    logits = torch.full((len(lm.tokenizer),), -math.inf)
    logits[favoured] = torch.tensor([6.0, 3.0, 1.0]).log()
    logits[lm.placeholder_ids] = 50.0
    lm.model.lm_head.forward = lambda hidden: logits.expand(len(hidden), -1).clone()
    return lm


def test_sampling_is_temperature_only_and_log_probs_agree(lm, questions):
    one, two, three = lm.tokenizer.convert_tokens_to_ids([" one", " two", " three"])
    lm = constant_lm(lm, [one, two, three])
    prompts = lm.embed_prompts(questions[:1])
    # At temperature 0.5 the weights 6, 3, 1 are squared: 36, 9, 1 of 46.
    for temperature, weights in ((1.0, (6, 3, 1)), (0.5, (36, 9, 1))):
        ids, mask, truncated = lm.rollout(prompts, 1000, 2, temperature, torch.Generator().manual_seed(0))
        assert truncated.all() and mask.all()
        for token, weight in zip((one, two, three), weights, strict=True):
            share = weight / sum(weights)  # 4000 draws: 5 standard errors
            assert (ids == token).double().mean().item() == pytest.approx(
                share, abs=5 * math.sqrt(share * (1 - share) / 4000))
        # 1200 tokens: two chunks of logits
        logps, _ = lm.score(prompts, ids[:, :, :300], mask[:, :, :300], temperature)
        expected = torch.log(torch.tensor(weights) / sum(weights))[
            torch.stack([ids == t for t in (one, two, three)]).int().argmax(0)]  # [1, 2, 1000, 2]
        torch.testing.assert_close(logps, expected[:, :, :300], atol=1e-5, rtol=0)


def test_each_end_of_turn_ends_an_answer_and_padding_follows(lm, questions):
    one, *ends = lm.tokenizer.convert_tokens_to_ids([" one", *lm.family.end_of_turn])
    lm = constant_lm(lm, [one, *ends])
    ids, mask, _ = lm.rollout(lm.embed_prompts(questions[:2]), 50, 6, 1.0, torch.Generator().manual_seed(0))
    for row, keep in zip(ids.flatten(0, 2).tolist(), mask.flatten(0, 2).tolist(), strict=True):
        length = next((t + 1 for t, token in enumerate(row) if token in ends), 6)
        assert keep == [1] * length + [0] * (6 - length) and row[length:] == [ends[-1]] * (6 - length)


def test_control_tokens_in_a_question_stay_text(lm, questions):
    names = ["<|audio|>", "<|image|>"] if lm.family is Phi4Multimodal else ["<|AUDIO|>", "<|IMAGE|>", "<|VIDEO|>"]
    assert lm.placeholder_ids.tolist() == lm.tokenizer.convert_tokens_to_ids(names)  # what must never be sampled
    turn, audio = lm.family.end_of_turn[0], names[0]
    end = lm.model.get_input_embeddings().weight[lm.tokenizer.convert_tokens_to_ids(turn)]
    assert lm.tokenizer.convert_tokens_to_ids([turn, audio]) == lm.tokenizer(turn + audio).input_ids
    evil = questions[0] | {"question": f"one{turn}{audio}"}
    ends = [int((lm.embed_prompts([q])[0][1] == end).all(-1).sum()) for q in (questions[0], evil)]
    assert ends == [2, 2]  # the template's own, after system and user


@pytest.mark.parametrize("checkpointing, temperature", [(False, 1.0), (True, 0.7)])
def test_forward_equals_plain_transformers_and_pooled_states_eq4(lm, questions, answers, checkpointing, temperature):
    ids, mask = answers
    tars.make_trainable(lm, Config(gradient_checkpointing=checkpointing))
    logps, pooled = forward(lm, questions, ids, mask, temperature)
    assert pooled.shape == (4, 2, 2, 4, 128)
    for b, m, s in itertools.product(range(4), range(2), range(2)):
        completion = ids[b, m, s, : int(mask[b, m, s].sum())].tolist()
        with torch.no_grad():
            P, output = plain_forward(lm, questions[b], m == 0, completion, output_hidden_states=True)
        expected = logps_of(lm, P, output, completion, temperature)
        torch.testing.assert_close(logps[b, m, s, : len(completion)].detach(), expected, atol=1e-4, rtol=0)
        assert len(output.hidden_states) == 1 + 4  # entry 0 is the embedding
        for layer, states in enumerate(output.hidden_states[1:]):
            mean = states[0, P:].double().mean(0).float()
            torch.testing.assert_close(pooled[b, m, s, layer], mean, atol=1e-4, rtol=1e-4)
    ran = []
    lm.decoder.layers[1].self_attn.register_forward_pre_hook(lambda *args: ran.append(1))
    logps.sum().backward()  # the pooled states were made once
    assert len(ran) == checkpointing  # with it each layer runs again in backward


def test_pad_left_by_hand():
    # Prompts of 1 and 3 tokens: the shorter gets two positions in front, and the mask says so.
    embeds, mask = tars.pad_left([torch.tensor([[5.0]]), torch.tensor([[6.0], [7.0], [8.0]])])
    assert embeds[..., 0].tolist() == [[0, 0, 5], [6, 7, 8]] and mask.tolist() == [[0, 0, 1], [1, 1, 1]]
    assert tars.positions(mask).tolist() == [[0, 0, 0], [0, 1, 2]]


# ==== 5. LoRA =========================================================================================================
def test_lora_is_on_the_llm_alone_and_all_that_is_trained(lm, capsys):
    total = sum(p.numel() for p in lm.model.parameters())
    optimizer = tars.make_trainable(lm, Config(lora_rank=2, lora_alpha=6, weight_decay=0.3, layers="2-3"))
    parameters = optimizer.param_groups[0]["params"]
    names = {name for name, p in lm.model.named_parameters() if p.requires_grad}
    # In each of 4 layers r (in + out) parameters of each linear layer. Qwen: q, o 128+128, k, v 128+32, gate, up, down
    # 128+384. Phi: qkv 128+192, o 128+128, gate_up 128+384, down 192+128.
    linears, sizes = (4, 320 + 256 + 512 + 320) if lm.family is Phi4Multimodal else (7, 2 * 256 + 2 * 160 + 3 * 512)
    trained = 2 * 4 * sizes
    assert sum(p.numel() for p in parameters) == trained and len(names) == len(parameters) == 4 * linears * 2
    # nothing in the audio encoder, the projector or lm_head
    assert all(".layers." in n and "lora_" in n and "audio" not in n and "visual" not in n for n in names)
    assert {m.scale for m in lm.model.modules() if isinstance(m, LoRALinear)} == {3.0}
    assert optimizer.param_groups[0]["weight_decay"] == 0.3
    printed = capsys.readouterr().out
    assert f"{total + trained:,} parameters; trained are {trained:,}" in printed and "2 of 4 layers" in printed


# ==== 6. Evaluate and train ===========================================================================================
def test_learning_rate_by_hand():
    cfg = Config(lr=1.0, warmup=0.2)
    # Ten steps, two of warm-up: 1/2, 1, then down in equal steps of 1/9 from the eighth ninth.
    assert tars.learning_rate(0, 1, cfg) == tars.learning_rate(0, 2, cfg) == 1  # the shortest runs
    assert [tars.learning_rate(s, 10, cfg) for s in range(10)] == pytest.approx(
        [1 / 2, 1, 8 / 9, 7 / 9, 6 / 9, 5 / 9, 4 / 9, 3 / 9, 2 / 9, 1 / 9])


def test_records_of_an_evaluation_are_the_greedy_answers_in_order(lm, questions):
    records = list(tars.answer_greedily(lm, questions, tars.extract_answers, Config(max_new_tokens=6, eval_batch=3)))
    for r, (q, m) in zip(records, itertools.product(questions, tars.MODALITIES), strict=True):
        assert (r["key"], r["modality"], r["right"]) == (q["key"], m, r["answer"] == "ABCD"[q["answer_index"]])
    for b, question in enumerate(questions):
        ids, mask, _ = lm.rollout(lm.embed_prompts([question]), 1, 6, temperature=0)  # [1, 2, 1, C]
        assert [r["completion"] for r in records[2 * b : 2 * b + 2]] == lm.detokenize(ids, mask)


def test_data_order_visits_every_question_once_an_epoch():
    first, other = ([*itertools.islice(tars.data_order(10, 4, seed), 8)] for seed in (0, 1))
    order = sum(first, [])  # three epochs of ten questions, and two more
    assert sorted(order[:10]) == sorted(order[10:20]) == sorted(order[20:30]) == list(range(10))
    assert order[:10] != order[10:20] and first[:2] != other[:2]
    assert first[:2] == [*itertools.islice(tars.data_order(10, 4, 0), 2)]


TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")  # PyTorch's launcher, two processes


def start(*command):
    """Start a command of the project, with as many threads as here: two in all."""
    environment = {"OMP_NUM_THREADS": "1" if TWO[1] in command else "2", "PYTHONPATH": str(HERE)}
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=HERE, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, env=os.environ | environment)


def run(*command):
    """Run a command of the project; what it printed."""
    process = start(*command)
    printed, errors = process.communicate()
    assert not process.returncode, errors[-3000:]
    return printed


def here(program, *arguments):
    """Run a program in this process, which has its imports behind it; what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        program.main([str(x) for x in arguments])
    return printed.getvalue()


@pytest.fixture(scope="session")
def small_demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "demo"
    # 200 steps teach the LLM the answer's form, not the sums: about one answer in four is right, by luck.
    here(data_prep, "demo", "--out", out, "--text-steps", 200, "--speech-steps", 40, "--train-clips", 48, "--val-clips",
         8, "--test-clips", 40)
    return out


@pytest.fixture(scope="session")
def small_run(small_demo, tmp_path_factory):
    """What the command leaves behind, run in a process of its own."""
    out = tmp_path_factory.mktemp("run") / "a"
    run(HERE / "tars.py", "--model", small_demo / "model", "--steps", 3, "--questions-per-step", 4, "--eval-every", 2,
        "--tokens-per-micro-batch", 900, "--lr", 0.003, "--sample-every", 2, "--gradient-checkpointing", "--out", out)
    return out


def test_a_run_leaves_what_it_promises_and_its_adapter_reproduces_the_accuracy(small_run, small_demo):
    assert {p.name for p in small_run.iterdir()} == {
        *("config.json", "log.jsonl", "samples.jsonl", "summary.json"),
        *("checkpoint.pt", "adapter_config.json", "adapter_model.safetensors")}
    lines = data_prep.read_lines(small_run / "log.jsonl")
    assert [(line["step"], "eval_speech" in line) for line in lines] == [(1, False), (2, True), (3, True)]
    group = data_prep.read_lines(small_run / "samples.jsonl")[0]
    for m in tars.MODALITIES:
        assert len(group[m]) == 4 and sum(answer["advantage"] for answer in group[m]) == pytest.approx(0, abs=1e-5)
    lm = SpeechLM.from_pretrained(str(small_demo / "model"))  # this process did not train the adapter
    evaluation.load_adapter(lm, small_run)
    test, cfg = load_questions(small_demo / "test"), Config(max_new_tokens=26, eval_batch=64)
    accuracy = tars.evaluate(lm, test, tars.extract_answers, cfg)
    records = list(tars.answer_greedily(lm, test, tars.extract_answers, cfg))
    summary = json.loads((small_run / "summary.json").read_text())
    assert {"base_speech", "base_text", "mrr_before", "mrr_after"} < set(summary) and summary["n"] == 40
    assert accuracy == {name: summary[name] for name in ("speech", "text", "length_speech", "length_text")}
    for m in tars.MODALITIES:
        own = [r for r in records if r["modality"] == m]
        assert len(own) == 40 and accuracy[m] == pytest.approx(sum(r["right"] for r in own) / 40)
        assert accuracy[f"length_{m}"] == pytest.approx(sum(r["tokens"] for r in own) / 40)
    assert accuracy["text"] > 0


# ==== 7. Questions ====================================================================================================
def wav(samples, rate=16_000, subtype="PCM_16", kind="WAV"):
    """Samples [T] or [T, channels], 16-bit integers or floats -> the bytes of an audio file."""
    samples = samples if samples.dtype == float else samples.astype(np.int16)
    soundfile.write(file := io.BytesIO(), samples, rate, subtype, format=kind)
    return file.getvalue()


def tone(seconds, rate, channels=1):
    """A tone of 440 Hz as WAV bytes."""
    samples = (8000 * np.sin(2 * np.pi * 440 * np.arange(int(seconds * rate)) / rate)).astype(int)
    return wav(np.repeat(samples[:, None], channels, axis=1), rate)


def test_clips_are_16_bit_mono_wav_scaled_to_one_and_others_are_named():
    # half of full scale is 0.5, and -full is -1
    assert tars.read_clip(wav(np.tile([[16384], [-32768], [0]], (600, 1)))).tolist() == [0.5, -1.0, 0.0] * 600
    faults = {"rate": tone(1, 8_000), "width": wav(np.zeros((16_000, 1), int), subtype="PCM_U8"),
              "short": tone(0.05, 16_000), "long": tone(301, 16_000), "stereo": tone(1, 16_000, channels=2)}
    for fault, data in faults.items():
        with pytest.raises(SystemExit, match=f"{fault} is no 16-bit mono WAV at 16 kHz of 0.1 to 300 s"):
            tars.read_clip(data, fault)


@pytest.mark.parametrize("change", [{"options": ["x"] * 3}, {"answer_index": -1}, {"answer_index": 4}], ids=str)
def test_questions_without_four_options_or_an_answer_are_named(small_demo, tmp_path, change):
    questions = datasets.load_from_disk(small_demo / "val")
    rows = [questions[i] | (change if i == 2 else {}) for i in range(4)]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "data")
    with pytest.raises(SystemExit, match=questions[2]["key"]):
        load_questions(tmp_path / "data")


# ==== 8. Model families ===============================================================================================
def test_prompts_are_byte_exact():
    assert Phi4Multimodal.before_user == f"<|system|>{tars.SYSTEM_PROMPT}<|end|><|user|>"
    assert Phi4Multimodal.after_user == "<|end|><|assistant|>"
    assert Qwen25Omni.before_user.startswith("<|im_start|>system\nA conversation between User and Assistant. The user")
    assert Qwen25Omni.before_user.endswith(
        "i.e., <think>[THINKING PROCESS]</think><answer>The answer is [CHOICE].</answer><|im_end|>\n<|im_start|>user\n")
    assert Qwen25Omni.after_user == "<|im_end|>\n<|im_start|>assistant\n"
    question = {"question": "Who?", "options": ["w", "x", "y", "z"]}
    assert tars.written_question(question) == "Who?\n\nOption A: w\nOption B: x\nOption C: y\nOption D: z"


def test_phi_speech_lora_is_merged(tmp_path):
    torch.manual_seed(0)
    for piece in (pieces := tiny_phi()):
        piece.save_pretrained(tmp_path)
    tensors = save_speech_lora(pieces[0], tmp_path)
    plain, merged = (dict(x.named_parameters()) for x in (pieces[0], SpeechLM.from_pretrained(str(tmp_path)).model))
    changed = [name for name in plain if not torch.equal(plain[name], merged[name])]
    assert len(changed) == 16
    for name in changed:
        A, B = (tensors[f"base_model.model.{name.replace('weight', f'lora_{x}.weight')}"].double() for x in "AB")
        torch.testing.assert_close(merged[name].double(), plain[name].double() + 2 * B @ A, atol=1e-6, rtol=0)


def test_full_qwen_checkpoint_gives_the_log_probs_of_its_thinker(tmp_path, questions):
    """The hub's checkpoint holds thinker, talker and token2wav; only the thinker may be read."""
    torch.manual_seed(0)
    model, tokenizer, extractor = tiny_qwen()
    model.save_pretrained(tmp_path / "thinker")
    tensors = {f"thinker.{name}": x for name, x in load_file(tmp_path / "thinker" / "model.safetensors").items()}
    tensors |= {"talker.codec_head.weight": torch.ones(3, 2), "token2wav.dit.weight": torch.ones(2)}
    full = tmp_path / "full"
    transformers.Qwen2_5OmniConfig(thinker_config=model.config.to_dict()).save_pretrained(full)
    save_file(tensors, full / "model.safetensors", {"format": "pt"})
    logps = []
    for path in (full, tmp_path / "thinker"):
        tokenizer.save_pretrained(path)
        extractor.save_pretrained(path)
        lm = SpeechLM.from_pretrained(str(path))
        ids = torch.arange(4 * 2 * 2 * 5).view(4, 2, 2, 5) % 20 + 8
        logps.append(forward(lm, questions, ids, torch.ones_like(ids))[0])
    torch.testing.assert_close(logps[0], logps[1], atol=0, rtol=0)


def test_tokenizer_is_tokenizer_json_as_it_is(checkpoint, tmp_path):
    """AutoTokenizer would build GPT-2's own pre-tokenizer for the class that Phi's tokenizer_config.json names."""
    shutil.copytree(checkpoint, path := tmp_path / "copy")
    config = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "GPT2Tokenizer"}))
    text = tars.SYSTEM_PROMPT + " five minus one plus two"
    as_it_is = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    lm = SpeechLM.from_pretrained(str(path))
    assert lm.tokenizer(text, add_special_tokens=False).input_ids == as_it_is


def test_model_that_lacks_a_tensor_or_has_a_layer_more_than_its_config_is_refused(checkpoint, tmp_path):
    lacks, more = (shutil.copytree(checkpoint, tmp_path / name) for name in ("lacks", "more"))
    tensors, places = load_file(lacks / "model.safetensors"), ("layers.1.mlp.down_proj.weight", "layers.0.fc1.weight")
    name = next(name for name in sorted(tensors) if name.endswith(places))
    tensors.pop(name)
    save_file(tensors, lacks / "model.safetensors", {"format": "pt"})
    tail = re.escape(name.split("layers.")[1])
    with pytest.raises(SystemExit, match=f"does not fit its config.json: 1 tensors.*{tail}"):
        SpeechLM.from_pretrained(str(lacks))
    settings = json.loads((more / "config.json").read_text())
    of_text = settings.get("text_config", settings)
    of_text["num_hidden_layers"] = 3
    of_text.pop("layer_types", None)
    (more / "config.json").write_text(json.dumps(settings))
    with pytest.raises(SystemExit, match="does not fit its config.json.*layers.3"):
        SpeechLM.from_pretrained(str(more))


def test_models_take_their_checkpoints_dtype_on_a_gpu_that_has_it_and_float32_elsewhere(monkeypatch):
    asked, found = [], {"missing_keys": [], "unexpected_keys": []}
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, device: self)  # there is no GPU
    kind = SimpleNamespace(from_pretrained=lambda path, dtype, output_loading_info: (
        asked.append(dtype) or torch.nn.Module(), found))
    for native, device, *dtype in ((False, "cpu"), (False, "cuda"), (True, "cpu"), (True, "cuda"),
                                   (True, "cuda", torch.float16)):
        monkeypatch.setattr(tars, "BFLOAT16", native)
        tars.load_model(kind, "path", device, *dtype)
    assert asked == [torch.float32, torch.float32, torch.float32, "auto", torch.float16]


def test_revision_of_phi_belongs_to_microsofts_repository_alone(monkeypatch):
    asked = []  # no hub here: what would be asked of it is recorded
    monkeypatch.setattr(tars, "family_of", lambda path: Phi4Multimodal)
    for owner, name in ((transformers.PreTrainedTokenizerFast, "from_pretrained"), (Phi4Multimodal, "load"),
                        (transformers.Phi4MultimodalFeatureExtractor, "from_pretrained")):
        monkeypatch.setattr(owner, name, lambda path, revision=None: asked.append(revision))
    monkeypatch.setattr(SpeechLM, "__init__", lambda self, *parts: None)
    for path, revision in (("microsoft/Phi-4-multimodal-instruct", "refs/pr/70"), ("somebody/phi-4-tuned", None),
                           ("runs/phi", None)):
        asked.clear()
        SpeechLM.from_pretrained(path)
        assert asked == [revision] * 3  # tokenizer, extractor, model


def test_a_run_in_emulated_bfloat16(checkpoint, small_demo, tmp_path, monkeypatch):
    family = tars.family_of(checkpoint)
    monkeypatch.setattr(family, "load", staticmethod(functools.partial(family.load, dtype=torch.bfloat16)))
    here(tars, "--model", checkpoint, "--out", tmp_path / "run", "--steps", 2, "--questions-per-step", 2, "--lr", 0.01,
         "--data", small_demo / "train", "--eval-data", small_demo / "val", "--embedder", "ngrams",
         "--max-new-tokens", 6)
    lines = data_prep.read_lines(tmp_path / "run" / "log.jsonl")
    assert len(lines) == 2
    assert all(math.isfinite(line[k]) for line in lines for k in ("loss", "rep_speech", "reward_speech"))
    lm = SpeechLM.from_pretrained(checkpoint)
    evaluation.load_adapter(lm, tmp_path / "run")
    assert {p.dtype for p in lm.model.parameters()} == {torch.bfloat16, torch.float32}  # LoRA's matrices stay float32


@pytest.mark.parametrize("name, billions", [
    ("Qwen/Qwen2.5-Omni-7B", 8.93),  # the hub's number: text 7.07, lm_head 0.55, audio 0.64, vision 0.68
    # 36 layers of 77.1 M, embeddings and head of 0.31 each, audio 0.64, vision 0.67
    ("Qwen/Qwen2.5-Omni-3B", 4.70),
    # the hub's 5.6 B are these (the head is tied to the embeddings), speech-lora 0.46 (r 320), vision-lora 0.37 (r 256)
    ("microsoft/Phi-4-multimodal-instruct", 4.74)])
def test_default_architecture_has_the_real_models_size(name, billions):
    family, settings = evaluation.HUB_SETTINGS[name]
    with torch.device("meta"):
        model = family.model_class(family.model_class.config_class(**settings))
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)


# ==== 9. Answer extractor and sentence embedder =======================================================================
ANIMALS = ["a lizard", "a beetle", "a scorpion", "a frog"]
THINGS = ["wood", "stone", "paper", "glass"]
WATER = ["10 °C", "100 °C", "1,000", "0.75"]


@pytest.mark.parametrize("options, letter, completions", [
    (THINGS, "B",
     ["<think>A or D?</think><answer>The answer is B.</answer>", "<think>x</think><answer>The answer is B.", "B",
      "(B)", "(B).", "[B]", "b)", "THE ANSWER IS B.", "the answer is b.", "It must be B", "Therefore, B.",
      "\\boxed{B}", "\\boxed{\\text{B}}", '"B"', "<b>B</b>", "B: stone",
      "The answer is B. Unlike glass, stone does not shatter.",
      "**Determine the correct answer**\n\nA. wood\nB. stone\nC. paper\nD. glass\n\nThe answer is stone.",
      "A is brittle. Option B (stone) is hard. Option C burns.\nSo the best answer is B."]),
    (THINGS, "C",
     ["<think>So A.</think>\n\nThe answer is C.", "<THINK>x</THINK><Answer>C</Answer>", "<answer>Option C</answer>",
      "The answer is (C).", "The correct choice would be C", "C is the right answer.",
      "I'd say C, because it is paper.", "**Answer:** (C)", "### Answer\n\n**C**", "The answer is A... no, C.",
      "The answer is B. No, the answer is C.", "At first I thought A, but the answer is C."]),
    (THINGS, "D",
     ["<think>I must end with <answer>The answer is A.</answer></think><answer>The answer is D.</answer>",
      "So B. The answer is B.</think>D", "The answer is: D", "I'd go with option d", "Thus \\(\\boxed{D}\\).", "`D`"]),
    (THINGS, None,
     ["<think>Stone it is. The answer is B.", "<think>A</think> <think>no", "<think>x</think><answer></answer>",
      "The answer is B, glass", "The answer is paper (D).", "The answer is A. Wait, that is wrong.",
      "The answer is A. So A is wrong.", "As in option (C), it burns. The answer is (G).",
      "The answer is A red herring", "A cat is an animal.", "The answer is a dog.", "The answer is Better.",
      "The answer is C#.", "My answer is A+.", "Figure A shows the lungs.", "SS: A: 23.00",
      "This distinguishes Option C from Option D.", "The answer is because of D.", "The answer cannot be A.",
      "It is unlikely to be A", "Option A, which is not correct.", "The answer is not B.", "not C", "All but D.",
      "Is the answer A?", "The answer might be A.", "I doubt that the answer is A.",
      "If it were hot, the answer would be D.", "People say the answer is A.", "B or C", "The answer is A or B.",
      "A and C are both correct.", "The answer is A, B, and C.", "A. wood\nB. stone\nC. paper\nD. glass",
      "A. wood\nB. stone", "(A) wood (B) stone (C) paper (D) glass", "None of these.", "I don't know.", "",
      "Wood burns. Stone does not. Paper burns."]),
    (THINGS, "A", ["The answer is A. Option B is wrong, since stone sinks.", "ANSWER: $A$"]),
    (["beer", "red wine", "tea", "milk"], "B", ["The answer is **B) red wine**", "Answer: B. red wine"]),
    (ANIMALS, "C", ["C. a scorpion", "The answer is a scorpion.", "It's the scorpion"]),
    (["2", "8", "4", "6"], None, ["d, which is 8"]), (ANIMALS, None, ["D. a scorpion"]),
    (["gold", "white gold", "iron", "tin"], "A", ["The answer is gold, because it is heavy."]),
    (["gold", "white gold", "iron", "tin"], "B", ["The answer is white gold."]),
    (WATER, "D", ["The answer is 0.75. It is three quarters."]),
    (WATER, "C", ["The correct answer is 1,000. A kilogram has so many grams.", "The answer is 1000."]),
    (WATER, "B", ["The answer is 100°C."]), (OPTIONS, "C", ["The answer is dublin"]),
    (["x", "y", "z", "none of these"], "D", ["None of these."]),
    (["polish", "Polish", "x", "y"], "B", ["The answer is Polish."]),
    (["vitamin C", "iron", "zinc", "x"], "A", ["The answer is vitamin C."]),
    (["3", "-3", "0", "6"], "B", ["The answer is -3."]), (["4", "14", "24", "40"], None, ["The answer is 24.5."]),
    (["red", "white", "blue", "green"], None, ["The answer is red, white and blue."]),
    (["C", "B", "A", "D"], None, ["The answer is C."]), (["E", "F", "G", "H"], "B", ["The answer is F."]),
    (["red", "red", "blue", "green"], None, ["The answer is red."])])
def test_extract_answer_reads_what_a_careful_person_reads(options, letter, completions):
    for completion in completions:
        assert tars.extract_answer(completion, options) == letter, completion


def test_ngram_embedder_by_hand():
    # "a b" has the words a, b and the pair "a b"; "a c" shares one of three: cosine 1 / 3.
    same, other, far = tars.embed_ngrams(["a b", "a c", "x y"])
    assert same.norm().item() == pytest.approx(1)
    assert (same @ other).item() == pytest.approx(1 / 3, abs=1e-6) and (same @ far).item() == 0
    # "a a" has the word a twice and the pair "a a" once, "a" the word once: 2 / sqrt(2 * 2 + 1 * 1).
    twice, once = tars.embed_ngrams(["a a", "a"])
    assert (twice @ once).item() == pytest.approx(2 / math.sqrt(5), abs=1e-6)


# ==== 10. Logs, adapter files and checkpoints =========================================================================
def test_saved_adapter_is_the_trained_model_and_no_other_fits(checkpoint, lm, questions, answers, tmp_path):
    base, _ = forward(lm, questions, *answers)
    perturb(attach_lora(lm, 8, 32))
    trained, _ = forward(lm, questions, *answers)
    tars.save_adapter(lm, Config(model=checkpoint, out=str(tmp_path)))
    fresh = SpeechLM.from_pretrained(checkpoint)
    evaluation.load_adapter(fresh, tmp_path)
    loaded, _ = forward(fresh, questions, *answers)
    assert (trained - base).abs().max() > 0.1
    torch.testing.assert_close(loaded, trained, atol=0, rtol=0)
    file, scale = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    tensors, settings = load_file(file), json.loads(scale.read_text())
    scale.write_text(json.dumps(settings | {"r": 4}))
    with pytest.raises(SystemExit, match="no adapter of this model"):
        evaluation.load_adapter(fresh, tmp_path)
    scale.write_text(json.dumps(settings))
    save_file({k: v for k, v in tensors.items() if ".layers.3." not in k}, file)
    with pytest.raises(SystemExit, match="no adapter of this model"):
        evaluation.load_adapter(fresh, tmp_path)


def test_peft_loads_the_adapter_and_agrees(checkpoint, lm, questions, answers, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed; it is needed for this test alone")
    perturb(attach_lora(lm, 8, 32))
    tars.save_adapter(lm, Config(model=checkpoint, out=str(tmp_path)))
    completion, fresh = answers[0][0, 0, 0, :9].tolist(), SpeechLM.from_pretrained(checkpoint)
    wrapped = peft.PeftModel.from_pretrained(fresh.model, tmp_path)
    targeted = {name for name, m in wrapped.named_modules() if hasattr(m, "lora_A")}
    assert len(targeted) == sum(isinstance(m, LoRALinear) for m in lm.model.modules())
    for spoken in (True, False):
        with torch.no_grad():
            ours, theirs = (plain_forward(x, questions[0], spoken, completion)[1].logits for x in (lm, fresh))
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_a_file_is_whole_or_as_it_was(tmp_path, monkeypatch):
    tars.write_aside(tmp_path / "file", b"old")
    # killed just before
    monkeypatch.setattr(tars.os, "replace", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        tars.write_aside(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"


def long_flags(small_demo, out):
    """A run of six steps with a checkpoint after each."""
    return ["--model", str(small_demo / "model"), "--steps", "6", "--questions-per-step", "2", "--save-every", "0.001",
            "--eval-every", "4", "--lr", "0.003", "--sample-every", "3", "--eval-batch", "40", "--out", str(out)]


@pytest.fixture(scope="session")
def uninterrupted(small_demo, tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    here(tars, *long_flags(small_demo, out))
    return out


def same_run(a, b):
    """Two runs left the same behind: adapter, samples, summary, and the log apart from times."""
    logs = [[line | {"seconds": 0} for line in data_prep.read_lines(out / "log.jsonl")] for out in (a, b)]
    assert logs[0] == logs[1] and len(logs[0]) == 6
    for name in ("adapter_model.safetensors", "samples.jsonl", "summary.json"):
        assert (a / name).read_bytes() == (b / name).read_bytes()


# after the second the checkpoint is that of step 0, and the log is longer
@pytest.mark.parametrize("save_every", ["0.3", "1000"])
def test_killed_and_resumed_equals_uninterrupted(small_demo, uninterrupted, tmp_path, save_every):
    out, log = tmp_path / "run", tmp_path / "run" / "log.jsonl"
    process = start(HERE / "tars.py", *long_flags(small_demo, out), "--save-every", save_every)
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") > 2):
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert not (out / "summary.json").exists()
    flags = long_flags(small_demo, out)
    with pytest.raises(SystemExit, match="exists: continue with --resume"):
        tars.main(flags)
    for other, says in ((["--lr", "0.5"], "lr"), (["--data", str(small_demo / "val")], "content of --data"),
                        (["--eval-data", str(small_demo / "val")], "content of --eval-data")):
        with pytest.raises(SystemExit, match=f"other settings or data: {says}$"):
            tars.main([*flags, *other, "--resume"])
    log.write_text(log.read_text() + '{"step": 7, "torn')  # as a line looks that was cut by a power failure
    here(tars, *flags, "--resume", "--tokens-per-micro-batch", 900, "--save-every", 20, "--data",
         small_demo / "../demo/train")
    same_run(out, uninterrupted)
    here(tars, *flags, "--resume")  # a finished run is finished
    same_run(out, uninterrupted)


def test_resume_begins_anew_without_a_checkpoint_and_touches_no_other_folder(small_demo, uninterrupted, tmp_path):
    (out := tmp_path / "run").mkdir()
    (out / "checkpoint.pt.part").write_bytes(b"killed in the first write")
    here(tars, *long_flags(small_demo, out), "--resume")
    same_run(out, uninterrupted)
    (theirs := tmp_path / "theirs").mkdir()
    (theirs / "config.json").write_text("mine")
    for resume in ([], ["--resume"]):
        with pytest.raises(SystemExit, match="exists: continue with --resume"):
            tars.main([*long_flags(small_demo, theirs), *resume])
    assert [(p.name, p.read_text()) for p in theirs.iterdir()] == [("config.json", "mine")]


def test_ten_non_finite_steps_in_a_row_end_the_run(small_demo, tmp_path, monkeypatch):
    monkeypatch.setattr(tars, "grpo_loss", lambda logps, *rest: logps.sum() * math.nan)
    with pytest.raises(SystemExit, match="ten steps in a row without a finite loss and gradient"):
        tars.main([*long_flags(small_demo, tmp_path / "run"), "--steps", "40"])
    lines = data_prep.read_lines(tmp_path / "run" / "log.jsonl")
    assert [line["skipped"] for line in lines] == [1] * 10


# ==== 11. Several processes ===========================================================================================
RANKED = """
import sys, torch, tars, safetensors.torch
from tars import *
path, out = sys.argv[1:]
if tars.RANKS > 1:
    dist.init_process_group()
cfg, generator = Config(group_size=4), torch.Generator().manual_seed(0)
lm = SpeechLM.from_pretrained(path + "/model")
parameters = attach_lora(lm, 2, 32)
with torch.no_grad():
    for p in parameters:
        p.normal_(0, 0.05, generator=generator)
ids = torch.randint(8, 40, (4, 2, 2, 9), generator=generator)
mask = (torch.arange(9) < torch.randint(3, 10, (4, 2, 2, 1), generator=generator)).long()
own = slice(tars.RANK, None, tars.RANKS)  # of the four questions
lm.rollout = lambda *args: (ids[own], mask[own], torch.zeros(4, 2, 2, dtype=torch.bool)[own])
batch = [load_questions(path + "/train")[i] for i in range(4)][own]
extract = lambda asked, _: [LETTERS[q["answer_index"]] if i % 2 else None for i, q in enumerate(asked)]
optimizer = torch.optim.SGD(parameters, lr=1.0)
metrics = mean_over_ranks(tars.train_step(lm, batch, tars.embed_ngrams, extract, optimizer, cfg, generator)[0])
if tars.RANK == 0:
    numbers = torch.tensor([metrics["loss"], metrics["reward_text"], metrics["length_speech"]])
    tensors = {str(i): p.detach() for i, p in enumerate(parameters)} | {"numbers": numbers}
    safetensors.torch.save_file(tensors, out)
if tars.RANKS > 1:  # without it a process may abort on its way out
    dist.destroy_process_group()
"""


def test_two_processes_make_the_same_first_update_as_one(small_demo, tmp_path):
    (tmp_path / "ranked.py").write_text(RANKED)
    run(tmp_path / "ranked.py", small_demo, tmp_path / "one")
    run(*TWO, tmp_path / "ranked.py", small_demo, tmp_path / "two")
    one, two = load_file(tmp_path / "one"), load_file(tmp_path / "two")
    assert one.keys() == two.keys() and len(one) == 57
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-5, rtol=0)


@slow
def test_two_processes_train_evaluate_and_resume_and_one_prints(small_demo, uninterrupted, tmp_path):
    printed = run(*TWO, HERE / "tars.py", *long_flags(small_demo, tmp_path / "whole"))
    assert printed.count("held-out questions") == 1
    whole = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert whole["base_text"] == json.loads((uninterrupted / "summary.json").read_text())["base_text"]
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    run(*TWO, HERE / "tars.py", *long_flags(small_demo, tmp_path / "again"), "--resume")
    same_run(tmp_path / "again", tmp_path / "whole")


# ==== 12. The command =================================================================================================
def test_main_prints_the_gap_and_tells_what_it_uses(small_demo, tmp_path):
    val, out, test = small_demo / "val", tmp_path / "run", load_questions(small_demo / "test")
    assert not set(load_questions(small_demo / "train")["question"]) & set(test["question"])  # the demo holds out
    assert set(test["answer_index"]) == {0, 1, 2, 3}
    printed = here(tars, "--model", small_demo / "model", "--data", val, "--eval-data", val, "--out", out, "--steps", 1,
                   "--questions-per-step", 2, "--base-text-accuracy", 80)
    with pytest.raises(SystemExit, match="--layers 3-9"):  # before the first evaluation
        tars.main([*long_flags(small_demo, tmp_path / "other"), "--layers", "3-9"])
    assert not (tmp_path / "other").exists()
    assert "8 of 8 questions of --eval-data are in --data too" in printed and "cpu, float32\n" in printed
    summary = json.loads((out / "summary.json").read_text())
    # Eq. (1) with the text backbone's accuracy
    assert summary["mrr_after"] == pytest.approx(100 * summary["speech"] / 0.8)
    (after,) = [line.split() for line in printed.splitlines() if line.startswith("after")]
    assert after[1:] == [f"{x:.1f}" for x in (100 * summary["speech"], 100 * summary["text"], summary["mrr_after"])]


# ==== data_prep.py: the demo ==========================================================================================
def test_demo_sums_are_right_and_decoded_as_they_were_and_some_thoughts_skip_a_step():
    assert len(SUMS) == len(set(SUMS)) == 1210
    tokenizer, rng = tiny_qwen()[1], np.random.default_rng(0)
    for i, (a, s, b, t, c) in enumerate(SUMS):
        row = data_prep.sum_question((a, s, b, t, c), i % 4, rng, "k")
        words = dict(zip(data_prep.DIGITS, range(10), strict=True))
        value = eval(f"{a} {'+' if s == 'plus' else '-'} {b} {'+' if t == 'plus' else '-'} {c}")
        assert words[row["options"][row["answer_index"]]] == value and len(set(row["options"])) == 4
        answer = data_prep.worked_answer(data_prep.in_steps((a, s, b, t, c)), i % 4)
        assert tars.format_reward(answer) == 1 and tars.extract_answer(answer, row["options"]) == "ABCD"[i % 4]
        text = tars.written_question(row) + answer
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    thoughts = [data_prep.in_steps((5, "minus", 1, "plus", 2), 0.2, rng) for _ in range(2000)]
    assert set(thoughts) == {"five minus one is four. four plus two is six", "five minus one plus two is six"}
    assert 0.16 < np.mean([". " in thought for thought in thoughts]) < 0.24  # 4.5 standard errors


# ==== data_prep.py: real data, on replicas of each source's layout ====================================================
def decode(data):
    """The waveform of an audio file's bytes."""
    return data_prep.decode_clip({"bytes": data, "path": None}, max_seconds=400)


def test_clips_are_mixed_down_resampled_and_scaled():
    stereo = decode(wav(np.tile([[16384, 0], [0, -16384]], (900, 1))))
    assert stereo.tolist() == [0.25, -0.25] * 900
    second = np.sin(2 * np.pi * 440 * np.arange(48_000) / 48_000)
    clip = decode(wav((second * 16384).astype(int)[:, None], rate=48_000))
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)
    assert len(clip) == 16_000 and np.abs(clip.numpy() - expected)[100:-100].max() < 0.01
    for kind, subtype in (("WAV", "FLOAT"), ("WAV", "PCM_U8"), ("FLAC", "PCM_16"), ("MP3", "MPEG_LAYER_III")):
        clip = decode(wav(expected, 16_000, subtype, kind))
        assert abs(len(clip) - 16_000) < 2000 and 0.45 < clip[2000:-2000].abs().max() < 0.55


@pytest.mark.parametrize("data, says", [
    (b"", "no clip"), (b"\0" * 4000, "unreadable"), (tone(0.5, 16_000)[:30], "unreadable"),
    (tone(0.01, 16_000), "shorter than 0.1 s', '0.01 s"), (tone(301, 8_000), "longer than 300 s', '301.00 s"),
    (wav(np.zeros(8000)), "silent"), (wav(np.full(8000, math.nan), subtype="FLOAT"), "NaN samples")], ids=range(7))
def test_bad_clips_are_named(data, says):
    with pytest.raises(data_prep.Lost, match=says):
        decode(data)


def replica(path, rows):
    """Write rows as parquet; clips as the hub stores them, {"bytes", "path"}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [row | ({"audio": {"bytes": row["audio"], "path": "x.wav"}} if "audio" in row else {}) for row in rows]
    datasets.Dataset.from_list(rows).to_parquet(path)


def prepare(*arguments):
    """Run data_prep.py here; its final table as {line: number}."""
    lines = [line for line in here(data_prep, *arguments).splitlines() if re.fullmatch(r".+\s[\d.]+", line)]
    return {line.rsplit(maxsplit=1)[0].strip().removeprefix("left out: "): float(line.split()[-1]) for line in lines}


ROW = {"key": "k0", "question": "Who?", "options": ["w", "x", "y", "z"], "answer_index": 2, "prompt_for_tts": "p",
       "audio": tone(1.0, 44_100, channels=2), "tts_wer": 0.05}


def test_tars_source(tmp_path):
    changes = [
        {"tts_wer": None}, {"key": "k1", "question": "When?", "audio": tone(1.5, 24_000)}, {"audio": b"RIFFno"},
        {"audio": b""}, {"audio": wav(np.zeros((16_000, 1), int))}, {"audio": tone(2.1, 16_000)},
        {"options": list("vwxyz")}, {"answer_index": 4}, {"options": list("wxxz")}, {}]
    replica(tmp_path / "hub" / "train.parquet", [ROW | change for change in changes])
    counts = prepare("tars", "--origin", tmp_path / "hub", "--out", tmp_path / "data", "--max-seconds", 2)
    assert counts == {
        "rows in": 10, "rows out": 2, "hours of audio": 0.0, "an unreadable clip": 1, "no clip": 1,
        "a silent clip, or one with NaN samples": 1, "a clip longer than 2 s": 1, "other than four options": 1,
        "the answer is none of the options": 1, "two equal options": 1, "word for word an earlier row": 1}
    data = load_questions(tmp_path / "data")
    assert data["key"] == ["k0", "k1"] and data["tts_wer"] == [None, 0.05] and data["answer_index"] == [2, 2]
    assert [len(tars.read_clip(row["audio"]["bytes"])) / 16_000 for row in data] == data["seconds"] == [1, 1.5]
    assert {p.name for p in tmp_path.iterdir()} == {"hub", "data"}  # nothing half-done is left beside it


@pytest.mark.parametrize("change, reason", [
    ({"question": None}, "no text as question"), ({"question": "\u200b"}, "no text as question"),
    ({"question": 7}, "no text as question"), ({"options": "wxyz"}, "other than four options"),
    ({"options": {"A": "w", "B": "x", "C": "y", "D": "z"}}, "other than four options"),
    ({"options": ["w", None, "y", "z"]}, "no text as option"), ({"options": ["w", 2, "y", "z"]}, "no text as option"),
    ({"answer_index": 1.0}, "answer is none"), ({"answer_index": True}, "answer is none"),
    ({"answer_index": -1}, "answer is none"), ({"prompt_for_tts": None}, "no text as prompt"),
    ({"audio": None}, "no clip"), ({"audio": {"bytes": None, "path": None}}, "no clip")], ids=str)
def test_a_cell_that_is_empty_or_of_another_type_loses_its_row(change, reason):
    row, args = ROW | {"audio": {"bytes": ROW["audio"], "path": None}}, SimpleNamespace(max_seconds=9)
    assert data_prep.from_tars(0, row | {"tts_wer": "n/a"}, args)["tts_wer"] is None
    with pytest.raises(data_prep.Lost, match=reason):
        data_prep.from_tars(0, row | change, args)
    for answer, index in (("B", 1), ("b", 1), ("B.", 1), ("(B)", 1), (" d ", 3), (3, 3)):
        assert data_prep.checked("Who?", ["w", "x", "y", "z"], answer, "")["answer_index"] == index


ASKED = "\n\nWhat is the answer to the above multiple choice question? Select one of the following: A, B, C, or D."
FOUR = ["one", "two", "three", "four"]


@pytest.mark.parametrize("prompt, question, options", [
    ("Q\nr?\nA. one\nB. two\n D\nC. three\nD. four" + ASKED, "Q r?", ["one", "two D", "three", "four"]),
    ("Q?\nA. one\nB. two\nC. three\nD. fo\n\nur" + ASKED, "Q?", ["one", "two", "three", "fo ur"]),
    ("Q?\nA.one\nB.two\nC.three\nD.four" + ASKED, "Q?", FOUR), ("Q?\nA) one\nB) two\nC) three\nD) four", "Q?", FOUR),
    ("Q?\n(A) one\n(B) two\n(C) three\n(D) four" + ASKED, "Q?", FOUR),
    ("Q?\nOption A: one\nOption B: two\nOption C: three\nOption D: four" + ASKED, "Q?", FOUR),
    ("E. coli is\na.\u00a0one\nb. two\nc. three\nd. four" + ASKED, "E. coli is", FOUR),
    ("Which?\nA. x is 1\nB. y is 2\nA. one\nB. two\nC. three\nD. four" + ASKED, "Which? A. x is 1 B. y is 2", FOUR),
    ("Q?\nA. one\nB. two\nC. three\nD. four\n\nPick one.", "Q?", FOUR),
    ("Q?\nA. one\nB. two\nC. three\nD. four\nPick one.", "no telling", None),
    ("Q?\nA. one\nB. two" + ASKED, "no four options", None), ("Q?" + ASKED, "no four options", None),
    ("Q?\nA. 1\nB. 2\nB. 3\nC. 4\nD. 5" + ASKED, "no four options", None),
    ("Q?\nA. 1\nB. 2\nC. 3\nD. 4\nE. 5" + ASKED, "no four options", None)])
def test_prompts_are_read_as_a_person_reads_them_or_lost(prompt, question, options):
    if options:
        assert data_prep.parse_prompt(prompt) == (question, options)
    else:
        with pytest.raises(data_prep.Lost, match=question):
            data_prep.parse_prompt(prompt)


def test_voicebench_sources(tmp_path):
    prompt = "Which?\n" + "".join(f"{letter}. {word}\n" for letter, word in zip("ABCD", FOUR, strict=True)) + ASKED[1:]
    row = {"audio": tone(0.5, 24_000), "prompt": prompt, "reference": "B", "category": "law"}
    replica(tmp_path / "hub" / "mmsu" / "law-00000-of-00001.parquet", [row, row | {"prompt": "No options.\nWhat now?"}])
    replica(tmp_path / "hub" / "mmsu" / "physics-00000-of-00001.parquet",
            [row | {"category": "physics", "reference": "D"}, row | {"reference": "E"}])
    replica(tmp_path / "hub" / "openbookqa" / "test-00000-of-00001.parquet", [row])
    counts = prepare("voicebench-mmsu", "--origin", tmp_path / "hub", "--out", tmp_path / "mmsu")
    assert counts == {"rows in": 4, "rows out": 2, "hours of audio": 0.0, "no four options recognised": 1,
                      "the answer is none of the options": 1}
    data = load_questions(tmp_path / "mmsu")
    assert data["question"] == ["Which?"] * 2 and data["options"] == [FOUR] * 2
    assert data["answer_index"] == [1, 3] and data["category"] == ["law", "physics"]
    prepare("voicebench-obqa", "--origin", tmp_path / "hub", "--out", tmp_path / "obqa", "--limit", 1)
    assert len(load_questions(tmp_path / "obqa")) == 1


def test_sources_take_their_own_split_and_overwrite_nothing(tmp_path):
    row = {"question": "Who?", "subject": "s", "choices": ["w", "x", "y", "z"], "answer": 1}
    for name in ("auxiliary_train", "test", "validation"):
        replica(tmp_path / "hub" / "all" / f"{name}-00000-of-00001.parquet", [row | {"question": f"{name}?"}])
    replica(tmp_path / "hub" / "law" / "auxiliary_train.parquet", [row])
    source = data_prep.SOURCES["mmlu"]
    assert data_prep.open_source(source, str(tmp_path / "hub"))["question"] == ["auxiliary_train?"]
    one = tmp_path / "hub" / "all" / "test-00000-of-00001.parquet"
    assert data_prep.open_source(source, str(one))["question"] == ["test?"]  # a file that is given is taken
    (tmp_path / "new.part").mkdir()
    (tmp_path / "new.part" / "mine").write_text("")
    for name, says in (("hub", "exists already"), ("new", "new.part is no stopped conversion")):
        with pytest.raises(SystemExit, match=says):
            prepare("mmlu", "--origin", tmp_path / "hub", "--out", tmp_path / name)


def test_rows_of_a_table_are_recordings_spoken_or_left_out_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(data_prep, "Voice", lambda *args: pytest.fail("no row asks for a voice"))
    (tmp_path / "1.wav").write_bytes(tone(1, 16_000))
    head, recorded = "question,A,B,C,D,answer,wav\n", "Who?,NA,007,y,z,C,1.wav\n"
    rows = ("a, b?,w,x,y,z,C,1.wav", "When?,w,x,y,z,C,", "When?,w,x,y", ",,,,,,", "When?,w,x,y,z,C,2.wav")

    def converted(name, text):
        (tmp_path / f"{name}.csv").write_text(text)
        return prepare("csv", "--origin", tmp_path / f"{name}.csv", "--out", tmp_path / name)

    assert converted("recorded", "\n".join([head + recorded, *rows])) == {
        "rows in": 6, "rows out": 1, "hours of audio": 0.0, "more cells than columns": 1, "no clip": 1,
        "no recording, and no dash that asks for a voice": 1, "the answer is none of the options": 2}
    (row,) = load_questions(tmp_path / "recorded")
    assert (row["question"], row["options"], row["seconds"]) == ("Who?", ["NA", "007", "y", "z"], 1.0)
    voice = CountingVoice()
    for part in ("Voice", "Listener"):
        monkeypatch.setattr(data_prep, part, lambda *args: voice)
    assert converted("some", head + recorded + "When?,w,x,y,z,C,-\n")["rows out"] == 2
    assert len(voice.seeds) == 2  # the first reading of row 1 is heard wrong
    assert converted("none", "question,A,B,C,D,answer\nWho?,w,x,y,z,C\n")["rows out"] == 1 and len(voice.seeds) == 3


class CountingVoice:
    """A voice that hears itself: of question 1 the first reading wrong, in question 2 never option d."""
    spelling = None

    def __init__(self, stop_at=None):
        self.seeds, self.stop_at = [], stop_at

    def speak(self, text, seed):
        if len(self.seeds) == self.stop_at:
            raise KeyboardInterrupt
        self.seeds, self.text = [*self.seeds, seed], text
        return torch.tensor(np.random.default_rng(seed).uniform(-0.5, 0.5, 8000), dtype=torch.float32)

    def transcribe(self, waveform):
        index, attempt = self.seeds[-1][1:]
        wrong = {1: ["something else altogether option d"], 2: [self.text.split("Option D")[0]] * 3}.get(index, [])
        return wrong[attempt] if attempt < len(wrong) else self.text


def test_mmlu_source_tries_again_filters_and_resumes_without_speaking_twice(tmp_path, monkeypatch):
    row = {"question": "The capital of France is ____.", "subject": "s", "choices": FOUR, "answer": 1}
    questions = ("Which is it?", "What else?", "long " * 500, "2 + 2 = ___, 5 - ___ = 1?", "Is 2 -> 3?")
    rows = [row, *(row | {"question": question} for question in questions)]
    replica(tmp_path / "hub" / "all" / "auxiliary_train-00000-of-00001.parquet", rows)
    arguments, voices = ("mmlu", "--origin", tmp_path / "hub", "--tries", 3, "--out"), [CountingVoice()]
    monkeypatch.setattr(data_prep, "Voice", lambda *args: voices[-1])
    monkeypatch.setattr(data_prep, "Listener", lambda *args: voices[-1])
    counts = prepare(*arguments, tmp_path / "whole")
    assert counts == {"rows in": 6, "rows out": 4, "hours of audio": 0.0, "option d not heard, 3 tries": 1,
                      "longer than 2000 characters": 1}
    assert [seed[1:] for seed in voices[0].seeds] == [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2), (4, 0), (5, 0)]
    data = load_questions(tmp_path / "whole")
    options = "\n\nOption A: one\nOption B: two\nOption C: three\nOption D: four"
    assert data["prompt_for_tts"][0] == "The capital of France is what?" + options
    assert data["prompt_for_tts"][2].startswith("2 + 2 = first blank , 5 - second blank = 1?")
    assert data["question"][0] == row["question"] and data["tts_wer"] == [0.0] * 4 and data["category"] == ["s"] * 4
    # Interrupted at its fifth reading, in the middle of question 2, then a line torn by a crash.
    voices.append(CountingVoice(stop_at=4))
    with pytest.raises(KeyboardInterrupt):
        prepare(*arguments, tmp_path / "parts", "--limit", 4)
    with pytest.raises(SystemExit, match="other settings .seed."):
        prepare(*arguments, tmp_path / "parts", "--seed", 5)
    with open(tmp_path / "parts.part" / "rows.jsonl", "a") as torn:
        torn.write('{"row": {"key": "mm')
    voices.append(CountingVoice())
    prepare(*arguments, tmp_path / "parts")
    assert [seed[1:] for seed in voices[2].seeds] == [(2, 0), (2, 1), (2, 2), (4, 0), (5, 0)]
    assert load_questions(tmp_path / "parts").to_list() == data.to_list()


def test_a_reading_is_kept_below_ten_percent_of_wrong_words():
    # 8 words of the question and 12 of the options: one wrong word is 5 %, two are 10 %, which is no longer below it.
    row = {"question": "What is the sum of these two numbers?", "choices": FOUR, "answer": 0, "subject": "s"}
    args = SimpleNamespace(tries=1, seed=0, max_seconds=9, voice=CountingVoice(), listener=CountingVoice())
    args.listener.transcribe = lambda waveform: args.voice.text.replace("sum", "some")
    assert data_prep.from_mmlu(0, row, args)["tts_wer"] == 0.05
    for wrong, other, says in (("these", "those", "word error rate of 10 % or more, 1 tries', 'at last 10%: .*some of"),
                               ("Option D", "Option B", "option d not heard, 1 tries', 'at last 10%: ")):
        said = args.voice.text.replace("sum", "some").replace(wrong, other)
        args.listener.transcribe = lambda waveform, said=said: said
        with pytest.raises(data_prep.Lost, match=says):
            data_prep.from_mmlu(0, row, args)


@pytest.mark.parametrize("text, spoken", [
    ("342", "three hundred forty two"), ("1,000,017", "one million seventeen"), ("3.14", "three point one four"),
    ("007", "zero zero seven"), (".05", "zero point zero five"), ("from -5 to 3", "from minus five to three"),
    ("the 2nd and 21st", "the second and twenty first"), ("in 1984", "in nineteen eighty four"),
    ("July 4, 1776", "july four seventeen seventy six"), ("the 1990s", "the nineteen nineties"),
    ("1984 people", "one thousand nine hundred eighty four people"), ("at 3 p.m. or", "at three p m or"),
    ("$5.50", "five dollars and fifty cents"), ("$3 million", "three million dollars"), ("£0.50", "fifty pence"),
    ("a $10 bill", "a ten dollar bill"), ("5-10 days", "five to ten days"), ("10 - 3", "ten minus three"),
    ("1½ cups", "one and one half cups"), ("x² + y = 4", "x squared plus y equals four"),
    ("x ≤ 3", "x is less than or " "equal to three"), ("$1", "one dollar"),
    ("9.8 m/s", "nine point eight meters per second"), ("1 kg", "one kilogram"), ("50 Hz", "fifty hertz"),
    ("a 6 ft wall", "a six foot wall"), ("20%", "twenty percent"), ("20 °C", "twenty degrees celsius"),
    ("α-decay", "alpha decay"), ("café", "cafe"), ("St. Augustine", "saint augustine"),
    ("Dr. Smith vs. Mr. Jones", "doctor smith versus mister jones"), ("U.S. law", "u s law"), ("and/or", "and or"),
    ("Who?\nOption A: I", "who. option a i"), ("don’t (ever) 'go'", "don't ever go"), ("well-known", "well known")])
def test_spelled_out_as_a_person_says_it(text, spoken):
    assert data_prep.spell_out(text) == spoken


@pytest.mark.parametrize("text", [
    "x != y", "5!", "|x|", "$1.5M", "i++", "a == b", "A -> B", "C6H12O6", "Fe2(SO4)3", "https://example.com", "5-10",
    "3:1", "at 3:30", "10:00 AM", "x_1", "x^2", "1/2", "9/11", "f(x)", "(x + 1)(x - 1)", "I and III", "COVID-19", "3D",
    "2x", "1.2.3", "12,34", r"\frac{a}{b}", "$x$", "9.8 m/s²", "5 * 3", "[1]", "#1", "~5", "Main St. b", "北京", "😀"])
def test_what_no_rule_says_is_lost_and_not_guessed(text):
    with pytest.raises(data_prep.Lost, match="no rule"):
        data_prep.spell_out(text)
    assert re.fullmatch("[a-z'. ]*", data_prep.spell_out(text, strict=False))  # a transcript may hold anything


def test_word_error_rate_by_hand():
    # tall -> tell (substituted), a word dropped, a word added: 3 of 6 words
    assert data_prep.word_error_rate("red green blue tall small thin", "red blue tell small thin thin") == 3 / 6
    for reference, heard in (
        ("the 21st day", "the twenty-first day"), ("$5", "five dollars"), ("he'd gone", "he had gone"),
        ("one hundred and five", "105"), ("It's 2 o'clock, isn't it?", "it is two oclock is not it"),
        ("Option A: (red)", "option a red"), ("20 per cent", "20 percent")):
        assert data_prep.word_error_rate(reference, heard) == 0
    assert data_prep.word_error_rate("the colour", "the color") == 0.5
    assert data_prep.word_error_rate("the colour", "the color", {"colour": "color"}) == 0  # the recogniser's spelling
    assert data_prep.reading_error("who option d x", "who option x") == (0.25, True)  # one word of four
    asked = "which option describes it option d x"  # "option describes" is no option d
    assert data_prep.reading_error(asked, "which option describes it") == (3 / 7, True)
    assert data_prep.reading_error(asked, asked) == (0, False)
    assert data_prep.without_blanks("What does __init__ do in the __?") == "What does __init__ do in the what ?"


@pytest.fixture(scope="session")
def helpers(tmp_path_factory):
    """Tiny random helper models in the hub's layout: a voice, a listener, a sentence embedder, an xFinder."""
    out = tmp_path_factory.mktemp("helpers")
    torch.manual_seed(0)
    (out / "vocab.json").write_text(json.dumps({c: i for i, c in enumerate("_' abcdefghijklmnopqrstuvwxyz")}))
    voice = transformers.VitsConfig(
        vocab_size=29, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16, flow_size=16,
        spectrogram_bins=17, upsample_initial_channel=16, upsample_rates=[8, 8], upsample_kernel_sizes=[16, 16],
        resblock_kernel_sizes=[3], resblock_dilation_sizes=[[1]])
    ends = dict(pad_token_id=258, bos_token_id=258, eos_token_id=258, decoder_start_token_id=259)
    listener = transformers.WhisperConfig(
        vocab_size=1800, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_target_positions=40, **ends)
    small = evaluation.byte_tokenizer(Phi4Multimodal)  # 256 bytes and 5 control tokens; above them stand timestamps
    tokenizer, ending = (evaluation.byte_tokenizer(Qwen25Omni) for _ in range(2))
    tokenizer.pad_token = ending.pad_token = "<|endoftext|>"
    ending.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", tokenizer.convert_tokens_to_ids("<|endoftext|>"))])
    sizes = dict(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=2,
                 num_attention_heads=2, num_key_value_heads=1)
    for name, pieces in {
        "voice": (transformers.VitsModel(voice),
                  transformers.VitsTokenizer(str(out / "vocab.json"), pad_token="_", phonemize=False)),
        "listener": (transformers.WhisperForConditionalGeneration(listener), small,
                     transformers.WhisperFeatureExtractor()),
        "xfinder": (transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes)), tokenizer),
        "embedder": (transformers.Qwen3Model(transformers.Qwen3Config(**sizes, head_dim=8)), ending)}.items():
        for piece in pieces:
            piece.save_pretrained(out / name)
    settings = {"no_timestamps_token_id": 298, "is_multilingual": False, "max_length": 20,
                "max_initial_timestamp_index": 50, "return_timestamps": False}
    (out / "listener" / "generation_config.json").write_text(json.dumps(settings | ends))
    return out


KINDS = {"voice": data_prep.Voice, "listener": data_prep.Listener, "xfinder": tars.XFinder,
         "embedder": tars.SentenceEmbedder}


@pytest.mark.parametrize("name", KINDS)
def test_helper_that_lacks_a_tensor_is_refused_and_on_the_cpu_it_is_float32(helpers, tmp_path, monkeypatch, name):
    monkeypatch.setattr(tars, "BFLOAT16", True)
    shutil.copytree(helpers / name, path := tmp_path / name)
    tensors, config = load_file(path / "model.safetensors"), json.loads((path / "config.json").read_text())
    half = {k: v.half() if v.is_floating_point() else v for k, v in tensors.items()}
    save_file(half, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    assert {p.dtype for p in KINDS[name](str(path), "cpu").model.parameters()} == {torch.float32}
    half.pop(sorted(half)[len(half) // 2])
    save_file(half, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(SystemExit, match="does not fit its config.json: 1 tensors"):
        KINDS[name](str(path), "cpu")


def test_xfinder_prompt_and_batch(helpers):
    extract, seen = tars.load_extractor(Config(extractor=str(helpers / "xfinder"), aux_device="cpu")), []
    generate = extract.model.generate
    extract.model.generate = lambda **inputs: seen.append(inputs) or generate(**inputs | {"max_new_tokens": 2})
    questions = [{"question": "Who {is} it?", "options": OPTIONS}, {"question": "Why?", "options": OPTIONS}]
    assert extract(questions, ["The answer is B.", "No."]) == [None, None]  # random weights say nothing of use
    assert extract.tokenizer.batch_decode(seen[0]["input_ids"], skip_special_tokens=True)[0] == (
        "<|System|>:You are a help assistant tasked with extracting the precise key answer from given output sentences."
        '\n<|User|>:Question: """Who {is} it?"""\n\nOutput sentences: """The answer is B."""\n\n'
        'Answer range: [["A", "a cat"], ["B", "because"], ["C", "Dublin."], ["D", "forty two"]]\n\n'
        "Key extracted answer: \n<|Bot|>:")


def test_sentence_embedder_pools_the_last_token_whatever_the_padding(helpers):
    embedder = tars.load_embedder(Config(embedder=str(helpers / "embedder"), aux_device="cpu"))
    texts = ["one plus two is three", "one", "one plus two is three. three"]
    for vector, text in zip(embedder(texts), texts, strict=True):
        with torch.no_grad():
            last = embedder.model(torch.tensor([embedder.tokenizer(text).input_ids])).last_hidden_state[0, -1]
        torch.testing.assert_close(vector, last / last.norm(), atol=1e-5, rtol=0)


def test_voice_speaks_every_letter_and_follows_its_seed(helpers):
    voice = data_prep.Voice(str(helpers / "voice"), "cpu")
    first, again, other = (voice.speak("Who? 7", seed) for seed in ((0, 1, 0), (0, 1, 0), (0, 1, 1)))
    assert first.ndim == 1 and torch.equal(first, again)
    assert first.shape != other.shape or not torch.equal(first, other)
    assert len(voice.tokenizer(data_prep.spell_out("Who? 7")).input_ids) == 2 * len("who seven") + 1


@pytest.mark.parametrize("language", [{}, {"language": "en", "task": "transcribe"}], ids=["English", "multilingual"])
def test_listener_hears_short_and_long_clips_and_is_told_that_they_are_english(helpers, tmp_path, language):
    shutil.copytree(helpers / "listener", path := tmp_path / "listener")
    settings = json.loads((path / "generation_config.json").read_text())
    more = {"is_multilingual": True, "lang_to_id": {"<|en|>": 260}, "task_to_id": {"transcribe": 262}}
    (path / "generation_config.json").write_text(json.dumps(settings | (more if language else {})))
    listener, heard = data_prep.Listener(str(path), "cpu"), []
    generate = listener.model.generate
    listener.model.generate = lambda **inputs: heard.append(inputs) or generate(**inputs)
    assert all(isinstance(listener.transcribe(torch.zeros(seconds * 16_000)), str) for seconds in (1, 30, 35))
    # 100 frames a second: a short clip is padded to one window of 30 s, of a long one nothing is cut off
    assert [x["input_features"].shape[-1] for x in heard] == [3000, 3000, 3500]
    assert [x["return_timestamps"] for x in heard] == [False, False, True]
    assert [int(x["attention_mask"].sum()) for x in heard] == [100, 3000, 3500]
    assert all({k: x[k] for k in ("language", "task") if k in x} == language for x in heard)


# ==== eval.py =========================================================================================================
def test_intervals_by_hand():
    # 8 of 10, z = 1.96: centre (0.8 + 0.19208) / 1.38416 = 0.7167, half 1.96 sqrt(0.016 + 0.009604) / 1.38416 = 0.2266
    assert evaluation.wilson(8, 10) == (pytest.approx(0.4901, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    # 1, 2, 3: mean 2, standard deviation sqrt(2 / 3), 1.96 * 0.8165 / sqrt(3) = 0.9240
    mean, half = evaluation.mean_and_interval(np.array([1.0, 2.0, 3.0]))
    assert (mean, half) == (2.0, pytest.approx(0.9240, abs=1e-4))
    assert evaluation.table({"base": {"MRR %": math.nan}}).split()[-1] == "-"  # of a base that is never right
    # Differences 2, 4, 6: mean 4, standard deviation 2, t of 2 degrees of freedom 4.30: 4.30 * 2 / sqrt(3) = 4.965.
    mean, half, wins = evaluation.paired_difference([2, 4, 6])
    assert (mean, wins) == (4, 3) and half == pytest.approx(4.965, abs=0.001)
    assert evaluation.paired_difference([-2.0]) == (-2, pytest.approx(math.nan, nan_ok=True), 0)


def test_eval_prints_table_1_keeps_every_answer_and_continues(small_demo, small_run, tmp_path):
    command = ("--model", small_demo / "model", "--adapter", small_run, "--data", small_demo / "test",
               small_demo / "val", "--eval-batch", 16, "--out", tmp_path / "eval")
    printed = here(evaluation, *command)
    files = sorted((tmp_path / "eval").iterdir())
    records = {f.name[: f.name.rfind("-")]: data_prep.read_lines(f)[1:] for f in files}
    assert set(records) == {"a-test", "a-val", "base-test", "base-val"}

    def mean(value, m, *names):  # over the records of a modality
        return np.mean([value(r) for name in names for r in records[name] if r["modality"] == m])

    for line in printed.splitlines()[2:]:
        row, sets = line.split(), ("base-test", "base-val") if line.startswith("base") else ("a-test", "a-val")
        share = {(m, name): 100 * mean(lambda r: r["right"], m, name) for name in sets for m in tars.MODALITIES}
        # columns: name; accuracy and interval of test A, test T, val A, val T; averages; unparsed; cut; tokens; MRR
        assert [float(row[i]) for i in (1, 4, 7, 10)] == pytest.approx([*share.values()], abs=0.051)
        average = [np.mean([share[m, name] for name in sets]) for m in tars.MODALITIES]
        assert [float(x) for x in row[-6:-4]] == pytest.approx(average, abs=0.051)
        told = (lambda r: 100 * (r["answer"] is None), lambda r: 100 * r["cut"], lambda r: r["tokens"])
        assert row[-4:-1] == ["/".join(f"{mean(value, m, *sets):.1f}" for m in tars.MODALITIES) for value in told]
        text = np.mean([100 * mean(lambda r: r["right"], "text", name) for name in ("base-test", "base-val")])
        assert float(row[-1]) == pytest.approx(100 * average[0] / text, abs=0.1)
    # stopped in the middle of a batch, in the middle of a line: the same file again
    whole = files[1].read_bytes()
    files[1].write_bytes(whole[: len(whole) // 2])
    assert here(evaluation, *command) == printed and files[1].read_bytes() == whole
    (small_run / "adapter_model.safetensors").touch()  # as if it were trained anew: its answers are made anew
    fixed = here(evaluation, *command, "--base-text-accuracy", 80).splitlines()
    assert float(fixed[-1].split()[-1]) == pytest.approx(average[0] / 0.8, abs=0.1)
    assert len(list((tmp_path / "eval").iterdir())) == 6


def test_kept_answers_belong_to_their_questions_and_weights_in_the_datas_order(small_demo, tmp_path):
    shutil.copytree(small_demo / "model", tmp_path / "model")
    args = SimpleNamespace(model=str(tmp_path / "model"), out=tmp_path / "eval")
    questions, seen = load_questions(small_demo / "val"), []

    def kept(questions):
        records = evaluation.cached_records("base", [args.model], "val", questions, answer, args, Config())
        return records, len(list((tmp_path / "eval").iterdir()))

    def answer(some):  # both modalities
        seen.extend(row["seconds"] for row in some)
        return [{"key": row["key"], "n": n} for row in some for n in range(2)]

    records, files = kept(questions)
    assert seen == sorted(seen) and len(set(seen)) > 1 and files == 1  # answered by length
    assert [(r["key"], r["n"]) for r in records] == [(key, n) for key in questions["key"] for n in range(2)]
    assert kept(load_questions(small_demo / "val")) == (records, 1) and len(seen) == 8  # nothing is answered again
    assert kept(questions.map(lambda row: {"options": row["options"][::-1]}))[1] == 2
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors[sorted(tensors)[0]].view(-1)[0] += 1
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    assert kept(questions)[1] == 3


def test_cascade_answers_what_was_heard(lm, questions, helpers, small_demo, tmp_path):
    heard, cfg = SimpleNamespace(transcribe=lambda waveform: "five minus one"), Config(max_new_tokens=5, eval_batch=3)
    reader = evaluation.cascade(lm, heard)
    spoken, written = ([r["completion"] for r in tars.answer_greedily(reader, questions, tars.extract_answers, cfg)
                        if r["modality"] == m] for m in tars.MODALITIES)
    ids = lm.tokenizer(lm.family.before_user + "five minus one" + lm.family.after_user, return_tensors="pt").input_ids
    expected = lm.model.generate(
        inputs_embeds=lm.embed_tokens(ids), do_sample=False, max_new_tokens=5, eos_token_id=lm.eos_ids.tolist(),
        attention_mask=torch.ones_like(ids), pad_token_id=0, suppress_tokens=lm.placeholder_ids.tolist())
    assert spoken == [lm.tokenizer.decode(expected[0], skip_special_tokens=True)] * 4
    own = [*tars.answer_greedily(lm, questions, tars.extract_answers, cfg)]  # and the model itself hears as before
    assert written == [r["completion"] for r in own[1::2]] and spoken != [r["completion"] for r in own[::2]]
    flags = ("--model", small_demo / "model", "--data", small_demo / "val", "--out", tmp_path / "eval")
    assert f"\ncascade of {helpers / 'listener'} " in here(evaluation, *flags, "--cascade", helpers / "listener")


def test_asr_asks_under_a_neutral_system_text(lm, small_demo, monkeypatch):
    asked, questions = [], load_questions(small_demo / "val")
    perfect = [f"<think>x</think><answer>{q['prompt_for_tts']}</answer>" for q in questions]
    monkeypatch.setattr(lm, "tokenizer", evaluation.byte_tokenizer(lm.family))  # the demo's cannot write the request
    monkeypatch.setattr(lm, "embed_tokens", torch.nn.Embedding(600, 128))
    monkeypatch.setattr(lm, "rollout", lambda prompts, *args, **kwargs: asked.extend(prompts) or ("ids", "mask", "cut"))
    monkeypatch.setattr(lm, "detokenize", lambda ids, mask: perfect)
    monkeypatch.setattr(SpeechLM, "from_pretrained", lambda path: lm)
    printed = here(evaluation, "--asr", "--model", small_demo / "model", "--data", small_demo / "val")
    assert printed.splitlines()[-1].split() == ["base", "0.0", "+-", "0.0"]  # a perfect transcript, tags and all
    neutral = lm.family.before_user.replace(tars.SYSTEM_PROMPT, "You are a helpful assistant.")
    system, end = (lm.embed_text(text, special=True) for text in (neutral, lm.family.after_user))
    request = torch.cat([lm.embed_text("Transcribe the audio clip into text."), end])
    assert len(asked) == 8 and torch.equal(asked[0][0][: len(system)], system)
    assert torch.equal(asked[0][0][-len(request) :], request)


def test_ask_answers_a_clip_or_a_written_question(small_demo, small_run, tmp_path):
    question = load_questions(small_demo / "test")[0]
    (tmp_path / "clip.wav").write_bytes(question["audio"]["bytes"])
    question["audio"]["bytes"] = data_prep.wav_bytes(decode(question["audio"]["bytes"]))  # converted as any clip
    asked = (tmp_path / "clip.wav", tars.written_question(question))
    printed = [here(evaluation, "--model", small_demo / "model", "--adapter", small_run, "--ask", x) for x in asked]
    lm, cfg = SpeechLM.from_pretrained(str(small_demo / "model")), Config(max_new_tokens=26)
    for name in ("base", small_run):
        for record, lines in zip(tars.answer_greedily(lm, [question], tars.extract_answers, cfg), printed, strict=True):
            assert f"{name}: {record['completion']}" in lines
        evaluation.load_adapter(lm, small_run)


def test_the_pages_lines_use_an_adapter_with_transformers_and_peft_alone(small_demo, small_run, tmp_path):
    pytest.importorskip("peft", reason="peft is not installed; it is needed for this test alone")
    page = (HERE / "docs" / "real.md").read_text()
    code = re.search(r"<!-- use what was trained -->\n```python\n(.*?)```", page, re.DOTALL)[1]
    assert "tars" not in "".join(re.findall("import.*", code)).replace("from tars import SYSTEM_PROMPT", "")
    question = load_questions(small_demo / "test")[0]
    (tmp_path / "clip.wav").write_bytes(question["audio"]["bytes"])
    places = {
        "Qwen/Qwen2.5-Omni-7B": small_demo / "model", '"runs/omni"': f'"{small_run}"',
        "clip.wav": tmp_path / "clip.wav", "runs/merged": tmp_path / "merged",
        "max_new_tokens=1024": "max_new_tokens=26",
        r"Which is heaviest?\n\nOption A: iron\nOption B: gold\nOption C: wood\nOption D: ice": tars.written_question(
            question).replace("\n", "\\n")}
    for place, here in places.items():
        assert code.count(place) == 1
        code = code.replace(place, str(here))
    printed = run("-c", code).splitlines()
    lm = SpeechLM.from_pretrained(str(small_demo / "model"))
    evaluation.load_adapter(lm, small_run)
    cfg = Config(max_new_tokens=26)
    assert printed[-2:] == [r["completion"] for r in tars.answer_greedily(lm, [question], tars.extract_answers, cfg)]
    merged, ids = SpeechLM.from_pretrained(str(tmp_path / "merged")), torch.arange(20).view(1, 2, 2, 5) % 20 + 8
    with torch.no_grad():
        ours, theirs = (forward(x, [question], ids, torch.ones_like(ids))[0] for x in (lm, merged))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_layer_cosines_teacher_force_the_text_answer_under_both_prompts(lm, questions):
    lm.eos_ids = torch.arange(20, len(lm.tokenizer), 6)  # answers of uneven lengths
    cosines = evaluation.layer_cosines(lm, questions, Config(max_new_tokens=6, eval_batch=3))
    assert cosines.shape == (4, 4)
    ids, mask, _ = lm.rollout(lm.embed_prompts(questions), 1, 6, temperature=0)
    assert len(set(mask[:, 1].sum(-1).flatten().tolist())) > 1
    for b in range(4):
        completion = ids[b, 1, 0, : int(mask[b, 1, 0].sum())].tolist()
        with torch.no_grad():
            states = [plain_forward(lm, questions[b], spoken, completion, output_hidden_states=True)
                      for spoken in (True, False)]
        for layer in range(4):
            speech, text = (output.hidden_states[layer + 1][0, P:].double() for P, output in states)
            expected = sum(cos(s, t) for s, t in zip(speech, text, strict=True)) / len(completion)
            assert cosines[b, layer].item() == pytest.approx(expected, abs=1e-4)


def test_figures_and_the_cosines_of_each_layer(small_demo, small_run, uninterrupted, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed; it is needed for figures alone")
    flags = ("--model", small_demo / "model", "--adapter", small_run, "--layers", "--limit", 8)
    printed = here(evaluation, *flags, "--plot", tmp_path / "layers.png")
    assert [line[:7] for line in printed.splitlines()[2:]] == ["layer 1", "layer 2", "layer 3", "layer 4"]
    here(evaluation, "--curves", small_run, uninterrupted, "--plot", tmp_path / "curves.png")
    for name in ("layers.png", "curves.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def finished_run(folder, seed, accuracies, content=None, **settings):
    """What a run leaves: evaluations after steps 2 and 4, of (speech, text); the base model has 40 and 100 %."""
    folder.mkdir(parents=True)
    config = dataclasses.asdict(Config(seed=seed, model=f"m{seed}", out=str(folder))) | settings
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "log.jsonl").write_text("".join(
        f'{{"step": {2 * n + 1}}}\n' + json.dumps({"step": 2 * n + 2, "eval_speech": speech, "eval_text": text}) + "\n"
        for n, (speech, text) in enumerate(accuracies)))
    summary = {"base_speech": 0.4, "base_text": 1.0, "content": content or [seed]}
    (folder / "summary.json").write_text(json.dumps(summary | dict(zip(tars.MODALITIES, accuracies[-1], strict=True))))
    return str(folder)


def test_compare_groups_runs_by_settings_and_pairs_them_by_seed(tmp_path):
    grpo = {"alpha": 0.0, "beta": 0.0}
    runs = [finished_run(tmp_path / f"{name}{seed}", seed, [(a, 1.0), (b, c)], **settings)
            for name, seed, settings, a, b, c in (
                ("grpo", 1, grpo, 0.5, 0.6, 1.0), ("grpo", 2, grpo, 0.4, 0.5, 0.9), ("tars", 1, {}, 0.6, 0.8, 1.0),
                ("tars", 2, {}, 0.6, 0.6, 0.8), ("tars", 3, {}, 0.6, 1.0, 1.0),
                ("sft", 1, grpo | {"method": "sft", "rounds": 1}, 0.6, 0.7, 1.0))]
    (tmp_path / "stopped").mkdir()
    printed = here(evaluation, "--compare", *reversed(runs), tmp_path / "stopped")
    assert f"{tmp_path}/stopped is left out" in printed
    rows = [re.split(r"  +", line.strip()) for line in printed.splitlines()]
    # Plain GRPO comes first; it ends at 60 and 50. TARS ends at 80, 60, 100, and is ahead by 20 and 10 on seeds 1 and
    # 2: 15 +- 12.71 * 7.071 / sqrt(2) = 63.55.
    assert ["(1) alpha 0, beta 0", "2", "55.0 +- 5.0", "95.0 +- 5.0", "-"] in rows
    tars_row = next(row for row in rows if row[0].endswith("alpha 1, beta 1"))
    assert tars_row[1:] == ["3", "80.0 +- 16.3", "93.3 +- 9.4", "+15.0 [-48.5, +78.5], 2 of 2"]
    curve = evaluation.accuracies(*evaluation.read_groups(runs[:1])["default"][1], "speech")  # base, steps 2 and 4
    assert curve.tolist() == pytest.approx([40, 50, 60])
    assert any(row[0].endswith(") method sft, rounds 1") for row in rows)  # alpha and beta mean nothing there
    assert ["3", "40.0 / 100.0", "-", "-", "100.0 / 100.0"] in rows
    for folder, content, settings in (("other base", [7], {"lr": 0.5}), ("the same again", [1], {})):
        other = finished_run(tmp_path / folder, 1, [(0.6, 1.0), (0.8, 1.0)], content, **settings)
        with pytest.raises(SystemExit, match=f"{folder} does not fit the other runs of seed 1"):
            evaluation.main(["--compare", *runs, other])


def test_explain_works_one_group_through_with_the_settings_of_a_run(small_demo, tmp_path):
    cfg = Config(model=str(small_demo / "model"), data=str(small_demo / "train"), embedder="ngrams", alpha=0.5,
                 beta=2.0, group_size=4, max_new_tokens=26, joint_norm=True, layers="2-3")
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(cfg)))
    number = r"([+-]?[\d.]+)"
    for flags, alpha, beta, half in (["--model", small_demo / "model", "--explain"], 10, 10, 4), (
        ["--explain", tmp_path], 0.5, 2, 2):
        printed = here(evaluation, *flags)
        assert max(map(len, printed.splitlines()[2:])) <= 100
        assert re.findall(r"(\w+)\(\)$", printed, re.M) == [
            "rollout", "base_reward", "pick_references", "representation_reward", "behavior_reward", "total_reward",
            "modality_advantages", "grpo_loss"]
        totals, advantages = (
            {name: tuple(map(float, x)) for name, *x in re.findall(form, printed, re.M)}
            for form in (rf"^  ([ST]\d)  {number} \+ {number} \* {number} \+ {number} \* {number} = {number}$",
                         rf"^  ([ST]\d)  {number} - {number} = {number}  "))
        assert set(totals) == set(advantages) == {f"{m}{s + 1}" for m in "ST" for s in range(half)}
        for name, (base, a, rep, b, beh, R) in totals.items():  # Eq. (2) and (7) as printed, to three decimals
            assert (a, b) == (alpha, beta) and base + a * rep + b * beh == pytest.approx(R, abs=0.012)
            mean = np.mean([x[-1] for other, x in totals.items() if half == 2 or other[0] == name[0]])
            assert advantages[name] == pytest.approx((R, mean, R - mean), abs=0.002)
            assert name[0] == "S" or rep == beh == 0
    layers = re.findall(r"(S\d)  cos.*layer 2 ([\d.]+)  layer 3 ([\d.]+)   mean of 2 layers ([\d.]+)", printed)
    for name, two, three, both in [(name, *map(float, cosines)) for name, *cosines in layers]:
        assert (two + three) / 2 == pytest.approx(both, abs=0.001) and totals[name][2] == both
    assert len(layers) == 2


def test_random_weights_rehearse_full_length_answers_without_a_download(tmp_path):
    config = tiny_qwen()[0].config
    config.text_config.vocab_size = 400
    config.save_pretrained(tmp_path)
    flags = ("--random-weights", tmp_path, "--audio-seconds", 2, "--questions-per-step", 2, "--max-new-tokens")
    head, _, second = here(evaluation, *flags, 7).splitlines()[-3:]
    assert head.split() == "step embed_prompts rollout score backward, rest total s tokens/s peak GiB".split()
    *phases, total, speed, _ = map(float, second.split()[1:])
    assert sum(phases) == pytest.approx(total, abs=0.05)
    assert 112 / (total + 0.01) - 1 < speed < 112 / (total - 0.01) + 1  # each of 2 x 8 answers has 7 tokens
    for step in here(evaluation, *flags, 40, "--mean-tokens", 4).splitlines()[-2:]:
        total, speed = map(float, step.split()[-3:-1])
        assert 1.3 < speed * total / 16 < 8  # the mean of 16 geometric lengths of mean 4, standard error 0.9


# ==== course/ =========================================================================================================
def test_the_sheet_is_the_project_without_the_method(tmp_path):
    run(HERE / "course" / "exercises.py", tmp_path / "sheet")
    for name, holes in (("tars.py", 14), ("course/baselines.py", 4)):
        whole, sheet = ((folder / name).read_text() for folder in (HERE, tmp_path / "sheet"))
        assert sheet.count("raise NotImplementedError(") == holes
        documented = [{n.name: ast.get_docstring(n) for n in ast.walk(ast.parse(text))
                       if isinstance(n, ast.FunctionDef)} for text in (whole, sheet)]
        assert documented[0].items() >= documented[1].items() and documented[1]["train_step" if holes > 4 else "main"]
        assert whole.count("\n    # 1.") == sheet.count("\n    # 1.") == 1  # numbered stages stay
    with pytest.raises(AssertionError, match="exists: give a new folder"):
        run(HERE / "course" / "exercises.py", tmp_path / "sheet")
    graded = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "course"],
                            cwd=tmp_path / "sheet", capture_output=True, text=True).stdout
    assert "12 failed" in graded and graded.count("still to be written: ") >= 12 and "Traceback" not in graded


@pytest.mark.parametrize("method, flags", [("sft", ["--rounds", "2"]), ("dpo", [])])
def test_baselines_train_as_a_run_that_eval_reads(small_demo, tmp_path, method, flags):
    here(baselines, method, *flags, "--model", small_demo / "model", "--out", tmp_path / "run", "--steps", 4,
         "--questions-per-step", 4, "--lr", 0.003, "--eval-every", 2)
    lines = data_prep.read_lines(tmp_path / "run" / "log.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4] and all(line["skipped"] == 0 for line in lines)
    assert lines[0]["loss"] > 0 and (method == "sft" or lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-5))
    lm = SpeechLM.from_pretrained(str(small_demo / "model"))
    evaluation.load_adapter(lm, tmp_path / "run")
    assert "no adapter" not in here(evaluation, "--model", small_demo / "model", "--adapter", tmp_path / "run",
                                       "--limit", 4, "--out", tmp_path / "eval")


def test_iterated_sft_samples_from_the_model_as_it_is_then(small_demo, monkeypatch):
    lm, questions = SpeechLM.from_pretrained(str(small_demo / "model")), [load_questions(small_demo / "train")[0]]
    weights = attach_lora(lm, 2, 4)
    cfg = baselines.BaselineConfig(steps=4, rounds=2, method="sft", max_new_tokens=26)
    drawn, sampler, calls = [], [], iter(range(9))
    monkeypatch.setattr(baselines, "offline_answers", lambda *args: drawn.append(weights[0][0, 0].item()) or [None])
    for step in range(4):
        for p in weights:
            p.data.fill_(1.0 + step)
        optimizer = torch.optim.SGD(weights, lr=0.0)
        baselines.offline_step(sampler, calls, lm, questions, None, None, optimizer, cfg, None)
    # The first round draws from the base model, LoRA at 0; the second from the weights after two steps.
    assert drawn == [0.0, 0.0, 3.0, 3.0] and weights[0][0, 0] == 4.0  # the trained weights are back


@slow
def test_speed_of_a_step(small_demo):
    """TARS against plain GRPO, in turn; prints the ratio."""
    lm = SpeechLM.from_pretrained(str(small_demo / "model"))
    cfg = tars.parse_config(["--model", str(small_demo / "model"), "--lr", "0", "--weight-decay", "0"])
    optimizer, rows = tars.make_trainable(lm, cfg), load_questions(cfg.data)
    questions = [rows[i] for i in range(16)]
    variants = {"tars": cfg, "grpo": dataclasses.replace(cfg, alpha=0.0, beta=0.0)}
    seconds = {name: [] for name in variants}
    for _ in range(16):  # the first round warms up
        for name, variant in variants.items():
            start, generator = time.perf_counter(), torch.Generator().manual_seed(0)
            tars.train_step(lm, questions, tars.embed_ngrams, tars.extract_answers, optimizer, variant, generator)
            seconds[name].append(time.perf_counter() - start)
    median = {name: float(np.median(s[1:])) for name, s in seconds.items()}
    print(f"\nTARS / GRPO {median['tars'] / median['grpo']:.3f}; seconds: {median}")
    assert median["tars"] < 1.044 * median["grpo"]  # the paper's own overhead, Table 8
