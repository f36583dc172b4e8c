"""The graders graded: three common mistakes of each function, and a piece of the sentence that each must get."""

import inspect
import math
import re
from types import SimpleNamespace

import baselines
import pytest
import test_exercises
import torch
import torch.nn.functional as F

import tars

right = SimpleNamespace(**vars(tars) | vars(baselines), lora=tars.LoRALinear.forward)


def changed(name, change):
    """train_step with another function in place of tars's `name`: change(what that one returns, *its arguments)."""
    def step(*args):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tars, name, lambda *a: change(getattr(right, name)(*a), *a))
            return right.train_step(*args)
    return step


def paired(change):
    """paired_rows with (mask, positions, predictors) changed."""
    return lambda lengths, is_token: change(*right.paired_rows(lengths, is_token))


FORM = r"(?s)<think>.*?</think>\s*<answer>.*?The answer is [ABCD][.:,].*</answer>"
MISTAKES = (
    (1, "base_reward", lambda acc, fmt, lam=0.5: lam * acc + fmt, "you weigh R_acc with it"),
    (1, "base_reward", lambda acc, fmt, lam=0.5: acc + 0.5 * fmt, "0.5 whatever it is"),
    (1, "base_reward", lambda acc, fmt, lam=0.5: acc * (1 + lam * fmt), "not a product"),
    (1, "format_reward", lambda text: float(bool(re.match(FORM, text.strip()))), "text after it"),
    (1, "format_reward", lambda text: float(bool(re.search(FORM, text.strip()))), "text before it"),
    (1, "format_reward", lambda text: float(bool(re.fullmatch(FORM, text.strip(), re.I))), "capitals too"),
    (2, "modality_advantages", lambda r, joint=False: right.modality_advantages(r, True), "--joint-norm"),
    (2, "modality_advantages", lambda r, joint=False: (r - r.mean(-1, True)) / r.std(-1, keepdim=True), "deviation"),
    (2, "modality_advantages", lambda r, joint=False: r.mean(-1, True) - r, "turn your sign"),
    (3, "token_weights", lambda mask, cut: mask / mask.sum(), "yours does"),
    (3, "token_weights", lambda mask, cut: mask * ~cut[..., None] / mask.sum(), "not counted either"),
    (3, "token_weights", lambda mask, cut: mask / mask.sum(-1, True) / len(mask), "each token of the batch the same"),
    (3, "grpo_loss", lambda new, old, A, w, *eps: right.grpo_loss(old, new, A, w, *eps), "upside down"),
    (3, "grpo_loss", lambda *args: -right.grpo_loss(*args), "minus the surrogate"),
    (3, "grpo_loss", lambda new, old, A, w, *eps: -(w * (new - old).exp() * A[:, None]).sum(), "yours is not"),
    (4, "pool_hidden_states", lambda h, mask: h.mean(-2), "you count prompt and padding"),
    (4, "pool_hidden_states", lambda h, mask: (h * mask[..., None]).sum(-2), "divide the sum"),
    (4, "pool_hidden_states", lambda h, mask: (h * mask[..., None]).mean(-2), "counted in the number"),
    (5, "representation_reward", lambda s, t, w=None: F.cosine_similarity(s, t, dim=-1).sum(-1), "their sum"),
    (5, "representation_reward", lambda s, t, w=None: right.representation_reward(s, t), "a weighted one"),
    (5, "representation_reward", lambda s, t, w=None: right.representation_reward(s, t)[..., 1:], "shape"),
    (6, "behavior_reward", lambda s, t: (s * t).sum(-1), "dot product"),
    (6, "behavior_reward", lambda s, t: right.behavior_reward(s, t.roll(1, 0)), "another's"),
    (6, "behavior_reward", lambda s, t: 1 - right.behavior_reward(s, t), "yours is a distance"),
    (6, "pick_references", lambda correct, g=None: right.pick_references(correct, g).clamp(min=0), "no reference: -1"),
    (6, "pick_references", lambda correct, g=None: right.pick_references(correct), "draw with `generator`"),
    (6, "pick_references", lambda c, g=None: right.pick_references(c, g)[:, :1].expand(-1, 4), "yours share one"),
    (7, "total_reward", lambda b, r, h, x=1.0, y=1.0: b + y * r + x * h, "the other way round"),
    (7, "total_reward", lambda b, r, h, x=1.0, y=1.0: b + r + h, "with weight 1"),
    (7, "total_reward", lambda b, r, h, x=1.0, y=1.0: x * r + y * h, "R_base is part"),
    (7, "modality_recovery_rate", lambda speech, text: speech / text, "in percent"),
    (7, "modality_recovery_rate", lambda speech, text: 100 * text / speech, "upside down"),
    (7, "modality_recovery_rate", lambda s, t: min(100.0, 100 * s / t) if t else math.nan, "above 100"),
    (8, "LoRALinear.forward", lambda self, x: right.lora(self, x) - self.linear(x), "W x is missing"),
    (8, "LoRALinear.forward", lambda self, x: self.linear(x) + x @ self.lora_A.T @ self.lora_B.T, "yours is not"),
    (8, "LoRALinear.forward", lambda self, x: right.lora(self, x) - right.lora(self, 0 * x), "has a bias"),
    (9, "paired_rows", paired(lambda sees, at, before: (torch.ones_like(sees), at, before)), "sees the future"),
    (9, "paired_rows", paired(lambda sees, at, before: (torch.ones_like(sees).tril(), at, before)), "another answer"),
    (9, "paired_rows", paired(lambda s, at, before: (s, torch.arange(9).expand(2, 9), before)), "start again"),
    (10, "train_step", changed("modality_advantages", lambda A, r, *_: r - r.mean((1, 2), True)), "over both"),
    (10, "train_step", changed("total_reward", lambda R, base, rep, *rest: R - rest[1] * rep), "R_rep is missing"),
    (10, "train_step", changed("grpo_loss", lambda loss, *args: -loss), "the other sign"),
    (11, "sft_loss", lambda logps, mask: -right.sft_loss(logps, mask), "minus the log-likelihood"),
    (11, "sft_loss", lambda logps, mask: -logps.mean(), "padding is counted"),
    (11, "sft_loss", lambda x, mask: -((x * mask).sum(-1) / mask.sum(-1)).mean(), "a mean of the answers' means"),
    (11, "offline_answers", lambda *args: [None for _ in right.offline_answers(*args)], "first correct written answer"),
    (11, "offline_answers", lambda *args: [[a[0][:-1]] for a in right.offline_answers(*args)], "end-of-turn"),
    (11, "offline_answers", lambda *args: right.offline_answers(*args)[::-1], "first correct"),
    (11, "offline_loss", lambda m, lm, p, *a: right.offline_loss(m, lm, [q[::-1] for q in p], *a), "the written one"),
    (12, "offline_loss", lambda m, lm, p, a, beta=0.1: right.offline_loss(m, lm, p, a, 0.1), "should be"),
    (12, "offline_loss", lambda m, lm, p, a, beta: right.offline_loss(m, lm, p, [x[::-1] for x in a], beta), "be"),
    (12, "dpo_loss", lambda c, r, bc, br, beta=0.1: right.dpo_loss(r, c, br, bc, beta), "yours is the rejected one"),
    (12, "dpo_loss", lambda c, r, bc, br, beta=0.1: right.dpo_loss(c, r, 0, 0, beta), "relative to the base"),
    (12, "dpo_loss", lambda c, r, bc, br, beta=0.1: right.dpo_loss(c, r, bc, br, 1.0), "beta is missing"),
)


@pytest.mark.parametrize("number, name, wrong, sentence", MISTAKES, ids=[f"{row[1]}: {row[3]}" for row in MISTAKES])
def test_a_common_mistake_gets_its_sentence(number, name, wrong, sentence, monkeypatch):
    owner = baselines if hasattr(baselines, name) else tars
    monkeypatch.setattr(*((tars.LoRALinear, "forward") if "." in name else (owner, name)), wrong)
    grader = next(f for title, f in vars(test_exercises).items() if title.startswith(f"test_exercise_{number:02}"))
    with pytest.raises(pytest.fail.Exception, match=re.escape(sentence)):
        grader(*[monkeypatch] * len(inspect.signature(grader).parameters))
