"""What a study's arms are, and how their learning rates are found."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from grace.quantization import decoder_linears
from grace.study import worker
from grace.study.arms import METHODS, Arm, arms_of
from grace.study.config import StudyConfig, SweepConfig
from grace.study.models import load, processor_of
from grace.study.run import run_study
from grace.study.sweep import choose, sweep_tasks, told
from grace.study.task import Task


def _task(config: StudyConfig, root: Path, arm: Arm, **options: Any) -> Task:
    return Task(arm, 0, config, root, **options)


def test_arms_are_what_they_are_called(config: StudyConfig, tmp_path: Path) -> None:
    every = replace(config, arms=tuple(METHODS), tuned={"grace": {"beta_init": 0.5}})
    made = {
        arm.name: worker.training_config(_task(every, tmp_path, arm))
        for arm in arms_of(every)
        if arm.trained
    }
    grace = made["grace-4"]
    assert (grace.distillation, grace.gate, grace.adaptive_beta) == ("gdkd", True, True)
    assert (grace.omega, grace.group_size, grace.beta_init) == (1.0, 16, 0.5)
    changed = {
        "grace-no-gate-4": {"gate"},
        "grace-no-rcka-4": {"omega"},
        "grace-fixed-beta-4": {"adaptive_beta"},
        "grace-per-channel-4": {"group_size"},
        "distil": {"quantization"},
    }
    for name, fields in changed.items():
        own, base = made[name].to_dict(), grace.to_dict()
        differ = {key for key in base if own[key] != base[key]}
        assert differ - {"output_dir", "logging_dir", "run_name"} == fields, name
    assert made["grace-no-gate-4"].gate is False
    assert made["grace-no-rcka-4"].omega == 0
    assert made["grace-per-channel-4"].group_size == -1
    assert made["qat-4"].distillation == made["control"].distillation == "none"
    assert not made["qat-4"].needs_teacher
    same = ("max_steps", "per_device_train_batch_size", "seed", "warmup_steps", "weight_decay")
    for name in same:
        assert len({getattr(options, name) for options in made.values()}) == 1, name


def test_calibrated_arms_ask_for_grace_ptq_on_training_images(
    done: Path, config: StudyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import ModuleType

    asked: dict[str, Any] = {}
    module: Any = ModuleType("grace.ptq")
    module.quantize = lambda model, **options: asked.update(options)
    task = _task(replace(config, calibration_images=6), done, Arm("awq", 4))
    model = load(task.model_dir("student"))
    monkeypatch.setitem(sys.modules, "grace.ptq", None)
    with pytest.raises(ValueError, match=r"must not have awq in this grace, .* no grace\.ptq"):
        worker._make(task, model)
    monkeypatch.setitem(sys.modules, "grace.ptq", module)
    assert worker._make(task, model) == 0
    batches = asked.pop("batches")
    assert asked == {"method": "awq", "bits": 4, "group_size": 16, "progress": False}
    assert sum(len(batch["input_ids"]) for batch in batches) == 6
    for batch in batches:
        assert (batch["input_ids"] != 0).all()  # no padding to be calibrated on
        assert batch["attention_mask"].shape[-1] == batch["input_ids"].shape[1]
        assert model(**batch).logits.isfinite().all()


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_asymmetric_arms_are_scored_fake_quantized(
    method: str, done: Path, config: StudyConfig, tmp_path: Path
) -> None:
    for name in ("data", "models"):
        (tmp_path / name).symlink_to(done / name)
    few = replace(config, calibration_images=6)
    results = {}
    for name in (method, f"{method}-asymmetric"):
        result = results[name] = worker.run_arm(_task(few, tmp_path, Arm(name, 4)))
        assert result is not None
        assert (result["arm"], result["deployed"]) == (f"{name}-4", name == method)
        assert result["score"]["questions"] == 72
    plain, other = (results[name]["bytes"] for name in results)
    student = load(done / "models" / "student")
    groups = sum(
        student.get_submodule(name).weight.numel() // 16 for name in decoder_linears(student)
    )
    assert other - plain == groups // 2  # a zero point of four bits a group


def test_the_sweep_takes_the_best_rate_of_the_validation_split(
    config: StudyConfig, tmp_path: Path
) -> None:
    every = replace(
        config,
        arms=("student", "control", "distil", "rtn", "qat", "grace", "grace-no-gate"),
        sweep=SweepConfig(learning_rates=(1e-4, 1e-3, 1e-2)),
        bits=(4, 2),
    )
    tasks = sweep_tasks(every, tmp_path, "cpu", None)
    assert len(tasks) == 4 * 3  # control, distil, qat, grace: as many candidates for each
    assert {task.split for task in tasks} == {"validation"}
    assert {task.arm.bits for task in tasks if task.arm.quantized} == {4}
    assert [worker.training_config(t).learning_rate for t in tasks[:3]] == [1e-4, 1e-3, 1e-2]
    totals = [1, 3, 2, 5, 5, 5, 1, 2, 3, 9, 8, 7]
    results = [
        {"score": {"total": total, "questions": 36}, "arm": task.arm.name}
        for total, task in zip(totals, tasks, strict=True)
    ]
    found = choose(every, results)
    chosen = [entry["chosen"] for entry in found.values()]
    assert chosen == [{"learning_rate": rate} for rate in (1e-3, 1e-4, 1e-2, 1e-4)]
    assert [entry["at_edge"] for entry in found.values()] == [[], *[["learning_rate"]] * 3]
    (tmp_path / "sweep.json").write_text(json.dumps(found))
    rates = {
        arm.name: worker.training_config(_task(every, tmp_path, arm)).learning_rate
        for arm in arms_of(every)
        if arm.trained
    }
    assert rates["qat-4"] == rates["qat-2"] == 1e-2
    assert rates["grace-2"] == rates["grace-no-gate-4"] == 1e-4
    assert (rates["control"], rates["distil"]) == (1e-3, 1e-4)
    assert any("grace-no-gate take the options of grace" in line for line in told(every))
    assert any("Nothing but learning rates is swept" in line for line in told(every))


def test_a_sweep_tries_weights_of_terms_with_the_same_budget(
    config: StudyConfig, tmp_path: Path
) -> None:
    kd = [{"learning_rate": 1e-3, "beta_init": 1.0}, {"learning_rate": 1e-3, "beta_init": 4.0}]
    grace = [{"learning_rate": 1e-3, "omega": 1.0}, {"learning_rate": 1e-4, "omega": 5.0}]
    every = replace(
        config,
        arms=("student", "distil", "qat", "kd", "grace", "grace-no-rcka"),
        ptq_from=("student",),
        bits=(4, 3, 2),
        sweep=SweepConfig((1e-4, 1e-3), {"kd": kd, "grace": grace}, bits=(4, 2)),
        tuned={"grace": {"beta_dkd": 0.1}, "grace-4": {"tau": 0.5}},
    )
    tasks = sweep_tasks(every, tmp_path, "cpu", None)
    rates = [{"learning_rate": 1e-4}, {"learning_rate": 1e-3}]
    assert [task.tried() for task in tasks] == [*grace, *rates, *rates, *kd, *kd, *grace, *grace]
    assert [task.folder.name for task in tasks[-3:]] == [
        "grace-4-s0-try1", "grace-2-s0-try0", "grace-2-s0-try1"
    ]  # fmt: skip
    tried = worker.training_config(tasks[-3])
    assert (tried.learning_rate, tried.omega, tried.beta_dkd, tried.tau) == (1e-4, 5.0, 0.1, 0.5)
    results = [
        {"score": {"total": total, "questions": 36}, "arm": task.arm.name}
        for total, task in zip([2, 1, 1, 2, 1, 2, 1, 2, 1, 2, 1, 2, 2, 1], tasks, strict=True)
    ]
    (tmp_path / "sweep.json").write_text(json.dumps(choose(every, results)))
    made = {
        arm.name: worker.training_config(_task(every, tmp_path, arm))
        for arm in arms_of(every)
        if arm.trained
    }
    assert (made["kd-4"].beta_init, made["kd-4"].learning_rate) == (4.0, 1e-3)
    assert (made["grace-4"].omega, made["grace-4"].learning_rate) == (5.0, 1e-4)
    assert (made["distil"].omega, made["distil"].learning_rate) == (1.0, 1e-3)
    assert [made[f"grace-{bits}"].omega for bits in (4, 3, 2)] == [5.0, 1.0, 1.0]
    assert [made[f"grace-{bits}"].tau for bits in (4, 3)] == [0.5, 0.35]
    variant = made["grace-no-rcka-4"]
    assert (variant.omega, variant.learning_rate, variant.beta_dkd) == (0.0, 1e-4, 0.1)
    said = " ".join(told(every))
    assert "distil: omega; kd: beta_init; grace: omega. Nothing else" in said
    with pytest.raises(
        ValueError, match=r"candidates\.kd must be 2 times options with a learning_"
    ):
        SweepConfig((1e-4, 1e-3), {"kd": kd[:1]})
    assert "not GRACE as published: beta_dkd 0.1 (paper 4.0), tau 0.5 (paper 0.35)." in said
    assert "Tried before." in told(replace(every, notes=("Tried before.",)))
    assert replace(every, notes=("Tried before.",)).fingerprint() == every.fingerprint()
    for name, options, named in (
        ("grace", {"omega": 2.0}, "omega of grace"),
        ("grace-4", {"omega": 2.0}, "omega of grace-4"),
        ("qat", {"learning_rate": 1.0}, "learning_rate of qat"),
        ("qat-2", {"learning_rate": 1.0}, "learning_rate of qat-2"),
    ):
        with pytest.raises(ValueError, match=f"{named} must be swept or tuned, got both"):
            replace(every, tuned={name: options})
    variant = {"grace-no-rcka": {"learning_rate": 1.0}}  # it is not swept itself
    assert replace(every, tuned=variant).tuned == variant


def test_a_fixed_beta_is_as_large_as_the_controller_s(config: StudyConfig, tmp_path: Path) -> None:
    """Else the ablation would be one of how much the teacher counts."""
    every = replace(
        config,
        arms=("grace", "grace-fixed-beta"),
        ptq_from=("student",),
        bits=(4,),
        sweep=SweepConfig((1e-4, 1e-3)),
        tuned={"grace": {"beta_init": 4.0, "beta_max": 9.0}},
    )
    tasks = sweep_tasks(every, tmp_path, "cpu", None)
    fixed = _task(every, tmp_path, Arm("grace-fixed-beta", 4))
    assert worker.training_config(fixed).beta_init == 4.0
    for task, betas in zip(tasks, ([1.0, 2.0], [5.0, 7.0]), strict=True):
        task.folder.mkdir(parents=True)
        rows = [json.dumps({"step": step, "beta": beta}) for step, beta in enumerate(betas)]
        (task.folder / "metrics.jsonl").write_text("".join(f"{row}\n" for row in rows))
    results = [{"score": {"total": total, "questions": 36}} for total in (1, 2)]
    found = choose(every, results, [task.folder for task in tasks])
    (tmp_path / "sweep.json").write_text(json.dumps(found))
    assert found["grace-4"]["beta"] == 6.0
    assert worker.training_config(fixed).beta_init == 6.0
    assert not worker.training_config(fixed).adaptive_beta
    adaptive = worker.training_config(_task(every, tmp_path, Arm("grace", 4)))
    assert adaptive.beta_init == 4.0


def test_a_fixed_beta_that_is_swept_itself_runs_as_it_was_swept(
    config: StudyConfig, tmp_path: Path
) -> None:
    every = replace(
        config,
        arms=("grace", "grace-fixed-beta"),
        ptq_from=("student",),
        bits=(4,),
        sweep=SweepConfig((1e-4, 1e-3), ablations=True),
        tuned={"grace": {"beta_init": 4.0, "beta_max": 9.0}},
    )
    tasks = sweep_tasks(every, tmp_path, "cpu", None)
    assert len(tasks) == 4
    for task in tasks:
        task.folder.mkdir(parents=True)
        (task.folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "beta": 7.0}) + "\n")
    results = [{"score": {"total": total, "questions": 36}} for total in (1, 2, 4, 3)]
    found = choose(every, results, [task.folder for task in tasks])
    (tmp_path / "sweep.json").write_text(json.dumps(found))
    fixed = worker.training_config(_task(every, tmp_path, Arm("grace-fixed-beta", 4)))
    assert (fixed.beta_init, fixed.learning_rate) == (4.0, 1e-4)
    assert worker.training_config(_task(every, tmp_path, Arm("grace", 4))).learning_rate == 1e-3


def test_a_sweep_runs_before_the_arms(done: Path, config: StudyConfig, tmp_path: Path) -> None:
    swept = replace(config, arms=("student", "qat"), ptq_from=("student",), save_steps=0)
    swept = replace(swept, sweep=SweepConfig(learning_rates=(1e-3, 1e-2)))
    (tmp_path / "data").mkdir()
    for split in ("train", "heldout"):
        (tmp_path / "data" / split).symlink_to(done / "data" / split)
    (tmp_path / "models").symlink_to(done / "models")
    study = run_study(swept, tmp_path)
    assert study["sweep"].keys() == {"qat-4"}
    arm = study["arms"][-1]
    assert arm["learning_rate"] == study["sweep"]["qat-4"]["chosen"]["learning_rate"]
    tried = json.loads(next(tmp_path.glob("sweep/*try1/result.json")).read_text())
    assert (tried["split"], tried["deployed"]) == ("validation", False)
    folder = tmp_path / "data" / "validation"
    assert json.loads((folder / "pool.json").read_text())["split"] == "validation"
    assert processor_of(tmp_path / "models" / "student").tokenizer.pad_token_id == 0
