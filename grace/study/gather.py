"""study.json: everything a report shows, in one file; questions.npz: every answer, beside it.

questions.npz, Q questions in a fixed order:

    subtask, level, question, truth   text [Q] (level is empty where there is none)
    image                             int32 [Q], the same for the two questions about an image;
                                      images 2k and 2k + 1 are twins
    said.<arm>-s<seed>                text [Q], the model's first token
    right.<arm>-s<seed>               bool [Q], by MME's parser
    entropy.<arm>-s<seed>             float16 [Q], of that token, in nats
"""

from __future__ import annotations

import base64
import json
import statistics as plain
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from grace.study.answers import as_json, disagreements, entropy_error, wordings
from grace.study.arms import METHODS, Arm, arms_of
from grace.study.config import StudyConfig
from grace.study.questions import Questions
from grace.study.statistics import paired_difference, subtask_errors, total_error
from grace.study.sweep import told
from grace.study.task import ANSWERS, METRICS, SWEEP, Task, questions_of
from grace.training.callbacks import read_metrics

FORMAT, VERSION = "grace-study", 1
QUESTIONS = "questions.npz"
_EXAMPLES = 6
Result = Mapping[str, Any]


def gather(
    config: StudyConfig, root: Path, done: Mapping[Task, Result], seconds: float
) -> dict[str, Any]:
    """The study as JSON, of the arms that are done; writes questions.npz beside it.

    Keys: `config`, `environment`, `benchmark` (images, questions, subtasks, `wordings`: which pairs
    of images ask the same, see `grace.study.answers.wordings`), `seconds`, `arms`
    (in order, see `_arm`), `differences` (paired, of every arm to the control and to the methods
    before it at its bits), `examples` (images with every arm's answer; `example` is the first),
    `curves` (rows of metrics.jsonl by arm, of its first seed), `betas` (by arm and seed, [step,
    β]), `sweep` (by arm, `grace.study.sweep.choose`), `not_swept` (sentences), `models`,
    `teacher_entropy`.
    """
    write_questions(root, questions_of(next(iter(done))), list(done))
    return summarize(config, root, list(done), list(done.values()), seconds)


