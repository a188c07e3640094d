"""`grace precompute-teacher`: the cache of a run's teacher, from the run's own configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from grace.training import memory
from grace.training.collator import Collator
from grace.training.files import require_writable
from grace.training.run import cache_origin, load_teacher, read_data
from grace.training.run_config import RunConfig
from grace.training.teacher_cache import precompute
from grace.training.teacher_placement import place_teacher


def precompute_teacher(config: RunConfig, folder: Path, *, batch_size: int = 8) -> Path:
    """Make the cache of a run's teacher (`grace.training.teacher_cache`), or go on with it.

    Raises:
        ValueError: a run without a teacher's directory, rows with videos, or the cache of another.
        OSError: a folder that cannot be written or has no room.
    """
    if config.training.world_size > 1:
        raise ValueError(f"precompute-teacher: ranks must be one, got {config.training.world_size}")
    if config.teacher is None or not Path(config.teacher).is_dir():
        raise ValueError(f"precompute-teacher: teacher must be a directory, got {config.teacher}")
    require_writable(folder)
    dataset, processor = read_data(config)
    with memory.explained_while_loading():
        teacher: Any = place_teacher(load_teacher(config), config.training)
    hidden = config.training.disable_tqdm
    with tqdm(total=len(dataset), unit="row", desc="teacher", disable=hidden) as bar:
        return precompute(
            folder,
            teacher,
            dataset,
            Collator(processor),
            cache_origin(config, processor),
            batch_size=batch_size,
            advance=bar.update,
        )
