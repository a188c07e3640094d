"""The steps that are timed compute the same; what is told beside their times."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from benchmarks import bench_training_step as bench
from benchmarks.harness import Absent, Benchmark, Case, Ceiling, relative_error, run
from benchmarks.profiling import breakdown, component, phases
from benchmarks.training_step import Shape

CPU = torch.device("cpu")
SIZES = {"LLaVA": Shape(2, 1, 24, 16, 4), "Qwen3-VL": Shape(1, 2, 16, 4, 6)}


@pytest.fixture(scope="module", params=SIZES)
def step(request: pytest.FixtureRequest) -> bench.Step:
    names = (f"tiny {request.param} student", f"tiny {request.param} teacher")
    return bench.Step(*names, SIZES[request.param], torch.float32, CPU)


def test_ours_is_the_authors_step(step: bench.Step) -> None:
    loss = step.trainer.compute_loss(step.student, dict(step.batch))
    torch.testing.assert_close(loss, step.authors.loss(), rtol=1e-5, atol=1e-5)
    ours, held, theirs = step.ours(), step.other_way(), step.theirs()
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-7)
    assert torch.equal(ours, held)
    assert ours.norm() > 0
    assert all(p.grad is None for p in step.student.parameters())


@pytest.mark.parametrize("kind", SIZES)
def test_masters_in_bfloat16(kind: str) -> None:
    names = (f"tiny {kind} student", f"tiny {kind} teacher")
    step = bench.Step(*names, SIZES[kind], torch.bfloat16, CPU)
    dtypes = {n: p.dtype for n, p in step.student.named_parameters()}
    scales = {n for n, dtype in dtypes.items() if dtype == torch.float32}
    assert scales == {n for n in dtypes if n.endswith("log_scale")}
    for ours, plain in zip(step.student.buffers(), step.plain.buffers(), strict=True):
        assert torch.equal(ours, plain)
    ours, theirs = step.ours(), step.theirs()
    assert ours.dtype == torch.bfloat16
    assert relative_error(ours, theirs.double()) < 0.1


def test_fine_tuning_has_the_same_weights_unquantized(step: bench.Step) -> None:
    kinds = {type(m).__name__ for m in step.plain.modules()}
    assert "FakeQuantLinear" not in kinds
    assert "EagerLinear" not in kinds
    ours = {id(p) for n, p in step.student.named_parameters() if not n.endswith("log_scale")}
    assert ours == {id(p) for p in step.plain.parameters()}
    assert not torch.equal(step.fine_tuning(), step.ours())


def test_segments_that_are_packed_do_not_see_each_other() -> None:
    names = ("tiny Qwen3-VL student", "tiny Qwen3-VL teacher")
    step = bench.Step(*names, SIZES["Qwen3-VL"], torch.float32, CPU)
    inputs = step.authors.inputs
    other = {**inputs, "input_ids": inputs["input_ids"].clone()}
    other["input_ids"][0, 8] += 1  # a text token of the first segment
    model = step.trainer.teacher.model
    with torch.no_grad():
        a, b = (model(**given, use_cache=False).logits[0] for given in (inputs, other))
    assert torch.equal(a[16:], b[16:])
    assert not torch.equal(a[8:16], b[8:16])


def test_phases_and_breakdown() -> None:
    names = ("tiny LLaVA student", "tiny LLaVA teacher")
    step = bench.Step(*names, SIZES["LLaVA"], torch.float32, CPU)
    found = step.phases()
    assert list(found) == ["teacher", "student and losses", "backward"]
    assert min(found.values()) > 0
    spent = breakdown(step.ours, CPU, 1e6)
    assert {"fake_quant", "gated_dkd", "cka", "matrix products", "idle"} <= set(spent)
    assert min(spent.values()) >= 0
    assert sum(spent.values()) == pytest.approx(1e6, abs=0.1)


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        ("void grace::fake_quant::(anonymous namespace)::tiles_kernel<float>", "fake_quant"),
        ("grace::gated_dkd::gated_dkd_backward_kernel<grace::bf16>", "gated_dkd"),
        ("void grace::cka::gram_kernel<128>(grace::cka::Args)", "cka"),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNN", "matrix products"),
        ("void pytorch_flash::flash_fwd_kernel<cutlass::bfloat16_t>", "attention"),
        ("void cunn_SoftMaxForward<4, float, float>", "softmax and cross-entropy"),
        ("Memcpy DtoD (Device -> Device)", "copies and casts"),
        ("void at::native::vectorized_elementwise_kernel<4>", "elementwise and reductions"),
        ("void at::native::indexSelectLargeIndex<float>", "gathers"),
        ("mystery", "other"),
    ],
)
def test_components(kernel: str, expected: str) -> None:
    assert component(kernel) == expected


def test_phases_are_in_order() -> None:
    seen: list[str] = []
    steps = [(name, lambda name=name: seen.append(name)) for name in "ab"]
    assert list(phases(steps, CPU)) == ["a", "b"]
    assert seen == ["a", "b"]


def test_what_does_not_fit_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    small = SimpleNamespace(total_memory=80 * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: small)
    sizes = [
        bench.size_of(bench.empty_model(bench.config_of(n)))
        for n in bench.PAIRS["LLaVA-1.5-7B<13B"]
    ]
    shape = Shape(4, 1, 1024, 576, 256)
    assert bench.shortage(*sizes, shape, torch.bfloat16) == ""
    assert "needs about 86 GiB, this GPU has 75" in bench.shortage(*sizes, shape, torch.float32)

    def fail() -> None:
        raise torch.OutOfMemoryError("tried to allocate 9 GiB\nand more")

    with pytest.raises(Absent, match=r"does not fit: tried to allocate 9 GiB$"):
        bench.fitting(fail)(0)


def test_every_size_of_the_sweep_has_its_models() -> None:
    for sizes in bench.BENCHMARK.sweep.values():
        for size in sizes:
            assert set(size) == set(bench._KEYS)
            assert size["pair"] in bench.PAIRS
            assert size["visual"] + size["supervised"] < size["tokens"]


def test_the_harness_asks_for_facts_and_takes_few_samples() -> None:
    calls: list[int] = []

    def side(_: int) -> torch.Tensor:
        calls.append(1)
        return torch.ones(2)

    def setup(device: torch.device) -> Case:
        facts = {"grace": lambda medians: {"sides": sorted(medians)}}
        return Case(
            {"grace": side, "peer": side}, lambda: torch.ones(2), 1.0, rounds=1, facts=facts
        )

    benchmark = Benchmark("made up", {"cpu": [{}]}, setup)
    rows = next(iter(run(benchmark, CPU, Ceiling(1.0, 1.0), rounds=50)))
    assert [row.get("sides") for row in rows] == [["grace", "peer"], None]
