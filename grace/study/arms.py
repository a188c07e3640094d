"""The arms of a study: a method at a number of bits, each a recipe for one model.

An arm names the model it starts from, whether it is quantized, and how it is trained. Trained arms
share student, data, steps and seeds, and the same search for a learning rate; they differ only in
the options listed here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grace.study.config import StudyConfig

FULL = 32  # bits of an arm that is not quantized

# Options of GraceConfig that make a trained method; {} is GRACE as it is.
_CROSS_ENTROPY = {"distillation": "none", "omega": 0.0}
_PLAIN_KD = {"distillation": "kd", "omega": 0.0, "adaptive_beta": False}


@dataclass(frozen=True)
class Method:
    """A way to a model.

    Attributes:
        label: in tables and charts.
        description: in a sentence.
        options: of GraceConfig; None for a method that does not train.
        tuned_as: whose tuned options it begins with, and whose learning rate it takes where it is
            not swept itself; its own options come last.
        quantized: whether it runs at low bits.
        zero_points: whether groups have them; no kernel here serves such, and no trained arm has.
    """

    label: str
    description: str
    options: dict[str, Any] | None = None
    tuned_as: str | None = None
    quantized: bool = True
    zero_points: bool = False


METHODS: dict[str, Method] = {
    "teacher": Method("teacher", "the teacher itself", quantized=False),
    "student": Method("student", "the student as it comes", quantized=False),
    "control": Method(
        "student, trained on",
        "the student trained on for the same steps, cross-entropy, not quantized",
        _CROSS_ENTROPY,
        quantized=False,
    ),
    "distil": Method(
        "student, distilled",
        "the student trained on with all terms of GRACE, not quantized",
        {},
        tuned_as="grace",
        quantized=False,
    ),
    "rtn": Method("RTN", "post-training: scales of least squared error, round to nearest"),
    "gptq": Method("GPTQ", "post-training: rounding that makes up for its errors, calibrated"),
    "awq": Method("AWQ", "post-training: channels scaled by their activations, calibrated"),
    "rtn-asymmetric": Method(
        "RTN, asymmetric", "round to nearest, with zero points", zero_points=True
    ),
    "gptq-asymmetric": Method("GPTQ, asymmetric", "GPTQ, with zero points", zero_points=True),
    "awq-asymmetric": Method("AWQ, asymmetric", "AWQ, with zero points", zero_points=True),
    "qat": Method("QAT", "quantization-aware training, cross-entropy alone", _CROSS_ENTROPY),
    "kd": Method("QAT + KD", "and T²·KL to the teacher over the vocabulary, fixed β", _PLAIN_KD),
    "grace": Method("GRACE", "and gated DKD, RCKA, adaptive β", {}),
    "grace-no-gate": Method(
        "GRACE, no gate", "every token counts alike", {"gate": False}, tuned_as="grace"
    ),
    "grace-no-rcka": Method(
        "GRACE, no RCKA", "no relational alignment", {"omega": 0.0}, tuned_as="grace"
    ),
    "grace-fixed-beta": Method(
        "GRACE, fixed β",
        "no controller: the mean of β that the sweep's best candidate had, or the first β",
        {"adaptive_beta": False},
        tuned_as="grace",
    ),
    "grace-per-channel": Method(
        "GRACE, per channel", "one scale a row", {"group_size": -1}, tuned_as="grace"
    ),
}
CALIBRATED = ("gptq", "awq", "gptq-asymmetric", "awq-asymmetric")
UNTAUGHT = tuple(n for n, m in METHODS.items() if m.options is _CROSS_ENTROPY)  # no teacher


@dataclass(frozen=True)
class Arm:
    """A method at a number of bits; `bits` is `FULL` where nothing is quantized.

    Attributes:
        start: what it starts from, "student" or, for one that does not train, "control".
    """

    method: str
    bits: int = FULL
    start: str = "student"
    options: dict[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(
                f"study: method must be one of {', '.join(METHODS)}, got {self.method!r}"
            )
        if (self.bits != FULL) != METHODS[self.method].quantized:
            raise ValueError(f"study: {self.method} must not be at {self.bits} bits")
        if self.start != "student" and (self.trained or not self.quantized):
            raise ValueError(f"study: {self.method} must start from the student, got {self.start}")

    @property
    def name(self) -> str:
        """A file name: `grace-4`, `student`, `rtn-4-control`."""
        name = self.method if self.bits == FULL else f"{self.method}-{self.bits}"
        return name if self.start == "student" else f"{name}-{self.start}"

    @property
    def label(self) -> str:
        """What tables and charts call the method."""
        label = METHODS[self.method].label
        return label if self.start == "student" else f"{label}, trained on"

    @property
    def quantized(self) -> bool:
        """Whether the decoder's linears are quantized."""
        return self.bits != FULL

    @property
    def trained(self) -> bool:
        """Whether the arm trains at all."""
        return METHODS[self.method].options is not None

    @property
    def seeded(self) -> bool:
        """Whether another seed gives another model: it trains, or starts from one that does."""
        return self.trained or self.start != "student"

    @property
    def deployable(self) -> bool:
        """Whether packed kernels exist for its bits, so that it is scored as it is deployed."""
        return self.bits in (4, 8) and not METHODS[self.method].zero_points

    def training_options(self) -> dict[str, Any]:
        """Options of GraceConfig for its training; empty where it is not trained."""
        options = METHODS[self.method].options
        if options is None:
            return {}
        quantization = {"bits": self.bits} if self.quantized else {"quantization": False}
        return {**quantization, **options, **self.options}


def arms_of(config: StudyConfig) -> list[Arm]:
    """All arms of a study: what is not quantized, then at each number of bits every method.

    Raises ValueError for a method that is none.
    """
    whole = [Arm(m) for m in config.arms if m not in METHODS or not METHODS[m].quantized]
    low = [
        Arm(method, bits, start)
        for bits in config.bits
        for method in config.arms
        if METHODS[method].quantized
        for start in (config.ptq_from if METHODS[method].options is None else ("student",))
    ]
    return [*whole, *low]


def quickstart_arms(bits: tuple[int, ...] = (4, 2)) -> list[Arm]:
    """Teacher, student and control, and RTN, QAT, QAT + KD and GRACE at each number of bits."""
    from grace.study.config import StudyConfig

    return arms_of(StudyConfig(bits=bits))
