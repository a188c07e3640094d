"""Packed checkpoints for the tests of what runs them, and what is in them."""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import grace
from grace import shards
from grace.evaluation import tiny
from grace.nn import PackedLinear


def packed_layers(model: nn.Module) -> dict[str, PackedLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, PackedLinear)}


def tensors_of(directory: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        found.update(load_file(file))
    return found


def assert_same_files(
    first: Path, second: Path, but_for: Mapping[str, torch.dtype] | None = None
) -> None:
    """Equal names, dtypes and values; `but_for`: dtypes in the second, by the end of a name."""
    a, b = tensors_of(first), tensors_of(second)
    assert a.keys() == b.keys()
    for name in a:
        others = [dtype for end, dtype in (but_for or {}).items() if name.endswith(end)]
        wanted = a[name].to(others[0]) if others else a[name]
        assert wanted.dtype == b[name].dtype, name
        assert torch.equal(wanted, b[name]), name


def export_tiny(directory: Path, bits: int = 4, source: Path | None = None) -> Any:
    """Writes the tiny student (or another) packed, with its processor; gives what it is made of."""
    source = source or tiny.student_dir()
    model = transformers.AutoModelForImageTextToText.from_pretrained(source).eval()
    processor = transformers.AutoProcessor.from_pretrained(source)
    grace.quantize(model, bits=bits, group_size=32)
    grace.export(model, directory, processor=processor)
    return model


def import_slowly(src: Path, out: Path, begun: Path) -> None:
    """Imports over what is there, and stops for a minute when the first shard is written."""
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a job in a shell's background has none
    save = shards.save_file

    def slow(*arguments: Any, **options: Any) -> None:
        save(*arguments, **options)
        begun.touch()
        time.sleep(60)

    shards.save_file = slow  # in a process of its own
    grace.import_published(src, out, max_shard_size="50KB", overwrite=True)
