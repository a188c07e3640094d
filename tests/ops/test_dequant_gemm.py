"""dequant_gemm: every kernel against float64, exhaustive dequantization, properties, bad input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from conftest import Kernels
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import assert_accurate, to_double
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from windows import assert_margins_untouched, windowed

from grace.ops import dequant_gemm
from grace.ops.dequant_gemm import reference
from grace.packing import BF16_SCALES_BELOW, SCALE_DTYPES, pack

BITS = [4, 8]
HALVES = [torch.bfloat16, torch.float16]
ANY_FIXTURE = [HealthCheck.function_scoped_fixture]


@dataclass(frozen=True)
class Path:
    """One way through the kernels, with the dtypes of x that it takes."""

    kernels: Kernels
    dtypes: list[torch.dtype]

    def __call__(self, *arguments: Any) -> Tensor:
        return self.kernels.dequant_gemm(*self.kernels.put(*arguments)).cpu()


def runs(capability: str) -> bool:
    """Whether this CPU has it, by PyTorch's account."""
    if capability == "amx":
        return torch.cpu._is_amx_tile_supported()
    if capability == "avx512bf16":
        return torch.cpu._is_avx512_bf16_supported()
    known = torch.backends.cpu.get_cpu_capability()  # AVX512, AVX2, …
    return {"avx512": "AVX512", "avx2": "AVX"}[capability] in known


CAPABILITIES = ("amx", "avx512bf16", "avx512", "avx2", "default")


@pytest.fixture(
    params=[*CAPABILITIES, "emulated", pytest.param("cuda", marks=pytest.mark.gpu)],
)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every CPU kernel, and the CUDA kernels emulated and, where there is a GPU, on it."""
    if request.param == "emulated":
        return Path(request.getfixturevalue("emulated"), HALVES)
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no GPU")
        return Path(Kernels("grace", "cuda"), HALVES)
    if request.param != "default" and not runs(request.param):
        pytest.skip(f"this CPU has no {request.param}")
    monkeypatch.setenv("GRACE_CPU_CAPABILITY", request.param)
    return Path(Kernels("grace", "cpu"), [torch.float32, *HALVES])


def make_case(
    m: int = 5,
    n: int = 70,
    k: int = 128,
    bits: int = 4,
    group_size: int = 32,
    dtype: torch.dtype = torch.bfloat16,
    scale_dtype: torch.dtype = torch.bfloat16,
    bias: bool = True,
) -> tuple[Any, ...]:
    """Positional arguments of the op."""
    half = 2 ** (bits - 1)
    codes = torch.randint(-half, half, (n, k), dtype=torch.int8)
    scales = torch.rand(n, 1 if group_size == -1 else k // group_size).add(0.1).div(half)
    qweight, packed_scales = pack(codes, scales.to(scale_dtype), bits)
    x = torch.randn(m, k).to(dtype)
    b = torch.randn(n).to(dtype) if bias else None
    return x, qweight, packed_scales, b, bits, group_size, n


def check(path: Path, arguments: tuple[Any, ...]) -> None:
    """The oracle's rule; 64 more rows of x tell what the reference's own error is at all."""
    x, *rest = arguments
    more = torch.cat([x, torch.randn(64, x.shape[-1]).to(x.dtype)])
    exact, working = reference(*to_double(more, *rest)), reference(more, *rest)
    actual = path(x, *rest)
    assert actual.shape == (len(x), rest[-1])
    assert_accurate(torch.cat([actual, working[len(x) :]]), exact, working)


def through_op(arguments: tuple[Any, ...]) -> Tensor:
    """The public function on the op's positional arguments."""
    *tensors, bits, group_size, n = arguments
    return dequant_gemm(*tensors, bits=bits, group_size=group_size, out_features=n)


# --- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 17, 40, 150])
@pytest.mark.parametrize("group_size", [16, 32, 64, 128, -1])
@pytest.mark.parametrize("bits", BITS)
def test_is_accurate(path: Path, bits, group_size, m):
    for dtype in path.dtypes:
        check(path, make_case(m, n=72, k=256, bits=bits, group_size=group_size, dtype=dtype))


