"""RMS norm of hidden states and of heads, against transformers' formula in eager PyTorch and
torch.compile of it, PyTorch's own function, and Liger-Kernel's module."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.distillation import liger, peer
from benchmarks.harness import Benchmark, Case, Side, buffer_sets, compiled
from grace.ops import rms_norm
from grace.ops.rms_norm import reference

EPS = 1e-6


def eager(x: Tensor, weight: Tensor) -> Tensor:
    """As transformers' modules do it: rounded before the weight is multiplied, too."""
    wide = x.float()
    return weight * (wide * (wide.pow(2).mean(-1, keepdim=True) + EPS).rsqrt()).to(x.dtype)


def liger_norm(weight: Tensor) -> torch.nn.Module:
    """Liger-Kernel's module with this weight; Absent without Liger-Kernel."""
    module = liger("LigerRMSNorm", hidden_size=weight.numel(), eps=EPS)
    module.weight = torch.nn.Parameter(weight, requires_grad=False)
    return module


def setup(device: torch.device, rows: int, D: int) -> Case:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    bytes_moved = (2 * rows + 1) * D * dtype.itemsize
    sets = buffer_sets(bytes_moved, device)
    xs = [torch.randn(rows, D, device=device, dtype=dtype) for _ in range(sets)]
    weights = [torch.randn(D, device=device, dtype=dtype) for _ in range(sets)]
    norms: dict[int, torch.nn.Module] = {}

    def of_liger(i: int) -> Tensor:
        if i not in norms:
            norms[i] = liger_norm(weights[i])
        return norms[i](xs[i])

    sides: dict[str, Side] = {
        "grace": lambda i: rms_norm(xs[i], weights[i], eps=EPS),
        "eager": lambda i: eager(xs[i], weights[i]),
        "compile": _compiled(xs, weights),
        "torch": lambda i: F.rms_norm(xs[i], (D,), weights[i], EPS),
        "liger": peer(of_liger),
    }
    return Case(
        sides=sides,
        exact=lambda: reference(xs[0].double(), weights[0].double(), EPS),
        bytes=bytes_moved,
        sets=sets,
    )


def _compiled(xs: list[Tensor], weights: list[Tensor]) -> Side:
    function = compiled(eager)
    return lambda i: function(xs[i], weights[i])


HIDDEN = [{"rows": rows, "D": 4096} for rows in (1, 8, 632, 8192)]
HEADS = [{"rows": 632 * 32, "D": 128}]
BENCHMARK = Benchmark("rms_norm", {"cuda": HIDDEN + HEADS, "cpu": HIDDEN[:3]}, setup)
