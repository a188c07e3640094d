"""A training run from a YAML file: `grace train config.yaml key=value …`.

    student: path or hub name         teacher: path or hub name
    data: {path: rows.json, image_root: images, max_length: 2048}   … see `DataConfig`
    preset: paper                     output_dir: runs/name
    bits: 4                           … and any other field of GraceConfig

Nothing is written before the configuration, the data and both models are known to be good. The run
directory then holds `config.yaml`, `train.log`, `metrics.jsonl`, `curves.png`, `checkpoint-*` and
`final`: the trained student with its log-scales, which `grace export` turns into a packed one.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from grace.checkpoint import Checkpoint
from grace.training.callbacks import METRICS, read_metrics
from grace.training.config import GraceConfig, check_keys
from grace.training.data_config import DataConfig, build_collator, build_dataset, parse_data

FINAL = "final"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class RunConfig:
    """Everything a run is made from."""

    student: str
    data: DataConfig
    training: GraceConfig
    teacher: str | None = None
    source: dict[str, Any] = field(default_factory=dict, compare=False)


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration in a YAML file with `key=value` (or `data.key=value`) on top.

    Raises:
        FileNotFoundError: no such file, or no student, teacher or data file where it points.
        ValueError: not a mapping, an unknown or missing key, or a value out of range.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"train: config must be a file, got {path}")
    options = yaml.safe_load(path.read_text()) or {}
    if not isinstance(options, dict):
        raise ValueError(f"train: {path} must hold a mapping, got {type(options).__name__}")
    for override in overrides:
        _override(options, override)
    return parse_config(options)


def _override(options: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ValueError(f"train: an override must be key=value, got {override!r}")
    *parents, name = key.split(".")
    for parent in parents:
        options = options.setdefault(parent, {})
        if not isinstance(options, dict):
            raise ValueError(f"train: {parent} must be a mapping to set {key}, got {options!r}")
    options[name] = yaml.safe_load(value)


def parse_config(options: dict[str, Any]) -> RunConfig:
    """As `read_config`, from a mapping."""
    source, options = options, dict(options)
    for name in ("student", "data", "output_dir"):
        if not options.get(name):
            raise ValueError(f"train: {name} must be given, got {options.get(name)!r}")
    student, teacher = options.pop("student"), options.pop("teacher", None)
    data = parse_data(options.pop("data"))
    preset = options.pop("preset", "paper")
    check_keys(options)
    if not (options.get("fp16") or options.get("use_cpu")) and torch.cuda.is_available():
        options.setdefault("bf16", torch.cuda.is_bf16_supported())
    training = GraceConfig.from_preset(preset, **_as_numbers(options))
    if training.needs_teacher and not teacher:
        raise ValueError("train: teacher must be given unless distillation is none and omega 0")
    for name in filter(None, (student, teacher)):
        if Path(name).exists() or not is_hub_name(name):
            Checkpoint(name)  # raises where it is not whole
    return RunConfig(student, data, training, teacher, source)


def _as_numbers(options: dict[str, Any]) -> dict[str, Any]:
    """YAML reads 1e-4 as text: make numbers of the texts given for fields that are numbers."""
    kinds = {item.name: item.type for item in dataclasses.fields(GraceConfig)}
    numbers = {"float": float, "int": int, float: float, int: int}
    made = {}
    for key, value in options.items():
        kind = numbers.get(kinds[key])
        if kind is not None and isinstance(value, str):
            try:
                value = kind(value)
            except ValueError:
                raise ValueError(f"train: {key} must be a number, got {value!r}") from None
        made[key] = value
    return made


def is_hub_name(name: str) -> bool:
    """Whether `name` can be one of the hub: owner/name."""
    return _HUB_NAME.fullmatch(name) is not None


def run(config: RunConfig) -> Path:
    """Train, and return the directory of the finished student.

    Raises:
        ValueError: data or models that cannot be used together, or an output directory that holds
            another run (resume it with `resume_from_checkpoint: true`).
    """
    from grace.training.plots import plot_curves

    output, training = Path(str(config.training.output_dir)), config.training
    resume = _resume_point(training.resume_from_checkpoint)
    if not resume and (list(output.glob("checkpoint-*")) or (output / FINAL).exists()):
        raise ValueError(
            f"train: output_dir must not hold another run, got {output}; choose another or give "
            "resume_from_checkpoint=true"
        )
    trainer = build(config)
    _describe(config, output)
    trainer.train(resume_from_checkpoint=resume)
    final = save_final(trainer, output / FINAL)
    plot_curves(read_metrics(output / METRICS), output / "curves.png")
    return final


def _resume_point(value: Any) -> bool | str | None:
    words = {"true": True, "false": None, "none": None, "": None}
    return words.get(value.lower(), value) if isinstance(value, str) else value


def build(config: RunConfig) -> Any:
    """The trainer of a run: data read, both models loaded, the student quantized."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from grace.training.trainer import GraceTrainer

    processor = AutoProcessor.from_pretrained(config.student)
    dataset = build_dataset(config.data, config.training, processor)
    load = AutoModelForImageTextToText.from_pretrained
    teacher = None
    if config.training.needs_teacher and config.teacher is not None:
        on_gpu = config.training.device.type == "cuda"
        teacher = load(config.teacher, dtype=torch.bfloat16 if on_gpu else torch.float32)
    student = load(config.student, dtype=torch.float32)
    return GraceTrainer(
        student,
        config.training,
        teacher,
        train_dataset=dataset,
        data_collator=build_collator(config.data, processor, student),
        processing_class=processor,
    )


def _describe(config: RunConfig, output: Path) -> None:
    """Write what the run is, and send the log to a file as well."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "config.yaml").write_text(yaml.safe_dump(config.source, sort_keys=False))
    handler = logging.FileHandler(output / "train.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    for name in ("grace", "transformers"):
        logging.getLogger(name).addHandler(handler)


def save_final(trainer: Any, directory: Path) -> Path:
    """Save the trained student, processor and run facts; `directory` appears whole or not."""
    beside = directory.with_name(directory.name + ".unfinished")
    shutil.rmtree(beside, ignore_errors=True)
    trainer.save_model(str(beside))
    if trainer.args.should_save:
        facts = {"steps": trainer.state.global_step, "modules": trainer.quantized}
        (beside / "grace_training.json").write_text(json.dumps(facts, indent=1))
        shutil.rmtree(directory, ignore_errors=True)
        os.replace(beside, directory)
    return directory
