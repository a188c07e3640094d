"""Quantizing and packing a weight in one step, against the same in PyTorch."""

from __future__ import annotations

import torch

from benchmarks.bench_fake_quant import GRID, GROUP, log_scales
from benchmarks.harness import Benchmark, Case, buffer_sets
from grace.ops import quantize_pack
from grace.ops.quantize_pack import reference


def setup(device: torch.device, N: int, K: int, bits: int) -> Case:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    bytes_moved = N * K * (dtype.itemsize + bits / 8)
    sets = buffer_sets(bytes_moved, device)
    weights = [torch.randn(N, K, device=device, dtype=dtype) for _ in range(sets)]
    theta = [log_scales(weight).detach() for weight in weights]
    options = {"bits": bits, "group_size": GROUP, "scale_dtype": GRID}
    return Case(
        sides={
            "grace": lambda i: quantize_pack(weights[i], theta[i], **options),
            "eager": lambda i: reference(weights[i], theta[i], bits, GROUP, GRID),
        },
        exact=lambda: reference(weights[0], theta[0], bits, GROUP, GRID)[0],
        bytes=bytes_moved,
        sets=sets,
        tolerance=0.0,
    )


SHAPES = [(11008, 4096), (6144, 2048), (2048, 2048)]
LAYERS = [{"N": n, "K": k, "bits": bits} for n, k in SHAPES for bits in (4, 8)]
BENCHMARK = Benchmark("quantize_pack", {"cuda": LAYERS, "cpu": LAYERS[2:]}, setup)
