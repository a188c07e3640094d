"""Where the time of a call goes: kernels by what they do, from torch.profiler."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

# First match wins; names of kernels on a GPU, of PyTorch's ops on a CPU.
_COMPONENTS = (
    (r"grace::fake_quant", "fake_quant"),
    (r"grace::(linear_)?gated_dkd", "gated_dkd"),
    (r"grace::cka", "cka"),
    (r"flash|fmha|scaled_dot_product", "attention"),
    (r"gemm|nvjet|cutlass|xmma|splitK|aten::(mm|bmm|addmm|linear|convolution)", "matrix products"),
    (r"conv|im2col|implicit", "matrix products"),
    (r"[Ss]oft_?[Mm]ax|nll", "softmax and cross-entropy"),
    (r"Memcpy|Memset|copy", "copies and casts"),
    (r"index|gather|scatter", "gathers"),
    (r"elementwise|vectorized|reduce", "elementwise and reductions"),
)

_CPU = torch.autograd.DeviceType.CPU


def breakdown(work: Callable[[], Any], device: torch.device, took_ms: float) -> dict[str, float]:
    """Milliseconds of one call by component, and `idle`: the rest of `took_ms`, which the call
    takes when it is not profiled.

    On a CPU the ops' own times stand for kernels.
    """
    gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as profiler:
        work()
        _wait(device)
    spent: dict[str, float] = defaultdict(float)
    for event in profiler.events():
        if event.device_type == (torch.autograd.DeviceType.CUDA if gpu else _CPU):
            micros = event.time_range.elapsed_us() if gpu else event.self_cpu_time_total
            spent[component(event.name)] += micros / 1e3
    spent["idle"] = max(0.0, took_ms - sum(spent.values()))
    return {name: round(ms, 3) for name, ms in sorted(spent.items(), key=lambda item: -item[1])}


def component(kernel: str) -> str:
    """What a kernel of that name does; `other` where nothing tells."""
    for pattern, name in _COMPONENTS:
        if re.search(pattern, kernel):
            return name
    return "other"


def phases(
    steps: Sequence[tuple[str, Callable[[], Any]]], device: torch.device
) -> dict[str, float]:
    """Milliseconds from each step's first kernel to the next step's, of steps in turn."""
    marks = [_mark(device)]
    for _, step in steps:
        step()
        marks.append(_mark(device))
    _wait(device)
    spans = [_between(a, b) for a, b in pairwise(marks)]
    return {name: round(ms, 3) for (name, _), ms in zip(steps, spans, strict=True)}


def _mark(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start: Any, end: Any) -> float:
    return (end - start) * 1e3 if isinstance(start, float) else start.elapsed_time(end)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
