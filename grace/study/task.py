"""A task: one arm with one seed, its files, and the questions and rows it works on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from grace.study import models, questions, teacher_states
from grace.study.arms import METHODS, Arm
from grace.study.config import StudyConfig
from grace.study.data import HELDOUT, TEACHER, TRAIN, PackedQuestions
from grace.study.pool import DONE
from grace.study.questions import Questions
from grace.study.training import DrawnQuestions

RESULT, METRICS, ANSWERS, TRAINED = "result.json", "metrics.jsonl", "answers.npz", "trained"
SWEEP = "sweep.json"
STATES = "teacher"  # folder of the teacher's, under data


@dataclass(frozen=True)
class Task:
    """An arm to run with a seed, in the run directory `root`.

    `candidate`: number of the options of the sweep to try, scored on the validation split and not
    deployed; None: the arm itself. `until`: time of the clock at which to stop.
    """

    arm: Arm
    seed: int
    config: StudyConfig
    root: Path
    device: str = "cpu"
    candidate: int | None = None
    until: float | None = None

    @property
    def folder(self) -> Path:
        """Where the arm's files go."""
        name = f"{self.arm.name}-s{self.seed}"
        if self.candidate is None:
            return self.root / "arms" / name
        return self.root / "sweep" / f"{name}-try{self.candidate}"

    @property
    def split(self) -> str:
        """What it is scored on."""
        return self.config.split if self.candidate is None else "validation"

    def model_dir(self, which: str) -> Path:
        """Directory of the study's `teacher` or `student`."""
        return models.model_dir(self.config, self.root, which)

    def tried(self) -> dict[str, Any]:
        """The candidate's options of GraceConfig; none of an arm itself."""
        if self.candidate is None or self.config.sweep is None:
            return {}
        tuned_as = METHODS[self.arm.method].tuned_as
        return self.config.sweep.of(self.arm.method, tuned_as)[self.candidate]

    @property
    def processor(self) -> Any:
        """The student's."""
        return models.processor_of(self.model_dir("student"))


def finished(task: Task) -> dict[str, Any] | None:
    """The result of a task that is done, else None.

    Raises:
        ValueError: it was done with another configuration or other models.
    """
    path = task.folder / RESULT
    if not path.is_file():
        return None
    result = json.loads(path.read_text())
    now = {"fingerprint": task.config.fingerprint(), "weights": weights_of(task)}
    for name, value in now.items():
        if result.get(name) != value:
            raise ValueError(
                f"study: {path} must be of this study ({name} {value}), got {result.get(name)}; "
                "choose another folder, or remove it"
            )
    return result


def weights_of(task: Task) -> dict[str, str]:
    """Digests of the models that the study is about."""
    return {which: models.digest(task.model_dir(which)) for which in ("student", "teacher")}


@lru_cache(maxsize=1)
def scored(task_config: StudyConfig, root: Path, split: str, processor_dir: Path) -> Questions:
    """The questions of a split, and their tokens and pixels, made once a process."""
    processor, size = models.processor_of(processor_dir), task_config.batch_size
    if task_config.benchmark == "drawn":
        return questions.from_pool(root / "data" / split, processor, size)
    folder = HELDOUT if split == task_config.split else split
    return questions.from_folder(root / "data" / folder, processor, size)


def questions_of(task: Task) -> Questions:
    """What the task is scored on."""
    return scored(task.config, task.root, task.split, task.model_dir("student"))


@lru_cache(maxsize=1)
def _training_data(config: StudyConfig, root: Path, processor_dir: Path) -> Any:
    data, processor = root / "data", models.processor_of(processor_dir)
    if config.benchmark == "drawn":
        return DrawnQuestions(data / TRAIN, processor, config.label_errors)
    return PackedQuestions(data / TRAIN, processor, data / TEACHER)


def training_data(task: Task) -> Any:
    """Training rows (the synthetic benchmark's with the teacher's), read once a process."""
    return _training_data(task.config, task.root, task.model_dir("student"))


def states_of(task: Task) -> dict[str, Any]:
    """What the teacher's states of the drawn training rows depend on."""
    spec = json.loads((task.root / "data" / TRAIN / DONE).read_text())
    errors = task.config.label_errors
    return {"rows": spec, "label_errors": errors, "teacher": weights_of(task)["teacher"]}


def told(task: Task) -> Any:
    """`training_data` with what the teacher says of it, where that is kept."""
    data = training_data(task)
    folder = task.root / "data" / STATES
    if task.config.keep_teacher and teacher_states.are_kept(folder, states_of(task)):
        return teacher_states.WithStates(data, teacher_states.TeacherStates(folder))
    return data
