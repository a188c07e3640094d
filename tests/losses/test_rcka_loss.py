"""rcka_loss: the published numbers, how masks and grids name images, what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import DATA
from oracle import to_double
from torch import Tensor

from grace.losses import rcka_loss
from grace.ops import cka


def mask_of(*rows: str) -> Tensor:
    """A mask drawn as text: ``#`` is a visual token."""
    return torch.tensor([[c == "#" for c in row] for row in rows])


def make_case(images: Tensor, videos: Tensor | None = None, **options: Any) -> dict[str, Any]:
    student = torch.randn(*images.shape, 6)
    teacher = torch.randn(*images.shape, 9) + student.sum(2, keepdim=True)
    case = {
        "student_hidden": student,
        "teacher_hidden": teacher,
        "image_mask": images,
        "video_mask": videos,
        "image_grid_thw": None,
        "video_grid_thw": None,
        "merge_size": 2,
    }
    return case | options


def alignment(case: dict[str, Any], *runs: tuple[int, int, int], min_tokens: int = 4) -> Tensor:
    """1 − CKA of the tokens from ``start`` to ``end`` of a row of the batch."""
    losses = []
    for row, start, end in runs:
        rows = (case[name][row, start:end] for name in ("student_hidden", "teacher_hidden"))
        cu_seqlens = torch.tensor([0, end - start], dtype=torch.int32)
        losses.append(1 - cka(*rows, cu_seqlens, min_tokens=min_tokens))
    return torch.cat(losses)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("with_grid", [True, False])
def test_matches_published_numbers(with_grid, dtype):
    golden = {name: torch.from_numpy(value) for name, value in np.load(DATA / "rcka.npz").items()}
    student = golden["student_hidden"].to(dtype).requires_grad_()
    teacher = golden["teacher_hidden"].to(dtype)
    grid = golden["image_grid_thw"] if with_grid else None
    merge_size = int(golden["merge_size"])
    loss = rcka_loss(student, teacher, golden["image_mask"], None, grid, None, merge_size)
    loss.backward()
    assert loss.item() == pytest.approx(golden["loss"].item(), rel=1e-6)
    torch.testing.assert_close(student.grad, golden["grad"].to(dtype), rtol=1e-4, atol=1e-8)


def test_grid_separates_images_that_touch():
    case = make_case(
        mask_of("..##########..", "#####........."),
        image_grid_thw=torch.tensor([[1, 4, 4], [1, 4, 6], [1, 2, 10]]),
    )
    expected = alignment(case, (0, 2, 6), (0, 6, 12), (1, 0, 5)).mean()
    torch.testing.assert_close(rcka_loss(**case), expected)


def test_runs_without_a_grid():
    case = make_case(mask_of("..#####...####", "########..####", "####.........."))
    runs = ((0, 2, 7), (0, 10, 14), (1, 0, 8), (1, 10, 14), (2, 0, 4))  # none goes on in a next row
    torch.testing.assert_close(rcka_loss(**case), alignment(case, *runs).mean())


def test_image_may_go_on_in_several_runs():
    # Tokens of one image or video with separators between, as rows or frames have them.
    case = make_case(mask_of(".##.##.##."), image_grid_thw=torch.tensor([[1, 4, 6]]))
    kept = case["image_mask"][0]
    rows = (case[name][0, kept] for name in ("student_hidden", "teacher_hidden"))
    expected = 1 - cka(*rows, torch.tensor([0, 6], dtype=torch.int32))
    torch.testing.assert_close(rcka_loss(**case), expected[0])


