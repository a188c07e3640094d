"""What differs between families of vision-language models, for the trainer: one adapter each.

A family is a `model_type` of transformers. A new one needs an `Adapter` that names its parts and
tells its visual tokens, and a line in `FAMILIES`.
"""

from __future__ import annotations

from torch import nn

from grace.training.adapters.base import Adapter, HiddenStates, VisualTokens
from grace.training.adapters.idefics import IdeficsAdapter
from grace.training.adapters.llava import InternVLAdapter, LlavaAdapter
from grace.training.adapters.qwen import QwenAdapter

__all__ = ["FAMILIES", "Adapter", "HiddenStates", "VisualTokens", "adapter_for", "family"]

FAMILIES: dict[str, type[Adapter]] = {
    "llava": LlavaAdapter,
    "qwen2_vl": QwenAdapter,
    "qwen2_5_vl": QwenAdapter,
    "qwen3_vl": QwenAdapter,
    "internvl": InternVLAdapter,
    "idefics3": IdeficsAdapter,
    "smolvlm": IdeficsAdapter,
}


def family(kind: str) -> type[Adapter]:
    """The adapter of models of a `model_type`; ValueError, which says what to do, for another."""
    if kind not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ValueError(
            f"GraceTrainer: model must be of a known family ({known}), got {kind!r}; another needs "
            "a subclass of grace.training.adapters.Adapter that names its language_part, "
            "vision_parts and projector_parts and has visual_tokens(batch), entered in "
            "grace.training.adapters.FAMILIES under its model_type"
        )
    return FAMILIES[kind]


def adapter_for(model: nn.Module) -> Adapter:
    """The adapter of a model, by `config.model_type`; ValueError as `family`, or for a part that
    the model lacks."""
    config = getattr(model, "config", None)
    return family(getattr(config, "model_type", type(model).__name__))(model)
