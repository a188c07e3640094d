"""The terms of a micro-batch's loss, from what the student's forward left behind."""

from __future__ import annotations

import torch
from torch import Tensor

from grace.training.adapters import HiddenStates
from grace.training.config import GraceConfig
from grace.training.objective import rcka, token_terms
from grace.training.step import MicroBatch


def loss_terms(config: GraceConfig, states: HiddenStates, micro: MicroBatch) -> dict[str, Tensor]:
    """The terms that are switched on, `ce`, `distillation` and `rcka`, averaged within the
    micro-batch; scalars."""
    terms = _token_terms(config, states, micro)
    aligned = None if micro.teacher is None else micro.teacher.layer
    if micro.visual is not None and aligned is not None:
        # As everything else is multiplied in training: float32 rows would miss tensor cores.
        rows = states.rows("layer", micro.visual.index)
        rows = rows.to(torch.bfloat16) if config.bf16 else rows
        bounds, least = micro.visual.cu_seqlens, config.rcka_min_tokens
        terms["rcka"] = rcka(rows, aligned.to(rows.dtype), bounds, least)
    return terms


def _token_terms(
    config: GraceConfig, states: HiddenStates, micro: MicroBatch, distil: bool = True
) -> dict[str, Tensor]:
    head, teacher_head = states.heads
    teacher = None
    if distil and teacher_head is not None and micro.teacher is not None:
        teacher = micro.teacher.last, teacher_head
    hidden = states.rows("last", micro.index)
    return token_terms(config, hidden, head, micro.targets, teacher)


def drop_nonfinite(
    terms: dict[str, Tensor], config: GraceConfig, states: HiddenStates, micro: MicroBatch
) -> list[str]:
    """Takes terms that are not finite out of `terms`, all but `ce`; returns the names of all.

    A dropped term must leave the graph, not be multiplied by zero: 0 · NaN is NaN in its gradient.
    Cross-entropy shares an op with the gated term, so it is then computed alone.
    """
    names = list(terms)
    finite = torch.stack([terms[name].detach().isfinite() for name in names]).tolist()
    bad = [name for name, good in zip(names, finite, strict=True) if not good]
    for name in bad:
        if name != "ce":
            del terms[name]
    if "distillation" in bad:
        terms.update(_token_terms(config, states, micro, distil=False))
    return bad
