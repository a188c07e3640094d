"""`grace quickstart`: from tiny models to a table of what each method keeps, in minutes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from grace.study.config import SCALES, StudyConfig


def configure(scale: str = "default", **options: Any) -> StudyConfig:
    """The study of a quickstart; options that are None keep the scale's own.

    Raises:
        ValueError: an unknown scale, or a value out of range.
    """
    if scale not in SCALES:
        raise ValueError(f"quickstart: scale must be one of {', '.join(SCALES)}, got {scale!r}")
    given = {name: value for name, value in options.items() if value is not None}
    return replace(SCALES[scale], **given)


def quickstart(out: Path, config: StudyConfig, *, from_scratch: bool = False) -> dict[str, Any]:
    """Run the study (or what is left of it), print its table, write its report into `out`.

    Raises:
        FileNotFoundError: the shipped models are not there.
        RuntimeError: a packed model that does not answer as the model it was made from.
    """
    from grace.study.progress import TerminalProgress
    from grace.study.report import print_report, read_study, write_report
    from grace.study.run import run_study, units
    from grace.study.worker import quiet

    quiet()
    if from_scratch:
        config = replace(config, models=str(make_models(out / "models", config.seed)))
    try:
        with TerminalProgress(units(config)) as progress:
            run_study(config, out, progress=progress)
    finally:
        if (out / "study.json").is_file():
            write_report(out)
    study = read_study(out)
    print_report(study)
    return study


def make_models(folder: Path, seed: int) -> Path:
    """Train the tiny teacher and student anew into `folder`, unless they are there; minutes on a
    GPU, longer on two cores, where each takes one."""
    from grace.evaluation import make_tiny
    from grace.study.execution import cores, worker_pool

    left = [name for name in make_tiny.RECIPES if not (folder / name).is_dir()]
    if torch.cuda.is_available():
        for name in left:
            make_tiny.make(name, folder, seed=seed, device="cuda")
    elif left:
        with worker_pool(min(len(left), cores())) as pool:
            made = [pool.submit(make_tiny.make, name, folder, seed=seed) for name in left]
            for future in made:
                future.result()
    return folder
