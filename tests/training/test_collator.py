"""Batches of families whose rows have tiles."""

from __future__ import annotations

from typing import Any

import torch

from grace.training import Collator


def test_tiles_are_padded_by_tiles_of_zeros(processor: Any) -> None:
    rows = [
        {
            "input_ids": torch.arange(3),
            "pixel_values": torch.ones(1, tiles, 3, 4, 4),
            "pixel_attention_mask": torch.ones(1, tiles, 4, 4, dtype=torch.long),
        }
        for tiles in (1, 3)
    ]
    batch = Collator(processor)(rows)
    assert batch["pixel_values"].shape == (2, 3, 3, 4, 4)
    assert batch["pixel_values"].sum((2, 3, 4)).tolist() == [[48, 0, 0], [48, 48, 48]]
    assert batch["pixel_attention_mask"].sum((2, 3)).tolist() == [[16, 0, 0], [16, 16, 16]]
