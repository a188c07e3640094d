"""What the teacher says of every row, made once, kept on disk and read while training.

    folder/cache.json                what it was made from, and what it holds
    folder/head.safetensors          the teacher's head [Vt, dt]
    folder/rows-00000.safetensors …  of each row, by its number: `<row>.last` [n, dt], hidden
                                     states at supervised tokens, `<row>.layer` [T, dt] at visual

Hidden states and the head are all that the losses look at, so that a run from a cache has the very
numbers of one with the teacher, at 2·dt bytes a token; nothing is cut to the largest logits. Rows
are found by their number, whatever order they are drawn in. A cache of other data, another
template, teacher or layer is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from grace.ops.linear_gated_dkd import whole_head
from grace.training.files import require_room, write_whole
from grace.training.step import (
    TEACHER_LAST,
    TEACHER_LAYER,
    Teacher,
    TeacherRows,
    model_inputs,
    supervised,
)

INDEX, HEAD = "cache.json", "head.safetensors"
_SHARD_ROWS = 256


def origin(
    *, rows: Sequence[Path], processor: Any, teacher: Path, layer: int, max_length: int | None
) -> dict[str, Any]:
    """What a cache depends on, as JSON: hashes of the files of rows, of the chat template with the
    tokenizer and of the teacher's config and weights' headers; the layer; the longest row."""
    template = processor.chat_template or ""
    tokenizer = processor.tokenizer.backend_tokenizer.to_str()
    weights = sorted(Path(teacher).glob("*.safetensors"))
    facts = [_file_hash(Path(teacher) / "config.json")]
    facts += [f"{path.name} {path.stat().st_size} {_weights_hash(path)}" for path in weights]
    return {
        "rows": _hash("\n".join(_file_hash(path) for path in rows).encode()),
        "template": _hash(f"{json.dumps(template)}\n{tokenizer}".encode()),
        "teacher": _hash("\n".join(facts).encode()),
        "layer": layer,
        "max_length": max_length,
    }


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _file_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def _weights_hash(path: Path, every: int = 2**24, size: int = 2**16) -> str:
    """Of the header, a piece of every 16 MiB and the end: enough to tell another training's
    weights, in no time."""
    digest = hashlib.sha256()
    length = path.stat().st_size
    with path.open("rb") as file:
        for start in (*range(0, length, every), max(0, length - size)):
            file.seek(start)
            digest.update(file.read(size))
    return digest.hexdigest()


def precompute(
    folder: Path,
    teacher: Teacher,
    dataset: Any,
    collate: Callable[[Sequence[Any]], dict[str, Any]],
    made_from: Mapping[str, Any],
    *,
    batch_size: int = 8,
    advance: Callable[[int], Any] = lambda _: None,
) -> Path:
    """Run the teacher over every row of `dataset` that `folder` does not hold yet.

    Args:
        folder: of the cache; what an interrupted call left there is gone on with.
        teacher: on the device to run it on.
        dataset: a `ConversationDataset`; its rows' `row_ids` are their numbers.
        collate: makes batches of its items.
        made_from: as `origin` gives it.
        batch_size: rows a forward pass.
        advance: told how many rows are done, after every pass.

    Raises:
        ValueError: `folder` is the cache of something else, or a row has a video.
        OSError: the disk has no room for what is left to do.
    """
    teacher.aligns = True  # whatever the run at hand looks at
    folder.mkdir(parents=True, exist_ok=True)
    index = _begin(folder, made_from)
    if not (folder / HEAD).is_file():
        _save({"head": whole_head(teacher.adapter.head)}, folder / HEAD)
    rows: dict[str, int] = index["rows"]
    # A weight above 1 gives a row several items: one of them is enough.
    items_of = {int(row): item for item, row in reversed(list(enumerate(dataset.entries)))}
    left = sorted(item for row, item in items_of.items() if str(row) not in rows)
    for number, start in enumerate(range(0, len(left), _SHARD_ROWS), index["shards"]):
        items = left[start : start + _SHARD_ROWS]
        tensors: dict[str, Tensor] = {}
        for first in range(0, len(items), batch_size):
            batch = [dataset[item] for item in items[first : first + batch_size]]
            tensors.update(_say(teacher, batch, collate))
            advance(len(batch))
        size = sum(tensor.nbytes for tensor in tensors.values())
        require_room(folder, 2 * size, "two more shards of the teacher's cache")
        _save(tensors, folder / _shard(number))
        # A row that turned out bad has another in its place, and is done as well.
        rows.update({str(dataset.entries[item]): number for item in items})
        rows.update({name.partition(".")[0]: number for name in tensors})
        index["shards"] = number + 1
        write_whole(folder / INDEX, json.dumps(index))
    index["complete"] = True
    write_whole(folder / INDEX, json.dumps(index))
    return folder


def _begin(folder: Path, made_from: Mapping[str, Any]) -> dict[str, Any]:
    if (folder / INDEX).is_file():
        index = json.loads((folder / INDEX).read_text())
        _require_same(folder, index["made_from"], made_from)
        return index
    if any(folder.iterdir()):
        raise ValueError(f"precompute-teacher: folder must be empty or a cache, got {folder}")
    index = {"made_from": dict(made_from), "rows": {}, "shards": 0, "complete": False}
    write_whole(folder / INDEX, json.dumps(index))
    return index


def _require_same(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    odd = [name for name in wanted if found.get(name) != wanted[name]]
    if odd:
        raise ValueError(
            f"teacher_cache: {folder} must be made from the {', '.join(odd)} of this run, got "
            f"{found.get(odd[0])!r} for {odd[0]}, not {wanted[odd[0]]!r}"
        )


def _shard(number: int) -> str:
    return f"rows-{number:05d}.safetensors"


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    beside = path.with_name(f".{path.name}.unfinished")
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, beside)
    beside.replace(path)


@torch.no_grad()
def _say(teacher: Teacher, items: Sequence[Any], collate: Callable[..., Any]) -> dict[str, Tensor]:
    """The teacher's rows of a batch, by the names they are kept under."""
    device = next(teacher.model.parameters()).device
    batch = {name: value.to(device) for name, value in collate(items).items()}
    if batch.get("pixel_values_videos") is not None:
        raise ValueError("precompute-teacher: rows must have images or text only, got a video")
    index, _ = supervised(batch["labels"])
    visual = teacher.adapter.visual_tokens(batch)
    said = teacher(model_inputs(batch), index, visual)
    length, made = batch["labels"].shape[1], {}
    for place, row in enumerate(batch["row_ids"].tolist()):
        made[f"{row}.last"] = said.last[index // length == place].clone()
        if said.layer is not None and visual is not None:
            made[f"{row}.layer"] = said.layer[visual.index // length == place].clone()
    return made


class TeacherCache(Dataset):
    """A dataset whose rows bring what the teacher said of them.

    Args:
        dataset: a `ConversationDataset`.
        folder: as `precompute` left it.
        made_from: of this run; the cache must be made from the same.

    Raises:
        FileNotFoundError: no cache there.
        ValueError: a cache of something else, one that is not complete, or without a row.
    """

    def __init__(self, dataset: Any, folder: Path, made_from: Mapping[str, Any]) -> None:
        if not (folder / INDEX).is_file():
            raise FileNotFoundError(
                f"teacher_cache: must be a folder of `grace precompute-teacher`, got {folder}"
            )
        index = json.loads((folder / INDEX).read_text())
        _require_same(folder, index["made_from"], made_from)
        if not index["complete"]:
            raise ValueError(f"teacher_cache: must be complete, got {folder}; run it to its end")
        self.dataset, self.folder, self.rows = dataset, folder, index["rows"]
        self._files: dict[int, Any] = {}
        missing = [row for row in dataset.entries if str(row) not in self.rows]
        if missing:
            raise ValueError(f"teacher_cache: {folder} must hold every row, got no {missing[0]}")

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, item: int) -> dict[str, Tensor]:
        """The dataset's item with `teacher_last` and `teacher_layer` (no rows without an image)."""
        found = self.dataset[item]
        row = int(found["row_ids"])
        shard = self._open(self.rows[str(row)])
        last = shard.get_tensor(f"{row}.last")
        name = f"{row}.layer"
        layer = shard.get_tensor(name) if name in shard.keys() else last[:0]  # noqa: SIM118
        return {**found, TEACHER_LAST: last, TEACHER_LAYER: layer}

    @property
    def lengths(self) -> Any:
        """Tokens of each item, as the dataset estimates them."""
        return self.dataset.lengths

    @property
    def fingerprint(self) -> str:
        """The dataset's."""
        return self.dataset.fingerprint

    @property
    def skipped(self) -> int:
        """Rows that the dataset left out."""
        return self.dataset.skipped

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_files": {}}  # open files do not travel to a loader's processes

    def _open(self, number: int) -> Any:
        if number not in self._files:
            self._files[number] = safe_open(self.folder / _shard(number), framework="pt")
        return self._files[number]

    def head(self) -> Tensor:
        """The teacher's head [Vt, dt]."""
        with safe_open(self.folder / HEAD, framework="pt") as file:
            return file.get_tensor("head")


class CachedTeacher(nn.Module):
    """In the place of a teacher where `TeacherCache` brings what it says: its head alone."""

    head: Tensor

    def __init__(self, head: Tensor) -> None:
        super().__init__()
        self.register_buffer("head", head, persistent=False)


class CachedTeacherRows:
    """As `grace.training.step.Teacher`, for batches that bring its rows.

    Args:
        head: of the teacher [Vt, dt], on the run's device.
        config: the run's options.
    """

    def __init__(self, head: Tensor, config: Any) -> None:
        self.adapter = SimpleNamespace(head=head)
        self.distils = config.distillation != "none"
        self.aligns = config.omega > 0

    def __call__(self, *_: Any) -> TeacherRows:
        """There is nothing to run."""
        raise ValueError(f"GraceTrainer: batches must bring {TEACHER_LAST} with a cached teacher")
