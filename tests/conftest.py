"""Fixtures that all tests share."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import grace.ops  # noqa: F401 (defines the ops)
from grace import _library
from grace.ops.dequant_gemm import QUESTIONS

# The same examples on every run in CI; new ones on a developer's machine.
settings.register_profile("grace", deadline=None, derandomize=os.environ.get("CI") == "true")
settings.load_profile("grace")

DATA = Path(__file__).parent / "data"
_EMULATED = Path(_library.__file__).with_name("_emulated.so")


@dataclass(frozen=True)
class Kernels:
    """The compiled ops of one device; ``grace_emulated`` runs the CUDA kernels on the CPU."""

    namespace: str
    device: str

    def __getattr__(self, op: str) -> Callable[..., Any]:
        return getattr(getattr(torch.ops, self.namespace), op)

    @property
    def cuda_kernels(self) -> bool:
        """Whether these are the CUDA kernels, emulated or not."""
        return (self.namespace, self.device) != ("grace", "cpu")

    def put(self, *values: Any) -> list[Any]:
        """The values with every tensor, in lists too, moved to the kernels' device."""
        return [self._put(value) for value in values]

    def _put(self, value: Any) -> Any:
        if isinstance(value, list):
            return self.put(*value)
        return value.to(self.device) if isinstance(value, Tensor) else value


def _load_emulated() -> Kernels:
    if not _EMULATED.exists():
        pytest.skip("the emulated kernels are not built (GRACE_EMULATION=ON, as `make build` does)")
    if not hasattr(torch.ops.grace_emulated, "fake_quant"):
        for name, schema in (_library.schemas() | QUESTIONS).items():
            torch.library.define(f"grace_emulated::{name}", schema)
        torch.ops.load_library(str(_EMULATED))
    return Kernels("grace_emulated", "cpu")


@pytest.fixture
def emulated() -> Kernels:
    """The CUDA kernels, emulated on the CPU."""
    return _load_emulated()


@pytest.fixture(params=["cpu", "emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    """What runs on a CPU; the CUDA kernels emulated there; the same on a GPU if there is one."""
    if request.param == "cpu":
        return Kernels("grace", "cpu")
    if request.param == "emulated":
        return _load_emulated()
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    if _library.kernel_for("fake_quant", "cuda") != "compiled":
        pytest.skip("grace is built without CUDA kernels")
    return Kernels("grace", "cuda")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class _ZerosMade(TorchDispatchMode):
    """Collects the shapes of tensors of zeros that are made."""

    def __enter__(self) -> list[list[int]]:  # type: ignore[override]
        self.made: list[list[int]] = []
        super().__enter__()
        return self.made

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket in (torch.ops.aten.zeros, torch.ops.aten.new_zeros):
            self.made.append(list(result.shape))
        return result


@pytest.fixture
def zeros_made() -> type[_ZerosMade]:
    """``with zeros_made() as shapes``: of the tensors of zeros that are made inside."""
    return _ZerosMade
