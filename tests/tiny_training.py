"""A student and a teacher of a few thousand parameters, and training them; a script for torchrun.

    torchrun --nproc-per-node=2 tiny_training.py OUT ROWS '{"per_device_train_batch_size": 2}'

leaves the metrics and the state of a few steps in OUT; the JSON holds options of GraceConfig.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from grace.evaluation import tiny
from grace.training import Collator, ConversationDataset, GraceConfig, GraceTrainer
from grace.training.data import read_rows
from grace.training.step import Teacher, TeacherRows

STUDENT = tiny.Size(width=16, inner=32, layers=2, heads=2, vision_width=16, vision_layers=1)
TEACHER = tiny.Size(width=32, inner=32, layers=3, heads=2, vision_width=16, vision_layers=1)
Fault = Callable[[GraceTrainer], None]


def make_model(size: tiny.Size, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return tiny.make_model(size, seed)


def make_dataset(root: Path, processor: Any) -> ConversationDataset:
    return ConversationDataset(read_rows(root / "train.json"), processor, root)


def make_trainer(out: Path, rows: Path, options: dict[str, Any]) -> GraceTrainer:
    """Of a student with dropout, so that a run needs its random states."""
    processor = tiny.make_processor()
    defaults = {
        "output_dir": str(out),
        "max_steps": 3,
        "group_size": 16,
        "optim": "sgd",
        "learning_rate": 0.05,
        "max_grad_norm": 0.0,
        "ema_decay": 0.5,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    options = {**defaults, **options}
    student = make_model(STUDENT, seed=0)
    dropout = options.pop("dropout", 0.0)
    for layer in student.model.language_model.layers:
        layer.self_attn.attention_dropout = dropout
    return GraceTrainer(
        student,
        GraceConfig(**options),
        make_model(TEACHER, seed=1),
        train_dataset=make_dataset(rows, processor),
        data_collator=Collator(processor),
    )


def train(
    out: Path, rows: Path, options: dict[str, Any], fault: Fault | None = None
) -> GraceTrainer:
    """Train; rank 0 leaves the state of the run in `out/state.pt`."""
    trainer = make_trainer(out, rows, options)
    if fault is not None:
        fault(trainer)
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    weights = trainer.accelerator.get_state_dict(trainer.model)  # gathers shards: on every rank
    if trainer.is_world_process_zero():
        state = {
            "weights": weights,
            "controller": trainer.controller.state_dict(),
            "dropped": trainer.dropped_terms,
            "random": torch.get_rng_state(),
        }
        torch.save(state, out / "state.pt")
    return trainer


def in_process(out: Path, rows: Path, options: dict[str, Any], fault: Fault | None) -> None:
    """`train` on one thread, as tests in this process do."""
    torch.set_num_threads(1)
    train(out, rows, options, fault)


def as_rank(
    rank: int, world: int, port: int, out: Path, rows: Path, options: dict, fault: Fault | None
) -> None:
    """One process of `world`, as torchrun would start it."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ.update({name: str(value) for name, value in names.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    in_process(out, rows, options, fault)
    torch.distributed.destroy_process_group()


# What happens to a run


class Signal(TrainerCallback):
    """Sends this process a signal in the middle of optimizer step `step`."""

    def __init__(self, step: int, number: int) -> None:
        self.step, self.number = step, number

    def __call__(self, trainer: GraceTrainer) -> None:
        trainer.add_callback(self)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), self.number)


class KillWhileSaving:
    """Kills this process inside the save of `step`, with weights and optimizer written."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self, trainer: GraceTrainer) -> None:
        save = trainer._save_rng_state

        def save_or_die(output: str) -> None:
            if trainer.state.global_step == self.step:
                os.kill(os.getpid(), signal.SIGKILL)
            save(output)

        trainer._save_rng_state = save_or_die  # type: ignore[method-assign]


def drop_a_term(trainer: GraceTrainer) -> None:
    """Make the teacher's last hidden states NaN in every micro-batch of this process."""
    assert trainer.teacher is not None
    trainer.teacher.__class__ = _BrokenTeacher


class _BrokenTeacher(Teacher):
    def __call__(self, *args: Any) -> TeacherRows:
        rows = super().__call__(*args)
        return TeacherRows(rows.last * torch.nan, rows.layer)


if __name__ == "__main__":
    train(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
