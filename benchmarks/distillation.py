"""What the benchmarks of gated DKD compare with: the formula as one writes it first, its exact
gradient, and Liger-Kernel's losses."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import Absent, Side
from grace.ops.gated_dkd import reference, reference_backward

T, ALPHA, BETA = 2.0, 1.0, 4.0
SETTINGS = (T, ALPHA, BETA, -100)
_ROWS = 1024  # of logits in float32 at a time


def _sums(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """[Σ g·L, Σ g] with full-size log-softmaxes in float32: about 12 bytes a logit for autograd."""
    target = F.one_hot(labels, student.shape[1]).bool()
    log_s, log_t = (F.log_softmax(z.float() / T, dim=1) for z in (student, teacher))
    p_s, p_t = (z.gather(1, labels[:, None]).squeeze(1).exp() for z in (log_s, log_t))
    tckd = p_t * (p_t / p_s).log() + (1 - p_t) * ((1 - p_t) / (1 - p_s)).log()
    rest_s, rest_t = (
        F.log_softmax((z.float() / T).masked_fill(target, -1e9), dim=1) for z in (student, teacher)
    )
    nckd = (rest_t.exp() * (rest_t - rest_s)).masked_fill(target, 0).sum(1)
    full = F.log_softmax(teacher.float(), dim=1)
    gate = (full.exp() * full).sum(1).div(math.log(student.shape[1])).exp()
    return torch.stack([(gate * T**2 * (ALPHA * tckd + BETA * nckd)).sum(), gate.sum()])


def eager(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """Gated DKD in plain PyTorch, in chunks of rows, which bound its temporaries but not what
    autograd keeps."""
    return _mean(_sums, student, teacher, labels)


def compiled() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """``eager`` with each chunk compiled by torch.compile."""
    return functools.partial(_mean, harness.compiled(_sums))


def _mean(sums: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    parts = zip(*(tensor.split(_ROWS) for tensor in tensors), strict=True)
    total = sum(sums(*part) for part in parts)
    assert isinstance(total, Tensor)
    return total[0] / total[1]


def exact_gradients(
    chunks: Callable[[], Iterator[tuple[Tensor, Tensor, Tensor]]], rows: int, with_ce: bool
) -> Iterator[Tensor]:
    """Float64 gradients in the student's logits, chunk by chunk, of gated DKD and, ``with_ce``, of
    the mean cross-entropy added. ``chunks()`` makes (student, teacher, labels) of some rows."""
    gates = sum(reference(*_double(chunk), *SETTINGS)[1].sum() for chunk in chunks())
    for chunk in chunks():
        student, teacher, labels = _double(chunk)
        _, gate, ce, saved = reference(student, teacher, labels, *SETTINGS)
        grads = (gate / gates, torch.full_like(ce, with_ce / rows))
        yield reference_backward(*grads, student, teacher, labels, saved, *SETTINGS)


def _double(chunk: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return chunk[0].double(), chunk[1].double(), chunk[2]


def liger(name: str, module: str = "transformers", **options: Any) -> Any:
    """An instance of a loss of ``liger_kernel.<module>``; Absent where it is not installed."""
    try:
        found = importlib.import_module(f"liger_kernel.{module}")
    except ImportError as reason:
        raise Absent(f"liger-kernel cannot be imported ({reason})") from reason
    if not hasattr(found, name):
        raise Absent(f"liger-kernel has no {module}.{name}")
    return getattr(found, name)(**options)


def peer(call: Side) -> Side:
    """The call, Absent where it fails: a peer's error shall not end a benchmark."""

    def guarded(i: int) -> Any:
        try:
            return call(i)
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, ImportError, RuntimeError, TypeError, ValueError) as error:
            first = str(error).strip().partition("\n")[0]
            raise Absent(f"{type(error).__name__}: {first}") from error

    return guarded
