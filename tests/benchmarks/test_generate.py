"""The benchmark of generation on tiny models, and the page that is made of its results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from benchmarks import bench_generate, generation, plot_generate, profile_kernels, results
from benchmarks.__main__ import available, load, start
from benchmarks.bench_generate import SIDES, Plan, merged, rows_of
from benchmarks.harness import Ceiling
from benchmarks.pages import Chart
from grace.generation import decoder
from grace.nn import FusedLinear, PackedLinear

CPU = torch.device("cpu")


def plan(**changes: Any) -> Plan:
    facts = {"models": ["tiny Qwen3-VL student"], "batches": [1, 2], "sides": []}
    return Plan(**{**facts, "new_tokens": 3, "repeats": 1, "profile": False, **changes})


def test_every_side_that_a_cpu_has_is_measured() -> None:
    rows = list(rows_of(plan(), CPU))
    assert [row["size"]["batch"] for row in rows] == [1, 2] * 5
    named = list(dict.fromkeys(row["side"] for row in rows))
    assert named == ["bf16", "bf16 graph", "grace", "grace graph prefill", "grace W8 head"]
    for row in rows:
        assert row["tokens_per_s"] > 0
        assert row["prefill_ms"] > 0
        assert row["size"]["prompt"] == 12
        told = {"device_prefill_ms", "device_ms_per_token"} & set(row)
        assert len(told) == (0 if row["side"] == "bf16" else 2)
        assert all(0 < row[name] < 1e4 for name in told)
    weights = {row["side"]: row["weights_mib"] for row in rows if "weights_mib" in row}
    assert weights["grace"]["layers"] < 0.3 * weights["bf16"]["layers"]
    assert weights["bf16"]["head"] == 0 < weights["grace W8 head"]["head"]  # tied, then its own
    assert weights["grace"]["vision"] == weights["bf16"]["vision"] > 0


def test_a_profile_is_of_a_step_that_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernels_of(side: Any, sets: int) -> list[dict[str, Any]]:
        side(0)
        return [{"kernel": "k", "launches": 1.0, "us": 2.0, "us_a_call": 2.0}]

    monkeypatch.setattr(profile_kernels, "kernels_of", kernels_of)
    sides = ["bf16", "bf16 graph", "grace"]
    rows = list(rows_of(plan(batches=[1], sides=sides, profile=True), CPU))
    assert [row["side"] for row in rows if "kernels" in row] == sides[1:]
    assert "kernels 2 µs" in " ".join(bench_generate.table(rows[1:]).split())
    timed = {**rows[1], "ms_per_token": 1.0}
    del timed["kernels"]
    (both,) = merged([timed], [rows[1]])
    assert both["ms_per_token"] == 1.0
    assert both["kernels"] == rows[1]["kernels"]
    assert merged([both], [timed]) == [timed]


def test_a_profile_is_of_the_layers_that_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments[0].shape)
        return attend(*arguments, **options)

    def kernels_of(side: Any, sets: int) -> list[dict[str, Any]]:
        calls.clear()
        side(0)
        return [{"kernel": "k", "launches": len(calls), "us": 2.0, "us_a_call": 2.0}]

    attend = decoder.decode_attention
    monkeypatch.setattr(decoder, "decode_attention", counted)
    monkeypatch.setattr(profile_kernels, "kernels_of", kernels_of)
    monkeypatch.setitem(SIDES, "grace", bench_generate._ours(packed=True, layers="grace"))
    sides = ["grace", "grace transformers layers"]
    rows = list(rows_of(plan(batches=[1], sides=sides, profile=True), CPU))
    assert [row["kernels"][0]["launches"] for row in rows] == [3, 0]  # of as many layers, and none


def test_prefill_is_the_median_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """One answer of one token that took long changes nothing, and the rest is the decode."""
    model = generation.build("tiny LLaVA student", CPU)
    inputs = generation.inputs_for(model, "tiny LLaVA student", 1)
    times = {3: [0.9] * 2, 1: [0.1, 0.1, 5.0, 0.1, 0.1, 0.1, 0.1]}

    def timer(generate: Any, arguments: dict[str, Any], device: Any) -> Any:
        left = [0.0, *times[arguments["max_new_tokens"]]]  # behind one to warm up
        return lambda: left.pop(0)

    monkeypatch.setattr(bench_generate, "_timer", timer)
    row = bench_generate.measured(model.generate, model, inputs, plan(repeats=2), 1)
    assert (row["prefill_ms"], row["ms_per_token"]) == (100.0, 400.0)
    assert "device_prefill_ms" not in row


def test_models_are_packed_in_place_and_say_as_much() -> None:
    model = generation.build("tiny LLaVA student", CPU)
    inputs = generation.inputs_for(model, "tiny LLaVA student", 2)
    tower = model.model.vision_tower
    generation.pack_randomly(model)
    kinds = {type(m) for m in model.model.language_model.modules()}
    assert {FusedLinear, PackedLinear} <= kinds
    assert torch.nn.Linear not in kinds
    assert not any(isinstance(m, PackedLinear) for m in tower.modules())
    logits = model(**inputs).logits
    assert bool(logits.isfinite().all())
    weights = generation.weights_mib(model)
    assert weights["all"] == pytest.approx(
        sum(weights[part] for part in ("layers", "vision", "embedding", "head")), abs=0.3
    )
    read = generation.read_mib(weights)
    assert read == pytest.approx(weights["layers"] + weights["head"], abs=0.3)


def test_compiled_sides_run_at_batch_1_unless_they_are_named() -> None:
    gpu = torch.device("cuda")
    assert plan().has("bf16 static compiled", 1, gpu)
    assert not plan().has("bf16 static compiled", 8, gpu)
    assert not plan().has("bf16 static compiled", 1, CPU)
    assert not plan().has("grace liger flash", 1, gpu)
    named = plan(sides=["grace compiled"])
    assert named.has("grace compiled", 8, gpu)
    assert not named.has("bf16", 8, gpu)
    packed = [side.packed for side in SIDES.values()]
    assert packed == sorted(packed)  # a model is not made dense again
    heads = ["lm_head_bits" in side.options for side in SIDES.values()]
    assert heads == sorted(heads)


def test_a_head_is_quantized_once() -> None:
    first, again = "grace W8 head", "grace W8 head compiled flash"
    side, done = bench_generate._with_head_done(SIDES[first], False)
    assert side is SIDES[first]
    assert done
    side, _ = bench_generate._with_head_done(SIDES[again], True)
    assert side.options == {"compile": True, "attention": "flash"}


def test_every_cell_is_on_disk_when_it_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(bench_generate, "measure_ceiling", lambda _: Ceiling(1e9, 1e12))
    monkeypatch.setenv("GRACE_COMMIT", "a" * 40)
    size = {"model": "m", "batch": 1, "prompt": 2, "new": 3}
    weights = {"all": 8.0, "vision": 2.0, "embedding": 1.0, "head": 1.0, "layers": 4.0}
    seen = []

    def cells(_plan: Plan, _device: torch.device) -> Any:
        for side in ("bf16", "grace", "bf16"):
            yield {
                "size": size,
                "side": side,
                "prefill_ms": 1.0,
                "ms_per_token": 2.0,
                "tokens_per_s": 3.0,
                "weights_mib": weights,
            }
            (path,) = tmp_path.glob("*/generate.json")
            seen.append([row["side"] for row in json.loads(path.read_text())["rows"]])

    monkeypatch.setattr(bench_generate, "rows_of", cells)
    bench_generate.run(plan(), CPU, keep=True)
    assert seen == [["bf16"], ["bf16", "grace"], ["bf16", "grace"]]
    rows = bench_generate.earlier(CPU)
    assert [row["floor_ms"] for row in rows] == [pytest.approx(5 * 2**20 / 1e6, rel=1e-4)] * 2
    monkeypatch.setenv("GRACE_COMMIT", "b" * 40)  # of other code there is nothing to go on with
    assert bench_generate.earlier(CPU) == []


def test_new_rows_take_the_places_of_old_ones() -> None:
    old = [{"size": 1, "side": "a", "x": 1}, {"size": 1, "side": "b", "x": 1}]
    assert [row["x"] for row in merged(old, [{"size": 1, "side": "a", "x": 2}])] == [2, 1]


def test_it_is_a_program_of_its_own(capsys: pytest.CaptureFixture) -> None:
    assert "generate" not in available()
    with pytest.raises(typer.BadParameter):
        load("generate")
    for asked in ("--help", "-h"):
        with pytest.raises(SystemExit) as stop:
            start(["generate", asked])
        assert not stop.value.code
        assert "--batches" in capsys.readouterr().out


def test_grace_bench_hands_on_what_it_is_given(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from grace.cli import bench, build_app, main

    ran = []
    monkeypatch.setattr(bench_generate, "run", lambda plan, on, keep: ran.append((plan, on, keep)))
    arguments = ["bench", "generate", "--tiny", "--no-keep", "--device", "cpu", "--batches", "2"]
    done = CliRunner().invoke(build_app(), [*arguments, "--sides", "bf16,grace"])
    assert done.exit_code == 0, done.output
    ((ours, on, keep),) = ran
    assert (ours.batches, ours.sides, on, keep) == ([2], ["bf16", "grace"], CPU, False)
    assert ours.models == list(bench_generate.TINY)
    with pytest.raises(SystemExit) as stop:
        main(["bench", "generate", "--models", "nope"])
    assert stop.value.code == 2
    assert "grace: Invalid value: model must be one of LLaVA" in capsys.readouterr().err
    monkeypatch.setattr(bench, "__file__", "/nowhere/grace/cli/bench.py")
    with pytest.raises(SystemExit) as stop:
        main(["bench", "ops"])
    assert stop.value.code == 2
    assert "benchmarks/ must lie beside the package" in capsys.readouterr().err


# --- the page ------------------------------------------------------------------------------------


def content() -> dict[str, Any]:
    size = {"model": "LLaVA", "batch": 1, "prompt": 632, "new": 128}
    weights = {"all": 2048.0, "layers": 1000.0, "vision": 600.0, "embedding": 200.0, "head": 248.0}

    def row(side: str, ms: float, peak: float, **more: Any) -> dict[str, Any]:
        facts = {"prefill_ms": 10 * ms, "ms_per_token": ms, "floor_ms": 1.0, "tokens_per_s": 9.0}
        return {
            "size": size,
            "side": side,
            **facts,
            "peak_mib": peak,
            "weights_mib": weights,
            **more,
        }

    kernels = [
        {"kernel": "small", "launches": 2, "us": 1.0, "us_a_call": 2.0},
        {"kernel": "large", "launches": 1, "us": 7.0, "us_a_call": 7.0},
    ]
    rows = [row("bf16", 16.0, 13312), row("grace", 2.0, 5120, kernels=kernels)]
    rows.append({"size": size, "side": "grace flash", "absent": "not here"})
    facts = {"device": "gpu", "torch": "2", "commit": "0" * 40, "read_gb_per_s": 3000.0}
    return {"environment": facts, "rows": rows}


def test_the_headline_compares_with_both_of_transformers() -> None:
    rows = content()["rows"]
    compiled = {**rows[0], "side": "bf16 static compiled", "ms_per_token": 8.0}
    lines = plot_generate.headline(plot_generate.cells({"rows": [*rows, compiled]})).splitlines()
    assert lines[2] == "| LLaVA, 1 | 16.00 | 8.00 | 2.00 | 4.00× | 8.00× | 8.00× | 38 % |"
    without = plot_generate.headline(plot_generate.cells({"rows": rows})).splitlines()
    assert "| 16.00 | – | 2.00 | – | 8.00× |" in without[2]
    assert len(plot_generate.headline(plot_generate.cells({"rows": rows[:1]})).splitlines()) == 2


def test_the_page_holds_the_committed_results() -> None:
    assert plot_generate.main(["--check"]) == 0, plot_generate.COMMAND


def test_a_section_tells_all_that_was_measured() -> None:
    text = plot_generate.section("gpu", content())
    assert "| bf16 | 16.00 | 1.00 | 160.0 | 9 | 13.00 | 2.00 |" in text
    assert "| grace | 2.00 (8.00×) | 1.00 | 20.0 (8.00×) | 9 | 5.00 (2.60×) | 2.00 |" in text
    assert "| LLaVA | grace | 1000 | 600 | 200 | 248 |" in text
    assert text.index("| large | 1 | 7.0 | 7 |") < text.index("| small | 2 | 1.0 | 2 |")
    assert "| all | 3 |  | 9 |" in text
    assert "- LLaVA, grace flash: not here" in text
    assert plot_generate.measured({"gpu": content()}) == text
    assert plot_generate.measured({}) == "No result of a GPU is committed yet."


def test_a_chart_says_what_it_was_drawn_from(tmp_path: Path) -> None:
    chart = plot_generate.chart_of("gpu", content())
    drawn = Chart(tmp_path / "chart.png", chart.numbers, chart.draw)
    assert not drawn.current
    drawn.write()
    assert drawn.current
    other = content()
    other["rows"][0]["ms_per_token"] = 17.0
    assert plot_generate.chart_of("gpu", other).digest != chart.digest
