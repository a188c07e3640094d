"""CUDA graphs without a GPU: what a capture records are the calls of ops, with their very tensors.

A replay makes the same calls again and puts their results where the first ones lie, as a graph does
with its kernels: whatever Python decided or computed in the capture stays as it was then.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_WAITS = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "item",
    "_unique2",
    "lift_fresh",
    "masked_scatter_",
    "repeat_interleave",
    "bincount",
    "equal",
)


def waits(function: Any, args: tuple) -> bool:
    """Whether a call makes the host wait for a GPU, or brings it values from Python."""
    name = function.overloadpacket.__name__
    booleans = [
        index
        for index in (args[1] if name in ("index", "index_put_") else ())
        if index is not None and index.dtype == torch.bool
    ]
    return name in _WAITS or bool(booleans)


class Recorded:
    """Stands for a `torch.cuda.CUDAGraph`."""

    made: ClassVar[list[Recorded]] = []

    def __init__(self) -> None:
        self.calls: list[tuple[Any, tuple, dict, Any]] = []
        self.replays = 0
        Recorded.made.append(self)

    def replay(self) -> None:
        self.replays += 1
        for function, args, kwargs, was in self.calls:
            again = function(*args, **kwargs)
            inputs = {_place(leaf) for leaf in tree_leaves((args, kwargs)) if _is_tensor(leaf)}
            for old, new in zip(tree_leaves(was), tree_leaves(again), strict=True):
                if (
                    _is_tensor(old) and _place(old) not in inputs
                ):  # not a view, nor written in place
                    old.copy_(new)


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, Tensor)


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class _Recorder(TorchDispatchMode):
    def __init__(self, graph: Recorded) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        self.graph.calls.append((function, args, kwargs or {}, result))
        return result


class _Stream:
    def __init__(self, *_: Any) -> None: ...

    def wait_stream(self, other: Any) -> None: ...


@contextlib.contextmanager
def _capture(graph: Recorded, pool: Any, capture_error_mode: str) -> Iterator[None]:
    assert (pool, capture_error_mode) == ("pool", "thread_local")
    with _Recorder(graph), pytest.MonkeyPatch.context() as patch:
        # transformers looks at it, and makes masks then that it would not make otherwise.
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        yield


@pytest.fixture
def recorded_graphs(monkeypatch: pytest.MonkeyPatch) -> list[Recorded]:
    """Graphs captured from here on; torch.cuda makes them of calls on a CPU."""
    stand_ins = {
        "Stream": _Stream,
        "current_stream": _Stream,
        "stream": lambda _: contextlib.nullcontext(),
        "CUDAGraph": Recorded,
        "graph": _capture,
        "graph_pool_handle": lambda: "pool",
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    Recorded.made = []
    return Recorded.made
