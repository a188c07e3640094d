"""Runs that are killed at a step and resumed are, bit for bit, the run that was not interrupted."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_alone
from safetensors.torch import load_file
from tiny_training import KillWhileSaving, Signal, make_trainer
from transformers import TrainerCallback

from grace.training import files
from grace.training.callbacks import read_metrics
from grace.training.interrupt import Interrupted

# 48 rows are 6 steps an epoch: the run goes over the end of one.
OPTIONS = {
    "max_steps": 8,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "optim": "adamw_torch",
    "learning_rate": 1e-3,
    "max_grad_norm": 1.0,
    "dropout": 0.1,
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 2,
}
SAME = ("loss", "ce", "gdkd", "rcka", "beta", "grad_norm", "learning_rate", "scale_drift")


@pytest.fixture(scope="module")
def whole(rows_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    assert run_alone(folder, rows_root, OPTIONS) == 0
    return folder


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir() if path.is_dir() and path.name[0] != "r")


def assert_same_run(whole: Path, again: Path) -> None:
    """Weights, log-scales, β and its average, random state, optimizer, schedule, and every line."""
    states = [torch.load(folder / "state.pt", weights_only=True) for folder in (whole, again)]
    assert any(name.endswith("log_scale") for name in states[0]["weights"])
    for name, value in states[0]["weights"].items():
        assert torch.equal(value, states[1]["weights"][name]), name
    assert states[0]["controller"] == states[1]["controller"]
    assert torch.equal(states[0]["random"], states[1]["random"])
    for name in ("optimizer.pt", "scheduler.pt"):
        first, second = (
            torch.load(folder / "checkpoint-8" / name, weights_only=True)
            for folder in (whole, again)
        )
        assert_same_tree(first, second)
    rows = [read_metrics(folder / "metrics.jsonl") for folder in (whole, again)]
    assert [row["step"] for row in rows[1]] == list(range(1, 9))
    for a, b in zip(*rows, strict=True):
        assert [a[name] for name in SAME] == [b[name] for name in SAME], a["step"]


def assert_same_tree(a: Any, b: Any) -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same_tree(a[key], b[key])
    elif isinstance(a, list):
        for one, other in zip(a, b, strict=True):
            assert_same_tree(one, other)
    else:
        assert a == b


@pytest.mark.parametrize(
    ("fault", "code", "left"),
    [
        pytest.param(Signal(6, signal.SIGKILL), -9, ["checkpoint-2", "checkpoint-4"], id="kill"),
        pytest.param(
            KillWhileSaving(6),
            -9,
            [".unfinished", "checkpoint-2", "checkpoint-4"],
            id="kill-while-saving",
        ),
        pytest.param(Signal(3, signal.SIGTERM), 1, ["checkpoint-2", "checkpoint-3"], id="term"),
        pytest.param(Signal(7, signal.SIGINT), 1, ["checkpoint-6", "checkpoint-7"], id="interrupt"),
    ],
)
def test_an_interrupted_run_goes_on_bit_for_bit(
    rows_root: Path, whole: Path, tmp_path: Path, fault: Any, code: int, left: list[str]
) -> None:
    assert run_alone(tmp_path, rows_root, OPTIONS, fault) == code
    assert checkpoints(tmp_path) == left
    assert run_alone(tmp_path, rows_root, {**OPTIONS, "resume_from_checkpoint": True}) == 0
    assert checkpoints(tmp_path)[-2:] == ["checkpoint-6", "checkpoint-8"] or fault.step == 7
    assert_same_run(whole, tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"bf16": True, "gradient_checkpointing": True}])
def test_on_a_gpu_with_full_determinism(rows_root: Path, tmp_path: Path, options: dict) -> None:
    """PyTorch's own backward on a GPU adds in any order unless asked not to."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    options = {**OPTIONS, **options, "use_cpu": False, "full_determinism": True}
    whole, again = tmp_path / "whole", tmp_path / "again"
    assert run_alone(whole, rows_root, options) == 0
    assert run_alone(again, rows_root, options, Signal(6, signal.SIGKILL)) == -9
    assert run_alone(again, rows_root, {**options, "resume_from_checkpoint": True}) == 0
    assert_same_run(whole, again)


@pytest.fixture
def trainer(rows_root: Path, tmp_path: Path) -> Callable[..., Any]:
    return lambda **options: make_trainer(
        tmp_path / "run", rows_root, {**OPTIONS, "max_steps": 4, **options}
    )


def raise_enospc(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fail_to_write(*_: Any, **__: Any) -> None:
    """As torch.save tells of a full disk."""
    raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")


class FullDisk(TrainerCallback):
    """From step 4 on, a write of checkpoints fails."""

    def __init__(self, patch: Callable[[], None]) -> None:
        self.patch = patch

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 4:
            self.patch()


@pytest.mark.parametrize("what", ["weights", "optimizer", "state", "sync"])
def test_a_full_disk_loses_no_checkpoint(
    trainer: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    run = trainer(save_total_limit=1)
    patched = {
        "weights": (run.model, "save_pretrained", raise_enospc),
        "optimizer": (torch, "save", fail_to_write),
        "state": (run, "training_state", raise_enospc),
        "sync": (files, "sync_tree", raise_enospc),
    }[what]
    run.add_callback(FullDisk(lambda: monkeypatch.setattr(*patched)))
    last = tmp_path / "run" / "checkpoint-2"
    with pytest.raises(
        OSError, match=rf"checkpoint of step 4 must be writable .*the last whole one is {last}"
    ):
        run.train()
    assert checkpoints(tmp_path / "run") == ["checkpoint-2"]
    assert load_file(last / "model.safetensors")
    monkeypatch.undo()
    resumed = trainer()
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4


def test_a_stopped_run_is_not_taken_for_a_trained_one(trainer: Callable[..., Any]) -> None:
    run = trainer(save_strategy="no")
    Signal(2, signal.SIGINT)(run)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match="stopped by SIGINT at step 2, checkpoint in") as stop:
        run.train()
    assert isinstance(stop.value, KeyboardInterrupt)
    assert stop.value.exit_code == 130
    assert signal.getsignal(signal.SIGINT) is before


def test_no_room_is_found_before_training(
    trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer()
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match=r"must have .* GiB free for a checkpoint, got 0.0 GiB"):
        run.train()
    assert run.state.global_step == 0


def test_a_checkpoint_takes_the_place_of_one_of_the_same_step(tmp_path: Path) -> None:
    for text in ("old", "new"):
        beside = tmp_path / "beside"
        beside.mkdir()
        (beside / "file").write_text(text)
        files.publish(beside, tmp_path / "checkpoint-1")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert (tmp_path / "checkpoint-1" / "file").read_text() == "new"
