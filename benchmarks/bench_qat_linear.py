"""`FakeQuantLinear` forward and backward, by its dense and its packed product, against a plain
linear layer: what training at low bits costs, in time and memory."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.bench_fake_quant import GRID, GROUP, log_scales
from benchmarks.harness import Benchmark, Case, buffer_sets
from grace.nn import FakeQuantLinear
from grace.ops import fake_quant


def layer_of(weight: Tensor, log_scale: Tensor) -> FakeQuantLinear:
    """A layer that holds these very tensors."""
    rows, columns = weight.shape
    layer = FakeQuantLinear(columns, rows, False, group_size=GROUP, scale_dtype=GRID, device="meta")
    layer.weight, layer.log_scale = torch.nn.Parameter(weight), torch.nn.Parameter(log_scale)
    return layer


def setup(device: torch.device, N: int, K: int, M: int, weight: str) -> Case:
    masters = getattr(torch, weight)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    per_set = N * K * masters.itemsize + M * (N + K) * dtype.itemsize
    sets = min(8, buffer_sets(per_set, device))
    layers = []
    for _ in range(sets):
        drawn = torch.randn(N, K, device=device, dtype=masters)
        theta = log_scales(drawn).detach()
        # Weights on the grid already, so that all sides multiply by the same.
        layers.append(layer_of(fake_quant(drawn, theta, scale_dtype=GRID), theta))
    xs = [torch.randn(M, K, device=device, dtype=dtype).requires_grad_() for _ in range(sets)]
    grads = [torch.randn(M, N, device=device, dtype=dtype) for _ in range(sets)]

    def quantized(product: str):
        def call(i: int) -> tuple[Tensor, ...]:
            layers[i].product = product
            inputs = (xs[i], layers[i].weight, layers[i].log_scale)
            return torch.autograd.grad(layers[i](xs[i]), inputs, grads[i])

        return call

    def plain(i: int) -> tuple[Tensor, ...]:
        out = F.linear(xs[i], layers[i].weight.to(dtype))
        return torch.autograd.grad(out, (xs[i], layers[i].weight), grads[i])

    return Case(
        sides={
            "grace": quantized("dense"),
            "packed": quantized("packed"),
            "unquantized": plain,
        },
        exact=lambda: grads[0].double() @ layers[0].weight.detach().double(),
        # Weight and its gradient; x, y and their gradients: what no way of computing it avoids.
        bytes=2 * N * K * masters.itemsize + 2 * M * (N + K) * dtype.itemsize,
        flops=6 * M * N * K,
        sets=sets,
    )


SHAPES = [(4096, 4096), (11008, 4096), (6144, 2048), (2048, 2048)]
SIZES = [
    {"N": n, "K": k, "M": m, "weight": dtype}
    for n, k in SHAPES
    for m in (512, 4096)
    for dtype in ("bfloat16", "float32")
]
CPU = [{"N": 2048, "K": 2048, "M": 64, "weight": "float32"}]
BENCHMARK = Benchmark("qat_linear", {"cuda": SIZES, "cpu": CPU}, setup)
