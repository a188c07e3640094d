"""The ops' pages: tables and charts are what the committed results give."""

from __future__ import annotations

import pytest

from benchmarks import plot_op_pages
from benchmarks.plot_op_pages import (
    Page,
    chart,
    digest,
    drawn_from,
    filled,
    pages,
    points,
    product_table,
    section,
    stale,
    time_table,
)

BLOCK = "<!-- begin measured x -->\nstale\n<!-- end measured -->"


def row(side, us, n=2, **more):
    size = {"n": n, "V": 8}
    return {"size": size, "side": side, "us": us, "floor_us": 2.0, **more}


def content(*rows):
    facts = {"device": "gpu", "torch": "2", "commit": "0" * 40}
    facts |= {"read_gb_per_s": 3000.0, "matmul_tflop_per_s": 700.0}
    return {"environment": facts, "rows": list(rows)}


def test_pages_hold_the_committed_results():
    found = pages()
    assert {"fake_quant", "gated_dkd", "linear_gated_dkd"} <= {page.op for page in found}
    assert [name for page in found for name in stale(page)] == [], plot_op_pages.COMMAND


def test_times_stand_with_their_ratios():
    found = points(
        content(
            row("grace", 4.0, timed_by="graph replay"),
            row("liger", 9.0, timed_by="eager calls"),
            {"size": {"n": 2, "V": 8}, "side": "compile", "absent": "not here"},
            row("grace", 200.0, n=3),
        )
    )
    lines = time_table(found).splitlines()
    assert lines[0] == "| size | floor | grace | liger |"
    assert lines[2] == "| n=2 V=8 | 2.0 | 4.0 (2.00× floor) | 9.0† (2.25×) |"
    assert lines[3] == "| n=3 V=8 | 2.0 | 200 (100.00× floor) | – |"


def test_the_target_is_products_and_the_fused_op():
    rows = [
        row("grace", 11.0),
        row("grace, logits kept", 12.0),
        row("whole logits", 10.0),
        row("its matrix products", 8.0),
        row("its matrix products, logits kept", 7.0),
    ]
    fused = points(content(row("grace", 2.0)))
    lines = product_table(points(content(*rows)), fused).splitlines()[2:]
    assert lines[0].endswith("| grace | 8.0 | 2.0 | 10.0 | 11.0 | 1.10× | reached | 1.10× |")
    assert lines[1].endswith("logits kept | 7.0 | 2.0 | 9.0 | 12.0 | 1.33× | missed | 1.20× |")
    assert product_table(points(content(*rows)), []) == ""


def test_a_section_tells_all_that_was_measured():
    more = {"timed_by": "graph replay", "us_eager_calls": 6.0, "peak_mib": 0.5}
    absent = {"size": {"n": 2, "V": 8}, "side": "compile", "absent": "not here"}
    page = Page("fake_quant", {"gpu": content(row("grace", 4.0, **more), absent)})
    text = section(page, "gpu")
    assert "![Time and memory of every side](fake_quant_gpu.png)" in text
    for line in ("| n=2 V=8 | 6.0 |", "| n=2 V=8 | 0.5 |", "- compile: absent, not here (1 sizes)"):
        assert line in text
    made = filled(page, BLOCK)
    assert text in made
    assert "stale" not in made
    with pytest.raises(ValueError, match="one block measured"):
        filled(page, "no block")


def test_a_chart_says_what_it_was_drawn_from(tmp_path):
    found = points(content(row("grace", 4.0, peak_mib=0.1), row("liger JSD", 9.0, peak_mib=700.0)))
    path = tmp_path / "chart.png"
    assert drawn_from(path) == ""
    path.write_bytes(chart("op", found))
    assert drawn_from(path) == digest(found)
    assert path.stat().st_size < 20_000
    assert digest(points(content(row("grace", 4.1)))) != digest(found)
