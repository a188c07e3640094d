"""Which arms are compared, and what the comparisons say once there are many of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grace.study.arms import FULL
from grace.study.resampling import Difference, Resampled, holm

LEVEL = 0.05
ABOVE, BELOW, UNSEPARATED = "above", "below", "not separated"
ONE_SEED = "one seed"
Arm = Mapping[str, Any]


@dataclass(frozen=True)
class Comparison:
    """An arm minus another: points with their interval, p, and p by Holm within its family, the
    comparisons at one number of bits; `seeds_known`: whether these hold what seeds change."""

    arm: str
    to: str
    bits: int
    difference: Difference
    adjusted: float
    seeds_known: bool = True

    @property
    def verdict(self) -> str:
        """Whether the arm is above or below the other; `UNSEPARATED` above 5 % by Holm. `ONE_SEED`
        where the difference may be the seed's: it says nothing about methods."""
        if not self.seeds_known:
            return ONE_SEED
        if self.adjusted > LEVEL:
            return UNSEPARATED
        return ABOVE if self.difference.value > 0 else BELOW


def compare(arms: Sequence[Arm], resampled: Resampled) -> list[Comparison]:
    """All comparisons, family after family."""
    found = []
    for bits in dict.fromkeys(arm["bits"] for arm in arms):
        pairs = [(arm, to) for arm in arms if arm["bits"] == bits for to in partners(arm, arms)]
        made = [resampled.difference(arm["name"], to["name"]) for arm, to in pairs]
        adjusted = holm([difference.p for difference in made])
        found += [
            Comparison(arm["name"], to["name"], bits, difference, p, _known(arm, to, resampled))
            for (arm, to), difference, p in zip(pairs, made, adjusted, strict=True)
        ]
    return found


def _known(arm: Arm, to: Arm, resampled: Resampled) -> bool:
    return resampled.knows_seeds(arm["name"]) and resampled.knows_seeds(to["name"])


def partners(arm: Arm, arms: Sequence[Arm]) -> list[Arm]:
    """What an arm is compared with.

    One that trains: the arms of its bits that do not; the student, as it comes and trained on;
    QAT and QAT + KD where they stand before it; and, GRACE, each of its variants. A variant: the
    student trained on, beside GRACE, which is compared with it. One that does not train: the model
    it starts from, and round-to-nearest.
    """
    if arm["method"] == "teacher":
        return []
    before = arms[: [a["name"] for a in arms].index(arm["name"])]
    alike = [a for a in before if a["bits"] == arm["bits"] and a["method"] != "teacher"]
    if not arm["trained"]:
        start = [a for a in arms if a["name"] == start_of(arm) and a["name"] != arm["name"]]
        plain = [a for a in alike if a["method"] == "rtn" and start_of(a) == start_of(arm)]
        return start + plain
    if arm["bits"] == FULL:
        return alike
    if any(arm["method"].startswith(f"{a['method']}-") for a in alike):
        return [a for a in arms if a["method"] == "control"]
    return _partners_of_trained(arm, arms, alike)


def _partners_of_trained(arm: Arm, arms: Sequence[Arm], alike: Sequence[Arm]) -> list[Arm]:
    """Of a quantized arm that trains and is no variant; `alike` stand before it at its bits."""
    own = [a for a in arms if a["bits"] == arm["bits"]]
    return [
        *(a for a in arms if a["method"] in ("student", "control")),
        *(a for a in own if not a["trained"]),
        *(a for a in alike if a["method"] in ("qat", "kd")),
        *(a for a in own if a["method"].startswith(f"{arm['method']}-")),
    ]


def start_of(arm: Arm) -> str:
    """Name of the arm that one starts from."""
    return arm.get("start", "student") if arm["method"] != "student" else ""


def counterpart(arm: Arm, arms: Sequence[Arm]) -> Arm | None:
    """The arm that is the same but for quantization: what is kept is told of it."""
    if not arm["trained"]:
        name = start_of(arm)
    elif arm["method"].startswith("grace") and any(a["method"] == "distil" for a in arms):
        name = "distil"
    else:
        name = "control"
    return next((a for a in arms if a["name"] == name), None)
