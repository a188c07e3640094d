"""A run from the teacher's cache is the run with the teacher; a cache of something else is none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_training import STUDENT, TEACHER, make_model

from grace.evaluation import tiny
from grace.training import teacher_cache
from grace.training.callbacks import read_metrics
from grace.training.precompute import precompute_teacher
from grace.training.run import run
from grace.training.run_config import parse_config
from grace.training.teacher_cache import CachedTeacherRows


@pytest.fixture(scope="module")
def folder(rows_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints `student` and `teacher`, and `rows` of which every other has no image."""
    root = tmp_path_factory.mktemp("cache")
    for name, size, seed in (("student", STUDENT, 0), ("teacher", TEACHER, 1)):
        make_model(size, seed).save_pretrained(root / name)
        tiny.make_processor().save_pretrained(root / name)
    rows = json.loads((rows_root / "train.json").read_text())[:20]
    for row in rows[::2]:
        del row["image"]
        row["conversations"][0]["value"] = row["conversations"][0]["value"].removeprefix("<image>")
    (root / "rows").mkdir()
    (root / "rows" / "images").symlink_to(rows_root / "images")
    (root / "rows" / "train.json").write_text(json.dumps(rows))
    return root


@pytest.fixture(scope="module")
def options(folder: Path) -> dict[str, Any]:
    return {
        "student": str(folder / "student"),
        "teacher": str(folder / "teacher"),
        "data": {"path": str(folder / "rows" / "train.json")},
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "group_size": 16,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
    }


@pytest.fixture(scope="module")
def cache(folder: Path, options: dict[str, Any]) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher_cache, "_SHARD_ROWS", 8)
        config = parse_config({**options, "output_dir": str(folder / "unused")})
        return precompute_teacher(config, folder / "cache", batch_size=3)


def weights(run: Path) -> bytes:
    return (run / "final" / "model.safetensors").read_bytes()


def test_a_run_from_the_cache_is_the_run_with_the_teacher(
    options: dict[str, Any], cache: Path, tmp_path: Path
) -> None:
    assert len(list(cache.glob("rows-*.safetensors"))) == 3
    run(parse_config({**options, "output_dir": str(tmp_path / "run")}))
    cached = {**options, "output_dir": str(tmp_path / "cached"), "teacher_cache": str(cache)}
    run(parse_config(cached))
    rows = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("run", "cached")]
    assert len(rows[0]) == 2
    for a, b in zip(*rows, strict=True):
        for name in ("ce", "gdkd", "rcka", "beta", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-5), name
    # Resumed in the middle of an epoch, rows still find their own.
    whole = weights(tmp_path / "cached")
    shutil.rmtree(tmp_path / "cached" / "final")
    checkpoint = str(tmp_path / "cached" / "checkpoint-1")
    run(parse_config({**cached, "resume_from_checkpoint": checkpoint}))
    assert weights(tmp_path / "cached") == whole


def test_an_interrupted_cache_is_gone_on_with(
    options: dict[str, Any], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher_cache, "_SHARD_ROWS", 8)
    config = parse_config({**options, "output_dir": str(tmp_path / "unused")})
    save = teacher_cache._save

    def fail_at_the_second(tensors: Any, path: Path) -> None:
        if path.name == "rows-00001.safetensors":
            raise OSError("disk full")
        save(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(teacher_cache, "_save", fail_at_the_second)
        with pytest.raises(OSError, match="disk full"):
            precompute_teacher(config, tmp_path / "cache", batch_size=3)
    with pytest.raises(ValueError, match="teacher_cache: must be complete"):
        run(parse_config({**options, "output_dir": "x", "teacher_cache": str(tmp_path / "cache")}))
    first = (tmp_path / "cache" / "rows-00000.safetensors").stat().st_mtime_ns
    precompute_teacher(config, tmp_path / "cache", batch_size=3)
    assert (tmp_path / "cache" / "rows-00000.safetensors").stat().st_mtime_ns == first
    for name in ("cache.json", "rows-00001.safetensors", "rows-00002.safetensors"):
        assert (tmp_path / "cache" / name).read_bytes() == (cache / name).read_bytes()


@pytest.mark.parametrize("what", ["rows", "template", "teacher", "layer", "max_length"])
def test_a_cache_of_something_else_is_refused(
    options: dict[str, Any], folder: Path, cache: Path, tmp_path: Path, what: str
) -> None:
    changed = dict(options, output_dir=str(tmp_path / "run"), teacher_cache=str(cache))
    if what == "rows":
        rows = json.loads((folder / "rows" / "train.json").read_text())
        (tmp_path / "images").symlink_to(folder / "rows" / "images")
        (tmp_path / "train.json").write_text(json.dumps(rows[::-1]))
        changed["data"] = {"path": str(tmp_path / "train.json")}
    elif what == "template":
        student = shutil.copytree(folder / "student", tmp_path / "student")
        template = student / "chat_template.jinja"
        template.write_text(template.read_text().replace("USER:", "USER: "))
        changed["student"] = str(student)
    elif what == "teacher":
        make_model(TEACHER, seed=2).save_pretrained(tmp_path / "teacher")
        changed["teacher"] = str(tmp_path / "teacher")
    elif what == "layer":
        changed["rcka_layer"] = -3
    else:
        changed["data"] = {**options["data"], "max_length": 100}
    with pytest.raises(ValueError, match=rf"must be made from the {what} of this run"):
        run(parse_config(changed))
    assert not (tmp_path / "run").exists()


def test_what_is_no_cache(options: dict[str, Any], tmp_path: Path) -> None:
    config = parse_config({**options, "output_dir": str(tmp_path / "run")})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    with pytest.raises(ValueError, match="folder must be empty or a cache"):
        precompute_teacher(config, tmp_path / "full")
    with pytest.raises(FileNotFoundError, match="must be a folder of `grace precompute-teacher`"):
        run(parse_config({**config.source, "teacher_cache": str(tmp_path / "full")}))
    with pytest.raises(ValueError, match="teacher must be the directory that teacher_cache"):
        parse_config({**config.source, "teacher": "owner/name", "teacher_cache": "x"})
    with pytest.raises(ValueError, match="batches must bring teacher_last"):
        CachedTeacherRows(torch.zeros(2, 2), config.training)()


def test_the_command(options: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    from grace.cli import main

    text = yaml.safe_dump({**options, "output_dir": str(tmp_path / "run")})
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(SystemExit) as stop:
        main(["precompute-teacher", str(tmp_path / "config.yaml"), str(tmp_path / "cache")])
    assert not stop.value.code
    assert f"teacher_cache={tmp_path / 'cache'}" in capsys.readouterr().out
    assert json.loads((tmp_path / "cache" / "cache.json").read_text())["complete"]
