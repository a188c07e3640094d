"""What a run tells of itself: a line a logging step in metrics.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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
