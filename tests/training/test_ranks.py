"""Two ranks are one process with the same global batch: weights, losses and the path of β."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_training import train

from grace.training.callbacks import read_metrics

TESTS = Path(__file__).parents[1]


@pytest.mark.slow
def test_two_ranks_equal_one(rows_root: Path, tmp_path: Path) -> None:
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments = [TESTS / "tiny_training.py", tmp_path / "two", rows_root, 2, 2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*program, *map(str, arguments)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one = train(tmp_path / "one", rows_root, 4, 2)
    two = torch.load(tmp_path / "two" / "weights.pt", weights_only=True)
    for name, value in one.model.state_dict().items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=2e-6, msg=name)
    rows = [read_metrics(tmp_path / folder / "metrics.jsonl") for folder in ("one", "two")]
    for a, b in zip(*rows, strict=True):
        for name in ("ce", "gdkd", "rcka", "beta", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-4), name
