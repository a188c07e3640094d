"""gemlite: Triton kernels that tune themselves at the first call of a size."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from benchmarks.peers.peer import Peer, Product

# Tuning takes seconds a size, so few of them.
SHAPES = {(4096, 4096), (24576, 4096)}
ROWS = (1, 16, 64)


def why_absent() -> str:
    """Empty where the package is installed."""
    if importlib.util.find_spec("gemlite") is None:
        return "gemlite is not installed"
    return "" if torch.cuda.is_available() else "gemlite: needs a GPU"


def _why_not_at(m: int, n: int, k: int) -> str:
    few = (n, k) in SHAPES and m in ROWS
    return "" if few else "tunes itself at the first call: timed for few sizes only"


def prepare(codes: Tensor, scales: Tensor) -> Product:
    """Its 4-bit layer with one zero, 8, for all groups."""
    from gemlite.helper import A16W4_HQQ_INT

    layer = A16W4_HQQ_INT(device=str(codes.device), dtype=scales.dtype)
    return layer.from_weights((codes + 8).to(torch.uint8), scales, torch.full_like(scales, 8))


PEER = Peer("gemlite", prepare, why_absent, _why_not_at, budget_seconds=30)
