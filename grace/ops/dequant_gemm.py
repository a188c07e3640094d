"""Linear layer on packed 4- or 8-bit weights: codes become numbers inside the matrix product.

    y[m, n] = Σ_k x[m, k] · q[n, k] · s[n, k // group_size] + bias[n]

accumulated in fp32 and rounded once, to x's dtype. What follows a projection in a decoder can be
part of the same kernel: SwiGLU of a gate and an up projection held as one weight, and the residual.
Weights come from ``grace.packing.pack``; the layout is described there. Inference only: there is
no gradient.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from grace import _library
from grace.ops._checks import KERNEL_DTYPES, accumulate_dtype
from grace.packing import TILE, dequantize, words_per_tile

_library.define(
    "dequant_gemm",
    "(Tensor x, Tensor qweight, Tensor scales, Tensor? bias, int bits, int group_size, "
    "int out_features, Tensor? residual=None, bool swiglu=False, int plan=-1, "
    "bool settled=True) -> Tensor",
)
_op = torch.ops.grace.dequant_gemm.default


def dequant_gemm(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    bias: Tensor | None = None,
    *,
    bits: int,
    group_size: int,
    out_features: int,
    residual: Tensor | None = None,
    swiglu: bool = False,
    plan: int = -1,
    settled: bool = True,
) -> Tensor:
    """Multiplies ``x`` with a packed weight [N, K] transposed, and adds ``bias``.

    With ``swiglu`` the weight is that of two projections, made by ``grace.packing.interleave``:
    y = silu(x · gateᵀ + bias_gate) ⊙ (x · upᵀ + bias_up), [..., N/2]. ``residual`` is added last.

    Args:
        x: [..., K] float16 or bfloat16; on a CPU also float32 (and float64, by the reference).
        qweight: int32 [ceil(N/64), ceil(K/64), 128·bits], from ``grace.packing.pack``.
        scales: [G, 64·ceil(N/64)] bfloat16, float16 or float32, from ``grace.packing.pack``.
        bias: [N] in x's dtype, or None.
        bits: 4 or 8.
        group_size: columns that share a scale: divides K, or −1 for one group a row. Multiples of
            16 and one group a row are fast; any other takes a general kernel.
        out_features: N, which the padding of ``qweight`` leaves open.
        residual: like the result, or None.
        swiglu: N is then a multiple of 16, and ``bias`` interleaved like the weight.
        plan: the number of the kernel to run (``plans``), or -1: the one measured as the fastest
            for the most similar layer. GPU only.
        settled: False where a kernel just ahead in the stream may have written the weight, as in
            training: on a GPU it is then read behind that kernel, and not while it ends.

    Returns:
        [..., N], or [..., N/2] with ``swiglu``, in x's dtype. A row does not depend on the other
        rows of x within one kernel, and repeated calls are bitwise equal.

    Raises:
        ValueError: for a dtype, shape, width or group size outside of the above.
        RuntimeError: ``plan`` names no kernel, or one that does not run this call.
    """
    _check(x, qweight, scales, bias, bits, group_size, out_features)
    _check_residual(x, out_features, residual, swiglu)
    if residual is not None:
        residual = residual.contiguous()
    if x.dtype == torch.float64:
        return reference(x, qweight, scales, bias, bits, group_size, out_features, residual, swiglu)
    if x.device.type == "cpu" and (swiglu or residual is not None):
        sums = _op(
            x.float().contiguous(),
            qweight,
            scales,
            None if bias is None else bias.float(),
            bits,
            group_size,
            out_features,
        )
        return _finished(sums, residual, swiglu, x.dtype)
    return _op(
        x.contiguous(),
        qweight,
        scales,
        bias,
        bits,
        group_size,
        out_features,
        residual,
        swiglu,
        plan,
        settled,
    )


def _check(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    out_features: int,
) -> None:
    """Comparisons only, and few: decoding calls this for every layer and token."""
    in_features = _check_activations(x)
    k_tiles = _check_qweight(qweight, bits, out_features)
    groups = _check_scales(scales, out_features)
    _check_in_features(in_features, k_tiles, groups, group_size)
    if not x.device == qweight.device == scales.device:
        _refuse("qweight and scales", f"be on {x.device}", f"{qweight.device}, {scales.device}")
    if bias is None:
        return
    if bias.dtype != x.dtype or bias.shape != (out_features,):
        _refuse("bias", f"be {x.dtype} [{out_features}]", _describe(bias))
    if bias.device != x.device:
        _refuse("bias", f"be on {x.device}", bias.device)


def _check_activations(x: Tensor) -> int:
    """Features of x."""
    if x.is_cuda:
        if x.dtype not in (torch.float16, torch.bfloat16):
            _refuse("x", "be float16 or bfloat16 on a GPU", x.dtype)
    elif x.dtype not in KERNEL_DTYPES and x.dtype != torch.float64:
        _refuse("x", "be float16, bfloat16 or float32", x.dtype)
    if x.dim() == 0:
        _refuse("x", "have at least one dimension", "shape []")
    return x.shape[-1]


def _check_qweight(qweight: Tensor, bits: int, out_features: int) -> int:
    """Tiles along K."""
    if bits not in (4, 8):
        _refuse("bits", "be 4 or 8", bits)
    shape = qweight.shape
    if qweight.dtype != torch.int32 or len(shape) != 3 or not qweight.is_contiguous():
        _refuse("qweight", "be int32 with 3 dimensions, contiguous", _describe(qweight))
    if shape[2] != words_per_tile(bits):
        _refuse("qweight", f"have {words_per_tile(bits)} words a tile at {bits} bits", shape[2])
    rows = shape[0] * TILE
    if not rows - TILE < out_features <= rows or out_features < 0:
        _refuse("out_features", f"be {max(rows - TILE + 1, 0)} to {rows}", out_features)
    return shape[1]


def _check_scales(scales: Tensor, out_features: int) -> int:
    """Groups a row."""
    shape = scales.shape
    if scales.dtype not in KERNEL_DTYPES or len(shape) != 2 or not scales.is_contiguous():
        _refuse("scales", "be floating with 2 dimensions, contiguous", _describe(scales))
    rows = -(-out_features // TILE) * TILE
    if shape[1] != rows:
        _refuse("scales", f"have shape [G, {rows}]", list(shape))
    return shape[0]


def _check_in_features(in_features: int, k_tiles: int, groups: int, group_size: int) -> None:
    first, last = k_tiles * TILE - TILE + 1, k_tiles * TILE
    if group_size == -1:
        if groups != 1:
            _refuse("scales", "have one group a row at group_size -1", groups)
        if not first <= in_features <= last:
            _refuse("x", f"have {first} to {last} features", in_features)
        return
    packed = groups * group_size
    if not first <= packed <= last or group_size < 1:
        allowed = f"be -1 or make {first} to {last} features with {groups} groups"
        _refuse("group_size", allowed, group_size)
    if in_features != packed:
        _refuse("x", f"have {packed} features", in_features)


def _check_residual(x: Tensor, out_features: int, residual: Tensor | None, swiglu: bool) -> None:
    if swiglu and out_features % 16:
        _refuse("out_features", "be a multiple of 16 with swiglu", out_features)
    if residual is None:
        return
    shape = (*x.shape[:-1], out_features // 2 if swiglu else out_features)
    if residual.dtype != x.dtype or residual.shape != shape:
        _refuse("residual", f"be {x.dtype} {list(shape)}", _describe(residual))
    if residual.device != x.device:
        _refuse("residual", f"be on {x.device}", residual.device)


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"


def _refuse(argument: str, allowed: str, got: object) -> NoReturn:
    raise ValueError(f"dequant_gemm: {argument} must {allowed}, got {got}")


@_library.reference("dequant_gemm")
def reference(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    out_features: int,
    residual: Tensor | None = None,
    swiglu: bool = False,
    plan: int = -1,
    settled: bool = True,
) -> Tensor:
    """dequant_gemm in plain PyTorch, in float32 (float64 for float64 x)."""
    if plan != -1:
        raise RuntimeError(f"dequant_gemm: plan must be -1 without compiled kernels, got {plan}")
    compute = accumulate_dtype(x.dtype)
    weight = dequantize(
        qweight,
        scales.to(compute),
        bits,
        group_size=group_size,
        in_features=x.shape[-1],
        out_features=out_features,
    )
    out = x.to(compute) @ weight.t()
    if bias is not None:
        out = out + bias.to(compute)
    return _finished(out, residual, swiglu, x.dtype)


def _finished(out: Tensor, residual: Tensor | None, swiglu: bool, dtype: torch.dtype) -> Tensor:
    """SwiGLU, residual and the one rounding, of sums with their bias."""
    if swiglu:
        gate, up = out.unflatten(-1, (-1, 2, 8)).unbind(-2)  # as `deinterleave`, with one copy less
        out = torch.nn.functional.silu(gate.flatten(-2)).view(up.shape).mul_(up).flatten(-2)
    return (out if residual is None else out + residual.to(out.dtype)).to(dtype)


@_library.fake("dequant_gemm")
def _(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    out_features: int,
    residual: Tensor | None = None,
    swiglu: bool = False,
    plan: int = -1,
    settled: bool = True,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features // 2 if swiglu else out_features)


# --- plans: which kernel runs --------------------------------------------------------------------

PLANS = Path(__file__).with_name("dequant_gemm_plans")  # one file of measured rows a GPU
_ROW = ("bits", "n", "k", "m", "plan")
# A plan's number is 1000 · family + variant (csrc/ops/dequant_gemm/plans.h).
_FAMILIES, _FAMILY, _VARIANTS = 4, 1000, 160
NUMBERS = [_FAMILY * family + i for family in range(_FAMILIES) for i in range(_VARIANTS)]

# Not ops: questions to the compiled library.
QUESTIONS = {
    "dequant_gemm_runs": "(Tensor x, Tensor qweight, Tensor scales, int bits, int group_size, "
    "int out_features, int plan) -> bool",
    "dequant_gemm_set_plans": "(str gpus, Tensor rows) -> ()",
}
for _name, _schema in QUESTIONS.items():
    torch.library.define(f"{_library.NAMESPACE}::{_name}", _schema)


def plans(
    x: Tensor, qweight: Tensor, scales: Tensor, bits: int, group_size: int, out_features: int
) -> list[int]:
    """The numbers of the kernels that can compute this call on a GPU, each a valid ``plan``."""
    runs = torch.ops.grace.dequant_gemm_runs
    arguments = (x, qweight, scales, bits, group_size, out_features)
    return [plan for plan in NUMBERS if runs(*arguments, plan)]


def set_plans(tables: Mapping[str, Iterable[Mapping[str, int]]]) -> None:
    """Replaces the tables by which kernels are chosen.

    Args:
        tables: by name of the GPU (``torch.cuda.get_device_name``), rows that each have ``bits``,
            ``n``, ``k``, ``m`` (the most rows of x that it is for) and ``plan``. A GPU without a
            table takes that of the GPU whose name begins most like its own.
    """
    rows = [
        [gpu, *(int(row[key]) for key in _ROW)]
        for gpu, table in enumerate(tables.values())
        for row in table
    ]
    in_rows = torch.tensor(rows, dtype=torch.int64).view(-1, 1 + len(_ROW))
    torch.ops.grace.dequant_gemm_set_plans("\n".join(tables), in_rows)


def load_plans() -> None:
    """Hands the committed tables of measured rows to the compiled kernels."""
    tables = [json.loads(path.read_text()) for path in sorted(PLANS.glob("*.json"))]
    set_plans({table["device"]: table["rows"] for table in tables})
