"""Graders of the exercises: `python -m pytest -q course` in a sheet says in a sentence what is wrong with a function.

Numbers are worked out by hand or in loops. A wrong value that a common mistake gives gets that mistake's sentence.
"""

import math

import baselines  # finds the project's folder
import pytest
import torch
import torch.nn.functional as F

import tars
import test_tars
from tars import TEXT, Config, LoRALinear, Qwen25Omni, SpeechLM, attach_lora
from test_tars import cos, four_answers, four_questions, perturb, plain_logps, random_, tiny_qwen, uncut


def teach(holds, sentence):
    """End the exercise with a sentence unless `holds`."""
    if not holds:
        pytest.fail(sentence, pytrace=False)


def same(given, wanted):
    """Whether two numbers or tensors are equal up to rounding, NaN to nothing."""
    given, wanted = (torch.as_tensor(x).detach().double() for x in (given, wanted))
    return given.shape == wanted.shape and torch.allclose(given, wanted, atol=1e-5, rtol=1e-4)


def compare(given, wanted, what, mistakes=None):
    """Nothing if `given` is `wanted`; else the sentence of the mistake whose value (or function) it is, or both."""
    if same(given, wanted):
        return
    for sentence, value in (mistakes or {}).items():
        teach(not same(given, value() if callable(value) else value), sentence)
    given, wanted = (torch.as_tensor(x).detach().double() for x in (given, wanted))
    teach(given.shape == wanted.shape, f"{what}: should be of shape {list(wanted.shape)}, yours {list(given.shape)}")
    place = torch.isclose(given, wanted, atol=1e-5, rtol=1e-4).logical_not().nonzero()[0].tolist()
    should, yours = (round(x[tuple(place)].item(), 4) for x in (wanted, given))
    teach(False, f"{what}{f' at {place}' if place else ''}: should be {should}, yours {yours}")


def test_exercise_01_base_reward_and_format_reward():
    acc, fmt = torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.tensor([1.0, 0.0, 1.0, 0.0])
    compare(tars.base_reward(acc, fmt, 0.2), [1.2, 1.0, 0.2, 0.0], "Eq. (3)", {
        "lambda weighs R_fmt, and you weigh R_acc with it": 0.2 * acc + fmt,
        "lambda is an argument: you use 0.5 whatever it is": acc + 0.5 * fmt,
        "a wrong answer earns its format too: Eq. (3) is a sum, not a product": acc * (1 + 0.2 * fmt)})
    whole = "<think>a\nb</think>\n<answer>So. The answer is B: gold.</answer>"
    for completion, wanted, sentence in (
        (f" {whole}\n", 1.0, "white space may stand around, and text around `The answer is B:` within the answer"),
        (f"so {whole}", 0.0, "the whole completion must match: yours allows text before it"),
        (f"{whole} ok", 0.0, "the whole completion must match: yours allows text after it"),
        (whole.replace("</think>", ""), 0.0, "the thought ends before the answer begins"),
        ("<think>The answer is B.</think><answer>No idea.</answer>", 0.0, "the letter stands in the answer"),
        (whole.replace("B:", "Bob:"), 0.0, "A, B, C or D is the answer, and `.`, `:` or `,` follows the letter"),
        (whole.replace("B:", "b:"), 0.0, "the words and the letter count as they are written, capitals too")):
        teach(tars.format_reward(completion) == wanted, sentence)


def test_exercise_02_modality_advantages():
    rewards = random_(3, 2, 4) * torch.tensor([[1.0], [3.0]]) + torch.tensor([[0.0], [5.0]])  # [B, M, G/2]
    wanted = torch.stack([torch.stack([row - sum(row) / len(row) for row in question]) for question in rewards])
    joint = torch.stack([question - sum(question.flatten()) / 8 for question in rewards])
    compare(tars.modality_advantages(rewards), wanted, "Eq. (7)", {
        "advantages of a modality sum to 0 in each group; yours over both modalities: that is --joint-norm": joint,
        "the mean is that of a question's own answers; yours goes over the questions": rewards - rewards.mean(0),
        "an answer that is better than the mean has a positive advantage: turn your sign": -wanted,
        "GRPO divides by the standard deviation, Eq. (7) does not": wanted / rewards.std(-1, keepdim=True)})
    compare(tars.modality_advantages(rewards, joint=True), joint, "Eq. (7) with joint=True", {
        "with joint=True there is one mean over both modalities of a question; yours has one for each": wanted})


