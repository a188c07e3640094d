"""What the teacher says of the pictures that arms train on, made once by `grace.study.look`.

    teacher/last.bin      [supervised tokens, d]: its last hidden states where the next token counts
    teacher/layer.bin     [visual tokens, d]: those of RCKA's layer at visual tokens
    teacher/bounds.npy    int64 [images + 1]: where an image's rows of last.bin begin
    teacher/states.json   what they were made from, dtype, width, visual tokens; written last

Files are mapped, so that arms side by side share them, and read from the page cache. Of a teacher
of width 512 they are some 190 KB a picture of 144 visual tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from grace.study.training import DrawnQuestions
from grace.training.step import TEACHER_LAST, TEACHER_LAYER

LAST, LAYER, BOUNDS, DONE = "last.bin", "layer.bin", "bounds.npy", "states.json"


def are_kept(folder: Path, of: dict[str, Any]) -> bool:
    """Whether states made from `of` are there."""
    path = folder / DONE
    return path.is_file() and json.loads(path.read_text())["of"] == of


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
