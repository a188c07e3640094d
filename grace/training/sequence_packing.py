"""Several short samples in one row: which go together, and what they are told of their place.

Samples of a row do not see each other because their text positions begin anew. transformers makes
the mask from that, for every attention implementation, when no attention mask is given.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, insort
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from grace.training.data import SKIPPED, ConversationDataset

_WINDOW = 4096  # samples that are looked at together


def plan_packs(lengths: np.ndarray, capacity: int, seed: int) -> list[np.ndarray]:
    """Packs of items whose lengths add up to at most `capacity`; a longer item is alone.

    The items are shuffled and packed 4096 at a time, longest first, each into the pack that it
    leaves the least room in.

    Args:
        lengths: int [n].
        capacity: tokens of a pack.
        seed: of the shuffle.

    Returns:
        int64 arrays that hold every item once.
    """
    if capacity < 1:
        raise ValueError(f"plan_packs: capacity must be >= 1, got {capacity}")
    order = np.random.default_rng(seed).permutation(len(lengths))
    windows = (order[start : start + _WINDOW] for start in range(0, len(order), _WINDOW))
    return [np.array(pack) for window in windows for pack in _best_fit(window, lengths, capacity)]


def _best_fit(window: np.ndarray, lengths: np.ndarray, capacity: int) -> Iterator[list[int]]:
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, pack), sorted
    for item in window[np.argsort(-lengths[window], kind="stable")].tolist():
        length = int(lengths[item])
        place = bisect_left(room, (length, -1))
        if place == len(room):
            left, pack = max(0, capacity - length), len(packs)
            packs.append([item])
        else:
            left, pack = room.pop(place)
            left -= length
            packs[pack].append(item)
        insort(room, (left, pack))
    return iter(packs)


class PackedDataset(Dataset):
    """Packs of a `ConversationDataset`'s items; an item is a list of samples.

    Which samples go together is planned by estimated lengths (`ConversationDataset.lengths`) and
    stays so for the run; their order is the sampler's. A pack can thus be a little longer than
    `capacity`: nothing is cut or dropped for that.

    Args:
        dataset: the samples.
        capacity: tokens that a pack is filled up to.
        seed: of the plan.
    """

    def __init__(self, dataset: ConversationDataset, capacity: int, seed: int = 0) -> None:
        self.dataset, self.capacity = dataset, capacity
        lengths = dataset.lengths
        packs = plan_packs(lengths, capacity, seed)
        self.items = np.concatenate(packs)
        self.bounds = np.cumsum([0, *map(len, packs)])
        self.lengths = np.add.reduceat(lengths[self.items], self.bounds[:-1])

    @property
    def skipped(self) -> int:
        """Rows that the data set left out because of their form."""
        return self.dataset.skipped

    @property
    def fingerprint(self) -> str:
        """What tells these packs, in their order, from others."""
        digest = hashlib.sha256(self.dataset.fingerprint.encode())
        digest.update(self.items.tobytes() + self.bounds.tobytes())
        return digest.hexdigest()[:16]

    def where(self, row: int) -> str:
        """File and place in it of a row."""
        return self.dataset.where(row)

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, pack: int) -> list[dict[str, Tensor]]:
        """The pack's samples, without those that cannot be used where the data set skips them.

        Where none is left, the next pack takes the place.
        """
        skipped = 0
        for offset in range(len(self)):
            start, end = self.bounds[(pack + offset) % len(self) :][:2]
            read = [self.dataset.read(int(item)) for item in self.items[start:end]]
            found = [sample for sample in read if sample is not None]
            skipped += len(read) - len(found)
            if found:
                return [{**found[0], SKIPPED: torch.tensor(skipped)}, *found[1:]]
        raise ValueError("data: at least one row must be usable, got none")


class Positions:
    """Position ids of one sample: int64 [S], or [4, S] for a model with rotary grids (Qwen-VL).

    The four are the text position, which tells samples apart, and the temporal, vertical and
    horizontal ones that the model's own `get_rope_index` gives.

    Args:
        config: of the model.
    """

    def __init__(self, config: Any) -> None:
        from transformers import AutoModel

        kind: Any = AutoModel._model_mapping[type(config)]
        self.model: Any = None
        if hasattr(kind, "get_rope_index"):
            # The model without its parts: the function reads nothing but the configuration.
            self.model = kind.__new__(kind)
            nn.Module.__init__(self.model)
            self.model.config = config

    def __call__(self, sample: dict[str, Tensor]) -> Tensor:
        """Positions of a sample as `ConversationDataset` gives it."""
        ids = sample["input_ids"][None]
        text = torch.arange(ids.shape[1])
        if self.model is None:
            return text
        grids = {name: sample[name] for name in _GRIDS if name in sample}
        kinds = sample.get("mm_token_type_ids")
        if not grids or kinds is None:
            return text.expand(4, -1)
        rotary, _ = self.model.get_rope_index(ids, mm_token_type_ids=kinds[None], **grids)
        return torch.cat([text[None], rotary[:, 0]])


_GRIDS = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
