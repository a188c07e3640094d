"""`grace quickstart` at its smallest, from the drawn benchmark to the report."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from grace.cli import main
from grace.study.config import SCALES
from grace.study.report import read_study, write_report
from grace.training.callbacks import read_metrics
from grace.training.config import GraceConfig

ARMS = [
    *("teacher", "student", "control", "rtn-4", "rtn-4-control", "qat-4", "kd-4", "grace-4"),
    *("rtn-2", "rtn-2-control", "qat-2", "kd-2", "grace-2"),
]

CHARTS = ("scores", "subtasks", "bits", "sizes", "differences", "beta", "cka")


def _quickstart(out: Path, models: Path, *options: str) -> int:
    arguments = ["quickstart", "--scale", "tiny", "--out", str(out), "--models", str(models)]
    with pytest.raises(SystemExit) as stop:
        main([*arguments, *options])
    return int(stop.value.code or 0)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Path:
    out = tmp_path_factory.mktemp("quickstart") / "run"
    assert _quickstart(out, models) == 0
    return out


@pytest.fixture(scope="module")
def study(run: Path) -> dict[str, Any]:
    return read_study(run)


def test_every_arm_is_there_and_scored(study: dict[str, Any]) -> None:
    assert [arm["name"] for arm in study["arms"]] == ARMS
    assert study["benchmark"]["questions"] == 48
    for arm in study["arms"]:
        assert len(arm["subtasks"]) == 6
        assert arm["total"] == pytest.approx(sum(arm["subtasks"].values()))
        assert arm["perception"] + arm["cognition"] == pytest.approx(arm["total"])


def test_the_shipped_models_know_the_benchmark(study: dict[str, Any]) -> None:
    totals = {arm["name"]: arm["total"] for arm in study["arms"]}
    assert totals["teacher"] > totals["student"] > 800
    assert totals["rtn-2"] < totals["rtn-4"]


def test_four_bit_arms_are_scored_packed_and_answer_alike(study: dict[str, Any], run: Path) -> None:
    for arm in study["arms"]:
        assert arm["deployed"] == (arm["bits"] == 4)
        assert arm["agreement"] == (1.0 if arm["bits"] == 4 else None)
    file = run / "arms" / "grace-4-s0" / "packed" / "model.safetensors"
    with safe_open(file, framework="pt") as tensors:
        assert any(name.endswith("weight_packed") for name in tensors.keys())  # noqa: SIM118


def test_low_bit_arms_are_smaller(study: dict[str, Any]) -> None:
    size = {arm["name"]: arm["megabytes"] for arm in study["arms"]}
    assert size["grace-2"] < size["grace-4"] < size["student"] == size["control"]
    assert size["rtn-4"] == size["grace-4"]


def test_trained_arms_leave_curves(study: dict[str, Any], run: Path) -> None:
    curves = study["curves"]
    assert set(curves) == {
        name for name in ARMS if name not in ("teacher", "student") and "rtn" not in name
    }
    assert {"ce", "gdkd", "rcka", "beta"} <= set(curves["grace-4"][-1])
    assert {"kd"} <= set(curves["kd-4"][-1])
    assert {row["beta"] for row in curves["kd-4"]} == {1.0}
    assert not {"gdkd", "kd", "rcka", "beta"} & set(curves["qat-4"][-1])
    assert "code_flip_rate" not in curves["control"][-1]
    merged = read_metrics(run / "metrics.jsonl")
    assert {(row["arm"], row["seed"]) for row in merged} == {(arm, 0) for arm in curves}


def test_the_report_stands_alone(run: Path) -> None:
    html = (run / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)"', html)
    study = read_study(run)
    examples = study.get("examples") or [study["example"]]
    assert len(sources) == len(CHARTS) + 1 + len(examples)  # and the curves
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"https?://|url\(|@import|<script|<link", html)
    for text in ("GRACE", "agree with the fake-quantized", "48 held-out questions", "1 seed"):
        assert text in html


def test_every_figure_comes_from_study_json_alone(run: Path, tmp_path: Path) -> None:
    (tmp_path / "study.json").write_bytes((run / "study.json").read_bytes())
    files = write_report(tmp_path)
    charts = {f"{name}.png" for name in (*CHARTS, "curves")}
    assert {file.name for file in files} == {"report.md", "report.html", *charts}
    assert (tmp_path / "report.md").read_text() == (run / "report.md").read_text()
    assert (tmp_path / "report.html").read_text() == (run / "report.html").read_text()


def test_what_is_done_is_not_done_again(run: Path, models: Path) -> None:
    results = {path: path.stat().st_mtime_ns for path in run.glob("arms/*/result.json")}
    (run / "arms" / "qat-2-s0" / "result.json").unlink()
    before = json.loads((run / "study.json").read_text())["arms"]
    assert _quickstart(run, models) == 0
    again = {path for path, time in results.items() if path.stat().st_mtime_ns != time}
    assert {path.parent.name for path in again} == {"qat-2-s0"}
    after = json.loads((run / "study.json").read_text())["arms"]
    for a, b in zip(before, after, strict=True):
        assert a["subtasks"] == b["subtasks"], a["name"]


def test_a_packed_model_that_answers_otherwise_fails_the_run(study: dict[str, Any]) -> None:
    from grace.study.run import check_agreement

    arm = {"name": "grace-4", "agreement": 0.99}
    with pytest.raises(RuntimeError, match=r"packed grace-4 must answer .* 99.5% .*, got 99.00%"):
        check_agreement({"arms": [arm], "config": {"least_agreement": 0.995}})
    check_agreement(study)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--group-size", "48"), "group_size must divide in_features"),
        (("--heldout-images", "3"), "heldout_images must be even and at least 2, got 3"),
        (("--models", "/nowhere"), "/nowhere/student must be a directory, got nothing"),
        (("--steps", "many"), "--steps"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    tmp_path: Path,
    models: Path,
    capsys: pytest.CaptureFixture,
    options: tuple[str, ...],
    message: str,
) -> None:
    out = tmp_path / "run"
    assert _quickstart(out, models, *options) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1
    assert message in told[0]
    assert not out.exists()


def test_options_are_those_that_tuning_chose() -> None:
    folder = Path(__file__).parents[2] / "studies" / "quickstart" / "tuning"
    swept = json.loads((folder / "study.json").read_text())["sweep"]
    assert swept.keys() == {"control", "qat-4", "qat-2", "kd-4", "kd-2", "grace-4", "grace-2"}
    config = SCALES["default"]
    defaults = {"learning_rate": config.learning_rate, "beta_init": GraceConfig.beta_init}
    for arm, found in swept.items():
        options = {**defaults, **config.options_of(found["method"], arm)}
        assert found["chosen"].items() <= options.items(), arm
