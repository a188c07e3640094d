"""What tests of generation share: models whose answers vary, and what they are asked."""

from __future__ import annotations

from typing import Any

import families
import torch
from torch import Tensor, nn
from transformers import LogitsProcessor

import grace
from grace.generation import Generator
from grace.nn import FusedLinear

NEW = 8
GREEDY: dict[str, Any] = {"do_sample": False}
SAMPLED: dict[str, Any] = {"do_sample": True, "temperature": 1.5, "top_k": 20, "top_p": 0.95}


def made(kind: str, packed: bool = False, fuse: bool = True, **text: Any) -> nn.Module:
    """A model whose answers have many tokens: what is drawn small at first says one for ever."""
    return varied(families.FAMILIES[kind](**text), packed, fuse)


def varied(model: Any, packed: bool = False, fuse: bool = True) -> nn.Module:
    """The model with larger weights, and packed, in place."""
    model = model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    if packed:
        grace.quantize(model, group_size=32, init="absmax")
        grace.pack(model, fuse=fuse)
        assert any(isinstance(module, FusedLinear) for module in model.modules()) == fuse
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def asked(kind: str, padded: bool = True) -> dict[str, Tensor]:
    """Two rows with images; the second is shorter, padded on the left."""
    inputs = {name: value for name, value in families.batch(kind).items() if name != "labels"}
    if not padded:
        return inputs
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        if name in inputs:
            rows = inputs[name]
            left = rows.new_zeros(2, 3)
            if name != "mm_token_type_ids":  # the first row's are text, not padding
                left[0] = 7 if name == "input_ids" else 1
            inputs[name] = torch.cat([left, rows], dim=1)
    return inputs


def both(
    model: Any, generator: Generator, inputs: dict[str, Tensor], **arguments: Any
) -> tuple[Tensor, Tensor]:
    """What `model.generate` says, and what we say, from one seed."""
    torch.manual_seed(5)
    theirs = model.generate(
        **inputs, max_new_tokens=NEW, cache_implementation="static", **arguments
    )
    torch.manual_seed(5)
    return theirs, generator.generate(**inputs, max_new_tokens=NEW, **arguments)


def capturing(model: Any, **options: Any) -> Generator:
    """A generator that captures on a CPU, too: for the fixture `recorded_graphs`."""
    generator = Generator(model, **options)
    generator.capture, generator._lag = True, 1
    return generator


class Forced(LogitsProcessor):
    """Keeps the logits of every step, and asks for tokens one after the other."""

    def __init__(self) -> None:
        self.logits: list[Tensor] = []

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        self.logits.append(scores.clone())
        forced = torch.full_like(scores, -torch.inf)
        forced[:, (11 * len(self.logits)) % 40 + 2] = 0
        return forced


def logits_of(generate: Any, inputs: dict[str, Tensor]) -> Tensor:
    kept = Forced()
    generate(**inputs, max_new_tokens=NEW, logits_processor=[kept], **GREEDY)
    return torch.stack(kept.logits)
