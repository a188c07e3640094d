"""LLaVA-1.5 as its first code names it, brought to the names and the config of transformers.

| original | transformers |
|---|---|
| ``model.layers``, ``model.embed_tokens``, ``model.norm`` | ``language_model.model.…`` |
| ``lm_head`` | ``language_model.lm_head`` |
| ``model.mm_projector.0``, ``.2`` | ``multi_modal_projector.linear_1``, ``.linear_2`` |
| ``model.vision_tower.vision_tower`` | ``vision_tower`` |

The original marks an image by -200; transformers by a token, the first behind the vocabulary. So
embedding and head get rows for it, zeros, up to a multiple of 64; generation suppresses them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from grace.checkpoint import TensorInfo

ARCHITECTURE = "LlavaLlamaForCausalLM"
_NAMES = (
    (r"^model\.vision_tower\.vision_tower\.", "vision_tower."),
    (r"^model\.mm_projector\.0\.", "multi_modal_projector.linear_1."),
    (r"^model\.mm_projector\.2\.", "multi_modal_projector.linear_2."),
    (r"^model\.(layers|embed_tokens|norm)\.", r"language_model.model.\1."),
    (r"^lm_head\.", "language_model.lm_head."),
)
PADDED = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")
_TEXT = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "attention_bias",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
_HEAD = 64  # of every CLIP tower that LLaVA-1.5 was made with


def is_original(config: Mapping[str, Any]) -> bool:
    """Whether a config is one of LLaVA's first code."""
    return (config.get("architectures") or [None])[0] == ARCHITECTURE


def rename(name: str) -> str:
    """A tensor's name in transformers' files."""
    for pattern, replacement in _NAMES:
        name, count = re.subn(pattern, replacement, name)
        if count:
            break
    return name


def pad_rows(name: str, tensor: Tensor, vocabulary: int) -> Tensor:
    """``tensor`` with rows up to ``vocabulary``, if ``name`` (by transformers) is one to pad."""
    if name not in PADDED or tensor.shape[0] >= vocabulary:
        return tensor
    zeros = torch.zeros(vocabulary - tensor.shape[0], *tensor.shape[1:], dtype=tensor.dtype)
    return torch.cat((tensor, zeros))


def convert_config(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """The config of `LlavaForConditionalGeneration`.

    Args:
        config: of LLaVA's first code.
        tensors: of the checkpoint; the vision tower's sizes are read from them.

    Raises:
        ValueError: no vision tower in the checkpoint, another projector, or no sizes.
    """
    projector = config.get("mm_projector_type", "linear")
    if projector != "mlp2x_gelu":
        raise ValueError(f"import: mm_projector_type must be mlp2x_gelu, got {projector}")
    vocabulary = config.get("vocab_size")
    if not isinstance(vocabulary, int) or vocabulary < 1:
        raise ValueError(f"import: vocab_size must be positive, got {vocabulary}")
    text = {key: config[key] for key in _TEXT if key in config}
    padded = 64 * math.ceil((vocabulary + 1) / 64)
    kept = {key: config[key] for key in ("dtype", "torch_dtype") if key in config}
    return {
        **kept,
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "text_config": {**text, "model_type": "llama", "vocab_size": padded},
        "vision_config": _vision(tensors),
        "image_token_index": vocabulary,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": config.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": (
            "default" if config.get("mm_vision_select_feature", "patch") == "patch" else "full"
        ),
        "tie_word_embeddings": False,
    }


def suppressed(config: Mapping[str, Any], converted: Mapping[str, Any]) -> list[int]:
    """Tokens that are no tokens: the rows that were added."""
    return list(range(config["vocab_size"], converted["text_config"]["vocab_size"]))


def _vision(tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    prefix = "model.vision_tower.vision_tower.vision_model."
    own = {n.removeprefix(prefix): i.shape for n, i in tensors.items() if n.startswith(prefix)}
    patches = own.get("embeddings.patch_embedding.weight")
    positions = own.get("embeddings.position_embedding.weight")
    inner = own.get("encoder.layers.0.mlp.fc1.weight")
    if not patches or not positions or not inner:
        raise ValueError(f"import: src must hold the vision tower ({prefix}*), got none")
    layers = {name.split(".")[2] for name in own if name.startswith("encoder.layers.")}
    return {
        "model_type": "clip_vision_model",
        "hidden_size": patches[0],
        "intermediate_size": inner[0],
        "num_hidden_layers": len(layers),
        "num_attention_heads": max(1, patches[0] // _HEAD),
        "patch_size": patches[-1],
        "image_size": math.isqrt(positions[0] - 1) * patches[-1],
    }
