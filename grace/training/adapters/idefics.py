"""Idefics3 and SmolVLM: tiles of one size, shuffled from pixels into channels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from grace.training.adapters.base import (
    Adapter,
    HiddenStates,
    VisualTokens,
    equal_images,
    flat_index,
)


class IdeficsAdapter(Adapter):
    """Idefics3, SmolVLM: patches / scale_factor² tokens a tile (or frame), each an image here.

    A batch's `pixel_values` [B, tiles, …] are padded with tiles of zeros that have no tokens, so
    the tokens alone tell the tiles.
    """

    language_part = "text_model"
    vision_parts = ("vision_model",)
    projector_parts = ("connector",)

    def visual_tokens(self, batch: Mapping[str, Any]) -> VisualTokens | None:
        """By the tokens themselves: tiles stand between marks, one after another."""
        if batch.get("pixel_values") is None:
            return None
        vision = self.config.vision_config
        each = (vision.image_size // vision.patch_size) ** 2 // self.config.scale_factor**2
        return equal_images(flat_index(batch["input_ids"], self.config.image_token_id), each)

    def blank_image(self, device: torch.device) -> dict[str, Tensor]:
        """One row of one tile, white: tiles of zeros are padding and would be left out."""
        vision = self.config.vision_config
        shape = (1, 1, vision.num_channels, vision.image_size, vision.image_size)
        return {"pixel_values": torch.ones(shape, device=device)}

    @contextmanager
    def capture(self, layer: int) -> Iterator[HiddenStates]:
        """As every family's; and what the connector gives has the embeddings' dtype, which
        transformers needs and autocast over fp32 weights would change."""

        def as_embedded(module: nn.Module, _: Any, output: Tensor) -> Tensor:
            return output.to(next(module.parameters()).dtype)

        hook = self.base.connector.register_forward_hook(as_embedded)
        try:
            with super().capture(layer) as states:
                yield states
        finally:
            hook.remove()
