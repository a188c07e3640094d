"""Checkpoint directories: read with suspicion, written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from grace.training.files import sync_tree

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

# What a model needs beside its weights and config, by name: processor, tokenizer, generation.
_COMPANIONS = (
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates",
)


class TensorInfo(NamedTuple):
    """What a safetensors header says of a tensor."""

    dtype: str  # "BF16", "I32", …
    shape: tuple[int, ...]


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Names, dtypes and shapes of the tensors of a safetensors file, without reading them.

    Raises:
        ValueError: it is not a safetensors file, is shorter or longer than its header says, or has
            a header that contradicts itself.
    """
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            length = struct.unpack("<Q", stream.read(8))[0]
            header = json.loads(stream.read(min(length, size)))
        header.pop("__metadata__", None)
        tensors = {n: TensorInfo(e["dtype"], tuple(e["shape"])) for n, e in header.items()}
        ends = [entry["data_offsets"][1] for entry in header.values()]
    except (struct.error, ValueError, AttributeError, TypeError, LookupError):
        raise ValueError(
            f"checkpoint: {file.name} must be a safetensors file, got {size} other bytes"
        ) from None
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise ValueError(f"checkpoint: {file.name} must have {expected} bytes, got {size}")
    try:
        safe_open(file, framework="pt").__exit__(None, None, None)
    except SafetensorError as error:
        raise ValueError(f"checkpoint: {file.name} must be a whole file, got {error}") from None
    return tensors


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no JSON object.
    """
    if not file.is_file():
        raise FileNotFoundError(f"checkpoint: {file} must exist, got no such file")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"checkpoint: {file} must be JSON, got {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"checkpoint: {file.name} must be a JSON object, got {content!r:.40}")
    return content


class Checkpoint:
    """The safetensors weights and config of a directory.

    Raises:
        NotADirectoryError, FileNotFoundError: the directory, its config or a shard is missing.
        ValueError: weights in pickles, a shard that is damaged or lacks a tensor of the index.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        if not self.directory.is_dir():
            got = "a file" if self.directory.exists() else "nothing"
            raise NotADirectoryError(f"checkpoint: {directory} must be a directory, got {got}")
        self.config = read_json(self.directory / "config.json")
        self.tensors: dict[str, TensorInfo] = {}
        self._files: dict[str, Path] = {}
        for file in self._shards():
            header = read_header(file)
            self.tensors.update(header)
            self._files.update(dict.fromkeys(header, file))
        self._check_index()

    @property
    def files(self) -> list[Path]:
        """The safetensors files, sorted."""
        return sorted(set(self._files.values()))

    def read(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors, file by file, each read when it is asked for."""
        for file in self.files:
            with safe_open(file, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118 (not a dict)
                    yield name, shard.get_tensor(name)

    def tensors_of(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Some tensors by name; what is not there is left out."""
        tensors = {}
        for name in names:
            if name in self._files:
                with safe_open(self._files[name], framework="pt") as shard:
                    tensors[name] = shard.get_tensor(name)
        return tensors

    def _shards(self) -> list[Path]:
        if (self.directory / INDEX).exists():
            names = sorted(set(self._weight_map().values()))
        elif (self.directory / SINGLE).exists():
            names = [SINGLE]
        else:
            if pickles := [f.name for f in self.directory.iterdir() if f.suffix in PICKLES]:
                raise ValueError(
                    f"checkpoint: weights must be safetensors, got the pickle {min(pickles)}"
                )
            raise FileNotFoundError(
                f"checkpoint: {self.directory} must hold {SINGLE} or {INDEX}, got neither"
            )
        for name in names:
            if not (self.directory / name).is_file():
                raise FileNotFoundError(
                    f"checkpoint: {INDEX} names {name}, which must exist, got no such file"
                )
        return [self.directory / name for name in names]

    def _weight_map(self) -> dict[str, str]:
        weight_map = read_json(self.directory / INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"checkpoint: {INDEX} must have a weight_map, got {weight_map!r:.40}")
        if outside := [name for name in weight_map.values() if Path(name).name != name]:
            raise ValueError(f"checkpoint: {INDEX} must name files beside it, got {outside[0]}")
        return weight_map

    def _check_index(self) -> None:
        if not (self.directory / INDEX).exists():
            return
        for name, file in self._weight_map().items():
            if name not in self.tensors or self._files[name].name != file:
                raise ValueError(f"checkpoint: {file} must hold {name}, got no such tensor")


def copy_companions(source: Path, target: Path) -> list[str]:
    """Copies processor, tokenizer, chat templates and generation config that ``target`` lacks."""
    copied = []
    for name in _COMPANIONS:
        if (target / name).exists() or not (source / name).exists():
            continue
        copy = shutil.copytree if (source / name).is_dir() else shutil.copyfile
        copy(source / name, target / name)
        copied.append(name)
    return copied


def check_target(target: Path, overwrite: bool) -> None:
    """Requires that a directory may be written at ``target``.

    Raises:
        ValueError: it is a file, or holds something that is not to be overwritten.
        NotADirectoryError, PermissionError: it cannot be made there.
    """
    parent = next(place for place in target.absolute().parents if place.exists())
    if not parent.is_dir():
        raise NotADirectoryError(f"export: dst must be in a directory, got the file {parent}")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(f"export: dst must be in a directory to write in, got {parent}")
    if target.exists() and not target.is_dir():
        raise ValueError(f"export: dst must be a directory, got the file {target}")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite:
        raise ValueError(
            f"checkpoint: {target} must be new or empty, or overwritten on purpose (--overwrite)"
        )
    # overwrite removes the whole directory: never one that is something else than a checkpoint.
    if not (target / "config.json").is_file():
        raise ValueError(f"export: dst must hold a checkpoint to overwrite, got {target}")


@contextlib.contextmanager
def written_whole(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """Gives a directory beside ``target``, which takes its place when all went well.

    After an error nothing is left of it and ``target`` is as it was. Only renames touch ``target``,
    so that what stands there is whole at any moment.

    Raises:
        ValueError: as `check_target`.
    """
    target = target.resolve()
    check_target(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    replaced = target.with_name(f".{target.name}.{os.getpid()}.replaced")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        sync_tree(partial)
        if target.exists():
            target.rename(replaced)
        partial.rename(target)
    except BaseException:
        if replaced.exists() and not target.exists():
            replaced.rename(target)
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if target.exists():
            shutil.rmtree(replaced, ignore_errors=True)
