"""How the tiny models learn: alignment, drills, questions, each on images drawn anew every step.

1. alignment: vision tower, projector and word embeddings alone; each visual token predicts the
   words of what its cell shows, and through a throw-away head its row and column;
2. drills: the whole model, one word of fact behind each word asked (`grace.evaluation.lessons`);
3. questions: yes/no and open-ended ones of all subtasks, packed. Answers are wanted early for the
   first steps, then only where they belong. The learning rate stays until every subtask passes
   the threshold on the validation split, or the steps are used up; then it falls to zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from . import drawing, lessons
from .packed_questions import IGNORE
from .scenes import compose_in
from .tiny import Size
from .topics import SUBTASKS

Report = Callable[[str], None]
REPORT_EVERY = 200  # steps


@dataclass(frozen=True)
class Recipe:
    """How one model is trained.

    `threshold` is the validation accuracy that each subtask must pass before the cooldown begins;
    `steps` bounds the question stage before it, of which the first `early` want answers early;
    both are looked at every `REPORT_EVERY` steps.
    """

    size: Size
    threshold: float
    drill: int
    early: int
    steps: int
    cooldown: int
    align: int = 120
    images: int = 32
    questions: int = 6
    lr: float = 3e-3
    warmup: int = 100


def train(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    recipe: Recipe,
    rng: Random,
    report: Report,
) -> tuple[dict[str, int], dict[str, float]]:
    """All stages; returns the steps of each and the last validation accuracies."""
    model.train()
    align(model, recipe, rng)
    drill(model, recipe, rng, report)
    steps, validation = learn(model, processor, recipe, rng, report)
    return {"align": recipe.align, "drill": recipe.drill, "questions": steps}, validation


def align(model: LlavaForConditionalGeneration, recipe: Recipe, rng: Random) -> None:
    """Stage 1: visual tokens point at the embeddings of the words for what they show."""
    embeddings: Any = model.get_input_embeddings()
    width = embeddings.weight.shape[1]
    probe = nn.Linear(width, 2 * drawing.GRID).to(model.device)
    nn.init.zeros_(probe.weight)  # and so the same for every run of a seed
    nn.init.zeros_(probe.bias)
    modules = (model.model.vision_tower, model.model.multi_modal_projector, embeddings, probe)
    optimizer = _adamw([p for module in modules for p in module.parameters()], recipe)
    places = torch.arange(drawing.CELLS, device=model.device)
    rows, columns = places // drawing.GRID, drawing.GRID + places % drawing.GRID
    for step in range(recipe.align):
        optimizer.param_groups[0]["lr"] = recipe.lr * (1 - step / recipe.align)
        scenes = [compose_in("train", rng)[0] for _ in range(2 * recipe.images)]
        features = model.model.get_image_features(
            pixel_values=lessons.pixel_values(scenes, rng).to(model.device),
            vision_feature_layer=model.config.vision_feature_layer,
            vision_feature_select_strategy=model.config.vision_feature_select_strategy,
        ).pooler_output
        tokens = torch.stack(list(features))  # [n, 16, width]
        words = (tokens @ embeddings.weight.T / width**0.5).log_softmax(-1)
        where = probe(tokens).unflatten(-1, (2, drawing.GRID)).log_softmax(-1).flatten(-2)
        shown = words.gather(-1, lessons.words_of(scenes).to(model.device)).mean()
        loss = -shown - (where[:, places, rows] + where[:, places, columns]).mean()
        _update(model, optimizer, loss)


def drill(
    model: LlavaForConditionalGeneration, recipe: Recipe, rng: Random, report: Report
) -> None:
    """Stage 2."""
    optimizer = _adamw(list(model.parameters()), recipe)
    for step in range(recipe.drill):
        optimizer.param_groups[0]["lr"] = recipe.lr * min(1.0, (step + 1) / recipe.warmup)
        loss = model(**_to(lessons.drill_batch(recipe.images, rng), model)).loss
        _update(model, optimizer, loss)
        if (step + 1) % REPORT_EVERY == 0:
            report(f"drills {step + 1}: loss {loss.item():.4f}")


def learn(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    recipe: Recipe,
    rng: Random,
    report: Report,
) -> tuple[int, dict[str, float]]:
    """Stage 3; returns its steps and the last validation accuracies."""
    optimizer = _adamw(list(model.parameters()), recipe)
    step, end = 0, None
    accuracy: dict[str, float] = {}
    while end is None or step < end:
        early = end is None and step < recipe.early
        batch, _ = lessons.question_batch(
            processor, "train", recipe.images, recipe.questions, rng, early=early
        )
        left = 1.0 if end is None else (end - step) / recipe.cooldown
        optimizer.param_groups[0]["lr"] = recipe.lr * left * min(1.0, (step + 1) / recipe.warmup)
        loss = model(**_to(batch, model)).loss
        _update(model, optimizer, loss)
        step += 1
        if step % REPORT_EVERY == 0 or step == end:
            accuracy = validate(model, processor)
            report(f"questions {step}: loss {loss.item():.4f}, {_line(accuracy)}")
            passed = min(accuracy.values()) >= recipe.threshold
            if end is None and (passed or step >= recipe.steps):
                end = step + recipe.cooldown
    return step, accuracy


@torch.no_grad()
def validate(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, images: int = 128
) -> dict[str, float]:
    """Accuracy of the yes/no answers on the validation split, by subtask, packed."""
    rng = Random("validation")
    right: dict[str, list[bool]] = {subtask: [] for subtask in SUBTASKS}
    model.eval()
    for _ in range(images // 16):
        batch, asked = lessons.question_batch(processor, "validation", 16, 18, rng)
        said = model(**_to(batch, model)).logits.argmax(-1).cpu()
        for row, questions in enumerate(asked):
            hits = _first_words(said[row], batch["labels"][row])
            for question, hit in zip(questions, hits, strict=True):
                if question.answer in ("Yes", "No"):
                    right[question.subtask].append(hit)
    model.train()
    return {subtask: sum(hits) / len(hits) for subtask, hits in right.items()}


def _first_words(said: Tensor, labels: Tensor) -> list[bool]:
    """Whether the first token of each answer in a packed row is right."""
    first = (labels[1:] != IGNORE) & (labels[:-1] == IGNORE)
    return (said[:-1] == labels[1:])[first].tolist()


def _adamw(parameters: list[nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        parameters, lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )


def _update(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _to(batch: dict[str, Tensor], model: LlavaForConditionalGeneration) -> dict[str, Any]:
    return {name: value.to(model.device) for name, value in batch.items()}


def _line(accuracy: dict[str, float]) -> str:
    return " ".join(f"{subtask} {value:.3f}" for subtask, value in accuracy.items())
