"""Codes in 32-bit words: small unsigned numbers side by side, the first in the lowest bits."""

from __future__ import annotations

import torch
from torch import Tensor


def to_words(values: Tensor, bits: int) -> Tensor:
    """int32 [R, C·bits/32] of ``values`` uint8 [R, C] below 2^bits; bits 4 or 8, whole words."""
    bytes_ = values if bits == 8 else values[:, 0::2] | (values[:, 1::2] << 4)
    return bytes_.contiguous().view(torch.int32)


def from_words(words: Tensor, bits: int) -> Tensor:
    """The exact inverse of `to_words`: uint8 [R, C]."""
    bytes_ = words.contiguous().view(torch.uint8)
    return bytes_ if bits == 8 else torch.stack((bytes_ & 15, bytes_ >> 4), dim=-1).flatten(1)


def offset_of(codes: Tensor, bits: int) -> Tensor:
    """uint8 ``codes + 2^(bits-1)`` of signed int8 codes."""
    # Two's complement to offset binary flips the top bit.
    return ((codes & 15) ^ 8 if bits == 4 else codes ^ -128).view(torch.uint8)


def signed_of(values: Tensor, bits: int) -> Tensor:
    """The exact inverse of `offset_of`: int8."""
    return values.view(torch.int8) - 8 if bits == 4 else (values ^ 128).view(torch.int8)


def exact_half(layout: str, scales: Tensor, name: str) -> Tensor:
    """``scales`` in float16, none of them rounded.

    A bfloat16 scale is exact from 2^-17 up to 65280.

    Raises:
        ValueError: a scale that float16 does not hold.
    """
    half = scales.to(torch.float16)
    lost = half.to(torch.float64) != scales.to(torch.float64)
    if bool(lost.any()):
        raise ValueError(
            f"{layout}: scales of {name} must be exact in float16 (train with scale_dtype bfloat16 "
            f"or float16), got {float(scales[lost][0])!r} and {int(lost.sum())} of {lost.numel()} "
            f"that are not, in {scales.dtype}"
        )
    return half


def check_tensors(
    layout: str, tensors: dict[str, Tensor], expected: dict[str, tuple[int, ...]], name: str
) -> None:
    """Requires shapes as ``expected``, float ``scales`` and integers elsewhere.

    Raises:
        ValueError: a tensor that is missing, or of another shape or dtype.
    """
    for key, shape in expected.items():
        tensor = tensors.get(key)
        if tensor is None:
            raise ValueError(f"{layout}: {name}.{key} must be there, got no such tensor")
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{layout}: {name}.{key} must be {list(shape)}, got {list(tensor.shape)}"
            )
        floating = key == "scales"
        if tensor.is_floating_point() != floating or not (floating or tensor.dtype == torch.int32):
            kind = "floating" if floating else "int32"
            raise ValueError(f"{layout}: {name}.{key} must be {kind}, got {tensor.dtype}")
