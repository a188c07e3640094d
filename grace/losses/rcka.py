"""Relational CKA: alignment of the visual tokens' hidden states, image by image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from grace.ops._checks import require, require_dims
from grace.ops.cka import cka_and_counted

_OP = "rcka_loss"


def rcka_loss(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    image_mask: Tensor | None,
    video_mask: Tensor | None,
    image_grid_thw: Tensor | None,
    video_grid_thw: Tensor | None,
    merge_size: int,
    min_tokens: int = 4,
) -> Tensor:
    """Mean of 1 − CKA over the images and videos that count (see ``grace.ops.cka``).

    A row (t, h, w) of a grid is one image or one video of t·h·w / merge_size² consecutive visual
    tokens of its mask, in order; a video is one set of tokens, not one a frame. Without a grid
    every contiguous run of a mask is one image, so images that touch are taken for one: give the
    grid. With grids nothing waits for the GPU; finding runs does.

    Args:
        student_hidden: [B, S, ds].
        teacher_hidden: [B, S, dt]; no gradient flows to it. Cast if its dtype is another.
        image_mask: [B, S] bool, True at image tokens; None where there are none.
        video_mask: [B, S] bool, the same of videos.
        image_grid_thw: [images, 3] integers, patches before merging; None for runs of the mask.
        video_grid_thw: [videos, 3], the same of videos.
        merge_size: patches that a token merges, along h and along w.
        min_tokens: images with fewer tokens do not count.

    Returns:
        Scalar float32; exactly 0 where no image counts. Where a grid and its mask differ in their
        number of tokens: NaN on a GPU and under torch.compile, which cannot look.

    Raises:
        ValueError: for that, and for any other shape, dtype or setting.

    Source: GRACE (arXiv 2601.22709), relational centered kernel alignment.
    """
    _check_hidden(student_hidden, teacher_hidden)
    require(merge_size >= 1, _OP, "merge_size", "be at least 1", merge_size)
    kinds = torch.full(student_hidden.shape[:2], 2, device=student_hidden.device)
    sizes, error = [], student_hidden.new_zeros((), dtype=torch.float32)
    visual = (("image", image_mask, image_grid_thw), ("video", video_mask, video_grid_thw))
    for kind, (name, mask, grid) in enumerate(visual):
        if mask is None:
            continue
        _check_mask(f"{name}_mask", mask, student_hidden)
        kinds = kinds.masked_fill(mask, kind)
        sizes.append(_sizes(f"{name}_grid_thw", mask, grid, merge_size))
        error = torch.where(sizes[-1].sum() == mask.sum(), error, torch.nan)
    # Images' tokens first, then videos', each in order; the text behind them is in no image.
    order = kinds.flatten().argsort(stable=True)
    student, teacher = (
        hidden.to(student_hidden.dtype).flatten(0, 1).index_select(0, order)
        for hidden in (student_hidden, teacher_hidden.detach())
    )
    value, counted = cka_and_counted(student, teacher, _bounds(sizes, order), min_tokens=min_tokens)
    return (1 - value).sum() / counted.sum().clamp_min(1) + error


def _check_hidden(student: Tensor, teacher: Tensor) -> None:
    require_dims(_OP, "student_hidden", student, 3)
    require_dims(_OP, "teacher_hidden", teacher, 3)
    if teacher.shape[:2] != student.shape[:2]:
        allowed = f"have batch and length {list(student.shape[:2])}"
        require(False, _OP, "teacher_hidden", allowed, list(teacher.shape[:2]))


def _check_mask(name: str, mask: Tensor, hidden: Tensor) -> None:
    require(mask.dtype == torch.bool, _OP, name, "be bool", mask.dtype)
    if mask.shape != hidden.shape[:2]:
        allowed = f"have shape {list(hidden.shape[:2])}"
        require(False, _OP, name, allowed, list(mask.shape))


def _sizes(name: str, mask: Tensor, grid: Tensor | None, merge_size: int) -> Tensor:
    """Tokens of each image: of its row of the grid, or of its run of the mask."""
    if grid is None:
        return _run_lengths(mask)
    require_dims(_OP, name, grid, 2)
    require(grid.shape[1] == 3, _OP, name, "have 3 columns (t, h, w)", grid.shape[1])
    sizes = grid.prod(1).to(mask.device) // merge_size**2
    if mask.device.type == "cpu" and not torch.compiler.is_compiling():
        total, tokens = int(sizes.sum()), int(mask.sum())
        require(total == tokens, _OP, name, f"add up to the mask's {tokens} tokens", total)
    return sizes


def _run_lengths(mask: Tensor) -> Tensor:
    """Lengths of the contiguous runs of True, row by row; a run ends with its row."""
    before = F.pad(mask[:, :-1], (1, 0))
    after = F.pad(mask[:, 1:], (0, 1))
    starts = (mask & ~before).flatten().nonzero()
    ends = (mask & ~after).flatten().nonzero()
    return (ends - starts).squeeze(1) + 1


def _bounds(sizes: list[Tensor], like: Tensor) -> Tensor:
    """cu_seqlens of the images, from their sizes."""
    lengths = torch.cat([like.new_zeros(1), *sizes])
    return lengths.cumsum(0).to(torch.int32)
