"""Everything a study is made from, and the sizes it comes in."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from grace.version import __version__

# GDKD of models this small is ten times what the paper's tau expects (words that are never an
# answer have logits that nothing trained): beta is a tenth of the paper's.
SMALL_BETA = {"tau": 4.0, "eta": 3e-4, "beta_init": 0.1, "beta_min": 0.05, "beta_max": 0.2}


@dataclass(frozen=True)
class StudyConfig:
    """Data, training and scoring of a study on the synthetic benchmark.

    Attributes:
        seed: of the drawn benchmark, training and held-out.
        seeds: training seeds; every trained arm runs once for each.
        steps: optimizer steps of every trained arm.
        batch_images: images a step; each comes with `questions_per_image` questions.
        train_images: training images drawn; fewer than steps * batch_images means epochs.
        heldout_images: images a subtask of the held-out benchmark, two questions each.
        bits, group_size: of the quantized arms.
        learning_rate: of every trained arm that `tuned` says nothing of.
        tuned: options of GraceConfig by method or arm (the arm's own come last), found with the
            same budget for every method (`grace.study.sweep`).
        models: directory of the models, None for those that ship with grace.
        split: what is scored: "heldout", or "validation" to tune on.
    """

    seed: int = 0
    seeds: tuple[int, ...] = (0, 1)
    steps: int = 300
    batch_images: int = 32
    questions_per_image: int = 6
    train_images: int = 6400
    heldout_images: int = 400
    bits: tuple[int, ...] = (4, 2)
    group_size: int = 32
    learning_rate: float = 1e-3
    tuned: dict[str, dict[str, Any]] = field(default_factory=dict)
    warmup_steps: int = 20
    weight_decay: float = 0.01
    batch_size: int = 128
    models: str | None = None
    split: str = "heldout"

    def __post_init__(self) -> None:
        for name in ("steps", "batch_images", "questions_per_image", "train_images", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"study: {name} must be at least 1, got {getattr(self, name)}")
        if self.heldout_images < 2 or self.heldout_images % 2:
            raise ValueError(
                f"study: heldout_images must be even and at least 2, got {self.heldout_images}"
            )
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"study: seeds must be different numbers, got {self.seeds}")

    def __hash__(self) -> int:
        return hash(self.fingerprint())

    def options_of(self, method: str, arm: str) -> dict[str, Any]:
        """Tuned options of GraceConfig for an arm."""
        return {**self.tuned.get(method, {}), **self.tuned.get(arm, {})}

    def as_dict(self) -> dict[str, Any]:
        """The configuration as JSON holds it."""
        return json.loads(json.dumps(asdict(self)))

    def fingerprint(self) -> str:
        """Changes with whatever changes a result: results of another one are not taken over."""
        return _hash({name: value for name, value in self.as_dict().items() if name != "seeds"})

    def data_fingerprint(self) -> str:
        """Changes with whatever changes what is drawn, or what the teacher says of it."""
        return _hash({name: value for name, value in self.as_dict().items() if name in _DATA})


# Fields that the drawn data and the teacher's cached rows depend on.
_DATA = (
    *("seed", "questions_per_image", "train_images", "heldout_images"),
    *("models", "split"),
)


def _hash(facts: dict[str, Any]) -> str:
    text = json.dumps({"grace": __version__, **facts}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def from_dict(options: dict[str, Any]) -> StudyConfig:
    """The inverse of `as_dict`."""
    made = dict(options)
    for name in ("seeds", "bits"):
        made[name] = tuple(made[name])
    return StudyConfig(**made)


# Tuned on the validation split, studies/quickstart/sweep.md.
_DEFAULT = StudyConfig(
    tuned={
        "qat-2": {"learning_rate": 2e-3},
        "grace": {"omega": 0.3, **SMALL_BETA},
        "grace-2": {"learning_rate": 2e-3},
    }
)
SCALES: dict[str, StudyConfig] = {
    "default": _DEFAULT,
    # Everything once, for tests: says nothing about methods.
    "tiny": replace(
        _DEFAULT,
        seeds=(0,),
        steps=4,
        batch_images=4,
        train_images=16,
        heldout_images=4,
        warmup_steps=1,
        batch_size=64,
    ),
}
