"""``python -m benchmarks.tune_dequant_gemm``: measures which plan of dequant_gemm is the fastest.

For every layer and number of rows, each plan that runs the call is checked against the exact
result and timed by graph replay over weights that no cache holds: the best of three, and again in
turn with the others if it was within 20 % of the fastest. The fastest plans become the rows of
``grace/ops/dequant_gemm_plans/<device>.json``, from which the op chooses. A row holds for up to
``m`` rows of x; the last one of a layer for any more.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from torch import Tensor
from tqdm import tqdm

from benchmarks import results
from benchmarks.harness import between_events, graph_timer, relative_error
from benchmarks.layers import GROUP, SHAPES, RandomLayer, Shape, shapes_of
from grace.ops import dequant_gemm
from grace.ops.dequant_gemm import plans

BUCKETS = (8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096)
TOLERANCE = 5e-3  # of ‖result − exact‖ / ‖exact‖; rounding to bfloat16 alone makes 1.7e-3
CLOSE = 1.2  # plans within this factor of the fastest are timed again
HOPELESS = 3.0  # times the fastest so far, in a single call: not captured
FAMILY = 1000  # a plan is FAMILY · family + variant; family 0 runs anything, slowly

FOLDER = Path(__file__).parents[1] / "grace/ops/dequant_gemm_plans"

Sample = Callable[[], float]  # seconds of a call


class Finding(NamedTuple):
    """The fastest plan for one layer and number of rows, and plans whose result was wrong."""

    bits: int
    shape: Shape
    m: int
    best: tuple[int, float] | None  # plan and seconds; None where every plan was wrong
    candidates: int
    faults: dict[int, str]

    def rows(self) -> list[dict[str, float]]:
        """As the table keeps it: one row, or none."""
        if self.best is None:
            return []
        (n, k), (plan, seconds) = self.shape, self.best
        us = round(seconds * 1e6, 3)
        return [{"bits": self.bits, "n": n, "k": k, "m": self.m, "plan": plan, "us": us}]


def choose(samplers: Mapping[int, Sample], rounds: int = 7) -> tuple[int, float]:
    """The plan with the least median time; only those that start close to the best are repeated."""
    if not samplers:
        raise ValueError("tune: samplers must hold at least one plan, got none")
    first = {plan: min(sample() for _ in range(3)) for plan, sample in samplers.items()}
    limit = CLOSE * min(first.values())
    times: dict[int, list[float]] = {plan: [] for plan, time in first.items() if time <= limit}
    for _ in range(rounds):
        for plan, samples in times.items():
            samples.append(samplers[plan]())
    medians = {plan: statistics.median(samples) for plan, samples in times.items()}
    best = min(medians, key=lambda plan: medians[plan])
    return best, medians[best]


def runnable(plans: Iterable[int]) -> list[int]:
    """Those worth timing: the family that runs anything only where nothing else does."""
    every = list(plans)
    return [plan for plan in every if plan >= FAMILY] or every


class Call:
    """dequant_gemm with one layer and one x, by plan."""

    def __init__(self, layer: RandomLayer, m: int):
        self.layer, self.m = layer, m
        self.x = torch.randn(m, layer.shape.k, device=layer.device, dtype=layer.dtype)
        self.exact = (self.x.double() @ layer.exact.t()).float()

    def plans(self, first: int) -> list[int]:
        """Numbers of the plans that run this call, from the first one on."""
        layer = self.layer
        every = plans(self.x, *layer.packed[0], layer.bits, GROUP, layer.shape.n)
        return runnable([plan for plan in every if plan >= first] or every)

    def result(self, plan: int, i: int) -> Tensor:
        """With weights of set i."""
        layer = self.layer
        weight, scales = layer.packed[i % layer.sets]
        return dequant_gemm(
            self.x,
            weight,
            scales,
            bits=layer.bits,
            group_size=GROUP,
            out_features=layer.shape.n,
            plan=plan,
        )

    def fault(self, plan: int) -> str:
        """What is wrong with the plan's result; "" where it is the exact one to TOLERANCE."""
        try:
            error = relative_error(self.result(plan, 0), self.exact)
        except RuntimeError as failure:  # of a launch
            return str(failure).splitlines()[0]
        return "" if error <= TOLERANCE else f"error {error:g}"


