"""Tiny random models of real architectures, for tests: no files, no network."""

from __future__ import annotations

import torch
import transformers
from transformers import PreTrainedModel

TEXT = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
_IMAGE_TOKENS = {
    "image_token_id": 90,
    "video_token_id": 91,
    "vision_start_token_id": 92,
    "vision_end_token_id": 93,
}


def qwen2(tie: bool = False) -> PreTrainedModel:
    """A plain causal LM, with biases in q, k and v."""
    config = transformers.Qwen2Config(**TEXT, tie_word_embeddings=tie)
    return _made(transformers.Qwen2ForCausalLM, config)


def llava() -> PreTrainedModel:
    """LLaVA: CLIP tower, projector, Llama; vision layers as many as the text layers."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        projection_dim=32,
    )
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=90,
        image_seq_length=16,
    )
    return _made(transformers.LlavaForConditionalGeneration, config)


def qwen2_vl() -> PreTrainedModel:
    """Qwen2-VL, embeddings tied."""
    config = transformers.Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": _ROPE},
        vision_config={
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 64,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 8,
        },
        tie_word_embeddings=True,
        **_IMAGE_TOKENS,
    )
    return _made(transformers.Qwen2VLForConditionalGeneration, config)


def qwen2_5_vl() -> PreTrainedModel:
    """Qwen2.5-VL."""
    config = transformers.Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": _ROPE},
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "out_hidden_size": 64,
            "num_heads": 2,
            "patch_size": 8,
            "fullatt_block_indexes": [1],
        },
        **_IMAGE_TOKENS,
    )
    return _made(transformers.Qwen2_5_VLForConditionalGeneration, config)


def qwen3_vl() -> PreTrainedModel:
    """Qwen3-VL, with a deepstack merger."""
    config = transformers.Qwen3VLConfig(
        text_config={**TEXT, "head_dim": 16, "rope_parameters": _ROPE},
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "out_hidden_size": 64,
            "num_heads": 2,
            "patch_size": 8,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        **_IMAGE_TOKENS,
    )
    return _made(transformers.Qwen3VLForConditionalGeneration, config)


ALL = {
    "qwen2": qwen2,
    "llava": llava,
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
}


def _made(kind: type[PreTrainedModel], config: transformers.PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():  # transformers' initial biases are zero, which would hide a lost one
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.02)
    return model
