"""Run a study: draw, make models, sweep learning rates, run the arms, gather study.json.

Every stage leaves whole files and is not done again; `execution` runs the arms.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from grace.checkpoint import Checkpoint
from grace.study import look, models, pool, teacher_states, worker
from grace.study.arms import CALIBRATED, Arm, arms_of
from grace.study.config import StudyConfig, differences
from grace.study.data import TEACHER, TRAIN, PackedQuestions, cache_teacher, draw
from grace.study.execution import (
    Failed,
    Progress,
    cores,
    length,
    looking_pool,
    make_models,
    run_tasks,
)
from grace.study.gather import gather
from grace.study.sweep import choose, sweep_tasks
from grace.study.task import METRICS, STATES, SWEEP, Task, finished, states_of
from grace.study.training import OutOfTime
from grace.training.files import write_whole

STUDY, CONFIG = "study.json", "config.json"


def run_study(
    config: StudyConfig,
    root: Path,
    *,
    only: Collection[str] = (),
    seeds: Collection[int] = (),
    until: float | None = None,
    stop_behind: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run what is not yet done of a study in `root`, and write and return its `study.json`.

    Args:
        config: the study.
        root: its folder.
        only: methods or names of the arms to run now; empty: all.
        seeds: those to run now; empty: all.
        until: time of the clock at which to stop: no arm begins that would not be done by then,
            one that trains all the same stops with a checkpoint.
        stop_behind: "data", "models" or "sweep": stop when that is done.
        progress: told what is done.

    Returns:
        What study.json holds, with the names of arms still to run as `unfinished`; without arms
        where none is done.

    Raises:
        FileNotFoundError: a model that is not there.
        ValueError: `root` holds another study; an arm or a seed that the study has not.
        Failed: arms, or models in the making, that failed; all others are done.
        RuntimeError: a packed model whose answers agree with the fake-quantized one's on too few
            of the questions. study.json is written all the same, here as there.
    """
    progress = progress or Progress()
    started = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tasks = _tasks(config, root, device, until)
    chosen = [task for task in tasks if _is_chosen(task, only, seeds)]
    check_choice(config, only, seeds)
    _begin(config, root)
    try:
        swept = stop_behind == "sweep" or any(map(_needs_rates, chosen))
        _stages(config, root, device, until, stop_behind, progress, swept)
        if stop_behind is None:
            run_tasks(chosen, progress)
    except OutOfTime:
        pass
    except Failed:
        conclude(config, root, tasks, time.perf_counter() - started)
        raise
    return conclude(config, root, tasks, time.perf_counter() - started)


def check_choice(config: StudyConfig, only: Collection[str], seeds: Collection[int]) -> None:
    """ValueError for an arm or a seed that the study has not."""
    arms = arms_of(config)
    known = {*(arm.name for arm in arms), *(arm.method for arm in arms)}
    for name in only:
        if name not in known:
            raise ValueError(
                f"study: arms must be of {', '.join(dict.fromkeys(config.arms))}, got {name!r}"
            )
    for seed in seeds:
        if seed not in config.seeds:
            raise ValueError(f"study: seeds must be of {list(config.seeds)}, got {seed}")


def _is_chosen(task: Task, only: Collection[str], seeds: Collection[int]) -> bool:
    named = not only or task.arm.name in only or task.arm.method in only
    return named and (not seeds or task.seed in seeds or not task.arm.seeded)


def _needs_rates(task: Task) -> bool:
    """Whether a task trains, or starts from what trained; others need not wait for the sweep."""
    return task.arm.trained or task.arm.start == "control"


def _tasks(config: StudyConfig, root: Path, device: str, until: float | None) -> list[Task]:
    """Every arm with every seed; one that is the same for all seeds runs with the first."""
    return [
        Task(arm, seed, config, root, device, until=until)
        for arm in arms_of(config)
        for seed in (config.seeds if arm.seeded else config.seeds[:1])
    ]


def _begin(config: StudyConfig, root: Path) -> None:
    """Tell of another study, and of models that do not fit, before anything is written."""
    path = root / CONFIG
    if path.is_file():
        different = differences(json.loads(path.read_text()), config.as_dict())
        if different:
            raise ValueError(
                f"study: {root} must hold a study of the same configuration, got other values "
                f"(there and now): {'; '.join(different[:4])}; choose another folder"
            )
    for method in (m for m in CALIBRATED if m in config.arms):
        worker.calibrated_quantize(method)
    if config.make is None:
        _require_models(config, root)
    root.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(config.as_dict(), indent=1))


def _require_models(config: StudyConfig, root: Path) -> None:
    from grace.quantization import quantize

    for which in ("student", "teacher"):
        Checkpoint(models.model_dir(config, root, which))
    student = models.load(models.model_dir(config, root, "student"))
    for bits in config.bits[:1]:
        quantize(student, bits=bits, group_size=config.group_size)


