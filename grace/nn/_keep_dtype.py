"""Modules whose scales keep their dtype when the model is cast."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def keep_dtype(fn: Callable[[Tensor], Tensor], *kept: Tensor | None) -> Callable[[Tensor], Tensor]:
    """``fn`` of `Module._apply`, which for the tensors ``kept`` changes the device alone.

    ``model.to(torch.bfloat16)`` must not reach scales: a bfloat16 log-scale has 34 values where a
    float32 one has tens of thousands, and every group would move to its neighbour.
    """
    identities = {id(tensor) for tensor in kept if tensor is not None}

    def apply(tensor: Tensor) -> Tensor:
        applied = fn(tensor)
        if id(tensor) not in identities or applied.dtype == tensor.dtype:
            return applied
        return tensor.to(applied.device)

    return apply
