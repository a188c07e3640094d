"""What differs between families of vision-language models, for the trainer.

An `Adapter` names the parts of a transformers model (decoder layers, head, vision tower) and tells
which tokens of a batch are visual and where an image ends. A family needs a subclass only where it
counts its visual tokens in another way.
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
    """A `…ForConditionalGeneration` model of transformers: `model.model.language_model`, a head.

    Args:
        model: the model; ValueError where it lacks a part.
    """

    vision_parts: tuple[str, ...] = ()

    def __init__(self, model: nn.Module) -> None:
        self.config: Any = model.config
        self.base = _part(model, "model")
        self.language_model = _part(self.base, "language_model")
        self.layers: nn.ModuleList = _part(self.language_model, "layers")
        self._head = _part(model, "lm_head")
        if self._head.bias is not None:
            raise ValueError("GraceTrainer: model's lm_head must have no bias, got one")

    @property
    def head(self) -> Tensor:
        """Weight of the language-model head, [V, d]."""
        return self._head.weight

    def vision_modules(self) -> list[nn.Module]:
        """Modules of the vision tower, without the projector between it and the decoder."""
        return [_part(self.base, name) for name in self.vision_parts]

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

        Every rank then has the same parameters in its graph; a rank with nothing but text would
        let the others wait for its gradients for ever.

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
            features = [*found.pooler_output, *(getattr(found, "deepstack_features", None) or ())]
            nothing = 0 * torch.stack([feature.float().sum() for feature in features]).sum()
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


class LlavaAdapter(Adapter):
    """LLaVA: every image takes the same number of tokens."""

    vision_parts = ("vision_tower",)

    def visual_tokens(self, batch: Mapping[str, Any]) -> VisualTokens | None:
        """By `pixel_values`, [images, …]."""
        pixels = batch.get("pixel_values")
        if pixels is None:
            return None
        index = _flat_index(batch["input_ids"], self.config.image_token_id)
        each = index.numel() // pixels.shape[0]
        bounds = torch.arange(pixels.shape[0] + 1, dtype=torch.int32, device=index.device)
        return VisualTokens(index, bounds * each)

    def blank_image(self, device: torch.device) -> dict[str, Tensor]:
        """Of the size that the vision tower takes."""
        vision = self.config.vision_config
        shape = (1, vision.num_channels, vision.image_size, vision.image_size)
        return {"pixel_values": torch.zeros(shape, device=device)}


class QwenAdapter(Adapter):
    """Qwen2-VL, Qwen2.5-VL, Qwen3-VL: a grid (t, h, w) an image or video, merged m × m."""

    vision_parts = ("visual",)

    def visual_tokens(self, batch: Mapping[str, Any]) -> VisualTokens | None:
        """By the grids: all images, then all videos."""
        config = self.config
        kinds = {"image_grid_thw": config.image_token_id, "video_grid_thw": config.video_token_id}
        merge = config.vision_config.spatial_merge_size**2
        index, lengths = [], []
        for name, token in kinds.items():
            grid = batch.get(name)
            if grid is not None and len(grid):
                index.append(_flat_index(batch["input_ids"], token))
                lengths.append(grid.prod(-1) // merge)
        if not index:
            return None
        ends = torch.cat(lengths).cumsum(0)
        return VisualTokens(torch.cat(index), nn.functional.pad(ends, (1, 0)).to(torch.int32))

    def blank_image(self, device: torch.device) -> dict[str, Tensor]:
        """One token: merge × merge patches."""
        vision = self.config.vision_config
        merge = vision.spatial_merge_size
        values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        return {
            "pixel_values": torch.zeros(merge * merge, values, device=device),
            "image_grid_thw": torch.tensor([[1, merge, merge]], device=device),
        }


FAMILIES: dict[str, type[Adapter]] = {
    "llava": LlavaAdapter,
    "qwen2_vl": QwenAdapter,
    "qwen2_5_vl": QwenAdapter,
    "qwen3_vl": QwenAdapter,
}


def adapter_for(model: nn.Module) -> Adapter:
    """The adapter of a model's family, by `config.model_type`; ValueError for an unknown one."""
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if kind not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ValueError(f"GraceTrainer: model must be of a known family ({known}), got {kind!r}")
    return FAMILIES[kind](model)


def _flat_index(input_ids: Tensor, token: int) -> Tensor:
    return (input_ids.reshape(-1) == token).nonzero().squeeze(1)


def _part(module: nn.Module, name: str) -> Any:
    part = getattr(module, name, None)
    if part is None:
        found = type(module).__name__
        raise ValueError(f"GraceTrainer: model must have a part {name!r}, got {found}")
    return part
