"""Import: a checkpoint that another program quantized becomes a packed checkpoint of this one."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grace import original_llava
from grace.certificate import Certificate, start
from grace.checkpoint import (
    PICKLES,
    Checkpoint,
    check_target,
    copy_companions,
    read_json,
    written_whole,
)
from grace.formats import compressed_tensors
from grace.formats.compressed_tensors_config import make_config
from grace.shards import ShardWriter
from grace.skeleton import Skeleton, build
from grace.sources import PUBLISHED_AWQ, PUBLISHED_CODES, Source, recognise
from grace.stored import read as read_by_shifts

_FOREIGN = ("awq", "gptq")  # methods whose checkpoints transformers loads by other packages


def import_published(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    max_shard_size: str | int = "5GB",
    overwrite: bool = False,
) -> Certificate:
    """Writes the packed checkpoint of a model that another program quantized.

    Codes and scales are taken as they are, a linear at a time: neither the model nor a dense weight
    is ever in memory. What was written is read again and compared with ``src``.

    Args:
        src: directory of a symmetric 4- or 8-bit checkpoint without act-order: compressed-tensors
            pack-quantized, AWQ (gemm), GPTQ; or AWQ tensors with ``awq_quantized_modules.json``; or
            weights on a grid with ``qat_quantized_weights.bin``, as the method's authors release.
        dst: directory to write; must not exist, or be empty.
        max_shard_size: largest size of a file, as in `save_pretrained`.
        overwrite: replace the checkpoint that ``dst`` holds.

    Returns:
        The certificate, also in ``dst``.

    Raises:
        Unsupported (a ValueError): asymmetric or act-ordered weights, other bits or layouts.
        ValueError: a ``src`` that is damaged or not whole, a ``dst`` that holds something.
        FileNotFoundError, NotADirectoryError: ``src``, or a part of it, is missing.
        RuntimeError: what was written is not what ``src`` holds; ``dst`` is then as it was.
    """
    target, directory = Path(dst).resolve(), Path(src).resolve()
    check_target(target, overwrite)
    if directory == target or target in directory.parents:
        raise ValueError(f"import: dst must not hold src, got {target}")
    checkpoint = Checkpoint(directory)
    _refuse_pickles(directory)
    plan = _Plan(recognise(checkpoint))
    with written_whole(target, overwrite) as partial:
        plan.write(partial, max_shard_size)
        copy_companions(directory, partial)
        plan.write_generation(partial)
        certificate = plan.compare(Checkpoint(partial))
        if not certificate.ok:
            raise RuntimeError(f"import: dst differs from src: {certificate.differences[0]}")
        certificate.write(partial)
    return certificate


@contextlib.contextmanager
def readable(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """``directory``, or, of a format that only other packages load, an imported copy for a while.

    Raises:
        As `import_published`.
    """
    checkpoint = Checkpoint(directory)
    config = checkpoint.config.get("quantization_config") or {}
    released = not config and (checkpoint.directory / PUBLISHED_AWQ).is_file()
    if not released and config.get("quant_method") not in _FOREIGN:
        yield checkpoint.directory
        return
    parent = checkpoint.directory.resolve().parent
    beside = parent if os.access(parent, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix=".grace-", dir=beside) as temporary:
        import_published(checkpoint.directory, Path(temporary) / "imported")
        yield Path(temporary) / "imported"


class _Plan:
    """What of a source goes where: every linear with its name in the model and its scheme."""

    def __init__(self, source: Source) -> None:
        self.source, self.checkpoint = source, source.checkpoint
        before = self.checkpoint.config
        self.original = original_llava.is_original(before)
        self.model_config = (
            original_llava.convert_config(before, self.checkpoint.tensors)
            if self.original
            else {key: value for key, value in before.items() if key != "awq_packing"}
        )
        skeleton = Skeleton(build(self.model_config))
        names = {stem: skeleton.name_of(self._renamed(f"{stem}.weight")) for stem in source.stems}
        self.names = {stem: name.removesuffix(".weight") for stem, name in names.items()}
        if not self.names:
            raise ValueError("import: src must hold quantized linears, got none")
        for stem, name in self.names.items():
            source.check(stem, name)
        parts = {f"{stem}.{part}" for stem in self.names for part in source.parts}
        self.dense = [name for name in self.checkpoint.tensors if name not in parts]
        self.schemes = {stem: source.scheme(stem, name) for stem, name in self.names.items()}
        self.shapes: dict[str, tuple[int, int]] = {}
        for stem, name in self.names.items():
            linear = skeleton.linear(name, stem)
            self.shapes[stem] = (linear.out_features, linear.in_features)
        found: dict[str, tuple[int, ...]] = {}
        found |= {f"{name}.weight": self.shapes[stem] for stem, name in self.names.items()}
        for name in self.dense:
            found[skeleton.name_of(self._renamed(name))] = self._written_shape(name)
        skeleton.check_complete(found, "import", "src")
        quantized = {name: self.schemes[stem] for stem, name in self.names.items()}
        self.config = make_config(quantized, skeleton.other_linears(quantized))

    def write(self, directory: Path, max_shard_size: str | int) -> None:
        """Writes config and weights; linears one at a time."""
        dtype = self._scale_dtype()
        writer = ShardWriter(directory, max_shard_size)
        for name in self.dense:
            writer.add(self._renamed(name), self._dense(self.checkpoint, name))
        for stem in self.names:
            codes, scales = self._read(stem)
            if dtype is not None:
                scales = scales.to(dtype)
            encoded = compressed_tensors.encode(codes, scales, self.schemes[stem].bits)
            for part, tensor in encoded.items():
                writer.add(self._renamed(f"{stem}.{part}"), tensor)
        writer.finish()
        config = {**self.model_config, "quantization_config": self.config}
        _write_json(directory / "config.json", config)

    def write_generation(self, directory: Path) -> None:
        """Keeps generation from the rows that a vocabulary was padded with, where one was."""
        if self.original:
            file = directory / "generation_config.json"
            before = read_json(file) if file.exists() else {}
            none = original_llava.suppressed(self.checkpoint.config, self.model_config)
            _write_json(file, {**before, "suppress_tokens": none})

    @torch.no_grad()
    def compare(self, written: Checkpoint) -> Certificate:
        """Compares what was written with the source, words by shifts, not by what wrote them."""
        certificate = start(written)
        for name in self.dense:
            certificate.other_tensors += 1
            own = self._renamed(name)
            ours = written.tensors_of([own]).get(own)
            if ours is None or not _same(ours, self._dense(self.checkpoint, name)):
                certificate.differences.append(f"{name}: values differ")
        for stem, shape in self.shapes.items():
            certificate.quantized_layers += 1
            certificate.codes += shape[0] * shape[1]
            if not self._same_layer(written, stem):
                certificate.differences.append(f"{stem}: codes or scales differ")
        return certificate

    def _same_layer(self, written: Checkpoint, stem: str) -> bool:
        bits, shape = self.schemes[stem].bits, self.shapes[stem]
        parts = ("weight_packed", "weight_scale", "weight_shape")
        names = {part: self._renamed(f"{stem}.{part}") for part in parts}
        tensors = written.tensors_of(names.values())
        stored = {part: tensors[name] for part, name in names.items()}
        ours = read_by_shifts("compressed-tensors", stored, bits, shape)
        if self.source.method is None:
            theirs = self._read(stem)
        else:
            found = self.source.tensors(stem)
            zero = self.source.zero_offset
            theirs = read_by_shifts(self.source.method, found, bits, shape, zero)[:2]
        equal = torch.equal(ours.codes, theirs[0].long())
        return equal and torch.equal(ours.scales.double(), theirs[1].double()) and not ours.faults

    def _renamed(self, name: str) -> str:
        return original_llava.rename(name) if self.original else name

    def _dense(self, checkpoint: Checkpoint, name: str) -> Tensor:
        tensor = checkpoint.tensors_of([name])[name]
        if not self.original:
            return tensor
        rows = self.model_config["text_config"]["vocab_size"]
        return original_llava.pad_rows(self._renamed(name), tensor, rows)

    def _written_shape(self, name: str) -> tuple[int, ...]:
        shape = self.checkpoint.tensors[name].shape
        if self.original and self._renamed(name) in original_llava.PADDED:
            return (self.model_config["text_config"]["vocab_size"], *shape[1:])
        return shape

    def _read(self, stem: str) -> tuple[Tensor, Tensor]:
        codes, scales = self.source.read(stem, self.names[stem])
        if tuple(codes.shape) != self.shapes[stem]:
            raise ValueError(
                f"import: {stem} must be a weight {list(self.shapes[stem])}, "
                f"got {list(codes.shape)}"
            )
        if not bool(scales.isfinite().all()):
            raise ValueError(f"import: scales of {stem} must be finite, got some that are not")
        return codes, scales

    def _scale_dtype(self) -> torch.dtype | None:
        """bfloat16, if that is the model's and every scale of a float16-only format is exact in it.

        So a model trained on the bfloat16 grid comes back as it left, bit for bit.
        """
        if not self.source.half_scales or _dtype_of(self.checkpoint.config) != "bfloat16":
            return None
        for stem in self.names:
            for scales in self.checkpoint.tensors_of([f"{stem}.scales"]).values():
                if not torch.equal(scales.to(torch.bfloat16).double(), scales.double()):
                    return None
        return torch.bfloat16


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _dtype_of(config: dict[str, Any]) -> str:
    text = config.get("text_config")
    inner = text.get("dtype") if isinstance(text, dict) else None
    return str(config.get("dtype") or config.get("torch_dtype") or inner)


def _same(a: Tensor, b: Tensor) -> bool:
    same = a.dtype == b.dtype and a.shape == b.shape
    return same and bool(((a == b) | (a.isnan() & b.isnan())).all())


def _refuse_pickles(directory: Path) -> None:
    for file in sorted(directory.iterdir()):
        if file.suffix in PICKLES and file.name != PUBLISHED_CODES:
            raise ValueError(f"import: src must hold no pickles, got {file.name}")
