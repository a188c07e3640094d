"""humming-kernels: GEMMs that are compiled for each layer when they are first needed."""

from __future__ import annotations

import functools
import importlib.util
import json
from typing import Any

import torch
from torch import Tensor

from benchmarks.layers import GROUP, Shape
from benchmarks.peers.peer import Peer, Product

# Compiling takes seconds a kernel, so few layers: small, medium and large ones.
SHAPES = {(4096, 4096), (2048, 2048), (22016, 4096), (12288, 2048), (4096, 12288)}
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


def why_absent() -> str:
    """Empty where the package is installed."""
    if importlib.util.find_spec("humming") is None:
        return "humming-kernels is not installed"
    return "" if torch.cuda.is_available() else "humming-kernels: needs a GPU"


def _why_not_at(m: int, n: int, k: int) -> str:
    if (n, k) not in SHAPES:
        return "compiled when needed: timed for five layers only"
    return "" if m <= ROWS[-1] else f"timed up to {ROWS[-1]} rows"


def _words(codes: Tensor) -> Tensor:
    """int32 [N, K/8]: nibble j of a word is column 8i + j, + 8."""
    unsigned = (codes + 8).view(torch.uint8)
    return (unsigned[:, ::2] | unsigned[:, 1::2] << 4).contiguous().view(torch.int32)


def _layer(codes: Tensor, scales: Tensor) -> Any:
    from humming.layer import HummingLayer

    n, k = codes.shape
    kind = {"dtype": "int4", "group_size": GROUP}
    layer = HummingLayer(shape_n=n, shape_k=k, weight_config=kind, torch_dtype=scales.dtype)
    layer = layer.to(codes.device)
    layer.load_from_tensors({"weight": _words(codes), "weight_scale": scales})
    layer.transform()
    return layer


@functools.cache
def _kernels(config: Any) -> str:
    """Its own choice of kernel for each of ROWS, as intervals; by default it compiles far more."""
    from humming.tune import get_heuristics_config

    intervals: list[list[Any]] = []
    for low, high in zip((0, *ROWS[:-1]), ROWS, strict=True):
        kernel = get_heuristics_config(config, shape_m=high)
        if intervals and intervals[-1][2] == kernel:
            intervals[-1][1] = high
        else:
            intervals.append([low, high, kernel])
    return json.dumps(intervals)


def prepare(codes: Tensor, scales: Tensor) -> Product:
    """A layer of humming with the weight loaded as its packed codes."""
    layer = _layer(codes, scales)
    kernels = _kernels(layer.humming_config)
    return lambda x: layer(x, tuning_config=kernels)


PEER = Peer("humming", prepare, why_absent, _why_not_at, budget_seconds=90)


def compile_all() -> None:
    """Compiles every kernel of the benchmark into humming's cache on disk."""
    for n, k in sorted(SHAPES):
        codes = torch.randint(-8, 8, (n, k), dtype=torch.int8, device="cuda")
        scales = torch.rand(n, k // GROUP, device="cuda").to(torch.bfloat16)
        prepare(codes, scales)(torch.zeros(1, k, dtype=torch.bfloat16, device="cuda"))
        print(f"humming: compiled for {Shape(n, k)}", flush=True)
