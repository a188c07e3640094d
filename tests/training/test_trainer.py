"""Accumulation, the controller, resume, and what happens when a number is not finite."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch

from grace.nn import FakeQuantLinear
from grace.training.optimizer import parameter_groups
from grace.training.step import identity
from grace.training.trainer import GraceTrainer


def _weights(trainer: GraceTrainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def _metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("options", [{}, {"gate": False}, {"distillation": "kd"}])
def test_accumulated_steps_equal_one_big_batch(
    make_trainer: Callable, tmp_path: Path, options: dict
) -> None:
    plain = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "ema_decay": 0.5}
    common = {**plain, **options}
    big = make_trainer(**common, per_device_train_batch_size=6, output_dir=str(tmp_path / "big"))
    small = make_trainer(
        **common,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        output_dir=str(tmp_path / "small"),
    )
    before = _weights(big)
    for trainer in (big, small):
        trainer.train()
    for name, value in _weights(small).items():
        torch.testing.assert_close(value, _weights(big)[name], rtol=1e-4, atol=2e-6)
    assert any(not torch.equal(before[name], value) for name, value in _weights(big).items())
    for a, b in zip(_metrics(tmp_path / "big"), _metrics(tmp_path / "small"), strict=True):
        for name in ("loss", "ce", "rcka", options.get("distillation", "gdkd"), "beta"):
            assert a[name] == pytest.approx(b[name], rel=1e-4), name


def test_the_controller_moves_once_an_optimizer_step(
    make_trainer: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(max_steps=3, gradient_accumulation_steps=4)
    updates, betas = [], []
    update, compute = trainer.controller.update, trainer.compute_loss

    def compute_loss(*args: Any, **kwargs: Any) -> Any:
        betas.append(trainer.controller.beta)
        return compute(*args, **kwargs)

    monkeypatch.setattr(trainer.controller, "update", lambda x: (updates.append(x), update(x)))
    monkeypatch.setattr(trainer, "compute_loss", compute_loss)
    trainer.train()
    assert len(updates) == 3
    assert len(betas) == 12
    assert [len(set(betas[step : step + 4])) for step in (0, 4, 8)] == [1, 1, 1]
    assert len(set(betas)) == 3


def test_beta_stays_where_it_is_fixed(make_trainer: Callable) -> None:
    trainer = make_trainer(adaptive_beta=False, beta_init=0.4)
    trainer.train()
    assert trainer.controller.beta == 0.4


def test_parameter_groups(make_trainer: Callable) -> None:
    trainer = make_trainer(weight_decay=0.05, learning_rate=1e-3, scale_lr_ratio=10.0)
    groups = {group["name"]: group for group in trainer.create_optimizer().param_groups}
    assert {n: (g["lr"], g["weight_decay"]) for n, g in groups.items()} == {
        "weights": (1e-3, 0.05),
        "norms": (1e-3, 0.0),
        "scales": (1e-2, 0.0),
    }
    layers = [m for m in trainer.model.modules() if isinstance(m, FakeQuantLinear)]
    assert {id(p) for p in groups["scales"]["params"]} == {id(layer.log_scale) for layer in layers}
    assert {id(layer.weight) for layer in layers} <= {id(p) for p in groups["weights"]["params"]}
    vision = {id(p) for p in trainer.model.model.vision_tower.parameters()}
    assert not vision & {id(p) for group in groups.values() for p in group["params"]}


def test_half_precision_students_get_fp32_masters(
    make_trainer: Callable, make_student: Callable
) -> None:
    trainer = make_trainer(student=make_student().to(torch.bfloat16))
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    make_trainer: Callable, tmp_path: Path, accumulation: int
) -> None:
    options = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": accumulation,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    whole = make_trainer(**options, output_dir=str(tmp_path / "whole"))
    whole.train()
    again = make_trainer(**options, output_dir=str(tmp_path / "again"))
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    for name, value in _weights(whole).items():
        assert torch.equal(value, again.model.state_dict()[name]), name
    assert whole.controller.state_dict() == again.controller.state_dict()
    last = [_metrics(tmp_path / folder)[-1] for folder in ("whole", "again")]
    for name in ("ce", "gdkd", "rcka", "beta", "grad_norm"):
        assert last[0][name] == last[1][name], name


def test_a_checkpoint_of_the_last_step_is_the_end(make_trainer: Callable, tmp_path: Path) -> None:
    """Killed between its last checkpoint and what comes behind it, a run makes no further step."""
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    whole = make_trainer(**options, output_dir=str(tmp_path / "whole"))
    whole.train()
    assert 0 < whole.state.epoch % 1 < 1  # inside an epoch
    again = make_trainer(**options, output_dir=str(tmp_path / "again"))
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert again.state.global_step == 2
    for name, value in _weights(whole).items():
        assert torch.equal(value, again.model.state_dict()[name]), name


def test_every_checkpoint_holds_beta(make_trainer: Callable, tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 1, "save_only_model": True, "max_steps": 3}
    trainer = make_trainer(**options)
    trainer.train()
    run = tmp_path / "run"
    states = [json.loads((run / f"checkpoint-{n}/grace_state.json").read_text()) for n in (1, 2, 3)]
    betas = [state["controller"]["beta"] for state in states]
    assert betas == [row["beta"] for row in _metrics(run)]
    assert len(set(betas)) == 3


def test_a_run_that_dies_while_saving_leaves_no_checkpoint(
    make_trainer: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(save_strategy="steps", save_steps=1, max_steps=2)
    save = trainer._save_rng_state

    def save_once(output: str) -> None:
        save(output) if trainer.state.global_step < 2 else 1 / 0

    monkeypatch.setattr(trainer, "_save_rng_state", save_once)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    folders = sorted(path.name for path in (tmp_path / "run").iterdir() if path.is_dir())
    assert folders == [".unfinished", "checkpoint-1"]


def test_a_checkpoint_of_another_model_is_refused(make_trainer: Callable, tmp_path: Path) -> None:
    make_trainer(save_strategy="steps", save_steps=2).train()
    other = make_trainer(quantization=False, output_dir=str(tmp_path / "other"))
    with pytest.raises(ValueError, match="checkpoint must hold the model's tensors"):
        other.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))


def test_a_term_that_is_not_finite_is_dropped_and_counted(
    make_trainer: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = make_trainer(distillation="none", omega=0.0, output_dir=str(tmp_path / "plain"))
    plain.train()
    trainer = make_trainer()
    with torch.no_grad():
        trainer.teacher.model.lm_head.weight.fill_(float("nan"))
        trainer.teacher.model.model.language_model.layers[0].mlp.up_proj.weight.fill_(torch.nan)
    trainer.train()
    assert trainer.dropped_terms == 4
    assert trainer.controller.state_dict()["ema"] is None
    for name, value in _weights(plain).items():
        torch.testing.assert_close(value, trainer.model.state_dict()[name], rtol=1e-4, atol=1e-5)
    assert _metrics(tmp_path / "run")[-1]["dropped_terms"] == 4


def test_a_cross_entropy_that_is_not_finite_stops_with_row_ids(make_trainer: Callable) -> None:
    trainer = make_trainer()
    with torch.no_grad():
        trainer.model.model.language_model.norm.weight.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match=r"must be finite, got nan in step 1, rows \[\d"):
        trainer.train()


def test_gradient_checkpointing_changes_nothing(make_trainer: Callable, tmp_path: Path) -> None:
    plain = make_trainer(output_dir=str(tmp_path / "plain"))
    checked = make_trainer(gradient_checkpointing=True)
    for trainer in (plain, checked):
        trainer.train()
    for name, value in _weights(plain).items():
        torch.testing.assert_close(value, checked.model.state_dict()[name])


def test_logits_never_exist_whole(make_trainer: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer()
    seen = []
    for model in (trainer.model, trainer.teacher.model):
        model.lm_head.register_forward_hook(lambda _, __, output: seen.append(output.shape[1]))
    trainer.train()
    assert set(seen) == {1}


def test_what_is_missing_or_unknown(make_trainer: Callable, make_student: Callable) -> None:
    arguments = make_trainer().args
    with pytest.raises(ValueError, match="GraceTrainer: teacher must be given"):
        GraceTrainer(make_student(), arguments)
    with pytest.raises(ValueError, match=r"must be of a known family .*, got 'Linear'"):
        GraceTrainer(torch.nn.Linear(2, 2), arguments, make_student())
    with pytest.raises(ValueError, match="group_size must divide in_features 16"):
        make_trainer(group_size=48)


def test_code_flips(make_trainer: Callable) -> None:
    trainer = make_trainer(learning_rate=0.0)
    trainer.train()
    assert trainer._drift.rates(identity)["code_flip_rate"] == 0.0
    layer = next(m for m in trainer.model.modules() if isinstance(m, FakeQuantLinear))
    with torch.no_grad():
        layer.weight.neg_()
    assert 0 < trainer._drift.rates(identity)["code_flip_rate"] < 1


def test_evaluation_is_the_same_loss(make_trainer: Callable, dataset: Any) -> None:
    trainer = make_trainer(adaptive_beta=False, per_device_eval_batch_size=len(dataset))
    batch = trainer.data_collator([dataset[item] for item in range(len(dataset))])
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, batch)
    assert trainer.evaluate(dataset)["eval_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert trainer.controller.state_dict()["ema"] is None


def test_the_cache_stays_on_for_who_loads_the_student(
    make_trainer: Callable, make_student: Callable
) -> None:
    assert "use_cache" not in vars(make_trainer().model.config)
    student = make_student()
    student.config.use_cache = True
    assert make_trainer(student=student).model.config.use_cache is True


def test_heads_are_multiplied_in_autocast_s_dtype(make_trainer: Callable, dataset: Any) -> None:
    plain, half = make_trainer(), make_trainer(bf16=True)
    batch = plain.data_collator([dataset[item] for item in range(4)])
    losses = [trainer.compute_loss(trainer.model, dict(batch)).item() for trainer in (plain, half)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert losses[0] != losses[1]
    half.train()
    assert {p.dtype for p in half.model.parameters()} == {torch.float32}


def test_vectors_of_any_name_do_not_decay() -> None:
    model = families.qwen2_5_vl()
    options = {"learning_rate": 1.0, "weight_decay": 0.1, "scale_lr_ratio": 10.0}
    groups = {group["name"]: group["params"] for group in parameter_groups(model, **options)}
    assert {p.dim() for p in groups["norms"]} == {1}
    assert min(p.dim() for p in groups["weights"]) == 2
    assert id(model.model.visual.merger.ln_q.weight) in {id(p) for p in groups["norms"]}
