"""One harness for all benchmarks.

A benchmark declares a sweep of sizes and, for each size, the sides to compare: callables that take
the index of a set of buffers. The harness verifies every side against the exact result first, then
times them interleaved over rotating buffers (together larger than the last-level cache), reports
medians and spread, the share of the floor that bytes and FLOP set, and the ratio to each side.
On a GPU a side is timed by replaying a captured graph; sides that cannot be captured are timed by
events round eager calls and say so. What eager calls take, as a training loop sees it, is reported
beside. A peer that cannot run here, a side that the memory does not hold, and one whose result is
wrong are reported and not timed.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

Side = Callable[[int], Any]

OURS = "grace"  # the side that the others are peers of
_EAGER_SAMPLES = 3  # of the figure beside that of a graph
_NO_ROOM = "does not fit in this device's memory"


class Absent(Exception):
    """Raised by the first call of a side that cannot run here; the text says why."""


@dataclass(frozen=True)
class Case:
    """One size of a benchmark: what to compare and what it must at least cost."""

    sides: Mapping[str, Side]  # name → call on buffer set i
    exact: Callable[[], Tensor]  # the result on buffer set 0, in float64
    bytes: float  # that must be moved: each input read once, each output written once
    flops: float = 0.0
    sets: int = 1  # of buffers that the sides rotate over
    tolerance: float = 1e-2  # of ‖side − exact‖ / ‖exact‖
    absent: Mapping[str, str] = field(default_factory=dict)  # peer → why it could not be run
    # Other work of this size, of which only the time means something here: not verified.
    yardsticks: Mapping[str, Side] = field(default_factory=dict)
    eager: bool = False  # no capture is tried: the sides wait for the GPU
    rounds: int | None = None  # samples a side at most, for what takes long
    # Side → what else its row tells, found when all are timed, from all sides' medians in seconds.
    facts: Mapping[str, Callable[[Mapping[str, float]], dict[str, Any]]] = field(
        default_factory=dict
    )


@dataclass(frozen=True)
class Benchmark:
    """A named sweep of sizes a device type; ``setup(device, **size)`` builds the case of one."""

    name: str
    sweep: Mapping[str, Sequence[Mapping[str, Any]]]  # "cuda" and "cpu" → sizes
    setup: Callable[..., Case]


@dataclass(frozen=True)
class Selection:
    """The part of a benchmark to run; all of it by default."""

    sides: Collection[str] = ()  # beside ours; empty for all
    sizes: Mapping[str, Collection[str]] = field(default_factory=dict)  # "M" → {"1", "16"}

    def has_size(self, size: Mapping[str, Any]) -> bool:
        """Whether every key that is selected by has one of its values here."""
        return all(str(size.get(key)) in values for key, values in self.sizes.items())

    def has_side(self, name: str) -> bool:
        """Whether the side is to be run."""
        return not self.sides or name == OURS or name in self.sides


@dataclass(frozen=True)
class Ceiling:
    """What the device can do, measured beside the sides: bytes/s of reading, FLOP/s of bf16."""

    bytes_per_second: float
    flops_per_second: float

    def floor(self, case: Case) -> float:
        """Seconds that no implementation can go below."""
        return max(case.bytes / self.bytes_per_second, case.flops / self.flops_per_second)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile of it for just the shapes that it is called with: what was compiled for other
    sizes, of which torch.compile would make one program for all, is forgotten."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def buffer_sets(bytes_per_set: float, device: torch.device) -> int:
    """Sets of buffers needed so that none is found in the cache: three times its size together."""
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
    else:
        cache = 64 * 2**20
    return max(2, min(64, int(3 * cache / bytes_per_set) + 1))


def run(
    benchmark: Benchmark,
    device: torch.device,
    ceiling: Ceiling,
    rounds: int,
    selection: Selection | None = None,
) -> Iterator[list[dict]]:
    """The rows of results of one size after another, a row a side."""
    chosen = selection or Selection()
    sizes = [size for size in benchmark.sweep[device.type] if chosen.has_size(size)]
    for size in tqdm(sizes, desc=benchmark.name, unit="size"):
        yield _rows_of(benchmark, device, ceiling, rounds, chosen, size)
        _free_memory()


def _rows_of(
    benchmark: Benchmark,
    device: torch.device,
    ceiling: Ceiling,
    rounds: int,
    chosen: Selection,
    size: Mapping[str, Any],
) -> list[dict]:
    """The rows of one size; what it built is gone when it returns."""
    case = benchmark.setup(device, **size)
    sides = {name: side for name, side in case.sides.items() if chosen.has_side(name)}
    absent = {n: {"absent": why} for n, why in case.absent.items() if chosen.has_side(n)}
    yardsticks = {name: side for name, side in case.yardsticks.items() if chosen.has_side(name)}
    left_out = absent | verify(case, sides) | missing(yardsticks)
    sides |= yardsticks
    timed = {name: side for name, side in sides.items() if name not in left_out}
    rows = [{"size": dict(size), "side": name} | why for name, why in left_out.items()]
    floor = ceiling.floor(case)
    samples = min(rounds, case.rounds or rounds)
    measured = measure(timed, case.sets, device, samples, case.eager)
    _free_memory()
    medians = {name: statistics.median(seconds) for name, (seconds, _) in measured.items()}
    for name, side in timed.items():
        if name not in measured:
            rows.append({"size": dict(size), "side": name, "absent": _NO_ROOM})
            continue
        row = _row(dict(size), name, *measured[name], floor)
        row |= by_eager_calls(row, side, case.sets) | peak_memory(side, device)
        rows.append(row | (case.facts[name](medians) if name in case.facts else {}))
    return rows


def by_eager_calls(row: Mapping[str, Any], side: Side, sets: int) -> dict[str, float]:
    """``{"us_eager_calls": …}``: from call to call, waits for the CPU included (GPU only)."""
    if row["timed_by"] == "eager calls":
        return {"us_eager_calls": row["us"]}
    if row["timed_by"] != "graph replay":
        return {}
    sample = _eager_timer(side, sets)
    sample()  # memory is asked for once
    found = statistics.median(sample() for _ in range(_EAGER_SAMPLES))
    return {"us_eager_calls": round(found * 1e6, 3)}


def peak_memory(side: Side, device: torch.device) -> dict[str, float]:
    """``{"peak_mib": …}``: what one call allocates beyond what was there (GPU only)."""
    if device.type != "cuda":
        return {}
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    side(0)
    torch.cuda.synchronize()
    return {"peak_mib": round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)}


def _row(size: dict, side: str, samples: list[float], how: str, floor: float) -> dict:
    median = statistics.median(samples)
    low, high = _quartiles(samples)
    return {
        "size": size,
        "side": side,
        "us": round(median * 1e6, 3),
        "us_quartiles": [round(low * 1e6, 3), round(high * 1e6, 3)],
        "floor_us": round(floor * 1e6, 3),
        "of_floor": round(floor / median, 4),
        "timed_by": how,
    }


def _quartiles(samples: list[float]) -> tuple[float, float]:
    if len(samples) < 2:
        return samples[0], samples[0]
    quartiles = statistics.quantiles(samples, n=4)
    return quartiles[0], quartiles[2]


def verify(case: Case, sides: Mapping[str, Side]) -> dict[str, dict[str, str]]:
    """Sides to leave out: ``{"absent": why}`` or ``{"wrong": how far off}``."""
    exact = case.exact().double()
    left_out: dict[str, dict[str, str]] = {}
    for name, side in sides.items():
        try:
            actual = side(0)
        except (Absent, torch.OutOfMemoryError) as reason:
            left_out[name] = {"absent": _why(reason)}
            continue
        error = relative_error(actual[0] if isinstance(actual, tuple) else actual, exact)
        if not error <= case.tolerance:
            finding = f"must be within {case.tolerance:g} of the exact result, got {error:g}"
            left_out[name] = {"wrong": finding}
    return left_out


def missing(yardsticks: Mapping[str, Side]) -> dict[str, dict[str, str]]:
    """Yardsticks to leave out: ``{"absent": why}``."""
    reasons = {name: _why_absent(side) for name, side in yardsticks.items()}
    return {name: {"absent": why} for name, why in reasons.items() if why}


def _why_absent(side: Side) -> str:
    try:
        side(0)
    except (Absent, torch.OutOfMemoryError) as reason:
        return _why(reason)
    return ""


def _why(reason: Exception) -> str:
    if isinstance(reason, Absent):
        return str(reason)
    _free_memory()
    return _NO_ROOM


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """‖actual − exact‖ / ‖exact‖, in exact's dtype; NaN where ``actual`` holds one."""
    scale = exact.norm().clamp_min(torch.finfo(exact.dtype).tiny)
    return ((actual.to(exact.dtype) - exact).norm() / scale).item()


