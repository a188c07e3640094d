"""What `Generator` takes: models, options, ways to decode."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.generation import GenerationMode
from transformers.generation.stopping_criteria import StoppingCriteriaList, StopStringCriteria

_REFUSED = (
    "assistant_model",
    "assistant_tokenizer",
    "cache_implementation",
    "custom_generate",
    "inputs_embeds",
    "negative_prompt_ids",
    "past_key_values",
    "cache",
    "prompt_lookup_num_tokens",
    "synced_gpus",
)
_RECORDS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)


def check_decoding(config: Any, arguments: Any) -> None:
    """Raises ValueError for a generation config that means more than greedy or sampled tokens."""
    mode = config.get_generation_mode()
    if mode not in _MODES:
        raise ValueError(f"Generator: decoding must be greedy or sampled, got {mode.value}")
    asked = [name for name in _RECORDS if getattr(config, name, None)]
    if asked:
        raise ValueError(f"Generator: {asked[0]} must be off, got it on")
    if not arguments.get("use_cache", True):
        raise ValueError("Generator: use_cache must be on, got False")
    if config.guidance_scale not in (None, 1):
        raise ValueError(f"Generator: guidance_scale must be 1, got {config.guidance_scale}")
    if config.prefill_chunk_size is not None:
        raise ValueError("Generator: prefill_chunk_size must be None, got a number")


def check_model(model: Any) -> None:
    """Raises ValueError for what does not generate, or has an encoder."""
    if not (hasattr(model, "generate") and hasattr(model, "prepare_inputs_for_generation")):
        kind = type(model).__name__
        raise ValueError(f"Generator: model must be a generating model of transformers, got {kind}")
    if model.config.is_encoder_decoder:
        kind = type(model).__name__
        raise ValueError(f"Generator: model must be decoder-only, got {kind}")


def at_least_1(name: str, value: Any) -> int:
    """The value, or a ValueError."""
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"Generator: {name} must be a number of at least 1, got {value!r}")
    return value


def positions(model: Any) -> int:
    """Most tokens a row that the model has positions for."""
    text = model.config.get_text_config(decoder=True)
    return int(getattr(text, "max_position_embeddings", None) or 2**20)


def why_plain(model: Any) -> str:
    """Why decode steps of this model cannot run on static buffers; empty where they can."""
    text = model.config.get_text_config(decoder=True)
    places = set((getattr(model, "hf_device_map", None) or {}).values())
    if len(places) > 1:
        return f"it lies on {len(places)} devices"
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"]) - {"full_attention"}
    if getattr(text, "sliding_window", None) is not None:
        kinds.add("sliding_attention")
    if kinds or getattr(text, "attention_chunk_size", None) or not _plain_attention(text):
        return (
            f"its layers have {', '.join(sorted(kinds)) or 'experts, or a cache of another kind'}"
        )
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") in ("dynamic", "longrope"):
        return f"its {rope['rope_type']} rotary embedding looks at the length of the text"
    if text._attn_implementation not in ("sdpa", "eager"):
        return f"its attention is {text._attn_implementation}"
    return ""


def why_no_layers(model: Any) -> str:
    """Why a model has no language model with layers to get at; empty where it has."""
    decoder = model.get_decoder()
    layers = getattr(decoder, "layers", None)
    if decoder is model or not isinstance(layers, nn.ModuleList):
        return "its language model is no module of its own with layers"
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    return "" if len(layers) == count else f"its language model has {len(layers)} layers"


def _plain_attention(text: Any) -> bool:
    special = ("kv_lora_rank", "num_kv_shared_layers", "num_experts", "num_local_experts")
    return not any(getattr(text, name, None) for name in special)


def refuse(kwargs: dict[str, Any]) -> None:
    """Raises ValueError for arguments of `model.generate` that mean another way to decode."""
    for name in _REFUSED:
        if kwargs.get(name) is not None:
            raise ValueError(f"Generator: {name} must not be given, got one")


def with_stop_strings(kwargs: dict[str, Any]) -> dict[str, Any]:
    """``stop_strings`` as a criterion: `model.generate` loses the tokenizer on the way to us."""
    strings, tokenizer = kwargs.get("stop_strings"), kwargs.get("tokenizer")
    if strings is None:
        return kwargs
    if tokenizer is None:
        raise ValueError("Generator: stop_strings must come with tokenizer, got none")
    rest = {k: v for k, v in kwargs.items() if k not in ("stop_strings", "tokenizer")}
    criteria = StoppingCriteriaList(rest.pop("stopping_criteria", None) or [])
    criteria.append(StopStringCriteria(tokenizer, strings))
    return rest | {"stopping_criteria": criteria}
