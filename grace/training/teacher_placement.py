"""Where and how the teacher runs: at 8 bits, in shards over the ranks, on a stream of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from grace.training.adapters import adapter_for
from grace.training.config import GraceConfig
from grace.training.sharding import shard_frozen
from grace.training.step import MicroBatch, Teacher
from grace.training.teacher_cache import CachedTeacher, CachedTeacherRows


def place_teacher(model: nn.Module, config: GraceConfig) -> Teacher | CachedTeacherRows:
    """The teacher on the run's device, packed or sharded where the options say so.

    Raises:
        ValueError: `teacher_group_size` does not divide its layers, or `teacher_fsdp` on one rank.
    """
    if isinstance(model, CachedTeacher):
        return CachedTeacherRows(model.head.to(config.device), config)
    if config.teacher_fsdp and config.world_size == 1:
        raise ValueError("GraceConfig: teacher_fsdp must be False on one rank, got True")
    if config.teacher_fsdp:
        shard_frozen(model.requires_grad_(False), adapter_for(model).layers, config.device)
        return Teacher(model, config)
    model = model.to(config.device)
    if config.teacher_bits is not None:
        _pack(model, config.teacher_bits, config.teacher_group_size)
    return Teacher(model, config)


def _pack(model: nn.Module, bits: int, group_size: int) -> None:
    from grace.quantization import pack, quantize

    with torch.no_grad():
        quantize(model, bits=bits, group_size=group_size)
        pack(model)


class TeacherStream:
    """A CUDA stream for the teacher, so that its kernels run beside the student's.

    Both models' activations then are in memory at once. Off, or without a GPU, it does nothing.

    Args:
        device: of both models.
        on: whether to have one.
    """

    def __init__(self, device: torch.device, on: bool) -> None:
        used = on and device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if used else None

    @contextmanager
    def ahead(self) -> Iterator[None]:
        """Within the context, work is queued on the stream, behind what is queued already."""
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            yield

    def join(self, micro: MicroBatch) -> None:
        """Let the current stream wait for the teacher, and own what it reads of `micro`."""
        if self.stream is None:
            return
        current = torch.cuda.current_stream(self.stream.device)
        current.wait_stream(self.stream)
        for tensor in _tensors(micro):
            # Freed while a kernel of the current stream still reads it, its memory would be given
            # to the teacher's next forward.
            tensor.record_stream(current)


def _tensors(micro: MicroBatch) -> Iterator[Tensor]:
    share, teacher, visual = micro.share, micro.teacher, micro.visual
    yield from (micro.index, micro.targets, share.tokens, share.distillation, share.images)
    if visual is not None:
        yield from (visual.index, visual.cu_seqlens)
    if teacher is not None:
        yield from (rows for rows in (teacher.last, teacher.layer) if rows is not None)
