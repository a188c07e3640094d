"""``python -m benchmarks [NAME …]``: run, print the tables, write ``benchmarks/results``."""

from __future__ import annotations

import importlib
import json
import pkgutil
from typing import Annotated

import torch
import typer

import benchmarks
from benchmarks import results
from benchmarks.harness import Benchmark, measure_ceiling, run


def available() -> list[str]:
    """Names of the declared benchmarks: the files ``bench_<name>.py``."""
    found = (module.name for module in pkgutil.iter_modules(benchmarks.__path__))
    return [name.removeprefix("bench_") for name in found if name.startswith("bench_")]


def load(name: str) -> Benchmark:
    """The ``BENCHMARK`` that ``bench_<name>.py`` declares."""
    if name not in available():
        raise typer.BadParameter(f"benchmark must be one of {', '.join(available())}, got {name}")
    return importlib.import_module(f"benchmarks.bench_{name}").BENCHMARK


def main(
    names: Annotated[
        list[str] | None, typer.Argument(help="Which; all where none is named.")
    ] = None,
    device: Annotated[str, typer.Option(help="cuda or cpu; cuda where there is one.")] = "",
    rounds: Annotated[int, typer.Option(min=3, help="Samples a side, taken in turn.")] = 15,
    keep: Annotated[bool, typer.Option(help="Write benchmarks/results.")] = True,
) -> None:
    """Times every op against its peers on this machine."""
    on = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    ceiling = measure_ceiling(on)
    for name in names or available():
        rows = run(load(name), on, ceiling, rounds)
        content = {"rows": rows}
        print(f"\n{name} (µs, medians)\n{results.table(content)}")
        for row in rows:
            if "absent" in row:
                print(f"absent: {row['side']} at {json.dumps(row['size'])}: {row['absent']}")
        if keep:
            print(results.write(name, on, ceiling, rows))


if __name__ == "__main__":
    typer.run(main)
