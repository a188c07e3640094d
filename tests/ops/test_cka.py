"""cka: kernels and reference against float64; the definition, the properties, images left out."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from conftest import Kernels
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_accurate, to_double
from torch import Tensor
from windows import assert_margins_untouched, windowed

from grace.ops import cka
from grace.ops.cka import COUNTED, cka_and_counted, reference, reference_backward

HALF_DTYPES = [torch.bfloat16, torch.float16]
KERNEL_DTYPES = [torch.float32, *HALF_DTYPES]
# Around the kernels' tiles of 64 and 128 rows, with images that are empty or too small.
LENGTHS = [[5], [64], [65, 4], [7, 0, 3, 130], [1, 128, 2, 0], [40, 40, 40]]

Case = tuple[Tensor, Tensor, Tensor]


def bounds(lengths: list[int], start: int = 0) -> Tensor:
    return torch.tensor([start, *lengths]).cumsum(0).to(torch.int32)


def make_case(
    lengths: list[int],
    ds: int = 20,
    dt: int = 33,
    dtype: torch.dtype = torch.float32,
    offset: float = 1.0,
) -> Case:
    """Hidden states that share part of what they say, with a common offset as real ones have."""
    n = sum(lengths)
    common = torch.randn(n, 6)
    student = common @ torch.randn(6, ds) + torch.randn(n, ds) + offset * torch.randn(ds)
    teacher = common @ torch.randn(6, dt) + torch.randn(n, dt) + offset * torch.randn(dt)
    return student.to(dtype), teacher.to(dtype), bounds(lengths)


def gradient(student: Tensor, teacher: Tensor, cu_seqlens: Tensor, **options: int) -> Tensor:
    student = student.detach().clone().requires_grad_()
    cka(student, teacher, cu_seqlens, **options).sum().backward()
    assert student.grad is not None
    return student.grad


def backward_arguments(grad: Tensor, case: Case, outputs: tuple[Tensor, ...]) -> tuple[object, ...]:
    """Of ``cka_backward``, from what the forward returned."""
    student, teacher, cu_seqlens = case
    return grad, student, cu_seqlens, *outputs[1:], teacher.shape[1]


def run(kernels: Kernels, case: Case, min_tokens: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """(value, saved, gradient of the values' sum) by the kernels, on their device."""
    case = tuple(kernels.put(*case))
    outputs = kernels.cka(*case, min_tokens)
    grad = torch.ones_like(outputs[0])
    return *outputs[:2], kernels.cka_backward(*backward_arguments(grad, case, outputs))


def as_written(student: Tensor, teacher: Tensor) -> Tensor:
    """CKA of one image, from the definition with n×n Grams and the centering matrix."""
    n = len(student)
    center = torch.eye(n, dtype=student.dtype) - 1 / n
    unit = [torch.nn.functional.normalize(x, dim=1) for x in (student, teacher)]
    k, l = (center @ (x @ x.t()) @ center for x in unit)  # noqa: E741 (the usual letters)
    return (k * l).sum() / ((k * k).sum() * (l * l).sum()).sqrt()


@pytest.mark.parametrize(("ds", "dt"), [(3, 5), (50, 40)])  # feature form, Gram form
def test_reference_is_the_definition(ds, dt):
    student, teacher, cu_seqlens = to_double(*make_case([8, 20, 11], ds, dt))
    value = cka(student, teacher, cu_seqlens)
    for image, rows in enumerate(torch.arange(39).split([8, 20, 11])):
        torch.testing.assert_close(value[image], as_written(student[rows], teacher[rows]))


def assert_runs_accurately(kernels: Kernels, case: Case) -> None:
    """Forward, and backward from what the reference keeps, against float64."""
    exact, working = reference(*to_double(*case), 4), reference(*case, 4)
    actual = kernels.cka(*kernels.put(*case), 4)
    # A value is a quotient of three sums, each rounded by itself, and of one or two of them the
    # reference's own error says little: it may happen to be none. Tensor cores, which 16-bit inputs
    # go to, add without rounding to nearest.
    of_sums = 4 if case[0].dtype == torch.float32 else 32
    ulps = {"value": of_sums, "saved": of_sums, "stats": 4, "means": 4}
    ulps |= {"student_rows": 1, "teacher_rows": 1}
    for (name, noise), *values in zip(ulps.items(), actual, exact, working, strict=True):
        assert_accurate(*values, name=name, ulps=noise)
    grad = torch.randn(len(case[2]) - 1)
    arguments = backward_arguments(grad, case, working)
    exact_arguments = backward_arguments(grad.double(), to_double(*case), exact)
    assert_accurate(
        kernels.cka_backward(*kernels.put(*arguments)),
        reference_backward(*exact_arguments),
        reference_backward(*arguments),
        name="grad_student",
        ulps=4,  # sums over an image in another order
    )


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_kernel_is_accurate(kernels: Kernels, lengths, dtype):
    assert_runs_accurately(kernels, make_case(lengths, dtype=dtype))


# Lengths, ds, dt. The emulated kernels hold less in memory than the real ones, so that these sizes
# reach what only large ones do on a GPU.
FORMS = {
    "all forms together": ([1, 4, 37, 150, 300, 0, 520], 130, 200),
    "few pairs, which share their depth": ([300], 330, 140),
    "many pairs, a block each": ([2, 5] * 20 + [260], 90, 200),
    "features alone": ([300], 130, 20),
    "two images by their features": ([70, 3, 65], 40, 24),
    "one wide, one narrow": ([40, 30], 8, 400),
    "widths of 1 and 2": ([5, 66], 1, 2),
}


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize(("lengths", "ds", "dt"), FORMS.values(), ids=FORMS)
def test_every_way_is_accurate(kernels: Kernels, lengths, ds, dt, dtype):
    assert_runs_accurately(kernels, make_case(lengths, ds, dt, dtype))


def assert_within_stated_error(kernels: Kernels, case: Case) -> None:
    """Of what sums in tensor cores cost, which do not round to nearest. Each image's gradient is
    scaled to where its dtype has all its digits."""
    case = tuple(kernels.put(*case))
    exact = reference(*to_double(*case), 4)
    outputs = kernels.cka(*case, 4)
    torch.testing.assert_close(outputs[0].double(), exact[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(outputs[1].double(), exact[1], rtol=3e-4, atol=0)
    images = [slice(*pair) for pair in pairwise(case[2].tolist())]
    ones = torch.ones_like(exact[0])
    exact_grad = reference_backward(*backward_arguments(ones, to_double(*case), exact))
    largest = torch.stack([exact_grad[rows].abs().amax() for rows in images])
    scale = torch.where(largest > 0, 2.0 ** -largest.log2().floor(), 1.0)
    grad = kernels.cka_backward(*backward_arguments(scale.float(), case, outputs))
    for rows, factor in zip(images, scale, strict=True):
        expected = exact_grad[rows] * factor
        error = (grad[rows].double() - expected).norm()
        assert error <= torch.finfo(grad.dtype).eps * expected.norm()


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_error_is_as_stated(kernels: Kernels, dtype):
    if not kernels.cuda_kernels:
        pytest.skip("of the CUDA kernels")
    assert_within_stated_error(kernels, make_case([1, 4, 37, 300], 60, 70, dtype))


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize(
    ("lengths", "ds", "dt"),
    [
        ([1, 4, 37, 576, 4096, 16384], 256, 384),
        ([576], 4096, 5120),
        ([576] * 8, 512, 1024),
        ([4096, 576, 1024], 2048, 4096),
        ([6100, 9000, 6200], 2048, 4096),
    ],
    ids=str,
)
def test_real_sizes_are_accurate(lengths, ds, dt, dtype):
    """The truth is computed on the GPU too, in float64."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    kernels = Kernels("grace", "cuda")
    assert_within_stated_error(kernels, make_case(lengths, ds, dt, dtype))


@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("offset", [30.0, 300.0])
def test_large_common_mean(kernels: Kernels, offset, dtype):
    """Rows whose cosines are 0.999 and more: centered before they are rounded, nothing is lost."""
    case = make_case([37, 70, 200], 80, 48, dtype, offset)
    assert_runs_accurately(kernels, case)
    value = run(kernels, case)[0].cpu().double()
    torch.testing.assert_close(value, reference(*to_double(*case), 4)[0], rtol=0, atol=3e-5)


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_huge_and_tiny_norms(kernels: Kernels, dtype):
    """Norms of rows from far below 1 to near float16's end, whose squares are far beyond it."""
    student, teacher, cu_seqlens = make_case([37, 120], 80, 48)
    largest = {torch.float16: 4.0, torch.bfloat16: 12.0}[dtype]
    case = tuple(
        (x / x.abs().amax(1, keepdim=True) * 10 ** (torch.rand(157, 1) * 2 * largest - largest))
        .mul(6)
        .to(dtype)
        for x in (student, teacher)
    )
    assert all(x.isfinite().all() for x in case)
    outputs = kernels.cka(*kernels.put(*case, cu_seqlens), 4)
    exact = reference(*to_double(*case), cu_seqlens, 4)
    torch.testing.assert_close(outputs[0].cpu().double(), exact[0], rtol=0, atol=3e-5)
    # What a row contributes does not depend on its norm, but for the gradient's division by it.
    grad = run(kernels, (*case, cu_seqlens))[2].cpu().double()
    ones = torch.ones(2, dtype=torch.float64)
    double_case = (*to_double(*case), cu_seqlens)
    exact_grad = reference_backward(*backward_arguments(ones, double_case, exact))
    norms = case[0].double().norm(dim=1, keepdim=True)
    kept = exact_grad.abs().amax(1) > 100 * torch.finfo(dtype).tiny  # others round to few digits
    error = ((grad - exact_grad) * norms)[kept].abs().max()
    assert error <= 4 * torch.finfo(dtype).eps * (exact_grad * norms)[kept].abs().max()


@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("lengths", [[60, 9], [150]], ids=str)
def test_kernel_is_invariant(kernels: Kernels, lengths, dtype):
    """To rotations and scales that are exact in every dtype."""
    student, teacher, cu_seqlens = make_case(lengths, 40, 33, dtype)
    value = run(kernels, (student, teacher, cu_seqlens))[0]
    signs = torch.randint(0, 2, (40,)) * 2 - 1
    rotated = student[:, torch.randperm(40)] * signs
    scaled = student * 2.0 ** torch.randint(-3, 4, (len(student), 1))
    for other in (rotated, scaled.to(dtype)):
        actual = run(kernels, (other, teacher, cu_seqlens))[0]
        torch.testing.assert_close(actual, value, rtol=0, atol=2e-6)
    swapped = run(kernels, (teacher, student, cu_seqlens))[0]
    torch.testing.assert_close(swapped, value, rtol=0, atol=2e-6)


@pytest.mark.parametrize("ds", [3, 9])
def test_gradient_by_finite_differences(ds):
    student, teacher, cu_seqlens = to_double(*make_case([5, 1, 6], ds, 4))
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: cka(x, teacher, cu_seqlens), (student,))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_of_itself_is_one(kernels: Kernels, dtype):
    student, _, cu_seqlens = make_case([30, 70], dtype=dtype)
    value, _, grad = run(kernels, (student, student, cu_seqlens))
    torch.testing.assert_close(value.cpu(), torch.ones(2), rtol=0, atol=1e-6)
    assert grad.abs().max() < 1e-5


def test_rotation_and_scale_change_nothing():
    student, teacher, cu_seqlens = to_double(*make_case([12, 9], 7, 7))
    rotation = torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64))[0]
    scales = torch.rand(21, 1, dtype=torch.float64) + 0.1
    value = cka(student, teacher, cu_seqlens)
    for other in (student @ rotation, student * scales, student * 1e3):
        torch.testing.assert_close(cka(other, teacher, cu_seqlens), value)
    torch.testing.assert_close(cka(teacher, student, cu_seqlens), value)
    assert ((value > 0) & (value < 1)).all()


