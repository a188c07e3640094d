"""``python -m benchmarks.profile_kernels cka``: where an op's time goes, kernel by kernel.

Every kernel runs alone (CUDA_LAUNCH_BLOCKING), as dependent launches would otherwise count their
waiting for one another; caches are as a captured graph leaves them. Writes
``results/<gpu>/<op>_kernels.json``, which the op's page shows.
"""

from __future__ import annotations

import collections
import json
import os
import re
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

import torch
import typer
from torch.profiler import ProfilerActivity, profile

from benchmarks import results
from benchmarks.__main__ import load
from benchmarks.harness import OURS, Side

_BLOCKING = "CUDA_LAUNCH_BLOCKING"
_CALLS = 5  # that are profiled, after two that are not


def short_name(kernel: str) -> str:
    """A kernel's name without types and arguments: ``warpgroup::gram_kernel<true>``."""
    kernel = kernel.replace("(bool)1", "true").replace("(bool)0", "false")
    name = kernel.removeprefix("void ").replace("(anonymous namespace)::", "")
    name = name.replace("(int)", "").split("(", 1)[0].rstrip()
    flags = re.findall(r"\b(?:true|false)\b", name.partition("<")[2])
    scopes = [s for s in name.partition("<")[0].split("::") if s not in ("grace", "cuda", "at")]
    return "::".join(scopes[-2:]) + (f"<{', '.join(flags)}>" if flags else "")


def shares(events: Iterable[tuple[str, float]], calls: int) -> list[dict[str, Any]]:
    """Of (kernel, µs) in the order they ran: launches and median µs of each kernel in a call."""
    times: dict[str, list[float]] = collections.defaultdict(list)
    for kernel, us in events:
        times[short_name(kernel)].append(us)
    return [
        {
            "kernel": kernel,
            "launches": round(len(found) / calls, 2),
            "us": round(statistics.median(found), 2),
            "us_a_call": round(sum(found) / calls, 2),
        }
        for kernel, found in times.items()
    ]


def kernels_of(side: Side, sets: int) -> list[dict[str, Any]]:
    """What a call of a side launches, on buffers in turn."""
    for i in range(2):
        side(i % sets)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for i in range(_CALLS):
            side(i % sets)
        torch.cuda.synchronize()
    on_gpu = torch.autograd.DeviceType.CUDA
    events = [e for e in found.events() if e.device_type == on_gpu]
    return shares([(e.name, e.self_device_time_total) for e in events], _CALLS)


def content(name: str, rows: list[dict[str, Any]], device: torch.device) -> dict[str, Any]:
    """Of the file of results."""
    return {"benchmark": name, "environment": results.versions(device), "rows": rows}


def profiled(name: str, device: torch.device) -> Iterable[dict[str, Any]]:
    """A row a size and kernel of grace's side of a benchmark."""
    benchmark = load(name)
    for size in benchmark.sweep[device.type]:
        case = benchmark.setup(device, **size)
        for row in kernels_of(case.sides[OURS], case.sets):
            yield {"size": dict(size), **row}
        del case
        torch.cuda.empty_cache()


def launch_one_by_one(module: str, arguments: Sequence[str]) -> None:
    """Starts a program anew, unless its kernels are launched one by one already."""
    if torch.cuda.is_available() and os.environ.get(_BLOCKING) != "1":
        command = [sys.executable, "-m", module, *arguments]
        os.execve(sys.executable, command, {**os.environ, _BLOCKING: "1"})  # read as CUDA starts


def main(names: Annotated[list[str], typer.Argument(help="Benchmarks, as cka gated_dkd.")]) -> None:
    """Profiles grace's side of benchmarks on this GPU."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("device must be a GPU, got none")
    launch_one_by_one("benchmarks.profile_kernels", names)
    device = torch.device("cuda")
    for name in names:
        rows = list(profiled(name, device))
        path = results.ROOT / results.device_name(device) / f"{name}_kernels.json"
        text = json.dumps(content(f"{name}_kernels", rows, device), indent=1)
        results.write_whole(path, text + "\n")
        print(f"{path}\n{table({'rows': rows})}")


def table(found: Mapping[str, Any]) -> str:
    """Markdown: a line a size; what each kernel takes of a call alone, µs, launches in brackets."""
    rows = found["rows"]
    kernels = list(dict.fromkeys(row["kernel"] for row in rows))
    sizes = list(dict.fromkeys(json.dumps(row["size"]) for row in rows))
    lines = [["size", *kernels, "together"], ["---", *("---:" for _ in kernels), "---:"]]
    for size in sizes:
        here = {row["kernel"]: row for row in rows if json.dumps(row["size"]) == size}
        cells = [_cell(here[kernel]) if kernel in here else "–" for kernel in kernels]
        total = sum(row["us_a_call"] for row in here.values())
        title = " ".join(f"{key}={value}" for key, value in json.loads(size).items())
        lines.append([title, *cells, f"{total:.0f}"])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(row: Mapping[str, Any]) -> str:
    text = f"{row['us_a_call']:.1f}"
    return text if row["launches"] == 1 else f"{text} ({row['launches']:g})"


if __name__ == "__main__":
    typer.run(main)
