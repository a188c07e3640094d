"""How many tokens a row has, without reading it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

_SAMPLE = 128  # rows that are encoded to fit the model
_DIGITS = 3  # of a coefficient: what rounding two processors disagree in is far below


@dataclass(frozen=True)
class LengthModel:
    """tokens ≈ bytes · text + images · a + videos · b + turns · c, fitted to a few rows.

    An estimate: the tokens of an image vary with its size where a processor keeps it. Packs and
    groups by it are good to what the estimate is good to; nothing is cut by it.
    """

    text: float
    images: float
    videos: float
    turns: float

    def __call__(self, facts: np.ndarray) -> np.ndarray:
        """Tokens of rows with these `row_index.FACTS`, int32 [n], at least 1."""
        tokens = sum(getattr(self, name) * facts[name].astype(np.float64) for name in _NAMES)
        return np.maximum(1, np.rint(tokens)).astype(np.int32)

    @classmethod
    def fit(cls, dataset: Any) -> LengthModel:
        """By least squares over up to 128 rows of a `ConversationDataset`, evenly spread.

        Rows that cannot be used are passed over where the data set skips them. A kind that none of
        the rows has counts as nothing.
        """
        items = np.unique(np.linspace(0, len(dataset) - 1, _SAMPLE).astype(int))
        found = [(dataset.read(int(item)), int(item)) for item in items]
        used = [(row["input_ids"].numel(), item) for row, item in found if row is not None]
        if not used:
            return cls(text=0.25, images=0.0, videos=0.0, turns=0.0)
        tokens, chosen = (np.array(column) for column in zip(*used, strict=True))
        facts = dataset.facts_of_items(chosen)
        table = np.stack([facts[name].astype(np.float64) for name in _NAMES], 1)
        weights = np.linalg.lstsq(table, tokens.astype(np.float64), rcond=None)[0]
        return cls(*(float(f"{max(0.0, weight):.{_DIGITS}g}") for weight in weights))


_NAMES = ("text", "images", "videos", "turns")
