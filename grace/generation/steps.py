"""A decode step: as transformers makes it, or on static buffers, where a CUDA graph can hold it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grace.generation.cache import SharedCache
from grace.generation.graphs import captured
from grace.generation.names import CACHE

logger = logging.getLogger(__name__)

MOST_EOS = 16  # tokens that can end an answer in a graph
# What the position ids were made of; a model that is given them does not look at it.
_SPENT = ("image_grid_thw", "video_grid_thw", "mm_token_type_ids", "second_per_grid_ts")


class Steps:
    """Prompt and answer of a batch, and what the host is told of them.

    Attributes:
        ids: int64 [batch, width]: prompt and answer.
        unfinished: int64 [batch]: 1 for a row that goes on.
        report: int64 [batch + 1], see `Reports`.
        logits: float32 [batch, vocabulary] behind the last token.
    """

    logits: Tensor

    def __init__(self, batch: int, width: int, device: torch.device) -> None:
        self.ids = torch.zeros(batch, width, dtype=torch.int64, device=device)
        self.unfinished = torch.ones(batch, dtype=torch.int64, device=device)
        self.report = torch.zeros(batch + 1, dtype=torch.int64, device=device)

    def begin(self, ids: Tensor) -> None:
        """The prompt [rows, tokens] is through the model: the first token comes next."""
        rows, count = ids.shape
        self.ids[:rows, :count].copy_(ids)
        self.unfinished.zero_()
        self.unfinished[:rows].fill_(1)

    def tell(self, tokens: Tensor) -> None:
        """Makes the report on the rows' new tokens."""
        self.report[: len(tokens)].copy_(tokens)
        self.report[-1:].copy_(self.unfinished.amax(dim=0, keepdim=True))


class PlainSteps(Steps):
    """Decode steps as `model.generate` makes them, with inputs made anew for each."""

    def __init__(self, model: Any, ids: Tensor, width: int, arguments: dict[str, Any]) -> None:
        super().__init__(len(ids), width, ids.device)
        self._model, self._arguments = model, arguments
        self.begin(ids)

    def run(self, count: int) -> None:
        """One step behind the first ``count`` tokens; leaves `logits`."""
        cache = self._arguments[CACHE]
        inputs = self._model.prepare_inputs_for_generation(
            self.ids[:, :count], next_sequence_length=1, **self._arguments
        )
        outputs = self._model(**inputs, return_dict=True)
        if isinstance(cache, SharedCache):
            cache.position.add_(1)
        self._arguments = self._model._update_model_kwargs_for_generation(outputs, self._arguments)
        self.logits = outputs.logits[:, -1].float()