def _stages(
    config: StudyConfig,
    root: Path,
    device: str,
    until: float | None,
    stop_behind: str | None,
    progress: Progress,
    swept: bool,
) -> None:
    """What comes before the arms, in order; the sweep, and the teacher's look at drawn rows, only
    where something trains."""
    draw_data(config, root, progress)
    if stop_behind == "data":
        return
    make_models(config, root, device, until, progress)
    if stop_behind == "models":
        return
    if swept or config.benchmark == "synthetic":
        _look_once(config, root, device, progress)
    if swept and config.sweep is not None and not (root / SWEEP).is_file():
        tried = sweep_tasks(config, root, device, until)
        results = run_tasks(tried, progress)
        if len(results) < len(tried):
            raise OutOfTime("study: the sweep is not done")
        found = choose(config, results, [task.folder for task in tried])
        write_whole(root / SWEEP, json.dumps(found, indent=1))


def draw_data(config: StudyConfig, root: Path, progress: Progress) -> None:
    """Draw what the study trains and is scored on, unless that is done."""
    data = root / "data"
    if config.benchmark == "synthetic":
        mark = data / "fingerprint"
        if mark.is_file() and mark.read_text() != config.data_fingerprint():  # another grace's
            shutil.rmtree(data, ignore_errors=True)
        progress.start("draw", 1)
        draw(data, config)
        progress.finish("draw")
        return
    splits = [TRAIN, config.split, *(["validation"] if config.sweep is not None else [])]
    if not all(models.is_made(config, root, which) for which in ("teacher", "student")):
        splits.insert(0, pool.MAKING)
    with pool.drawers(cores()) as executor:
        for split in dict.fromkeys(splits):
            spec, done = pool.spec_of(config, split), 0
            progress.start(f"draw {split}", spec["images"])

            def advance(images: int, name: str = f"draw {split}") -> None:
                nonlocal done
                done += images
                progress.advance(name, done)

            pool.draw_pool(data / split, spec, executor=executor, advance=advance)
            progress.finish(f"draw {split}")


def _look_once(config: StudyConfig, root: Path, device: str, progress: Progress) -> None:
    """Keep what the teacher says of the synthetic benchmark's rows, and of the drawn one's where
    `keep_teacher` wants it; else it looks at those in every arm."""
    data = root / "data"
    mark = data / "fingerprint"
    task = Task(Arm("grace", config.bits[0]), 0, config, root, device)
    if config.benchmark == "drawn":
        if not config.keep_teacher or teacher_states.are_kept(data / STATES, states_of(task)):
            return
    elif mark.is_file():
        return
    progress.start("look", config.train_images)
    done = 0

    def advance(images: int) -> None:
        nonlocal done
        done += images
        progress.advance("look", done)

    if config.benchmark == "drawn":
        with looking_pool(task) as processes:
            look.keep(task, pool=processes, advance=advance)
    else:
        options = worker.training_config(task)
        model = models.load(task.model_dir("teacher"), device)
        dataset = PackedQuestions(data / TRAIN, task.processor)
        cache_teacher(model, dataset, data / TEACHER, options, advance=advance)
        mark.write_text(config.data_fingerprint())
    progress.finish("look")


def conclude(
    config: StudyConfig, root: Path, tasks: Sequence[Task], seconds: float
) -> dict[str, Any]:
    """Gather what is done into study.json; RuntimeError where a packed model is not the model that
    was trained."""
    done = {task: result for task in tasks if (result := finished(task)) is not None}
    unfinished = [task.folder.name for task in tasks if task not in done]
    if not done:
        return {"arms": [], "unfinished": unfinished}
    study = gather(config, root, done, seconds)
    study["unfinished"] = unfinished
    write_whole(root / STUDY, json.dumps(study))
    _merge_metrics(list(done), root)
    check_agreement(study)
    return study


def units(config: StudyConfig) -> int:
    """Work of all arms and of the sweep, in training steps, as progress counts it."""
    tasks = _tasks(config, Path(), "cpu", None)
    if config.sweep is not None:
        tasks += sweep_tasks(config, Path(), "cpu", None)
    return sum(map(length, tasks))


def _merge_metrics(tasks: Sequence[Task], root: Path) -> None:
    """metrics.jsonl of the whole run: every arm's rows, with its name and seed."""
    from grace.training.callbacks import read_metrics

    lines = [
        json.dumps({"arm": task.arm.name, "seed": task.seed, **row})
        for task in tasks
        for row in read_metrics(task.folder / METRICS)
    ]
    write_whole(root / METRICS, "".join(f"{line}\n" for line in lines))


def check_agreement(study: dict[str, Any]) -> None:
    """RuntimeError where a packed model is not the model that was trained."""
    least = study["config"]["least_agreement"]
    for arm in study["arms"]:
        rate = arm["agreement"]
        if rate is not None and rate < least:
            raise RuntimeError(
                f"study: the packed {arm['name']} must answer as the fake-quantized one on at "
                f"least {least:.1%} of the questions, got {rate:.2%}"
            )
