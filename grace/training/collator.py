"""Samples of a `ConversationDataset` as one batch: a row each, or several in a row."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from grace.training.sequence_packing import Positions
from grace.training.step import IGNORE, TEACHER_LAST, TEACHER_LAYER

# Joined along their first dimension: an entry an image, a video or a patch, not a token.
_JOINED = (
    "pixel_values",
    "pixel_values_videos",
    "second_per_grid_ts",
    TEACHER_LAST,
    TEACHER_LAYER,
)


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
        return {name: self._join(name, found) for name, found in _gather(rows).items()}

    def _join(self, name: str, tensors: list[Tensor]) -> Tensor:
        if name == "pixel_attention_mask" or (name == "pixel_values" and tensors[0].dim() == 5):
            return torch.cat(_same_tiles(tensors))
        if tensors[0].dim() == 0:
            return torch.stack(tensors)
        if _is_joined(name):
            return torch.cat(tensors)
        return pad_sequence(tensors, batch_first=True, padding_value=self.fill.get(name, 0))


def _same_tiles(tensors: list[Tensor]) -> list[Tensor]:
    """Of Idefics3 and SmolVLM, each [1, tiles, …]: as many tiles each, padded by zeros."""
    most = max(tensor.shape[1] for tensor in tensors)
    paddings = ((0, 0) * (t.dim() - 2) + (0, most - t.shape[1]) for t in tensors)
    return [
        functional.pad(tensor, padding) for tensor, padding in zip(tensors, paddings, strict=True)
    ]


class PackedCollator(Collator):
    """Packs, each a list of samples, as rows without an attention mask.

    `input_ids`, `labels` are [B, S] and `position_ids` [B, S] or [4, B, S]: a row is a pack, its
    samples one behind the other, the rest of a shorter row one more sample of padding. No label is
    left on the first token of a sample: the token before it belongs to another. A batch of one
    pack has no padding.

    Args:
        processor: as of `Collator`.
        config: the model's, for its positions.
        flatten: make one row of all packs. Flash attention tells samples apart only in a batch of
            one row; other implementations make a mask of a row's length squared.
    """

    def __init__(self, processor: Any, config: Any, *, flatten: bool = False) -> None:
        super().__init__(processor)
        self.positions, self.flatten = Positions(config), flatten

    def __call__(self, packs: Sequence[Any]) -> dict[str, Tensor]:
        """The batch of `packs`; a sample by itself is a pack too."""
        rows = [pack if isinstance(pack, list) else [pack] for pack in packs]
        if self.flatten:
            rows = [[sample for row in rows for sample in row]]
        batch = _gather(sample for row in rows for sample in row)
        batch = {name: found for name, found in batch.items() if _is_joined(name)}
        joined = {name: torch.cat(found) for name, found in batch.items()}
        every = [sample for row in rows for sample in row]
        for name in ("row_ids", "skipped"):
            if any(name in sample for sample in every):
                joined[name] = torch.stack([item[name] for item in every if name in item])
        return {**joined, **self._tokens(rows)}

    def _tokens(self, rows: list[list[dict[str, Tensor]]]) -> dict[str, Tensor]:
        ids = [torch.cat([sample["input_ids"] for sample in row]) for row in rows]
        labels = [
            torch.cat([_behind_the_first(sample["labels"]) for sample in row]) for row in rows
        ]
        places = [torch.cat([self.positions(sample) for sample in row], -1) for row in rows]
        longest = max(len(row) for row in ids)
        places = [_pad_positions(place, longest) for place in places]
        return {
            "input_ids": self._join("input_ids", ids),
            "labels": self._join("labels", labels),
            "position_ids": torch.stack(places, dim=places[0].dim() - 1),
        }


def _gather(samples: Iterable[dict[str, Tensor]]) -> dict[str, list[Tensor]]:
    tensors: dict[str, list[Tensor]] = {}
    for sample in samples:
        for name, tensor in sample.items():
            tensors.setdefault(name, []).append(tensor)
    return tensors


def _is_joined(name: str) -> bool:
    return name in _JOINED or name.endswith("_grid_thw")


def _behind_the_first(labels: Tensor) -> Tensor:
    return torch.cat([labels.new_full((1,), IGNORE), labels[1:]])


def _pad_positions(positions: Tensor, length: int) -> Tensor:
    """Positions [..., S] up to `length`, where the rest begins anew."""
    rest = torch.arange(length - positions.shape[-1]).expand(*positions.shape[:-1], -1)
    return torch.cat([positions, rest], -1)
