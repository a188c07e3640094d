"""The data of a study: drawn training images with packed questions, and the teacher's view of them.

data/train/       train.json and images, LLaVA rows, several questions an image
data/heldout/     a benchmark in the MME folder layout; data/validation/ where a sweep needs it
data/teacher.safetensors   the teacher's hidden states, made once for all arms and epochs
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from grace.evaluation import synthetic
from grace.evaluation.packed_questions import pack_tokens, tokenize
from grace.study.config import StudyConfig
from grace.training.adapters import adapter_for
from grace.training.step import TEACHER_LAST, TEACHER_LAYER, Teacher, model_inputs, supervised

TRAIN, HELDOUT, VALIDATION, TEACHER = "train", "heldout", "validation", "teacher.safetensors"
_DONE = "drawn"


def draw(root: Path, config: StudyConfig) -> None:
    """Draw training rows and the held-out benchmark into `root`, unless that is done already."""
    if (root / _DONE).is_file():
        return
    shutil.rmtree(root, ignore_errors=True)
    synthetic.training_rows(
        root / TRAIN,
        images=config.train_images,
        seed=config.seed,
        questions_per_image=config.questions_per_image,
    )
    images, seed = config.heldout_images, config.seed
    synthetic.draw(root / HELDOUT, images_per_subtask=images, seed=seed, split=config.split)
    if config.sweep is not None:
        images = config.validation_images
        folder = root / VALIDATION
        synthetic.draw(folder, images_per_subtask=images, seed=seed, split="validation")
    (root / _DONE).touch()


class PackedQuestions(Dataset):
    """Images with all their questions in one row each (`grace.evaluation.packed_questions`).

    Args:
        root: folder with `train.json`; the rows of one image follow each other.
        processor: of the student.
        teacher: file of `cache_teacher`, or None.
    """

    def __init__(self, root: Path, processor: Any, teacher: Path | None = None) -> None:
        from grace.training.data import read_rows

        self.processor = processor
        grouped = groupby(read_rows(root / "train.json"), key=lambda row: row["image"])
        self.images = [(name, list(rows)) for name, rows in grouped]
        pixels = [_pixels(processor, root / name) for name, _ in self.images]
        self.pixels = torch.cat(pixels)
        self.image_tokens = processor.replace_image_token({"pixel_values": self.pixels[:1]}, 0)
        self.teacher = load_file(teacher) if teacher is not None else {}

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Pixels, tokens of the questions, and the teacher's rows where there are any."""
        count = self.image_tokens.count(self.processor.image_token)
        asked = [
            tokenize(self.processor, _text(row, 0), _text(row, 1), count)
            for row in self.images[index][1]
        ]
        item = {"row_ids": index, "pixels": self.pixels[index], "questions": asked}
        for name in (TEACHER_LAST, TEACHER_LAYER):
            if name in self.teacher:
                start, end = self.teacher[f"{name}_bounds"][index : index + 2].tolist()
                item[name] = self.teacher[name][start:end]
        return item

    def collate(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """A batch for `GraceTrainer`."""
        pad = self.processor.tokenizer.pad_token_id
        batch = {
            "pixel_values": torch.stack([item["pixels"] for item in items]),
            "row_ids": torch.tensor([item["row_ids"] for item in items]),
            **pack_tokens([item["questions"] for item in items], pad),
        }
        for name in (TEACHER_LAST, TEACHER_LAYER):
            if name in items[0]:
                batch[name] = torch.cat([item[name] for item in items])
        return batch


def _pixels(processor: Any, path: Path) -> Tensor:
    with Image.open(path) as image:
        return processor.image_processor(images=[image.convert("RGB")], return_tensors="pt")[
            "pixel_values"
        ]


def _text(row: dict[str, Any], turn: int) -> str:
    return row["conversations"][turn]["value"].replace("<image>", "").strip()


def cache_teacher(
    model: nn.Module,
    dataset: PackedQuestions,
    path: Path,
    config: Any,
    *,
    batch_images: int = 16,
    advance: Callable[[int], Any] = lambda _: None,
) -> None:
    """Run the teacher once over every image of `dataset` and keep the rows that losses look at.

    Args:
        model: the teacher, on the device to run it on.
        dataset: without a teacher of its own.
        path: safetensors file to write; it appears when it is whole.
        config: a GraceConfig; it says which layer and terms are wanted.
        batch_images: images a forward pass.
        advance: told how many images are done, after every pass.
    """
    teacher = Teacher(model, config)
    rows: dict[str, list[Tensor]] = {TEACHER_LAST: [], TEACHER_LAYER: []}
    lengths: dict[str, list[Tensor]] = {TEACHER_LAST: [], TEACHER_LAYER: []}
    device = next(model.parameters()).device
    for start in range(0, len(dataset), batch_images):
        items = [dataset[index] for index in range(start, min(start + batch_images, len(dataset)))]
        batch = {name: value.to(device) for name, value in dataset.collate(items).items()}
        for name, (kept, count) in _teacher_rows(teacher, batch).items():
            rows[name].append(kept.cpu())
            lengths[name].append(count.cpu())
        advance(len(items))
    tensors = {name: torch.cat(parts) for name, parts in rows.items()}
    for name, counts in lengths.items():
        tensors[f"{name}_bounds"] = nn.functional.pad(torch.cat(counts).cumsum(0), (1, 0))
    beside = path.with_suffix(".unfinished")
    save_file(tensors, beside)
    beside.replace(path)


def _teacher_rows(teacher: Teacher, batch: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Rows by name, and how many belong to each image."""
    labels = batch["labels"]
    index, _ = supervised(labels)
    visual = adapter_for(teacher.model).visual_tokens(batch)
    if visual is None:
        raise ValueError("study: training images must have visual tokens, got none")
    said = teacher(model_inputs(batch), index, visual)
    layer = said.layer if said.layer is not None else said.last[:0]
    per_image = torch.bincount(index // labels.shape[1], minlength=len(labels))
    return {
        TEACHER_LAST: (said.last, per_image),
        TEACHER_LAYER: (layer, visual.cu_seqlens.diff().long()),
    }
