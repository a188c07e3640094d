"""A student and a teacher of a few thousand parameters, and training them; a script for torchrun.

    torchrun --nproc-per-node=2 tiny_training.py OUT ROWS '{"per_device_train_batch_size": 2}'

leaves the weights and the metrics of a few steps in OUT; the JSON holds options of GraceConfig.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from grace.evaluation import tiny
from grace.training import Collator, ConversationDataset, GraceConfig, GraceTrainer
from grace.training.data import read_rows

STUDENT = tiny.Size(width=16, inner=32, layers=2, heads=2, vision_width=16, vision_layers=1)
TEACHER = tiny.Size(width=32, inner=32, layers=3, heads=2, vision_width=16, vision_layers=1)


def make_model(size: tiny.Size, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return tiny.make_model(size, seed)


def make_dataset(root: Path, processor: Any) -> ConversationDataset:
    return ConversationDataset(read_rows(root / "train.json"), processor, root)


def make_trainer(out: Path, rows: Path, options: dict[str, Any]) -> GraceTrainer:
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
    return GraceTrainer(
        make_model(STUDENT, seed=0),
        GraceConfig(**{**defaults, **options}),
        make_model(TEACHER, seed=1),
        train_dataset=make_dataset(rows, processor),
        data_collator=Collator(processor),
    )


def train(out: Path, rows: Path, options: dict[str, Any]) -> GraceTrainer:
    """Train; rank 0 leaves the state of the run in `out/state.pt`."""
    trainer = make_trainer(out, rows, options)
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    weights = trainer.accelerator.get_state_dict(trainer.model)  # gathers shards: on every rank
    if trainer.is_world_process_zero():
        state = {"weights": weights, "controller": trainer.controller.state_dict()}
        torch.save(state, out / "state.pt")
    return trainer


def as_rank(
    rank: int, world: int, port: int, out: Path, rows: Path, options: dict[str, Any]
) -> None:
    """One process of `world`, as torchrun would start it."""
    torch.set_num_threads(1)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ.update({name: str(value) for name, value in names.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    train(out, rows, options)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    train(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
