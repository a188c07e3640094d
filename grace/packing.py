"""The packed weight layout: codes and scales to and from what ``grace.ops.dequant_gemm`` reads.

One layout serves decode, prefill, every architecture and the CPU. A weight [N, K] is cut into
64 × 64 tiles, padded up with zero codes, in the order [ceil(N/64)][ceil(K/64)]. Inside a tile the
codes stand as the lanes of a warp hold operand A of ``mma.m16n8k16`` (and of wgmma), so that a lane
reads its part with 16-byte loads. With gid = lane >> 2 and tig = lane & 3, a lane holds of each
16 × 16 block eight codes a0 … a7:

    a0 a1   row gid,     columns 2·tig, 2·tig + 1
    a2 a3   row gid + 8, the same columns
    a4 a5   row gid,     columns 2·tig + 8, 2·tig + 9
    a6 a7   row gid + 8, the same columns

- 4 bits: 512 words (2048 B) a tile, [4 bands of 16 rows][32 lanes][4 blocks of 16 columns], a
  32-bit word a block. Nibble p holds a(2p) + 8 and nibble p + 4 holds a(2p+1) + 8, so that
  ``(word >> 4p) & 0x000f000f`` is one operand register.
- 8 bits: 1024 words (4096 B) a tile, [4 bands][2 halves of 32 columns][32 lanes][2 blocks][2 words
  a block]. The bytes of the two words are a0 a2 a1 a3 and a4 a6 a5 a7, each + 128, so that
  ``(word >> 8p) & 0x00ff00ff`` is one operand register.

Scales are transposed to [G, 64·ceil(N/64)], so that lanes read neighbours; their padding is zero.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

TILE = 64
SCALE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Kernels that scale weights in bfloat16 read a code as a subnormal, and multiply it by its scale
# times 2^103 (csrc/ops/dequant_gemm/dequant_gemm.h, RowScale): from here on that is infinite.
BF16_SCALES_BELOW = 2.0**25

# The axes of the padded [N, K], and the same in the order in which their bytes are stored:
#   N = [tile][4 band][2 r8][8 gid]        K = [tile][4 block][2 c8][4 tig][2 lo]
# The 4-bit store has no r8: the row gid and the row gid + 8 are the two nibbles of a byte.
_AXES_4 = ("n_tile", "band", "gid", "k_tile", "block", "c8", "tig", "lo")
_STORED_4 = ("n_tile", "k_tile", "band", "gid", "tig", "block", "lo", "c8")
_AXES_8 = ("n_tile", "band", "r8", "gid", "k_tile", "half", "block", "c8", "tig", "lo")
_STORED_8 = ("n_tile", "k_tile", "band", "half", "gid", "tig", "block", "c8", "lo", "r8")
_SIZES = {"band": 4, "r8": 2, "gid": 8, "half": 2, "block": 4, "c8": 2, "tig": 4, "lo": 2}


def packed_shapes(
    out_features: int, in_features: int, bits: int, group_size: int
) -> tuple[tuple[int, int, int], tuple[int, int]]:
    """Shapes of the packed weight and scales of a layer: for buffers made before its weights."""
    n_tiles, k_tiles = -(-out_features // TILE), -(-in_features // TILE)
    groups = 1 if group_size == -1 else in_features // group_size
    return (n_tiles, k_tiles, words_per_tile(bits)), (groups, n_tiles * TILE)


def words_per_tile(bits: int) -> int:
    """32-bit words of one 64 x 64 tile: 512 at 4 bits, 1024 at 8."""
    return TILE * TILE * bits // 32


def pack(codes: Tensor, scales: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Packs signed codes and their scales into the layout described above.

    Args:
        codes: int8 [N, K], each within [-2^(bits-1), 2^(bits-1) - 1].
        scales: bfloat16, float16 or float32 [N, G] with G dividing K, finite, and below 2^25 in
            bfloat16; stored as they are.
        bits: 4 or 8.

    Returns:
        qweight: int32 [ceil(N/64), ceil(K/64), 128·bits].
        packed_scales: [G, 64·ceil(N/64)] in the dtype of ```scales```.

    Raises:
        ValueError: a dtype, shape, width, code or scale outside of the above.
    """
    _check_pack(codes, scales, bits)
    return arrange(codes, scales, bits)


