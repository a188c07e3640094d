"""What is known of a step before its forwards, and what the step makes no more than once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from grace.nn import FakeQuantLinear
from grace.nn import quantize_ahead as ahead
from grace.training.trainer import GraceTrainer


def _weights(trainer: GraceTrainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_accumulation_steps": 2},
        {"gradient_checkpointing": True, "bf16": True},
    ],
)
def test_holding_quantized_weights_changes_nothing(
    make_trainer: Callable, tmp_path: Path, options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = make_trainer(**options, hold_quantized=False, output_dir=str(tmp_path / "plain"))
    held = make_trainer(**options, hold_quantized=True, output_dir=str(tmp_path / "held"))
    plain.train()
    made: list[int] = []
    original = ahead._quantize

    def counted(layers: list[FakeQuantLinear], dtype: torch.dtype | None) -> None:
        made.append(len(layers))
        original(layers, dtype)

    monkeypatch.setattr(ahead, "_quantize", counted)
    held.train()
    for name, value in _weights(plain).items():
        assert torch.equal(value, held.model.state_dict()[name]), name
    micro_batches = 2 * options.get("gradient_accumulation_steps", 1)
    assert sum(made) == micro_batches * len(held.quantized)
    layers = [m for m in held.model.modules() if isinstance(m, FakeQuantLinear)]
    assert all(layer.ahead is None and not layer.held for layer in layers)


def test_held_weights_go_when_a_step_fails(make_trainer: Callable) -> None:
    trainer = make_trainer(hold_quantized=True)
    with torch.no_grad():
        trainer.model.model.language_model.norm.weight.fill_(float("inf"))
    with pytest.raises(FloatingPointError):
        trainer.train()
    layers = [m for m in trainer.model.modules() if isinstance(m, FakeQuantLinear)]
    assert all(layer.ahead is None and not layer.held for layer in layers)


def test_the_teacher_s_head_sees_supervised_tokens_alone(
    make_trainer: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer()
    rows: list[tuple[int, int]] = []
    original = torch.ops.grace.linear_gated_dkd

    def seen(student: torch.Tensor, _: object, teacher: torch.Tensor, *rest: object) -> object:
        rows.append((student.shape[0], teacher.shape[0]))
        return original(student, _, teacher, *rest)

    monkeypatch.setattr(torch.ops.grace, "linear_gated_dkd", seen)
    batch = trainer.data_collator([trainer.train_dataset[item] for item in range(4)])
    trainer.compute_loss(trainer.model, batch)
    supervised = int((batch["labels"][:, 1:] != -100).sum())
    assert rows == [(supervised, supervised)]
    assert supervised < batch["labels"].numel() / 4


def test_overrides_reach_the_layers(make_trainer: Callable) -> None:
    overrides = {"proj$": {"bits": 8}, "down_proj$": {"bits": 3, "group_size": -1}, "o_proj": None}
    trainer = make_trainer(overrides={**overrides, "lm_head": None})
    by_name = {
        name: module
        for name, module in trainer.model.named_modules()
        if isinstance(module, FakeQuantLinear)
    }
    assert set(by_name) == set(trainer.quantized)
    for name, layer in by_name.items():
        expected = (3, -1) if name.endswith("down_proj") else (8, 16)
        assert (layer.bits, layer.group_size) == expected
    left = [n for n, m in trainer.model.named_modules() if type(m) is nn.Linear and "o_proj" in n]
    assert left
    trainer.train()
