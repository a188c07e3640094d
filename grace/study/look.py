"""The teacher looks once at the pictures that arms train on, and what it says is kept.

A pass takes milliseconds and leaves megabytes to copy and write: processes side by side share the
passes, each writing into its own places of the files of `grace.study.teacher_states`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import Executor
from functools import lru_cache
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch

from grace.study import models
from grace.study.task import STATES, Task, states_of, training_data
from grace.study.teacher_states import BOUNDS, DONE, LAST, LAYER
from grace.study.training import DrawnQuestions, as_inputs
from grace.study.worker import teacher_dtype, training_config
from grace.training.files import write_whole
from grace.training.step import Teacher, model_inputs, supervised


def keep(
    task: Task,
    *,
    batch_images: int = 128,
    pool: Executor | None = None,
    advance: Callable[[int], Any] = lambda _: None,
) -> None:
    """Run the teacher once over all training rows of a study and keep what losses look at.

    Args:
        task: an arm with RCKA; what is in its study's folder for states is replaced.
        batch_images: images a forward pass.
        pool: processes that share the passes; None: this one does them all.
        advance: told how many images are done.

    Raises:
        OSError: they do not fit the disk.
        ValueError: an arm without RCKA.
    """
    folder, data = task.root / "data" / STATES, training_data(task)
    facts = _begin(task, data, folder)
    starts = range(0, len(data), batch_images)
    if pool is None:
        for start in starts:
            advance(_keep_batch(task, start, batch_images))
    else:
        for done in pool.map(_keep_batch, repeat(task), starts, repeat(batch_images), chunksize=4):
            advance(done)
    _looking.cache_clear()
    write_whole(folder / DONE, json.dumps(facts))


def _begin(task: Task, data: DrawnQuestions, folder: Path) -> dict[str, Any]:
    """Files of their final size, and what states.json will hold."""
    teacher = Teacher(models.load(task.model_dir("teacher")), training_config(task))
    if not teacher.aligns:
        raise ValueError("study: states are kept for RCKA, got a configuration without it")
    visual = teacher.adapter.visual_tokens(as_inputs(data.collate([0])))
    assert visual is not None
    dtype = teacher_dtype(training_config(task))
    facts: dict[str, Any] = {
        "of": states_of(task),
        "dtype": str(dtype).removeprefix("torch."),
        "width": teacher.adapter.head.shape[1],
        "visual": len(visual.index),
    }
    bounds = data.supervised_bounds()
    rows = {LAST: int(bounds[-1]), LAYER: len(data) * facts["visual"]}
    sizes = {name: count * facts["width"] * dtype.itemsize for name, count in rows.items()}
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    _require_room(folder, sum(sizes.values()))
    for name, size in sizes.items():
        with (folder / name).open("wb") as file:
            file.truncate(size)
    np.save(folder / BOUNDS, bounds)
    return facts


@lru_cache(maxsize=1)
def _looking(task: Task) -> Teacher:
    """The teacher on the task's device, loaded once a process."""
    options = training_config(task)
    model = models.load(task.model_dir("teacher"), task.device, teacher_dtype(options))
    return Teacher(model, options)


def _keep_batch(task: Task, start: int, count: int) -> int:
    """Write the states of images from `start` into their places; how many these are."""
    teacher, data, folder = _looking(task), training_data(task), task.root / "data" / STATES
    items = list(range(start, min(start + count, len(data))))
    batch = {name: value.to(task.device) for name, value in data.collate(items).items()}
    inputs = as_inputs(batch)
    index, _ = supervised(inputs["labels"])
    visual = teacher.adapter.visual_tokens(inputs)
    assert visual is not None
    said = teacher(model_inputs(inputs), index, visual)
    assert said.layer is not None
    bounds = np.load(folder / BOUNDS, mmap_mode="r")
    first_of = {LAST: int(bounds[start]), LAYER: start * (len(visual.index) // len(items))}
    for name, rows in ((LAST, said.last), (LAYER, said.layer)):
        raw = rows.contiguous().cpu().view(torch.uint8).numpy()
        with (folder / name).open("r+b") as file:
            file.seek(first_of[name] * raw.shape[1])
            raw.tofile(file)
    return len(items)


def _require_room(folder: Path, needed: int) -> None:
    """OSError where the states do not fit."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"study: {folder} must have {needed / 2**30:.1f} GiB free for the teacher's states, "
            f"got {free / 2**30:.1f} GiB; keep_teacher: false needs none"
        )
