"""`grace bench`: the benchmarks of the source tree."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import typer

app = typer.Typer(help="Time ops and whole answers against their peers, on this machine.")
_PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.command(context_settings=_PASSED_ON)
def generate(context: typer.Context) -> None:
    """Whole answers with images, bf16 and packed; options as of `python -m benchmarks generate`."""
    _run(["generate", *context.args])


@app.command(context_settings=_PASSED_ON)
def ops(context: typer.Context) -> None:
    """Ops by name, or all; options as of `python -m benchmarks`."""
    _run(context.args)


def _run(arguments: list[str]) -> None:
    root = _source_tree()
    sys.path.insert(0, str(root))
    importlib.import_module("benchmarks.__main__").start(arguments, standalone=False)


def _source_tree() -> Path:
    """Where benchmarks/ lies: beside the package, in a clone that is installed as it is."""
    root = Path(__file__).parents[2]
    if not (root / "benchmarks" / "bench_generate.py").exists():
        raise ValueError(
            "bench: benchmarks/ must lie beside the package, got an installed grace without it: "
            "clone the source (see the project's page) and `pip install -e .` there"
        )
    return root
