"""Everything a study is made from, and the sizes it comes in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from grace.evaluation.drawn.levels import LEVELS
from grace.evaluation.tiny import Size
from grace.version import __version__

BENCHMARKS = ("synthetic", "drawn")
STARTS = ("student", "control")


def _at_least(where: str, **least: tuple[float, float]) -> None:
    for name, (value, lowest) in least.items():
        if not value >= lowest:
            raise ValueError(f"{where}: {name} must be at least {lowest}, got {value}")


def _check_share(where: str, errors: float) -> None:
    if not 0 <= errors < 0.5:
        raise ValueError(f"{where}: label_errors must be at least 0 and below 0.5, got {errors}")


@dataclass(frozen=True)
class ModelRecipe:
    """A LLaVA made from nothing: its size, and how it learns the drawn benchmark's training rows.

    Attributes:
        width, inner, layers, heads, kv_heads: of the decoder, `kv_heads` None: as many as heads.
        vision_width, vision_layers: of the CLIP tower, with four heads.
        steps, batch_images, learning_rate, warmup_steps, weight_decay: of its training in full
            precision, cross-entropy, cosine schedule.
        save_steps: steps between checkpoints; an interrupted making goes on from the last.
        label_errors: share of the yes/no answers it learns from that are wrong.
    """

    width: int
    inner: int
    layers: int
    heads: int
    vision_width: int
    vision_layers: int
    steps: int
    kv_heads: int | None = None
    batch_images: int = 256
    learning_rate: float = 1e-3
    warmup_steps: int = 200
    weight_decay: float = 0.01
    save_steps: int = 500
    label_errors: float = 0.0

    def __post_init__(self) -> None:
        for name in ("width", "inner", "layers", "heads", "vision_width", "vision_layers"):
            _at_least("study: a model", **{name: (getattr(self, name), 1)})
        for name in ("steps", "batch_images", "save_steps"):
            _at_least("study: a model", **{name: (getattr(self, name), 1)})
        _check_share("study: a model", self.label_errors)
        groups = self.kv_heads or self.heads
        if self.width % self.heads or self.heads % groups or self.vision_width % 4:
            raise ValueError(
                "study: a model must have heads that divide its width, kv_heads that divide heads "
                f"and a vision_width that 4 divides, got {self.width}, {self.heads}, {groups}, "
                f"{self.vision_width}"
            )

    @property
    def size(self) -> Size:
        """Widths and depths."""
        return Size(
            width=self.width,
            inner=self.inner,
            layers=self.layers,
            heads=self.heads,
            vision_width=self.vision_width,
            vision_layers=self.vision_layers,
            kv_heads=self.kv_heads,
        )


@dataclass(frozen=True)
class MakeConfig:
    """Teacher and student made from nothing, once for all arms and seeds.

    Attributes:
        teacher, student: how.
        images: training images that both learn; those of the arms are others.
        seed: of both models.
    """

    teacher: ModelRecipe
    student: ModelRecipe
    images: int
    seed: int = 0

    def __post_init__(self) -> None:
        _at_least("study: make", images=(self.images, 1))


@dataclass(frozen=True)
class SweepConfig:
    """Options that each trained method tries on the validation split; the best are reused.

    Attributes:
        learning_rates: candidates of every method that `candidates` does not name.
        candidates: by method, options of GraceConfig to try, `learning_rate` among them, for
            methods whose terms have weights; as many as there are learning rates, so that all
            methods have the same budget.
        bits: that quantized methods are swept at; what was chosen is reused at the bits nearest to
            it, of two as near at the lower.
        seed: training seed of the candidates; what was chosen is reused for all seeds.
        ablations: sweep GRACE's variants too; False: they take GRACE's options.
    """

    learning_rates: tuple[float, ...]
    candidates: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    bits: tuple[int, ...] = (4,)
    seed: int = 0
    ablations: bool = False

    def __post_init__(self) -> None:
        rates = self.learning_rates
        if not rates or len(set(rates)) != len(rates) or min(rates) <= 0:
            raise ValueError(
                f"study: sweep.learning_rates must be different numbers above 0, got {rates}"
            )
        for method, tried in self.candidates.items():
            if len(tried) != len(rates) or not all("learning_rate" in each for each in tried):
                raise ValueError(
                    f"study: sweep.candidates.{method} must be {len(rates)} times options with a "
                    f"learning_rate, as many as sweep.learning_rates, got {tried}"
                )
        if not self.bits or not all(2 <= bits <= 8 for bits in self.bits):
            raise ValueError(f"study: sweep.bits must be 2 to 8, got {list(self.bits)}")

    def bits_for(self, bits: int) -> int:
        """Where what an arm of so many bits takes over was swept."""
        return min(self.bits, key=lambda swept: (abs(swept - bits), swept))

    def of(self, method: str, tuned_as: str | None = None) -> list[dict[str, Any]]:
        """Candidates of a method: its own, those of the one that it is tuned as, or the rates."""
        rates = [{"learning_rate": rate} for rate in self.learning_rates]
        return self.candidates.get(method) or self.candidates.get(tuned_as or "") or rates


@dataclass(frozen=True)
class StudyConfig:
    """Data, models, arms, training and scoring of a study.

    Attributes:
        seed: of the drawn benchmark, training and held-out.
        seeds: training seeds; every trained arm runs once for each.
        arms: methods (`grace.study.arms.METHODS`); each quantized one runs at every of `bits`.
        bits, group_size: of the quantized arms.
        ptq_from: what post-training arms start from: "student", as it is, and "control", the
            student trained on for as long as the trained arms.
        benchmark: "synthetic" (six subtasks, tiny images) or "drawn" (nine, three levels).
        levels, pixels: of the drawn benchmark.
        train_images: training images that arms see; fewer than steps * batch_images means epochs.
        heldout_images: images of the test split a subtask (and level), two questions each.
        validation_images: likewise of the validation split, which a sweep scores on.
        questions_per_image: of a training row of the synthetic benchmark.
        further_questions: of a training row of the drawn one, beside its three and a description.
        label_errors: share of the yes/no answers in the drawn rows that arms train on which are
            wrong, as in training data that people or models wrote; what is scored is exact.
        steps, batch_images, warmup_steps, weight_decay: of every trained arm.
        learning_rate: of every trained arm that neither `sweep` nor `tuned` says something of.
        tuned: options of GraceConfig by method or arm (the arm's own come last).
        sweep: how learning rates are found; None: not here.
        models: directory with teacher/ and student/; None: those that `make` makes, or those that
            ship with grace.
        make: how teacher and student are made; None: they are there.
        calibration_images: training images that GPTQ and AWQ look at.
        cka_images: held-out images on whose visual tokens student and teacher are compared.
        keep_teacher: run the teacher once over the drawn training images and keep its hidden states
            in data/teacher, instead of in every arm; the files are larger than the pictures.
        batch_size: questions that are answered at once.
        save_steps: steps between checkpoints within an arm, 0: an interrupted arm begins anew.
        least_agreement: of a packed model's answers with the fake-quantized one's.
        loader_workers: processes that read batches, an arm; processes: arms at once, on
            each GPU, 1: in this process where there is one, None: as many as there are cores, or on
            a GPU by the models' size. Neither changes a result.
        split: what is scored: "heldout", or "validation" to tune on.
        notes: sentences for the report's section on tuning: what was tried before, and elsewhere.
    """

    seed: int = 0
    seeds: tuple[int, ...] = (0, 1)
    arms: tuple[str, ...] = ("teacher", "student", "control", "rtn", "qat", "kd", "grace")
    bits: tuple[int, ...] = (4, 2)
    group_size: int = 32
    ptq_from: tuple[str, ...] = ("student",)
    benchmark: str = "synthetic"
    levels: tuple[str, ...] = tuple(LEVELS)
    pixels: int = 168
    train_images: int = 6400
    heldout_images: int = 400
    validation_images: int = 100
    questions_per_image: int = 6
    further_questions: int = 3
    label_errors: float = 0.0
    steps: int = 300
    batch_images: int = 32
    warmup_steps: int = 20
    weight_decay: float = 0.01
    learning_rate: float = 1e-3
    tuned: dict[str, dict[str, Any]] = field(default_factory=dict)
    sweep: SweepConfig | None = None
    models: str | None = None
    make: MakeConfig | None = None
    calibration_images: int = 128
    cka_images: int = 64
    keep_teacher: bool = False
    batch_size: int = 128
    save_steps: int = 0
    least_agreement: float = 0.995
    loader_workers: int = 0
    processes: int | None = None
    split: str = "heldout"
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("steps", "batch_images", "questions_per_image", "train_images", "batch_size"):
            _at_least("study", **{name: (getattr(self, name), 1)})
        for name in ("calibration_images", "cka_images", "pixels"):
            _at_least("study", **{name: (getattr(self, name), 1)})
        for name in ("save_steps", "loader_workers", "further_questions"):
            _at_least("study", **{name: (getattr(self, name), 0)})
        for name in ("heldout_images", "validation_images"):
            value = getattr(self, name)
            if value < 2 or value % 2:
                raise ValueError(f"study: {name} must be even and at least 2, got {value}")
        for name in ("seeds", "arms", "bits", "ptq_from", "levels"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise ValueError(f"study: {name} must be different values, got {list(values)}")
        _check_share("study", self.label_errors)
        if self.label_errors and self.benchmark != "drawn":
            raise ValueError(
                f"study: label_errors must be 0 unless the benchmark is drawn, got "
                f"{self.label_errors} of {self.benchmark}"
            )
        self._check_sweep()
        self._check_choices()

    def _check_sweep(self) -> None:
        if self.sweep is None:
            return
        from grace.study.arms import METHODS
        from grace.study.sweep import swept_arms

        if any(method not in METHODS for method in self.arms):
            return  # told by name where arms are made
        for arm in swept_arms(self):
            base = METHODS[arm.method].tuned_as
            tried = {name for each in self.sweep.of(arm.method, base) for name in each}
            for name in dict.fromkeys((base or arm.method, arm.method, arm.name)):
                if twice := sorted(tried & self.tuned.get(name, {}).keys()):
                    raise ValueError(
                        f"study: {', '.join(twice)} of {name} must be swept or tuned, got both"
                    )

    def _check_choices(self) -> None:
        for name, allowed in (("benchmark", BENCHMARKS), ("split", ("heldout", "validation"))):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"study: {name} must be one of {', '.join(allowed)}, got {getattr(self, name)}"
                )
        for name, values in (("ptq_from", STARTS), ("levels", tuple(LEVELS))):
            if wrong := [value for value in getattr(self, name) if value not in values]:
                raise ValueError(f"study: {name} must be of {', '.join(values)}, got {wrong[0]!r}")
        if wrong := [bits for bits in self.bits if not 2 <= bits <= 8]:
            raise ValueError(f"study: bits must be 2 to 8, got {wrong[0]}")
        if "control" in self.ptq_from and "control" not in self.arms:
            raise ValueError("study: arms must have control for ptq_from control, got none")
        if self.make is not None and (self.models is not None or self.benchmark != "drawn"):
            raise ValueError(
                "study: make must be given without models and with benchmark drawn, got "
                f"models {self.models} and benchmark {self.benchmark}"
            )
        if self.make is not None:
            for name in ("width", "inner"):
                value = getattr(self.make.student, name)
                if self.group_size > 0 and value % self.group_size:
                    raise ValueError(
                        f"study: group_size must divide make.student.{name} ({value}), got "
                        f"{self.group_size}"
                    )
        if self.processes is not None:
            _at_least("study", processes=(self.processes, 1))

    def __hash__(self) -> int:
        return hash(self.fingerprint())

    def options_of(self, method: str, arm: str) -> dict[str, Any]:
        """Tuned options of GraceConfig for an arm."""
        return {**self.tuned.get(method, {}), **self.tuned.get(arm, {})}

    def as_dict(self) -> dict[str, Any]:
        """The configuration as JSON holds it."""
        return json.loads(json.dumps(asdict(self)))

    def deciding(self) -> dict[str, Any]:
        """What decides results: all but which arms run, and how many at once."""
        return {name: value for name, value in self.as_dict().items() if name not in _SELECTION}

    def fingerprint(self) -> str:
        """Changes with whatever changes a result: results of another one are not taken over."""
        return _hash(self.deciding())

    def data_fingerprint(self) -> str:
        """Changes with whatever changes what is drawn, or what the teacher says of it."""
        chosen = {name: value for name, value in self.as_dict().items() if name in _DATA}
        swept = self.validation_images if self.sweep is not None else 0
        return _hash({**chosen, "validation_images": swept})


# Fields that say what is run, and not what comes out of it.
_SELECTION = (
    *("seeds", "arms", "bits", "ptq_from", "processes", "loader_workers", "models"),
    "notes",
)
# Fields that the drawn data and the teacher's cached rows depend on.
_DATA = (
    *("seed", "benchmark", "questions_per_image", "train_images", "heldout_images"),
    *("models", "split"),
)


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """`steps: 300 and 200`, for every deciding value that differs between two `as_dict`."""
    flat = [_flat({k: v for k, v in side.items() if k not in _SELECTION}) for side in (one, other)]
    names = sorted(set(flat[0]) | set(flat[1]))
    values = [(name, flat[0].get(name, "absent"), flat[1].get(name, "absent")) for name in names]
    return [f"{name}: {a} and {b}" for name, a, b in values if a != b]


def _flat(options: Mapping[str, Any], under: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in options.items():
        inside = isinstance(value, Mapping) and value
        found |= _flat(value, f"{under}{name}.") if inside else {f"{under}{name}": value}
    return found


def _hash(facts: dict[str, Any]) -> str:
    text = json.dumps({"grace": __version__, **facts}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# What studies/quickstart/tuning chose, where it is not a default; for the bits nearest to an arm's.
_DEFAULT = StudyConfig(
    ptq_from=("student", "control"),
    tuned={
        "kd-2": {"beta_init": 0.5},
        "grace": {
            "omega": 0.3,
            "beta_dkd": 4.0,
            "tau": 4.0,
            "eta": 3e-4,
            "beta_init": 0.1,
            "beta_min": 0.05,
            "beta_max": 0.2,
        },
        "grace-2": {
            "learning_rate": 2e-3,
            "beta_dkd": 0.1,
            "tau": 0.35,
            "eta": 1.5e-3,
            "beta_init": 1.0,
            "beta_min": 0.1,
            "beta_max": 5.0,
        },
    },
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
        cka_images=4,
        warmup_steps=1,
        batch_size=64,
    ),
}
