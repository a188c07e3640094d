"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL: images of any size, told by their grids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from grace.training.adapters.base import Adapter, VisualTokens, flat_index


class QwenAdapter(Adapter):
    """Qwen2-VL, Qwen2.5-VL, Qwen3-VL: a grid (t, h, w) an image or video, merged m × m."""

    vision_parts = ("visual",)
    projector_parts = ("visual.merger", "visual.deepstack_merger_list")

    def visual_tokens(self, batch: Mapping[str, Any]) -> VisualTokens | None:
        """By the grids: all images, then all videos."""
        config = self.config
        kinds = {"image_grid_thw": config.image_token_id, "video_grid_thw": config.video_token_id}
        merge = config.vision_config.spatial_merge_size**2
        index, lengths = [], []
        for name, token in kinds.items():
            grid = batch.get(name)
            if grid is not None and len(grid):
                index.append(flat_index(batch["input_ids"], token))
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
