"""The compressed-tensors ``pack-quantized`` format: three tensors a linear.

A linear ``[N, K]`` of ``b`` bits (4 or 8) in groups of ``g`` is stored as

    weight_packed  int32 [N, ceil(K·b/32)]  codes + 2^(b-1), the first code in the lowest bits
    weight_scale   [N, K/g]                 one scale a group; [N, 1] for a group a row
    weight_shape   int64 [2]                (N, K)

The config beside them is `grace.formats.compressed_tensors_config`; neither needs the
compressed-tensors package.
Format: https://github.com/vllm-project/compressed-tensors (`compressors/pack_quantized`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

TENSORS = ("weight_packed", "weight_scale", "weight_shape")
BITS = (4, 8)


class Scheme(NamedTuple):
    """How one linear is stored: bits (4 or 8) and group size (-1: one group a row)."""

    bits: int
    group_size: int


def encode(codes: Tensor, scales: Tensor, bits: int) -> dict[str, Tensor]:
    """The three tensors of the format for ``codes`` int8 [N, K] and ``scales`` [N, G].

    Raises:
        ValueError: bits other than 4 and 8.
    """
    _check_bits(bits)
    # Two's complement to offset binary flips the top bit.
    offset = ((codes & 15) ^ 8 if bits == 4 else codes ^ -128).view(torch.uint8)
    padded = pad(offset, (0, -codes.shape[1] % (32 // bits)))
    bytes_ = padded if bits == 8 else padded[:, 0::2] | (padded[:, 1::2] << 4)
    return {
        "weight_packed": bytes_.contiguous().view(torch.int32),
        "weight_scale": scales.contiguous(),
        "weight_shape": torch.tensor(codes.shape, dtype=torch.int64, device=codes.device),
    }


def decode(tensors: Mapping[str, Tensor], scheme: Scheme, name: str) -> tuple[Tensor, Tensor]:
    """The exact inverse of `encode`: (codes int8 [N, K], scales [N, G]).

    Arguments and errors as `check`.
    """
    check(tensors, scheme, name)
    columns = int(tensors["weight_shape"][1])
    return codes_of(tensors["weight_packed"], scheme.bits, columns), tensors["weight_scale"]


def codes_of(words: Tensor, bits: int, columns: int) -> Tensor:
    """Codes int8 [n, columns] of the rows ``words`` int32 of a ``weight_packed``."""
    bytes_ = words.contiguous().view(torch.uint8)
    if bits == 8:
        return (bytes_[:, :columns] ^ 128).view(torch.int8)
    nibbles = torch.stack((bytes_ & 15, bytes_ >> 4), dim=-1).flatten(1)
    return nibbles[:, :columns].view(torch.int8) - 8


def check(tensors: Mapping[str, Tensor], scheme: Scheme, name: str) -> None:
    """Requires that the three tensors of a linear agree with each other and with its scheme.

    Args:
        tensors: the tensors called `TENSORS`, of one linear.
        scheme: bits and group size that the checkpoint's config gives for it.
        name: the linear's name, for messages.

    Raises:
        ValueError: a tensor of another shape or dtype.
    """
    words, scales = tensors["weight_packed"], tensors["weight_scale"]
    rows, columns = (int(size) for size in tensors["weight_shape"])
    expected = shapes(rows, columns, scheme, name)
    for key, tensor in (("weight_packed", words), ("weight_scale", scales)):
        if tuple(tensor.shape) != expected[key]:
            raise ValueError(
                f"compressed-tensors: {name}.{key} must be {list(expected[key])} for a weight "
                f"[{rows}, {columns}] with {scheme.bits} bits and group size {scheme.group_size}, "
                f"got {list(tensor.shape)}"
            )
    if words.dtype != torch.int32:
        raise ValueError(
            f"compressed-tensors: {name}.weight_packed must be int32, got {words.dtype}"
        )
    if not scales.is_floating_point():
        raise ValueError(
            f"compressed-tensors: {name}.weight_scale must be floating-point, got {scales.dtype}"
        )


def shapes(rows: int, columns: int, scheme: Scheme, name: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the three tensors of a weight ``[rows, columns]``.

    Raises:
        ValueError: a group size that does not divide ``columns``.
    """
    _check_bits(scheme.bits)
    size = columns if scheme.group_size == -1 else scheme.group_size
    if size < 1 or columns % size:
        raise ValueError(
            f"compressed-tensors: group size of {name} must be -1 or divide {columns}, "
            f"got {scheme.group_size}"
        )
    words = -(-columns * scheme.bits // 32)
    return {
        "weight_packed": (rows, words),
        "weight_scale": (rows, columns // size),
        "weight_shape": (2,),
    }


def _check_bits(bits: int) -> None:
    if bits not in BITS:
        raise ValueError(f"compressed-tensors: bits must be 4 or 8, got {bits}")
