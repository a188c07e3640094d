"""The page of dequant_gemm is what the committed results give, and how ratios are judged."""

from __future__ import annotations

import json

import pytest

from benchmarks import plot_dequant_gemm
from benchmarks.layers import Shape
from benchmarks.plot_dequant_gemm import PAGE, Point, draw, filled, gpu_results, points


def test_the_page_holds_the_committed_results():
    contents = gpu_results()
    assert filled(PAGE.read_text(), contents) == PAGE.read_text(), plot_dequant_gemm.COMMAND
    assert [chart.name for chart in contents if not chart.exists()] == []


def _point(m=1, n=4096, **times):
    return Point(Shape(n, 4096), m, 2.0, {"grace": 4.0, "bf16": 12.0, **times})


def test_the_best_peer_is_the_fastest_that_is_not_dense():
    point = _point(marlin=9.0, machete=7.0)
    assert point.peer == ("machete", 7.0)
    assert (point.over_dense, point.over_peer) == (3.0, 1.75)
    assert _point().over_peer is None


@pytest.mark.parametrize(
    ("point", "missed"),
    [
        (_point(marlin=8.0), []),
        (_point(marlin=5.0), ["peer ≥ 1.4×"]),
        (_point(n=22016, bf16=11.9), ["cuBLAS ≥ 3×"]),
        (_point(m=4096, bf16=3.8), []),
        (_point(m=4096, bf16=3.7), ["cuBLAS ≥ 0.95×"]),
        (_point(n=512, bf16=1.0), []),  # so small a layer has no target over cuBLAS
    ],
)
def test_targets_depend_on_rows_and_on_the_size_of_the_layer(point, missed):
    assert point.missed() == missed


def _content():
    def row(side, us, m=1, **kind):
        size = {"M": m, "N": 4096, "K": 4096, **kind}
        return {"size": size, "side": side, "us": us, "floor_us": 2.0}

    absent = {"size": {"M": 1, "N": 4096, "K": 4096}, "side": "marlin", "absent": "not here"}
    rows = [
        row("grace", 4.0),
        row("bf16", 12.0),
        row("grace", 6.0, bits=8),
        row("bf16", 12, bits=8),
    ]
    facts = {
        "device": "x100",
        "torch": "2.11",
        "commit": "0" * 40,
        "read_gb_per_s": 4000.0,
        "matmul_tflop_per_s": 800.0,
    }
    return {"environment": facts, "rows": [*rows, absent]}


def test_kinds_are_kept_apart():
    content = _content()
    assert [p.ours for p in points(content, {})] == [4.0]
    assert [p.ours for p in points(content, {"bits": 8})] == [6.0]


def test_a_section_tells_ratios_and_absences(tmp_path):
    content = _content()
    page = "<!-- begin measured x -->\nstale\n<!-- end measured -->"
    text = filled(page, {tmp_path / "chart.png": json.loads(json.dumps(content))})
    assert "| 1 | 2.0 | 12.0 | – | 4.0 | 3.00× | – | reached |" in text
    assert "- marlin: absent, not here (1 sizes)" in text
    assert "stale" not in text
    draw(points(content, {}), tmp_path / "chart.png")
    assert (tmp_path / "chart.png").stat().st_size > 1000


def test_a_page_without_the_block_is_an_error():
    with pytest.raises(ValueError, match="one block measured"):
        filled("no block", {})
