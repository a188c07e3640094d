"""Two ranks are one process with the same global batch: losses, gradients and the path of β."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_ranks
from tiny_training import Signal, drop_a_term, train

from grace.training.callbacks import read_metrics

TESTS = Path(__file__).parents[1]
SAME = ("ce", "gdkd", "rcka", "beta", "grad_norm", "code_flip_rate", "scale_drift")
SHARDED = {"fsdp": True, "teacher_fsdp": True}
TWO = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}  # of two ranks: 4 rows


@pytest.fixture(scope="module")
def mixed_rows(rows_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of which two in three have no image, so that a rank's micro-batch often has none."""
    root = tmp_path_factory.mktemp("mixed")
    (root / "images").symlink_to(rows_root / "images")
    rows = json.loads((rows_root / "train.json").read_text())
    for number, row in enumerate(rows):
        if number % 3:
            del row["image"]
            turn = row["conversations"][0]
            turn["value"] = turn["value"].replace("<image>", "").strip()
    (root / "train.json").write_text(json.dumps(rows))
    return root


@pytest.fixture(scope="module")
def one(rows_root: Path, mixed_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folders of runs in this process, by their rows: 4 in one micro-batch."""
    folders = {}
    for name, rows in (("rows", rows_root), ("mixed", mixed_rows)):
        folders[name] = tmp_path_factory.mktemp("one")
        train(folders[name], rows, {"per_device_train_batch_size": 4})
    return folders


def assert_same(one: Path, two: Path, rtol: float = 1e-4, atol: float = 2e-6) -> None:
    """SGD: weights that agree after a step had the same gradients."""
    load = partial(torch.load, map_location="cpu", weights_only=True)
    states = [load(folder / "state.pt") for folder in (one, two)]
    for name, value in states[0]["weights"].items():
        torch.testing.assert_close(states[1]["weights"][name], value, rtol=rtol, atol=atol)
    assert states[0]["controller"]["ema"] == pytest.approx(states[1]["controller"]["ema"], rel=rtol)
    rows = [read_metrics(folder / "metrics.jsonl") for folder in (one, two)]
    assert len(rows[0]) == 3
    for a, b in zip(*rows, strict=True):
        for name in SAME:
            assert a[name] == pytest.approx(b[name], rel=rtol), name


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="ddp"),
        pytest.param({"gradient_checkpointing": True}, id="ddp, quantized weights held"),
        pytest.param({**SHARDED, "gradient_checkpointing": True}, id="fsdp"),
    ],
)
def test_two_ranks_equal_one(rows_root: Path, one: Any, tmp_path: Path, options: dict) -> None:
    assert run_ranks(2, tmp_path, rows_root, {**TWO, **options}) == [0, 0]
    assert_same(one["rows"], tmp_path)


@pytest.mark.parametrize("options", [{}, SHARDED], ids=["ddp", "fsdp"])
def test_a_rank_without_images_keeps_up(
    mixed_rows: Path, one: Any, tmp_path: Path, options: dict
) -> None:
    assert run_ranks(2, tmp_path, mixed_rows, {**TWO, **options}) == [0, 0]
    assert_same(one["mixed"], tmp_path)


def test_a_rank_that_drops_a_term_keeps_up(rows_root: Path, tmp_path: Path) -> None:
    options = {**TWO, **SHARDED, "gate": False}
    assert run_ranks(2, tmp_path, rows_root, options, drop_a_term, faulty=1) == [0, 0]
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["dropped"] == 3 * 2  # micro-batches of one rank
    assert all(value.isfinite().all() for value in state["weights"].values())


def test_autocast_rounds_what_is_multiplied_and_no_parameter(
    rows_root: Path, tmp_path: Path
) -> None:
    """Sharded or not, bf16 quantizes fp32 weights with fp32 log-scales: the very same codes."""
    options = {**TWO, "bf16": True}
    for name, sharding in (("ddp", {}), ("fsdp", {"fsdp": True})):
        assert run_ranks(2, tmp_path / name, rows_root, {**options, **sharding}) == [0, 0]
    assert_same(tmp_path / "ddp", tmp_path / "fsdp", rtol=1e-5, atol=1e-7)


def test_ranks_stop_and_resume_together(rows_root: Path, tmp_path: Path) -> None:
    options = {**TWO, **SHARDED, "optim": "adamw_torch", "learning_rate": 1e-3, "dropout": 0.1}
    assert run_ranks(2, tmp_path / "whole", rows_root, options) == [0, 0]
    stop, again = Signal(2, signal.SIGTERM), tmp_path / "again"
    assert run_ranks(2, again, rows_root, options, stop, faulty=1) == [1, 1]
    assert [path.name for path in again.glob("checkpoint-*")] == ["checkpoint-2"]
    assert run_ranks(2, again, rows_root, {**options, "resume_from_checkpoint": True}) == [0, 0]
    whole, resumed = (
        torch.load(tmp_path / name / "state.pt", weights_only=True) for name in ("whole", "again")
    )
    for name, value in whole["weights"].items():
        assert torch.equal(value, resumed["weights"][name]), name
    assert whole["controller"] == resumed["controller"]


@pytest.mark.slow
def test_torchrun_starts_it(rows_root: Path, one: Any, tmp_path: Path) -> None:
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments = [TESTS / "tiny_training.py", tmp_path, rows_root, json.dumps(TWO)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*program, *map(str, arguments)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(one["rows"], tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, SHARDED], ids=["ddp", "fsdp"])
def test_two_gpus_equal_one(rows_root: Path, tmp_path: Path, options: dict) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    options = {**options, "use_cpu": False}
    assert run_ranks(2, tmp_path / "two", rows_root, {**TWO, **options}) == [0, 0]
    alone = {"per_device_train_batch_size": 4, "use_cpu": False}
    assert run_ranks(1, tmp_path / "one", rows_root, alone) == [0]
    # Where a last bit flips a code, gradients move by that code.
    assert_same(tmp_path / "one", tmp_path / "two", rtol=5e-3, atol=1e-4)
