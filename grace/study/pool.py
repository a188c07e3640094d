"""Pictures and tokens of the drawn benchmark, made before anything trains, in files to map.

    pool/pixels.u8          uint8 [images, 3, P, P], one behind the other
    pool/rows.safetensors   "rows" int16 [4, tokens]: ids, labels, positions, blocks of all images'
                            rows behind their common prefix; "bounds" int64 [images + 1]
    pool/facts.json         questions of a scored split: subtask, level, image, question, answer
    pool/pool.json          what it was made from; written last

A picture takes milliseconds of a core, a training step no longer than some hundred pictures: they
are drawn once, by all cores, and read from the page cache. A pool that was interrupted goes on.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from functools import lru_cache
from itertools import starmap
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from grace.evaluation.drawn import models
from grace.evaluation.drawn.composing import compose
from grace.evaluation.drawn.describing import DESCRIBE, description, further_questions
from grace.evaluation.drawn.examples import Examples
from grace.evaluation.drawn.rendering import render
from grace.evaluation.drawn.topics import SUBTASKS, pose, worded
from grace.evaluation.packed_questions import lay_out, tokenize
from grace.study.config import StudyConfig
from grace.training.files import write_whole

TRAIN, MAKING = "train", "making"  # what arms learn from, and what models are made from
PIXELS, ROWS, FACTS, DONE = "pixels.u8", "rows.safetensors", "facts.json", "pool.json"
# Images of one job, kept when the others are not done: few where there are few, for many cores.
_PARTS, _FEWEST, _MOST = 256, 16, 1024
_Drawn = tuple[np.ndarray, Any]  # a picture [3, P, P], and its rows or facts


def spec_of(config: StudyConfig, split: str) -> dict[str, Any]:
    """All that a pool depends on."""
    spec: dict[str, Any] = {
        "split": split,
        "seed": config.seed,
        "levels": list(config.levels),
        "pixels": config.pixels,
    }
    if split == TRAIN:
        return spec | _rows_spec(config, config.train_images, 0)
    if split == MAKING and config.make is not None:  # training rows as well, behind those of arms
        return spec | {"split": TRAIN} | _rows_spec(config, config.make.images, config.train_images)
    each = config.heldout_images if split == "heldout" else config.validation_images
    return {**spec, "images": each * len(SUBTASKS) * len(config.levels)}


def _rows_spec(config: StudyConfig, images: int, first: int) -> dict[str, Any]:
    return {"images": images, "first": first, "further": config.further_questions}


def draw_pool(
    folder: Path,
    spec: dict[str, Any],
    *,
    executor: Executor | None = None,
    advance: Callable[[int], Any] = lambda _: None,
) -> None:
    """Draw a pool, or what is left of it.

    Args:
        folder: of the pool.
        spec: of `spec_of`.
        executor: of `drawers`; None: this process draws.
        advance: told how many images are done.

    Raises:
        ValueError: another pool lies there.
    """
    if not _begin(folder, spec):
        return
    each = _part_images(spec)
    starts = range(0, spec["images"], each)
    left = [start for start in starts if not _part(folder, spec, start).is_file()]
    advance(each * (len(starts) - len(left)))
    tasks = ((folder, spec, start) for start in left)
    drawn: Iterator[None] = starmap(_draw_part, tasks)
    if executor is not None and len(left) > 1:
        drawn = executor.map(_draw_part, *zip(*tasks, strict=True))
    for start, _ in zip(left, drawn, strict=True):
        advance(min(each, spec["images"] - start))
    _finish(folder, spec, list(starts))


def drawers(workers: int) -> ProcessPoolExecutor:
    """Processes that draw; not forked, as libraries that are loaded here may hold threads."""
    return ProcessPoolExecutor(workers, mp_context=get_context("spawn"))


def _part_images(spec: dict[str, Any]) -> int:
    return max(_FEWEST, min(_MOST, spec["images"] // _PARTS))


def _begin(folder: Path, spec: dict[str, Any]) -> bool:
    """Make files of their final size; False where the pool is finished."""
    for name in (DONE, "drawing.json"):
        if (folder / name).is_file():
            found = json.loads((folder / name).read_text())
            for key in {**found, **spec}:
                if found.get(key) != spec.get(key):
                    raise ValueError(
                        f"study: data in {folder} must be drawn with {key} {spec.get(key)!r}, got "
                        f"{found.get(key)!r}; choose another folder, or remove it"
                    )
            if name == DONE:
                return False
    (folder / "parts").mkdir(parents=True, exist_ok=True)
    _require_room(folder, spec["images"] * 3 * spec["pixels"] ** 2)
    with (folder / PIXELS).open("ab") as file:
        file.truncate(spec["images"] * 3 * spec["pixels"] ** 2)
    write_whole(folder / "drawing.json", json.dumps(spec))
    return True


def _require_room(folder: Path, size: int) -> None:
    """OSError where the rest of the pictures does not fit the disk."""
    path = folder / PIXELS
    held = 512 * path.stat().st_blocks if path.is_file() else 0
    free = shutil.disk_usage(folder).free
    if free + held < size:
        raise OSError(
            f"study: data must have {size / 2**30:.1f} GiB free, got {(free + held) / 2**30:.1f} "
            f"GiB in {folder}; fewer images or pixels need less"
        )


def _part(folder: Path, spec: dict[str, Any], start: int) -> Path:
    return folder / "parts" / f"{start:08d}-{_part_images(spec)}.npz"


def _draw_part(folder: Path, spec: dict[str, Any], start: int) -> None:
    """Pictures go into their place of the one file, tokens and facts into one of their own."""
    count = min(_part_images(spec), spec["images"] - start)
    pixels = _pixels(folder, spec, "r+")
    draw = _training_images if spec["split"] == TRAIN else _test_images
    rows: list[np.ndarray] = []
    facts: list[Any] = []
    for place, (picture, made) in enumerate(draw(spec, start, count), start):
        pixels[place] = picture
        (rows.append if isinstance(made, np.ndarray) else facts.extend)(made)
    lengths = np.array([row.shape[1] for row in rows], np.int64)
    together = np.concatenate(rows, axis=1) if rows else np.zeros((4, 0), np.int16)
    beside = _part(folder, spec, start).with_suffix(f".{os.getpid()}")
    with beside.open("wb") as file:
        np.savez(file, rows=together, lengths=lengths, facts=np.array(json.dumps(facts)))
    os.replace(beside, _part(folder, spec, start))


def _finish(folder: Path, spec: dict[str, Any], starts: list[int]) -> None:
    rows: list[np.ndarray] = []
    lengths: list[np.ndarray] = []
    facts: list[Any] = []
    for start in starts:
        with np.load(_part(folder, spec, start)) as part:
            rows.append(part["rows"])
            lengths.append(part["lengths"])
            facts += json.loads(str(part["facts"]))
    bounds = np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int64)
    tensors = {"rows": np.concatenate(rows, axis=1), "bounds": bounds}
    save_file({name: torch.from_numpy(value) for name, value in tensors.items()}, folder / ROWS)
    write_whole(folder / FACTS, json.dumps(facts))
    write_whole(folder / DONE, json.dumps(spec))
    shutil.rmtree(folder / "parts")


def _pixels(folder: Path, spec: dict[str, Any], mode: Any) -> np.memmap:
    shape = (spec["images"], 3, spec["pixels"], spec["pixels"])
    return np.memmap(folder / PIXELS, np.uint8, mode, shape=shape)


@lru_cache(maxsize=1)
def _processor(pixels: int) -> Any:
    return models.make_processor(pixels)


def image_tokens(pixels: int) -> int:
    """Visual tokens of a picture: one a patch."""
    return (pixels // models.PATCH) ** 2


def prefix(processor: Any, pixels: int) -> tuple[int, ...]:
    """Tokens up to the last of the image, with which every row begins."""
    return tokenize(processor, DESCRIBE, "Yes", image_tokens(pixels))[0]


def _training_images(spec: dict[str, Any], start: int, count: int) -> Any:
    examples = Examples(spec["seed"], tuple(spec["levels"]), TRAIN)
    for index in range(spec["first"] + start, spec["first"] + start + count):
        example = examples[index]
        rng = Random(f"further {spec['seed']} {index}")
        asked = [(question.text, question.answer) for question in example.questions]
        asked += further_questions(example, spec["further"], rng)
        asked.append((DESCRIBE, description(example.scene)))
        yield _picture(example.scene, spec["pixels"]), _tokens(spec["pixels"], asked)


def _picture(scene: Any, pixels: int) -> np.ndarray:
    return np.asarray(render(scene, pixels)).transpose(2, 0, 1)


def _tokens(pixels: int, asked: list[tuple[str, str]]) -> np.ndarray:
    """int16 [4, tokens] behind the prefix; see `packed_questions.lay_out`."""
    processor = _processor(pixels)
    row = [tokenize(processor, q, a, image_tokens(pixels)) for q, a in asked]
    return lay_out(row, 0)[:, len(row[0][0]) :].to(torch.int16).numpy()


def _test_images(spec: dict[str, Any], start: int, count: int) -> Any:
    """Twins, the same for every way in which they are shared out: pair k has a seed of its own."""
    levels = spec["levels"]
    each = spec["images"] // (len(SUBTASKS) * len(levels))
    for index in range(start, start + count):
        group, place = divmod(index, each)
        subtask, level = SUBTASKS[group // len(levels)], levels[group % len(levels)]
        name = f"{spec['split']} {spec['seed']} {subtask} {level} {place // 2}"
        topic = pose(subtask, level, spec["split"], Random(f"study topic {name}"))
        rng = Random(f"study scene {name} {place % 2}")
        scene = compose(topic, place % 2, level, spec["split"], rng)
        facts = [
            {
                "subtask": subtask,
                "level": level,
                "image": index,
                "question": worded(topic.questions[which]),
                "answer": "Yes" if which == place % 2 else "No",
            }
            for which in (place % 2, 1 - place % 2)  # the question that is true first, as in MME
        ]
        yield _picture(scene, spec["pixels"]), facts


class Pool:
    """A pool that is drawn; ValueError where it is not, or where a machine that went down took
    pictures with it: they are written when the system likes, and not waited for."""

    def __init__(self, folder: Path) -> None:
        if not (folder / DONE).is_file():
            raise ValueError(f"study: data in {folder} must be drawn, got no {DONE}")
        self.folder = folder
        self.spec = json.loads((folder / DONE).read_text())
        self.pixels = _pixels(folder, self.spec, "r")
        each = _part_images(self.spec)
        last = [*range(each - 1, len(self.pixels), each), len(self.pixels) - 1]
        if not all(self.pixels[place].any() for place in last):
            raise ValueError(
                f"study: data in {folder} must hold all pictures, got empty ones; remove the folder"
            )
        self.facts = json.loads((folder / FACTS).read_text())

    def __getstate__(self) -> dict[str, Any]:
        """Pictures are mapped anew where this is sent: pickled, a map is all that it maps."""
        return {**vars(self), "pixels": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.pixels = _pixels(self.folder, self.spec, "r")

    def rows(self) -> tuple[Tensor, Tensor]:
        """ "rows" and "bounds"."""
        tensors = load_file(self.folder / ROWS)
        return tensors["rows"], tensors["bounds"]

    def picture(self, index: int) -> np.ndarray:
        """Image `index`, uint8 [P, P, 3]."""
        return np.ascontiguousarray(self.pixels[index].transpose(1, 2, 0))
