"""Argument checks that ops share: messages name op, argument, what is allowed and what came."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

KERNEL_DTYPES: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)


def require(condition: bool, op: str, argument: str, allowed: str, got: object) -> None:
    """Raises ``ValueError("<op>: <argument> must <allowed>, got <got>")`` unless ``condition``."""
    if not condition:
        raise ValueError(f"{op}: {argument} must {allowed}, got {got}")


def require_dims(op: str, argument: str, tensor: Tensor, dims: int) -> None:
    """Requires ``tensor`` to have ``dims`` dimensions."""
    if tensor.dim() != dims:
        shape = list(tensor.shape)
        raise ValueError(f"{op}: {argument} must have {dims} dimensions, got shape {shape}")


def require_floating(
    op: str, argument: str, tensor: Tensor, *, float64_on_cpu: bool = True
) -> None:
    """Requires a dtype that the op takes; float64 only where its CPU kernel is the reference."""
    allowed = KERNEL_DTYPES
    if float64_on_cpu and not tensor.is_cuda:
        allowed = (*KERNEL_DTYPES, torch.float64)
    if tensor.dtype not in allowed:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise ValueError(f"{op}: {argument} must be one of {names}, got {tensor.dtype}")


def require_same_device(op: str, first: str, a: Tensor, second: str, b: Tensor) -> None:
    """Requires two arguments to lie on one device."""
    if a.device != b.device:
        raise ValueError(f"{op}: {second} must be on {first}'s device {a.device}, got {b.device}")


def require_same_dtype(op: str, first: str, a: Tensor, second: str, b: Tensor) -> None:
    """Requires two arguments to have one dtype."""
    if a.dtype != b.dtype:
        raise ValueError(f"{op}: {second} must be {a.dtype} like {first}, got {b.dtype}")


def require_same_rows(op: str, first: str, a: Tensor, second: str, b: Tensor) -> None:
    """Requires two arguments to have the same first dimension."""
    if a.shape[0] != b.shape[0]:
        raise ValueError(
            f"{op}: {second} must have {a.shape[0]} rows like {first}, got {b.shape[0]}"
        )


def require_like(
    op: str, first: str, a: Tensor, second: str, b: Tensor, shape: Sequence[int]
) -> None:
    """Requires the second argument to have this shape, and the first's dtype and device.

    Sizes are put into words only where they are wrong: in a compiled graph that would fix them.
    """
    if b.dtype != a.dtype or list(b.shape) != list(shape):
        got = f"{b.dtype} {list(b.shape)}"
        raise ValueError(f"{op}: {second} must be {a.dtype} {list(shape)}, got {got}")
    require_same_device(op, first, a, second, b)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that references compute in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
