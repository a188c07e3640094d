"""What generation is measured on: models of public sizes with random weights, prompts with an
image, and where a model's memory lies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models import config_of
from benchmarks.training_step import Shape, make_batch
from grace.nn import PackedLinear, fuse
from grace.quantization import decoder_linears

GROUP, BITS = 128, 4
TEXT = 56  # tokens of a prompt beside those of its image
_SPREAD = 0.02  # of weights, as transformers draws them


@dataclass(frozen=True)
class Prompt:
    """A prompt's tokens, and how many of them are those of its one image."""

    tokens: int
    visual: int


# LLaVA looks at 336 px; Qwen is shown 448 px, in patches of 14 or 16 px of which 4 are a token.
PROMPTS = {
    "LLaVA-1.5-7B": Prompt(576 + TEXT, 576),
    "Qwen3-VL-2B": Prompt(196 + TEXT, 196),
    "Qwen2-VL-2B": Prompt(256 + TEXT, 256),
    "Qwen3-VL-8B": Prompt(196 + TEXT, 196),
    "tiny LLaVA student": Prompt(24, 16),
    "tiny Qwen3-VL student": Prompt(12, 4),
}


def build(name: str, device: torch.device) -> Any:
    """A dense model of random weights, made on the device; answers do not end before their time."""
    from transformers import AutoModelForImageTextToText

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(
            config_of(name), dtype=dtype, attn_implementation="sdpa"
        )
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval().requires_grad_(False)


def inputs_for(model: Any, name: str, rows: int) -> dict[str, Tensor]:
    """Prompts of equal length, each with an image."""
    prompt = PROMPTS[name]
    shape = Shape(rows, 1, prompt.tokens, prompt.visual, 1)
    inputs = make_batch(model.config, shape, model.device, model.dtype)
    del inputs["labels"]
    return {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}


@torch.no_grad()
def pack_randomly(model: Any) -> None:
    """Puts random 4-bit layers in the places of the decoder's linears, one by one, and fuses them:
    there is never a second model."""
    for name in list(decoder_linears(model)):
        linear = model.get_submodule(name)
        (rows, columns), bias, device = linear.weight.shape, linear.bias, linear.weight.device
        model.set_submodule(name, nn.Identity())
        del linear
        codes = torch.randint(-8, 8, (rows, columns), dtype=torch.int8, device=device)
        scales = torch.rand(rows, columns // GROUP, device=device).add_(0.5).mul_(_SPREAD / 4.6)
        layer = PackedLinear.from_codes(codes, scales.bfloat16(), bias, BITS, GROUP)
        model.set_submodule(name, layer)
    fuse(model)


def weights_mib(model: Any) -> dict[str, float]:
    """Memory of the weights by part; the head is 0 where it is the embedding."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    towers = [m for n, m in model.named_modules() if n.split(".")[-1] in _TOWERS]
    seen: set[int] = set()
    parts = {
        "embedding": _bytes(embedding, seen),
        "head": _bytes(head, seen),
        "vision": sum(_bytes(tower, seen) for tower in towers),
        "layers": _bytes(model, seen),
    }
    found = {name: round(size / 2**20, 1) for name, size in parts.items()}
    return {"all": round(sum(parts.values()) / 2**20, 1), **found}


_TOWERS = ("visual", "vision_tower", "multi_modal_projector")


def read_mib(weights: dict[str, float]) -> float:
    """Of `weights_mib`, what a decode step reads: not the tower, and of the embedding a row, unless
    it is the head, too."""
    unread = weights["vision"] + (weights["embedding"] if weights["head"] else 0.0)
    return weights["all"] - unread


def _bytes(module: nn.Module, seen: set[int]) -> int:
    """Of tensors that were not counted before."""
    total = 0
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            total += tensor.numel() * tensor.element_size()
    return total