@pytest.mark.parametrize("m", [3, 21])
@pytest.mark.parametrize("k", [1, 60, 64, 130, 300])
@pytest.mark.parametrize("bits", BITS)
def test_one_group_ends_anywhere(path: Path, bits, k, m):
    for dtype in path.dtypes:
        check(path, make_case(m, n=130, k=k, bits=bits, group_size=-1, dtype=dtype))


@settings(max_examples=30, deadline=None, suppress_health_check=ANY_FIXTURE)
@given(data=st.data())
def test_any_shape(path: Path, data):
    group_size = data.draw(st.integers(1, 80) | st.sampled_from([16, 32, 48, 64, 128, 192]))
    groups = data.draw(st.integers(1, 4))
    one_group = data.draw(st.booleans())
    check(
        path,
        make_case(
            m=data.draw(st.integers(0, 12)),
            n=data.draw(st.integers(0, 140)),
            k=group_size * groups,
            bits=data.draw(st.sampled_from(BITS)),
            group_size=-1 if one_group else group_size,
            dtype=data.draw(st.sampled_from(path.dtypes)),
            scale_dtype=data.draw(st.sampled_from(SCALE_DTYPES)),
            bias=data.draw(st.booleans()),
        ),
    )


def sweep_of_scales(dtype: torch.dtype) -> Tensor:
    """From the smallest subnormal to the largest that `pack` takes, at a finite product."""
    info = torch.finfo(dtype)
    smallest = info.smallest_normal * info.eps
    largest = min(info.max, torch.finfo(torch.float32).max / 256)
    if dtype == torch.bfloat16:
        largest = BF16_SCALES_BELOW * (1 - info.eps / 2)
    steps = torch.linspace(0, 1, 63, dtype=torch.float64)
    scales = smallest * (largest / smallest) ** steps
    return torch.cat([scales, torch.tensor([1 / 3, 2.0**-17])]).to(dtype)


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
@pytest.mark.parametrize("bits", BITS)
def test_dequantization_is_exact(path: Path, bits, scale_dtype):
    half = 2 ** (bits - 1)
    for dtype in path.dtypes:
        scales = sweep_of_scales(scale_dtype)
        if path.kernels.device == "cuda" and scale_dtype != torch.float32:
            least, most = exact_on_a_gpu(dtype, scale_dtype)
            scales = scales[(scales.float() >= least) & (scales.float() < most)]
        codes = torch.arange(-half, half, dtype=torch.int8).repeat(len(scales), 1)
        qweight, packed_scales = pack(codes, scales[:, None], bits)
        weight = codes.float() * scales.float()[:, None]
        eye = torch.eye(2 * half, dtype=dtype)  # gives the weights themselves
        actual = path(eye, qweight, packed_scales, None, bits, -1, len(scales))
        assert torch.equal(actual, weight.t().to(dtype))


def exact_on_a_gpu(dtype: torch.dtype, scale_dtype: torch.dtype) -> tuple[float, float]:
    """Scales whose weights are exact as numbers of x's dtype; test_dequant_gemm_plans.py has the
    extremes."""
    if dtype == torch.float16 and scale_dtype == torch.bfloat16:
        return 2.0**-17, 500
    return (2.0**-90, BF16_SCALES_BELOW) if scale_dtype == torch.bfloat16 else (0, 500)


def test_float64_is_the_reference():
    arguments = to_double(*make_case()[:1]) + make_case()[1:3] + (None, 4, 32, 70)
    actual = through_op(arguments)
    assert actual.dtype == torch.float64
    assert torch.equal(actual, reference(*arguments))


# --- properties ----------------------------------------------------------------------------------


