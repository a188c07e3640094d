"""Families whose images all take the same number of tokens: LLaVA-1.5, InternVL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from grace.training.adapters.base import Adapter, VisualTokens, equal_images, flat_index


class LlavaAdapter(Adapter):
    """LLaVA-1.5: as many tokens an image as its vision tower has patches.

    Raises:
        ValueError: a vision tower whose token count goes with the size of the image (Pixtral).
    """

    vision_parts = ("vision_tower",)
    projector_parts = ("multi_modal_projector",)

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        tower = self.config.vision_config.model_type
        if tower == "pixtral":
            raise ValueError(
                "GraceTrainer: a llava model must have a vision tower with one number of tokens an "
                f"image (CLIP, SigLIP), got {tower!r}"
            )

    def visual_tokens(self, batch: Mapping[str, Any]) -> VisualTokens | None:
        """By `pixel_values`, [images, …]."""
        pixels = batch.get("pixel_values")
        if pixels is None:
            return None
        index = flat_index(batch["input_ids"], self.config.image_token_id)
        return equal_images(index, index.numel() // max(1, pixels.shape[0]))

    def blank_image(self, device: torch.device) -> dict[str, Tensor]:
        """Of the size that the vision tower takes."""
        vision = self.config.vision_config
        shape = (1, vision.num_channels, vision.image_size, vision.image_size)
        return {"pixel_values": torch.zeros(shape, device=device)}


class InternVLAdapter(Adapter):
    """InternVL: `image_seq_length` tokens a tile; each tile counts as an image of its own."""

    vision_parts = ("vision_tower",)
    projector_parts = ("multi_modal_projector",)

    def visual_tokens(self, batch: Mapping[str, Any]) -> VisualTokens | None:
        """By the tokens themselves: tiles follow each other."""
        if batch.get("pixel_values") is None:
            return None
        index = flat_index(batch["input_ids"], self.config.image_token_id)
        return equal_images(index, self.config.image_seq_length)

    def blank_image(self, device: torch.device) -> dict[str, Tensor]:
        """One tile."""
        vision = self.config.vision_config
        shape = (1, vision.num_channels, *vision.image_size)
        return {"pixel_values": torch.zeros(shape, device=device)}