def summarize(
    config: StudyConfig,
    root: Path,
    tasks: Sequence[Task],
    results: Sequence[Result],
    seconds: float,
    examples: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """As `gather`, from questions.npz and results alone; `examples` without answers, none: chosen
    and drawn."""
    by_arm: dict[Arm, list[Result]] = {}
    for arm in arms_of(config):
        own = [r for t, r in zip(tasks, results, strict=True) if t.arm == arm]
        if own:
            by_arm[arm] = own
    first = results[0]["score"]
    answers = read_questions(root / QUESTIONS)
    telling = _telling(answers, [task.folder.name for task in tasks])
    shown = examples or [_picture(tasks[0], index) for index in telling]
    with_answers = [_with_answers(one, answers, tasks) for one in shown]
    return {
        "format": FORMAT,
        "version": VERSION,
        "config": config.as_dict(),
        "environment": _environment(),
        "seconds": seconds,
        "benchmark": {
            "subtasks": list(first["subtasks"]),
            "questions": first["questions"],
            "images": sum(subtask["images"] for subtask in first["subtasks"].values()),
            "prompt": first["prompt"],
            "levels": list(results[0]["levels"]),
            "wordings": wordings(answers),
        },
        "arms": [_arm(arm, own) for arm, own in by_arm.items()],
        "differences": _differences(by_arm),
        "example": with_answers[0],
        "examples": with_answers,
        "curves": _curves(tasks),
        "betas": _betas(tasks),
        "sweep": _json(root / SWEEP),
        "not_swept": told(config),
        "models": {which: _json(root / "models" / f"{which}.json") for which in _MODELS},
        "teacher_entropy": _teacher_entropy(answers, tasks),
    }


_MODELS = ("teacher", "student")


def _json(path: Path) -> Any:
    return json.loads(path.read_text()) if path.is_file() else None


def write_questions(root: Path, asked: Questions, tasks: Sequence[Task]) -> None:
    """questions.npz, see the module."""
    rows = asked.rows
    arrays: dict[str, np.ndarray] = {
        "subtask": np.array([row.subtask for row in rows]),
        "level": np.array(list(asked.levels) or [""] * len(rows)),
        "question": np.array([row.question for row in rows]),
        "truth": np.array([row.answer for row in rows]),
        "image": asked.images,
    }
    save_questions(root, arrays | answers_of(tasks))


def answers_of(tasks: Sequence[Task]) -> dict[str, np.ndarray]:
    """`said.<arm>-s<seed>` and so on, of every task."""
    arrays: dict[str, np.ndarray] = {}
    for task in tasks:
        with np.load(task.folder / ANSWERS) as answers:
            arrays |= {f"{name}.{task.folder.name}": answers[name] for name in answers.files}
    return arrays


def save_questions(root: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write questions.npz, whole or not at all."""
    beside = root / f".{QUESTIONS}.unfinished"
    with beside.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    beside.replace(root / QUESTIONS)


def read_questions(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a questions.npz."""
    with np.load(path) as arrays:
        return {name: arrays[name] for name in arrays.files}


def _environment() -> dict[str, Any]:
    import platform

    import transformers

    from grace import __version__

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "grace": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": gpu or "cpu",
    }


def _arm(arm: Arm, results: Sequence[Result]) -> dict[str, Any]:
    """One arm: scores are means over its seeds, `errors` over pairs of images, `spread` over
    seeds (None for one); `cka` to the teacher, before and after."""
    scores = [result["score"] for result in results]
    rights = [result["right"] for result in results]
    totals = [score["total"] for score in scores]
    agreements = [result["agreement"] for result in results if result["agreement"] is not None]
    names = scores[0]["subtasks"]
    return {
        "name": arm.name,
        "label": arm.label,
        "description": METHODS[arm.method].description,
        "method": arm.method,
        "bits": arm.bits,
        "start": arm.start,
        "trained": arm.trained,
        "deployed": all(result["deployed"] for result in results),
        "agreement": min(agreements) if agreements else None,
        "megabytes": results[0]["bytes"] / 1e6,
        "parameters": results[0]["parameters"],
        "subtasks": {s: plain.fmean(x["subtasks"][s]["score"] for x in scores) for s in names},
        "levels": {
            level: plain.fmean(result["levels"][level]["total"] for result in results)
            for level in results[0]["levels"]
        },
        "perception": plain.fmean(score["perception"] for score in scores),
        "cognition": plain.fmean(score["cognition"] for score in scores),
        "total": plain.fmean(totals),
        "errors": subtask_errors(rights),
        "total_error": total_error(rights),
        "spread": plain.stdev(totals) if len(totals) > 1 else None,
        "cka": {when: _mean([r["cka"][when] for r in results]) for when in ("before", "after")},
        "tokens": results[0]["tokens"],
        "learning_rate": results[0]["learning_rate"],
        "seeds": [_seed(result) for result in results],
    }


def _seed(result: Result) -> dict[str, Any]:
    kept = ("seed", "right", "training_seconds", "scoring_seconds", "cka", "tokens", "agreement")
    return {key: result[key] for key in kept} | {"total": result["score"]["total"]}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return plain.fmean(known) if known else None


def _differences(by_arm: Mapping[Arm, Sequence[Result]]) -> list[dict[str, Any]]:
    """Total score of every quantized arm minus the control's and those before it at its bits."""
    rights = {arm.name: [r["right"] for r in results] for arm, results in by_arm.items()}
    found = []
    for arm in (a for a in by_arm if a.quantized):
        same_bits = [other.name for other in by_arm if other.bits == arm.bits]
        before = same_bits[: same_bits.index(arm.name)]
        for other in ["control", *before] if "control" in rights else before:
            points, error = paired_difference(rights[arm.name], rights[other])
            found.append({"arm": arm.name, "to": other, "points": points, "error": error})
    return found


def _curves(tasks: Sequence[Task]) -> dict[str, list[dict[str, Any]]]:
    curves: dict[str, list[dict[str, Any]]] = {}
    for task in tasks:
        if task.arm.trained and task.arm.name not in curves:
            curves[task.arm.name] = read_metrics(task.folder / METRICS)
    return curves


def _betas(tasks: Sequence[Task]) -> dict[str, dict[str, list[list[float]]]]:
    found: dict[str, dict[str, list[list[float]]]] = {}
    for task in (task for task in tasks if task.arm.trained):
        rows = read_metrics(task.folder / METRICS)
        points = [[row["step"], row["beta"]] for row in rows if "beta" in row]
        if points:
            found.setdefault(task.arm.name, {})[str(task.seed)] = points
    return found


def _teacher_entropy(
    answers: Mapping[str, np.ndarray], tasks: Sequence[Task]
) -> dict[str, Any] | None:
    """Whether the teacher errs where its answer's token has a high entropy."""
    names = [task.folder.name for task in tasks if task.arm.method == "teacher"]
    return as_json(entropy_error(answers, names[0])) if names else None


def _telling(answers: Mapping[str, np.ndarray], names: Sequence[str]) -> list[int]:
    """Questions for the examples; the very first where none tells anything."""
    students = [name for name in names if not name.startswith("teacher-")]
    return (disagreements(answers, students, _EXAMPLES) if students else []) or [0]


def _picture(task: Task, index: int) -> dict[str, Any]:
    asked = questions_of(task)
    row = asked.rows[index]
    return {
        "index": index,
        "subtask": row.subtask,
        "question": row.question,
        "truth": row.answer,
        "image": base64.b64encode(asked.png(index)).decode(),
    }


def _with_answers(
    shown: Mapping[str, Any], answers: Mapping[str, np.ndarray], tasks: Sequence[Task]
) -> dict[str, Any]:
    """What every arm's first seed says to it."""
    said: dict[str, str] = {}
    for task in tasks:
        said.setdefault(task.arm.name, str(answers[f"said.{task.folder.name}"][shown["index"]]))
    return {**shown, "answers": said}
