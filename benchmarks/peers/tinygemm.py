"""PyTorch's own int4 products, on a GPU (tinygemm) and on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.peers.peer import Peer, Product

GROUP = 128
MOST_ROWS = 256


def _pairs(scales: Tensor) -> Tensor:
    """[G, N, 2] bf16: weight = (code − 8) · scale + 0."""
    stacked = torch.stack([scales, torch.zeros_like(scales)], dim=-1)
    return stacked.transpose(0, 1).contiguous().to(torch.bfloat16)


def prepare(codes: Tensor, scales: Tensor) -> Product:
    """Packs the weight once, then calls ``_weight_int4pack_mm``."""
    aten, pairs = torch.ops.aten, _pairs(scales)
    unsigned = (codes + 8).to(torch.uint8)
    if codes.is_cuda:
        nibbles = unsigned[:, ::2] << 4 | unsigned[:, 1::2]
        weight = aten._convert_weight_to_int4pack(nibbles, 8)
        return lambda x: aten._weight_int4pack_mm(x, weight, GROUP, pairs)
    weight = aten._convert_weight_to_int4pack_for_cpu(unsigned.to(torch.int32), 1)
    return lambda x: aten._weight_int4pack_mm_for_cpu(x, weight, GROUP, pairs)


def _why_not_at(m: int, n: int, k: int) -> str:
    slow = m > MOST_ROWS and torch.cuda.is_available()
    return f"slow above {MOST_ROWS} rows: not timed" if slow else ""


PEER = Peer("torch int4", prepare, why_not_at=_why_not_at)
