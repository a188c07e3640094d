"""What docs/study.md reads from the committed default study is what its numbers say."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest

from grace.study.claims import HOLDS
from grace.study.comparisons import ABOVE, BELOW
from grace.study.comparisons import UNSEPARATED as ALIKE
from grace.study.options import read_config
from grace.study.report import findings, read_study
from grace.study.sections import Findings
from grace.study.statistics import pair_scores

FOLDER = Path(__file__).parents[2] / "studies" / "default"
PTQ = [f"{method}-{{}}{start}" for method in ("rtn", "gptq", "awq") for start in ("", "-control")]


@pytest.fixture(scope="module")
def study() -> dict[str, Any]:
    return read_study(FOLDER)


@pytest.fixture(scope="module")
def found(study: dict[str, Any]) -> Findings:
    return findings(study)


def _verdict(found: Findings, arm: str, to: str) -> str:
    (one,) = [c for c in found.comparisons if (c.arm, c.to) == (arm, to)]
    return one.verdict


def test_the_results_are_of_the_file_beside_them(study: dict[str, Any]) -> None:
    assert study["config"] == read_config(FOLDER / "study.yaml").as_dict()
    assert study["benchmark"]["questions"] >= 15_000
    several = [arm for arm in study["arms"] if arm["trained"]]
    assert several
    assert all(len(arm["seeds"]) >= 3 for arm in several)


def test_against_the_student_that_trained_as_long(found: Findings) -> None:
    assert {_verdict(found, f"grace-{bits}", "control") for bits in (8, 4, 2)} == {ABOVE}
    assert _verdict(found, "qat-4", "control") == ALIKE
    assert _verdict(found, "qat-2", "control") == BELOW


def test_against_post_training_quantization(study: dict[str, Any], found: Findings) -> None:
    totals = {arm["name"]: arm["total"] for arm in study["arms"]}
    for pattern in PTQ:
        gaps = []
        for bits in (8, 4, 2):
            assert _verdict(found, f"grace-{bits}", pattern.format(bits)) == ABOVE
            gaps.append(totals[f"grace-{bits}"] - totals[pattern.format(bits)])
        assert gaps[2] > 4 * max(gaps[:2])


def test_against_plain_distillation(found: Findings) -> None:
    assert _verdict(found, "grace-8", "kd-8") == ABOVE
    for bits in (4, 2):
        assert _verdict(found, f"grace-{bits}", f"kd-{bits}") == ALIKE
        assert _verdict(found, f"grace-{bits}", f"qat-{bits}") == ABOVE
        assert _verdict(found, f"kd-{bits}", f"qat-{bits}") == ABOVE


def test_parts_of_grace(found: Findings) -> None:
    for part in ("no-gate", "no-rcka", "fixed-beta"):
        assert _verdict(found, "grace-8", f"grace-{part}-8") == ALIKE
    nearer = [c for c in found.claims if c.text.startswith("RCKA brings") and c.bits == "8"]
    assert [claim.verdict for claim in nearer] == [HOLDS]
    (entropy,) = [c for c in found.claims if "entropy" in c.text]
    assert entropy.verdict == HOLDS


def test_position_is_what_differs(study: dict[str, Any]) -> None:
    arms = {arm["name"]: arm for arm in study["arms"]}
    spread: dict[str, list[float]] = {}
    for arm in arms.values():
        for name in arm["subtasks"] if arm["trained"] else ():
            scores = [pair_scores(seed["right"][name]).mean() for seed in arm["seeds"]]
            spread.setdefault(name, []).append(stdev(scores) ** 2)
    assert max(spread, key=lambda name: fmean(spread[name])) == "position"
    for bits in (8, 4):
        grace, kd = (arms[f"{method}-{bits}"]["subtasks"] for method in ("grace", "kd"))
        assert max(grace, key=lambda name: abs(grace[name] - kd[name])) == "position"
    student, teacher = (arms[name]["subtasks"]["position"] for name in ("student", "teacher"))
    assert teacher > 2 * student
    first, *_, last = (row["ce"] for row in study["curves"]["grace-4"])
    assert last > first
