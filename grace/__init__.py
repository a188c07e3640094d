"""Train vision-language models at 4 bits under a large teacher; run them on low-bit kernels.

The names below load on first use, so that ``import grace`` costs next to nothing. It does one
thing at once: from then on transformers gives packed models on our kernels (`from_pretrained`).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from grace import integrations
from grace.version import __version__

if TYPE_CHECKING:
    from grace import evaluation, export, generation, losses, nn, ops, packing, ptq, study, training
    from grace.importing import import_published
    from grace.integrations.transformers import accelerate
    from grace.quantization import pack, quantize
    from grace.training import GraceConfig, GraceTrainer

_ATTRIBUTES = {
    "GraceConfig": "grace.training",
    "GraceTrainer": "grace.training",
    "accelerate": "grace.integrations.transformers",
    "import_published": "grace.importing",
    "pack": "grace.quantization",
    "quantize": "grace.quantization",
}
_MODULES = (
    "evaluation",
    "export",
    "generation",
    "losses",
    "nn",
    "ops",
    "packing",
    "ptq",
    "study",
    "training",
)

__all__ = [
    "GraceConfig",
    "GraceTrainer",
    "__version__",
    "accelerate",
    "evaluation",
    "export",
    "generation",
    "import_published",
    "losses",
    "nn",
    "ops",
    "pack",
    "packing",
    "ptq",
    "quantize",
    "study",
    "training",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"grace.{name}")
    if name in _ATTRIBUTES:
        return getattr(importlib.import_module(_ATTRIBUTES[name]), name)
    raise AttributeError(f"module 'grace' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


integrations.install()
