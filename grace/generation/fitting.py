"""Which models have decoder layers that ours (`grace.generation.decoder`) can stand for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers.utils import output_capturing

from grace.generation import checks
from grace.nn.fused_linear import FusedLinear
from grace.ops.decode_attention import HEAD_DIMS, MOST_GROUP, runs_on_gpu

_MODELS = "transformers.models."
# Pre-norm layers with rotary embeddings of whole heads in halves; subclasses may be anything else.
LAYERS = frozenset(
    _MODELS + name
    for name in (
        "llama.modeling_llama.LlamaDecoderLayer",
        "mistral.modeling_mistral.MistralDecoderLayer",
        "qwen2.modeling_qwen2.Qwen2DecoderLayer",
        "qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VLDecoderLayer",
        "qwen2_vl.modeling_qwen2_vl.Qwen2VLDecoderLayer",
        "qwen3.modeling_qwen3.Qwen3DecoderLayer",
        "qwen3_vl.modeling_qwen3_vl.Qwen3VLTextDecoderLayer",
    )
)
_NORMS_OF_HEADS = ("q_norm", "k_norm")


def why_not(model: Any) -> str:
    """Why a model's layers stay as they are; empty where ours compute the same.

    Ours do not call a layer's attention and norms as modules: these must be what transformers made
    them. Its projections and its MLP are called, and may be anything.
    """
    why = checks.why_plain(model) or checks.why_no_layers(model)
    if why:
        return why
    text = model.config.get_text_config(decoder=True)
    if text._attn_implementation != "sdpa":
        return f"its attention is {text._attn_implementation}, not sdpa"
    decoder, dtype = model.get_decoder(), model.get_input_embeddings().weight.dtype
    for layer in decoder.layers:
        why = _why_not_layer(layer) or _why_not_norms(list(_norms(layer)), dtype)
        why = why or _why_not_heads(layer, model.device, dtype)
        if why:
            return why
    return _why_not_norms([decoder.norm], dtype)


def _why_not_layer(layer: nn.Module) -> str:
    kind = type(layer)
    if f"{kind.__module__}.{kind.__qualname__}" not in LAYERS:
        return f"its layers are {kind.__name__}"
    if "forward" in vars(layer):
        return "its layers have a forward of their own"
    attention: Any = layer.self_attn
    if type(attention).__module__ != kind.__module__ or _is_changed(attention):
        return "its attention is not as transformers makes it, or has hooks"
    return ""


def _why_not_norms(norms: list[Any], dtype: torch.dtype) -> str:
    for norm in norms:
        kind = type(norm)
        known = kind.__module__.startswith(_MODELS) and kind.__name__.endswith("RMSNorm")
        if not known or _is_changed(norm):
            return "its norms are not as transformers makes them, or have hooks"
        if norm.weight.dtype != dtype:
            return f"its norms are {norm.weight.dtype}, and its embedding is {dtype}"
    return ""


def _why_not_heads(layer: Any, device: torch.device, dtype: torch.dtype) -> str:
    config, dim = layer.self_attn.config, layer.self_attn.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if dim % 2:
        return f"its heads have {dim} numbers, which is odd"
    if device.type != "cuda" or runs_on_gpu(heads, kv_heads, dim, dtype):
        return ""
    dims = " or ".join(map(str, HEAD_DIMS))
    return (
        f"its attention has {heads} heads of {dim} over {kv_heads}, {dtype}; on a GPU it must have "
        f"heads of {dims}, at most {MOST_GROUP} over one, in 16 bits"
    )


def _norms(layer: Any) -> Iterator[nn.Module]:
    yield from (layer.input_layernorm, layer.post_attention_layernorm)
    for name in _NORMS_OF_HEADS:
        norm = layer.self_attn._modules.get(name)
        if norm is not None:
            yield norm


def _is_changed(module: nn.Module) -> bool:
    """Whether calls do more than the class says; hooks of fused products and those by which
    transformers collects outputs do nothing to what is computed."""
    fused = module._modules.get("qkv_proj")
    ours = {hook.id for hook in fused.hooks} if isinstance(fused, FusedLinear) else set()
    hooks = {**module._forward_hooks, **module._forward_pre_hooks}
    other = [
        hook
        for number, hook in hooks.items()
        if number not in ours and getattr(hook, "__module__", "") != output_capturing.__name__
    ]
    return "forward" in vars(module) or bool(other)
