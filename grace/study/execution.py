"""Arms of a study side by side: in processes of one thread each, or one after another.

On a CPU arms run in as many processes as there are cores, as two of one thread do more than one of
two. On a GPU small models share it and large ones take turns; several GPUs work side by side.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from grace.study import models, ranks, worker
from grace.study.arms import Arm
from grace.study.config import StudyConfig
from grace.study.task import METRICS, Task, finished
from grace.study.training import OutOfTime

# Steps of progress that scoring counts for, beside an arm's training steps.
_SCORING_STEPS = 40
_SMALL_BYTES = 64 * 2**20  # of both models' weights: they leave a GPU nearly idle
_MOST_ON_GPU = 8  # processes with small models: each holds a CUDA context
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_T = TypeVar("_T")


class Failed(RuntimeError):
    """Some parts failed; all others are done."""

    def __init__(self, errors: Mapping[str, BaseException]) -> None:
        name, first = next(iter(errors.items()))
        super().__init__(
            f"study: {', '.join(errors)} failed, what else was to run is done; {name}: "
            f"{type(first).__name__}: {first}"
        )
        self.__cause__ = first


class Progress:
    """What a study reports while it runs; the one of a terminal is in `grace.study.progress`."""

    def start(self, name: str, total: int) -> None:
        """A part of the study begins, of `total` units."""

    def advance(self, name: str, done: int) -> None:
        """`done` units of it are done."""

    def finish(self, name: str) -> None:
        """It is over."""


def run_tasks(tasks: Sequence[Task], progress: Progress) -> list[dict[str, Any]]:
    """Results of the tasks that are done, or could be done in time, in their order.

    Raises:
        Failed: some failed, when all others are done.
    """
    done = {task: result for task in tasks if (result := finished(task)) is not None}
    left = [task for task in tasks if task not in done]
    errors: dict[str, BaseException] = {}
    # Arms that start from the control wait for it.
    for wave in (False, True):
        now = [task for task in left if (task.arm.start == "control") == wave]
        now = [task for task in now if not wave or _control_is_done(task)]
        if now:
            results, failed = _run_wave(now, progress)
            done |= results
            errors |= failed
    if errors:
        raise Failed(errors)
    return [done[task] for task in tasks if task in done]


def make_models(
    config: StudyConfig, root: Path, device: str, until: float | None, progress: Progress
) -> None:
    """Teacher and student of a study that makes them: on several GPUs one after the other, each on
    all of them; on one GPU side by side, as one launches while the other computes.

    Raises:
        OutOfTime: `until` came first.
    """
    left = [which for which in ("teacher", "student") if not models.is_made(config, root, which)]
    if len(gpus()) == 1 and len(left) > 1:
        _make_side_by_side(config, root, left, device, until, progress)
        return
    for which in left:
        progress.start(which, 1)
        if len(gpus()) > 1:
            ranks.make_together(config, root, which, device, until, len(gpus()))
        else:
            models.make(config, root, which, device, until)
        progress.finish(which)


def _make_side_by_side(
    config: StudyConfig,
    root: Path,
    left: Sequence[str],
    device: str,
    until: float | None,
    progress: Progress,
) -> None:
    with worker_pool(len(left)) as executor:
        futures = {
            executor.submit(_make_in_time, config, root, w, device, until): Part(
                w, models.steps_of(config, w), models.making_dir(root, w) / METRICS
            )
            for w in left
        }
        made, errors = _follow(executor, futures, progress)
    if errors:
        raise Failed(errors)
    if not all(made.values()):
        raise OutOfTime(f"study: making {' and '.join(left)} stopped")


def _make_in_time(
    config: StudyConfig, root: Path, which: str, device: str, until: float | None
) -> bool:
    """In a process of the pool: whether the model was made, as one that stops keeps no other from
    its end."""
    try:
        models.make(config, root, which, device, until)
    except OutOfTime:
        return False
    return True


def _control_is_done(task: Task) -> bool:
    control = replace(task, arm=Arm("control"))
    return finished(control) is not None


_Results = dict[Task, dict[str, Any]]
_Errors = dict[str, BaseException]  # by the name of the part


def _run_wave(tasks: Sequence[Task], progress: Progress) -> tuple[_Results, _Errors]:
    # The longest first, so that no core waits at the end for one long arm.
    tasks = sorted(tasks, key=length, reverse=True)
    processes = min(len(tasks), _processes(tasks[0]))
    alone = processes == 1 and (tasks[0].device != "cpu" or tasks[0].config.processes == 1)
    return _in_sequence(tasks, progress) if alone else _in_processes(tasks, processes, progress)


def _processes(task: Task) -> int:
    """How many arms run at once, on all GPUs together.

    On a GPU a small model's steps are launches that hardly load it, so that arms side by side take
    little longer than one; a large model has the GPU for itself.
    """
    if task.device == "cpu":
        return task.config.processes or cores()
    return (task.config.processes or _on_a_gpu(task)) * len(gpus())


def _on_a_gpu(task: Task) -> int:
    folders = (task.model_dir(which) for which in ("teacher", "student"))
    weights = [path for folder in folders for path in folder.glob("*.safetensors")]
    small = sum(path.stat().st_size for path in weights) < _SMALL_BYTES
    return min(max(1, cores() // len(gpus())), _MOST_ON_GPU) if small else 1


def length(task: Task) -> int:
    """Work of an arm, in training steps, as progress counts it."""
    return _SCORING_STEPS + (task.config.steps if task.arm.trained else 0)


def _in_sequence(tasks: Sequence[Task], progress: Progress) -> tuple[_Results, _Errors]:
    results: _Results = {}
    errors: _Errors = {}
    worker.quiet()
    for task in tasks:
        progress.start(task.folder.name, length(task))
        try:
            result = worker.run_arm(task)
        except Exception as error:  # noqa: BLE001 (raised behind the others)
            errors[task.folder.name] = error
        else:
            results |= {} if result is None else {task: result}
        progress.finish(task.folder.name)
    return results, errors


def _in_processes(
    tasks: Sequence[Task], processes: int, progress: Progress
) -> tuple[_Results, _Errors]:
    with worker_pool(processes) as executor:
        futures = {
            executor.submit(worker.run_arm, task): Part(
                task.folder.name, length(task), task.folder / METRICS
            )
            for task in tasks
        }
        results, errors = _follow(executor, futures, progress)
    by_name = {task.folder.name: task for task in tasks}
    return {by_name[n]: result for n, result in results.items() if result is not None}, errors


@dataclass(frozen=True)
class Part:
    """Work of a process: its name, its steps, the file in which it tells how far it is."""

    name: str
    steps: int
    metrics: Path


def _follow(
    executor: ProcessPoolExecutor, futures: Mapping[Future[_T], Part], progress: Progress
) -> tuple[dict[str, _T], _Errors]:
    """Results and errors by name, in their order: what fails keeps no other from its end."""
    for part in futures.values():
        progress.start(part.name, part.steps)
    left = set(futures)
    try:
        while left:
            done, left = wait(left, timeout=0.5, return_when=FIRST_COMPLETED)
            for future in done:
                progress.finish(futures[future].name)
            for future in left:
                progress.advance(futures[future].name, _last_step(futures[future].metrics))
    except BaseException:
        executor.shutdown(wait=False, cancel_futures=True)
        raise
    errors = {part.name: error for f, part in futures.items() if (error := f.exception())}
    results = {p.name: f.result() for f, p in futures.items() if p.name not in errors}
    return results, errors


def worker_pool(count: int) -> ProcessPoolExecutor:
    """Processes of one thread each; each sees one GPU, the GPUs in turn."""
    # Half of a small model's step is page faults of tensors mapped anew: keep what was freed.
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
        os.environ.setdefault(name, "4000000000")
    context = multiprocessing.get_context("spawn")
    places = context.Queue()
    visible = gpus()
    for index in range(count if visible else 0):
        places.put(visible[index % len(visible)])
    return ProcessPoolExecutor(count, context, _begin, (places if visible else None,))


def _begin(places: Any) -> None:
    """In a process of the pool: take a GPU, before anything here looks for one."""
    if places is not None:
        os.environ[_VISIBLE] = places.get()
    worker.use_one_thread()
    if places is not None and torch.cuda.device_count() > 1:
        raise RuntimeError(
            f"study: a process must see one GPU, got {torch.cuda.device_count()}: CUDA was started "
            f"before {_VISIBLE} was set"
        )


def looking_pool(task: Task) -> AbstractContextManager[ProcessPoolExecutor | None]:
    """Processes for the teacher's look, as many as arms run at once; none where there is no GPU,
    as a pass there fills the cores."""
    return worker_pool(_processes(task)) if task.device != "cpu" else nullcontext()


def gpus() -> list[str]:
    """Names of the GPUs that this process sees, as CUDA_VISIBLE_DEVICES takes them."""
    count = torch.cuda.device_count()
    named = [name for name in os.environ.get(_VISIBLE, "").split(",") if name.strip()]
    return named[:count] if named else [str(index) for index in range(count)]


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _last_step(metrics: Path) -> int:
    from grace.training.callbacks import read_metrics

    rows = read_metrics(metrics)
    return rows[-1]["step"] if rows else 0
