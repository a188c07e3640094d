"""What a language model is given for a prompt, and the static buffers that take it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grace.generation.cache import SharedCache
from grace.generation.names import CACHE

_READ = ("inputs_embeds", "position_ids", "attention_mask", CACHE)
_FEATURES = ("visual_pos_masks", "deepstack_visual_embeds")  # of Qwen3-VL's first layers
_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Prompt:
    """Arguments of a language model's forward for a prompt, by what becomes of them."""

    embeds: Tensor  # [rows, tokens, hidden], images merged in
    positions: Tensor  # int64 [rows, tokens], or [3 or 4, rows, tokens]
    mask: Tensor | None  # bool or added, [rows, 1, tokens, tokens]; None: causal
    mask_key: str | None  # where it came in a mapping
    features: tuple[Tensor, ...]  # added behind the first layers, each [places seen, hidden]
    places: Tensor | None  # bool [rows, tokens]: where features are added
    rest: tuple[tuple[str, Any], ...]  # handed on as they are

    @property
    def rows(self) -> int:
        """Of the batch."""
        return self.embeds.shape[0]

    @property
    def tokens(self) -> int:
        """Of a row, padding on its left included."""
        return self.embeds.shape[1]

    @property
    def kind(self) -> tuple[Any, ...]:
        """What prompts of one graph have in common, beside sizes."""
        mask = None if self.mask is None else self.mask.dtype
        shapes = (self.positions.shape[:-2], len(self.features))
        return mask, self.mask_key, *shapes, self.embeds.dtype, self.rest


def read(arguments: Mapping[str, Any], cache: SharedCache) -> Prompt | str:
    """The prompt in the arguments of a language model's forward, or why it is none for buffers."""
    embeds, positions = arguments.get("inputs_embeds"), arguments.get("position_ids")
    if not isinstance(embeds, Tensor) or arguments.get(CACHE) is not cache:
        return "its language model is not called with inputs_embeds and the cache"
    rows, tokens = embeds.shape[:2]
    if not isinstance(positions, Tensor) or positions.shape[-2:] not in (
        (rows, tokens),
        (1, tokens),
    ):
        return "its language model takes no position_ids [rows, tokens]"
    mask, key = arguments.get("attention_mask"), None
    if isinstance(mask, Mapping) and len(mask) == 1:
        ((key, mask),) = mask.items()
    if mask is not None and getattr(mask, "shape", None) != (rows, 1, tokens, tokens):
        return "its attention takes no mask [rows, 1, tokens, tokens]"
    rest = {k: v for k, v in arguments.items() if k not in (*_READ, *_FEATURES)}
    other = [k for k, v in rest.items() if not isinstance(v, _PLAIN)]
    if other:
        return f"its language model takes {other[0]}"
    places, features = (arguments.get(name) for name in _FEATURES)
    if (places is None) != (features is None):
        return f"its language model takes one of {' and '.join(_FEATURES)}"
    if places is not None and places.shape != (rows, tokens):
        return f"its language model takes no {_FEATURES[0]} [rows, tokens]"
    positions = positions.expand(*positions.shape[:-2], rows, tokens)
    rest_of = tuple(sorted(rest.items()))
    return Prompt(embeds, positions, mask, key, tuple(features or ()), places, rest_of)


class Buffers:
    """Prompts of up to ``cache.batch`` rows and ``length`` tokens, filled up on the right.

    Behind a prompt's tokens stands its last one again, and behind its rows its first: what is
    computed there is as finite as a longer prompt, and under causal attention nobody sees it.

    Attributes:
        real: bool [1, 1, length, 1]: places of the prompt; others are zero in the cache.
        last: int64 [1]: the prompt's last place.
        arguments: of the language model's forward.
    """

    def __init__(self, cache: SharedCache, length: int) -> None:
        device = cache.position.device
        self.cache, self.length = cache, length
        self._places = torch.arange(length, device=device).view(1, 1, -1, 1)
        self.real = torch.ones(1, 1, length, 1, dtype=torch.bool, device=device)
        self.last = torch.zeros(1, dtype=torch.int64, device=device)
        self.arguments: dict[str, Any] = {}
        self._held: dict[str, Tensor] = {}

    def load(self, prompt: Prompt) -> None:
        """Takes a prompt, always of one `Prompt.kind`; nothing of the one before stays."""
        batch, length, given = self.cache.batch, self.length, prompt.positions
        embeds = self._take("embeds", (batch, length, prompt.embeds.shape[2]), prompt.embeds)
        positions = self._take("positions", (*given.shape[:-2], batch, length), given)
        _spread(embeds, prompt.embeds, 0)
        _spread(positions, given, given.dim() - 2)
        torch.lt(self._places, prompt.tokens, out=self.real)
        self.last.fill_(prompt.tokens - 1)
        mask: Any = None if prompt.mask is None else self._mask(prompt.mask)
        features = {_FEATURES[1]: self._features(prompt)} if prompt.features else {}
        self.arguments = {
            **dict(prompt.rest),
            **features,
            "inputs_embeds": embeds,
            "position_ids": positions,
            "attention_mask": mask if prompt.mask_key is None else {prompt.mask_key: mask},
            CACHE: self.cache,
        }

    def _take(self, kind: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """A buffer, which everything is written to."""
        if kind not in self._held:
            self._held[kind] = torch.empty(shape, dtype=like.dtype, device=like.device)
        return self._held[kind]

    def _mask(self, given: Tensor) -> Tensor:
        """The prompt's mask; places behind it see themselves, so that no softmax is of nothing."""
        rows, tokens = given.shape[0], given.shape[-1]
        mask = self._take("mask", (self.cache.batch, 1, self.length, self.length), given)
        if given.dtype == torch.bool:
            mask.zero_()
        else:
            mask.fill_(torch.finfo(given.dtype).min)
        mask.diagonal(dim1=-2, dim2=-1).fill_(given.dtype == torch.bool)
        mask[:rows, :, :tokens, :tokens].copy_(given)
        mask[rows:].copy_(mask[:1])
        return mask

    def _features(self, prompt: Prompt) -> list[Tensor]:
        """What is added behind each of the first layers, at all places: mostly zero."""
        like, places = prompt.embeds, prompt.places
        assert places is not None
        shape = (len(prompt.features), self.cache.batch, self.length, like.shape[2])
        held = self._take("features", shape, like).zero_()
        for layer, feature in zip(held, prompt.features, strict=True):
            at_places = torch.zeros_like(like).masked_scatter_(places[..., None], feature.to(like))
            layer[: prompt.rows, : prompt.tokens].copy_(at_places)
        return list(held)


def _spread(into: Tensor, new: Tensor, row_dim: int) -> None:
    """``new`` [.., rows, tokens, ..] first, behind it its last token and its first row again."""
    rows, tokens = new.shape[row_dim : row_dim + 2]
    batch, length = into.shape[row_dim : row_dim + 2]
    ours = into.narrow(row_dim, 0, rows)
    ours.narrow(row_dim + 1, 0, tokens).copy_(new)
    ours.narrow(row_dim + 1, tokens, length - tokens).copy_(new.narrow(row_dim + 1, tokens - 1, 1))
    into.narrow(row_dim, rows, batch - rows).copy_(into.narrow(row_dim, 0, 1))
