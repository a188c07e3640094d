"""CUDA graphs: how what runs on buffers that never move is captured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_WARM_UP = 3  # runs before a capture: lazy initialization, autotuning, compilation


def captured(
    run: Callable[[], Any], device: torch.device, pool: Any, restore: Callable[[], None]
) -> Any:
    """A `torch.cuda.CUDAGraph` of ``run``, which must wait for nothing and move no buffer.

    Args:
        run: what is captured; runs a few times before, on a stream of its own.
        device: a GPU.
        pool: the memory that graphs share; no two of them may run at once.
        restore: puts back what a run changes; called behind each, the capture included.
    """
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UP):
            run()
            restore()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # Other threads may use the GPU meanwhile.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        run()
    restore()
    return graph
