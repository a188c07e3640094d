"""What a stored linear says, for `grace.verification`: words taken apart by shifts.

Nothing here uses the code that packs: an error there cannot hide in the check.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

PARTS = {
    "compressed-tensors": ("weight_packed", "weight_scale", "weight_shape"),
    "awq": ("qweight", "qzeros", "scales"),
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
}
_AWQ_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)  # where the outputs 0 … 7 of a word stand


class Stored(NamedTuple):
    """Codes int64 [N, K], scales [N, G] as stored, and what is wrong with the rest."""

    codes: Tensor
    scales: Tensor
    faults: list[str]


def method_of(config: Mapping[str, object]) -> str:
    """The format that a checkpoint's ``quantization_config`` names.

    Raises:
        ValueError: none that is known.
    """
    method = str(config.get("quant_method"))
    if method not in PARTS:
        raise ValueError(f"quant_method must be one of {', '.join(PARTS)}, got {method}")
    return method


def read(
    method: str, parts: Mapping[str, Tensor], bits: int, shape: tuple[int, int], zero: int = 0
) -> Stored:
    """Reads the tensors of a linear [N, K].

    Args:
        method: its format.
        parts: the tensors called ``PARTS[method]``.
        bits: of its codes.
        shape: (N, K).
        zero: 1 for GPTQ's version 2, whose zero points are stored as they are.
    """
    if method == "compressed-tensors":
        return _read_compressed(parts, bits, shape)
    scales, half = parts["scales"], 2 ** (bits - 1)
    if method == "awq":
        codes, points = _awq(parts["qweight"]).t() - half, _awq(parts["qzeros"])
    else:
        codes = _low_first(parts["qweight"].t(), bits) - half
        points = _low_first(parts["qzeros"], bits) + 1 - zero
    return Stored(codes, scales.t(), list(_faults(parts, codes, points, half, shape)))


def _faults(
    parts: Mapping[str, Tensor], codes: Tensor, points: Tensor, half: int, shape: tuple[int, int]
) -> Iterator[str]:
    groups = parts["scales"].shape[0]
    if tuple(codes.shape) != shape:
        yield f"qweight holds a weight {list(codes.shape)}"
    if points.shape != parts["scales"].shape or not bool((points == half).all()):
        yield f"zero points are not all those of {half}"
    if "g_idx" in parts:
        expected = torch.arange(shape[1]) // max(1, shape[1] // max(1, groups))
        if not torch.equal(parts["g_idx"].long(), expected):
            yield "g_idx is not k // group_size"


def _read_compressed(parts: Mapping[str, Tensor], bits: int, shape: tuple[int, int]) -> Stored:
    codes = _low_first(parts["weight_packed"], bits)[:, : shape[1]] - 2 ** (bits - 1)
    stored = parts["weight_shape"].tolist()
    faults = [] if stored == list(shape) else [f"weight_shape is {stored}"]
    return Stored(codes, parts["weight_scale"], faults)


def _low_first(words: Tensor, bits: int) -> Tensor:
    shifts = torch.arange(0, 32, bits)
    return ((words.long().unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(1)


def _awq(words: Tensor) -> Tensor:
    shifts = 4 * torch.tensor(_AWQ_NIBBLES)
    return ((words.long().unsqueeze(-1) >> shifts) & 15).flatten(1)
