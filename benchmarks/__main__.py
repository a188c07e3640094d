"""``python -m benchmarks [NAME …]``: run, print the tables, write ``benchmarks/results``.

``python -m benchmarks generate`` is a program of its own: ``--help`` tells its options.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
import time
from collections import Counter
from typing import Annotated

import torch
import typer

import benchmarks
from benchmarks import results
from benchmarks.harness import OURS, Benchmark, Ceiling, Selection, measure_ceiling, run

_SECONDS_BETWEEN_COPIES = 10.0
_PROGRAMS = ("generate",)  # benchmarks with options of their own: run by name, and alone


def available() -> list[str]:
    """Names of the declared benchmarks: the files ``bench_<name>.py``."""
    found = (module.name for module in pkgutil.iter_modules(benchmarks.__path__))
    names = [name.removeprefix("bench_") for name in found if name.startswith("bench_")]
    return [name for name in names if name not in _PROGRAMS]


def load(name: str) -> Benchmark:
    """The ``BENCHMARK`` that ``bench_<name>.py`` declares."""
    if name not in available():
        raise typer.BadParameter(f"benchmark must be one of {', '.join(available())}, got {name}")
    return importlib.import_module(f"benchmarks.bench_{name}").BENCHMARK


def selection(peers: str, where: list[str]) -> Selection:
    """From the options: ``"bf16,marlin"`` and ``["M=1,16", "N=4096"]``."""
    sizes = {}
    for condition in where:
        key, equals, values = condition.partition("=")
        if not (key and equals and values):
            raise typer.BadParameter(f"--where must be KEY=VALUE[,VALUE …], got {condition}")
        sizes[key] = set(values.split(","))
    return Selection([name for name in peers.split(",") if name], sizes)


def run_one(
    benchmark: Benchmark,
    device: torch.device,
    ceiling: Ceiling,
    rounds: int,
    chosen: Selection,
    keep: bool,
) -> list[dict]:
    """Runs and prints a benchmark; with ``keep``, what is done is on disk every ten seconds."""
    done: list[dict] = []
    copied = time.monotonic()
    for rows_of_a_size in run(benchmark, device, ceiling, rounds, chosen):
        done += rows_of_a_size
        if keep and time.monotonic() - copied > _SECONDS_BETWEEN_COPIES:
            results.write_partial(benchmark.name, device, ceiling, done)
            copied = time.monotonic()
    print(f"\n{benchmark.name} (µs, medians)\n{results.table({'rows': done})}")
    print(findings(done))
    if keep:
        kept = results.with_other_sizes(benchmark.name, device, done) if chosen.sizes else done
        print(results.write(benchmark.name, device, ceiling, kept))
    return done


def findings(rows: list[dict]) -> str:
    """A line a peer and reason: what was absent or wrong, at how many sizes."""
    counts: Counter[str] = Counter()
    for row in rows:
        for finding in ("absent", "wrong"):
            if finding in row:
                counts[f"{finding}: {row['side']}: {row[finding]}"] += 1
    return "\n".join(f"{text} ({count} sizes)" for text, count in counts.items())


def main(
    names: Annotated[
        list[str] | None, typer.Argument(help="Which; all where none is named.")
    ] = None,
    device: Annotated[str, typer.Option(help="cuda or cpu; cuda where there is one.")] = "",
    rounds: Annotated[int, typer.Option(min=3, help="Samples a side, taken in turn.")] = 15,
    keep: Annotated[bool, typer.Option(help="Write benchmarks/results.")] = True,
    peers: Annotated[
        str, typer.Option(help="Sides to run beside grace, as bf16,marlin; all by default.")
    ] = "",
    where: Annotated[
        list[str] | None,
        typer.Option(help="Only these sizes: --where M=1,16 --where N=4096; others' results stay."),
    ] = None,
) -> None:
    """Times every op against its peers on this machine; exit code 1 if our result is wrong."""
    on = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    chosen = selection(peers, where or [])
    ceiling = measure_ceiling(on)
    rows: list[dict] = []
    for name in names or available():
        rows += run_one(load(name), on, ceiling, rounds, chosen, keep)
    if any(row["side"] == OURS and "wrong" in row for row in rows):
        print(f"WRONG RESULTS of {OURS}, see above")
        raise typer.Exit(1)


def start(arguments: list[str], standalone: bool = True) -> None:
    """Runs the program that the first argument names, or the benchmarks that all of them name.

    Not standalone, what typer has to say of the arguments is raised and not printed.
    """
    name, rest, program = "python -m benchmarks", arguments, main
    if arguments[:1] and arguments[0] in _PROGRAMS:
        name, rest = f"{name} {arguments[0]}", arguments[1:]
        program = importlib.import_module(f"benchmarks.bench_{arguments[0]}").main
    settings = {"help_option_names": ["-h", "--help"]}
    app = typer.Typer(
        add_completion=False, pretty_exceptions_enable=False, context_settings=settings
    )
    app.command()(program)
    app(rest, prog_name=name, standalone_mode=standalone)


if __name__ == "__main__":
    start(sys.argv[1:])
