"""Memory of a run: its peak, and what to lower when it does not suffice."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_GIB = 2**30


class OutOfMemory(MemoryError):
    """A device's memory did not suffice; the message says what to lower."""


def peak_gib(device: torch.device) -> dict[str, float]:
    """Peak memory of this process in GiB: `peak_host_gib` and, on a GPU, `peak_gpu_gib` of tensors
    and `peak_gpu_reserved_gib` with what the allocator held."""
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes there, KiB elsewhere
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    found = {"peak_host_gib": peak / _GIB}
    if device.type == "cuda":
        found["peak_gpu_gib"] = torch.cuda.max_memory_allocated(device) / _GIB
        found["peak_gpu_reserved_gib"] = torch.cuda.max_memory_reserved(device) / _GIB
    return {name: round(value, 3) for name, value in found.items()}


def peak_of_all_ranks(accelerator: Any) -> dict[str, float]:
    """The largest `peak_gib` of any rank; called on every rank."""
    mine = peak_gib(accelerator.device)
    values = torch.tensor([list(mine.values())], dtype=torch.float64, device=accelerator.device)
    largest = accelerator.gather(values).max(0).values
    return dict(zip(mine, largest.tolist(), strict=True))


@contextmanager
def explained_while_loading() -> Iterator[None]:
    """Within the context, running out of GPU memory tells how to load less."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(
            f"train: memory of the GPU must hold student and teacher, got: {_first(error)}. Set "
            "teacher_bits=8, or teacher_fsdp=true and fsdp=true over several ranks"
        ) from error


@contextmanager
def explained(trainer: Any) -> Iterator[None]:
    """Within the context, running out of GPU memory raises `OutOfMemory` with what to lower."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(advice(trainer, _first(error))) from error


def _first(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]


def advice(trainer: Any, error: str) -> str:
    """What to change, the cheapest first, each with its value now.

    Args:
        trainer: a `GraceTrainer`; its options, model and the longest row it met are named.
        error: what torch said.
    """
    args = trainer.args
    tried = [
        ("gradient_checkpointing=true", not args.gradient_checkpointing),
        (
            f"per_device_train_batch_size (now {args.per_device_train_batch_size}; "
            "gradient_accumulation_steps raised by as much keeps the step)",
            args.per_device_train_batch_size > 1,
        ),
        (f"data.max_length (longest row so far {trainer.longest_row} tokens)", True),
        (
            f"chunk_size (now {args.chunk_size or 'as many as 384 MiB of logits'})",
            True,
        ),
        (
            "teacher_bits=8, or teacher_fsdp=true over several ranks",
            trainer.teacher is not None and args.teacher_bits is None,
        ),
        ("fsdp=true over several ranks", not args.fsdp),
    ]
    lower = "; ".join(text for text, useful in tried if useful)
    return (
        f"GraceTrainer: memory of {args.device} must hold step {trainer.state.global_step + 1}, "
        f"got: {error}. Lower or set, the cheapest first: {lower}"
    )
