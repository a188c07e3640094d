"""Arms or seeds of one study that ran apart, made one: `grace study merge DIR DIR … --out DIR`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grace.study.arms import arms_of
from grace.study.config import StudyConfig, differences
from grace.study.gather import QUESTIONS, answers_of, read_questions, save_questions, summarize
from grace.study.options import from_dict
from grace.study.run import CONFIG, STUDY
from grace.study.task import ANSWERS, METRICS, RESULT, SWEEP, Task
from grace.training.files import write_whole

_TIMES = ("training_seconds", "scoring_seconds")
_KEPT = (ANSWERS, METRICS, RESULT)
_COMMON = ("subtask", "level", "question", "truth", "image")


def merge(parts: Sequence[Path], out: Path) -> dict[str, Any]:
    """Write the study of all parts' finished arms into `out`, and return its study.json.

    Weights are not copied: the merged folder is for reports, and holds results, answers and curves.

    Raises:
        FileNotFoundError: a part without results.
        ValueError: fewer than two parts, `out` is not empty, parts of different configurations,
            models, questions or sweeps, or an arm and seed in two parts with different results.
    """
    if len(parts) < 2:
        raise ValueError(f"study: merge needs at least two folders, got {len(parts)}")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"study: --out must be an empty folder, got {out}")
    configs = [_config(part) for part in parts]
    _require_one_study(parts, configs)
    found = _results(parts)
    config = _union(configs)
    tasks = _in_order(config, out, found)
    out.mkdir(parents=True, exist_ok=True)
    for task in tasks:
        _copy(found[task.folder.name][0], task.folder)
    _copy_first(parts, out)
    common = {name: read_questions(parts[0] / QUESTIONS)[name] for name in _COMMON}
    save_questions(out, common | answers_of(tasks))
    results = [found[task.folder.name][1] for task in tasks]
    studies = [json.loads((part / STUDY).read_text()) for part in parts]
    shown = [{k: v for k, v in e.items() if k != "answers"} for e in studies[0]["examples"]]
    seconds = sum(study["seconds"] for study in studies)
    study = summarize(config, out, tasks, results, seconds, shown)
    study |= {"environment": studies[0]["environment"], "unfinished": _missing(config, tasks)}
    study["environments"] = [part["environment"] for part in studies]
    write_whole(out / CONFIG, json.dumps(config.as_dict(), indent=1))
    write_whole(out / STUDY, json.dumps(study))
    return study


def _config(part: Path) -> StudyConfig:
    for name in (CONFIG, STUDY, QUESTIONS):
        if not (part / name).is_file():
            raise FileNotFoundError(f"study: merge needs a {name} in {part}, got none")
    return from_dict(json.loads((part / CONFIG).read_text()))


def _require_one_study(parts: Sequence[Path], configs: Sequence[StudyConfig]) -> None:
    for part, config in zip(parts[1:], configs[1:], strict=True):
        different = differences(configs[0].as_dict(), config.as_dict())
        if different:
            raise ValueError(
                f"study: {parts[0]} and {part} must have one configuration, got "
                f"{'; '.join(different[:4])}"
            )
        if _text(parts[0] / SWEEP) != _text(part / SWEEP):
            raise ValueError(f"study: {parts[0]} and {part} must have one sweep, got two results")
        one, other = (read_questions(folder / QUESTIONS) for folder in (parts[0], part))
        if any(not np.array_equal(one[name], other[name]) for name in _COMMON):
            raise ValueError(f"study: {parts[0]} and {part} must have the same questions")


def _text(path: Path) -> str | None:
    return path.read_text() if path.is_file() else None


_Found = dict[str, tuple[Path, dict[str, Any]]]


def _results(parts: Sequence[Path]) -> _Found:
    """By folder name, where it is and what came out."""
    found: _Found = {}
    for part in parts:
        for path in sorted(part.glob(f"arms/*/{RESULT}")):
            result, name = json.loads(path.read_text()), path.parent.name
            if name in found:
                _require_same(name, found[name], (path.parent, result))
            found.setdefault(name, (path.parent, result))
    weights = {json.dumps(result["weights"]) for _, result in found.values()}
    if len(weights) > 1:
        raise ValueError(f"study: all parts must start from the same models, got {sorted(weights)}")
    return found


def _require_same(
    name: str, one: tuple[Path, Mapping[str, Any]], other: tuple[Path, Mapping[str, Any]]
) -> None:
    """The same arm with the same seed came out twice: alike, or it is no study."""
    different = [key for key in one[1] if key not in _TIMES and one[1][key] != other[1].get(key)]
    if different:
        raise ValueError(
            f"study: {name} must have one result, got two that differ in {', '.join(different)}: "
            f"{one[0]} and {other[0]}"
        )


def _union(configs: Sequence[StudyConfig]) -> StudyConfig:
    """The configuration with everybody's seeds, arms and bits."""
    made = configs[0].as_dict()
    for name in ("seeds", "arms", "bits", "ptq_from"):
        values = [value for config in configs for value in getattr(config, name)]
        made[name] = list(dict.fromkeys(values))
    return from_dict(made)


def _in_order(config: StudyConfig, out: Path, found: Mapping[str, Any]) -> list[Task]:
    tasks = [Task(arm, seed, config, out) for arm in arms_of(config) for seed in config.seeds]
    return [task for task in tasks if task.folder.name in found and _counts(task, found)]


def _missing(config: StudyConfig, tasks: Sequence[Task]) -> list[str]:
    """Folders of the arms and seeds that no part has."""
    ran = {(task.arm, task.seed) for task in tasks}
    once = {arm for arm, _ in ran}
    return [
        f"{arm.name}-s{seed}"
        for arm in arms_of(config)
        for seed in (config.seeds if arm.seeded else config.seeds[:1])
        if (arm, seed) not in ran and (arm.seeded or arm not in once)
    ]


def _counts(task: Task, found: Mapping[str, Any]) -> bool:
    """An arm that is the same for all seeds counts once, also where parts ran it with theirs."""
    if task.arm.seeded:
        return True
    seeds = [s for s in task.config.seeds if f"{task.arm.name}-s{s}" in found]
    return task.seed == seeds[0]


def _copy(source: Path, target: Path) -> None:
    target.mkdir(parents=True)
    for name in _KEPT:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _copy_first(parts: Sequence[Path], out: Path) -> None:
    """The sweep, and what is known of the models' making."""
    if (parts[0] / SWEEP).is_file():
        shutil.copyfile(parts[0] / SWEEP, out / SWEEP)
    (out / "models").mkdir()
    for which in ("teacher", "student"):
        if (parts[0] / "models" / f"{which}.json").is_file():
            shutil.copyfile(parts[0] / "models" / f"{which}.json", out / "models" / f"{which}.json")