def test_videos_count_like_images():
    case = make_case(
        mask_of("..####........", "......#####..."),
        mask_of("......######..", "####.........."),
        image_grid_thw=torch.tensor([[1, 4, 4], [1, 2, 10]]),
        video_grid_thw=torch.tensor([[3, 2, 4], [2, 2, 4]]),
    )
    expected = alignment(case, (0, 2, 6), (1, 6, 11), (0, 6, 12), (1, 0, 4)).mean()
    torch.testing.assert_close(rcka_loss(**case), expected)
    case |= {"image_mask": None, "image_grid_thw": None}
    expected = alignment(case, (0, 6, 12), (1, 0, 4)).mean()
    torch.testing.assert_close(rcka_loss(**case), expected)


@pytest.mark.parametrize("min_tokens", [3, 4])
def test_mean_is_over_images_that_count(min_tokens):
    case = make_case(mask_of("###.#####.######"))
    case["student_hidden"][0, 10:] = 1.0  # a degenerate Gram
    runs = [(0, 0, 3), (0, 4, 9)][min_tokens - 3 :]
    expected = alignment(case, *runs, min_tokens=min_tokens).mean()
    torch.testing.assert_close(rcka_loss(**case, min_tokens=min_tokens), expected)


@pytest.mark.parametrize("images", [None, mask_of("........"), mask_of("###..##.")])
def test_no_image_that_counts(images):
    case = make_case(mask_of("........")) | {"image_mask": images}
    case["student_hidden"].requires_grad_()
    loss = rcka_loss(**case)
    loss.backward()
    assert loss.item() == 0.0
    assert case["student_hidden"].grad.eq(0).all()


def test_text_and_teacher_get_no_gradient():
    case = make_case(mask_of("..#####...####"))
    for name in ("student_hidden", "teacher_hidden"):
        case[name].requires_grad_()
    rcka_loss(**case).backward()
    grad = case["student_hidden"].grad
    assert grad.any(2).tolist() == case["image_mask"].tolist()
    assert case["teacher_hidden"].grad is None


def test_gradient_by_finite_differences():
    case = make_case(mask_of("..#####...", "####..####"))
    student, teacher = to_double(case.pop("student_hidden"), case.pop("teacher_hidden"))
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: rcka_loss(x, teacher, **case), (student,))


def test_teacher_of_another_dtype():
    case = make_case(mask_of("..#####..."))
    case["teacher_hidden"] = case["teacher_hidden"].bfloat16()
    expected = rcka_loss(**case | {"teacher_hidden": case["teacher_hidden"].float()})
    torch.testing.assert_close(rcka_loss(**case), expected)


def test_compiles_once_for_any_length_and_sees_a_wrong_grid():
    compiled = torch.compile(rcka_loss, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for text in ("..####.", "######....", "..#####...##"):
            mask = mask_of(text, text)
            grid = torch.tensor([[1, 2, 2 * int(mask[0].sum())]] * 2)
            case = make_case(mask, image_grid_thw=grid)
            torch.testing.assert_close(compiled(**case), rcka_loss(**case))
        assert compiled(**case | {"image_grid_thw": grid // 2}).isnan()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student_hidden": torch.zeros(10, 6)}, r"student_hidden must have 3 dimensions"),
        (
            {"teacher_hidden": torch.zeros(1, 9, 9)},
            r"teacher_hidden must have batch and length \[1",
        ),
        ({"image_mask": torch.zeros(1, 10)}, r"image_mask must be bool, got torch.float32"),
        ({"video_mask": mask_of("..##")}, r"video_mask must have shape \[1, 10\], got \[1, 4\]"),
        ({"image_grid_thw": torch.ones(1, 2).long()}, r"image_grid_thw must have 3 columns"),
        (
            {"image_grid_thw": torch.tensor([[1, 4, 6]])},
            r"image_grid_thw must add up to the mask's 5 tokens, got 6",
        ),
        ({"merge_size": 0}, r"merge_size must be at least 1, got 0"),
        ({"min_tokens": 0}, r"min_tokens must be at least 1, got 0"),
    ],
)
def test_bad_arguments(changes, message):
    case = make_case(mask_of("..#####...")) | changes
    with pytest.raises(ValueError, match=message):
        rcka_loss(**case)
