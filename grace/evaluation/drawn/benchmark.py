"""Files of the drawn benchmark: folders in MME's layout, and LLaVA rows with their images.

    root/existence/000.png  000.txt  001.png  001.txt ...    root/OCR/...    and so on

Images 2k and 2k + 1 of a subtask are twins: the same two questions with opposite answers. Whatever
maps questions to answers without the images is right exactly half of the time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any, TypeVar

from tqdm.auto import tqdm

from .composing import compose
from .examples import Examples, check_split
from .levels import LEVELS, level_named
from .rendering import render
from .scenes import WIDTH, Scene
from .topics import SUBTASKS, Topic, pose, worded

_FOLDER_IMAGES = 10000  # of training images in one folder
_Made = TypeVar("_Made")


def draw(
    root: str | Path,
    *,
    images_per_subtask: int,
    seed: int,
    level: str = "medium",
    split: str = "heldout",
    pixels: int = WIDTH,
    workers: int = 1,
) -> dict[str, list[Scene]]:
    """Draw a benchmark of all nine subtasks into `root`, which must be empty or absent.

    Args:
        root: folder to make.
        images_per_subtask: images of each subtask, two questions an image; even, for the twins.
        seed: everything is drawn from it; the same seed gives the same bytes.
        level: "easy", "medium" or "hard".
        split: "heldout" asks about compositions that never occur in training rows; "validation"
            about those that do, in other pictures; "train" likewise.
        pixels: width and height of the images.
        workers: processes that draw.

    Returns:
        The scene of every image, by subtask, in the order of the file names.

    Raises:
        ValueError: an odd number or one below its least, an unknown level or split, or a folder
            that is not empty.
    """
    root = Path(root)
    if images_per_subtask < 2 or images_per_subtask % 2:
        raise ValueError(
            f"drawn.draw: images_per_subtask must be even and at least 2, got {images_per_subtask}"
        )
    level_named(level)
    check_split(split)
    _check(pixels=(pixels, 32), workers=(workers, 1))
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise ValueError(f"drawn.draw: root must be an empty folder, got {root}")
    drawn: dict[str, list[Scene]] = {}
    jobs: list[tuple[Path, Scene, str]] = []
    for subtask in SUBTASKS:
        rng = Random(f"drawn benchmark {subtask} {level} {split} {seed}")
        made = list(_twins(subtask, images_per_subtask, level, split, rng))
        drawn[subtask] = [scene for scene, _ in made]
        digits = max(3, len(str(len(made) - 1)))
        for index, (scene, lines) in enumerate(made):
            jobs.append((root / subtask / f"{index:0{digits}d}.png", scene, lines))
    with _mapping(workers) as mapped:
        list(_shown(mapped(partial(_write_image, pixels), jobs), len(jobs)))
    return drawn


def training_rows(
    root: str | Path,
    *,
    images: int,
    seed: int,
    levels: Iterable[str] = tuple(LEVELS),
    split: str = "train",
    pixels: int = WIDTH,
    workers: int = 1,
) -> Path:
    """Draw training images into `root/images` and LLaVA rows into `root/train.json`.

    Each image has three rows: its two yes/no questions and an open-ended one (see `Examples`,
    which gives the same examples without files). Images are written as they are drawn and rows
    behind them, so that memory does not grow; `train.json` appears when all is written. A row is
    `{"id", "image": "images/00/0000000.png", "subtask", "level", "conversations": [...]}`, and the
    rows of one image follow each other.

    Returns:
        The path of `train.json`.

    Raises:
        ValueError: a number below its least, an unknown level or split.
    """
    root = Path(root)
    _check(images=(images, 1), pixels=(pixels, 32), workers=(workers, 1))
    write = partial(_write_example, Examples(seed, tuple(levels), split), root, pixels)
    root.mkdir(parents=True, exist_ok=True)
    part = root / "train.json.part"
    with part.open("w", encoding="utf-8") as file, _mapping(workers) as mapped:
        for number, rows in enumerate(_shown(mapped(write, range(images)), images)):
            text = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
            file.write(("[\n" if number == 0 else ",\n") + text)
        file.write("\n]\n")
    os.replace(part, root / "train.json")
    return root / "train.json"


def _check(**least: tuple[int, int]) -> None:
    for name, (value, lowest) in least.items():
        if value < lowest:
            raise ValueError(f"drawn: {name} must be at least {lowest}, got {value}")


def _twins(
    subtask: str, images: int, level: str, split: str, rng: Random
) -> Iterator[tuple[Scene, str]]:
    for _ in range(images // 2):
        topic = pose(subtask, level, split, rng)
        for which in (0, 1):
            yield compose(topic, which, level, split, rng), _lines(topic, which)


def _lines(topic: Topic, which: int) -> str:
    """The question that is true first, as in MME."""
    yes, no = worded(topic.questions[which]), worded(topic.questions[1 - which])
    return f"{yes}\tYes\n{no}\tNo\n"


def _write_image(pixels: int, job: tuple[Path, Scene, str]) -> None:
    path, scene, lines = job
    path.parent.mkdir(parents=True, exist_ok=True)
    render(scene, pixels).save(path)
    path.with_suffix(".txt").write_text(lines, encoding="utf-8")


def _write_example(examples: Examples, root: Path, pixels: int, index: int) -> list[dict[str, Any]]:
    name = f"images/{index // _FOLDER_IMAGES:02d}/{index:07d}.png"
    example, path = examples[index], root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    example.picture(pixels).save(path)
    return example.rows(name)


@contextmanager
def _mapping(workers: int) -> Iterator[Any]:
    """`map` over jobs, in this process or in several; results come in the order of the jobs."""
    if workers == 1:
        yield map
        return
    # Not forked: libraries that are loaded here may hold threads.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield partial(_in_windows, pool)


def _in_windows(pool: ProcessPoolExecutor, function: Any, jobs: Any) -> Iterator[Any]:
    """`pool.map` a thousand jobs at a time: it would take all jobs, however many, at once."""
    for start in range(0, len(jobs), 1000):
        yield from pool.map(function, jobs[start : start + 1000], chunksize=16)


def _shown(made: Iterable[_Made], total: int) -> Iterable[_Made]:
    return tqdm(made, total=total, desc="draw", unit="image", disable=None, leave=False)
