"""What quantizers learn from a checkpoint's headers, before a model is filled."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from grace.checkpoint import TensorInfo, read_header

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def read_headers(files: Sequence[str] | None) -> dict[str, TensorInfo]:
    """Tensors of the safetensors files that `from_pretrained` is about to read.

    Empty where it reads none: weights given as a state dict, or pickles.

    Raises:
        ValueError: a file that is damaged.
    """
    tensors: dict[str, TensorInfo] = {}
    for file in files or ():
        if file.endswith(".safetensors"):
            tensors.update(read_header(Path(file)))
    return tensors


def common_dtype(tensors: Mapping[str, TensorInfo], names: Iterable[str]) -> torch.dtype:
    """The dtype that all of ``names`` have; float32, which holds them all, where they differ."""
    kinds = {tensors[name].dtype for name in names}
    return _DTYPES.get(kinds.pop(), torch.float32) if len(kinds) == 1 else torch.float32
