"""rms_norm, against float64 and against transformers' modules."""

from __future__ import annotations

import pytest
import torch
from conftest import Kernels
from oracle import assert_accurate, to_double
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRMSNorm
from windows import assert_margins_untouched, windowed

from grace.ops import rms_norm
from grace.ops.rms_norm import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-6


def make(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, columns).mul(3).to(dtype), torch.randn(columns).to(dtype)


def assert_norms(kernels: Kernels, x: Tensor, weight: Tensor, eps: float = EPS) -> None:
    actual = kernels.rms_norm(*kernels.put(x, weight), eps)
    exact = reference(*to_double(x, weight), eps)
    assert_accurate(actual, exact, reference(x, weight, eps))


def off_the_grid(x: Tensor) -> Tensor:
    """A copy that begins an element behind a multiple of 16 bytes."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        (67, 8),  # teams of 8 lanes, the last block not full
        (67, 128),
        (17, 136),
        (17, 256),
        (9, 512),
        (9, 1000),
        (3, 1536),
        (3, 2560),  # a block a row from here on, its last threads without a vector
        (2, 4096),
        (2, 5120),
        (1, 8192),
        (1, 16384),
        (2, 16640),  # more than registers hold
        (40, 1),  # by elements from here on
        (5, 7),
        (3, 1023),
        (2, 1030),
    ],
)
def test_any_size(kernels: Kernels, rows, columns, dtype):
    assert_norms(kernels, *make(rows, columns, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [128, 1536])
@pytest.mark.parametrize("which", ["x", "weight"])
def test_off_the_16_byte_grid(kernels: Kernels, which, columns, dtype):
    x, weight = kernels.put(*make(3, columns, dtype))
    moved = (off_the_grid(x), weight) if which == "x" else (x, off_the_grid(weight))
    actual = kernels.rms_norm(*moved, EPS)
    exact = reference(*to_double(x.cpu(), weight.cpu()), EPS)
    assert_accurate(actual, exact, reference(x.cpu(), weight.cpu(), EPS))


@pytest.mark.parametrize("columns", [128, 2048])
def test_a_row_is_the_same_among_any_others(kernels: Kernels, columns):
    x, weight = kernels.put(*make(70, columns, torch.bfloat16))
    together = kernels.rms_norm(x, weight, EPS)
    for rows in (slice(0, 1), slice(3, 8), slice(69, 70)):
        assert kernels.rms_norm(x[rows].contiguous(), weight, EPS).equal(together[rows])


@pytest.mark.parametrize("columns", [8, 100, 128, 1544, 16640])
def test_touches_nothing_outside(kernels: Kernels, columns):
    x, weight = kernels.put(*make(3, columns))
    (inside, first), (weights, second) = windowed(x), windowed(weight)
    assert kernels.rms_norm(inside, weights, EPS).equal(kernels.rms_norm(x, weight, EPS))
    assert inside.equal(x)
    assert_margins_untouched(first)
    assert_margins_untouched(second)


@pytest.mark.parametrize("columns", [99, 128, 2048])
def test_squares_of_the_largest_values(kernels: Kernels, columns):
    """65504² is infinite in float16; the sum is not one of float16."""
    x = torch.full((2, columns), 65504.0, dtype=torch.float16)
    weight = torch.ones(columns, dtype=torch.float16)
    actual = kernels.rms_norm(*kernels.put(x, weight), EPS).cpu()
    torch.testing.assert_close(actual, torch.ones_like(x), rtol=1e-3, atol=0)


@pytest.mark.parametrize("eps", [0.0, 1e-30, 1.0, 1e30])
@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_any_eps(kernels: Kernels, size, eps):
    x, weight = make(3, 64)
    assert_norms(kernels, x * size, weight, eps)


def test_rows_of_zeros_and_of_nan(kernels: Kernels):
    x, weight = make(3, 2048)
    x[0], x[2, 5] = 0.0, torch.nan
    actual = kernels.rms_norm(*kernels.put(x, weight), EPS).cpu()
    assert actual[0].eq(0).all()
    assert actual[1].isfinite().all()
    assert actual[2].isnan().all()


@pytest.mark.parametrize("module", [LlamaRMSNorm, Qwen3VLTextRMSNorm])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_what_transformers_does_with_one_rounding_less(module, dtype):
    x, weight = make(7, 192, dtype)
    norm = module(192, eps=1e-5).to(dtype)
    norm.weight.data.copy_(weight)
    resolution = torch.finfo(dtype).eps
    actual = rms_norm(x, weight, eps=1e-5)
    torch.testing.assert_close(actual, norm(x), rtol=1.5 * resolution, atol=resolution * 1e-3)


@pytest.mark.parametrize("shape", [(96,), (4, 96), (2, 3, 5, 96)])
def test_any_leading_dimensions(shape):
    x, weight = torch.randn(shape), torch.randn(96)
    expected = torch.nn.functional.rms_norm(x, (96,), weight, EPS)
    torch.testing.assert_close(rms_norm(x, weight), expected)


def test_rows_that_lie_apart():
    apart, weight = torch.randn(6, 5, 96)[::2, 1:, 16:80], torch.randn(128)[::2]
    actual = rms_norm(apart, weight)
    assert actual.is_contiguous()
    assert actual.equal(rms_norm(apart.contiguous(), weight.contiguous()))
    assert rms_norm(apart.transpose(0, 1), weight).equal(actual.transpose(0, 1))


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64), (3, 0)])
def test_empty(kernels: Kernels, shape):
    x, weight = kernels.put(torch.zeros(shape), torch.ones(shape[-1]))
    assert kernels.rms_norm(x, weight, EPS).shape == shape
    assert rms_norm(x, weight).shape == shape


def test_compiles_once_for_all_sizes():
    torch._dynamo.reset()
    compiled = torch.compile(rms_norm, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows, columns in ((3, 64), (5, 96), (130, 128)):
            x, weight = make(rows, columns)
            assert compiled(x, weight).equal(rms_norm(x, weight))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(3, 8, dtype=torch.int32)}, r"rms_norm: x must be one of .*int32"),
        ({"x": torch.tensor(1.0)}, r"rms_norm: x must have shape \[\.\.\., D\], got \[\]"),
        (
            {"weight": torch.zeros(7)},
            r"weight must be torch.float32 \[8\], got torch.float32 \[7\]",
        ),
        ({"weight": torch.zeros(1, 8)}, r"weight must be .* \[8\], got torch.float32 \[1, 8\]"),
        (
            {"weight": torch.zeros(8).half()},
            r"weight must be torch.float32 \[8\], got torch.float16",
        ),
        ({"weight": torch.zeros(8, device="meta")}, r"weight must be on x's device cpu, got meta"),
    ],
)
def test_bad_arguments(changes, message):
    arguments = {"x": torch.zeros(3, 8), "weight": torch.zeros(8)} | changes
    with pytest.raises(ValueError, match=message):
        rms_norm(arguments["x"], arguments["weight"])
