"""The terms of the loss, from hidden states: no term holds logits of more than a chunk, unless
`keep_logits` asks for it.

    L = CE + β · distillation + ω · RCKA

Each term is an average within one micro-batch; `Share` says what part of the optimizer step's own
average that is, so that the sum over micro-batches is the loss of one big batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from grace.training.config import GraceConfig

# Logits of one chunk, 256 MiB in fp32. Every chunk adds to the gradient of the whole head, so few.
CHUNK_LOGITS = 2**26


@dataclass(frozen=True)
class Share:
    """What part of an optimizer step one micro-batch is; tensors [] of fp32.

    A term that averages over the step's tokens (or images) is the sum over micro-batches of the
    micro-batch's own average times its share.
    """

    tokens: Tensor
    distillation: Tensor
    images: Tensor


def _chunks(rows: int, vocabulary: int) -> Iterator[slice]:
    size = max(1, CHUNK_LOGITS // vocabulary)
    # Without rows there still is a chunk, an empty one: the loss then has its place in the graph.
    return (slice(start, start + size) for start in range(0, max(1, rows), size))


def _sum_over_chunks(term: Callable[..., Tensor], vocabulary: int, rows: list[Tensor]) -> Tensor:
    """Sum of `term` over chunks of rows; the logits inside are made anew in the backward."""
    total = rows[0].new_zeros((), dtype=torch.float32)
    for part in _chunks(rows[0].shape[0], vocabulary):
        total = total + checkpoint(term, *[row[part] for row in rows], use_reentrant=False)
    return total


def linear_cross_entropy(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of hidden [n, d] @ head[V, d]ᵀ against labels int64 [n]; 0 where n = 0."""

    def term(hidden: Tensor, labels: Tensor) -> Tensor:
        logits = functional.linear(hidden, head).float()
        return functional.cross_entropy(logits, labels, reduction="sum")

    return _sum_over_chunks(term, head.shape[0], [hidden, labels]) / max(1, labels.numel())


def linear_kd(
    student: Tensor,
    student_head: Tensor,
    teacher: Tensor,
    teacher_head: Tensor,
    temperature: float,
) -> Tensor:
    """Plain distillation: mean over tokens of T² · KL(teacher_T ‖ student_T) over the vocabulary.

    Args:
        student, teacher: hidden states [n, ds] and [n, dt].
        student_head, teacher_head: [Vs, ds] and [Vt, dt]; the shared prefix min(Vs, Vt) counts.
    """
    shared = min(student_head.shape[0], teacher_head.shape[0])

    def term(student: Tensor, teacher: Tensor) -> Tensor:
        student_log = _log_probabilities(student, student_head[:shared], temperature)
        teacher_log = _log_probabilities(teacher, teacher_head[:shared], temperature)
        return functional.kl_div(student_log, teacher_log, reduction="sum", log_target=True)

    total = _sum_over_chunks(term, shared, [student, teacher])
    return temperature**2 * total / max(1, student.shape[0])


def _log_probabilities(hidden: Tensor, head: Tensor, temperature: float) -> Tensor:
    return (functional.linear(hidden, head).float() / temperature).log_softmax(-1)


def token_terms(
    config: GraceConfig,
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    teacher: tuple[Tensor, Tensor] | None,
) -> dict[str, Tensor]:
    """Cross-entropy `ce` and, with a teacher, `distillation`; averages over the n tokens.

    Args:
        config: says which distillation, its temperature, weights and gate, and `keep_logits`.
        hidden: the student's last hidden states [n, ds] at supervised positions; they and
            everything below are cast to `config.loss_dtype` here.
        head: the student's head [Vs, ds].
        targets: int64 [n], the tokens to predict.
        teacher: its hidden states [n, dt] and head [Vt, dt]; None: no distillation.
    """
    hidden = hidden.to(config.loss_dtype or hidden.dtype)
    head = head.to(hidden.dtype)
    if teacher is None or config.distillation == "none":
        return {"ce": linear_cross_entropy(hidden, head, targets)}
    rows, teacher_head = (tensor.to(hidden.dtype) for tensor in teacher)
    if config.distillation == "kd":
        kd = linear_kd(hidden, head, rows, teacher_head, config.temperature)
        return {"ce": linear_cross_entropy(hidden, head, targets), "distillation": kd}
    from grace.ops import linear_gated_dkd

    ce, gdkd = linear_gated_dkd(
        hidden,
        head,
        rows,
        teacher_head,
        targets,
        temperature=config.temperature,
        alpha=config.alpha,
        beta=config.beta_dkd,
        gate=config.gate,
        keep_logits=config.keep_logits,
        chunk_size=config.chunk_size,
    )
    return {"ce": ce, "distillation": gdkd}


@torch.no_grad()
def gate_sum(hidden: Tensor, head: Tensor, vocabulary: int) -> Tensor:
    """Σ over tokens of the gate exp(-H/log V), H the teacher's entropy over `vocabulary` words.

    hidden [n, d], head [Vt, d] -> fp32 []. Source: GRACE's confidence gate, as in
    `grace.ops.gated_dkd`; needed by itself because the loss of a step of several micro-batches
    divides by the gates of all of them.
    """
    from grace.ops.gated_dkd import gated_dkd_rows

    total = torch.zeros((), device=hidden.device)
    for part in _chunks(hidden.shape[0], vocabulary):
        logits = functional.linear(hidden[part], head[:vocabulary])
        labels = torch.zeros(logits.shape[0], dtype=torch.int64, device=logits.device)
        # In one pass, by the kernel that makes the loss's own gates; the loss here is of no use.
        total += gated_dkd_rows(logits, logits, labels)[1].sum()
    return total


def rcka(student: Tensor, teacher: Tensor, cu_seqlens: Tensor, min_tokens: int) -> Tensor:
    """Mean over images that count of 1 - CKA, for visual tokens [T, ds] and [T, dt].

    Images with fewer than `min_tokens` tokens and degenerate ones do not count; 0 where none does.
    """
    from grace.ops.cka import cka_and_counted

    value, counted = cka_and_counted(student, teacher, cu_seqlens, min_tokens=min_tokens)
    return (1 - value).sum() / counted.sum().clamp_min(1)