def samplers_of(call: Call, numbers: Sequence[int]) -> tuple[dict[int, Sample], dict[int, str]]:
    """A timer a plan, without those that one call shows to be far off; plans that are wrong."""
    samplers: dict[int, Sample] = {}
    faults: dict[int, str] = {}
    fastest = float("inf")
    for plan in numbers:
        if (fault := call.fault(plan)) != "":
            faults[plan] = fault
            continue
        once = min(between_events(partial(call.result, plan, i), 1) for i in range(3))
        if once > HOPELESS * fastest + 1e-4:  # 0.1 ms: what launching one call may take
            continue
        sample = graph_timer(partial(call.result, plan), call.layer.calls(call.m))
        fastest = min(fastest, sample())
        samplers[plan] = sample
    return samplers, faults


def tune(layer: RandomLayer, m: int, first_plan: int = 0) -> Finding:
    """The fastest plan of a layer for m rows of x, of those from the first one on."""
    call = Call(layer, m)
    numbers = call.plans(first_plan)
    samplers, faults = samplers_of(call, numbers)
    best = choose(samplers) if samplers else None
    del samplers
    torch.cuda.empty_cache()  # the graphs' memory
    return Finding(layer.bits, layer.shape, m, best, len(numbers), faults)


def merged(old: Iterable[dict], new: Iterable[dict]) -> list[dict]:
    """Rows in order; what was measured anew replaces what was known of it."""

    def key(row: dict) -> tuple[int, ...]:
        return row["bits"], row["n"], row["k"], row["m"]

    rows = {key(row): row for row in [*old, *new]}
    return [rows[which] for which in sorted(rows)]


def as_text(content: Mapping[str, object], rows: Sequence[dict]) -> str:
    """JSON with a line a row, so that a change shows what changed."""
    head = json.dumps(dict(content), indent=1, ensure_ascii=False)[:-2]
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    return f'{head},\n "rows": [\n{lines}\n ]\n}}\n'


def write(path: Path, device: torch.device, new: Sequence[dict]) -> None:
    """Adds to the table of this device, which is replaced whole."""
    name = torch.cuda.get_device_name(device)
    old: dict[str, Any] = {"device": name, "rows": []}
    if path.exists():
        old = json.loads(path.read_text())
    if old["device"] != name:
        raise ValueError(f"tune: {path} must be of {name}, got {old['device']}")
    content = {
        "device": name,
        "group_size": GROUP,
        "dtype": "bfloat16",
        "environment": results.versions(device),
    }
    results.write_whole(path, as_text(content, merged(old["rows"], new)))


def main(
    layers: Annotated[
        str, typer.Option(help="NxK, with commas between; those of the benchmarks by default.")
    ] = "",
    bits: Annotated[str, typer.Option(help="4, 8, or 4,8.")] = "4",
    m: Annotated[str, typer.Option(help="Upper bounds of the numbers of rows of x.")] = "",
    first_plan: Annotated[int, typer.Option(help="Leaves out the plans of lower numbers.")] = 0,
    into: Annotated[Path | None, typer.Option(help="File to write instead of the op's.")] = None,
) -> None:
    """Measures the fastest plan for each layer and number of rows, and writes the op's table."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("tuning needs a GPU")
    device = torch.device("cuda")
    shapes = shapes_of(layers.split(",")) if layers else SHAPES
    buckets = [int(text) for text in m.split(",")] if m else BUCKETS
    path = into or FOLDER / f"{results.device_name(device)}.json"
    widths = [int(text) for text in bits.split(",")]
    with tqdm(total=len(widths) * len(shapes) * len(buckets), desc="plans", unit="call") as bar:
        for width, shape in itertools.product(widths, shapes):
            findings = tune_layer(RandomLayer(device, shape, width), buckets, bar, first_plan)
            print(summary(findings), flush=True)
            write(path, device, [row for finding in findings for row in finding.rows()])
    print(path)


def tune_layer(
    layer: RandomLayer, buckets: Sequence[int], bar: tqdm, first_plan: int = 0
) -> list[Finding]:
    """A finding for each number of rows."""
    findings = []
    for m in buckets:
        bar.set_postfix_str(f"{layer.bits} bits {layer.shape} M={m}", refresh=False)
        findings.append(tune(layer, m, first_plan))
        bar.update()
    return findings


def summary(findings: Sequence[Finding]) -> str:
    """A layer on one line: rows, plan and µs; then what was wrong, if anything."""
    first = findings[0]
    most = max(finding.candidates for finding in findings)
    best = "  ".join(f"{f.m}:{f.best[0]} {f.best[1] * 1e6:.1f}" for f in findings if f.best)
    lines = [f"{first.bits} bits {first.shape}, up to {most} plans: {best}"]
    for plan in sorted({plan for finding in findings for plan in finding.faults}):
        where = [finding for finding in findings if plan in finding.faults]
        at = ", ".join(str(finding.m) for finding in where)
        lines.append(f"WRONG, left out: plan {plan} at M={at}: {where[0].faults[plan]}")
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
