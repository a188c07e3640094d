"""study.json: everything a report shows, in one file."""

from __future__ import annotations

import base64
import statistics as plain
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from grace.evaluation import mme
from grace.study.arms import METHODS, Arm
from grace.study.config import StudyConfig
from grace.study.statistics import paired_difference, subtask_errors, total_error
from grace.training.callbacks import read_metrics

FORMAT, VERSION = "grace-study", 1


def gather(
    config: StudyConfig,
    arms: Sequence[Arm],
    results: Sequence[Mapping[str, Any]],
    root: Path,
    seconds: float,
) -> dict[str, Any]:
    """The study as JSON.

    Keys: `config`, `environment`, `benchmark` (images, questions, subtasks), `seconds`, `arms`
    (in order, see `_arm`), `differences` (paired, of every arm to the control and to the methods
    before it at its bits), `example` (an image with every arm's answer), `curves` (rows of
    metrics.jsonl by arm).
    """
    by_arm = {arm: [r for r in results if r["arm"] == arm.name] for arm in arms}
    first = results[0]["score"]
    return {
        "format": FORMAT,
        "version": VERSION,
        "config": config.as_dict(),
        "environment": _environment(),
        "seconds": seconds,
        "benchmark": {
            "subtasks": list(first["subtasks"]),
            "questions": first["questions"],
            "images": sum(subtask["images"] for subtask in first["subtasks"].values()),
            "prompt": first["prompt"],
        },
        "arms": [_arm(arm, by_arm[arm]) for arm in arms],
        "differences": _differences(by_arm),
        "example": _example(root, arms, config.seeds[0]),
        "curves": {
            arm.name: read_metrics(_folder(root, arm, config.seeds[0]) / "metrics.jsonl")
            for arm in arms
            if arm.trained
        },
    }


def _folder(root: Path, arm: Arm, seed: int) -> Path:
    return root / "arms" / f"{arm.name}-s{seed}"


def _environment() -> dict[str, Any]:
    import platform

    import transformers

    from grace import __version__

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "grace": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": gpu or "cpu",
    }


def _arm(arm: Arm, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One arm: scores are means over its seeds, `errors` over pairs of images, `spread` over
    seeds (None for one)."""
    scores = [result["score"] for result in results]
    rights = [result["right"] for result in results]
    totals = [score["total"] for score in scores]
    agreements = [result["agreement"] for result in results if result["agreement"] is not None]
    names = scores[0]["subtasks"]
    return {
        "name": arm.name,
        "label": arm.label,
        "description": METHODS[arm.method].description,
        "method": arm.method,
        "bits": arm.bits,
        "trained": arm.trained,
        "deployed": all(result["deployed"] for result in results),
        "agreement": min(agreements) if agreements else None,
        "megabytes": results[0]["bytes"] / 1e6,
        "subtasks": {s: plain.fmean(x["subtasks"][s]["score"] for x in scores) for s in names},
        "perception": plain.fmean(score["perception"] for score in scores),
        "cognition": plain.fmean(score["cognition"] for score in scores),
        "total": plain.fmean(totals),
        "errors": subtask_errors(rights),
        "total_error": total_error(rights),
        "spread": plain.stdev(totals) if len(totals) > 1 else None,
        "seeds": [
            {key: result[key] for key in ("seed", "right", "training_seconds", "scoring_seconds")}
            | {"total": result["score"]["total"], "agreement": result["agreement"]}
            for result in results
        ],
    }


def _differences(by_arm: Mapping[Arm, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Total score of every quantized arm minus the control's and those before it at its bits."""
    rights = {arm.name: [r["right"] for r in results] for arm, results in by_arm.items()}
    found = []
    for arm in (a for a in by_arm if a.quantized):
        same_bits = [other.name for other in by_arm if other.bits == arm.bits]
        before = same_bits[: same_bits.index(arm.name)]
        for other in ["control", *before] if "control" in rights else before:
            points, error = paired_difference(rights[arm.name], rights[other])
            found.append({"arm": arm.name, "to": other, "points": points, "error": error})
    return found


def _example(root: Path, arms: Sequence[Arm], seed: int) -> dict[str, Any] | None:
    """The first held-out question that the teacher answers right and the other arms do not all
    answer alike: its image, its truth, and what each arm says."""
    answers = {arm.name: mme.read_results(_folder(root, arm, seed) / "answers") for arm in arms}
    rows = mme.load(root / "data" / "heldout")
    places = {(r.subtask, r.image.name, r.question): r for r in rows}
    said: dict[tuple[str, str, str], dict[str, str]] = {}
    for arm, predicted in answers.items():
        for row in predicted:
            said.setdefault((row.subtask, row.image.name, row.question), {})[arm] = (
                row.prediction or ""
            )
    for key, by_arm in said.items():
        students = {text for arm, text in by_arm.items() if arm != "teacher"}
        truth = places[key].answer
        if len(students) > 1 and by_arm.get("teacher", truth) == truth:
            return _shown(places[key], by_arm)
    return _shown(rows[0], said[(rows[0].subtask, rows[0].image.name, rows[0].question)])


def _shown(row: mme.Row, by_arm: Mapping[str, str]) -> dict[str, Any]:
    return {
        "subtask": row.subtask,
        "question": row.question,
        "truth": row.answer,
        "answers": dict(by_arm),
        "image": base64.b64encode(row.image.read_bytes()).decode(),
    }