class StaticSteps(Steps):
    """The decode step of one size of batch and cache, on buffers that never move.

    Everything that changes from step to step lies in device memory and is moved on by the step
    itself: position, position ids, mask, tokens, who is done. The host does not know where the
    device is, so that a step can be captured once and replayed.

    Args:
        model: of transformers.
        cache: of the size.
        forward: logits of one token a row (`fast.decode_forward`).
        added_masks: whether masks become what attention adds where that is sdpa, which would make
            it of a bool one in every layer; False for layers that take them as they are.
    """

    def __init__(
        self,
        model: Any,
        cache: SharedCache,
        forward: Callable[..., Tensor],
        added_masks: bool = True,
    ) -> None:
        device = cache.position.device
        super().__init__(cache.batch, cache.length + 1, device)
        self.model, self.cache, self._forward = model, cache, forward
        self._added_masks = added_masks
        self.eos = torch.full((MOST_EOS,), -1, dtype=torch.int64, device=device)
        self.pad = torch.zeros((), dtype=torch.int64, device=device)
        self._inputs: dict[str, Any] = {}
        self._graphs: dict[bool, _Graph] = {}

    def start(self, ids: Tensor, eos: Tensor | None, pad: Tensor | None) -> None:
        """The prompt [rows, tokens] is through the model; ``eos`` [≤ `MOST_EOS`] end a row."""
        self.begin(ids)
        self.eos.fill_(-1)
        if eos is not None:
            self.eos[: len(eos)].copy_(eos)
        self.pad.fill_(0 if pad is None else pad)
        self.cache.position.fill_(ids.shape[1])
        self.cache.filling = False

    def fits(self, inputs: Mapping[str, Any]) -> str:
        """Why a step with these inputs of the model cannot be captured; empty where it can."""
        known = {"input_ids", "position_ids", "attention_mask", *_SPENT}
        other = [k for k, v in inputs.items() if isinstance(v, Tensor) and k not in known]
        if other or inputs.get("position_ids") is None:
            return f"its decode step takes {other[0] if other else 'no position_ids'}"
        masks = list(_masks(inputs))
        shape = (1, 1, self.cache.length)
        if not masks or any(mask is None or mask.shape[1:] != shape for mask in masks):
            return "its attention takes no mask [rows, 1, 1, keys]"
        return ""

    def load(self, inputs: Mapping[str, Any], rows: int) -> None:
        """Takes what transformers would give the model for the first step, at its position.

        A batch smaller than this one's is filled up with copies of its first row.
        """
        batch, masks = self.cache.batch, inputs["attention_mask"]
        position_ids = _filled(inputs["position_ids"], -2, rows, batch) - 1
        if isinstance(masks, Mapping):
            masks = {key: self._mask(_filled(mask, 0, rows, batch)) for key, mask in masks.items()}
        else:
            masks = self._mask(_filled(masks, 0, rows, batch))
        fresh = {"position_ids": position_ids, "attention_mask": masks}
        if _like(self._inputs, fresh):
            for held, new in zip(_tensors(self._inputs), _tensors(fresh), strict=True):
                held.copy_(new)
        else:
            self._inputs = fresh
            self._graphs.clear()

    def _mask(self, mask: Tensor) -> Tensor:
        """The mask as attention takes it."""
        text = self.model.config.get_text_config(decoder=True)
        adds = self._added_masks and text._attn_implementation == "sdpa"
        if mask.dtype != torch.bool or not adds:
            return mask
        added = torch.zeros(mask.shape, dtype=self.model.dtype, device=mask.device)
        return added.masked_fill_(~mask, float("-inf"))

    def run(self, choose: bool) -> None:
        """One step: reads the token at the position, moves on, leaves `logits`.

        Args:
            choose: take the likeliest token, too (`choose`), in the same graph.
        """
        held = self._graphs.get(choose)
        if held is None:
            self._step(choose)
            return
        held.graph.replay()
        self.logits = held.logits

    def choose(self) -> None:
        """Greedy: the likeliest token of every row at the position, `pad` for rows that ended."""
        tokens = self.logits.argmax(dim=-1)
        self.take(torch.where(self.unfinished == 1, tokens, self.pad))

    def take(self, tokens: Tensor) -> None:
        """Writes tokens [batch] at the position, notes which rows ended, and reports."""
        self.ids.index_copy_(1, self.cache.position, tokens[:, None])
        going_on = (tokens[:, None] != self.eos).all(dim=1)
        self.unfinished.mul_(going_on)
        self.tell(tokens)

    def _step(self, choose: bool) -> None:
        position = self.cache.position
        self._inputs["position_ids"].add_(1)
        for mask in _masks(self._inputs):
            mask.index_fill_(-1, position, True if mask.dtype == torch.bool else 0.0)
        token = self.ids.index_select(1, position)
        given = {CACHE: self.cache, **self._inputs}
        self.logits = self._forward(input_ids=token, **given)
        position.add_(1)
        if choose:
            self.choose()

    def capture(self, choose: bool, pool: Any) -> None:
        """Captures the step behind `load`, unless that is done; buffers stay as they are.

        The steps that go before a capture write keys and values at positions that the first real
        steps write again before they are read.
        """
        version = self.cache.storage.version
        self._graphs = {k: held for k, held in self._graphs.items() if held.version == version}
        if choose in self._graphs:
            return
        kept = [(tensor, tensor.clone()) for tensor in self._state()]
        device = self.ids.device
        graph = captured(lambda: self._step(choose), device, pool, lambda: _restore(kept))
        self._graphs[choose] = _Graph(graph, self.logits, version)
        size = f"{self.cache.batch} rows and {self.cache.length} tokens"
        logger.info("captured the decode step of %s", size)

    def _state(self) -> list[Tensor]:
        own = [self.ids, self.unfinished, self.report, self.cache.position]
        return own + list(_tensors(self._inputs))


@dataclass(frozen=True)
class _Graph:
    graph: Any
    logits: Tensor  # in the graph's memory
    version: int  # of the storage that it works on


def _restore(kept: list[tuple[Tensor, Tensor]]) -> None:
    for tensor, was in kept:
        tensor.copy_(was)


def _masks(inputs: Mapping[str, Any]) -> Iterator[Any]:
    masks = inputs.get("attention_mask")
    yield from masks.values() if isinstance(masks, Mapping) else [masks]


def _tensors(inputs: Mapping[str, Any]) -> Iterator[Tensor]:
    yield inputs["position_ids"]
    yield from _masks(inputs)


def _like(held: Mapping[str, Any], fresh: Mapping[str, Any]) -> bool:
    """Whether the buffers can take what came."""
    if not held or type(held["attention_mask"]) is not type(fresh["attention_mask"]):
        return False
    pairs = (
        [(a.shape, a.dtype) for a in _tensors(held)],
        [(a.shape, a.dtype) for a in _tensors(fresh)],
    )
    return pairs[0] == pairs[1]


def _filled(tensor: Tensor, dim: int, rows: int, batch: int) -> Tensor:
    """A copy with ``batch`` rows along ``dim``: those that came, and the first one again."""
    if tensor.shape[dim] == 1 and rows > 1:  # said once for all rows
        return tensor.expand([*tensor.shape[:dim], batch, *tensor.shape[dim:][1:]]).clone()
    first = tensor.narrow(dim, 0, 1)
    return torch.cat([tensor, *[first] * (batch - rows)], dim=dim).clone()
