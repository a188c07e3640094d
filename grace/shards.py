"""Safetensors shards written as tensors come: no more than one shard is in memory at a time."""

from __future__ import annotations

import json
import re
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from grace.checkpoint import INDEX, SINGLE

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_size(size: str | int) -> int:
    """Bytes of a size such as ``"5GB"``, ``"200MiB"`` or a number.

    Raises:
        ValueError: it is neither, or not positive.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(size).strip())
    unit = _UNITS.get(match[2].upper() or "B") if match else None
    amount = int(float(match[1]) * unit) if match and unit else 0
    if amount < 1:
        raise ValueError(f"export: max_shard_size must be a size such as 5GB, got {size!r}")
    return amount


class ShardWriter:
    """Writes tensors into ``directory``, into files of at most ``max_shard_size``, then an index.

    A tensor larger than that has a file of its own.

    Raises:
        ValueError: a size that is none, or a name that was there before.
        OSError: a disk that is full, or cannot be written.
    """

    def __init__(self, directory: Path, max_shard_size: str | int = "5GB") -> None:
        self.directory = directory
        self._limit = parse_size(max_shard_size)
        self._tensors: dict[str, Tensor] = {}
        self._size = self._total = 0
        self._shards: list[list[str]] = []
        self._names: set[str] = set()

    def add(self, name: str, tensor: Tensor) -> None:
        """Takes a tensor in; the shard before it is written where it would grow too large."""
        if name in self._names:
            raise ValueError(f"export: names of tensors must be unique, got {name} twice")
        self._names.add(name)
        size = tensor.numel() * tensor.element_size()
        if self._tensors and self._size + size > self._limit:
            self._flush()
        own = tensor.detach().cpu().contiguous()
        # safetensors refuses two tensors of one memory.
        held = {other.untyped_storage().data_ptr() for other in self._tensors.values()}
        shared = own.untyped_storage().data_ptr() in held
        self._tensors[name] = own.clone() if shared else own
        self._size += size
        self._total += size

    def finish(self) -> None:
        """Writes the last shard, gives all their names, and writes the index if there are more."""
        if self._tensors or not self._shards:
            self._flush()
        count, weight_map = len(self._shards), {}
        for index, names in enumerate(self._shards):
            file = SINGLE if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"
            self._partial(index).rename(self.directory / file)
            weight_map.update(dict.fromkeys(names, file))
        if count > 1:
            content = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
            text = json.dumps(content, indent=2, sort_keys=True) + "\n"
            (self.directory / INDEX).write_text(text, encoding="utf-8")

    def _flush(self) -> None:
        file = self._partial(len(self._shards))
        try:
            save_file(self._tensors, file, metadata={"format": "pt"})
        except SafetensorError as error:  # no OSError, and it names no file
            raise OSError(
                f"export: {self.directory.parent} must have room for {self._size} more bytes, "
                f"got {error}"
            ) from error
        self._shards.append(list(self._tensors))
        self._tensors, self._size = {}, 0

    def _partial(self, index: int) -> Path:
        return self.directory / f"shard-{index:05d}.partial"
