"""The arms of a study: a method at a number of bits, each a recipe for one model.

An arm names the model it starts from, whether it is quantized, and how it is trained. Trained arms
share student, data, steps, learning rate and seeds; they differ only in the options listed here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

FULL = 32  # bits of an arm that is not quantized

# Options of GraceConfig that make a trained method; {} is GRACE as it is.
_CROSS_ENTROPY = {"distillation": "none", "omega": 0.0}
_PLAIN_KD = {"distillation": "kd", "omega": 0.0, "adaptive_beta": False}


@dataclass(frozen=True)
class Method:
    """A way to a model: `options` of GraceConfig, None for one that is not trained further."""

    label: str
    description: str
    options: dict[str, Any] | None = None
    model: str = "student"


METHODS: dict[str, Method] = {
    "teacher": Method("teacher", "the teacher itself", model="teacher"),
    "student": Method("student", "the student as it comes"),
    "control": Method(
        "student, trained on",
        "the student trained on for the same steps, cross-entropy, not quantized",
        _CROSS_ENTROPY,
    ),
    "rtn": Method("RTN", "post-training: scales of least squared error, round to nearest"),
    "qat": Method("QAT", "quantization-aware training, cross-entropy alone", _CROSS_ENTROPY),
    "kd": Method("QAT + KD", "and T²·KL to the teacher over the vocabulary, fixed β", _PLAIN_KD),
    "grace": Method("GRACE", "and gated DKD, RCKA, adaptive β", {}),
}
_NEVER_QUANTIZED = ("teacher", "student", "control")


@dataclass(frozen=True)
class Arm:
    """A method at a number of bits; `bits` is `FULL` where nothing is quantized."""

    method: str
    bits: int = FULL
    options: dict[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(
                f"study: method must be one of {', '.join(METHODS)}, got {self.method!r}"
            )
        if (self.bits == FULL) != (self.method in _NEVER_QUANTIZED):
            raise ValueError(f"study: {self.method} must not be at {self.bits} bits")

    @property
    def name(self) -> str:
        """A file name: `grace-4`, `student`."""
        return self.method if self.bits == FULL else f"{self.method}-{self.bits}"

    @property
    def label(self) -> str:
        """What tables and charts call the method."""
        return METHODS[self.method].label

    @property
    def quantized(self) -> bool:
        """Whether the decoder's linears are quantized."""
        return self.bits != FULL

    @property
    def trained(self) -> bool:
        """Whether the arm trains at all; one that does not is the same for every seed."""
        return METHODS[self.method].options is not None

    @property
    def deployable(self) -> bool:
        """Whether packed kernels exist for its bits, so that it is scored as it is deployed."""
        return self.bits in (4, 8)

    def training_options(self) -> dict[str, Any]:
        """Options of GraceConfig for its training; empty where it is not trained."""
        options = METHODS[self.method].options
        if options is None:
            return {}
        quantization = {"bits": self.bits} if self.quantized else {"quantization": False}
        return {**quantization, **options, **self.options}


def quickstart_arms(bits: tuple[int, ...] = (4, 2)) -> list[Arm]:
    """Teacher, student and control, and RTN, QAT, QAT + KD and GRACE at each number of bits."""
    low = [Arm(method, b) for b in bits for method in ("rtn", "qat", "kd", "grace")]
    return [Arm("teacher"), Arm("student"), Arm("control"), *low]