def measure(
    sides: Mapping[str, Side], sets: int, device: torch.device, rounds: int, eager: bool = False
) -> dict[str, tuple[list[float], str]]:
    """Seconds a call of each side: ``rounds`` samples, taken in turn; without those for which there
    is no memory beside the others."""
    timers = {}
    for name, side in sides.items():
        with _dropped_without_memory(timers, name):
            timers[name] = _timer(side, sets, device, eager)
    samples: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(rounds):
        for name in list(timers):
            with _dropped_without_memory(timers, name):
                samples[name].append(timers[name][0]())
    return {name: (samples[name], how) for name, (_, how) in timers.items()}


@contextlib.contextmanager
def _dropped_without_memory(timers: dict[str, Any], name: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        timers.pop(name, None)
        _free_memory()


def _timer(
    side: Side, sets: int, device: torch.device, eager: bool = False
) -> tuple[Callable[[], float], str]:
    for i in range(sets):  # warm up: compilation, handles, lazy initialization
        side(i)
    if device.type == "cpu":
        return _cpu_timer(side, sets), "wall clock"
    if eager:
        return _eager_timer(side, sets), "eager calls"
    try:
        return graph_timer(side, sets), "graph replay"
    except (Absent, RuntimeError):  # a peer may call any error of its own an absence
        torch.cuda.synchronize()
        _leave_capture(device)
        _free_memory()
        return _eager_timer(side, sets), "eager calls"


def _cpu_timer(side: Side, sets: int) -> Callable[[], float]:
    start = time.perf_counter()
    side(0)
    once = time.perf_counter() - start
    calls = sets * max(1, int(0.02 / (once * sets + 1e-9)))  # a sample lasts 20 ms or one rotation

    def sample() -> float:
        begin = time.perf_counter()
        for i in range(calls):
            side(i % sets)
        return (time.perf_counter() - begin) / calls

    return sample


def between_events(work: Callable[[], Any], calls: int) -> float:
    """Seconds of GPU time a call, of ``work`` that makes so many."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def graph_timer(side: Side, sets: int) -> Callable[[], float]:
    """Captures a call on each set of buffers; what is returned replays them and times a call."""
    graph = _captured(side, sets)
    graph.replay()
    torch.cuda.synchronize()
    return lambda: between_events(graph.replay, sets)


def _captured(side: Side, sets: int) -> torch.cuda.CUDAGraph:
    """As ``torch.cuda.graph`` does, which also empties the allocator's cache: far more than a
    sample takes."""
    graph, stream = torch.cuda.CUDAGraph(), _capture_stream(torch.cuda.current_device())
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        side(0)
        torch.cuda.synchronize()
        graph.capture_begin()
        try:
            for i in range(sets):
                side(i)
        finally:
            graph.capture_end()
    torch.cuda.synchronize()
    return graph


def _leave_capture(device: torch.device) -> None:
    """A failed capture leaves the random numbers' generator as if it went on."""
    index = torch.cuda.current_device() if device.index is None else device.index
    generator = torch.cuda.default_generators[index]
    generator.graphsafe_set_state(generator.clone_state())


@functools.cache
def _capture_stream(device: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _free_memory() -> None:
    """Gives back the memory of graphs and of tensors that are gone, and of models, which hold each
    other."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _eager_timer(side: Side, sets: int) -> Callable[[], float]:
    def work() -> None:
        for i in range(sets):
            side(i)

    return lambda: between_events(work, sets)


def measure_ceiling(device: torch.device) -> Ceiling:
    """Reads a buffer far larger than any cache; multiplies large matrices, bf16 or fp32."""
    elements, sizes = (2**30, (8192,)) if device.type == "cuda" else (2**26, (1024, 2048))
    buffer = torch.ones(elements, device=device)
    read = min(_samples(lambda _: buffer.sum(), device))
    rate = 0.0
    for n in sizes:  # nor is one size the best of every CPU
        for dtype in (torch.bfloat16, torch.float32):  # not every CPU is faster in bf16
            a = torch.randn(n, n, device=device, dtype=dtype)
            rate = max(rate, *(2 * n**3 / time for time in _samples(partial(_square, a), device)))
    return Ceiling(buffer.numel() * buffer.element_size() / read, rate)


def _square(a: Tensor, _: int) -> Tensor:
    return a @ a


def _samples(side: Side, device: torch.device) -> Iterator[float]:
    sample, _ = _timer(side, 2, device)
    return (sample() for _ in range(5))
