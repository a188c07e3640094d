"""Packing: the layout as it is documented, and that it is undone exactly."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grace.packing import SCALE_DTYPES, dequantize, pack, packed_shapes, unpack

BITS = [4, 8]


def random_codes(rows: int, columns: int, bits: int) -> torch.Tensor:
    half = 2 ** (bits - 1)
    return torch.randint(-half, half, (rows, columns), dtype=torch.int8)


def words_of(qweight: torch.Tensor) -> torch.Tensor:
    """The words as unsigned numbers."""
    return qweight.to(torch.int64) & 0xFFFFFFFF


def fragment(codes: torch.Tensor, band: int, block: int, lane: int) -> list[int]:
    """a0 … a7 that a lane holds of a 16 × 16 block, as the manual of mma numbers them."""
    gid, tig = lane // 4, lane % 4
    rows = [gid, gid, gid + 8, gid + 8] * 2
    columns = [2 * tig, 2 * tig + 1] * 2 + [2 * tig + 8, 2 * tig + 9] * 2
    return [int(codes[16 * band + r, 16 * block + c]) for r, c in zip(rows, columns, strict=True)]


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    rows=st.integers(0, 140),
    groups=st.integers(1, 5),
    group_size=st.integers(1, 70),
    dtype=st.sampled_from(SCALE_DTYPES),
)
def test_unpack_undoes_pack(bits, rows, groups, group_size, dtype):
    codes = random_codes(rows, groups * group_size, bits)
    scales = torch.randn(rows, groups).to(dtype)
    packed = pack(codes, scales, bits)
    shapes = packed_shapes(rows, groups * group_size, bits, group_size)
    assert tuple(tuple(t.shape) for t in packed) == shapes
    sizes = {"group_size": group_size, "in_features": groups * group_size, "out_features": rows}
    again = unpack(*packed, bits, **sizes)
    assert again[0].dtype == torch.int8
    assert torch.equal(again[0], codes)
    assert again[1].dtype == dtype
    assert torch.equal(again[1], scales)


def test_4_bit_words_hold_operand_registers():
    codes = random_codes(64, 64, 4)
    words = words_of(pack(codes, torch.ones(64, 1), 4)[0]).view(4, 32, 4)
    for band, lane, block in torch.cartesian_prod(*map(torch.arange, (4, 32, 4))).tolist():
        a = fragment(codes, band, block, lane)
        for p in range(4):
            register = (int(words[band, lane, block]) >> 4 * p) & 0x000F000F
            assert register == (a[2 * p] + 8) | (a[2 * p + 1] + 8) << 16


def test_8_bit_words_hold_operand_registers():
    codes = random_codes(64, 64, 8)
    words = words_of(pack(codes, torch.ones(64, 1), 8)[0]).view(4, 2, 32, 2, 2)
    for band, lane, block in torch.cartesian_prod(*map(torch.arange, (4, 32, 4))).tolist():
        a = fragment(codes, band, block, lane)
        for register in range(4):
            word = int(words[band, block // 2, lane, block % 2, register // 2])
            pair = (word >> 8 * (register % 2)) & 0x00FF00FF
            assert pair == (a[2 * register] + 128) | (a[2 * register + 1] + 128) << 16


@pytest.mark.parametrize("bits", BITS)
def test_tiles_are_in_order_and_padded_with_zero_codes(bits):
    codes = random_codes(70, 130, bits)
    qweight, scales = pack(codes, torch.rand(70, 2), bits)
    assert tuple(qweight.shape) == (2, 3, 128 * bits)
    corner, _ = pack(codes[64:, 128:], torch.ones(6, 1), bits)
    assert torch.equal(qweight[1, 2], corner[0, 0])
    zero = torch.zeros(64, 64, dtype=torch.int8)
    padded = zero.clone()
    padded[:6, :2] = codes[64:, 128:]
    assert torch.equal(qweight[1, 2], pack(padded, torch.ones(64, 1), bits)[0][0, 0])
    assert (scales[:, 70:] == 0).all()


@pytest.mark.parametrize("bits", BITS)
def test_dequantize(bits):
    codes, scales = random_codes(30, 96, bits), torch.rand(30, 3).bfloat16()
    sizes = {"group_size": 32, "in_features": 96, "out_features": 30}
    weight = dequantize(*pack(codes, scales, bits), bits, **sizes)
    assert weight.dtype == torch.float32
    assert torch.equal(weight, codes * scales.float().repeat_interleave(32, 1))


def test_meta_tensors_give_shapes():
    codes = torch.empty(70, 130, dtype=torch.int8, device="meta")
    qweight, scales = pack(codes, torch.empty(70, 2, device="meta"), 4)
    assert (tuple(qweight.shape), tuple(scales.shape)) == packed_shapes(70, 130, 4, 65)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 3}, r"pack: bits must be 4 or 8, got 3"),
        ({"codes": torch.zeros(4, 8)}, r"pack: codes must be int8 \[N, K\], got torch.float32"),
        ({"codes": torch.zeros(4, dtype=torch.int8)}, r"codes must be int8 \[N, K\], got .* \[4\]"),
        ({"codes": torch.zeros(4, 0, dtype=torch.int8)}, r"at least one column, got \[4, 0\]"),
        ({"codes": torch.full((4, 8), 8, dtype=torch.int8)}, r"within \[-8, 7\] at 4 bits, got"),
        ({"scales": torch.ones(4, 3)}, r"a number of groups that divides 8, got 3"),
        ({"scales": torch.ones(5, 2)}, r"scales must be \[4, G\], got \[5, 2\]"),
        ({"scales": torch.full((4, 2), torch.nan)}, r"pack: scales must be finite, got nan"),
        ({"scales": torch.full((4, 2), -torch.inf).half()}, r"scales must be finite, got inf"),
        (
            {"scales": torch.full((4, 2), -(2.0**25)).bfloat16()},
            r"pack: scales must be below 2\^25 in bfloat16, got 3.35544e\+07",
        ),
        ({"scales": torch.ones(4, 2).double()}, r"bfloat16, float16 or float32, got torch.float64"),
    ],
)
def test_pack_refuses(changes, message):
    arguments = {"codes": torch.zeros(4, 8, dtype=torch.int8), "scales": torch.ones(4, 2)}
    with pytest.raises(ValueError, match=message):
        pack(**{**arguments, "bits": 4, **changes})


def test_scales_may_be_as_large_as_the_kernels_take_them():
    codes = torch.ones(1, 8, dtype=torch.int8)
    below = torch.tensor([[2.0**25]]).bfloat16().nextafter(torch.zeros(1).bfloat16())
    for scale in (below, torch.full((1, 1), 65504.0).half(), torch.full((1, 1), 3e38)):
        packed = pack(codes, scale, 4)
        sizes = {"group_size": -1, "in_features": 8, "out_features": 1}
        assert torch.equal(unpack(*packed, 4, **sizes)[1], scale)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"bits": 8},
            r"unpack: qweight must be int32 \[1, 1, 1024\], got torch.int32 \[1, 1, 512\]",
        ),
        ({"bits": 2}, r"unpack: bits must be 4 or 8, got 2"),
        ({"group_size": 3}, r"unpack: group_size must be -1 or divide 8, got 3"),
        ({"group_size": 8}, r"unpack: packed_scales must be floating \[1, 64\], got"),
        ({"out_features": 65}, r"unpack: qweight must be int32 \[2, 1, 512\], got"),
    ],
)
def test_unpack_refuses(changes, message):
    packed = pack(torch.zeros(4, 8, dtype=torch.int8), torch.ones(4, 2), 4)
    arguments = {"bits": 4, "group_size": 4, "in_features": 8, "out_features": 4, **changes}
    with pytest.raises(ValueError, match=message):
        unpack(*packed, arguments.pop("bits"), **arguments)