def test_images_do_not_touch_each_other():
    student, teacher, cu_seqlens = make_case([12, 70, 9])
    together = cka(student, teacher, cu_seqlens)
    for image, (a, b) in enumerate([(0, 12), (12, 82), (82, 91)]):
        alone = cka(student[a:b], teacher[a:b], bounds([b - a]))
        torch.testing.assert_close(together[image : image + 1], alone)


def degenerate_case(kind: str) -> Case:
    student, teacher, cu_seqlens = make_case([10, 8])
    broken = teacher if kind.startswith("teacher") else student
    if kind.endswith("equal"):
        broken[:10] = broken[0].clone()
    elif kind.endswith("parallel"):  # small integers, so that it stays so in every dtype
        broken[:10] = torch.arange(1, 11)[:, None] * broken[0].round()
    else:
        broken[:10] = 0.0
    return student, teacher, cu_seqlens


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("how", ["equal", "parallel", "zero"])
def test_degenerate_image_counts_as_nothing(kernels: Kernels, how, side, dtype):
    student, teacher, cu_seqlens = degenerate_case(f"{side} {how}")
    case = (student.to(dtype), teacher.to(dtype), cu_seqlens)
    value, saved, grad = run(kernels, case)
    assert value[0].item() == 1.0
    assert saved[:, COUNTED].tolist() == [0, 1]
    assert grad[:10].eq(0).all()
    assert grad[10:].any()


