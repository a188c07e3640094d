"""The compiled library and the op registry behind ``grace.ops``.

Schemas live in Python, one beside each op's reference; C++ only registers kernels for them. Without
a compiled library every op still runs, through its reference.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

NAMESPACE = "grace"

_LIBRARY = Path(__file__).with_name("_C.so")
_Function = TypeVar("_Function", bound=Callable[..., Any])
_schemas: dict[str, str] = {}
_composed: set[str] = set()
_loaded = False


def define(name: str, schema: str, *, composed: bool = False) -> None:
    """Defines the op ``grace::<name>``; a schema reads ``"(Tensor x, int bits) -> Tensor"``.

    A ``composed`` op has no kernel of its own: on every device it calls other ops.
    """
    torch.library.define(f"{NAMESPACE}::{name}", schema)
    _schemas[name] = schema
    if composed:
        _composed.add(name)


def reference(name: str) -> Callable[[_Function], _Function]:
    """Registers the decorated function as the op's kernel wherever no compiled one is."""

    def register(function: _Function) -> _Function:
        torch.library.impl(f"{NAMESPACE}::{name}", "default", function)
        return function

    return register


def fake(name: str) -> Callable[[_Function], _Function]:
    """Registers the decorated function as the op's shape inference (meta and FakeTensor)."""

    def register(function: _Function) -> _Function:
        torch.library.register_fake(f"{NAMESPACE}::{name}", function)
        return function

    return register


def schemas() -> dict[str, str]:
    """Name to schema of every op that ``grace`` defines."""
    return dict(_schemas)


def is_composed(name: str) -> bool:
    """Whether ``grace::<name>`` is made of other ops on every device."""
    return name in _composed


def load() -> bool:
    """Loads the compiled kernels once; False, with one warning, where there are none to load."""
    global _loaded
    if _loaded:
        return True
    if not _LIBRARY.exists():
        warnings.warn(
            "grace: no compiled kernels were found, every op runs its PyTorch reference; "
            "build them with `pip install .` (see `grace info`)",
            RuntimeWarning,
            stacklevel=3,
        )
        return False
    torch.ops.load_library(str(_LIBRARY))
    _loaded = True
    return True


def build_info() -> dict[str, str]:
    """The build's torch, cuda, cuda_archs, compiler and build_type; empty without a build."""
    try:
        return importlib.import_module("grace._build").build_info()
    except ModuleNotFoundError:
        return {}


def kernel_for(name: str, device: str) -> str:
    """What ``grace::<name>`` runs on ``device``, cpu or cuda: compiled, reference or composed."""
    if is_composed(name):
        return "composed"
    key = {"cpu": "CPU", "cuda": "CUDA"}[device]
    compiled = torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", key)
    return "compiled" if compiled else "reference"
