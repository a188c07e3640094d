"""The YAML file of a study: `grace study config.yaml key=value …`, fields of `StudyConfig`.

seeds: [0, 1]      arms: [student, control, rtn, grace]      bits: [4, 2]
sweep: {learning_rates: [5.0e-4, 1.0e-3]}      make: {teacher: {width: 512, …}, student: {…}}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from grace.study.arms import arms_of
from grace.study.config import MakeConfig, ModelRecipe, StudyConfig, SweepConfig
from grace.training.config import check_keys, suggestion
from grace.training.run_config import read_options

_NESTED = {"sweep": SweepConfig, "make": MakeConfig, "teacher": ModelRecipe, "student": ModelRecipe}


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> StudyConfig:
    """The study in a YAML file with `key=value` (or `make.student.steps=…`) on top.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a mapping, an unknown or missing key, or a value of a wrong kind or out of
            range.
    """
    return from_dict(read_options(path, overrides, where="study"))


def from_dict(options: Mapping[str, Any]) -> StudyConfig:
    """As `read_config`, from a mapping; also the inverse of `StudyConfig.as_dict`."""
    config = _made("", StudyConfig, options)
    for name, tuned in config.tuned.items():
        if not isinstance(tuned, Mapping):
            raise ValueError(f"study: tuned.{name} must be options, got {tuned!r}")
        check_keys(dict(tuned))
    for method, tried in config.sweep.candidates.items() if config.sweep is not None else ():
        if method not in config.arms:
            raise ValueError(f"study: sweep.candidates must name arms of the study, got {method!r}")
        for options_tried in tried:
            check_keys(options_tried)
    known = {text for arm in arms_of(config) for text in (arm.method, arm.name)}
    if wrong := [name for name in config.tuned if name not in known]:
        near = suggestion(wrong[0], sorted(known))
        raise ValueError(f"study: tuned must name arms of the study, got {wrong[0]!r}{near}")
    return config


def _made(under: str, kind: type, options: Any) -> Any:
    """A dataclass from a mapping, all of whose keys are fields and of their kinds."""
    if not isinstance(options, Mapping):
        raise ValueError(f"study: {under.rstrip('.')} must be a mapping, got {options!r}")
    known = {item.name: item for item in fields(kind)}
    for key in options:
        if key not in known:
            near = suggestion(str(key), list(known))
            raise ValueError(f"study: unknown option {under}{key}{near}")
    for name, item in known.items():
        needed = item.default is MISSING and item.default_factory is MISSING
        if needed and name not in options:
            raise ValueError(f"study: {under}{name} must be given, got nothing")
    return kind(**{k: _value(under + k, str(known[k].type), k, v) for k, v in options.items()})


def _value(where: str, kind: str, name: str, value: Any) -> Any:
    if value is None and "None" in kind:
        return None
    kind = kind.replace(" | None", "")
    if name in _NESTED and kind.endswith(("Config", "Recipe")):
        return _made(f"{where}.", _NESTED[name], value)
    if kind.startswith("tuple"):
        inner = kind.removeprefix("tuple[").split(",")[0]
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(_plain(where, inner, item) for item in items)
    return _plain(where, kind, value)


def _number(value: Any) -> float:
    if isinstance(value, bool):
        raise ValueError
    return float(value)  # YAML reads 1e-4 as text


def _whole(value: Any) -> int:
    if _number(value) != int(float(value)):
        raise ValueError
    return int(float(value))


_PLAIN: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "int": ("a whole number", _whole),
    "float": ("a number", _number),
}


def _plain(where: str, kind: str, value: Any) -> Any:
    if kind in _PLAIN:
        told, convert = _PLAIN[kind]
        try:
            return convert(value)
        except (TypeError, ValueError):
            raise ValueError(f"study: {where} must be {told}, got {value!r}") from None
    kinds = {"bool": ("true or false", bool), "str": ("text", str)}
    told, wanted = kinds.get(kind, ("a mapping", dict))
    if not isinstance(value, wanted):
        raise ValueError(f"study: {where} must be {told}, got {value!r}")
    return value
