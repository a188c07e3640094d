"""One optimizer step before its forward passes: what the teacher says, and who has which share.

A step is a list of micro-batches, on one rank or many. Averages over a step's tokens and images
need totals that no single micro-batch knows, so they are counted first: `plan` runs the teacher
over every micro-batch and adds up tokens, gates and images over micro-batches and ranks. Gradients
of an accumulated step are then those of one big batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from grace.ops.linear_gated_dkd import whole_head
from grace.training.adapters import Adapter, VisualTokens, adapter_for
from grace.training.config import GraceConfig
from grace.training.objective import Share, gate_sum

IGNORE = -100
# A batch may bring the teacher's rows with it (made once, before training): nothing is run then.
TEACHER_LAST, TEACHER_LAYER = "teacher_last", "teacher_layer"
# What a batch carries beside the inputs of the model.
EXTRA_KEYS = ("labels", "row_ids", "skipped", TEACHER_LAST, TEACHER_LAYER)


@dataclass(frozen=True)
class TeacherRows:
    """The teacher's hidden states: `last` [n, dt] at supervised tokens, `layer` [T, dt] at visual
    ones (None where there is none)."""

    last: Tensor
    layer: Tensor | None


@dataclass(frozen=True)
class MicroBatch:
    """What the loss of one micro-batch is made from, beside the student's own hidden states."""

    index: Tensor  # int64 [n] into B*S: positions whose next token is supervised
    targets: Tensor  # int64 [n]: those next tokens
    visual: VisualTokens | None
    teacher: TeacherRows | None
    share: Share


class Teacher:
    """The frozen model that is distilled: no gradients, never in training mode.

    Args:
        model: a model of the student's kind of tokenizer and image grid, on the right device.
        config: the run's options; they say which terms look at the teacher.
    """

    def __init__(self, model: nn.Module, config: GraceConfig) -> None:
        self.model = model.eval().requires_grad_(False)
        self.adapter = adapter_for(model)
        self.layer = config.rcka_layer
        self.distils = config.distillation != "none"
        self.aligns = config.omega > 0
        self._compared = False
        # What FSDP2 gathers in inference mode it could not gather into again outside of it.
        self.mode = torch.no_grad if config.teacher_fsdp else torch.inference_mode
        self.everywhere = config.world_size > 1

    def __call__(
        self, inputs: Mapping[str, Any], index: Tensor, visual: VisualTokens | None
    ) -> TeacherRows:
        """Hidden states of `inputs` at supervised positions and at visual tokens."""
        vision = self.adapter.vision_always(inputs, self.everywhere)
        with self.mode(), vision, self.adapter.capture(self.layer) as states:
            self.model(**inputs, use_cache=False, logits_to_keep=1)
        # Gathered outside inference mode: ops save the rows for their backward.
        with torch.no_grad():
            last = states.rows("last", index)
            layer = states.rows("layer", visual.index) if self.aligns and visual else None
        return TeacherRows(last, layer)

    def compare(self, batches: Sequence[Mapping[str, Any]], adapter: Adapter) -> None:
        """Require, at the first batch with images, that both models find the same visual tokens.

        Args:
            batches: what both models take.
            adapter: of the student.

        Raises:
            ValueError: another number of tokens or images: a teacher of another family, or with
                another image token.
        """
        for batch in batches:
            if self._compared or TEACHER_LAST in batch:  # the rows that a batch brings are its own
                return
            expected, found = (one.visual_tokens(batch) for one in (adapter, self.adapter))
            if not same_tokens(expected, found):
                raise ValueError(
                    "GraceTrainer: teacher must find the student's visual tokens, "
                    f"{_described(expected)}, got {_described(found)}; its family, image token, "
                    "patch and merge sizes must fit the student's processor"
                )
            self._compared = expected is not None


