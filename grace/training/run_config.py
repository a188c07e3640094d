"""The YAML file of a training run: `grace train config.yaml key=value …`.

student: path or hub name         teacher: path or hub name
data: {path: rows.json, image_root: images, max_length: 2048}   … see `DataConfig`
preset: paper                     output_dir: runs/name
bits: 4                           … and any other field of GraceConfig
quantization: {overrides: {"down_proj$": {bits: 8}}}    (what is quantized, under one heading)
teacher_cache: folder of `grace precompute-teacher`, in place of running the teacher
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from grace.checkpoint import Checkpoint
from grace.training.config import GraceConfig, check_keys, suggestion
from grace.training.data_config import DataConfig, parse_data

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class RunConfig:
    """Everything a run is made from."""

    student: str
    data: DataConfig
    training: GraceConfig
    teacher: str | None = None
    teacher_cache: str | None = None
    source: dict[str, Any] = field(default_factory=dict, compare=False)


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration in a YAML file with `key=value` (or `data.key=value`) on top.

    Raises:
        FileNotFoundError: no such file, or no student, teacher or data file where it points.
        ValueError: not a mapping, an unknown or missing key, or a value out of range.
    """
    return parse_config(read_options(path, overrides))


def read_options(
    path: str | Path, overrides: Sequence[str] = (), *, where: str = "train"
) -> dict[str, Any]:
    """The mapping in a YAML file with `key=value` on top, whatever its keys.

    Args:
        path: the file.
        overrides: what comes on top.
        where: the command that errors begin with.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a mapping, or an override that is not key=value.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{where}: config must be a file, got {path}")
    options = yaml.safe_load(path.read_text()) or {}
    if not isinstance(options, dict):
        raise ValueError(f"{where}: {path} must hold a mapping, got {type(options).__name__}")
    for override in overrides:
        _override(options, override, where)
    return options


def _override(options: dict[str, Any], override: str, where: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ValueError(f"{where}: an override must be key=value, got {override!r}")
    *parents, name = key.split(".")
    for parent in parents:
        options = options.setdefault(parent, {})
        if not isinstance(options, dict):
            raise ValueError(f"{where}: {parent} must be a mapping to set {key}, got {options!r}")
    under = options.get("quantization")  # `bits=8` also where the file has it under its heading
    if not parents and isinstance(under, dict) and name in under:
        options = under
    options[name] = yaml.safe_load(value)


def parse_config(options: dict[str, Any]) -> RunConfig:
    """As `read_config`, from a mapping."""
    source, options = options, dict(options)
    for name in ("student", "data", "output_dir"):
        if not options.get(name):
            raise ValueError(f"train: {name} must be given, got {options.get(name)!r}")
    student, teacher = options.pop("student"), options.pop("teacher", None)
    data, cache = parse_data(options.pop("data")), options.pop("teacher_cache", None)
    if cache and data.pack_length is not None:
        raise ValueError(
            "train: data.pack_length must be null with teacher_cache, whose rows are not packed, "
            f"got {data.pack_length}"
        )
    preset = options.pop("preset", "paper")
    options = flat_quantization(options)
    check_keys(options)
    if not (options.get("fp16") or options.get("use_cpu")) and torch.cuda.is_available():
        options.setdefault("bf16", torch.cuda.is_bf16_supported())
    training = GraceConfig.from_preset(preset, **as_numbers(options))
    if training.needs_teacher and not teacher:
        raise ValueError("train: teacher must be given unless distillation is none and omega 0")
    for name in filter(None, (student, teacher)):
        if Path(name).exists() or not is_hub_name(name):
            Checkpoint(name)  # raises where it is not whole
    if cache and not (teacher and Path(teacher).is_dir()):
        raise ValueError(
            f"train: teacher must be the directory that teacher_cache was made from, got {teacher}"
        )
    return RunConfig(student, data, training, teacher, cache, source)


# Options that may stand under `quantization`, and the fields they are.
_QUANTIZATION = {
    "enabled": "quantization",
    "bits": "bits",
    "group_size": "group_size",
    "scale_dtype": "scale_dtype",
    "scale_init": "scale_init",
    "scale_lr_ratio": "scale_lr_ratio",
    "skip": "skip",
    "overrides": "overrides",
}


def flat_quantization(options: dict[str, Any]) -> dict[str, Any]:
    """The options with those under `quantization`, where it is a mapping, among the others."""
    nested = options.get("quantization")
    if not isinstance(nested, dict):
        return options
    flat = {key: value for key, value in options.items() if key != "quantization"}
    for key, value in nested.items():
        if key not in _QUANTIZATION:
            near = suggestion(key, list(_QUANTIZATION))
            raise ValueError(f"train: unknown option quantization.{key}{near}")
        if _QUANTIZATION[key] in flat:
            raise ValueError(f"train: {key} must be given once, got it under quantization as well")
        flat[_QUANTIZATION[key]] = value
    return flat


def as_numbers(options: dict[str, Any]) -> dict[str, Any]:
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
