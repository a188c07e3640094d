"""A study from nothing at its smallest: killed and taken up, its records, its merge."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from grace.cli import main
from grace.evaluation import answer
from grace.study import worker
from grace.study.arms import METHODS, Arm, arms_of
from grace.study.config import StudyConfig, SweepConfig
from grace.study.gather import read_questions
from grace.study.merge import merge
from grace.study.models import load, processor_of
from grace.study.options import from_dict
from grace.study.questions import ask, on_device
from grace.study.report import write_report
from grace.study.run import run_study
from grace.study.sweeping import choose, sweep_tasks, told
from grace.study.task import Task, questions_of

MODEL = {
    "width": 16,
    "inner": 32,
    "layers": 2,
    "heads": 2,
    "vision_width": 16,
    "vision_layers": 1,
    "steps": 3,
    "batch_images": 4,
    "warmup_steps": 1,
    "save_steps": 2,
}
OPTIONS: dict[str, Any] = {
    "benchmark": "drawn",
    "seeds": [0],
    "bits": [4],
    "arms": ["teacher", "student", "control", "rtn", "grace"],
    "ptq_from": ["student", "control"],
    "levels": ["easy"],
    "pixels": 56,
    "train_images": 16,
    "heldout_images": 4,
    "validation_images": 2,
    "further_questions": 1,
    "steps": 3,
    "batch_images": 4,
    "warmup_steps": 1,
    "group_size": 16,
    "cka_images": 4,
    "save_steps": 2,
    "processes": 1,
    "make": {"teacher": {**MODEL, "width": 32, "inner": 64}, "student": MODEL},
}
NAMES = ["teacher-s0", "student-s0", "control-s0", "rtn-4-s0", "rtn-4-control-s0", "grace-4-s0"]


@pytest.fixture(scope="module")
def config() -> StudyConfig:
    return from_dict(OPTIONS)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, config: StudyConfig) -> Path:
    out = tmp_path_factory.mktemp("study") / "whole"
    run_study(config, out)
    return out


@pytest.fixture(scope="module")
def study(done: Path) -> dict[str, Any]:
    return json.loads((done / "study.json").read_text())


def _task(config: StudyConfig, root: Path, arm: Arm, **options: Any) -> Task:
    return Task(arm, 0, config, root, **options)


def test_killed_anywhere_it_ends_as_if_it_had_not_been(
    done: Path, config: StudyConfig, tmp_path: Path
) -> None:
    file, out = tmp_path / "config.yaml", tmp_path / "killed"
    file.write_text(yaml.safe_dump(OPTIONS))
    places = [
        "making-teacher/checkpoint-2",
        "models/teacher",
        "grace-4-s0/checkpoint-2",
        "rtn-4-s0/result.json",
    ]
    script = Path(__file__).with_name("killed.py")
    command = [sys.executable, str(script), str(file), str(out), *places]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    kept = (out / "arms" / "rtn-4-s0" / "result.json").stat().st_mtime_ns
    run_study(config, out)
    assert (out / "arms" / "rtn-4-s0" / "result.json").stat().st_mtime_ns == kept
    whole, killed = (read_questions(folder / "questions.npz") for folder in (done, out))
    assert whole.keys() == killed.keys()
    for name, values in whole.items():
        assert np.array_equal(values, killed[name]), name
    for name in ("grace-4-s0", "control-s0"):
        one, other = (
            json.loads((folder / "arms" / name / "result.json").read_text())
            for folder in (done, out)
        )
        assert one["cka"] == other["cka"]
        assert one["tokens"] == other["tokens"]
        rows = (out / "arms" / name / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(row)["step"] for row in rows] == [1, 2, 3]
        assert not list((out / "arms" / name).glob("checkpoint-*"))


def test_every_arm_is_recorded(study: dict[str, Any], done: Path) -> None:
    assert [arm["name"] for arm in study["arms"]] == [n.removesuffix("-s0") for n in NAMES]
    assert study["unfinished"] == []
    by_name = {arm["name"]: arm for arm in study["arms"]}
    assert by_name["control"]["tokens"] == by_name["grace-4"]["tokens"] > 0
    assert by_name["rtn-4"]["tokens"] == 0
    assert by_name["grace-4"]["cka"]["before"] == by_name["student"]["cka"]["after"]
    assert by_name["grace-4"]["cka"]["after"] != by_name["grace-4"]["cka"]["before"]
    started = by_name["rtn-4-control"]["cka"]["before"]
    assert started == pytest.approx(by_name["control"]["cka"]["after"], abs=1e-6)
    assert by_name["rtn-4"]["megabytes"] == by_name["grace-4"]["megabytes"]
    assert by_name["rtn-4"]["megabytes"] < by_name["student"]["megabytes"]
    assert by_name["grace-4"]["parameters"] == by_name["student"]["parameters"]
    assert study["benchmark"]["questions"] == 72
    assert {arm["deployed"] for arm in study["arms"] if arm["bits"] == 4} == {True}
    assert [step for step, _ in study["betas"]["grace-4"]["0"]] == [1, 2, 3]
    assert study["models"]["student"]["tokens"] > 0


def test_answers_stand_beside_by_subtask_and_image(study: dict[str, Any], done: Path) -> None:
    answers = read_questions(done / "questions.npz")
    assert answers["image"].tolist() == [index // 2 for index in range(72)]
    assert set(answers["truth"][answers["image"] == 0]) == {"Yes", "No"}
    for arm in study["arms"]:
        right = answers[f"right.{arm['name']}-s0"]
        for subtask, digits in arm["seeds"][0]["right"].items():
            own = right[answers["subtask"] == subtask].reshape(-1, 2).sum(1)
            assert "".join(map(str, own)) == digits
    entropy, r = answers["entropy.teacher-s0"], study["teacher_entropy"]["r"]
    error = ~answers["right.teacher-s0"]
    if r is not None:
        assert r == pytest.approx(np.corrcoef(entropy.astype(float), error)[0, 1])
    assert (entropy > 0).all()


def test_one_forward_says_what_generate_says(done: Path, config: StudyConfig) -> None:
    task = _task(config, done, Arm("student"))
    asked, processor = questions_of(task), task.processor
    model = load(task.model_dir("student"))
    said, entropy = ask(model, processor, asked.batches)
    torch.manual_seed(0)
    # Random answers would all be one token: a head of noise makes them differ.
    torch.nn.init.normal_(model.lm_head.weight, std=1.0)
    said, entropy = ask(model, processor, asked.batches)
    batches = [answer.Batch(b.indices, on_device(b, model)) for b in asked.batches]
    assert said == answer.answer(model, processor, batches, max_new_tokens=1, progress=False)
    assert len(set(said)) > 1
    inputs = on_device(asked.sample([5]), model)
    with torch.no_grad():
        p = model(**inputs).logits[0, -1].softmax(-1)
    assert entropy[5] == pytest.approx(float(-(p * p.log()).sum()), rel=1e-4)


def test_it_stops_in_time_and_behind_a_stage(
    done: Path, config: StudyConfig, tmp_path: Path
) -> None:
    shutil.copytree(done / "data", tmp_path / "data")
    assert run_study(config, tmp_path, until=0.0)["arms"] == []  # a step is made and kept
    assert (tmp_path / "models" / "making-teacher" / "checkpoint-1").is_dir()
    shutil.copytree(done / "models", tmp_path / "models", dirs_exist_ok=True)
    assert run_study(config, tmp_path, stop_behind="models")["arms"] == []
    study = run_study(config, tmp_path, only=["rtn-4", "student"])
    assert [arm["name"] for arm in study["arms"]] == ["student", "rtn-4"]
    assert study["unfinished"] == ["teacher-s0", "control-s0", "rtn-4-control-s0", "grace-4-s0"]
    write_report(tmp_path)


def test_no_arm_begins_that_would_not_be_done(
    done: Path, config: StudyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = [done / "arms" / name / "result.json" for name in ("control-s0", "grace-4-s0")]
    longest = max(
        r["training_seconds"] + r["scoring_seconds"]
        for r in (json.loads(path.read_text()) for path in results)
    )
    monkeypatch.setattr(worker.time, "time", lambda: 1000.0)
    trained = Arm("qat", 4)
    assert worker._fits(_task(config, done, trained, until=1000.0 + longest + 0.1))
    assert not worker._fits(_task(config, done, trained, until=1000.0 + longest - 0.1))
    assert worker._fits(_task(config, done, Arm("gptq", 4), until=1000.1))  # none is known yet


def _part(done: Path, out: Path, names: list[str], config: StudyConfig) -> Path:
    for name in ("data", "models"):
        out.mkdir(exist_ok=True)
        (out / name).symlink_to(done / name)
    for name in names:
        shutil.copytree(done / "arms" / name, out / "arms" / name)
    run_study(config, out, only=[name.removesuffix("-s0") for name in names])
    return out


def test_parts_become_the_whole(
    done: Path, study: dict[str, Any], config: StudyConfig, tmp_path: Path
) -> None:
    one = _part(done, tmp_path / "one", NAMES[:4], config)
    few = replace(config, arms=("student", "control", "rtn", "grace"))
    other = _part(done, tmp_path / "other", NAMES[3:], few)
    merged = merge([one, other], tmp_path / "merged")
    for key in ("arms", "benchmark", "differences", "curves", "betas", "teacher_entropy"):
        assert merged[key] == study[key], key
    assert merged["example"]["answers"].keys() == study["example"]["answers"].keys()
    assert {f.name for f in write_report(tmp_path / "merged")} >= {"report.md", "report.html"}
    with pytest.raises(ValueError, match="must be an empty folder"):
        merge([one, other], tmp_path / "merged")
    path = other / "arms" / "rtn-4-s0" / "result.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "bytes": 1}))
    with pytest.raises(ValueError, match=r"rtn-4-s0 must have one result, .* differ in bytes"):
        merge([one, other], tmp_path / "again")
    (other / "config.json").write_text(json.dumps(replace(few, steps=9).as_dict()))
    with pytest.raises(ValueError, match=r"one configuration, got steps: 3 and 9"):
        merge([one, other], tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_another_configuration_is_named_and_nothing_is_done(
    done: Path, config: StudyConfig
) -> None:
    before = (done / "study.json").stat().st_mtime_ns
    assert config.make is not None
    longer = replace(config.make, student=replace(config.make.student, steps=8))
    with pytest.raises(ValueError, match=r"there and now\): make\.student\.steps: 3 and 8"):
        run_study(replace(config, make=longer), done)
    with pytest.raises(ValueError, match=r"arms must be of teacher, .*, got 'qat'"):
        run_study(config, done, only=["qat"])
    with pytest.raises(ValueError, match=r"seeds must be of \[0\], got 3"):
        run_study(config, done, seeds=[3])
    assert (done / "study.json").stat().st_mtime_ns == before


def test_other_models_in_the_same_folder_are_refused(
    done: Path, config: StudyConfig, tmp_path: Path
) -> None:
    part = tmp_path / "part"
    shutil.copytree(done / "models", part / "models")
    (part / "data").symlink_to(done / "data")
    shutil.copytree(done / "arms" / "student-s0", part / "arms" / "student-s0")
    shutil.rmtree(part / "models" / "teacher")
    shutil.copytree(done / "models" / "student", part / "models" / "teacher")
    with pytest.raises(ValueError, match=r"result.json must be of this study \(weights "):
        run_study(config, part, only=["student"])


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
    assert [entry["chosen"] for entry in found.values()] == [1e-3, 1e-4, 1e-2, 1e-4]
    assert [entry["at_edge"] for entry in found.values()] == [False, True, True, True]
    (tmp_path / "sweep.json").write_text(json.dumps(found))
    rates = {
        arm.name: worker.training_config(_task(every, tmp_path, arm)).learning_rate
        for arm in arms_of(every)
        if arm.trained
    }
    assert rates["qat-4"] == rates["qat-2"] == 1e-2
    assert rates["grace-2"] == rates["grace-no-gate-4"] == 1e-4
    assert (rates["control"], rates["distil"]) == (1e-3, 1e-4)
    assert any("grace-no-gate take the learning rate of grace" in line for line in told(every))


def test_a_sweep_runs_before_the_arms(done: Path, config: StudyConfig, tmp_path: Path) -> None:
    swept = replace(config, arms=("student", "qat"), ptq_from=("student",), save_steps=0)
    swept = replace(swept, sweep=SweepConfig(learning_rates=(1e-3, 1e-2)))
    (tmp_path / "data").mkdir()
    for split in ("train", "heldout"):
        (tmp_path / "data" / split).symlink_to(done / "data" / split)
    (tmp_path / "models").symlink_to(done / "models")
    study = run_study(swept, tmp_path)
    assert study["sweep"].keys() == {"qat"}
    arm = study["arms"][-1]
    assert arm["learning_rate"] == study["sweep"]["qat"]["chosen"]
    tried = json.loads(next(tmp_path.glob("sweep/*lr0.01/result.json")).read_text())
    assert (tried["split"], tried["deployed"]) == ("validation", False)
    folder = tmp_path / "data" / "validation"
    assert json.loads((folder / "pool.json").read_text())["split"] == "validation"
    assert processor_of(tmp_path / "models" / "student").tokenizer.pad_token_id == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stepz": 3}, "unknown option stepz, did you mean 'steps'"),
        ({"make": {"student": MODEL}}, "make.teacher must be given"),
        ({"sweep": {"learning_rates": ["fast"]}}, "sweep.learning_rates must be a number"),
        ({"arms": ["student", "gracE"], "ptq_from": ["student"]}, "method must be one of"),
        ({"arms": ["student", "rtn"]}, "must have control for ptq_from control"),
        ({"bits": [1]}, "bits must be 2 to 8, got 1"),
        ({"steps": 2.5}, "steps must be a whole number, got 2.5"),
        ({"levels": ["brutal"]}, "levels must be of easy, medium, hard"),
        ({"tuned": {"grace": {"taau": 1}}}, "unknown option 'taau', did you mean 'tau'"),
        ({"tuned": {"graze": {"tau": 1}}}, "tuned must name arms of the study, got 'graze'"),
        ({"seeds": [1, 1]}, "seeds must be different values"),
        ({"models": "there"}, "make must be given without models"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture, change: dict[str, Any], message: str
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({**OPTIONS, **change}))
    with pytest.raises(SystemExit) as stop:
        main(["study", str(file), "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "out").exists()


def test_the_command_takes_overrides_and_a_subset(
    done: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({**OPTIONS, "steps": 9}))
    with pytest.raises(SystemExit) as stop:
        main(["study", str(file), "steps=3", "--out", str(done), "--arms", "student,rtn"])
    assert stop.value.code == 0
    assert f"report: {done / 'report.html'}" in capsys.readouterr().out.replace("\n", "")
    with pytest.raises(SystemExit):
        main(["study", str(file), "--out", str(done)])
    assert "steps: 3 and 9" in capsys.readouterr().err


def test_the_default_study_has_what_it_promises() -> None:
    from grace.evaluation.drawn.models import make_model
    from grace.study.options import read_config
    from grace.study.pool import spec_of

    config = read_config(Path(__file__).parents[2] / "studies" / "default" / "study.yaml")
    assert config.make is not None
    with torch.device("meta"):
        sizes = {
            which: sum(
                p.numel()
                for p in make_model(
                    replace(getattr(config.make, which)).size, 0, config.pixels
                ).parameters()
            )
            for which in ("teacher", "student")
        }
    assert sizes["teacher"] >= 4 * sizes["student"]
    assert 2 * spec_of(config, "heldout")["images"] >= 15000
    assert set(config.arms) == set(METHODS)
    assert config.bits == (8, 4, 3, 2)
    recipe = config.make.student
    assert recipe.width % config.group_size == recipe.inner % config.group_size == 0
