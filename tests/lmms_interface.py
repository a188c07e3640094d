"""lmms-eval where it is installed; elsewhere what grace uses of its interface, release 0.7.3."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

INSTALLED = importlib.util.find_spec("lmms_eval") is not None


@dataclass(frozen=True)
class ModelManifest:
    """Where classes of a model are; the registry imports them by path."""

    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


@dataclass
class TokenCounts:
    input_tokens: int | None = None
    output_tokens: int | None = None
    reasoning_tokens: int | None = None


@dataclass
class GenerationResult:
    text: str
    token_counts: TokenCounts | None = None


class lmms:
    """The base class of its models."""

    is_simple = True

    def __init__(self) -> None:
        self._rank, self._world_size = 0, 1
        self.task_dict: dict[str, Any] = {}

    @classmethod
    def create_from_arg_string(cls, arguments: str, more: dict[str, Any]) -> Any:
        """``"key=value,…"`` and what the command line says beside it."""
        pairs = [pair.split("=", 1) for pair in arguments.split(",")]
        values = {"true": True, "false": False}
        given = {key: values.get(value.lower(), value) for key, value in pairs}
        return cls(**given, **{key: value for key, value in more.items() if value is not None})

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world_size(self) -> int:
        return self._world_size

    def clean(self) -> None:
        """Called when all requests are answered."""


_MODULES = {
    "lmms_eval": {},
    "lmms_eval.api": {},
    "lmms_eval.api.instance": {"GenerationResult": GenerationResult, "TokenCounts": TokenCounts},
    "lmms_eval.api.model": {"lmms": lmms},
    "lmms_eval.models": {},
    "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
}


def provide(monkeypatch: Any) -> None:
    """Makes `import lmms_eval…` work for the length of a test."""
    if INSTALLED:
        return
    for name, contents in _MODULES.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    # What was imported with the stand-ins is not kept for others.
    monkeypatch.delitem(sys.modules, "grace.integrations.lmms.model", raising=False)
