"""Configs of the student and teacher pairs that steps are measured and planned on, as their public
checkpoints have them: sizes and rotary settings, no weights."""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]


def _text(hidden: int, inner: int, layers: int, heads: int, kv: int, vocab: int) -> Config:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocab,
    }


def _qwen3_vl(text: Config, vision: Config, tie: bool) -> Config:
    rope = {
        "rope_type": "default",
        "rope_theta": 5e6,
        "mrope_section": [24, 20, 20],
        "mrope_interleaved": True,
    }
    more = {"model_type": "qwen3_vl_text", "head_dim": 128, "rope_parameters": rope}
    tower = {"model_type": "qwen3_vl", "num_heads": 16, "patch_size": 16}
    return {
        "model_type": "qwen3_vl",
        "text_config": {**text, **more, "max_position_embeddings": 262144},
        "vision_config": {**tower, **vision, "out_hidden_size": text["hidden_size"]},
        "tie_word_embeddings": tie,
    }


def _qwen2_vl(text: Config, tie: bool) -> Config:
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    vision = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "patch_size": 14}
    return {
        "model_type": "qwen2_vl",
        "text_config": {**text, "model_type": "qwen2_vl_text", "rope_parameters": rope},
        "vision_config": {**vision, "hidden_size": text["hidden_size"]},
        "image_token_id": 151655,
        "video_token_id": 151656,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "tie_word_embeddings": tie,
    }


def _llava(text: Config) -> Config:
    clip = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
    clip |= {"num_attention_heads": 16, "image_size": 336, "patch_size": 14, "projection_dim": 768}
    return {
        "model_type": "llava",
        "text_config": {**text, "model_type": "llama", "max_position_embeddings": 4096},
        "vision_config": {**clip, "model_type": "clip_vision_model"},
        "image_token_index": 32000,
        "image_seq_length": 576,
        "vision_feature_layer": -2,
        "tie_word_embeddings": False,
    }


CONFIGS: dict[str, Config] = {
    "Qwen3-VL-2B": _qwen3_vl(
        _text(2048, 6144, 28, 16, 8, 151936),
        {
            "depth": 24,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "deepstack_visual_indexes": [5, 11, 17],
        },
        tie=True,
    ),
    "Qwen3-VL-8B": _qwen3_vl(
        _text(4096, 12288, 36, 32, 8, 151936),
        {
            "depth": 27,
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "deepstack_visual_indexes": [8, 16, 24],
        },
        tie=False,
    ),
    "Qwen2-VL-2B": _qwen2_vl(_text(1536, 8960, 28, 12, 2, 151936), tie=True),
    "Qwen2-VL-7B": _qwen2_vl(_text(3584, 18944, 28, 28, 4, 152064), tie=False),
    "LLaVA-1.5-7B": _llava(_text(4096, 11008, 32, 32, 32, 32064)),
    "LLaVA-1.5-13B": _llava(_text(5120, 13824, 40, 40, 40, 32064)),
}

# The same families at sizes that a CPU trains in a moment.
_TINY = _text(128, 256, 3, 2, 1, 512)
_TOKENS = {"image_token_id": 500, "video_token_id": 501, "vision_start_token_id": 502}
_TINY_TOWER = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2}
_TINY_TOWER |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 64}
_TINY_CLIP = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
_TINY_CLIP |= {"num_attention_heads": 2, "image_size": 56, "model_type": "clip_vision_model"}
for _name, _tiny in (("student", _TINY), ("teacher", _TINY | {"num_hidden_layers": 4})):
    CONFIGS[f"tiny Qwen3-VL {_name}"] = {**_qwen3_vl(_tiny, _TINY_TOWER, True), **_TOKENS}
    CONFIGS[f"tiny LLaVA {_name}"] = _llava(_tiny) | {
        "image_token_index": 500,
        "image_seq_length": 16,
        "vision_config": {**_TINY_CLIP, "patch_size": 14, "projection_dim": 32},
    }


def config_of(name: str) -> Any:
    """The transformers config of a model above, or of a mapping with a `model_type`."""
    from transformers import AutoConfig

    content = dict(CONFIGS[name])
    return AutoConfig.for_model(content.pop("model_type"), **content)
