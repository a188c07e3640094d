"""What a run shows of itself: progress, drift, TensorBoard, plots, summary, out of memory."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from grace.nn import FakeQuantLinear
from grace.training import memory, plots, summary
from grace.training.callbacks import read_metrics
from grace.training.memory import OutOfMemory
from grace.training.progress import line


def quantized(trainer: Any) -> list[FakeQuantLinear]:
    return [m for m in trainer.model.modules() if isinstance(m, FakeQuantLinear)]


def test_drift_is_measured_from_the_first_scales(make_trainer: Callable, tmp_path: Path) -> None:
    trainer = make_trainer(max_steps=3)
    first = [layer.log_scale.detach().clone() for layer in quantized(trainer)]
    trainer.train()
    moved = [
        (layer.log_scale - old).abs() for layer, old in zip(quantized(trainer), first, strict=True)
    ]
    last = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    assert last["scale_drift"] == pytest.approx(
        torch.cat([m.flatten() for m in moved]).mean().item()
    )
    for depth in (0, 1):  # seven linears each
        of_layer = torch.cat([m.flatten() for m in moved[7 * depth : 7 * depth + 7]])
        assert last[f"scale_drift/layer_{depth}"] == pytest.approx(of_layer.mean().item())
    layers = [last[f"code_flip_rate/layer_{depth}"] for depth in (0, 1)]
    assert min(layers) <= last["code_flip_rate"] <= max(layers)


def test_one_line_a_logging_step_and_a_bar_with_the_time_left(
    make_trainer: Callable, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "grace.training.progress"):
        make_trainer(max_steps=2, disable_tqdm=False).train()
    lines = [r.message for r in caplog.records if r.name == "grace.training.progress"]
    assert [text.split("  ")[0] for text in lines] == ["step 1/2", "step 2/2"]
    for name in ("ce", "gdkd", "rcka", "beta", "grad_norm", "tokens_per_second"):
        assert f"  {name} " in lines[0]
    assert "layer_0" not in lines[0]
    shown = capsys.readouterr()
    assert [text for text in shown.out.splitlines() if text.startswith("step")] == lines
    assert "train: 100%" in shown.err
    assert "tokens/s" in shown.err


def test_a_line_tells_of_dropped_terms_only_where_there_are_any() -> None:
    logs = {"loss": 1.0, "ce": 0.5, "tokens_per_second": 12345.0, "dropped_terms": 0, "other": 3}
    assert line(3, 9, logs) == "step 3/9  loss 1.0000  ce 0.5000  tokens_per_second 12,345"
    assert "dropped_terms 2" in line(3, 9, {**logs, "dropped_terms": 2})


def test_tensorboard_has_the_curves(
    make_trainer: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    make_trainer(max_steps=2, report_to="tensorboard").train()
    events = accumulator.EventAccumulator(str(tmp_path / "board")).Reload()
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    for name in ("ce", "gdkd", "rcka", "beta", "grad_norm", "scale_drift/layer_1"):
        found = [event.value for event in events.Scalars(f"train/{name}")]
        assert found == pytest.approx([row[name] for row in rows]), name


def test_curves_have_a_panel_a_quantity(tmp_path: Path) -> None:
    rows = [
        {"step": s, "ce": 1.0 / s, "scale_drift/layer_0": 0.1, "scale_drift/layer_1": 0.2 * s}
        for s in (1, 2, 3)
    ]
    drawn = plots._curves(rows, "scale drift by layer")
    assert drawn["scale_drift/layer_1"] == ([1, 2, 3], pytest.approx([0.2, 0.4, 0.6]))
    assert plots._curves(rows, "code-flip rate by layer") == {}
    both = Image.open(plots.plot_curves(rows, tmp_path / "both.png")).size
    one = Image.open(plots.plot_curves(rows, tmp_path / "one.png", ["cross-entropy"])).size
    assert both[0] == 2 * one[0]


def test_the_summary_holds_first_and_last(tmp_path: Path) -> None:
    rows = [
        {"step": 1, "ce": 3.0, "beta": 1.0, "tokens_per_second": 10.0, "dropped_terms": 0},
        {"step": 2, "ce": 2.0, "beta": 1.1, "tokens_per_second": 30.0, "dropped_terms": 1},
    ]
    made = summary.summarize(rows, steps=2, seconds=12.34, memory={"peak_gpu_gib": 1.5}, ranks=2)
    assert made["first"] == {"ce": 3.0, "beta": 1.0}
    assert made["last"] == {"ce": 2.0, "beta": 1.1}
    assert json.loads(summary.write_summary(made, tmp_path).read_text()) == made
    text = "\n".join(summary.lines(made))
    assert "2 steps in 12 s on 2 rank(s), 30 tokens/s" in text
    assert "peak memory: gpu 1.50 GiB" in text
    assert "ce: 3 -> 2" in text
    assert "dropped terms: 1" in text
    short = summary.summarize([], steps=3, seconds=1.0, memory={}, ranks=1)
    assert (short["steps"], short["last"], short["median_tokens_per_second"]) == (3, {}, None)
    assert summary.lines(short)[0] == "3 steps in 1 s on 1 rank(s)"


def test_out_of_memory_says_what_to_lower(
    make_trainer: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(gradient_checkpointing=True)

    def no_memory(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("grace.training.trainer.loss_terms", no_memory)
    with pytest.raises(OutOfMemory, match="must hold step 1, got: CUDA out of memory") as told:
        trainer.train()
    for name in ("per_device_train_batch_size (now 4", "data.max_length (longest row so far"):
        assert name in str(told.value)
    for name in ("chunk_size (now", "teacher_bits=8", "fsdp=true"):
        assert name in str(told.value)
    assert "gradient_checkpointing=true" not in str(told.value)
    assert "longest row so far 0" not in str(told.value)


def test_peak_memory_is_of_this_process() -> None:
    held = torch.ones(2**25)  # 128 MiB
    assert memory.peak_gib(torch.device("cpu"))["peak_host_gib"] > held.nbytes / 2**30
