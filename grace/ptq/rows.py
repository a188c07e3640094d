"""Calibration batches from training rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor


def calibration_batches(
    path: str | Path,
    processor: Any,
    image_root: str | Path | None = None,
    *,
    samples: int = 128,
    batch_size: int = 4,
    max_length: int | None = 2048,
    seed: int = 0,
) -> Iterator[dict[str, Tensor]]:
    """Rows drawn from a file, as inputs of a model: questions, images and answers.

    Args:
        path: as `grace train` reads it: LLaVA or messages, JSON, JSONL or parquet.
        processor: of the model's checkpoint.
        image_root: folder of its images; None: the file's own.
        samples: rows drawn, all where there are fewer.
        batch_size: rows a batch.
        max_length: longer rows are cut at their end; rows that cannot be used are left out.
        seed: of the draw.

    Raises:
        ValueError: no row that can be used, or a number below 1.
        FileNotFoundError: no such file.
    """
    from grace.training.collator import Collator
    from grace.training.data import ConversationDataset, read_rows
    from grace.training.step import model_inputs

    if samples < 1 or batch_size < 1:
        got = f"{samples} and {batch_size}"
        raise ValueError(f"ptq: samples and batch_size must be at least 1, got {got}")
    if not Path(path).exists():
        raise FileNotFoundError(
            f"ptq: rows to calibrate with must be a file, got nothing at {path}"
        )
    root = Path(path).parent if image_root is None else image_root
    options: dict[str, Any] = {"on_error": "skip", "max_length": max_length, "truncate": True}
    data = ConversationDataset(read_rows(path), processor, root, **options)
    drawn = np.random.default_rng(seed).permutation(len(data))[:samples].tolist()
    parts = (drawn[start : start + batch_size] for start in range(0, len(drawn), batch_size))
    collate = Collator(processor)
    return (model_inputs(collate([data[index] for index in part])) for part in parts)
