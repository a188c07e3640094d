"""dequant_gemm: every plan that runs a call, with every epilogue; what chooses among plans.

A plan is one kernel (`grace.ops.dequant_gemm.plans`); a CPU has none, and is held to the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from conftest import Kernels
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import assert_accurate, to_double
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from windows import assert_margins_untouched, windowed

from grace.ops import dequant_gemm, load_plans
from grace.ops.dequant_gemm import NUMBERS, reference
from grace.packing import BF16_SCALES_BELOW, pack

BITS = [4, 8]
HALVES = [torch.bfloat16, torch.float16]
EPILOGUES = list(itertools.product([False, True], repeat=3))  # bias, residual, swiglu
PORTABLE, WARPGROUP = 1000, 3000
ANY_FIXTURE = [HealthCheck.function_scoped_fixture]


@dataclass(frozen=True)
class Call:
    """The op's arguments, and the two ways to compute them."""

    x: Tensor
    qweight: Tensor
    scales: Tensor
    bias: Tensor | None
    bits: int
    group_size: int
    n: int
    residual: Tensor | None = None
    swiglu: bool = False

    @property
    def arguments(self) -> tuple[object, ...]:
        """Positional arguments of the op, but for the plan."""
        weight = (self.x, self.qweight, self.scales, self.bias, self.bits, self.group_size, self.n)
        return (*weight, self.residual, self.swiglu)

    def on(self, device: str) -> Call:
        """The same on another device."""
        tensors = {key: v for key, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **{key: v.to(device) for key, v in tensors.items()})

    def run(self, kernels: Kernels, plan: int = -1) -> Tensor:
        """By the kernels, where they are."""
        if kernels.cuda_kernels:
            return kernels.dequant_gemm(*self.on(kernels.device).arguments, plan)
        return self.public()

    def public(self) -> Tensor:
        """By the public function, where the tensors are."""
        sizes = {"bits": self.bits, "group_size": self.group_size, "out_features": self.n}
        weight = (self.x, self.qweight, self.scales, self.bias)
        return dequant_gemm(*weight, **sizes, residual=self.residual, swiglu=self.swiglu)

    def plans(self, kernels: Kernels) -> list[int]:
        """Plans that run this call; -1, which chooses, is the first."""
        if not kernels.cuda_kernels:
            return [-1]
        c = self.on(kernels.device)
        asked = (c.x, c.qweight, c.scales, c.bits, c.group_size, c.n)
        return [-1, *(plan for plan in NUMBERS if kernels.dequant_gemm_runs(*asked, plan))]

    def rows(self, rows: int) -> Call:
        """The first rows of x."""
        residual = None if self.residual is None else self.residual[:rows]
        return replace(self, x=self.x[:rows], residual=residual)


