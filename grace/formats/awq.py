"""The AWQ format in its GEMM layout: three tensors a linear, 4 bits.

A linear ``[N, K]`` in groups of ``g`` is stored as

    qweight  int32 [K, N/8]    codes + 8 of 8 neighbouring outputs, in nibbles 0 2 4 6 1 3 5 7
    qzeros   int32 [K/g, N/8]  zero points in the same order; 8 everywhere where codes are symmetric
    scales   float16 [K/g, N]

Format: https://github.com/casper-hansen/AutoAWQ (`awq/utils/packing_utils.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from grace.formats.compressed_tensors import Scheme
from grace.formats.compressed_tensors_config import Unsupported
from grace.formats.ignored import one_scheme, substrings
from grace.formats.words import (
    check_tensors,
    exact_half,
    from_words,
    offset_of,
    signed_of,
    to_words,
)

METHOD = "awq"
TENSORS = ("qweight", "qzeros", "scales")
# Nibble p of a word holds output _ORDER[p]; output i stands in nibble _PLACE[i].
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_PLACE = (0, 4, 1, 5, 2, 6, 3, 7)
_ZEROS = -0x77777778  # 0x88888888: eight times 8


def encode(codes: Tensor, scales: Tensor, scheme: Scheme, name: str) -> dict[str, Tensor]:
    """The three tensors of the format for ``codes`` int8 [N, K] and ``scales`` [N, G].

    Raises:
        ValueError: other than 4 bits, outputs that 8 does not divide, scales that float16 rounds.
    """
    rows, columns = codes.shape
    expected = shapes(rows, columns, scheme, name)
    values = offset_of(codes.t().contiguous(), 4).unflatten(1, (-1, 8))
    return {
        "qweight": to_words(values[..., list(_ORDER)].flatten(1), 4),
        "qzeros": torch.full(expected["qzeros"], _ZEROS, dtype=torch.int32, device=codes.device),
        "scales": exact_half(METHOD, scales, name).t().contiguous(),
    }


def decode(tensors: dict[str, Tensor], scheme: Scheme, name: str) -> tuple[Tensor, Tensor]:
    """The exact inverse of `encode`: (codes int8 [N, K], scales [N, G]).

    Raises:
        Unsupported: zero points other than 8.
        ValueError: a tensor of another shape or dtype than the scheme's.
    """
    if "qweight" not in tensors or tensors["qweight"].dim() != 2:
        raise ValueError(f"awq: {name}.qweight must be [K, N/8], got none")
    columns, words = tensors["qweight"].shape
    check_tensors(METHOD, tensors, shapes(words * 8, columns, scheme, name), name)
    if not bool((tensors["qzeros"] == _ZEROS).all()):
        raise Unsupported(f"awq: zero points of {name} must all be 8 (symmetric), got others")
    values = from_words(tensors["qweight"], 4).unflatten(1, (-1, 8))[..., list(_PLACE)].flatten(1)
    return signed_of(values.t().contiguous(), 4), tensors["scales"].t().contiguous()


def shapes(rows: int, columns: int, scheme: Scheme, name: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the three tensors of a weight ``[rows, columns]``.

    Raises:
        ValueError: other than 4 bits, sizes that do not divide.
    """
    if scheme.bits != 4:
        raise ValueError(f"awq: bits of {name} must be 4, got {scheme.bits}")
    size = columns if scheme.group_size == -1 else scheme.group_size
    if size < 1 or columns % size or rows % 8:
        raise ValueError(
            f"awq: {name} must have outputs that 8 divides and inputs that its group size divides, "
            f"got [{rows}, {columns}] and {scheme.group_size}"
        )
    groups = columns // size
    return {
        "qweight": (columns, rows // 8),
        "qzeros": (groups, rows // 8),
        "scales": (groups, rows),
    }


def make_config(quantized: Mapping[str, Scheme], other: Iterable[str]) -> dict[str, Any]:
    """The ``quantization_config`` of a checkpoint; arguments as for compressed-tensors.

    Raises:
        ValueError: no linear, unlike ones, or other than 4 bits.
    """
    scheme = one_scheme(METHOD, quantized, other)
    if scheme.bits != 4:
        raise ValueError(f"awq: bits must be 4, got {scheme.bits}")
    return {
        "quant_method": METHOD,
        "bits": 4,
        "group_size": scheme.group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": substrings(other, quantized),
    }


def read_config(config: Mapping[str, Any]) -> Scheme:
    """Scheme of every quantized linear.

    Raises:
        Unsupported: another version than gemm, other than 4 bits, no group size.
    """
    version = str(config.get("version", "gemm")).lower()
    if version != "gemm":
        raise Unsupported(f"awq: version must be gemm, got {version}")
    bits, size = config.get("bits", config.get("w_bit")), config.get("group_size")
    size = config.get("q_group_size") if size is None else size
    if bits != 4:
        raise Unsupported(f"awq: bits must be 4, got {bits}")
    if not isinstance(size, int) or (size != -1 and size < 1):
        raise Unsupported(f"awq: group_size must be -1 or positive, got {size}")
    return Scheme(4, size)
