"""The prompt through the language model on static buffers, where CUDA graphs can hold it."""

from __future__ import annotations

import contextlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from grace.generation import fast, prompts
from grace.generation.cache import SharedCache
from grace.generation.graphs import captured
from grace.generation.layers import replaced
from grace.generation.names import CACHE

logger = logging.getLogger(__name__)

_BUCKETS = 8  # that are kept, with their graphs
_MOST_TOKENS = 8192  # of all rows of a bucket: more of them keep a GPU busy without a graph
_POSITIONAL = "its language model is called with positional arguments"
_ADDS = "_deepstack_process"  # of a language model: adds features of images, found by a mask


class Prefill:
    """Stands in the place of a language model's forward while a prompt fills a cache.

    Images, embeddings and what merges them run as ever. What the language model is then given is
    copied into the buffers of a *bucket*: the rows of the cache, tokens up to a multiple of
    ``step``. The layers run on those, at first as they are, then as a CUDA graph: both give the
    same. Prompts that do not fit run as they are, and the log (WARNING) says why, once; so do those
    of more than 8192 tokens in all rows of a bucket, for which launches matter little.

    Args:
        model: of transformers, with static decode steps (`checks.why_plain`).
        step: lengths of buckets are its multiples.
    """

    def __init__(self, model: Any, step: int) -> None:
        self._model, self._step = model, step
        self._decoder: nn.Module = model.get_decoder()
        self._buckets: OrderedDict[Any, _Bucket] = OrderedDict()
        self._last: _Bucket | None = None
        self._told: set[str] = set()

    @contextlib.contextmanager
    def filling(self, cache: SharedCache) -> Iterator[None]:
        """Inside, prompts of the model that fill this cache go through buckets."""
        self._last, forward = None, self._decoder.forward

        def through(*args: Any, **arguments: Any) -> Any:
            prompt = prompts.read(arguments, cache) if not args else _POSITIONAL
            if isinstance(prompt, str):
                self._tell(prompt)
            elif self._length(prompt, cache) * cache.batch <= _MOST_TOKENS:
                return self._run(prompt, cache, forward)
            return forward(*args, **arguments)

        with replaced([(self._decoder, "forward", through)]):
            yield

    def _run(
        self, prompt: prompts.Prompt, cache: SharedCache, forward: Callable[..., Any]
    ) -> BaseModelOutputWithPast:
        """Hidden states [rows, 1, hidden] of the last token, which is all that the head needs."""
        bucket = self._last = self._bucket(prompt, cache)
        bucket.buffers.load(prompt)
        if bucket.is_captured():
            bucket.graph.replay()
        else:
            with self._as_captured(bucket):
                bucket.step(forward)
        output: dict[str, Any] = {"last_hidden_state": bucket.hidden[: prompt.rows], CACHE: cache}
        return BaseModelOutputWithPast(**output)

    def _length(self, prompt: prompts.Prompt, cache: SharedCache) -> int:
        return min(-(-prompt.tokens // self._step) * self._step, cache.length)

    def _bucket(self, prompt: prompts.Prompt, cache: SharedCache) -> _Bucket:
        length = self._length(prompt, cache)
        key = (cache, length, prompt.kind)
        if key not in self._buckets:
            self._buckets[key] = _Bucket(prompts.Buffers(cache, length))
            if len(self._buckets) > _BUCKETS:
                self._buckets.popitem(last=False)
        self._buckets.move_to_end(key)
        return self._buckets[key]

    def capture(self, pool: Any) -> None:
        """Captures the bucket that the last prompt went through, unless that is done.

        What runs before a capture computes that prompt again, from the same buffers: the cache
        holds the same keys and values afterwards.
        """
        bucket = self._last
        if bucket is None or bucket.is_captured():
            return
        cache, length, forward = bucket.buffers.cache, bucket.buffers.length, self._decoder.forward
        cache.filling = True
        try:
            with self._as_captured(bucket):
                device = cache.position.device
                bucket.graph = captured(lambda: bucket.step(forward), device, pool, lambda: None)
        finally:
            cache.filling = False
        bucket.version = cache.storage.version
        logger.info("captured the prompt of %d rows and %d tokens", cache.batch, length)

    @contextlib.contextmanager
    def _as_captured(self, bucket: _Bucket) -> Iterator[None]:
        """The layers as a graph holds them: with masks that are given or none, and features of
        images that are dense."""
        given = bucket.buffers.arguments["attention_mask"]
        causal = given is None or (isinstance(given, dict) and None in given.values())
        dense = "deepstack_visual_embeds" in bucket.buffers.arguments
        with (
            fast.attending(self._model, fast.without_masks() if causal else None),
            replaced([(self._decoder, _ADDS, _add)] if dense else None),
        ):
            yield

    def _tell(self, why: str) -> None:
        if why not in self._told:
            self._told.add(why)
            logger.warning("Generator: prompts run as transformers runs them: %s", why)


class _Bucket:
    """The layers on buffers, and their graph."""

    def __init__(self, buffers: prompts.Buffers) -> None:
        self.buffers = buffers
        self.graph: Any = None
        self.version = -1  # of the storage that the graph works on
        self.hidden: Tensor

    def is_captured(self) -> bool:
        """Whether there is a graph, which is dropped where the cache's memory moved."""
        if self.version != self.buffers.cache.storage.version:
            self.graph = None
        return self.graph is not None

    def step(self, forward: Callable[..., Any]) -> None:
        """Fills the cache and leaves `hidden` [batch, 1, hidden]."""
        cache = self.buffers.cache
        cache.real = self.buffers.real
        try:
            outputs = forward(**self.buffers.arguments)
        finally:
            cache.real = None
        self.hidden = outputs[0].index_select(1, self.buffers.last)


def _add(hidden: Tensor, places: Any, features: Tensor) -> Tensor:
    return hidden + features
