"""Training in processes of their own: several ranks, and runs that are killed.

They are forked from a server that has imported torch, transformers and grace once; importing
takes longer than all that these processes do.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import tiny_training

SECONDS = 120.0  # a run takes one or two; what takes longer hangs


def run_ranks(
    world: int,
    out: Path,
    rows: Path,
    options: dict[str, Any],
    fault: Callable[[Any], None] | None = None,
    faulty: int | None = None,
) -> list[int]:
    """Exit codes of `world` ranks that train together; `fault` happens to rank `faulty` or all."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    targets = [
        partial(
            tiny_training.as_rank,
            rank,
            world,
            port,
            out,
            rows,
            options,
            fault if faulty in (None, rank) else None,
        )
        for rank in range(world)
    ]
    return _run(targets)


def run_alone(
    out: Path, rows: Path, options: dict[str, Any], fault: Callable[[Any], None] | None = None
) -> int:
    """Exit code of one process that trains; -N where signal N ended it."""
    return _run([partial(tiny_training.in_process, out, rows, options, fault)])[0]


def start(target: Callable[[], None]) -> Any:
    """The process, started, that runs ``target``: a function of a module, or a partial of one."""
    # The server takes no sys.path over: what it imports it finds by PYTHONPATH.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tiny_training"])
    process = context.Process(target=target)
    process.start()
    return process


def _run(targets: list[Callable[[], None]]) -> list[int]:
    processes = [start(target) for target in targets]
    for process in processes:
        process.join(SECONDS)
    hung = [process for process in processes if process.is_alive()]
    for process in hung:
        process.kill()
        process.join()
    assert not hung, f"{len(hung)} of {len(processes)} processes hang"
    return [process.exitcode or 0 for process in processes]
