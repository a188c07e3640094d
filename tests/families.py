"""A tiny random model of every family that trains, and a batch of two rows for it: no files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

IMAGE, VIDEO, START = 50, 51, 52
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 60,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_ROPE = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}
_TOKENS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START}
_PATCHES = {"image_size": 16, "patch_size": 4, "hidden_size": 16, "intermediate_size": 16}
_DEPTH = {"num_hidden_layers": 2, "num_attention_heads": 2}


def qwen2_vl(**text: Any) -> nn.Module:
    vision = {"depth": 2, "num_heads": 2, "spatial_merge_size": 2, "patch_size": 4}
    vision |= {"embed_dim": 16, "hidden_size": text.get("hidden_size", 32), "mlp_ratio": 2}
    texts = {**TEXT, "rope_parameters": _ROPE, **text}
    config = transformers.Qwen2VLConfig(vision_config=vision, text_config=texts, **_TOKENS)
    return _seeded(transformers.Qwen2VLForConditionalGeneration, config)


def qwen2_5_vl(**text: Any) -> nn.Module:
    vision = {"depth": 2, "num_heads": 2, "spatial_merge_size": 2, "patch_size": 4}
    vision |= {"hidden_size": 16, "intermediate_size": 16, "window_size": 16}
    vision |= {"fullatt_block_indexes": [1], "out_hidden_size": text.get("hidden_size", 32)}
    texts = {**TEXT, "rope_parameters": _ROPE, **text}
    config = transformers.Qwen2_5_VLConfig(vision_config=vision, text_config=texts, **_TOKENS)
    return _seeded(transformers.Qwen2_5_VLForConditionalGeneration, config)


def qwen3_vl(**text: Any) -> nn.Module:
    vision = {"depth": 2, "num_heads": 2, "spatial_merge_size": 2, "patch_size": 4}
    vision |= {"hidden_size": 16, "intermediate_size": 16, "num_position_embeddings": 64}
    vision |= {"deepstack_visual_indexes": [0, 1], "out_hidden_size": text.get("hidden_size", 32)}
    texts = {**TEXT, "rope_parameters": _ROPE, "head_dim": 8, **text}
    config = transformers.Qwen3VLConfig(vision_config=vision, text_config=texts, **_TOKENS)
    return _seeded(transformers.Qwen3VLForConditionalGeneration, config)


def llava(**text: Any) -> nn.Module:
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**_PATCHES, **_DEPTH, projection_dim=16),
        text_config=transformers.LlamaConfig(**{**TEXT, **text}),
        image_token_index=IMAGE,
        image_seq_length=16,
    )
    return _seeded(transformers.LlavaForConditionalGeneration, config)


def internvl(**text: Any) -> nn.Module:
    vision = {**_PATCHES, **_DEPTH, "image_size": [16, 16], "patch_size": [4, 4]}
    config = transformers.InternVLConfig(
        vision_config=transformers.InternVLVisionConfig(**vision),
        text_config=transformers.Qwen2Config(**{**TEXT, **text}),
        image_token_id=IMAGE,
        image_seq_length=4,
    )
    return _seeded(transformers.InternVLForConditionalGeneration, config)


def idefics3(**text: Any) -> nn.Module:
    config = transformers.Idefics3Config(
        vision_config={**_PATCHES, **_DEPTH},
        text_config=transformers.LlamaConfig(**{**TEXT, **text}),
        image_token_id=IMAGE,
        scale_factor=2,
    )
    return _seeded(transformers.Idefics3ForConditionalGeneration, config)


def smolvlm(**text: Any) -> nn.Module:
    config = transformers.SmolVLMConfig(
        vision_config={**_PATCHES, **_DEPTH},
        text_config=transformers.LlamaConfig(**{**TEXT, **text}),
        image_token_id=IMAGE,
        scale_factor=2,
    )
    return _seeded(transformers.SmolVLMForConditionalGeneration, config)


FAMILIES: dict[str, Callable[..., nn.Module]] = {
    "llava": llava,
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "internvl": internvl,
    "idefics3": idefics3,
    "smolvlm": smolvlm,
}
QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
# Visual tokens of the batch's three images: two in row 0, one in row 1.
LENGTHS = dict.fromkeys(QWEN, (4, 2, 4)) | {"llava": (16, 16, 16)}
EQUAL = (4, 4, 4)


def lengths(kind: str) -> tuple[int, ...]:
    """Visual tokens of each of the three images."""
    return LENGTHS.get(kind, EQUAL)


def positions(kind: str) -> list[int]:
    """Where visual tokens stand in the batch's 2 * S tokens."""
    first, second, third = lengths(kind)
    starts = (1, first + 3, _width(kind) + 3)
    sizes = zip(starts, (first, second, third), strict=True)
    return [start + i for start, count in sizes for i in range(count)]


def batch(kind: str) -> dict[str, Tensor]:
    """Inputs of two rows, and labels: five supervised tokens."""
    ids = torch.full((2 * _width(kind),), 7)
    ids[positions(kind)] = IMAGE
    ids = ids.reshape(2, -1)
    before_image = (ids != IMAGE) & (torch.roll(ids, -1, 1) == IMAGE)
    ids[before_image] = START
    labels = torch.full_like(ids, -100)
    labels[:, -3:] = torch.tensor([[8, 9, 59], [3, 2, -100]])
    torch.manual_seed(1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return {**inputs, **_pixels(kind, ids)}


def _width(kind: str) -> int:
    return sum(lengths(kind)[:2]) + 8


def _pixels(kind: str, ids: Tensor) -> dict[str, Tensor]:
    if kind in QWEN:
        grid = torch.tensor([[1, 4, 4], [1, 2, 4], [1, 4, 4]])
        patches = torch.randn(int(grid.prod(-1).sum()), 3 * 2 * 4 * 4)
        types = (ids == IMAGE).int()
        return {"pixel_values": patches, "image_grid_thw": grid, "mm_token_type_ids": types}
    if kind in ("idefics3", "smolvlm"):  # [rows, tiles, …], the second row padded with a tile
        pixels = torch.randn(2, 2, 3, 16, 16)
        pixels[1, 1] = 0
        return {"pixel_values": pixels}
    return {"pixel_values": torch.randn(3, 3, 16, 16)}


def _seeded(kind: Any, config: Any) -> nn.Module:
    torch.manual_seed(0)
    return kind(config)
