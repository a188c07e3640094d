"""The harness: what cannot run is named, and a row says all that was measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import harness, results
from benchmarks.distillation import peer
from benchmarks.harness import Absent, Benchmark, Case, Ceiling, by_eager_calls, run

CEILING = Ceiling(1e10, 1e11)


def rows_of(sides, yardsticks=None):
    case = Case(sides=sides, yardsticks=yardsticks or {}, exact=lambda: torch.ones(3), bytes=12.0)
    benchmark = Benchmark("any", {"cpu": [{"n": 3}]}, lambda device, n: case)
    (rows,) = run(benchmark, torch.device("cpu"), CEILING, 3)
    return {row["side"]: row for row in rows}


def no_memory(_):
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_side_that_does_not_fit_is_named():
    found = rows_of({"grace": lambda _: torch.ones(3), "eager": no_memory}, {"liger": no_memory})
    assert found["grace"]["us"] > 0
    for name in ("eager", "liger"):
        assert found[name]["absent"] == "does not fit in this device's memory"


def test_a_side_that_fits_only_alone_is_named():
    """There is room for its first call, and none beside the graphs of the others."""
    calls = []

    def side(i):
        calls.append(i)
        return torch.ones(3) if len(calls) == 1 else no_memory(i)

    found = rows_of({"grace": lambda _: torch.ones(3), "eager": side})
    assert "us" in found["grace"]
    assert "does not fit" in found["eager"]["absent"]


def test_a_wrong_side_is_not_timed():
    found = rows_of({"grace": lambda _: torch.ones(3), "eager": lambda _: torch.zeros(3)})
    assert "us" not in found["eager"]
    assert "got 1" in found["eager"]["wrong"]


def test_eager_calls_stand_beside_a_graphs_time(monkeypatch):
    samples = iter([9.0, 3.0, 1.0, 2.0])
    monkeypatch.setattr(harness, "_eager_timer", lambda side, sets: lambda: next(samples))
    row = {"us": 5.0, "timed_by": "graph replay"}
    assert by_eager_calls(row, lambda _: None, 1) == {"us_eager_calls": 2e6}
    assert by_eager_calls(row | {"timed_by": "eager calls"}, no_memory, 1) == {
        "us_eager_calls": 5.0
    }
    assert by_eager_calls(row | {"timed_by": "wall clock"}, no_memory, 1) == {}


def test_a_peers_error_is_an_absence():
    def fails(_):
        raise RuntimeError("no such kernel\nand more")

    with pytest.raises(Absent, match=r"^RuntimeError: no such kernel$"):
        peer(fails)(0)
    with pytest.raises(torch.OutOfMemoryError):
        peer(no_memory)(0)


def test_results_of_other_sizes_stay_with_their_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "ROOT", tmp_path)
    device, ceiling = torch.device("cpu"), harness.Ceiling(1e9, 1e12)
    monkeypatch.setenv("GRACE_COMMIT", "a" * 40)
    first = [{"size": {"n": n}, "side": "grace", "us": 1.0} for n in (1, 2)]
    results.write("op", device, ceiling, first)
    monkeypatch.setenv("GRACE_COMMIT", "b" * 40)
    again = [{"size": {"n": 2}, "side": "grace", "us": 3.0}]
    rows = results.with_other_sizes("op", device, again)
    assert rows == [again[0], {"commit": "a" * 40, **first[0]}]
    assert [results.since(row) for row in rows] == ["", " (commit aaaaaaa)"]
    results.write("op", device, ceiling, rows)
    third = results.with_other_sizes("op", device, [{"size": {"n": 3}}])
    assert [row.get("commit", "")[:1] for row in third] == ["", "b", "a"]
    assert results.with_other_sizes("new", device, again) == again
