"""Idefics3 and SmolVLM: tiles of one size, shuffled from pixels into channels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from grace.training.adapters.base import Adapter, VisualTokens, equal_images, flat_index


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