@pytest.mark.parametrize("min_tokens", [1, 4, 8, 9])
def test_small_image_counts_as_nothing(kernels: Kernels, min_tokens):
    case = make_case([8, 3, 12])
    value, saved, grad = run(kernels, case, min_tokens)
    expected = [n >= min_tokens for n in (8, 3, 12)]
    assert saved[:, COUNTED].bool().tolist() == expected
    assert (value == 1).tolist() == [not counted for counted in expected]
    counted = cka_and_counted(*case, min_tokens=min_tokens)[1]
    assert counted.tolist() == expected
    assert [x.any().item() for x in grad.split([8, 3, 12])] == expected


def test_one_row_counts_as_nothing():
    case = make_case([1, 6])
    assert cka_and_counted(*case, min_tokens=1)[1].tolist() == [False, True]


def test_row_of_zeros_gets_no_gradient(kernels: Kernels):
    student, teacher, cu_seqlens = make_case([10])
    student[3] = 0.0
    teacher[5] = 0.0
    value, _, grad = run(kernels, (student, teacher, cu_seqlens))
    assert value.isfinite().all()
    assert grad.isfinite().all()
    assert grad.any(1).tolist() == [i != 3 for i in range(10)]
    torch.testing.assert_close(value.cpu(), reference(student, teacher, cu_seqlens, 4)[0])


