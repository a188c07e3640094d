"""The scaling benchmark's arithmetic, and one measurement of a rank at its tiny size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import scaling


def test_efficiency_is_against_one_gpu_of_the_same_step() -> None:
    rows = [
        {"gpus": 1, "accumulation": 1, "tokens_per_second": 100.0},
        {"gpus": 2, "accumulation": 1, "tokens_per_second": 190.0},
        {"gpus": 4, "accumulation": 1, "tokens_per_second": 300.0},
    ]
    found = scaling.with_efficiency(rows)
    assert [row["efficiency"] for row in found] == [1.0, 0.95, 0.75]


def test_rows_have_their_image_and_supervise_what_follows() -> None:
    size = scaling.SIZES["tiny"]
    row = scaling.Rows(size, 4)[3]
    assert int((row["input_ids"] == 5).sum()) == (16 // 8) ** 2
    assert int((row["labels"] != -100).sum()) == size.tokens - 1 - 4
    assert torch.equal(row["pixel_values"], scaling.Rows(size, 4)[3]["pixel_values"])


def test_one_rank_measures_its_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    size = scaling.SIZES["tiny"]
    scaling.measure(size, "ddp", 2, tmp_path / "row.json")
    row = json.loads((tmp_path / "row.json").read_text())
    assert (row["gpus"], row["side"], row["accumulation"]) == (1, "ddp", 2)
    tokens = row["tokens_per_second"] * row["step_ms"] / 1e3
    assert tokens == pytest.approx(size.tokens * size.rows * 2, rel=1e-2)


def test_the_default_size_fits_its_own_groups() -> None:
    size = scaling.SIZES["default"]
    for width, inner, _, heads in (size.student, size.teacher):
        assert width % heads == width % size.group_size == inner % size.group_size == 0
    assert scaling.Rows(size, 1).visual == 576 < size.tokens