@pytest.mark.parametrize("group_size", [64, 32, 24])
@pytest.mark.parametrize("m", [2, 9, 70])
def test_a_row_does_not_depend_on_the_others(path: Path, m, group_size):
    x, *rest = make_case(m, k=192, group_size=group_size)
    expected = path(x, *rest)
    for row in (0, m // 2, m - 1):
        others = torch.full_like(x, float("nan"))
        others[row] = x[row]
        assert torch.equal(path(others, *rest)[row], expected[row])


@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize("bits", BITS)
def test_a_row_on_a_cpu_does_not_depend_on_their_number(path: Path, bits, group_size):
    if path.kernels.cuda_kernels:
        pytest.skip("holds within one CUDA kernel")
    for dtype in path.dtypes:
        x, *rest = make_case(260, n=72, k=320, bits=bits, group_size=group_size, dtype=dtype)
        expected = path(x, *rest)
        for rows in (1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 64, 65, 129, 257):
            assert torch.equal(path(x[:rows], *rest), expected[:rows])


@pytest.mark.parametrize("number_of_threads", [1, 2, 3])
def test_threads_do_not_change_a_result(path: Path, number_of_threads):
    arguments = make_case(m=20, n=300, k=256, group_size=128)
    expected, before = path(*arguments), torch.get_num_threads()
    torch.set_num_threads(number_of_threads)
    try:
        assert torch.equal(path(*arguments), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 3e4, 1e-4])