def test_not_a_number_is_seen(kernels: Kernels):
    student, teacher, cu_seqlens = make_case([10, 8, 3])
    student[4, 2] = math.nan
    student[19] = math.nan  # in the image that is too small to count
    value, _, _ = run(kernels, (student, teacher, cu_seqlens))
    assert value.isnan().tolist() == [True, False, False]
    assert value[2].item() == 1.0


def test_rows_outside_the_images(kernels: Kernels):
    student, teacher, _ = make_case([3, 10, 70, 5])
    inside = slice(3, 83)
    cu_seqlens = bounds([10, 70], start=3)
    student[:3] = teacher[83:] = math.nan
    value, _, grad = run(kernels, (student, teacher, cu_seqlens))
    part = (student[inside], teacher[inside], bounds([10, 70]))
    torch.testing.assert_close(value.cpu(), cka(*part))
    torch.testing.assert_close(grad[inside].cpu(), gradient(*part))
    assert grad[:3].eq(0).all()
    assert grad[83:].eq(0).all()


@pytest.mark.parametrize("wrong", [[-7, 9, 4, 500], [0, 20, 0, 20, 0, 20], [20, 0]], ids=str)
def test_wrong_bounds_do_not_lead_outside(kernels: Kernels, wrong):
    if not kernels.cuda_kernels:
        pytest.skip("the reference raises, as test_bad_arguments checks")
    repeat = 8  # so that images that overlap are more than the rows allow
    student, teacher, _ = kernels.put(
        *(x.repeat(repeat, 1) for x in make_case([20])[:2]), bounds([])
    )
    cu_seqlens = torch.tensor(wrong, dtype=torch.int32, device=student.device) * repeat
    cut = [windowed(x) for x in (student, teacher)]
    value, _, grad = run(kernels, (*(inside for inside, _ in cut), cu_seqlens))
    assert value.shape == (len(wrong) - 1,)
    assert grad.shape == student.shape
    for _, buffer in cut:
        assert_margins_untouched(buffer)


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), max_size=4),
    ds=st.integers(1, 8),
    dt=st.integers(1, 8),
)
def test_any_shape(lengths, ds, dt):
    case = make_case(lengths, ds, dt)
    value, counted = cka_and_counted(*case)
    assert value.shape == counted.shape == (len(lengths),)
    assert not (counted & (torch.tensor(lengths) < 4)).any()
    assert value[~counted].eq(1).all()
    assert ((value >= 0) & (value <= 1 + 1e-5)).all()
    assert gradient(*case).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_no_rows(kernels: Kernels, lengths, dtype):
    case = make_case(lengths, dtype=dtype)
    value, _, grad = run(kernels, case)
    assert value.tolist() == [1.0] * len(lengths)
    assert list(grad.shape) == [0, 20]


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize(("ds", "dt"), [(20, 33), (24, 136), (80, 104)])
def test_kernels_stay_inside_their_tensors(kernels: Kernels, ds, dt, dtype):
    case = make_case([66, 0, 9], ds, dt, dtype)
    cut = [windowed(t) for t in kernels.put(*case)]
    tensors = [inside for inside, _ in cut]
    value, _, grad = run(kernels, tensors)
    assert value.isfinite().all()
    assert grad.isfinite().all()
    torch.testing.assert_close(value.cpu(), reference(*case, 4)[0], rtol=0, atol=1e-4)
    for _, buffer in cut:
        assert_margins_untouched(buffer)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_repeats_bitwise(kernels: Kernels, dtype):
    case = make_case([100, 33], dtype=dtype)
    first, second = (run(kernels, case) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_autocast_changes_nothing():
    case = make_case([12, 9])
    expected = cka(*case), gradient(*case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = cka(*case), gradient(*case)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_opcheck():
    student, teacher, cu_seqlens = make_case([7, 9])
    torch.library.opcheck(torch.ops.grace.cka, (student.requires_grad_(), teacher, cu_seqlens, 4))


def test_compiles_once_for_any_number_of_images_and_rows():
    compiled = torch.compile(cka, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in ([5, 6], [8, 9, 4], [7, 0, 30, 12]):
            student, teacher, cu_seqlens = make_case(lengths)
            student.requires_grad_()
            actual = compiled(student, teacher, cu_seqlens)
            torch.testing.assert_close(actual, cka(student, teacher, cu_seqlens))
            (grad,) = torch.autograd.grad(actual.sum(), student)
            torch.testing.assert_close(grad, gradient(student, teacher, cu_seqlens))


def test_non_contiguous_input():
    student, teacher, cu_seqlens = make_case([12, 9])
    strided = student.t().contiguous().t()
    spaced = cu_seqlens.repeat_interleave(2)[::2]
    torch.testing.assert_close(
        gradient(strided, teacher.t().contiguous().t(), spaced),
        gradient(student, teacher, cu_seqlens),
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": torch.zeros(20)}, r"student must have 2 dimensions, got shape \[20\]"),
        ({"student": torch.zeros(20, 3).int()}, r"student must be one of float32"),
        ({"teacher": torch.zeros(19, 33)}, r"teacher must have 20 rows like student, got 19"),
        ({"teacher": torch.zeros(20, 33).half()}, r"teacher must be torch.float32 like student"),
        ({"cu_seqlens": torch.tensor([0, 20])}, r"cu_seqlens must be int32, got torch.int64"),
        ({"cu_seqlens": torch.zeros(0).int()}, r"cu_seqlens must have at least 1 element, got 0"),
        ({"cu_seqlens": torch.zeros(1, 2).int()}, r"cu_seqlens must have 1 dimensions"),
        (
            {"cu_seqlens": bounds([21])},
            r"cu_seqlens must not decrease and lie in 0..20, got \[0, 21",
        ),
        ({"cu_seqlens": bounds([9, -2])}, r"cu_seqlens must not decrease and lie in 0..20"),
        ({"min_tokens": 0}, r"min_tokens must be at least 1, got 0"),
    ],
)
def test_bad_arguments(changes, message):
    names = ("student", "teacher", "cu_seqlens")
    arguments = dict(zip(names, make_case([20]), strict=True)) | changes
    with pytest.raises(ValueError, match="cka: " + message):
        cka(**arguments)
