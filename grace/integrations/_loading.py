"""What both quantizers do around transformers' loading of weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from grace.checkpoint import DTYPES, TensorInfo, read_header
from grace.nn import FakeQuantLinear
from grace.skeleton import Skeleton


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


def check_whole(model: Any, tensors: Mapping[str, TensorInfo]) -> None:
    """Requires that files hold all tensors of ``model``, in its shapes and kinds.

    With a quantizer transformers compares no shapes, of a missing tensor it only warns, and makes
    it up, and integers it takes from floating-point numbers. Tensors may be missing from a model of
    another class than was saved (one with a head of its own).

    Raises:
        ValueError: the name of the first tensor that is missing or another.
    """
    skeleton = Skeleton(model)
    named = {skeleton.name_of(name): info for name, info in tensors.items()}
    shapes = {name: info.shape for name, info in named.items()}
    saved = type(model).__name__ in (getattr(model.config, "architectures", None) or ())
    skeleton.check_complete(shapes, "from_pretrained", "checkpoint", whole=saved)
    for name, tensor in model.state_dict().items():
        stored = named[name].dtype if name in named else None
        if stored is not None and tensor.is_floating_point() != ("F" in stored):
            raise ValueError(
                f"from_pretrained: {name} must be of {tensor.dtype}, or a dtype of its kind, "
                f"got {stored}"
            )


def common_dtype(tensors: Mapping[str, TensorInfo], names: Iterable[str]) -> torch.dtype:
    """The dtype that all of ``names`` have; float32, which holds them all, where they differ."""
    kinds = {tensors[name].dtype for name in names}
    return DTYPES.get(kinds.pop(), torch.float32) if len(kinds) == 1 else torch.float32


def cast_dense(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Gives the parameters that are not quantized the dtype that `from_pretrained` was asked for.

    With a quantizer, transformers leaves a tensor whose name differs from the one in the file in
    the file's dtype: a LLaVA stored in bfloat16 and loaded in float32 would be half of each.
    """
    kept: set[str] = set()  # what the model wants in float32, though it is loaded in 16 bits
    if dtype in (torch.float16, torch.bfloat16):
        kept.update(getattr(model, "_keep_in_fp32_modules", None) or ())
        kept.update(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    for name, module in model.named_modules():
        if dtype is None or isinstance(module, FakeQuantLinear) or any(k in name for k in kept):
            continue
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point() and parameter.dtype != dtype:
                parameter.data = parameter.data.to(dtype)  # .data: a tied parameter stays tied
