"""What a run tells of itself: metrics.jsonl, and how many codes flip."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

METRICS = "metrics.jsonl"


class MetricsWriter(TrainerCallback):
    """Appends what the trainer logs to `metrics.jsonl`, one JSON object a logging step.

    A run that starts anew begins the file anew; one that resumes keeps the lines up to the step
    it resumes from, so that every step stands in the file once.

    Args:
        path: the file; default `<output_dir>/metrics.jsonl`.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Keep what a resumed run has done already, and nothing else."""
        if state.is_world_process_zero:
            self.path = self.path or Path(str(args.output_dir)) / METRICS
            self.path.parent.mkdir(parents=True, exist_ok=True)
            kept = [row for row in read_metrics(self.path) if row["step"] <= state.global_step]
            kept = kept if state.global_step else []
            self.path.write_text("".join(json.dumps(row) + "\n" for row in kept))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Write a line for every log of training itself."""
        if state.is_world_process_zero and self.path is not None and logs and "loss" in logs:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl; a last line that was cut off by a crash is left out."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


class CodeFlips:
    """Share of quantization codes that changed since the last look.

    It looks at the same `sample` weights of every layer (its first rows): codes of a whole model
    would cost a byte a weight.
    """

    def __init__(self, model: nn.Module, sample: int = 2**16) -> None:
        from grace.nn import FakeQuantLinear

        self.layers = [layer for layer in model.modules() if isinstance(layer, FakeQuantLinear)]
        self.sample = sample
        self.codes = self._look()

    def rate(self) -> float | None:
        """Changed codes over all codes looked at; None for a model without quantized layers."""
        if not self.layers:
            return None
        codes, before = self._look(), self.codes
        self.codes = codes
        changed = sum((new != old).sum() for new, old in zip(codes, before, strict=True))
        return float(changed) / sum(new.numel() for new in codes)

    @torch.no_grad()
    def _look(self) -> list[Tensor]:
        from grace.ops.fake_quant import quantize

        seen = []
        for layer in self.layers:
            rows = max(1, self.sample // layer.weight.shape[1])
            codes, _ = quantize(
                layer.weight[:rows],
                layer.log_scale[:rows],
                bits=layer.bits,
                group_size=layer.group_size,
                scale_dtype=layer.scale_dtype,
            )
            seen.append(codes)
        return seen
