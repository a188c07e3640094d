"""Checkpoints of models that know nothing, small enough to run a command on in a second."""

from __future__ import annotations

from pathlib import Path

import torch

from grace.evaluation import tiny

SIZES = {
    "student": tiny.Size(width=32, inner=32, layers=2, heads=2, vision_width=16, vision_layers=1),
    "teacher": tiny.Size(width=32, inner=32, layers=3, heads=2, vision_width=16, vision_layers=1),
}


def save_models(root: Path) -> Path:
    """Write `student` and `teacher` into `root`, as they are when training begins."""
    for name, size in SIZES.items():
        torch.manual_seed(0)
        tiny.make_model(size, seed=0).save_pretrained(root / name)
        tiny.make_processor().save_pretrained(root / name)
    return root
