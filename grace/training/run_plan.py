"""`grace train --plan`: what a run would take, told from its YAML and the models' configs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grace.training.config import GraceConfig, check_keys
from grace.training.memory_plan import Load, estimate
from grace.training.model_sizes import ModelSize, empty_model, read_config, size_of
from grace.training.run_config import as_numbers, flat_quantization, read_options

TOKENS = 2048  # of a row where neither the command nor data.max_length says


@dataclass(frozen=True)
class Plan:
    """Sizes of both models and bytes a GPU with activations as asked for and the other way."""

    student: ModelSize
    teacher: ModelSize | None
    load: Load
    checkpointing: bool
    chosen: dict[str, int]
    other: dict[str, int]


@dataclass(frozen=True)
class PlanConfig:
    """What of a run's YAML a plan looks at."""

    student: str
    teacher: str | None
    training: GraceConfig
    compute: int  # bytes of a number in products
    max_length: int | None


def read_plan_config(path: str | Path, overrides: Sequence[str] = ()) -> PlanConfig:
    """From a run's YAML, of which neither data nor weights need exist.

    Raises:
        ValueError, FileNotFoundError: as `grace.training.run_config.read_config` for the file, its
            keys and their values.
    """
    options = read_options(path, overrides)
    student, teacher = options.pop("student", None), options.pop("teacher", None)
    data = options.pop("data", None)
    if not student:
        raise ValueError(f"plan: student must be given, got {student!r}")
    options.pop("teacher_cache", None)  # of no meaning here
    preset = options.pop("preset", "paper")
    options = flat_quantization(options)
    check_keys(options)
    training = GraceConfig.from_preset(preset, **as_numbers(options))
    if training.needs_teacher and not teacher:
        raise ValueError("plan: teacher must be given unless distillation is none and omega 0")
    # Autocast is on by default wherever a GPU has bf16, which this machine may not.
    half = (options.get("bf16", True) or training.fp16) and not training.use_cpu
    length = data.get("max_length") if isinstance(data, dict) else None
    return PlanConfig(student, teacher, training, 2 if half else 4, length)


def plan_run(config: PlanConfig, *, gpus: int = 1, tokens: int | None = None) -> Plan:
    """The plan of a run. Nothing is loaded but the models' configs.

    Args:
        config: as `read_plan_config` gives it.
        gpus: ranks; parameters are sharded over them where `fsdp` is set.
        tokens: of a row; None: `data.max_length`, or 2048.

    Raises:
        ValueError, FileNotFoundError: models or quantization that do not fit; gpus or tokens < 1.
    """
    training = config.training
    length = tokens if tokens is not None else config.max_length or TOKENS
    for name, value in (("gpus", gpus), ("tokens", length)):
        if value < 1:
            raise ValueError(f"plan: {name} must be at least 1, got {value}")
    settings = training.layer_settings() if training.quantization else None
    model = empty_model(read_config(config.student))
    student = size_of(model, freeze_vision=training.freeze_vision, settings=settings)
    teacher = None
    if training.needs_teacher:
        teacher = size_of(empty_model(read_config(str(config.teacher))))
    rows = training.per_device_train_batch_size
    load = Load(rows, length, config.compute, gpus, bool(training.fsdp))
    both = [_with_checkpointing(student, teacher, training, load, on) for on in (False, True)]
    on = bool(training.gradient_checkpointing)
    return Plan(student, teacher, load, on, both[on], both[not on])


def _with_checkpointing(
    student: ModelSize, teacher: ModelSize | None, training: GraceConfig, load: Load, on: bool
) -> dict[str, int]:
    saved, training.gradient_checkpointing = training.gradient_checkpointing, on
    try:
        return estimate(student, teacher, training, load)
    finally:
        training.gradient_checkpointing = saved


def describe(plan: Plan) -> str:
    """The plan as text: sizes, a table of GiB a GPU, and what it assumes."""
    ways = {plan.checkpointing: plan.chosen, not plan.checkpointing: plan.other}
    parts = [*plan.chosen, "sum"]
    columns = [_column(ways[on]) for on in (False, True)]
    marks = ["this run" if on == plan.checkpointing else "" for on in (False, True)]
    rows = [("GiB a GPU", "activations kept", "checkpointing"), ("", *marks)]
    rows += [(name, *(column[name] for column in columns)) for name in parts]
    return "\n".join([*_sizes(plan), "", *_aligned(rows), "", *_assumptions(plan)])


def _column(parts: dict[str, int]) -> dict[str, str]:
    whole = {**parts, "sum": sum(parts.values())}
    return {name: f"{value / 2**30:.2f}" for name, value in whole.items()}


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    ]


def _sizes(plan: Plan) -> list[str]:
    lines = []
    for name, size in (("student", plan.student), ("teacher", plan.teacher)):
        if size is not None:
            parts = ", ".join(f"{part} {_short(n)}" for part, n in size.parts.items())
            lines.append(f"{name}: {size.kind}, {_short(size.parameters)} parameters ({parts})")
    student = plan.student
    lines.append(
        f"trained: {_short(student.trainable)} parameters, {_short(student.quantized)} of them "
        f"quantized, and {_short(student.log_scales)} log-scales"
    )
    return lines


def _short(count: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.3f}{unit}" if unit == "B" else f"{count / size:.1f}{unit}"
    return str(count)


def _assumptions(plan: Plan) -> list[str]:
    load: Any = plan.load
    shared = ", sharded (FSDP)" if load.sharded else ""
    products = "bf16 or fp16 (autocast)" if load.compute == 2 else "fp32"
    return [
        f"assumed: {load.rows} rows of {load.tokens} tokens a GPU, {load.gpus} GPU(s){shared}, "
        f"products in {products}, all tokens supervised, attention by sdpa without n x n "
        "matrices, the teacher whole on every GPU.",
        "The parts are added as if their peaks came together; not in them: pixels, activations of "
        "a vision tower that trains, fragmentation (keep some 5 % free).",
    ]
