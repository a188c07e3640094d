"""Training: options, the trainer, data. Its names load torch and transformers when first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grace.training.collator import Collator
    from grace.training.config import GraceConfig
    from grace.training.data import ConversationDataset
    from grace.training.trainer import GraceTrainer

_HOME = {
    "GraceConfig": "config",
    "GraceTrainer": "trainer",
    "Collator": "collator",
    "ConversationDataset": "data",
}
__all__ = ["Collator", "ConversationDataset", "GraceConfig", "GraceTrainer"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
