"""The loss of a step, against formulas written from full logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from grace.losses import gated_dkd_loss, rcka_loss
from grace.training import Collator
from grace.training.objective import gate_sum, linear_cross_entropy, linear_kd
from grace.training.step import model_inputs


@pytest.fixture
def batch(dataset: Any, processor: Any) -> dict[str, Tensor]:
    return Collator(processor)([dataset[item] for item in (0, 7, 13, 40)])


def _direct(trainer: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    inputs = {**model_inputs(batch), "output_hidden_states": True}
    student = trainer.model(**inputs)
    with torch.no_grad():
        teacher = trainer.teacher.model(**inputs)
    labels = batch["labels"]
    mask = batch["input_ids"] == trainer.model.config.image_token_id
    grid = torch.tensor([[1, 4, 4]] * len(labels))
    hidden = student.hidden_states[-2], teacher.hidden_states[-2]
    flat = functional.pad(labels[:, 1:], (0, 1), value=-100).flatten()
    return {
        "ce": functional.cross_entropy(student.logits.flatten(0, 1), flat),
        "gdkd": gated_dkd_loss(student.logits, teacher.logits, labels),
        "rcka": rcka_loss(*hidden, mask, None, grid, None, merge_size=1),
        "kd": 4
        * functional.kl_div(
            (student.logits.flatten(0, 1)[flat >= 0] / 2).log_softmax(-1),
            (teacher.logits.flatten(0, 1)[flat >= 0] / 2).log_softmax(-1),
            reduction="batchmean",
            log_target=True,
        ),
    }


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({}, {"ce": 1.0, "gdkd": 1.0, "rcka": 1.0}),
        ({"beta_init": 0.7, "omega": 2.0}, {"ce": 1.0, "gdkd": 0.7, "rcka": 2.0}),
        ({"omega": 2.0, "omega_warmup_steps": 4}, {"ce": 1.0, "gdkd": 1.0, "rcka": 0.5}),
        ({"omega": 0.0}, {"ce": 1.0, "gdkd": 1.0}),
        ({"distillation": "kd", "omega": 0.0}, {"ce": 1.0, "kd": 1.0}),
        ({"distillation": "none"}, {"ce": 1.0, "rcka": 1.0}),
        ({"distillation": "none", "omega": 0.0}, {"ce": 1.0}),
        ({"quantization": False}, {"ce": 1.0, "gdkd": 1.0, "rcka": 1.0}),
    ],
)
def test_the_loss_is_the_weighted_sum(
    make_trainer: Callable, batch: dict[str, Tensor], options: dict, weights: dict[str, float]
) -> None:
    reference = make_trainer(quantization=options.get("quantization", True))
    trainer = make_trainer(student=reference.model, **options)
    direct = _direct(reference, batch)
    expected = sum(weight * direct[name] for name, weight in weights.items())
    torch.testing.assert_close(trainer.compute_loss(trainer.model, dict(batch)), expected)


@pytest.mark.parametrize("keep_logits", [False, True])
def test_gradients_of_the_whole_loss(
    make_trainer: Callable, batch: dict[str, Tensor], keep_logits: bool
) -> None:
    trainer = make_trainer(keep_logits=keep_logits)
    names, parameters = zip(
        *[(n, p) for n, p in trainer.model.named_parameters() if p.requires_grad], strict=True
    )
    direct = _direct(trainer, batch)
    expected = torch.autograd.grad(direct["ce"] + direct["gdkd"] + direct["rcka"], parameters)
    actual = torch.autograd.grad(trainer.compute_loss(trainer.model, dict(batch)), parameters)
    for name, a, b in zip(names, actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_without_a_gate_all_tokens_weigh_the_same(
    make_trainer: Callable, batch: dict[str, Tensor]
) -> None:
    trainer = make_trainer(gate=False, omega=0.0)
    with torch.no_grad():
        logits = [m(**model_inputs(batch)).logits for m in (trainer.model, trainer.teacher.model)]
        gdkd = gated_dkd_loss(*logits, batch["labels"], gate=False)
        ce = _direct(make_trainer(student=trainer.model), batch)["ce"]
    torch.testing.assert_close(trainer.compute_loss(trainer.model, dict(batch)), ce + gdkd)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(13, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    teacher, teacher_head, labels = torch.randn(13, 6), torch.randn(15, 6), torch.arange(13) % 11

    def everything() -> list[Tensor]:
        ce = linear_cross_entropy(hidden, head, labels)
        kd = linear_kd(hidden, head, teacher, teacher_head, 2.0)
        gates = gate_sum(teacher, teacher_head, 11)
        return [ce, kd, gates, *torch.autograd.grad(ce + kd, [hidden, head])]

    whole = everything()
    monkeypatch.setattr("grace.training.objective.CHUNK_LOGITS", 40)
    torch.testing.assert_close(everything(), whole)


def test_gate_sum_is_the_ops_own() -> None:
    torch.manual_seed(0)
    teacher = torch.randn(9, 6)
    head = torch.randn(12, 6)
    ops = torch.ops.grace.gated_dkd(
        torch.randn(9, 10), teacher @ head.T, torch.arange(9), 2.0, 1.0, 4.0, -100
    )
    torch.testing.assert_close(gate_sum(teacher, head, 10), ops[1].sum())
