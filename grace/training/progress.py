"""What a terminal and train.log show of a run: a bar, and a line a logging step."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_log = logging.getLogger(__name__)
# What a line holds, in this order; the rest is in metrics.jsonl.
_SHOWN = {
    "loss": ".4f",
    "ce": ".4f",
    "gdkd": ".4f",
    "kd": ".4f",
    "rcka": ".4f",
    "beta": ".4f",
    "omega": ".3g",
    "grad_norm": ".3g",
    "learning_rate": ".2e",
    "code_flip_rate": ".2e",
    "scale_drift": ".2e",
    "dropped_terms": "d",
    "tokens_per_second": ",.0f",
}


def line(step: int, steps: int, logs: Mapping[str, Any]) -> str:
    """One line of a logging step: `step 20/300  loss 1.2345  …`; terms that a run lacks are left
    out, and `dropped_terms` where there are none."""
    shown = {name: logs[name] for name in _SHOWN if name in logs}
    if not shown.get("dropped_terms"):
        shown.pop("dropped_terms", None)
    texts = [f"{name} {value:{_SHOWN[name]}}" for name, value in shown.items()]
    return "  ".join([f"step {step}/{steps}", *texts])


class Progress(TrainerCallback):
    """A bar with tokens/s and the time left (unless `disable_tqdm`), and a line a logging step,
    above the bar and to the log of `grace.training.progress`."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Begin the bar where the run begins or resumes."""
        if state.is_world_process_zero and not args.disable_tqdm:
            self.bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                unit="step",
                dynamic_ncols=True,
                desc="train",
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """A step further."""
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Write the line, and tokens/s beside the bar."""
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        text = line(state.global_step, state.max_steps, logs)
        _log.info(text)
        if self.bar is not None:
            self.bar.set_postfix_str(f"{logs['tokens_per_second']:,.0f} tokens/s", refresh=False)
            self.bar.write(text)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Leave the bar as it stands."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