def test_exercise_03_token_weights_and_grpo_loss():
    mask, cut = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]]), torch.tensor([False, True])
    compare(tars.token_weights(mask, uncut(mask)), mask / 5, "token_weights", {
        "padding is counted: divide by the completion tokens alone": mask / 8,
        "GRPO gives each answer the same weight; DAPO gives each token of the batch the same":
            mask / mask.sum(-1, keepdim=True) / 2})
    compare(tars.token_weights(mask, cut), [[0.25] * 4, [0] * 4], "token_weights with a cut answer", {
        "a cut answer weighs nothing in the loss: yours does": mask / 5,
        "the tokens of a cut answer are not counted either": mask * torch.tensor([[1], [0]]) / 5})
    none = tars.token_weights(mask, torch.tensor([True, True]))
    teach(same(none, 0 * mask), "if all answers are cut, the weights are 0, not NaN")

    def loss(ratio, advantage, *eps):  # of one token
        logp = torch.tensor([[math.log(ratio)]])
        return tars.grpo_loss(logp, torch.zeros(1, 1), torch.tensor([advantage]), torch.ones(1, 1), *eps)

    compare(loss(1.1, 2.0), -2.2, "grpo_loss", {
        "the ratio is pi / pi_old; yours is upside down": -2 / 1.1,
        "the loss is minus the surrogate: descent must make good answers more likely": 2.2})
    compare(loss(2.0, 1.0), -1.28, "grpo_loss, ratio 2, advantage 1", {
        "a ratio above 1 + eps_high is clipped; yours is not, or you take the larger product": -2.0,
        "above, the ratio is clipped at 1 + eps_high; you use eps_low on both sides": -1.2})
    for advantage, wanted in ((1.0, -0.5), (-1.0, 0.8)):
        compare(loss(0.5, advantage), wanted, f"grpo_loss, ratio 0.5, advantage {advantage:g}", {
            "of both products the smaller counts, whatever the sign": -0.8 if advantage > 0 else 0.5})
    compare(loss(2.0, 1.0, 0.3, 0.4), -1.4, "grpo_loss with eps_high 0.4", {
        "eps_low and eps_high are arguments: you use 0.2 and 0.28 whatever they are": -1.28})
    logps, old, advantages = random_(2, 4).requires_grad_(), random_(2, 4, seed=1), random_(2, seed=2)
    value, gradient = test_tars.loss_by_loop(logps, old, advantages, mask, 0.2, 0.28)
    given = tars.grpo_loss(logps, old, advantages, mask / 5)
    compare(given, value, "grpo_loss of two answers", {
        "the weights sum to 1 over all tokens: the loss is the weighted sum, not its mean": value / 8})
    given.backward()
    compare(logps.grad, gradient, "the gradient", {"no gradient reaches the log-probs": torch.zeros(2, 4)})


def test_exercise_04_pool_hidden_states():
    hidden = torch.tensor([[[100.0, 100.0], [2.0, 12.0], [4.0, 4.0], [50.0, 60.0]]])  # [1, T, H]
    compare(tars.pool_hidden_states(hidden, torch.tensor([[0, 1, 1, 0]])), [[3.0, 8.0]], "Eq. (4)", {
        "the mean goes over generated positions alone: you count prompt and padding": hidden.mean(1),
        "prompt and padding are left out of the sum, but counted in the number of positions": [[1.5, 4.0]],
        "Eq. (4) is a mean: divide the sum by the number of generated positions": [[6.0, 16.0]],
        "all tokens of the mask count, the end-of-turn too: yours leaves out the last": [[2.0, 12.0]]})
    hidden, lengths = random_(3, 5, 4), torch.tensor([5, 1, 0])
    mask = (torch.arange(5) < lengths[:, None]).long()  # [3, 5]
    means = torch.stack([sum(x[:n]) / n if n else 0 * x[0] for x, n in zip(hidden, lengths, strict=True)])
    compare(tars.pool_hidden_states(hidden, mask), means, "Eq. (4) of three answers, one without tokens: 0, not NaN;", {
        "each answer is divided by its own length: yours by that of the longest": means * lengths[:, None] / 5})


