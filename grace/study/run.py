"""Run a study: draw, let the teacher look once, run the arms, gather study.json.

On a CPU arms run in as many processes as there are cores, with one thread each: two processes of
one thread do more than one of two. On a GPU small models share it and large ones take turns.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch

from grace.checkpoint import Checkpoint
from grace.study import worker
from grace.study.arms import Arm
from grace.study.config import StudyConfig
from grace.study.data import TEACHER, TRAIN, PackedQuestions, cache_teacher, draw
from grace.study.gather import gather
from grace.study.worker import Task

STUDY = "study.json"
LEAST_AGREEMENT = 0.995
# Steps of progress that scoring counts for, beside an arm's training steps.
_SCORING_STEPS = 40
_SMALL_BYTES = 64 * 2**20  # of both models' weights: they leave a GPU nearly idle
_MOST_ON_GPU = 8  # processes with small models: each holds a CUDA context


def run_study(
    config: StudyConfig, arms: Sequence[Arm], root: Path, *, progress: Progress | None = None
) -> dict[str, Any]:
    """Run what is not yet done of a study in `root`, and write and return its `study.json`.

    Raises:
        FileNotFoundError: a model that is not there.
        RuntimeError: a packed model whose answers agree with the fake-quantized one's on less than
            99.5 % of the questions; study.json is written all the same.
    """
    progress = progress or Progress()
    started = time.perf_counter()
    _require_models(config)
    root.mkdir(parents=True, exist_ok=True)
    (root / "config.json").write_text(json.dumps(config.as_dict(), indent=1))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    _prepare(config, root, device, progress)
    tasks = [
        Task(arm, seed, config, root, device)
        for arm in arms
        for seed in (config.seeds if arm.trained else config.seeds[:1])
    ]
    results = _run_tasks(tasks, progress)
    study = gather(config, arms, results, root, time.perf_counter() - started)
    (root / STUDY).write_text(json.dumps(study))
    _merge_metrics(tasks, root)
    check_agreement(study)
    return study


def _require_models(config: StudyConfig) -> None:
    """What is wrong with the models is told of before anything is written."""
    from grace.quantization import quantize

    for which in ("student", "teacher"):
        Checkpoint(worker.model_dir(config, which))
    student = worker.load(config, "student")
    for bits in config.bits[:1]:
        quantize(student, bits=bits, group_size=config.group_size)


class Progress:
    """What a study reports while it runs; the one of a terminal is in `grace.study.progress`."""

    def start(self, name: str, total: int) -> None:
        """A part of the study begins, of `total` units."""

    def advance(self, name: str, done: int) -> None:
        """`done` units of it are done."""

    def finish(self, name: str) -> None:
        """It is over."""


def _prepare(config: StudyConfig, root: Path, device: str, progress: Progress) -> None:
    """Draw, and cache the teacher's rows, unless that was done for the same configuration."""
    data, mark = root / "data", root / "data" / "fingerprint"
    if mark.is_file() and mark.read_text() == config.data_fingerprint():
        return
    shutil.rmtree(data, ignore_errors=True)
    progress.start("draw", 1)
    draw(data, config)
    progress.finish("draw")
    progress.start("teacher", config.train_images)
    dataset = PackedQuestions(data / TRAIN, worker.processor_of(config))
    done = 0

    def advance(images: int) -> None:
        nonlocal done
        done += images
        progress.advance("teacher", done)

    task = Task(Arm("grace", config.bits[0]), 0, config, root, device)
    grace = worker.training_config(task)
    teacher = worker.load(config, "teacher", device)
    cache_teacher(teacher, dataset, data / TEACHER, grace, advance=advance)
    progress.finish("teacher")
    mark.write_text(config.data_fingerprint())


