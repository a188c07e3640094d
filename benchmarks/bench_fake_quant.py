"""fake_quant forward and backward, against the formula in eager PyTorch and torch.compile of it.

Liger-Kernel has nothing to compare with.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.harness import Benchmark, Case, buffer_sets, compiled
from grace.ops import fake_quant
from grace.ops.fake_quant import reference_backward

GROUP = 128
GRID = torch.bfloat16


def eager(weight: Tensor, log_scale: Tensor) -> Tensor:
    """Straight-through rounding as training libraries write it: autograd does the rest."""
    groups = weight.reshape(-1, GROUP).float()
    scale = log_scale.reshape(-1, 1).exp()
    value = groups / scale
    rounded = value + (value.round() - value).detach()
    return (rounded.clamp(-8, 7) * scale).reshape(weight.shape).to(weight.dtype)


def log_scales(weight: Tensor) -> Tensor:
    """log of max|w|/7 on the grid, where both sides have the same scales."""
    scale = weight.detach().float().reshape(weight.shape[0], -1, GROUP).abs().amax(-1) / 7
    return scale.to(GRID).float().log().requires_grad_()


def setup(device: torch.device, N: int, K: int) -> Case:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    bytes_moved = N * K * dtype.itemsize * 5  # w, ŵ; w, ĝ, gradient
    sets = buffer_sets(N * K * dtype.itemsize * 2, device)
    weights = [
        torch.randn(N, K, device=device, dtype=dtype, requires_grad=True) for _ in range(sets)
    ]
    theta = [log_scales(weight) for weight in weights]
    grads = [torch.randn_like(w) for w in weights]

    def side(function):
        def call(i: int) -> tuple[Tensor, ...]:
            out = function(weights[i], theta[i])
            return torch.autograd.grad(out, (weights[i], theta[i]), grads[i])

        return call

    return Case(
        sides={
            "grace": side(lambda w, t: fake_quant(w, t, scale_dtype=GRID)),
            "eager": side(eager),
            "compile": side(compiled(eager)),
        },
        exact=lambda: reference_backward(
            grads[0].double(), weights[0].double(), theta[0].double(), 4, GROUP, GRID
        )[0],
        bytes=bytes_moved,
        sets=sets,
    )


LAYERS = [  # the MLP of LLaVA-1.5-7B and of Qwen3-VL-2B, and the latter's attention
    {"N": 11008, "K": 4096},
    {"N": 6144, "K": 2048},
    {"N": 2048, "K": 2048},
]
BENCHMARK = Benchmark("fake_quant", {"cuda": LAYERS, "cpu": LAYERS[1:]}, setup)
