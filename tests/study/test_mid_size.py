"""The mid-sized study at its tiny scale: every stage once."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import LlamaConfig, LlamaModel

from grace.evaluation import tiny_training

SCRIPT = Path(__file__).parents[2] / "studies" / "mid_size" / "run.py"


@pytest.fixture(scope="module")
def mid_size() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mid_size", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["mid_size"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_every_stage_once(
    mid_size: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_training, "REPORT_EVERY", 1)
    monkeypatch.setattr(tiny_training, "validate", lambda *_: {"count": 0.5})
    said: list[str] = []
    result = mid_size.study(tmp_path, mid_size.TINY, say=said.append, disable_tqdm=True)
    assert json.loads((tmp_path / "mid_size.json").read_text()) == result
    assert set(result["scores"]) == {"student", "rtn", "grace"}
    for scores in result["scores"].values():
        assert scores["questions"] == 6 * 2 * 2
        assert 0 <= scores["total"] <= 6 * 200
    assert result["summary"]["steps"] == 3
    assert {"curves.png", "metrics.jsonl", "final"} <= {
        path.name for path in (tmp_path / "run").iterdir()
    }
    text = mid_size.report(tmp_path)
    assert text == (tmp_path / "report.md").read_text()
    totals = (f"{result['scores'][arm]['total']:.1f}" for arm in ("student", "rtn", "grace"))
    assert f"| total | {' | '.join(totals)} |" in text
    assert (tmp_path / "curves.png").is_file()
    made = (tmp_path / "run" / "metrics.jsonl").stat().st_mtime_ns
    again = mid_size.Study(tmp_path, mid_size.TINY, 0, said.append)
    student = again.warm_up()
    assert again.train(student, student, {}) == tmp_path / "run" / "final"
    assert (tmp_path / "run" / "metrics.jsonl").stat().st_mtime_ns == made


def test_the_mid_sized_student_is_mid_sized(mid_size: ModuleType) -> None:
    size = mid_size.MID.recipe.size
    group = mid_size.MID.training["group_size"]
    assert size.width % group == size.inner % group == 0
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=size.width,
        intermediate_size=size.inner,
        num_attention_heads=size.heads,
        num_hidden_layers=size.layers,
    )
    with torch.device("meta"):
        parameters = sum(p.numel() for p in LlamaModel(config).parameters())
    assert 50e6 < parameters < 150e6


def test_the_committed_report_is_of_the_committed_result(
    mid_size: ModuleType, tmp_path: Path
) -> None:
    (tmp_path / "mid_size.json").write_text((SCRIPT.parent / "mid_size.json").read_text())
    assert mid_size.report(tmp_path) == (SCRIPT.parent / "report.md").read_text()
