"""A model made on several GPUs at once: a process each, that train one global batch together."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import torch
from torch import multiprocessing

from grace.study import models, worker
from grace.study.config import StudyConfig
from grace.study.training import OutOfTime


def make_together(
    config: StudyConfig, root: Path, which: str, device: str, until: float | None, ranks: int
) -> None:
    """`models.make` by `ranks` processes, each with its part of every batch, on the GPU of its
    number; on a CPU by Gloo.

    Weights are those of one process up to the order of sums, as gradients are added up over ranks.

    Raises:
        ValueError: ranks that do not divide the batch.
        OutOfTime: `until` came first.
    """
    models.images_of_a_rank(config, which, ranks)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = (ranks, port, config, root, which, device, until)
    multiprocessing.spawn(_rank, arguments, nprocs=ranks)
    if not models.is_made(config, root, which):
        raise OutOfTime(f"study: making {which} stopped")


def _rank(
    rank: int,
    ranks: int,
    port: int,
    config: StudyConfig,
    root: Path,
    which: str,
    device: str,
    until: float | None,
) -> None:
    """One of the processes; what accelerate and torch look for is in the environment."""
    os.environ.update(
        {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    )
    worker.use_one_thread()
    try:
        models.make(config, root, which, device, until)
    except OutOfTime:  # of all ranks behind the same step
        pass
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
