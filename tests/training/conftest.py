"""A student and a teacher of a few thousand parameters, and rows to train them on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_training import STUDENT, TEACHER, make_dataset, make_model
from torch import nn

from grace.evaluation import synthetic, tiny
from grace.training import Collator, ConversationDataset, GraceConfig, GraceTrainer


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
    return make_dataset(rows_root, processor)


@pytest.fixture
def make_student() -> Callable[[], nn.Module]:
    return lambda: make_model(STUDENT, seed=0)


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
            make_model(TEACHER, seed=1),
            train_dataset=dataset,
            data_collator=Collator(processor),
            processing_class=processor,
        )

    return make
