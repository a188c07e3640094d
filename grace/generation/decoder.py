"""Decoder layers of our own ops, in the places of transformers', while a `Generator` answers.

A layer is ``x + attention(norm(x))``, then ``x + mlp(norm(x))``. Of a new token that is seven ops:

    rms_norm · qkv · decode_attention · o_proj and residual
    rms_norm · gate, up, SwiGLU · down_proj and residual

In a prompt `rotary`, the cache's update and sdpa stand for decode_attention. So it is with packed
layers that are fused; others are called as they are. Parameters stay where they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from grace.generation.cache import SharedCache
from grace.generation.names import CACHE
from grace.nn.fused_linear import FusedLinear
from grace.nn.fusion import FusedMLP
from grace.nn.packed_linear import PackedLinear
from grace.ops.decode_attention import decode_attention
from grace.ops.rms_norm import rms_norm
from grace.ops.rotary import rotary

if TYPE_CHECKING:
    from grace.generation.layers import Replacement

Adding = Callable[[Tensor, Tensor], Tensor]  # of an input and a residual


def replacements(model: Any) -> list[Replacement]:
    """What stands in the places of a model's layers and of the norm behind them; the model must be
    one that fits (`grace.generation.fitting`)."""
    decoder = model.get_decoder()
    found: list[Replacement] = [
        (layer, "forward", Layer(layer).forward) for layer in decoder.layers
    ]
    return [*found, (decoder.norm, "forward", norm_of(decoder.norm))]


def norm_of(norm: Any) -> Callable[[Tensor], Tensor]:
    """The RMS norm of a module of transformers by `grace.ops.rms_norm`."""
    weight, eps = norm.weight, norm.variance_epsilon
    return lambda x: rms_norm(x, weight, eps=eps)


class Layer:
    """A decoder layer of transformers, with all that a call needs at hand: the host has no time.

    What a layer is asked for that is not a `Generator`'s prompt or step, its own forward does.
    """

    def __init__(self, layer: Any) -> None:
        attention: Any = layer.self_attn
        config = attention.config
        self._own, self._attention, self._config = layer.forward, attention, config
        self._index, self._scale = attention.layer_idx, attention.scaling
        self._dim = attention.head_dim
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self._norm = norm_of(layer.input_layernorm)
        self._mlp_norm = norm_of(layer.post_attention_layernorm)
        self._qkv = _projections(attention, (heads, kv_heads, kv_heads))
        self._o = adding(attention.o_proj)
        self._mlp = _mlp(layer.mlp)
        self._norms = _norms_of_heads(attention)

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        position_embeddings: Any = None,
        attention_mask: Any = None,
        **kwargs: Any,
    ) -> Any:
        """As the layer's: [rows, tokens, hidden] → the same."""
        cache = kwargs.pop(CACHE, None)
        given = hidden_states, position_embeddings, attention_mask, cache
        x = None if args else self._attended(*given, kwargs)
        if x is not None:
            return self._mlp(self._mlp_norm(x), x)
        return self._own(
            hidden_states,
            *args,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            **{CACHE: cache},
            **kwargs,
        )

    def _attended(
        self, x: Tensor, embedding: Any, mask: Any, cache: Any, kwargs: dict[str, Any]
    ) -> Tensor | None:
        """``x + attention(norm(x))``; None where only the layer's own forward does as asked."""
        if type(cache) is not SharedCache or kwargs.get("output_attentions"):
            return None
        if torch.is_autocast_enabled(x.device.type):
            return None
        if not cache.filling:
            return self._step(x, embedding, mask, cache) if _is_step(x, mask, cache) else None
        attend = ALL_ATTENTION_FUNCTIONS.get(self._config._attn_implementation)
        if attend is None:
            return None
        return self._prompt(x, embedding, mask, cache, attend, kwargs)

    def _step(self, x: Tensor, embedding: Any, mask: Tensor, cache: SharedCache) -> Tensor:
        """Of one token a row, over the cache."""
        q, k, v = self._qkv(self._norm(x), (len(x), -1, self._dim))
        cos, sin = embedding
        held: Any = cache.layers[self._index]
        places = held.keys, held.values, cache.position, mask.flatten(1)
        # Kernels that choose the last token and embed it lie between what was cached and this one.
        options = {**self._norms, "scale": self._scale, "settled": True}
        out = decode_attention(q, k, v, cos[:, 0], sin[:, 0], *places, **options)
        return self._o(out[:, None], x)

    def _prompt(
        self,
        x: Tensor,
        embedding: Any,
        mask: Any,
        cache: SharedCache,
        attend: Callable[..., Any],
        kwargs: dict[str, Any],
    ) -> Tensor:
        """Of a prompt, which fills the cache; by an attention of transformers."""
        q, k, v = self._qkv(self._norm(x), (*x.shape[:2], -1, self._dim))
        q, k = rotary(q, k, *embedding, **self._norms)
        k, v = cache.update(k, v.transpose(1, 2), self._index)
        options = {"dropout": 0.0, "scaling": self._scale, **kwargs}
        out: Tensor = attend(self._attention, q, k, v, mask, **options)[0]
        return self._o(out.reshape(*x.shape[:2], -1), x)


def _is_step(x: Tensor, mask: Any, cache: SharedCache) -> bool:
    """Whether that is a static decode step of the cache's batch."""
    return (
        isinstance(mask, Tensor)
        and mask.dtype == torch.bool
        and mask.shape == (cache.batch, 1, 1, cache.length)
        and x.shape[:2] == (cache.batch, 1)
    )


# --- what a layer calls --------------------------------------------------------------------------

Heads = Callable[[Tensor, tuple[int, ...]], tuple[Tensor, ...]]


def _projections(attention: Any, heads: tuple[int, ...]) -> Heads:
    """Queries, keys and values of an input, each in a shape [.., heads, dim] with -1 for heads."""
    fused = attention._modules.get("qkv_proj")
    if isinstance(fused, FusedLinear):
        return lambda x, shape: fused(x).view(shape).split(heads, dim=-2)
    parts = attention.q_proj, attention.k_proj, attention.v_proj
    return lambda x, shape: tuple(part(x).view(shape) for part in parts)


def _mlp(mlp: Any) -> Adding:
    if type(mlp) is not FusedMLP or is_hooked(mlp):
        return adding(mlp)
    gate_up, down = mlp.gate_up_proj, adding(mlp.down_proj)
    return lambda x, residual: down(gate_up(x), residual)


def adding(module: nn.Module) -> Adding:
    """``residual + module(x)``, in one kernel where the module is packed."""
    if isinstance(module, PackedLinear) and not is_hooked(module):
        return cast(Adding, module)
    return lambda x, residual: residual + module(x)


def _norms_of_heads(attention: Any) -> dict[str, Any]:
    """Arguments of `rotary` and of `decode_attention`: norms of queries and keys, if there are."""
    q_norm, k_norm = (attention._modules.get(name) for name in ("q_norm", "k_norm"))
    if q_norm is None or k_norm is None:
        return {}
    eps = q_norm.variance_epsilon
    return {"q_weight": q_norm.weight, "k_weight": k_norm.weight, "eps": eps}


def is_hooked(module: nn.Module) -> bool:
    """Whether a call of the module does more than its class's forward."""
    return "forward" in vars(module) or bool(module._forward_hooks or module._forward_pre_hooks)
