"""Every layer of a model forward, then backward: few launches against one op a layer; and float32
masters to bfloat16, as training in mixed precision has them, against a cast behind."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.bench_fake_quant import GRID, GROUP, eager, log_scales
from benchmarks.harness import Benchmark, Case, Side, compiled
from benchmarks.layers import LAYERS
from grace.ops import fake_quant, fake_quant_many
from grace.ops.fake_quant import reference_backward

QWEN3_VL_2B = [layer.shape for layer in LAYERS if layer.model == "Qwen3-VL-2B"]


def setup(device: torch.device, layers: int, masters: str = "") -> Case:
    if masters:
        return setup_masters(device, layers, getattr(torch, masters))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shapes = QWEN3_VL_2B * layers
    weights = [torch.randn(s, device=device, dtype=dtype).requires_grad_() for s in shapes]
    theta = [log_scales(weight) for weight in weights]
    grads = [torch.randn_like(weight) for weight in weights]
    leaves = (*weights, *theta)

    def many(_: int) -> tuple[Tensor, ...]:
        outs = fake_quant_many(weights, theta, group_size=GROUP, scale_dtype=GRID)
        return torch.autograd.grad(outs, leaves, grads)

    def single(_: int) -> tuple[Tensor, ...]:
        pairs = zip(weights, theta, strict=True)
        outs = [fake_quant(w, t, group_size=GROUP, scale_dtype=GRID) for w, t in pairs]
        return torch.autograd.grad(outs, leaves, grads)

    def formula(function: Callable[..., Tensor]) -> Side:
        def call(_: int) -> tuple[Tensor, ...]:  # what it saves of all layers would not fit
            made = [
                torch.autograd.grad(function(w, t), (w, t), g)
                for w, t, g in zip(weights, theta, grads, strict=True)
            ]
            return tuple(pair[0] for pair in made)

        return call

    return Case(
        sides={
            "grace": many,
            "one op a layer": single,
            "eager, a layer at a time": formula(eager),
            "compile, a layer at a time": formula(compiled(eager)),
        },
        exact=lambda: reference_backward(
            grads[0].double(), weights[0].double(), theta[0].double(), 4, GROUP, GRID
        )[0],
        bytes=sum(weight.numel() for weight in weights) * dtype.itemsize * 5,
    )


def setup_masters(device: torch.device, layers: int, masters: torch.dtype) -> Case:
    """Weights of `masters`, quantized to bfloat16."""
    shapes = QWEN3_VL_2B * layers
    weights = [torch.randn(s, device=device, dtype=masters).requires_grad_() for s in shapes]
    theta = [log_scales(weight) for weight in weights]
    grads = [torch.randn_like(weight, dtype=torch.bfloat16) for weight in weights]
    leaves = (*weights, *theta)

    def direct(_: int) -> tuple[Tensor, ...]:
        settings = {"group_size": GROUP, "scale_dtype": GRID, "dtype": torch.bfloat16}
        return torch.autograd.grad(fake_quant_many(weights, theta, **settings), leaves, grads)

    def with_cast(_: int) -> tuple[Tensor, ...]:
        outs = fake_quant_many(weights, theta, group_size=GROUP, scale_dtype=GRID)
        return torch.autograd.grad([w.to(torch.bfloat16) for w in outs], leaves, grads)

    return Case(
        sides={"grace": direct, "a cast behind": with_cast},
        exact=lambda: reference_backward(
            grads[0].double(), weights[0].double(), theta[0].double(), 4, GROUP, GRID
        )[0],
        # w read, ŵ written; ĝ and w read, the gradient written.
        bytes=sum(weight.numel() for weight in weights) * (3 * masters.itemsize + 2 * 2),
    )


# Qwen3-VL-2B has 28 layers of qkv, o, gate+up and down; the weights exceed any cache.
BENCHMARK = Benchmark(
    "fake_quant_many",
    {
        "cuda": [{"layers": 28}, {"layers": 28, "masters": "float32"}],
        "cpu": [{"layers": 1}, {"layers": 1, "masters": "float32"}],
    },
    setup,
)
