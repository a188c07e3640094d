"""The search for a weight's first scales, against the same in PyTorch."""

from __future__ import annotations

import torch

from benchmarks.bench_fake_quant import GRID, GROUP
from benchmarks.harness import Benchmark, Case, buffer_sets
from grace.ops import search_log_scale
from grace.ops.search_log_scale import reference


def setup(device: torch.device, N: int, K: int) -> Case:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    sets = buffer_sets(N * K * dtype.itemsize, device)
    weights = [torch.randn(N, K, device=device, dtype=dtype) for _ in range(sets)]
    # By bytes alone: what bounds it is arithmetic outside of the tensor cores.
    return Case(
        sides={
            "grace": lambda i: search_log_scale(weights[i], group_size=GROUP, scale_dtype=GRID),
            "eager": lambda i: reference(weights[i], 4, GROUP, GRID),
        },
        exact=lambda: reference(weights[0].double(), 4, GROUP, GRID),
        bytes=N * K * dtype.itemsize,
        sets=sets,
    )


LAYERS = [{"N": 12288, "K": 2048}, {"N": 2048, "K": 2048}]
BENCHMARK = Benchmark("search_log_scale", {"cuda": LAYERS, "cpu": LAYERS[1:]}, setup)
