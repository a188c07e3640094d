"""The page of a training step: tables and charts are what the committed results give."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import pages, plot_training_step
from benchmarks.plot_training_step import chart_of, memory_table, scaling_table, steps, time_table

SIZE = {"pair": "a<b", "rows": 2, "packed": 1, "tokens": 8, "masters": "bfloat16"}


def row(side: str, ms: float, **more: object) -> dict:
    spent = {"matrix products": ms * 0.75, "idle": ms * 0.25}
    facts = {"peak_mib": 512.0, "resident_mib": 1024.0, "breakdown_ms": spent}
    return {"size": SIZE, "side": side, "us": 1e3 * ms, **facts, **more}


CONTENT = {
    "rows": [
        row("grace", 108.0),
        row("not held", 109.0),
        row("authors", 216.0),
        row("SFT", 60.0),
        row("teacher", 40.0, peak_mib=0.0),
        {"size": SIZE | {"rows": 4}, "side": "grace", "absent": "too large"},
    ]
}


def test_the_page_holds_the_committed_results() -> None:
    assert plot_training_step.main(["--check"]) == 0, plot_training_step.COMMAND


def test_ours_stands_against_fine_tuning_and_teacher() -> None:
    lines = time_table(steps(CONTENT)).splitlines()
    step = "a<b, 2×8 tokens, bfloat16 masters"
    assert lines[2] == f"| {step} | 60 | 40 | 108 | 1.080× | reached | 216 | 2.00× |"
    assert lines[3] == f"| {step}; not held | 60 | 40 | 109 | 1.090× | missed | 216 | 1.98× |"
    assert len(lines) == 4


def test_memory_counts_what_was_there_before() -> None:
    lines = memory_table(steps(CONTENT)).splitlines()
    assert lines[2].endswith("| 1.5 | 1.5 | 1.5 | 1.5 | 1.0 |")


def test_scaling_names_the_lone_gpu() -> None:
    facts = {"side": "ddp", "accumulation": 1, "step_ms_spread": [1.0, 4.0], "peak_mib": 1024.0}
    rows = [
        {**facts, "gpus": 1, "step_ms": 2.0, "tokens_per_second": 1e4, "efficiency": 1.0},
        {**facts, "gpus": 2, "step_ms": 3.0, "tokens_per_second": 1.5e4, "efficiency": 0.75},
    ]
    lines = scaling_table({"rows": rows}).splitlines()
    assert lines[2] == "| alone | 1 | 1 | 2 (1–4) | 10,000 | 1.00 | 1.0 |"
    assert lines[3] == "| ddp | 2 | 1 | 3 (1–4) | 15,000 | 0.75 | 1.0 |"


def test_a_page_and_its_chart_go_stale(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- begin measured x -->\nold\n<!-- end measured -->\n")
    found = steps(CONTENT)
    shown, path = chart_of("gpu", found), tmp_path / "chart.png"
    chart = pages.Chart(path, shown.numbers, shown.draw)
    assert pages.update(page, "new", [chart], check=True) == ["page.md", "chart.png"]
    assert pages.update(page, "new", [chart], check=False) == []
    assert "new" in page.read_text()
    assert pages.update(page, "new", [chart], check=True) == []
    other = pages.Chart(path, [1], chart.draw)
    assert pages.update(page, "newer", [other], check=True) == ["page.md", "chart.png"]
    page.write_text("no block")
    with pytest.raises(ValueError, match=r"page\.md must have one block measured, got 0"):
        pages.filled(page, "x")
