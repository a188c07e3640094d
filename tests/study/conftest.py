from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from grace.evaluation import tiny
from grace.study.config import StudyConfig
from grace.study.options import from_dict
from grace.study.run import run_study

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
    "make": {"images": 12, "teacher": {**MODEL, "width": 32, "inner": 64}, "student": MODEL},
}


@pytest.fixture(scope="session")
def models() -> Path:
    """The folder with the shipped `student` and `teacher`."""
    assert tiny.student_dir().parent == tiny.teacher_dir().parent
    return tiny.student_dir().parent


@pytest.fixture(scope="session")
def options() -> dict[str, Any]:
    """A study from nothing at its smallest, as its file says it."""
    return OPTIONS


@pytest.fixture(scope="session")
def config() -> StudyConfig:
    return from_dict(OPTIONS)


@pytest.fixture(scope="session")
def done(tmp_path_factory: pytest.TempPathFactory, config: StudyConfig) -> Path:
    out = tmp_path_factory.mktemp("study") / "whole"
    run_study(config, out)
    return out


@pytest.fixture(scope="session")
def study(done: Path) -> dict[str, Any]:
    return json.loads((done / "study.json").read_text())
