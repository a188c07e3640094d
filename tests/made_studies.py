"""Made-up studies with known scores, in the form of study.json and questions.npz."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from grace.study.gather import FORMAT, VERSION
from grace.study.statistics import pair_scores

FULL = 32
POINTS = np.array([0.0, 50.0, 200.0])


def arm(
    name: str,
    rights: Sequence[Mapping[str, str]],
    *,
    bits: int = FULL,
    trained: bool = False,
    start: str = "student",
    cka: tuple[float, float] | None = None,
) -> dict[str, Any]:
    """An arm by what it got right, a seed each."""
    method = name.removesuffix("-control").removesuffix(f"-{bits}")
    subtasks = {
        s: float(np.mean([pair_scores(right[s]).mean() for right in rights])) for s in rights[0]
    }
    totals = [sum(pair_scores(right[s]).mean() for s in right) for right in rights]
    known = None if cka is None else {"before": cka[0], "after": cka[1]}
    return {
        "name": name,
        "label": method.upper() + ("" if start == "student" else ", trained on"),
        "description": f"the arm {name}",
        "method": method,
        "bits": bits,
        "start": start,
        "trained": trained,
        "deployed": False,
        "agreement": None,
        "megabytes": 1 + bits / 8,
        "subtasks": subtasks,
        "total": float(np.mean(totals)),
        "total_error": 1.0,
        "errors": dict.fromkeys(subtasks, 1.0),
        "spread": float(np.std(totals, ddof=1)) if len(totals) > 1 else None,
        "cka": known or {"before": None, "after": None},
        "seeds": [
            {"seed": seed, "right": dict(right), "cka": known} for seed, right in enumerate(rights)
        ],
    }


def rights(
    random: np.random.Generator, share: float, seeds: int = 1, images: int = 60
) -> list[dict[str, str]]:
    """Two subtasks, every question right with a probability."""
    return [
        {
            name: "".join(map(str, random.binomial(2, share, images)))
            for name in ("existence", "count")
        }
        for _ in range(seeds)
    ]


def png(color: str = "red") -> str:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(file, "png")
    return base64.b64encode(file.getvalue()).decode()


def study(arms: Sequence[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """study.json of these arms; `more` adds or replaces keys."""
    images = sum(len(digits) for digits in arms[0]["seeds"][0]["right"].values())
    said = {item["name"]: "Yes" for item in arms} | {arms[-1]["name"]: "No"}
    example = {"subtask": "count", "question": "Is it? <b>", "truth": "Yes", "image": png()}
    return {
        "format": FORMAT,
        "version": VERSION,
        "config": {"seeds": [0], "steps": 3, "batch_images": 4, "questions_per_image": 2},
        "environment": dict.fromkeys(("grace", "torch", "transformers", "python", "device"), "x"),
        "seconds": 1.0,
        "benchmark": {
            "subtasks": ["existence", "count"],
            "questions": 2 * images,
            "images": images,
            "prompt": "official",
        },
        "arms": list(arms),
        "differences": [],
        "example": {**example, "answers": said},
        "curves": {},
        **more,
    }


def questions(random: np.random.Generator, count: int = 240) -> dict[str, np.ndarray]:
    """questions.npz: a teacher that errs where its entropy is high, and two students."""
    entropy = random.gamma(2.0, 0.15, count)
    wrong = random.random(count) < np.clip(0.6 * entropy, 0, 1)
    truth = np.where(random.random(count) < 0.5, "Yes", "No")
    other = np.where(truth == "Yes", "No", "Yes")
    half = count // 2
    return {
        "subtask": np.array(["existence"] * half + ["count"] * (count - half)),
        "level": np.full(count, ""),
        "question": np.array([f"question {number}" for number in range(count)]),
        "truth": truth,
        "image": np.arange(count, dtype=np.int32) // 2,
        "said.teacher-s0": np.where(wrong, other, truth),
        "right.teacher-s0": ~wrong,
        "entropy.teacher-s0": entropy.astype(np.float16),
        "said.rtn-4-s0": np.where(random.random(count) < 0.3, other, truth),
        "said.grace-4-s0": np.where(random.random(count) < 0.1, other, truth),
    }
