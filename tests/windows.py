"""Sentinel windows: tensors cut out of larger ones, to catch reads and writes outside them."""

from __future__ import annotations

import torch
from torch import Tensor

MARGIN = 64  # elements on either side; a multiple of 16 bytes, so that alignment stays


def windowed(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """A copy of ``tensor`` inside a buffer of NaNs (or −77), and that buffer.

    A kernel that reads outside the copy meets a NaN that spreads into its result.
    """
    sentinel = float("nan") if tensor.is_floating_point() else -77
    buffer = torch.full(
        (tensor.numel() + 2 * MARGIN,), sentinel, dtype=tensor.dtype, device=tensor.device
    )
    inside = buffer[MARGIN : MARGIN + tensor.numel()].view(tensor.shape)
    inside.copy_(tensor)
    return inside, buffer


def assert_margins_untouched(buffer: Tensor) -> None:
    """Fails when anything outside the window was written."""
    outside = torch.cat([buffer[:MARGIN], buffer[-MARGIN:]])
    untouched = outside.isnan() if outside.is_floating_point() else outside == -77
    assert bool(untouched.all()), "a kernel wrote outside its tensor"
