"""The models of a study: where they are, how they are loaded, how they are made from nothing."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from grace.evaluation import tiny
from grace.study.config import ModelRecipe, StudyConfig
from grace.study.pool import MAKING
from grace.training.config import GraceConfig
from grace.training.files import publish, write_whole

MADE = "models"  # folder of those that a study makes
_SHARD = "15MB"


def model_dir(config: StudyConfig, root: Path, which: str) -> Path:
    """Directory of the study's `teacher` or `student`."""
    if config.models is not None:
        return Path(config.models) / which
    if config.make is not None:
        return root / MADE / which
    return tiny.teacher_dir() if which == "teacher" else tiny.student_dir()


def load(directory: Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
    """A checkpoint on a device."""
    from transformers import AutoModelForImageTextToText

    model: Any = AutoModelForImageTextToText.from_pretrained(directory, dtype=dtype)
    return model.to(device).eval()


@lru_cache(maxsize=2)
def processor_of(directory: Path) -> Any:
    """The student's processor, which the teacher shares."""
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(directory)


@lru_cache(maxsize=4)
def digest(directory: Path) -> str:
    """Of a checkpoint's weights."""
    found = hashlib.sha256()
    for path in sorted(directory.glob("*.safetensors")):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def is_made(config: StudyConfig, root: Path, which: str) -> bool:
    """Whether `teacher` or `student` is there, or is not for the study to make."""
    return config.make is None or (root / MADE / which).is_dir()


def making_dir(root: Path, which: str) -> Path:
    """Where one is trained: its metrics, and checkpoints while it is not done."""
    return root / MADE / f"making-{which}"


def steps_of(config: StudyConfig, which: str) -> int:
    """Steps that making one takes; 0 where the study does not make it."""
    return 0 if config.make is None else getattr(config.make, which).steps


def make(
    config: StudyConfig, root: Path, which: str, device: str, until: float | None = None
) -> None:
    """Train `teacher` or `student` from nothing into `root/models`, unless it is there.

    It learns rows like those of the arms, in full precision, and is kept in bfloat16. What was
    interrupted goes on from its last checkpoint. A rank of several (`grace.study.ranks`) takes its
    part of every batch.

    Raises:
        OutOfTime: `until` came first; a checkpoint holds what was done.
    """
    from grace.study.training import DrawnQuestions, remove_checkpoints, train

    if config.make is None or is_made(config, root, which):
        return
    from grace.evaluation.drawn import models

    recipe: ModelRecipe = getattr(config.make, which)
    images = images_of_a_rank(config, which, int(os.environ.get("WORLD_SIZE", "1")))
    processor = models.make_processor(config.pixels)
    model: Any = models.make_model(recipe.size, config.make.seed, config.pixels)
    folder = making_dir(root, which)
    options = _options(config, recipe, folder, device, images)
    data = DrawnQuestions(root / "data" / MAKING, processor, recipe.label_errors)
    with compiled_layers(model, enabled=device == "cuda"):
        trained = train(model, options, data, processor, until=until)
    if options.process_index > 0:  # rank 0 keeps it
        return
    _keep(model, processor, root / MADE / which)
    facts = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": trained.tokens,
        "seconds": trained.seconds,
    }
    write_whole(root / MADE / f"{which}.json", json.dumps(facts))
    remove_checkpoints(folder)


@contextmanager
def compiled_layers(
    *held: nn.Module | None, enabled: bool = True, **options: Any
) -> Iterator[None]:
    """Within it the layers of these models are compiled, as `torch.compile` does with `options`.

    Half of an uncompiled step of models this narrow is casts, norms and sums. Layers of one kind
    share one program for all lengths, which takes seconds; a whole model takes a minute and more.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [
        layer
        for model in held
        if enabled and model is not None
        for layer in model.modules()
        if isinstance(layer, GradientCheckpointingLayer)
    ]
    for layer in layers:
        layer.compile(dynamic=True, **options)
    try:
        yield
    finally:  # scoring has other shapes and dtypes, and would compile anew for a few batches
        for layer in layers:
            layer._compiled_call_impl = None


def images_of_a_rank(config: StudyConfig, which: str, ranks: int) -> int:
    """Images of a batch that each of so many ranks takes.

    Raises:
        ValueError: they do not divide the batch.
    """
    recipe: ModelRecipe = getattr(config.make, which)
    if recipe.batch_images % ranks:
        allowed = f"be a multiple of the {ranks} GPUs"
        raise ValueError(
            f"study: make.{which}.batch_images must {allowed}, got {recipe.batch_images}"
        )
    return recipe.batch_images // ranks


def _options(
    config: StudyConfig, recipe: ModelRecipe, folder: Path, device: str, images: int
) -> GraceConfig:
    assert config.make is not None
    return GraceConfig(
        output_dir=str(folder),
        quantization=False,
        distillation="none",
        omega=0.0,
        freeze_vision=False,
        max_steps=recipe.steps,
        per_device_train_batch_size=images,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=recipe.warmup_steps,
        weight_decay=recipe.weight_decay,
        adam_beta2=0.98,
        logging_steps=max(1, recipe.steps // 100),
        save_strategy="steps",
        save_steps=recipe.save_steps,
        save_total_limit=1,
        seed=config.make.seed,
        bf16=device == "cuda",
        use_cpu=device == "cpu",
        disable_tqdm=True,
        dataloader_num_workers=config.loader_workers,
    )


def _keep(model: Any, processor: Any, directory: Path) -> None:
    """Save in bfloat16, as models are served and small files travel; whole or not at all."""
    beside = directory.with_name(f".{directory.name}.unfinished")
    shutil.rmtree(beside, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(beside, max_shard_size=_SHARD)
    processor.save_pretrained(beside)
    publish(beside, directory)