def make_call(
    m: int = 5,
    n: int = 80,
    k: int = 256,
    bits: int = 4,
    group_size: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    bias: bool = True,
    residual: bool = False,
    swiglu: bool = False,
) -> Call:
    half = 2 ** (bits - 1)
    codes = torch.randint(-half, half, (n, k), dtype=torch.int8)
    scales = torch.rand(n, 1 if group_size == -1 else k // group_size).add(0.1).div(half)
    packed = pack(codes, scales.to(dtype), bits)
    x = torch.randn(m, k).to(dtype)
    added = torch.randn(m, n // 2 if swiglu else n).to(dtype) if residual else None
    b = torch.randn(n).to(dtype) if bias else None
    return Call(x, *packed, b, bits, group_size, n, added, swiglu)


class Exact:
    """A call's result in float64, and what the oracle allows beside it.

    64 more rows of x tell what the reference's own error is at all.
    """

    def __init__(self, call: Call) -> None:
        self.rows = len(call.x)
        x = torch.cat([call.x, torch.randn(64, call.x.shape[-1]).to(call.x.dtype)])
        residual = call.residual
        if residual is not None:
            residual = torch.cat([residual, torch.randn(64, residual.shape[1]).to(residual.dtype)])
        more = replace(call, x=x, residual=residual).arguments
        self.exact, self.working = reference(*to_double(*more)), reference(*more)

    def check(self, actual: Tensor, plan: int) -> None:
        whole = torch.cat([actual.cpu(), self.working[self.rows :]])
        assert_accurate(whole, self.exact, self.working, name=f"plan {plan}")


def check_every_plan(kernels: Kernels, call: Call) -> int:
    """Holds every plan to the oracle, and gives their number."""
    exact, plans = Exact(call), call.plans(kernels)
    for plan in plans:
        exact.check(call.run(kernels, plan), plan)
    return len(plans)


# --- dequantization, exhaustively ----------------------------------------------------------------

# From here on the warpgroup kernels round a bfloat16 weight once. Below, the weight or the offset
# of its code, held times 2^-30, may be less than the smallest normal number, 2^-126, and taken for
# zero.
ROUNDED_ONCE_ABOVE = 2.0**-90
TAKEN_FOR_ZERO = 2.0**-126 * 2.0**30


def sweep(dtype: torch.dtype, largest: float) -> Tensor:
    """Scales from the smallest subnormal to ``largest``, zero and negative ones."""
    info = torch.finfo(dtype)
    smallest = info.smallest_normal * info.eps
    steps = torch.linspace(0, 1, 26, dtype=torch.float64)
    scales = smallest * (largest / smallest) ** steps
    more = [0.0, info.smallest_normal, 1 / 3, -1 / 3, -(2.0**-17), -largest]
    return torch.cat([scales, torch.tensor(more, dtype=torch.float64)]).to(dtype)


def one_hot_call(
    m: int, bits: int, group_size: int, dtype: torch.dtype, warpgroup: bool
) -> tuple[Call, Tensor, Tensor]:
    """Rows of x that pick one column each, so that results are weights; those weights; scales.

    Row by row of x and over the rows of the weight, every code meets every scale of the sweep.
    """
    half, k = 2 ** (bits - 1), 256
    largest = torch.finfo(dtype).max
    if dtype == torch.bfloat16:
        largest = BF16_SCALES_BELOW * (1 - torch.finfo(dtype).eps / 2)
    elif warpgroup:  # its float16 weights have to be finite themselves
        largest = largest / half
    scales = sweep(dtype, largest)
    blocks = 2 * half // 8  # of eight codes: a row of the weight has one of them
    n = len(scales) * blocks
    rows, groups = torch.arange(n), torch.arange(k // group_size)
    scale = scales[(rows[:, None] // blocks + groups) % len(scales)]
    codes = torch.randint(-half, half, (n, k), dtype=torch.int8)
    columns = (37 * torch.arange(m) + 5) % k
    for i, column in enumerate(columns):
        codes[:, column] = (rows % blocks * 8 + i % 8 - half).to(torch.int8)
    x = torch.zeros(m, k, dtype=dtype)
    x[torch.arange(m), columns] = 1
    picked = scale.repeat_interleave(group_size, 1)[:, columns].t()
    weight = codes[:, columns].t().double() * picked.double()
    return Call(x, *pack(codes, scale, bits), None, bits, group_size, n), weight, picked


@pytest.mark.parametrize("m", [8, 120])
@pytest.mark.parametrize("group_size", [32, 128])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bits", BITS)
def test_every_plan_dequantizes_exactly(kernels: Kernels, bits, dtype, group_size, m):
    for warpgroup in (False, True):
        call, weight, scale = one_hot_call(m, bits, group_size, dtype, warpgroup)
        plans = [p for p in call.plans(kernels)[1:] if (p >= WARPGROUP) == warpgroup]
        if not kernels.cuda_kernels:
            plans = [-1]
        for plan in plans:
            actual = call.run(kernels, plan).cpu()
            exact = weight.to(dtype)
            if warpgroup and dtype == torch.bfloat16 and plan >= 0:
                tiny = scale.abs() < ROUNDED_ONCE_ABOVE
                error = (actual.double() - weight).abs() - weight.abs() * 2.0**-9
                assert error[tiny].max() <= 2 * TAKEN_FOR_ZERO, f"plan {plan}"
                actual, exact = actual[~tiny], exact[~tiny]
            assert torch.equal(actual, exact), f"plan {plan}"


# --- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bias", "residual", "swiglu"), EPILOGUES)
@pytest.mark.parametrize("dtype", HALVES)
def test_every_plan_is_accurate_with_every_epilogue(
    kernels: Kernels, dtype, bias, residual, swiglu
):
    for m, bits, group_size in ((1, 8, 64), (3, 4, 32), (13, 8, 32), (30, 4, 128), (70, 8, 64)):
        call = make_call(
            m,
            n=80,  # an epilogue ends within a tile
            k=384,
            bits=bits,
            group_size=group_size,
            dtype=dtype,
            bias=bias,
            residual=residual,
            swiglu=swiglu,
        )
        assert check_every_plan(kernels, call) > (2 if kernels.cuda_kernels else 0)


@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("bits", BITS)
def test_float16_x_takes_scales_as_they_are_trained(kernels: Kernels, bits, group_size):
    for m in (3, 70):
        call = make_call(m, 80, 384, bits, group_size, torch.float16)
        trained = call.scales.bfloat16().clamp_min(2.0**-17)
        check_every_plan(kernels, replace(call, scales=trained))


@settings(max_examples=15, deadline=None, suppress_health_check=ANY_FIXTURE)
@given(data=st.data())
def test_every_plan_is_accurate_at_any_shape(kernels: Kernels, data: st.DataObject):
    group_size = data.draw(st.sampled_from([16, 32, 64, 128, 192]) | st.integers(1, 80))
    groups = data.draw(st.integers(1, 4))
    swiglu = data.draw(st.booleans())
    n = data.draw(st.integers(0, 12)) * 16 if swiglu else data.draw(st.integers(0, 200))
    call = make_call(
        m=data.draw(st.integers(0, 40)),
        n=n,
        k=group_size * groups,
        bits=data.draw(st.sampled_from(BITS)),
        group_size=data.draw(st.sampled_from([group_size, -1])),
        dtype=data.draw(st.sampled_from(HALVES)),
        bias=data.draw(st.booleans()),
        residual=data.draw(st.booleans()),
        swiglu=swiglu,
    )
    check_every_plan(kernels, call)


def test_residual_is_added_before_the_one_rounding(kernels: Kernels):
    # 1 + 2^-8 rounds to 1 in bfloat16; with -1 added before, 2^-8 is left.
    packed = pack(torch.ones(16, 64, dtype=torch.int8), torch.ones(16, 1).bfloat16(), 4)
    x = torch.zeros(2, 64).bfloat16()
    x[:, 0], x[:, 63] = 1, 2.0**-8
    call = Call(x, *packed, None, 4, -1, 16, torch.full((2, 16), -1.0).bfloat16())
    for plan in call.plans(kernels):
        assert torch.equal(call.run(kernels, plan).cpu(), torch.full((2, 16), 2.0**-8).bfloat16())


# --- properties ----------------------------------------------------------------------------------


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_rows_do_not_depend_on_each_other_nor_on_their_number(kernels: Kernels, bits, swiglu):
    call = make_call(16, bits=bits, residual=True, swiglu=swiglu)
    for plan in call.plans(kernels)[1:] or [-1]:
        expected = call.run(kernels, plan)
        assert torch.equal(call.run(kernels, plan), expected), f"plan {plan}: repeated"
        for rows in (1, 2, 7, 9, 15):
            fewer = call.rows(rows)
            if plan == -1 or plan in fewer.plans(kernels):
                assert torch.equal(fewer.run(kernels, plan), expected[:rows]), f"plan {plan}"
        for row in (0, 6, 15):
            x = torch.full_like(call.x, torch.nan)
            x[row] = call.x[row]
            others = replace(call, x=x).run(kernels, plan)
            assert torch.equal(others[row], expected[row]), f"plan {plan}"
            assert others.isnan().sum() == 15 * others.shape[1], f"plan {plan}"


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize(("k", "group_size"), [(256, 64), (200, -1)])
@pytest.mark.parametrize("bits", BITS)
def test_epilogues_stay_inside_their_tensors(kernels: Kernels, bits, k, group_size, swiglu):
    for m in (1, 11):
        call = make_call(m, 80, k, bits, group_size, residual=True, swiglu=swiglu)
        call = call.on(kernels.device)
        names = [name for name, value in vars(call).items() if isinstance(value, Tensor)]
        cut = {name: windowed(getattr(call, name)) for name in names}
        inside = replace(call, **{name: pair[0] for name, pair in cut.items()})
        for plan in call.plans(kernels):
            actual = inside.run(kernels, plan)
            assert not actual.isnan().any(), f"plan {plan}"
            assert torch.equal(actual, call.run(kernels, plan)), f"plan {plan}"
        for name, (tensor, buffer) in cut.items():
            assert_margins_untouched(buffer)
            assert torch.equal(tensor, getattr(call, name)), f"{name} was written to"


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize(("m", "n"), [(0, 80), (5, 0), (0, 0)])
def test_empty_calls(kernels: Kernels, m, n, swiglu):
    call = make_call(m, n, residual=True, swiglu=swiglu)
    assert call.run(kernels).shape == (m, n // 2 if swiglu else n)


def test_compiles_with_an_epilogue(kernels: Kernels):
    if kernels.namespace != "grace":
        pytest.skip("the public function has no way to the emulation")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(Call.public, fullgraph=True, backend=counter, dynamic=True)
    base = make_call(40, residual=True, swiglu=True).on(kernels.device)
    for m in (5, 6, 33):
        call = base.rows(m)
        assert torch.equal(compiled(call), call.public())
    assert counter.frame_count == 1


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("m", [1, 8, 64])
def test_captured_graphs_replay_bitwise(kernels: Kernels, m, swiglu):
    if kernels.device != "cuda":
        pytest.skip("a CPU captures no graphs")
    call = make_call(m, k=1024, residual=True, swiglu=swiglu).on("cuda")
    original = call.x.clone()
    for plan in call.plans(kernels):
        call.run(kernels, plan)  # what a kernel sets up at its first launch is not captured
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call.run(kernels, plan)
        for x in (torch.randn_like(original), original):
            call.x.copy_(x)
            graph.replay()
            assert torch.equal(captured, call.run(kernels, plan)), f"plan {plan}"


# --- which plan runs -----------------------------------------------------------------------------


def set_tables(kernels: Kernels, tables: dict[str, tuple[tuple[int, ...], ...]]) -> None:
    rows = [(gpu, *row) for gpu, table in enumerate(tables.values()) for row in table]
    in_rows = torch.tensor(rows, dtype=torch.int64).view(-1, 6)
    kernels.dequant_gemm_set_plans("\n".join(tables), in_rows)


@pytest.fixture
def set_table(kernels: Kernels) -> Iterator[object]:
    """Sets the table of plans of the kernels, for any GPU; as it was, at the end."""
    if not kernels.cuda_kernels:
        pytest.skip("a CPU has no plans")

    def set_table(*rows: tuple[int, ...]) -> None:
        set_tables(kernels, {"any": rows})

    yield set_table
    set_table()
    if kernels.namespace == "grace":
        load_plans()


def two_orders(kernels: Kernels, m: int) -> tuple[Call, int, list[Tensor]]:
    """A call, a plan that adds in another order than plan 0, and the results of 0 and of it.

    The call subtracts what it gives itself: what is left shows the order.
    """
    call = make_call(m, k=512, dtype=torch.float16)
    call = replace(call, residual=-call.run(kernels, 0).cpu())
    first = call.run(kernels, 0)
    for plan in call.plans(kernels)[1:]:
        if not torch.equal(call.run(kernels, plan), first):
            return call, plan, [first, call.run(kernels, plan)]
    pytest.fail("all kernels add in one order: nothing tells which of them runs")


def test_the_table_says_which_plan_runs(kernels: Kernels, set_table):
    few, for_few, few_results = two_orders(kernels, 3)
    many, for_many, many_results = two_orders(kernels, 30)
    set_table((4, 80, 512, 4, 0), (4, 80, 512, 16, for_many))
    assert torch.equal(few.run(kernels), few_results[0])
    assert torch.equal(many.run(kernels), many_results[1])  # beyond the last row: the last row
    set_table((4, 80, 512, 64, 0), (4, 80, 512, 4, for_few))  # in any order
    assert torch.equal(few.run(kernels), few_results[1])
    assert torch.equal(many.run(kernels), many_results[0])
    # The most similar layer's rows, at this width only.
    set_table((4, 64, 512, 64, 0), (4, 8000, 512, 64, for_few), (8, 80, 512, 64, for_few))
    assert torch.equal(few.run(kernels), few_results[0])
    set_table((4, 64, 512, 64, for_few), (4, 8000, 512, 64, 0), (8, 80, 512, 64, 0))
    assert torch.equal(few.run(kernels), few_results[1])
    # A plan that does not run the call is passed over.
    set_table((4, 80, 512, 64, 2999))
    passed_over = few.run(kernels)
    set_table()
    assert torch.equal(passed_over, few.run(kernels))


def test_a_gpu_without_a_table_takes_that_of_the_most_similar_name(kernels: Kernels, set_table):
    call, plan, results = two_orders(kernels, 3)
    name = "emulated" if kernels.namespace != "grace" else torch.cuda.get_device_name()
    here, other = ((4, 80, 512, 64, plan),), ((4, 80, 512, 64, 0),)
    for tables, expected in (
        ({"another": other, name: here}, 1),
        ({name[:5]: here, name[:3]: other, "another": other}, 1),
        ({name[:5]: other, name + " Super": here}, 1),
        ({name: other, name[:5]: here}, 0),
    ):
        set_tables(kernels, tables)
        assert torch.equal(call.run(kernels), results[expected]), tables


@pytest.mark.parametrize("plan", [1, 999, 1001, 2900, 3900, 4000, 10**6, -2, -1001])
def test_plans_that_are_not_there_are_refused(kernels: Kernels, plan):
    message = rf"plan {plan} does not run this call"
    if not kernels.cuda_kernels:
        message = rf"plan must be -1 on a CPU, got {plan}"
    call = make_call().on(kernels.device)
    with pytest.raises(RuntimeError, match=message):
        kernels.dequant_gemm(*call.arguments[:7], None, False, plan)


def test_plans_that_do_not_run_a_call_are_refused(kernels: Kernels):
    if not kernels.cuda_kernels:
        pytest.skip("a CPU has no plans")
    odd = make_call(k=240, group_size=24)
    assert odd.plans(kernels) == [-1, 0]
    with pytest.raises(RuntimeError, match="plan 1000 does not run this call"):
        odd.run(kernels, PORTABLE)
    many = make_call(33)
    assert not [plan for plan in many.plans(kernels) if 2000 <= plan < WARPGROUP]
    with pytest.raises(RuntimeError, match="plan 2001 does not run this call"):
        many.run(kernels, 2001)


def test_without_compiled_kernels_there_is_no_plan():
    with pytest.raises(RuntimeError, match="plan must be -1 without compiled kernels, got 0"):
        reference(*make_call().arguments, 0)
