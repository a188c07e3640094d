"""quantize_pack is pack(quantize(…)), bit for bit."""

from __future__ import annotations

import pytest
import torch
from conftest import Kernels
from torch import Tensor
from windows import assert_margins_untouched, windowed

from grace.ops import quantize_pack
from grace.ops.fake_quant import quantize
from grace.packing import pack

GRIDS = [torch.bfloat16, torch.float16, None]


def make(
    rows: int, columns: int, groups: int, bits=4, dtype=torch.float32
) -> tuple[Tensor, Tensor]:
    weight = torch.randn(rows, columns)
    spread = weight.view(rows, groups, -1).abs().amax(-1)
    return weight.to(dtype), (0.7 * spread / (2 ** (bits - 1) - 1)).log()  # some are cut off


def assert_packs(kernels: Kernels, weight, log_scale, bits, group_size, scale_dtype) -> None:
    arguments = (weight, log_scale, bits, group_size, scale_dtype)
    actual = kernels.quantize_pack(*kernels.put(*arguments))
    options = {"bits": bits, "group_size": group_size, "scale_dtype": scale_dtype}
    expected = pack(*quantize(weight, log_scale, **options), bits)
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a.cpu(), b, rtol=0, atol=0)


@pytest.mark.parametrize("scale_dtype", GRIDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [4, 8])
def test_equals_quantize_then_pack(kernels: Kernels, bits, dtype, scale_dtype):
    weight, log_scale = make(70, 320, 10, bits, dtype)  # rows, tiles and blocks that are not full
    assert_packs(kernels, weight, log_scale, bits, 32, scale_dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("rows", "columns", "group_size"),
    [
        (64, 128, 128),
        (1, 64, 16),
        (64, 192, 96),  # groups across blocks
        (65, 72, 24),
        (10, 600, 200),
        (3, 512, -1),
        (128, 64, 8),  # too many groups a block: an element at a time
        (20, 100, 20),
        (5, 33, 11),
        (7, 1, 1),
        (2, 130, -1),
    ],
)
def test_any_size(kernels: Kernels, rows, columns, group_size, bits, dtype):
    groups = 1 if group_size == -1 else columns // group_size
    weight, log_scale = make(rows, columns, groups, bits, dtype)
    assert_packs(kernels, weight, log_scale, bits, group_size, torch.bfloat16)


@pytest.mark.parametrize("scale_dtype", GRIDS)
def test_quotients_next_to_ties(kernels: Kernels, scale_dtype):
    log_scale = torch.rand(32, 1).add(0.5).log()
    scale = quantize(torch.zeros(32, 64), log_scale, group_size=-1, scale_dtype=scale_dtype)[1]
    weight = scale.float() * (torch.arange(-10, 11).repeat(8)[:64] + 0.5)
    for _ in range(3):
        assert_packs(kernels, weight, log_scale, 4, -1, scale_dtype)
        weight = weight.nextafter(torch.full_like(weight, torch.inf))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [64, 60])
def test_extremes(kernels: Kernels, columns, bits):
    log_scale = torch.tensor([[-100.0], [-11.8], [0.0], [66.0], [67.0], [88.0]])
    sizes = torch.tensor([0, 1e-45, -1e-5, 1, 3e38, torch.inf, -torch.inf, 1e29, 3e28, -0.0])
    weight = sizes.repeat(7)[:columns].repeat(6, 1)
    assert_packs(kernels, weight, log_scale, bits, -1, None)


def test_a_nan_stays_where_it_is(kernels: Kernels):
    weight, log_scale = make(64, 64, 1)
    good = kernels.quantize_pack(*kernels.put(weight, log_scale, 4, -1, torch.bfloat16))[0]
    weight[5, 7] = torch.nan
    bad = kernels.quantize_pack(*kernels.put(weight, log_scale, 4, -1, torch.bfloat16))[0]
    changed = (good ^ bad).flatten().nonzero().flatten()
    assert changed.numel() <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_off_the_16_byte_grid(kernels: Kernels, dtype):
    weight, log_scale = make(64, 128, 1, dtype=dtype)
    moved = torch.cat([weight.new_zeros(1), weight.flatten()])[1:].view(weight.shape)
    put = kernels.put(moved.clone(), log_scale)
    shifted = torch.cat([put[0].new_zeros(1), put[0].flatten()])[1:].view(weight.shape)
    actual = kernels.quantize_pack(shifted, put[1], 4, 128, torch.bfloat16)
    expected = pack(*quantize(weight, log_scale), 4)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("columns", [96, 50])
def test_reads_nothing_outside(kernels: Kernels, columns):
    weight, log_scale = kernels.put(*make(5, columns, 2))
    (inside, first), (theta, second) = windowed(weight), windowed(log_scale)
    size = columns // 2
    actual = kernels.quantize_pack(inside, theta, 4, size, torch.bfloat16)
    expected = kernels.quantize_pack(weight, log_scale, 4, size, torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert_margins_untouched(first)
    assert_margins_untouched(second)


def test_no_rows():
    qweight, scales = quantize_pack(torch.zeros(0, 64), torch.zeros(0, 1), group_size=-1)
    assert qweight.shape == (0, 1, 512)
    assert scales.shape == (1, 0)


def test_compiles_once_for_all_sizes():
    torch._dynamo.reset()
    compiled = torch.compile(quantize_pack, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (70, 130, 200):
            weight, log_scale = make(rows, 96, 3)
            actual = compiled(weight, log_scale, group_size=32)
            expected = quantize_pack(weight, log_scale, group_size=32)
            assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 5}, r"quantize_pack: bits must be 4 or 8, got 5"),
        (
            {"group_size": 7},
            r"quantize_pack: group_size must divide in_features 96 or be -1, got 7",
        ),
        ({"log_scale": torch.zeros(6, 2)}, r"log_scale must have shape \[6, 3\], got \[6, 2\]"),
        ({"scale_dtype": torch.int8}, r"scale_dtype must be bfloat16, float16, float32 or None"),
    ],
)
def test_bad_arguments(changes, message):
    weight, log_scale = make(6, 96, 3)
    arguments = {"weight": weight, "log_scale": log_scale, "group_size": 32, **changes}
    with pytest.raises(ValueError, match=message):
        quantize_pack(arguments.pop("weight"), arguments.pop("log_scale"), **arguments)


def test_a_weight_without_columns_is_refused():
    with pytest.raises(ValueError, match=r"quantize_pack: weight must have at least one column"):
        quantize_pack(torch.zeros(3, 0), torch.zeros(3, 1), group_size=-1)
