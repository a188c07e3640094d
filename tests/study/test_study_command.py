"""`grace study` on the command line, and the default study."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from grace.cli import main
from grace.study.arms import METHODS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stepz": 3}, "unknown option stepz, did you mean 'steps'"),
        ({"make": {"student": {}}}, "make.teacher must be given"),
        ({"sweep": {"learning_rates": ["fast"]}}, "sweep.learning_rates must be a number"),
        (
            {"sweep": {"learning_rates": [1], "candidates": {"awq": [{"learning_rate": 1}]}}},
            "sweep.candidates must name arms of the study, got 'awq'",
        ),
        ({"label_errors": 0.5}, "label_errors must be at least 0 and below 0.5"),
        ({"arms": ["student", "gracE"], "ptq_from": ["student"]}, "method must be one of"),
        ({"arms": ["student", "rtn"]}, "must have control for ptq_from control"),
        ({"bits": [1]}, "bits must be 2 to 8, got 1"),
        ({"steps": 2.5}, "steps must be a whole number, got 2.5"),
        ({"levels": ["brutal"]}, "levels must be of easy, medium, hard"),
        ({"tuned": {"grace": {"taau": 1}}}, "unknown option 'taau', did you mean 'tau'"),
        ({"tuned": {"graze": {"tau": 1}}}, "tuned must name arms of the study, got 'graze'"),
        ({"seeds": [1, 1]}, "seeds must be different values"),
        ({"models": "there"}, "make must be given without models"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    options: dict[str, Any],
    change: dict[str, Any],
    message: str,
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({**options, **change}))
    with pytest.raises(SystemExit) as stop:
        main(["study", str(file), "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "out").exists()


def test_the_command_takes_overrides_and_a_subset(
    done: Path, options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({**options, "steps": 9}))
    with pytest.raises(SystemExit) as stop:
        main(["study", str(file), "steps=3", "--out", str(done), "--arms", "student,rtn"])
    assert stop.value.code == 0
    assert f"report: {done / 'report.html'}" in capsys.readouterr().out.replace("\n", "")
    with pytest.raises(SystemExit):
        main(["study", str(file), "--out", str(done)])
    assert "steps: 3 and 9" in capsys.readouterr().err


def test_the_default_study_has_what_it_promises() -> None:
    from grace.evaluation.drawn.models import make_model
    from grace.study.options import read_config
    from grace.study.pool import spec_of

    config = read_config(Path(__file__).parents[2] / "studies" / "default" / "study.yaml")
    assert config.make is not None
    with torch.device("meta"):
        sizes = {
            which: sum(
                p.numel()
                for p in make_model(
                    replace(getattr(config.make, which)).size, 0, config.pixels
                ).parameters()
            )
            for which in ("teacher", "student")
        }
    assert sizes["teacher"] >= 4 * sizes["student"]
    assert 2 * spec_of(config, "heldout")["images"] >= 15000
    assert set(config.arms) == set(METHODS)
    assert config.bits == (8, 4, 3, 2)
    recipe = config.make.student
    assert recipe.width % config.group_size == recipe.inner % config.group_size == 0