def test_exercise_05_representation_reward():
    speech, text = random_(2, 3, 4, 6), random_(2, 3, 4, 6, seed=1)  # [B, G/2, L, H]
    text = text * torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    cosines = torch.tensor([[[cos(*layers) for layers in zip(*pair, strict=True)] for pair in zip(*both, strict=True)]
                            for both in zip(speech, text, strict=True)])  # [B, G/2, L]
    joined = torch.stack([F.cosine_similarity(a.flatten(1), b.flatten(1)) for a, b in zip(speech, text, strict=True)])
    compare(tars.representation_reward(speech, text), cosines.mean(-1), "Eq. (5)", {
        "Eq. (5) is a mean over the layers: you return their sum": cosines.sum(-1),
        "take the cosine of each layer and then the mean; you join all layers' states": joined,
        "all L layers count; yours leaves out the first: the embedding is not among them": cosines[..., 1:].mean(-1)})
    weights = torch.tensor([0.0, 0.2, 0.8, 0.0]).double()
    compare(tars.representation_reward(speech, text, weights), 0.2 * cosines[..., 1] + 0.8 * cosines[..., 2],
            "Eq. (5) with weights", {"`weights`, where they are given, make the mean a weighted one": cosines.mean(-1)})
    alone = tars.representation_reward(speech, 0 * text)
    teach(same(alone, torch.zeros(2, 3)), "without a reference the states are 0, and so is the cosine, not NaN")


def test_exercise_06_behavior_reward_and_pick_references():
    speech, text = random_(2, 3, 6), random_(2, 3, 6, seed=1)  # [B, G/2, D]
    wanted, others = (torch.tensor([[cos(speech[b, s], x[b, s]) for s in range(3)] for b in range(2)])
                      for x in (text, text.roll(1, 0)))
    compare(tars.behavior_reward(speech, text), wanted, "Eq. (6)", {
        "a cosine divides by both lengths: yours is the dot product": (speech * text).sum(-1),
        "the reward is high where answers mean the same: yours is a distance": 1 - wanted,
        "each spoken answer has its own reference: yours are compared with another's": others})
    alone = tars.behavior_reward(speech, 0 * text)
    teach(same(alone, torch.zeros(2, 3)), "without a reference the embedding is 0, and so is the cosine, not NaN")
    correct = torch.tensor([[True, False, True, True], [False] * 4, [True, False, False, False]])
    draws = torch.stack([tars.pick_references(correct, torch.Generator().manual_seed(i)) for i in range(300)])
    teach(draws.shape == (300, 3, 4) and draws.dtype == torch.long, "one index for each spoken answer, long [B, G/2]")
    teach((draws[:, 1] == -1).all(), "a group without a correct written answer has no reference: -1")
    teach(((draws[:, 0] != 1) & (draws[:, 0] >= 0)).all() and (draws[:, 2] == 0).all(),
          "a reference is a correct written answer of the same question, an index from 0 to G/2 - 1")
    teach((draws[:, 0] != draws[:1, 0]).any(), "references are drawn at random: yours are always the same")
    teach((draws[:, 0, 0] != draws[:, 0, 1]).any(), "each spoken answer draws a reference of its own: yours share one")
    counts = torch.stack([(draws[:, 0] == r).sum(0) for r in (0, 2, 3)])  # [3, 4], of 300
    teach(60 < counts.min() and counts.max() < 140, "each correct written answer is drawn equally often")
    again = torch.stack([tars.pick_references(correct, torch.Generator().manual_seed(i)) for i in range(20)])
    teach(torch.equal(again, draws[:20]), "draw with `generator`, or a run cannot be repeated")


