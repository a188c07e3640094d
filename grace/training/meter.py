"""Running numbers of a training run: sums of a step on the device, means between two logs."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from grace.training.step import MicroBatch

TERMS = ("ce", "distillation", "rcka")
# What every micro-batch adds to the step's sums, one number each.
SUMS = (*TERMS, "distillation_share", "dropped", "interrupted", "tokens", "skipped")


class Meter:
    """Sums of a step on the device, and means of steps between two logs."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.dropped = 0
        self.steps: list[dict[str, float]] = []
        self.started = time.perf_counter()
        self._reset()

    def _reset(self) -> None:
        self.sums = torch.zeros(len(SUMS), dtype=torch.float64, device=self.device)
        self.dropped = 0

    def add(self, values: dict[str, Tensor], micro: MicroBatch, inputs: Mapping[str, Any]) -> None:
        """Add the terms of one micro-batch, each with its share of the step."""
        zero = self.sums.new_zeros(())
        parts = [values[name] * share_of(micro, name) if name in values else zero for name in TERMS]
        parts.append(micro.share.distillation if "distillation" in values else zero)
        parts += [zero, zero, zero + inputs["input_ids"].numel()]
        parts.append(zero + inputs["skipped"].sum() if "skipped" in inputs else zero)
        self.sums += torch.stack([part.double() for part in parts])

    def take(self, interrupted: bool) -> Tensor:
        """The step's sums so far, float64 in the order of `SUMS`, and begin anew.

        Args:
            interrupted: whether this rank was told to stop; the sum tells all of them.
        """
        sums = self.sums.clone()
        sums[SUMS.index("dropped")] = self.dropped
        sums[SUMS.index("interrupted")] = interrupted
        self._reset()
        return sums

    def restart(self) -> None:
        """Count time from now: training begins."""
        self.started = time.perf_counter()

    def end_step(self, step: dict[str, float]) -> None:
        """Take in a finished step: its sums over all ranks, by their names."""
        self.steps.append(step)

    def means(self) -> dict[str, float]:
        """Means of the terms since the last call, and tokens a second of this process's clock."""
        now, steps = time.perf_counter(), self.steps
        tokens = sum(step["tokens"] for step in steps)
        means = {name: sum(step[name] for step in steps) / max(1, len(steps)) for name in TERMS}
        means["tokens_per_second"] = tokens / max(1e-9, now - self.started)
        self.steps, self.started = [], now
        return means


def share_of(micro: MicroBatch, name: str) -> Tensor:
    """What part of the step's average of a term the micro-batch's own average is."""
    names = {"ce": "tokens", "distillation": "distillation", "rcka": "images"}
    return getattr(micro.share, names[name])
