"""Quantizing the layers of a decoder layer together, and keeping what was made for the backward.

A `FakeQuantLinear` quantizes its own weight when it runs: a launch a layer, and a call of PyTorch's
dispatcher with autograd. Here a block's linears are quantized by one `fake_quant_many` just before
the block runs, and the results are gone when it has run. The numbers are the same bit for bit; in
memory together are the quantized weights of one block instead of one layer, and in the backward
their gradients.

With gradient checkpointing a block runs twice, and so does this, inside the recomputation: nothing
is kept between. A block's hooks are inside up to transformers 5.23; later ones checkpoint `forward`
alone, and what is to run there goes into the function that checkpoints it. `hold` makes quantized
weights once instead, outside of it, for all blocks and until `release`: as many bytes as the
weights have in the dtype they are multiplied in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle
from transformers.modeling_layers import GradientCheckpointingLayer

from grace.nn.fake_quant_linear import FakeQuantLinear
from grace.ops.fake_quant_many import fake_quant_many


def quantize_ahead(blocks: Iterable[nn.Module]) -> list[RemovableHandle]:
    """From now on each block quantizes its `FakeQuantLinear` layers together before it runs.

    Args:
        blocks: decoder layers. Layers with a packed product go their own way, and so do weights
            that are still sharded (DTensor) when their block begins.

    Returns:
        Handles whose `remove()` ends it; where `forward` alone is checkpointed, not before
        checkpointing is turned on anew.
    """
    handles = []
    for block in blocks:
        hooks = _Hooks()
        handles.append(block.register_forward_pre_hook(hooks.before))
        handles.append(block.register_forward_hook(hooks.after, always_call=True))
    return handles


def hold(blocks: Iterable[nn.Module], dtype: torch.dtype | None = None) -> None:
    """Quantize all blocks' layers now; their forwards use that until `release`.

    Call it before the forward and `release` behind the backward; weights must not change between.

    Args:
        blocks: decoder layers.
        dtype: what the quantized weights are cast to, that of autocast; None: the weights' own.

    Raises:
        ValueError: weights that are sharded (FSDP2): a whole model of them is what sharding avoids.
    """
    for block in blocks:
        layers = _dense(block)
        if any(isinstance(layer.weight, DTensor) for layer in layers):
            raise ValueError(
                "hold: weights must be whole on every rank, got sharded ones (hold_quantized is "
                "for one GPU or DDP)"
            )
        _quantize(layers, dtype)
        for layer in layers:
            layer.held = True


def release(blocks: Iterable[nn.Module]) -> None:
    """Forget what `hold` made."""
    for block in blocks:
        for layer in _dense(block):
            layer.ahead, layer.held = None, False


def size_made(blocks: Iterable[nn.Module], dtype: torch.dtype | None = None) -> int:
    """Bytes that `hold` takes."""
    layers = [layer for block in blocks for layer in _dense(block)]
    return sum(layer.weight.numel() * (dtype or layer.weight.dtype).itemsize for layer in layers)


_INSIDE = "_gradient_checkpointing_func"  # of a block, set when checkpointing is turned on
_FORWARD_ALONE = "__init_subclass__" in vars(GradientCheckpointingLayer)  # what is checkpointed


class _Hooks:
    """Of one block: what was quantized before it ran is forgotten behind it."""

    def __init__(self) -> None:
        self._ahead: list[FakeQuantLinear] = []

    def before(self, block: nn.Module, _: Any) -> None:
        if _FORWARD_ALONE and getattr(block, "gradient_checkpointing", False) and block.training:
            checkpoint: Any = getattr(block, _INSIDE)
            if not isinstance(checkpoint, _Inside):
                setattr(block, _INSIDE, _Inside(checkpoint, block, self))
            if torch.is_grad_enabled():
                return
        self.quantize(block)

    def quantize(self, block: nn.Module) -> None:
        """Quantize what is not held."""
        layers = [layer for layer in _dense(block) if not layer.held]
        self._ahead = [layer for layer in layers if not isinstance(layer.weight, DTensor)]
        device = self._ahead[0].weight.device.type if self._ahead else "cpu"
        autocast = torch.is_autocast_enabled(device)
        _quantize(self._ahead, torch.get_autocast_dtype(device) if autocast else None)

    def after(self, *_: Any) -> None:
        for layer in self._ahead:
            layer.ahead = None
        self._ahead = []


class _Inside:
    """Checkpoints a block's forward together with the quantizing before it."""

    def __init__(self, checkpoint: Callable[..., Any], block: nn.Module, hooks: _Hooks) -> None:
        self._checkpoint, self._block, self._hooks = checkpoint, block, hooks

    def __call__(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self._checkpoint(partial(self._run, forward), *args, **kwargs)

    def _run(self, forward: Callable[..., Any], *args: Any) -> Any:
        self._hooks.quantize(self._block)
        try:
            return forward(*args)
        finally:
            self._hooks.after()


def _dense(block: nn.Module) -> list[FakeQuantLinear]:
    """Looked for each time: layers are replaced when a model is packed."""
    found = (m for m in block.modules() if isinstance(m, FakeQuantLinear))
    return [layer for layer in found if layer.product == "dense"]


def _quantize(layers: list[FakeQuantLinear], dtype: torch.dtype | None) -> None:
    """Sets `ahead` of layers, a call for all of one kind."""
    kinds: dict[tuple[Any, ...], list[FakeQuantLinear]] = {}
    for layer in layers:
        weight = layer.weight
        kind = (layer.bits, layer.group_size, layer.scale_dtype, weight.dtype, weight.device)
        kinds.setdefault(kind, []).append(layer)
    for (bits, group_size, scale_dtype, weight_dtype, _), alike in kinds.items():
        made: list[Tensor] = fake_quant_many(
            [layer.weight for layer in alike],
            [layer.log_scale for layer in alike],
            bits=bits,
            group_size=group_size,
            scale_dtype=scale_dtype,
            dtype=dtype if weight_dtype == torch.float32 else None,
        )
        for layer, quantized in zip(alike, made, strict=True):
            layer.ahead = quantized if dtype is None else quantized.to(dtype)
