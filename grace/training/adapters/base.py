"""What every family of vision-language models has: an `Adapter` names the parts of a model of
transformers (decoder layers, head, vision tower, projector) and tells which tokens of a batch are
visual and where an image ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class VisualTokens:
    """Visual tokens of a batch: `index` int64 [T] into its B*S tokens, and where images end,
    `cu_seqlens` int32 [images + 1]."""

    index: Tensor
    cu_seqlens: Tensor

    def images(self, min_tokens: int) -> Tensor:
        """How many images have at least `min_tokens` tokens, int64 []."""
        return (self.cu_seqlens.diff() >= min_tokens).sum()


class HiddenStates:
    """What one forward left behind: the normed last hidden states and those of one layer.

    `heads` are the weights that the last ones are multiplied by, the student's [V, d] and the
    teacher's where it distils; whole, whoever shards them.
    """

    heads: tuple[Tensor, Tensor | None]

    def __init__(self) -> None:
        self.last: Tensor | None = None
        self.layer: Tensor | None = None

    def rows(self, name: str, index: Tensor) -> Tensor:
        """Rows `index` of the hidden states `name`, [n, d], with the batch's rows flattened."""
        hidden = getattr(self, name)
        return hidden.reshape(-1, hidden.shape[-1]).index_select(0, index)


class Adapter:
    """A `…ForConditionalGeneration` model of transformers: `model.model`, `model.lm_head`.

    A family's subclass names its parts, below `model.model`, and has `visual_tokens`.

    Args:
        model: the model; ValueError where it lacks a part.

    Attributes:
        language_part: the decoder, with its `layers`.
        vision_parts: the vision tower.
        projector_parts: what lies between it and the decoder, be it inside the tower; a part that
            only some models of the family have may be absent.
    """

    language_part = "language_model"
    vision_parts: tuple[str, ...] = ()
    projector_parts: tuple[str, ...] = ()

    def __init__(self, model: nn.Module) -> None:
        self.config: Any = model.config
        self.base = _part(model, "model")
        self.language_model = _part(self.base, self.language_part)
        self.layers: nn.ModuleList = _part(self.language_model, "layers")
        self._head = _part(model, "lm_head")
        if self._head.bias is not None:
            raise ValueError("GraceTrainer: model's lm_head must have no bias, got one")

    @property
    def head(self) -> Tensor:
        """Weight of the language-model head, [V, d]."""
        return self._head.weight

    def vision_modules(self) -> list[nn.Module]:
        """Modules of the vision tower; a projector may lie inside one."""
        return [_part(self.base, name) for name in self.vision_parts]

    def projector_modules(self) -> list[nn.Module]:
        """Modules between the vision tower and the decoder (merger, connector)."""
        found = (_find(self.base, name) for name in self.projector_parts)
        return [module for module in found if module is not None]

    def freeze_vision(self) -> None:
        """The vision tower keeps its weights in training; the projector learns."""
        for module in self.vision_modules():
            module.requires_grad_(False)
        for module in self.projector_modules():
            module.requires_grad_(True)

    def layer_class(self) -> str:
        """Name of the decoder layers' class."""
        return type(self.layers[0]).__name__

    def visual_tokens(self, batch: Mapping[str, Any]) -> VisualTokens | None:
        """The visual tokens of `batch`, image after image; None for a batch without any."""
        raise NotImplementedError

    def blank_image(self, device: torch.device) -> dict[str, Tensor]:
        """The smallest black image, as arguments of the model's `get_image_features`."""
        raise NotImplementedError

    @contextmanager
    def vision_always(self, batch: Mapping[str, Any], needed: bool) -> Iterator[None]:
        """Within the context, the vision tower runs even for a batch without pixels: on a blank
        image, whose features count zero times.

        Every rank then has the same parameters in its graph and gathers the same shards in the
        same order; a rank with nothing but text would let the others wait for ever.

        Args:
            batch: inputs of the model.
            needed: whether there are other ranks; False does nothing.
        """
        if not needed or any(
            batch.get(name) is not None for name in ("pixel_values", "pixel_values_videos")
        ):
            yield
            return

        def add_nothing(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            embeds = kwargs["inputs_embeds"]
            found = self.base.get_image_features(
                **self.blank_image(embeds.device), return_dict=True
            )
            deep = getattr(found, "deepstack_features", None) or ()
            nothing = 0 * torch.stack([*map(_sum, found.pooler_output), *map(_sum, deep)]).sum()
            return args, {**kwargs, "inputs_embeds": embeds + nothing.to(embeds.dtype)}

        hook = self.language_model.register_forward_pre_hook(add_nothing, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    @contextmanager
    def capture(self, layer: int) -> Iterator[HiddenStates]:
        """Within the context, a forward of the model leaves its hidden states in what is yielded.

        Args:
            layer: which decoder layer's output to keep, -2 for the one before the last. It is
                read where the next layer takes it in, behind whatever a family adds in between.
        """
        states = HiddenStates()

        def keep_layer(_: nn.Module, args: tuple, kwargs: dict) -> None:
            states.layer = args[0] if args else kwargs["hidden_states"]

        def keep_last(_: nn.Module, __: tuple, output: Any) -> None:
            states.last = output[0]

        next_layer = self.layers[layer + 1]
        hooks = [
            next_layer.register_forward_pre_hook(keep_layer, with_kwargs=True),
            self.language_model.register_forward_hook(keep_last),
        ]
        try:
            yield states
        finally:
            for hook in hooks:
                hook.remove()


def flat_index(input_ids: Tensor, token: int) -> Tensor:
    """Where `token` stands in `input_ids` [B, S]: int64 [T] into its B*S tokens, in order."""
    return (input_ids.reshape(-1) == token).nonzero().squeeze(1)


def equal_images(index: Tensor, each: int) -> VisualTokens:
    """Visual tokens of images that have `each` tokens, one after another."""
    images = index.numel() // max(1, each)
    bounds = torch.arange(images + 1, dtype=torch.int32, device=index.device)
    return VisualTokens(index, bounds * each)


def _find(module: nn.Module, name: str) -> nn.Module | None:
    found: Any = module
    for step in name.split("."):
        found = getattr(found, step, None)
    return found


def _part(module: nn.Module, name: str) -> Any:
    part = _find(module, name)
    if part is None:
        found = type(module).__name__
        raise ValueError(f"GraceTrainer: model must have a part {name!r}, got {found}")
    return part


def _sum(features: Any) -> Tensor:
    """Of a tensor, or of all that a tuple or list holds."""
    if isinstance(features, Tensor):
        return features.float().sum()
    return torch.stack([_sum(feature) for feature in features]).sum()
