"""A student and a teacher of a few thousand parameters, and rows to train them on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from grace.evaluation import synthetic, tiny
from grace.training import Collator, ConversationDataset, GraceConfig, GraceTrainer

STUDENT = tiny.Size(width=16, inner=32, layers=2, heads=2, vision_width=16, vision_layers=1)
TEACHER = tiny.Size(width=32, inner=32, layers=3, heads=2, vision_width=16, vision_layers=1)


@pytest.fixture(scope="session")
def processor() -> Any:
    return tiny.make_processor()


@pytest.fixture(scope="session")
def rows_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.json (48 rows) and its images."""
    root = tmp_path_factory.mktemp("rows")
    synthetic.training_rows(root, images=8, seed=0, questions_per_image=6)
    return root


@pytest.fixture(scope="session")
def dataset(rows_root: Path, processor: Any) -> ConversationDataset:
    from grace.training.data import read_rows

    return ConversationDataset(read_rows(rows_root / "train.json"), processor, rows_root)


def _model(size: tiny.Size, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return tiny.make_model(size, seed)


@pytest.fixture
def make_student() -> Callable[[], nn.Module]:
    return lambda: _model(STUDENT, seed=0)


@pytest.fixture
def make_trainer(
    tmp_path: Path, processor: Any, dataset: Any, make_student: Callable[[], nn.Module]
) -> Callable[..., GraceTrainer]:
    """A trainer of a fresh student; keyword arguments are options of GraceConfig."""

    def make(student: nn.Module | None = None, **options: Any) -> GraceTrainer:
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "group_size": 16,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
        }
        return GraceTrainer(
            student or make_student(),
            GraceConfig(**{**defaults, **options}),
            _model(TEACHER, seed=1),
            train_dataset=dataset,
            data_collator=Collator(processor),
            processing_class=processor,
        )

    return make