def test_exercise_07_total_reward_and_modality_recovery_rate():
    base, rep, beh = (torch.tensor([x]) for x in (1.5, 0.8, 0.6))
    compare(tars.total_reward(base, rep, beh, 0.5, 2.0), [1.5 + 0.4 + 1.2], "Eq. (2)", {
        "alpha weighs R_rep and beta R_beh: you have them the other way round": [1.5 + 1.6 + 0.3],
        "alpha and beta are arguments: you add both rewards with weight 1": [2.9],
        "R_base is part of the reward": [1.6]})
    compare(tars.modality_recovery_rate(71.30, 77.70), 91.763192, "Eq. (1)", {
        "the rate is in percent": 0.91763192, "speech accuracy over text accuracy: yours is upside down": 108.976157})
    compare(tars.modality_recovery_rate(79.80, 79.44), 100.453172, "Eq. (1)", {
        "a trained model can hear better than its backbone reads: the rate may be above 100": 100.0})
    teach(math.isnan(tars.modality_recovery_rate(0.5, 0.0)), "where nothing is right in writing there is no rate: NaN")


def test_exercise_08_lora():
    linear = torch.nn.Linear(3, 2)
    lora, x = LoRALinear(linear, rank=2, alpha=8), random_(5, 3).float()
    frozen = x @ linear.weight.T + linear.bias  # [5, out]
    lora.lora_B.data = random_(2, 2, seed=1).float()
    update = x @ lora.lora_A.T @ lora.lora_B.T  # [5, out]
    compare(lora(x), frozen + 4 * update, "LoRA", {
        "W x is missing": 4 * update, "the update is scaled by alpha / r: yours is not": frozen + update,
        "the frozen layer has a bias, as q, k and v of Qwen have: call it": frozen - linear.bias + 4 * update,
        "the update is scaled by alpha / r: you multiply by alpha": frozen + 8 * update})
    lora(x).sum().backward()
    teach(lora.lora_A.grad is not None, "A and B are what is trained: no gradient reaches them")
    lora = LoRALinear(torch.nn.Linear(2, 1, bias=False).bfloat16(), rank=1, alpha=1)
    lora.linear.weight.data.zero_()
    lora.lora_A.data, lora.lora_B.data = torch.tensor([[1 + 2**-10, -1.0]]), torch.tensor([[1.0]])
    y = lora(torch.ones(2, dtype=torch.bfloat16))
    teach(y.dtype == torch.bfloat16 and y.item() == 2**-10,
          "A and B are float32 beside bfloat16 weights: compute the update in float32, then cast it to x's type")


def test_exercise_09_paired_rows():
    # A spoken prompt of 2 tokens with answers of 2 and 1, a written one of 1 with answers of 1 and 1, one of padding.
    is_token = torch.tensor([[[2, 1], [1, 1]], [[2, 2], [1, 1]]])[..., None] > torch.arange(2)
    sees, positions, predictor = tars.paired_rows(torch.tensor([[2, 1], [1, 2]]), is_token)
    teach(sees.shape == (2, 1, 9, 9) and sees.dtype == torch.bool, "the mask is bool [b, 1, T, T], True where one sees")
    first = sees[0, 0]  # [T, T]
    for holds, sentence in (
        (first.diagonal().all(), "each token sees itself, padding too: a softmax over nothing is NaN"),
        (not first.triu(1).any(), "a token sees what stands before it: yours sees the future"),
        (not first[4, 2:4].any() and not first[7, 6], "an answer does not see another answer to the same prompt"),
        (not first[5:8, :5].any(), "the written prompt and its answers see nothing of the spoken ones"),
        (first[2:5, :2].all() and first[6:8, 5].all(), "an answer sees the whole of its own prompt")):
        teach(holds, sentence)
    prompt, parts = (0, 0, 0, 3, 3, 3, 6), ((0, 0, 1, 1, 2, 3, 4, 5, 6), (0, 1, 1, 2, 2, 3, 3, 4, 5))
    wanted = [[[j <= i and of[j] in (of[i], prompt[of[i]]) for j in range(9)] for i in range(9)] for of in parts]
    compare(sees[:, 0].long(), torch.tensor(wanted).long(), "who sees whom", {
        "each question has lengths, and so a mask, of its own": sees[:1, 0].long().expand(2, -1, -1)})
    real = torch.tensor(parts) < 6  # [b, T]; where padding stands does not matter
    compare(positions * real, [[0, 1, 2, 3, 2, 0, 1, 1, 0], [0, 1, 2, 1, 2, 0, 1, 2, 2]], "position ids", {
        "positions start again: each prompt begins at 0, an answer goes on from its prompt": torch.arange(9) * real,
        "an answer goes on from the positions of its prompt: yours start at 0":
            [[0, 1, 0, 1, 0, 0, 0, 0, 0], [0, 0, 1, 0, 1, 0, 1, 0, 0]],
        "each answer goes on from its prompt, and not from the answer beside it":
            [[0, 1, 2, 3, 4, 0, 1, 2, 0], [0, 1, 2, 3, 4, 0, 1, 2, 3]]})
    compare(predictor, [[-1, -1, 1, 2, 1, -1, 5, 5, -1], [-1, 0, 1, 0, 3, -1, -1, 6, 6]], "what predicts each token", {
        "an answer's first token is predicted by the prompt's last, not by what stands beside it":
            [[-1, -1, 1, 2, 3, -1, 5, 6, -1], [-1, 0, 1, 2, 3, -1, -1, 6, 7]],
        "a token is predicted by the one before it, not by itself":
            [[-1, -1, 2, 3, 4, -1, 6, 7, -1], [-1, 1, 2, 3, 4, -1, -1, 7, 8]]})


