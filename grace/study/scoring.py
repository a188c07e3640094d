"""What an arm is worth: answers of the deployed weights, alignment to the teacher, bytes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from grace.evaluation import mme
from grace.study import models, questions
from grace.study.arms import METHODS
from grace.study.config import StudyConfig
from grace.study.task import ANSWERS, Task, questions_of, scored

RCKA_LAYER = -2


def score(task: Task, model: nn.Module) -> dict[str, Any]:
    """Answers and scores; of the packed model where there is one."""
    asked, processor = questions_of(task), task.processor
    said, entropy = questions.ask(model, processor, asked.batches)
    result: dict[str, Any] = {"deployed": False, "agreement": None}
    if task.arm.deployable and task.candidate is None:
        packed = deploy(task, model)
        deployed, entropy = questions.ask(packed, processor, asked.batches)
        same = sum(a == b for a, b in zip(said, deployed, strict=True))
        result = {"deployed": True, "agreement": same / len(said)}
        said = deployed
    answered = mme.answered(list(asked.rows), said)
    _write_answers(task.folder, answered, entropy)
    return {
        **result,
        "score": mme.score(answered),
        "levels": _by_level(answered, asked.levels),
        "right": right(answered),
    }


def _by_level(rows: Sequence[mme.Row], levels: Sequence[str]) -> dict[str, Any]:
    """The score of every level by itself."""
    pairs = list(zip(rows, levels, strict=False))
    return {
        level: mme.score([row for row, at in pairs if at == level])
        for level in dict.fromkeys(levels)
    }


def is_right(row: mme.Row) -> bool:
    """By MME's own parser."""
    return mme.parse_answer(row.prediction or "") == row.answer.lower()


def _write_answers(folder: Path, rows: Sequence[mme.Row], entropy: np.ndarray) -> None:
    """answers.npz: what was said to every question, whether it was right, how uncertain."""
    beside = folder / f".{ANSWERS}.unfinished"
    with beside.open("wb") as file:
        np.savez_compressed(
            file,
            said=np.array([row.prediction or "" for row in rows]),
            right=np.array([is_right(row) for row in rows]),
            entropy=entropy.astype(np.float16),
        )
    beside.replace(folder / ANSWERS)


def alignment(task: Task, model: nn.Module) -> float | None:
    """Mean CKA to the teacher on the visual tokens of fixed images; None for the teacher."""
    from grace.ops.cka import cka_and_counted

    if task.arm.method == "teacher":
        return None
    asked = questions_of(task)
    every = max(1, len(asked.rows) // task.config.cka_images)
    chosen = tuple(range(0, len(asked.rows), every))[: task.config.cka_images]
    args = (task.config, task.root, task.split, task.model_dir("student"), task.device)
    theirs = _teacher_tokens(*args, task.model_dir("teacher"), chosen)
    ours, bounds = _visual_tokens(model, asked.sample(chosen))
    with torch.inference_mode():
        value, counted = cka_and_counted(ours, theirs, bounds)
        return float((value * counted).sum() / counted.sum().clamp_min(1))


@lru_cache(maxsize=1)
def _teacher_tokens(
    config: StudyConfig,
    root: Path,
    split: str,
    processor_dir: Path,
    device: str,
    teacher_dir: Path,
    chosen: tuple[int, ...],
) -> torch.Tensor:
    asked = scored(config, root, split, processor_dir)
    return _visual_tokens(models.load(teacher_dir, device), asked.sample(chosen))[0]


@torch.inference_mode()
def _visual_tokens(model: nn.Module, batch: questions.Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states [T, d] of visual tokens at RCKA's layer, fp32, and where images end."""
    from grace.training.adapters import adapter_for

    adapter, inputs = adapter_for(model), questions.on_device(batch, model)
    visual = adapter.visual_tokens(inputs)
    if visual is None:
        raise ValueError("study: scored images must have visual tokens, got none")
    with adapter.capture(RCKA_LAYER) as states:
        model(**inputs, use_cache=False, logits_to_keep=1)
    return states.rows("layer", visual.index).float(), visual.cu_seqlens


def deploy(task: Task, model: nn.Module) -> nn.Module:
    """Export the model as compressed-tensors and load it as users do: packed, on our kernels."""
    from grace.export import export

    directory = task.folder / "packed"
    export(model, directory, processor=task.processor, overwrite=directory.exists())
    packed = models.load(directory, task.device, _serving_dtype(task))
    check_packed(model, packed)
    return packed


def check_packed(model: nn.Module, packed: nn.Module) -> None:
    """RuntimeError unless every quantized layer of `model` is packed with its codes and scales.

    Answers alone would not tell: at 4 bits 98 % of them are those of the student unquantized.
    """
    from grace.nn import FakeQuantLinear, PackedLinear

    layers = {n: m for n, m in model.named_modules() if isinstance(m, FakeQuantLinear)}
    found = dict(packed.named_modules())
    for name, layer in layers.items():
        other = found.get(name)
        if not isinstance(other, PackedLinear):
            kind = type(other).__name__
            raise RuntimeError(f"study: {name} must load as a packed layer, got {kind}")
        for ours, theirs in zip(layer.quantize(), other.unpack(), strict=True):
            if not torch.equal(ours.float(), theirs.float()):
                raise RuntimeError(
                    f"study: the packed {name} must hold the codes and scales that were trained, "
                    f"got others in {int((ours.float() != theirs.float()).sum())} places"
                )


def _serving_dtype(task: Task) -> torch.dtype:
    # A GPU's kernels take half precision. Logits of models this small lie close together: rounded
    # to bf16, one answer in a hundred changes; to fp16, none did.
    return torch.float32 if task.device == "cpu" else torch.float16


def right(rows: Sequence[mme.Row]) -> dict[str, str]:
    """For every subtask one digit an image, 0 to 2: how many of its questions were right."""
    counts: dict[str, dict[Path, int]] = {}
    for row in rows:
        images = counts.setdefault(row.subtask, {})
        images[row.image] = images.get(row.image, 0) + is_right(row)
    return {subtask: "".join(map(str, images.values())) for subtask, images in counts.items()}


def deployed_bytes(task: Task, model: nn.Module) -> int:
    """Bytes of the weights as served: quantized layers at their bits, scales and the rest in bf16,
    and zero points, where there are any, at the bits of codes."""
    from grace.nn import FakeQuantLinear
    from grace.quantization import decoder_linears

    total, bits = 2 * sum(parameter.numel() for parameter in model.parameters()), task.arm.bits
    layers = [layer for layer in model.modules() if isinstance(layer, FakeQuantLinear)]
    for layer in layers:
        total -= 2 * layer.weight.numel() - _bytes(bits * layer.weight.numel())
    if METHODS[task.arm.method].zero_points:
        for name in decoder_linears(model):
            weight: Any = model.get_submodule(name).weight
            size = task.config.group_size if task.config.group_size > 0 else weight.shape[1]
            groups = weight.numel() // size
            total -= 2 * weight.numel() - _bytes(bits * weight.numel())
            total += 2 * groups + _bytes(bits * groups)
    return total


def _bytes(bits: int) -> int:
    return -(-bits // 8)
