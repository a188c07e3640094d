"""Rows of a `ConversationDataset` as one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from grace.training.step import IGNORE, TEACHER_LAST, TEACHER_LAYER

_JOINED = ("pixel_values", "pixel_values_videos", TEACHER_LAST, TEACHER_LAYER)


class Collator:
    """Pads what has one entry a token, on the right; joins pixels and grids along their first
    dimension, behind padding tiles of zeros where a family has tiles a row; stacks single numbers.

    Args:
        processor: its tokenizer's padding token fills `input_ids` (the end token where there is
            none), -100 fills labels, 0 everything else.
    """

    def __init__(self, processor: Any) -> None:
        pad = processor.tokenizer.pad_token_id
        self.fill = {"input_ids": processor.tokenizer.eos_token_id if pad is None else pad}
        self.fill["labels"] = IGNORE

    def __call__(self, rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The batch of `rows`; what only some rows have (pixels) is joined over those."""
        tensors: dict[str, list[Tensor]] = {}
        for row in rows:
            for name, tensor in row.items():
                tensors.setdefault(name, []).append(tensor)
        return {name: self._join(name, found) for name, found in tensors.items()}

    def _join(self, name: str, tensors: list[Tensor]) -> Tensor:
        if name == "pixel_attention_mask" or (name == "pixel_values" and tensors[0].dim() == 5):
            return torch.cat(_same_tiles(tensors))
        if tensors[0].dim() == 0:
            return torch.stack(tensors)
        if name in _JOINED or name.endswith("_grid_thw"):
            return torch.cat(tensors)
        return pad_sequence(tensors, batch_first=True, padding_value=self.fill.get(name, 0))


def _same_tiles(tensors: list[Tensor]) -> list[Tensor]:
    """Of Idefics3 and SmolVLM, each [1, tiles, …]: as many tiles each, padded by zeros."""
    most = max(tensor.shape[1] for tensor in tensors)
    paddings = ((0, 0) * (t.dim() - 2) + (0, most - t.shape[1]) for t in tensors)
    return [
        functional.pad(tensor, padding) for tensor, padding in zip(tensors, paddings, strict=True)
    ]