def test_exercise_10_train_step(monkeypatch):
    lm, questions = SpeechLM(Qwen25Omni, *tiny_qwen()), four_questions()
    parameters, answers = perturb(attach_lora(lm, 8, 32)), four_answers(lm)
    for tensor in answers:  # the right written answer is the second, the first, the second, the first
        tensor[[1, 3], 1] = tensor[[1, 3], 1].flip(1)
    cut = uncut(answers[1])
    cut[0, 0, 1] = cut[2, TEXT, 1] = True  # the second is the right written answer of the third question

    def graded(condition, **settings):
        """One step with some settings against the straightforward one, stage by stage."""
        cfg = Config(**settings)
        _, group, drawn, gradients = test_tars.one_step(  # the rate is 0: the weights stay as they are
            lm, questions, answers, cut, monkeypatch, parameters, lr=0.0, max_new_tokens=40, **settings)
        compare(drawn, [[1, 1], [0, 0], [-1, -1], [0, 0]],
                "stage 3: references are correct written answers that are not cut; the drawn index")

        def wanted(cut=cut, **other):
            gradient, terms = test_tars.straightforward_step(lm, questions, answers, cut, drawn,
                                                             Config(**settings | other), parameters)
            return torch.cat([g.flatten() for g in gradient]), terms

        gradient, terms = wanted()
        base, rep, beh, reward = (terms[name] for name in ("base", "rep", "beh", "reward"))
        known = {"base": {"R_fmt is missing in R_base": terms["acc"]},
                 "reward": {"R_rep is missing in the reward": base + cfg.beta * beh,
                            "R_beh is missing in the reward": base + cfg.alpha * rep},
                 "advantage": {"advantages are centred within each modality; yours over both together":
                                   reward - reward.mean((1, 2), keepdim=True)}}
        for name, stage in (("acc", 3), ("base", 3), ("beh", 3), ("rep", 5), ("reward", 5), ("advantage", 6)):
            shown = [[answer.get(name, math.nan) for answer in group[m]] for m in tars.MODALITIES]
            compare(shown, terms[name][0], f"stage {stage}{condition}: {name} of the first question, [speech, text],",
                    {sentence: value[0] for sentence, value in known.get(name, {}).items()})
        teach(len(gradients) == 1, f"one update a roll-out: yours has {len(gradients)}")
        updated = torch.cat([g.flatten() for g in gradients[0]])
        teach(updated.any(), "the gradient is 0: call backward(), and detach the old log-probs, or the ratio's cancels")
        compare(updated, gradient, f"stage 7{condition}: rewards and advantages are right, the gradient is not,", {
            "a cut answer must not be learnt from: its tokens weigh 0": lambda: wanted(uncut(answers[1]))[0],
            "the gradient has the other sign: the optimizer descends": -gradient,
            "log-probs are those of the roll-out's temperature: yours are of temperature 1":
                lambda: wanted(temperature=1.0)[0]})
        teach(all(p.grad is None or not p.grad.any() for p in parameters), "optimizer.zero_grad() after the update")

    graded("")
    graded(" with a question a micro-batch", tokens_per_micro_batch=1)
    graded(" with other settings than the paper's", alpha=0.7, beta=1.9, lam=0.3, layers="2-3", joint_norm=True,
           temperature=0.7)