@pytest.mark.parametrize("group_size", [32, 64])
def test_extreme_values_of_x(path: Path, group_size, value):
    """What is not finite stays what it is, beside values that are."""
    for dtype in path.dtypes:
        x, qweight, scales, _, *rest = make_case(m=6, k=128, group_size=group_size, dtype=dtype)
        codes = torch.full((70, 128), 3, dtype=torch.int8)
        qweight, scales = pack(codes, torch.full((70, 128 // group_size), 0.25), 4)
        x[2, 5] = value
        check(path, (x, qweight, scales, None, *rest))


@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize("bits", BITS)
def test_repeats_bitwise(path: Path, bits, group_size):
    arguments = make_case(m=33, n=200, k=320, bits=bits, group_size=group_size)
    assert torch.equal(path(*arguments), path(*arguments))


@pytest.mark.parametrize("m", [1, 20, 200])
def test_a_weight_that_was_just_written(path: Path, m):
    codes, scales = torch.randint(-8, 8, (200, 256), dtype=torch.int8), torch.rand(200, 2)
    x = torch.randn(m, 256).to(path.dtypes[0])
    given = (x, *pack(codes, scales.bfloat16(), 4), None, 4, 128, 200, None, False, -1)
    assert path(*given, False).equal(path(*given, True))


@pytest.mark.parametrize("m", [1, 6, 40])
@pytest.mark.parametrize("k", [128, 100])
@pytest.mark.parametrize("bits", BITS)
def test_kernels_stay_inside_their_tensors(path: Path, bits, k, m):
    group_size = 32 if k == 128 else -1
    *tensors, bits, group_size, n = make_case(m, n=70, k=k, bits=bits, group_size=group_size)
    expected = path(*tensors, bits, group_size, n)
    cut = [windowed(t) for t in path.kernels.put(*tensors)]
    actual = path(*(inside for inside, _ in cut), bits, group_size, n)
    assert torch.equal(actual, expected)
    for _, buffer in cut:
        assert_margins_untouched(buffer)


def test_x_need_not_be_aligned(path: Path):
    x, *rest = make_case(m=9)
    shifted = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)
    assert torch.equal(path(shifted, *rest), path(x, *rest))


# --- the public function -------------------------------------------------------------------------


def test_shapes_of_x():
    x, *rest = make_case(m=6)
    flat = through_op((x, *rest))
    assert torch.equal(through_op((x.view(2, 3, -1), *rest)), flat.view(2, 3, -1))
    assert torch.equal(through_op((x[0], *rest)), flat[0])
    assert torch.equal(through_op((x.t().contiguous().t(), *rest)), flat)
    assert through_op((x[:0].view(0, 4, 128), *rest)).shape == (0, 4, 70)


def test_opcheck():
    for bias in (True, False):
        torch.library.opcheck(torch.ops.grace.dequant_gemm, make_case(bias=bias))


def test_compiles_once_for_all_batch_sizes():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(through_op, fullgraph=True, backend=counter, dynamic=True)
    _, *rest = make_case()
    for m in (5, 6, 9, 33):
        arguments = (torch.randn(m, 128).bfloat16(), *rest)
        assert torch.equal(compiled(arguments), through_op(arguments))
    assert counter.frame_count == 1


def test_capability_is_checked(monkeypatch):
    monkeypatch.setenv("GRACE_CPU_CAPABILITY", "avx3")
    with pytest.raises(
        RuntimeError, match=r"must be default, avx2, avx512, avx512bf16 or amx, got avx3"
    ):
        through_op(make_case())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, 127).bfloat16()}, r"x must have 128 features, got 127"),
        (
            {"x": torch.zeros(2, 128).int()},
            r"x must be float16, bfloat16 or float32, got torch.int",
        ),
        ({"x": torch.tensor(1.0)}, r"x must have at least one dimension"),
        ({"bits": 8}, r"qweight must have 1024 words a tile at 8 bits, got 512"),
        ({"bits": 2}, r"bits must be 4 or 8, got 2"),
        (
            {"group_size": 64},
            r"group_size must be -1 or make 65 to 128 features with 4 groups, got",
        ),
        ({"group_size": 0}, r"group_size must be -1 or make .* got 0"),
        ({"group_size": -1}, r"scales must have one group a row at group_size -1, got 4"),
        ({"out_features": 129}, r"out_features must be 65 to 128, got 129"),
        (
            {"qweight": torch.zeros(2, 2, 512)},
            r"qweight must be int32 with 3 dimensions, contiguous",
        ),
        ({"scales": torch.ones(4, 70)}, r"scales must have shape \[G, 128\], got \[4, 70\]"),
        ({"scales": torch.ones(4, 128).int()}, r"scales must be floating with 2 dimensions"),
        (
            {"bias": torch.zeros(70)},
            r"bias must be torch.bfloat16 \[70\], got torch.float32 \[70\]",
        ),
        (
            {"bias": torch.zeros(71).bfloat16()},
            r"bias must be torch.bfloat16 \[70\], got .* \[71\]",
        ),
        ({"x": torch.zeros(2, 128, device="meta").half()}, r"qweight and scales must be on meta"),
    ],
)
def test_bad_arguments(changes, message):
    names = ("x", "qweight", "scales", "bias", "bits", "group_size", "out_features")
    arguments = dict(zip(names, make_case(m=2), strict=True))
    if "device" in message or changes.get("x", torch.zeros(1)).is_meta:
        arguments["bias"] = None
    with pytest.raises(ValueError, match="dequant_gemm: " + message):
        dequant_gemm(**{**arguments, **changes})


def test_one_group_knows_in_features_to_a_tile():
    x, *rest = make_case(k=100, group_size=-1)
    with pytest.raises(ValueError, match=r"x must have 65 to 128 features, got 64"):
        through_op((x[:, :64], *rest))


@pytest.mark.gpu
def test_float32_is_refused_on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    arguments = [a.cuda() if isinstance(a, Tensor) else a for a in make_case(dtype=torch.float32)]
    with pytest.raises(ValueError, match=r"x must be float16 or bfloat16 on a GPU"):
        through_op(tuple(arguments))


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_fused_epilogue_is_accurate_on_a_cpu(swiglu, dtype):
    x, qweight, scales, bias, bits, group_size, n = make_case(m=9, n=96, dtype=dtype)
    residual = torch.randn(9, n // 2 if swiglu else n).to(dtype)
    sizes = {"bits": bits, "group_size": group_size, "out_features": n}
    actual = dequant_gemm(x, qweight, scales, bias, **sizes, residual=residual, swiglu=swiglu)
    arguments = (x, qweight, scales, bias, bits, group_size, n, residual, swiglu)
    assert_accurate(actual, reference(*to_double(*arguments)), reference(*arguments))
