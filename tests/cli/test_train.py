"""`grace train`: from a YAML to a student that `grace export` packs."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_training import Signal

from grace.cli import main
from grace.evaluation import synthetic


def _train(*arguments: Any) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["train", *map(str, arguments)])
    return int(stop.value.code or 0)


@pytest.fixture
def config(tmp_path: Path, models: Path) -> Path:
    synthetic.training_rows(tmp_path / "data", images=4, seed=0, questions_per_image=6)
    options = {
        "student": str(models / "student"),
        "teacher": str(models / "teacher"),
        "data": {"path": str(tmp_path / "data" / "train.json")},
        "output_dir": str(tmp_path / "run"),
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "group_size": 16,
        "learning_rate": "1e-3",  # as YAML reads 1e-3
        "logging_steps": 1,
        "save_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(options))
    return tmp_path / "config.yaml"


def test_a_run_holds_config_log_metrics_plots_and_a_student_to_export(
    config: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert _train(config, "bits=8", "tau=0.5") == 0
    names = {path.name for path in run.iterdir()}
    assert names == {
        *("config.yaml", "train.log", "metrics.jsonl", "curves.png", "summary.json"),
        *("checkpoint-1", "checkpoint-2", "final"),
    }
    assert yaml.safe_load((run / "config.yaml").read_text())["bits"] == 8
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert {"ce", "gdkd", "rcka", "beta", "tokens_per_second", "grad_norm"} <= set(rows[0])
    assert not list(run.glob("**/*.bin"))
    log = (run / "train.log").read_text()
    assert [f"step {step}/2  loss " in log for step in (1, 2)] == [True, True]
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["steps"], summary["last"]["ce"]) == (2, rows[1]["ce"])
    assert summary["peak_host_gib"] > 0
    with pytest.raises(SystemExit) as stop:
        main(["export", str(run / "final"), str(tmp_path / "packed")])
    assert not stop.value.code
    assert (tmp_path / "packed" / "model.safetensors").is_file()


def test_a_run_is_not_written_over_but_resumed(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert _train(config) == 0
    whole = (tmp_path / "run" / "final" / "model.safetensors").read_bytes()
    capsys.readouterr()
    assert _train(config) == 2
    assert "output_dir must not hold another run" in capsys.readouterr().err
    checkpoint = tmp_path / "run" / "checkpoint-1"
    assert _train(config, f"resume_from_checkpoint={checkpoint}") == 0
    assert (tmp_path / "run" / "final" / "model.safetensors").read_bytes() == whole
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("bitz=4", "unknown option 'bitz', did you mean 'bits'?"),
        ("data.root=x", "unknown option data.root"),
        ("bits=11", "bits must be 2 to 8, got 11"),
        ("group_size=48", "group_size must divide in_features 32"),
        ("learning_rate=fast", "learning_rate must be a number, got 'fast'"),
        ("preset=none", "preset must be one of paper, qwen3vl"),
        ("teacher=", "teacher must be given"),
        ("student=./absent", "absent must be a directory, got nothing"),
        ("data.path=absent.json", "data.path must be a file, got absent.json"),
        ("data.image_root=absent", "train.json, row 0 must be usable"),
        ("data.on_error=ignore", "on_error must be one of"),
        ("data.max_length=4", "max_length is 4"),
        ("nonsense", "override must be key=value, got 'nonsense'"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture, override: str, message: str
) -> None:
    capsys.readouterr()
    assert _train(config, override) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("grace: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "run" / "final").exists()
    if "max_length" not in override:  # told of by the first row that is read
        assert not (tmp_path / "run").exists()


def test_an_output_directory_that_cannot_be_written(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    assert _train(config, f"output_dir={tmp_path / 'file' / 'run'}") == 2
    told = capsys.readouterr().err
    assert "output_dir must be a directory that can be written, got" in told
    assert not (tmp_path / "run").exists()


def test_a_stopped_run_says_how_to_go_on(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from grace.training.trainer import GraceTrainer

    init = GraceTrainer.__init__

    def init_and_stop(trainer: GraceTrainer, *args: Any, **kwargs: Any) -> None:
        init(trainer, *args, **kwargs)
        Signal(1, signal.SIGTERM)(trainer)

    monkeypatch.setattr(GraceTrainer, "__init__", init_and_stop)
    assert _train(config, "save_steps=100") == 128 + signal.SIGTERM
    assert "stopped by SIGTERM at step 1, checkpoint in" in capsys.readouterr().err
    assert (tmp_path / "run" / "checkpoint-1").is_dir()
    assert not (tmp_path / "run" / "final").exists()
    monkeypatch.undo()
    assert _train(config, "resume_from_checkpoint=auto") == 0
    assert (tmp_path / "run" / "final").is_dir()


def test_a_run_that_is_done_is_not_trained_further(config: Path, tmp_path: Path) -> None:
    """A scheduler may start it again; more steps are made where they are asked for."""
    output = tmp_path / "run"

    def content() -> dict[str, bytes]:
        names = ("final/model.safetensors", "final/grace_training.json", "metrics.jsonl")
        return {name: (output / name).read_bytes() for name in names}

    def steps() -> int:
        return json.loads((output / "final" / "grace_training.json").read_text())["steps"]

    options = ("lr_scheduler_type=constant", "save_strategy=steps", "save_steps=1")
    assert _train(config, "max_steps=2", *options) == 0
    before, checkpoints = content(), sorted(output.glob("checkpoint-*"))
    for way in ("auto", "true", str(output / "checkpoint-2")):
        assert _train(config, "max_steps=2", *options, f"resume_from_checkpoint={way}") == 0
        assert content() == before
        assert sorted(output.glob("checkpoint-*")) == checkpoints
    assert _train(config, "max_steps=3", *options, "resume_from_checkpoint=auto") == 0
    assert steps() == 3
    # Where the end was not saved it is made.
    shutil.rmtree(output / "final")
    assert _train(config, "max_steps=3", *options, "resume_from_checkpoint=auto") == 0
    assert (output / "final").is_dir()


@pytest.mark.parametrize("rows", ["[]", "{", ""])
def test_data_without_rows(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture, rows: str
) -> None:
    (tmp_path / "data" / "train.json").write_text(rows)
    assert _train(config) == 2
    assert "grace: data: " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
