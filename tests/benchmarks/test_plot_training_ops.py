"""The charts of the training ops: what the committed results give."""

from __future__ import annotations

from benchmarks.plot_training_ops import Line, draw, gpu_results, lines


def test_every_result_has_its_chart():
    assert gpu_results()
    assert [chart.name for chart in gpu_results() if not chart.exists()] == []


def test_a_line_holds_the_sides_that_were_timed():
    rows = [
        {"size": {"n": 2}, "side": "grace", "us": 4.0, "floor_us": 2.0, "peak_mib": 8.0},
        {"size": {"n": 2}, "side": "eager", "us": 9.0, "floor_us": 2.0},
        {"size": {"n": 2}, "side": "compile", "absent": "is not there"},
        {"size": {"n": 3}, "side": "grace", "us": 5.0, "floor_us": 3.0, "peak_mib": 0.1},
    ]
    assert lines([{"benchmark": "op", "rows": rows}]) == [
        Line("op  n=2", 2.0, {"grace": 4.0, "eager": 9.0}, {"grace": 8.0}),
        Line("op  n=3", 3.0, {"grace": 5.0}, {"grace": 0.1}),
    ]


def test_a_chart_is_drawn(tmp_path):
    chart = tmp_path / "chart.png"
    draw([Line("op  n=2", 2.0, {"grace": 4.0, "another": 9.0}, {"grace": 8.0})], chart)
    assert chart.read_bytes().startswith(b"\x89PNG")
