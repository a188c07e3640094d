"""What the teacher says of the pictures that arms train on, made once for all of them.

    teacher/last.bin      [supervised tokens, d]: its last hidden states where the next token counts
    teacher/layer.bin     [visual tokens, d]: those of RCKA's layer at visual tokens
    teacher/bounds.npy    int64 [images + 1]: where an image's rows of last.bin begin
    teacher/states.json   what they were made from; written last

Files are mapped, so that arms side by side share them, and read from the page cache. Of a teacher
of width 512 they are some 190 KB a picture of 144 visual tokens.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from grace.study.training import DrawnQuestions, as_inputs
from grace.training.adapters import adapter_for
from grace.training.files import write_whole
from grace.training.step import TEACHER_LAST, TEACHER_LAYER, Teacher, model_inputs, supervised

LAST, LAYER, BOUNDS, DONE = "last.bin", "layer.bin", "bounds.npy", "states.json"


def are_kept(folder: Path, of: dict[str, Any]) -> bool:
    """Whether states made from `of` are there."""
    path = folder / DONE
    return path.is_file() and json.loads(path.read_text())["of"] == of


def keep(
    model: nn.Module,
    data: DrawnQuestions,
    folder: Path,
    config: Any,
    of: dict[str, Any],
    *,
    batch_images: int = 128,
    advance: Callable[[int], Any] = lambda _: None,
) -> None:
    """Run the teacher once over all of `data` and keep the rows that losses look at.

    Args:
        model: the teacher, on the device to run it on.
        data: what the arms train on.
        folder: for the files; what is there is replaced.
        config: a GraceConfig; it says which layer and terms are wanted.
        of: what the states depend on, as JSON; see `are_kept`.
        batch_images: images a forward pass.
        advance: told how many images are done, after every pass.

    Raises:
        OSError: they do not fit the disk.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    teacher = Teacher(model, config)
    first = next(model.parameters())
    counts: list[Tensor] = []
    with (folder / LAST).open("wb") as last, (folder / LAYER).open("wb") as layer:
        for start in range(0, len(data), batch_images):
            items = list(range(start, min(start + batch_images, len(data))))
            said, per_image = _look(teacher, data.collate(items), first.device)
            for rows, file in ((said.last, last), (said.layer, layer)):
                rows.to(first.dtype).contiguous().cpu().view(torch.uint8).numpy().tofile(file)
            counts.append(per_image.cpu())
            width, visual = said.last.shape[1], len(said.layer) // len(items)
            _require_room(folder, len(items), said, len(data) - items[-1] - 1)
            advance(len(items))
    np.save(folder / BOUNDS, np.concatenate([[0], np.cumsum(torch.cat(counts).numpy())]))
    dtype = str(first.dtype).removeprefix("torch.")
    facts = {"of": of, "dtype": dtype, "width": width, "visual": visual}
    write_whole(folder / DONE, json.dumps(facts))


def _look(teacher: Teacher, batch: dict[str, Tensor], device: torch.device) -> tuple[Any, Tensor]:
    """The teacher's rows of a batch, and how many of `last` belong to each image."""
    moved = as_inputs({name: value.to(device) for name, value in batch.items()})
    labels = moved["labels"]
    index, _ = supervised(labels)
    visual = adapter_for(teacher.model).visual_tokens(moved)
    said = teacher(model_inputs(moved), index, visual)
    if said.layer is None:
        raise ValueError("study: states are kept for RCKA, got a configuration without it")
    return said, torch.bincount(index // labels.shape[1], minlength=len(labels))


def _require_room(folder: Path, done: int, said: Any, left: int) -> None:
    """OSError where what is left, as large as the last batch, does not fit."""
    a_batch = sum(rows.numel() * rows.element_size() for rows in (said.last, said.layer))
    needed, free = a_batch * left // done, shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"study: {folder} must have {needed / 2**30:.1f} GiB free for the teacher's states, "
            f"got {free / 2**30:.1f} GiB; keep_teacher: false needs none"
        )


class TeacherStates:
    """States that are kept, by image."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.facts = json.loads((folder / DONE).read_text())
        self.bounds = np.load(folder / BOUNDS).tolist()
        self._map()

    def _map(self) -> None:
        width = self.facts["width"]
        self.last = self._mapped(LAST, self.bounds[-1]).view(-1, width)
        rows = (len(self.bounds) - 1) * self.facts["visual"]
        self.layer = self._mapped(LAYER, rows).view(-1, width)

    def _mapped(self, name: str, rows: int) -> Tensor:
        dtype, size = getattr(torch, self.facts["dtype"]), rows * self.facts["width"]
        return torch.from_file(str(self.folder / name), shared=False, size=size, dtype=dtype)

    def __getstate__(self) -> dict[str, Any]:
        """Mapped anew where this is sent: pickled, a map is all that it maps."""
        return {**vars(self), "last": None, "layer": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._map()

    def of(self, items: Sequence[int]) -> dict[str, Tensor]:
        """Rows of these images, as batches bring them to `GraceTrainer`."""
        visual = self.facts["visual"]
        last = [self.last[self.bounds[i] : self.bounds[i + 1]] for i in items]
        layer = [self.layer[i * visual : (i + 1) * visual] for i in items]
        return {TEACHER_LAST: torch.cat(last), TEACHER_LAYER: torch.cat(layer)}


class WithStates(Dataset):
    """Training rows that bring the teacher's states with them."""

    def __init__(self, data: DrawnQuestions, states: TeacherStates) -> None:
        self.data, self.states = data, states

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> int:
        return self.data[index]

    def collate(self, items: list[int]) -> dict[str, Tensor]:
        """A batch of `DrawnQuestions`, and the teacher's rows."""
        return {**self.data.collate(items), **self.states.of(items)}
