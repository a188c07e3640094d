"""The teacher's states, kept: what training sees is what a teacher beside it would say."""

from __future__ import annotations

import json
import pickle
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from grace.study import execution, look, teacher_states, worker
from grace.study.arms import Arm
from grace.study.config import StudyConfig
from grace.study.models import load
from grace.study.run import run_study
from grace.study.task import METRICS, STATES, Task, states_of, told
from grace.training.step import TEACHER_LAST, TEACHER_LAYER, Teacher, model_inputs, supervised


@pytest.fixture(scope="module")
def kept(
    done: Path, config: StudyConfig, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Task, Path]:
    """A GRACE arm of a study that keeps what its teacher says."""
    root = tmp_path_factory.mktemp("kept")
    shutil.copytree(done / "data", root / "data")
    shutil.copytree(done / "models", root / "models")
    task = Task(Arm("grace", 4), 0, replace(config, keep_teacher=True), root)
    seen: list[int] = []
    look.keep(task, batch_images=5, advance=seen.append)
    assert seen == [5, 5, 5, 1]
    return task, root / "data" / STATES


def _losses(task: Task) -> list[dict[str, float]]:
    worker._train(task, load(task.model_dir("student")))
    rows = [json.loads(line) for line in (task.folder / METRICS).read_text().splitlines()]
    shutil.rmtree(task.folder)
    return [{name: row[name] for name in ("ce", "gdkd", "rcka", "beta")} for row in rows]


def test_training_is_the_same_without_the_teacher(
    kept: tuple[Task, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    task, _ = kept
    live = _losses(replace(task, config=replace(task.config, keep_teacher=False)))
    monkeypatch.setattr(Teacher, "__call__", None)  # it is not asked
    assert isinstance(told(task), teacher_states.WithStates)
    for one, other in zip(_losses(task), live, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_rows_are_those_of_the_images_asked_for(kept: tuple[Task, Path]) -> None:
    task, folder = kept
    states = teacher_states.TeacherStates(folder)
    data = told(task)
    batch = data.collate([7, 3])
    alone = data.data.collate([7, 3])
    teacher = Teacher(load(task.model_dir("teacher")), worker.training_config(task))
    index, _ = supervised(alone["labels"])
    inputs = worker.as_inputs(alone)
    visual = teacher.adapter.visual_tokens(inputs)
    said = teacher(model_inputs(inputs), index, visual)
    torch.testing.assert_close(batch[TEACHER_LAST], said.last, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(batch[TEACHER_LAYER], said.layer, rtol=1e-4, atol=1e-5)
    sent = pickle.dumps(states)
    assert len(sent) < states.layer.nbytes / 2
    again = pickle.loads(sent).of([7, 3])
    assert torch.equal(again[TEACHER_LAST], batch[TEACHER_LAST])


def test_others_are_not_taken_for_them(kept: tuple[Task, Path]) -> None:
    task, folder = kept
    assert teacher_states.are_kept(folder, states_of(task))
    wrong = replace(task, config=replace(task.config, label_errors=0.2))
    assert not teacher_states.are_kept(folder, states_of(wrong))
    assert not isinstance(told(wrong), teacher_states.WithStates)


def test_a_study_looks_once(
    kept: tuple[Task, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, _ = kept
    for name in ("data", "models"):
        shutil.copytree(task.root / name, tmp_path / name)
    shutil.rmtree(tmp_path / "data" / STATES)
    config: Any = replace(
        task.config, arms=("student", "grace"), ptq_from=("student",), save_steps=0
    )
    run_study(config, tmp_path, only=["student"])
    assert not (tmp_path / "data" / STATES).exists()  # nothing trains
    run_study(config, tmp_path)
    monkeypatch.setattr(look, "keep", None)  # not again
    (tmp_path / "arms" / "grace-4-s0" / "result.json").unlink()
    run_study(config, tmp_path)


def test_a_full_disk_is_told(
    kept: tuple[Task, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, _ = kept
    usage = namedtuple("usage", "total used free")(0, 0, 10)
    monkeypatch.setattr(look.shutil, "disk_usage", lambda _: usage)
    for name in ("data", "models"):
        shutil.copytree(task.root / name, tmp_path / name)
    with pytest.raises(OSError, match=r"must have .* GiB free for the teacher's states, got 0\.0"):
        look.keep(replace(task, root=tmp_path))
    assert not teacher_states.are_kept(tmp_path / "data" / STATES, states_of(task))


def test_processes_keep_the_same(kept: tuple[Task, Path], tmp_path: Path) -> None:
    task, folder = kept
    for name in ("data", "models"):
        shutil.copytree(task.root / name, tmp_path / name)
    for old in (tmp_path / "data" / STATES).iterdir():
        old.unlink()
    with execution.worker_pool(2) as pool:
        look.keep(replace(task, root=tmp_path), batch_images=5, pool=pool)
    for path in folder.iterdir():
        assert (tmp_path / "data" / STATES / path.name).read_bytes() == path.read_bytes()
