"""A student and a teacher of a few thousand parameters, and training them; a script for torchrun.

    torchrun --nproc-per-node=2 tiny_training.py OUT ROWS BATCH_A_RANK ACCUMULATION

leaves the weights and the metrics of a few steps in OUT.
"""

from __future__ import annotations

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


def train(out: Path, rows: Path, batch: int, accumulation: int) -> GraceTrainer:
    processor = tiny.make_processor()
    config = GraceConfig(
        output_dir=str(out),
        max_steps=3,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        group_size=16,
        optim="sgd",
        learning_rate=0.05,
        max_grad_norm=0.0,
        ema_decay=0.5,
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = GraceTrainer(
        make_model(STUDENT, seed=0),
        config,
        make_model(TEACHER, seed=1),
        train_dataset=make_dataset(rows, processor),
        data_collator=Collator(processor),
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    trained = train(folder, Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
    if trained.is_world_process_zero():
        torch.save(trained.model.state_dict(), folder / "weights.pt")