def _run_tasks(tasks: Sequence[Task], progress: Progress) -> list[dict[str, Any]]:
    done = {task: result for task in tasks if (result := worker.finished(task)) is not None}
    # The longest first, so that no core waits at the end for one long arm.
    left = sorted((task for task in tasks if task not in done), key=_length, reverse=True)
    for task in left:
        shutil.rmtree(task.folder, ignore_errors=True)
    processes = min(len(left), _processes(left[0])) if left else 0
    if processes > 1 or (left and left[0].device == "cpu"):
        done |= _in_processes(left, processes, progress)
    else:
        done |= _in_sequence(left, progress)
    return [done[task] for task in tasks]


def _processes(task: Task) -> int:
    """How many arms run at once.

    On a GPU a small model's steps are launches that hardly load it, so that arms side by side take
    little longer than one; a large model has the GPU for itself.
    """
    if task.device == "cpu":
        return cores()
    folders = (worker.model_dir(task.config, which) for which in ("teacher", "student"))
    weights = [path for folder in folders for path in folder.glob("*.safetensors")]
    small = sum(path.stat().st_size for path in weights) < _SMALL_BYTES
    return min(cores(), _MOST_ON_GPU) if small else 1


def units(config: StudyConfig, arms: Sequence[Arm]) -> int:
    """Work of all arms, in training steps, as progress counts it."""
    trained = sum(arm.trained for arm in arms)
    runs = trained * len(config.seeds) + len(arms) - trained
    return runs * _SCORING_STEPS + trained * len(config.seeds) * config.steps


def _length(task: Task) -> int:
    return _SCORING_STEPS + (task.config.steps if task.arm.trained else 0)


def _in_sequence(tasks: Sequence[Task], progress: Progress) -> dict[Task, dict[str, Any]]:
    results = {}
    worker.quiet()
    for task in tasks:
        progress.start(task.folder.name, _length(task))
        results[task] = worker.run_arm(task)
        progress.finish(task.folder.name)
    return results


def _in_processes(
    tasks: Sequence[Task], processes: int, progress: Progress
) -> dict[Task, dict[str, Any]]:
    """All tasks in a pool; progress is read from the metrics that running arms write."""
    results: dict[Task, dict[str, Any]] = {}
    with worker_pool(processes) as pool:
        futures: dict[Future, Task] = {pool.submit(worker.run_arm, task): task for task in tasks}
        for task in tasks:
            progress.start(task.folder.name, _length(task))
        try:
            while futures:
                finished, _ = wait(futures, timeout=0.5, return_when=FIRST_COMPLETED)
                for future in finished:
                    task = futures.pop(future)
                    results[task] = future.result()
                    progress.finish(task.folder.name)
                for task in futures.values():
                    progress.advance(task.folder.name, _last_step(task))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return results


def worker_pool(count: int) -> ProcessPoolExecutor:
    """Processes of one thread each."""
    # Half of a small model's step is page faults of tensors mapped anew: keep what was freed.
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
        os.environ.setdefault(name, "4000000000")
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(count, context, worker.use_one_thread)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _last_step(task: Task) -> int:
    path = task.folder / worker.METRICS
    if not path.is_file():
        return 0
    from grace.training.callbacks import read_metrics

    rows = read_metrics(path)
    return rows[-1]["step"] if rows else 0


def _merge_metrics(tasks: Sequence[Task], root: Path) -> None:
    """metrics.jsonl of the whole run: every arm's rows, with its name and seed."""
    from grace.training.callbacks import read_metrics

    with (root / worker.METRICS).open("w") as file:
        for task in tasks:
            for row in read_metrics(task.folder / worker.METRICS):
                file.write(json.dumps({"arm": task.arm.name, "seed": task.seed, **row}) + "\n")


def check_agreement(study: dict[str, Any]) -> None:
    """RuntimeError where a packed model is not the model that was trained."""
    for arm in study["arms"]:
        rate = arm["agreement"]
        if rate is not None and rate < LEAST_AGREEMENT:
            raise RuntimeError(
                f"study: the packed {arm['name']} must answer as the fake-quantized one on at "
                f"least {LEAST_AGREEMENT:.1%} of the questions, got {rate:.2%}"
            )