def arrange(codes: Tensor, scales: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """``pack`` of codes and scales that are known to be good: values are not looked at."""
    rows, columns = codes.shape
    padded = pad(codes, (0, -columns % TILE, 0, -rows % TILE))
    bytes_ = _to_bytes_4(padded) if bits == 4 else _to_bytes_8(padded)
    qweight = bytes_.contiguous().view(-1).view(torch.int32)
    shape, _ = packed_shapes(rows, columns, bits, group_size=-1)
    return qweight.view(shape), pad(scales.t(), (0, -rows % TILE)).contiguous()


def unpack(
    qweight: Tensor,
    packed_scales: Tensor,
    bits: int,
    *,
    group_size: int,
    in_features: int,
    out_features: int,
) -> tuple[Tensor, Tensor]:
    """The exact inverse of ``pack``.

    Returns:
        codes: int8 [out_features, in_features].
        scales: [out_features, G] in the dtype of ```packed_scales```.

    Raises:
        ValueError: shapes, dtypes or sizes that no call of `pack` gives.
    """
    _check_unpack(qweight, packed_scales, bits, group_size, in_features, out_features)
    bytes_ = qweight.contiguous().view(-1).view(torch.uint8)
    n_tiles, k_tiles, _ = qweight.shape
    padded = (_from_bytes_4 if bits == 4 else _from_bytes_8)(bytes_, n_tiles, k_tiles)
    codes = padded[:out_features, :in_features].contiguous()
    return codes, packed_scales[:, :out_features].t().contiguous()


def dequantize(
    qweight: Tensor,
    packed_scales: Tensor,
    bits: int,
    *,
    group_size: int,
    in_features: int,
    out_features: int,
) -> Tensor:
    """The weight [out_features, in_features] that a packed layer multiplies with: q·s in float32.

    float64 where ``packed_scales`` are. Raises ValueError like ``unpack``.
    """
    codes, scales = unpack(
        qweight,
        packed_scales,
        bits,
        group_size=group_size,
        in_features=in_features,
        out_features=out_features,
    )
    compute = torch.float64 if scales.dtype == torch.float64 else torch.float32
    groups = scales.shape[1]
    grouped = codes.to(compute).view(out_features, groups, in_features // groups)
    return (grouped * scales.to(compute).unsqueeze(-1)).view(out_features, in_features)


def interleave(gate: Tensor, up: Tensor) -> Tensor:
    """Rows of two projections by eights, gate before up: one weight for SwiGLU in one GEMM.

    So a lane of a tensor core holds a gate's sum and its up's. For codes and scales before `pack`
    [N, …] and for biases [N].

    Returns:
        [2·N, …].

    Raises:
        ValueError: other shapes or dtypes than each other's, or rows that eight does not divide.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"interleave: up must be {gate.dtype} {list(gate.shape)}, "
            f"got {up.dtype} {list(up.shape)}"
        )
    if gate.dim() == 0 or gate.shape[0] % 8:
        raise ValueError(f"interleave: rows must be a multiple of 8, got shape {list(gate.shape)}")
    eights = [part.unflatten(0, (-1, 8)) for part in (gate, up)]
    return torch.stack(eights, dim=1).flatten(0, 2)


def deinterleave(out: Tensor) -> tuple[Tensor, Tensor]:
    """(gate, up) of outputs [..., 2·N] of a weight made by `interleave`: each [..., N]."""
    gate, up = out.unflatten(-1, (-1, 2, 8)).unbind(-2)
    return gate.flatten(-2), up.flatten(-2)


def _sizes(axes: tuple[str, ...], n_tiles: int, k_tiles: int, blocks: int) -> list[int]:
    known = {**_SIZES, "n_tile": n_tiles, "k_tile": k_tiles, "block": blocks}
    return [known[axis] for axis in axes]


def _order(source: tuple[str, ...], target: tuple[str, ...]) -> list[int]:
    return [source.index(axis) for axis in target]


def _to_bytes_4(codes: Tensor) -> Tensor:
    n_tiles, k_tiles = codes.shape[0] // TILE, codes.shape[1] // TILE
    # Two's complement to offset binary flips the top bit: code + 8 == (code & 15) ^ 8.
    pairs = ((codes & 15) ^ 8).view(torch.uint8).view(n_tiles * 4, 2, 8 * codes.shape[1])
    nibbles = pairs[:, 0] | (pairs[:, 1] << 4)
    return nibbles.view(_sizes(_AXES_4, n_tiles, k_tiles, 4)).permute(_order(_AXES_4, _STORED_4))


def _from_bytes_4(bytes_: Tensor, n_tiles: int, k_tiles: int) -> Tensor:
    stored = bytes_.view(_sizes(_STORED_4, n_tiles, k_tiles, 4))
    nibbles = stored.permute(_order(_STORED_4, _AXES_4)).reshape(n_tiles * 4, 1, 8 * k_tiles * TILE)
    offset = torch.cat((nibbles & 15, nibbles >> 4), dim=1).view(torch.int8)
    return (offset - 8).view(n_tiles * TILE, k_tiles * TILE)


def _to_bytes_8(codes: Tensor) -> Tensor:
    n_tiles, k_tiles = codes.shape[0] // TILE, codes.shape[1] // TILE
    offset = codes.view(torch.uint8) ^ 128
    return offset.view(_sizes(_AXES_8, n_tiles, k_tiles, 2)).permute(_order(_AXES_8, _STORED_8))


def _from_bytes_8(bytes_: Tensor, n_tiles: int, k_tiles: int) -> Tensor:
    stored = (bytes_ ^ 128).view(_sizes(_STORED_8, n_tiles, k_tiles, 2)).view(torch.int8)
    offset = stored.permute(_order(_STORED_8, _AXES_8))
    return offset.reshape(n_tiles * TILE, k_tiles * TILE)


def _check_pack(codes: Tensor, scales: Tensor, bits: int) -> None:
    _check_bits("pack", bits)
    _check_pack_shapes(codes, scales)
    if bits == 4 and codes.numel() and not codes.is_meta:
        low, high = (int(code) for code in codes.aminmax())
        if low < -8 or high > 7:
            raise ValueError(f"pack: codes must be within [-8, 7] at 4 bits, got [{low}, {high}]")
    if scales.numel() and not scales.is_meta:
        _check_pack_scales(float(scales.abs().amax()), scales.dtype)


def _check_pack_scales(largest: float, dtype: torch.dtype) -> None:
    if not math.isfinite(largest):
        raise ValueError(f"pack: scales must be finite, got {largest}")
    if dtype == torch.bfloat16 and largest >= BF16_SCALES_BELOW:
        raise ValueError(f"pack: scales must be below 2^25 in bfloat16, got {largest:g}")


def _check_pack_shapes(codes: Tensor, scales: Tensor) -> None:
    if codes.dtype != torch.int8 or codes.dim() != 2:
        raise ValueError(f"pack: codes must be int8 [N, K], got {codes.dtype} {list(codes.shape)}")
    if scales.dtype not in SCALE_DTYPES:
        raise ValueError(f"pack: scales must be bfloat16, float16 or float32, got {scales.dtype}")
    if scales.dim() != 2 or scales.shape[0] != codes.shape[0]:
        raise ValueError(f"pack: scales must be [{codes.shape[0]}, G], got {list(scales.shape)}")
    groups, columns = scales.shape[1], codes.shape[1]
    if columns == 0:
        raise ValueError(f"pack: codes must have at least one column, got {list(codes.shape)}")
    if groups == 0 or columns % groups:
        raise ValueError(
            f"pack: scales must have a number of groups that divides {columns}, got {groups}"
        )


def _check_unpack(
    qweight: Tensor, scales: Tensor, bits: int, group_size: int, in_features: int, out_features: int
) -> None:
    _check_bits("unpack", bits)
    if group_size != -1 and (group_size < 1 or in_features % group_size):
        raise ValueError(f"unpack: group_size must be -1 or divide {in_features}, got {group_size}")
    shape, scales_shape = packed_shapes(out_features, in_features, bits, group_size)
    if qweight.dtype != torch.int32 or tuple(qweight.shape) != shape:
        raise ValueError(
            f"unpack: qweight must be int32 {list(shape)}, "
            f"got {qweight.dtype} {list(qweight.shape)}"
        )
    if not scales.is_floating_point() or tuple(scales.shape) != scales_shape:
        raise ValueError(
            f"unpack: packed_scales must be floating {list(scales_shape)}, "
            f"got {scales.dtype} {list(scales.shape)}"
        )


def _check_bits(op: str, bits: int) -> None:
    if bits not in (4, 8):
        raise ValueError(f"{op}: bits must be 4 or 8, got {bits}")