def baseline_case():
    """A tiny model with LoRA, questions, and to two of them a right written and a wrong spoken answer, ids [C]."""
    lm = SpeechLM(Qwen25Omni, *tiny_qwen())
    perturb(attach_lora(lm, 8, 32))
    ids, mask = four_answers(lm)  # [4, M, 2, C]
    return lm, four_questions(), [[ids[b, m, 1][mask[b, m, 1] == 1] for m in (1, 0)] for b in (0, 1)]


def test_exercise_11_sft(monkeypatch):
    logps, mask = torch.tensor([[-1.0, -2.0], [-6.0, -10.0]]), torch.tensor([[1, 1], [1, 0]])
    compare(baselines.sft_loss(logps, mask), 3.0, "sft_loss", {  # (1 + 2 + 6) / 3
        "the likelihood is to rise: the loss is minus the log-likelihood": -3.0, "padding is counted": 4.75,
        "the loss is one mean over all tokens, yours a mean of the answers' means": 3.75})
    lm, questions, pairs = baseline_case()
    given = baselines.offline_loss("sft", lm, lm.embed_prompts(questions[:2]), [pair[:1] for pair in pairs])
    spoken, written = (-torch.cat([plain_logps(lm, questions[b], m, pairs[b][0].tolist()) for b in (0, 1)]).mean()
                       for m in (True, False))
    compare(given, spoken, "offline_loss of SFT", {
        "answers are learnt under the spoken prompt; yours under the written one": written})
    given.backward()
    ids, mask = four_answers(lm)
    rollout = [ids[:2, 1:].repeat(1, 1, 2, 1), mask[:2, 1:].repeat(1, 1, 2, 1), uncut(mask[:2, 1:].repeat(1, 1, 2, 1))]
    monkeypatch.setattr(lm, "rollout", lambda prompts, *args: rollout)
    found = baselines.offline_answers("sft", lm, questions[:2], lm.embed_prompts(questions[:2]), tars.extract_answers,
                                      Config(), None)
    teach(None not in found and all(torch.equal(found[b][0], pairs[b][0]) for b in (0, 1)),
          "offline_answers: the first correct written answer, without padding, with its end-of-turn")


def test_exercise_12_dpo():
    values = [torch.tensor([x]) for x in (-10.0, -12.0, -20.0, -15.0)]  # 0.1 * ((-10 + 20) - (-12 + 15)) = 0.7
    compare(baselines.dpo_loss(*values), math.log(1 + math.exp(-0.7)), "dpo_loss", {
        "the chosen answer is to become more likely: yours is the rejected one": math.log(1 + math.exp(0.7)),
        "log-probs count relative to the base model's: yours do not": math.log(1 + math.exp(-0.2)),
        "beta is missing": math.log(1 + math.exp(-7.0))})
    lm, questions, pairs = baseline_case()
    given = baselines.offline_loss("dpo", lm, lm.embed_prompts(questions[:2]), pairs, beta=0.3)

    def margin(whole, q, pair):  # of a question: chosen minus rejected
        return whole(plain_logps(lm, q, True, pair[0].tolist())) - whole(plain_logps(lm, q, True, pair[1].tolist()))

    def wanted(whole=torch.sum):
        margins = [margin(whole, q, pair) for q, pair in zip(questions, pairs, strict=False)]
        with baselines.lora_weights(lm):
            margins = [m - margin(whole, q, pair) for m, q, pair in zip(margins, questions, pairs, strict=False)]
        return sum(math.log(1 + math.exp(-0.3 * m.item())) for m in margins) / 2

    compare(given, wanted(), "offline_loss of DPO", {
        "the base model is the model without LoRA: yours has it, and the loss is log 2": math.log(2),
        "the log-prob of an answer is the sum over its tokens; yours is their mean": lambda: wanted(torch.mean)})
    given.backward()
    teach(any(p.grad is not None for p in lm.decoder.parameters()), "no gradient reaches LoRA's weights")
