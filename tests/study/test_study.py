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

from grace.evaluation import answer
from grace.study import execution, ranks, worker
from grace.study.arms import Arm
from grace.study.config import StudyConfig
from grace.study.gather import read_questions
from grace.study.merge import merge
from grace.study.models import digest, load
from grace.study.questions import ask, on_device
from grace.study.report import write_report
from grace.study.run import run_study
from grace.study.task import Task, questions_of
from grace.study.training import OutOfTime
from grace.training.checkpoints import STATE

NAMES = ["teacher-s0", "student-s0", "control-s0", "rtn-4-s0", "rtn-4-control-s0", "grace-4-s0"]


def _task(config: StudyConfig, root: Path, arm: Arm, **options: Any) -> Task:
    return Task(arm, 0, config, root, **options)


def test_killed_anywhere_it_ends_as_if_it_had_not_been(
    done: Path, config: StudyConfig, options: dict[str, Any], tmp_path: Path
) -> None:
    file, out = tmp_path / "config.yaml", tmp_path / "killed"
    file.write_text(yaml.safe_dump(options))
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
    assert not (tmp_path / "sweep").exists()  # nothing that is chosen trains
    assert [arm["name"] for arm in study["arms"]] == ["student", "rtn-4"]
    assert study["unfinished"] == ["teacher-s0", "control-s0", "rtn-4-control-s0", "grace-4-s0"]
    write_report(tmp_path)


def test_with_two_gpus_models_are_made_on_both(
    done: Path, config: StudyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(done / "data", tmp_path / "data")
    monkeypatch.setattr(execution, "gpus", lambda: ["0", "1"])
    with pytest.raises(OutOfTime):
        execution.make_models(config, tmp_path, "cpu", 0.0, execution.Progress())
    making = tmp_path / "models" / "making-teacher"
    assert (making / "checkpoint-1").is_dir()
    shutil.rmtree(making)  # transformers goes on from it on GPUs, but not by ranks on CPUs
    for name in ("student", "student.json"):
        (tmp_path / "models" / name).symlink_to(done / "models" / name)
    execution.make_models(config, tmp_path, "cpu", None, execution.Progress())
    kept = digest(tmp_path / "models" / "teacher")
    execution.make_models(config, tmp_path, "cpu", None, execution.Progress())  # both are there
    assert digest(tmp_path / "models" / "teacher") == kept
    ours, alone = (load(root / "models" / "teacher").state_dict() for root in (tmp_path, done))
    for name, value in alone.items():  # kept in bfloat16
        torch.testing.assert_close(ours[name], value, rtol=1e-2, atol=1e-3)
    facts = [json.loads((root / "models/teacher.json").read_text()) for root in (tmp_path, done)]
    assert facts[0]["tokens"] == facts[1]["tokens"]


def test_on_one_gpu_models_are_made_side_by_side(
    done: Path, config: StudyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, str, int]] = []
    progress = execution.Progress()
    progress.start = lambda name, total: told.append(("start", name, total))  # type: ignore[method-assign]
    progress.finish = lambda name: told.append(("finish", name, 0))  # type: ignore[method-assign]
    shutil.copytree(done / "data", tmp_path / "data")
    monkeypatch.setattr(execution, "gpus", lambda: ["0"])
    with pytest.raises(OutOfTime):
        execution.make_models(config, tmp_path, "cpu", 0.0, progress)
    for which in ("teacher", "student"):
        path = tmp_path / "models" / f"making-{which}" / "checkpoint-1" / STATE
        state = json.loads(path.read_text())
        assert state["seconds"] > 0
        path.write_text(json.dumps({**state, "seconds": 1e6 + state["seconds"]}))
    told.clear()
    execution.make_models(config, tmp_path, "cpu", None, progress)
    assert {name for _, name, total in told if total == 3} == {"teacher", "student"}
    assert {name for event, name, _ in told if event == "finish"} == {"teacher", "student"}
    for which in ("teacher", "student"):
        assert digest(tmp_path / "models" / which) == digest(done / "models" / which)
        facts = json.loads((tmp_path / "models" / f"{which}.json").read_text())
        assert facts["seconds"] > 1e6  # what the part before the interruption took, and the rest


def test_groups_must_fit_the_student_that_is_made(config: StudyConfig) -> None:
    with pytest.raises(
        ValueError, match=r"group_size must divide make.student.width \(\d+\), got 7"
    ):
        replace(config, group_size=7)


def test_ranks_must_divide_a_batch(config: StudyConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"make.teacher.batch_images must be a multiple of the 3"):
        ranks.make_together(config, tmp_path, "teacher", "cpu", None, 3)


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


@pytest.mark.parametrize("processes", [1, 2])
def test_what_is_done_is_gathered_where_an_arm_fails(
    done: Path, config: StudyConfig, tmp_path: Path, processes: int
) -> None:
    for name in ("data", "models"):
        shutil.copytree(done / name, tmp_path / name)
    broken = tmp_path / "arms" / "student-s0"
    broken.mkdir(parents=True)
    (broken / "answers.npz").mkdir()  # it cannot write its answers
    some = replace(config, arms=("student", "control", "rtn"), processes=processes)
    with pytest.raises(execution.Failed, match=r"student-s0 failed, .* student-s0: IsADirectory"):
        run_study(some, tmp_path)
    study = json.loads((tmp_path / "study.json").read_text())
    assert [arm["name"] for arm in study["arms"]] == ["control", "rtn-4", "rtn-4-control"]
    assert study["unfinished"] == ["student-s0"]
