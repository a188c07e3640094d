"""Gated DKD of two causal language models' logits."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from grace.ops._checks import require, require_dims
from grace.ops.gated_dkd import gated_dkd


def gated_dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    temperature: float = 2.0,
    alpha: float = 1.0,
    beta_dkd: float = 4.0,
    ignore_index: int = -100,
    *,
    gate: bool = True,
    in_place: bool = False,
) -> Tensor:
    """Σ g·L / Σ g over the tokens that have a next token to predict (see ``grace.ops.gated_dkd``).

    The logits at a position are for the label at the next one: the shift happens here. Neither
    logits tensor is copied if contiguous; the last position of each sequence is merely ignored.

    Args:
        student_logits: [B, S, Vs].
        teacher_logits: [B, S, Vt]; no gradient flows to it. Cast if its dtype is another.
        labels: [B, S] int64, as given to the model, with ``ignore_index`` where there is none.
        temperature: T of the distillation.
        alpha: weight of the target-class term.
        beta_dkd: weight of the non-target-class term.
        ignore_index: label of tokens that take no part.
        gate: False weighs all tokens equally.
        in_place: the backward may put the gradient where ``student_logits`` are (see there).

    Returns:
        Scalar float32; exactly 0 where no token takes part.

    Raises:
        ValueError: for any other shape, dtype, device or setting.

    Source: GRACE (arXiv 2601.22709).
    """
    op = "gated_dkd_loss"
    require_dims(op, "student_logits", student_logits, 3)
    require_dims(op, "teacher_logits", teacher_logits, 3)
    require_dims(op, "labels", labels, 2)
    for name, shape in (("teacher_logits", teacher_logits.shape[:2]), ("labels", labels.shape)):
        if shape != student_logits.shape[:2]:
            expected = list(student_logits.shape[:2])
            require(False, op, name, f"have batch and length {expected}", list(shape))
    # Shifting the labels and not the logits spares a copy of both; the slice is for S = 0.
    next_labels = F.pad(labels[:, 1:], (0, 1), value=ignore_index)[:, : labels.shape[1]]
    return gated_dkd(
        student_logits.flatten(0, 1),
        teacher_logits.to(student_logits.dtype).flatten(0, 1),
        next_labels.flatten(),
        temperature=temperature,
        alpha=alpha,
        beta=beta_dkd,
        ignore_index=ignore_index,
        gate=gate,
        in_place=in_place,
    )