def plan(
    batches: Sequence[Mapping[str, Any]],
    adapter: Adapter,
    teacher: Teacher | None,
    config: GraceConfig,
    reduce: Callable[[Tensor], Tensor],
) -> list[MicroBatch]:
    """The micro-batches of one optimizer step, each with its share of it.

    Args:
        batches: what the collator made, on the device: inputs of the model and `labels` [B, S].
        adapter: of the student.
        teacher: None where no term needs one.
        config: the run's options.
        reduce: sums a tensor over ranks; called once, on every rank.
    """
    if isinstance(teacher, Teacher):
        teacher.compare(batches, adapter)
    # Finding tokens waits for the device: it comes before the teacher's work is queued there.
    places = [_place(batch, adapter, teacher) for batch in batches]
    drafts: list[_Draft] = [
        (*place, _teacher_rows(batch, teacher, place[0], place[2]))
        for batch, place in zip(batches, places, strict=True)
    ]
    single = len(batches) == 1 and reduce is identity
    counts = torch.stack([_counts(draft, adapter, teacher, config, single) for draft in drafts])
    total = reduce(counts.sum(0)).clamp_min(1e-9)
    shares = [Share(*row) for row in (counts / total).float().unbind(0)]
    return [MicroBatch(*draft, share) for draft, share in zip(drafts, shares, strict=True)]


def identity(counts: Tensor) -> Tensor:
    """The sum over the only rank there is."""
    return counts


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What of a batch goes into the model."""
    return {name: value for name, value in batch.items() if name not in EXTRA_KEYS}


_Place = tuple[Tensor, Tensor, VisualTokens | None]
_Draft = tuple[Tensor, Tensor, VisualTokens | None, TeacherRows | None]


def _place(batch: Mapping[str, Any], adapter: Adapter, teacher: Teacher | None) -> _Place:
    index, targets = supervised(batch["labels"])
    visual = adapter.visual_tokens(batch) if teacher is not None and teacher.aligns else None
    return index, targets, visual


def _teacher_rows(
    batch: Mapping[str, Any], teacher: Teacher | None, index: Tensor, visual: VisualTokens | None
) -> TeacherRows | None:
    if teacher is None:
        return None
    if TEACHER_LAST not in batch:
        return teacher(model_inputs(batch), index, visual)
    rows = TeacherRows(batch[TEACHER_LAST], None if visual is None else batch[TEACHER_LAYER])
    if rows.last.shape[0] != index.numel():
        raise ValueError(
            f"GraceTrainer: {TEACHER_LAST} must have a row for each of {index.numel()} supervised "
            f"tokens, got {rows.last.shape[0]}"
        )
    return rows


def supervised(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Where the next token is supervised, int64 [n] into B*S, and that token, int64 [n]."""
    following = functional.pad(labels[:, 1:], (0, 1), value=IGNORE).reshape(-1)
    index = (following != IGNORE).nonzero().squeeze(1)
    return index, following.index_select(0, index)


def _counts(
    draft: _Draft, adapter: Adapter, teacher: Teacher | None, config: GraceConfig, single: bool
) -> Tensor:
    """Tokens, weight of the distillation term and images of a micro-batch, float64 [3]."""
    index, _, visual, rows = draft
    # Filled on the device: a copy from the host would wait for the teacher's forward.
    tokens = torch.full((), float(index.numel()), device=index.device)
    weight = tokens
    gated = config.distillation == "gdkd" and config.gate
    # One micro-batch is the whole step: its own normalisation by Σ gates is already the step's.
    if gated and not single and teacher is not None and rows is not None:
        head = whole_head(teacher.adapter.head)
        weight = gate_sum(rows.last, head, min(adapter.head.shape[0], head.shape[0]))
    images = torch.zeros_like(tokens) if visual is None else visual.images(config.rcka_min_tokens)
    return torch.stack([tokens.double(), weight.double(), images.double()])


def same_tokens(a: VisualTokens | None, b: VisualTokens | None) -> bool:
    """Whether two models find the same tokens in the same images."""
    if a is None or b is None:
        return a is b
    return torch.equal(a.index, b.index) and torch.equal(a.cu_seqlens, b.cu_seqlens)


def _described(visual: VisualTokens | None) -> str:
    if visual is None:
        return "none"
    return f"{visual.index.numel()} tokens in {visual.cu_seqlens.numel() - 1} images"
