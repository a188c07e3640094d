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
from grace.generation.cache import SharedCache, Storage
from grace.generation.graphs import captured
from grace.generation.layers import replaced

logger = logging.getLogger(__name__)

_BUCKETS = 8  # that are kept, with their graphs
_ADDS = "_deepstack_process"  # of a language model: adds features of images, found by a mask


class Prefill:
    """Stands in the place of a language model's forward while a prompt fills a cache.

    Images, embeddings and what merges them run as ever. What the language model is then given is
    copied into the buffers of a *bucket*: the rows of the cache, tokens up to a multiple of
    ``step``. The layers run on those, at first as they are, then as a CUDA graph.

    Args:
        model: of transformers, with static decode steps (`checks.why_plain`).
        step: lengths of buckets are its multiples.
    """

    def __init__(self, model: Any, step: int) -> None:
        self._model, self._step = model, step
        self._decoder: nn.Module = model.get_decoder()
        self._memory = Storage()
        self._buckets: OrderedDict[Any, _Bucket] = OrderedDict()
        self._last: _Bucket | None = None
        self._told: set[str] = set()

    @contextlib.contextmanager
    def filling(self, cache: SharedCache) -> Iterator[None]:
        """Inside, prompts of the model that fill this cache go through buckets."""
        self._last, forward = None, self._decoder.forward

        def through(*args: Any, **arguments: Any) -> Any:
            prompt = prompts.read(arguments, cache) if not args else "it has positional arguments"
            if isinstance(prompt, prompts.Prompt):
                return self._run(prompt, cache, forward)
            self._tell(prompt)
            return forward(*args, **arguments)

        with replaced([(self._decoder, "forward", through)]):
            yield

    def _run(
        self, prompt: prompts.Prompt, cache: SharedCache, forward: Callable[..., Any]
    ) -> BaseModelOutputWithPast:
        """Hidden states [rows, 1, hidden] of the last token, which is all that the head needs."""
        bucket = self._last = self._bucket(prompt, cache)
        bucket.buffers.load(prompt)
        if not bucket.is_captured(self._versions(bucket)):
            with self._as_captured(bucket):
                bucket.step(forward)
        elif bucket.graph is not None:
            bucket.graph.replay()
        hidden: Any = bucket.hidden[: prompt.rows]
        return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=cache)

    def _bucket(self, prompt: prompts.Prompt, cache: SharedCache) -> _Bucket:
        length = min(-(-prompt.tokens // self._step) * self._step, cache.length)
        key = (cache, length, prompt.kind)
        if key not in self._buckets:
            self._buckets[key] = _Bucket(prompts.Buffers(cache, length, self._memory))
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
        if bucket is None or bucket.is_captured(self._versions(bucket)):
            return
        cache, length, forward = bucket.buffers.cache, bucket.buffers.length, self._decoder.forward
        cache.filling = True
        try:
            with self._as_captured(bucket):
                device = cache.position.device
                bucket.graph = captured(lambda: bucket.step(forward), device, pool, lambda: None)
        finally:
            cache.filling = False
        bucket.versions = self._versions(bucket)
        logger.info("captured the prompt of %d rows and %d tokens", cache.batch, length)

    def _versions(self, bucket: _Bucket) -> tuple[int, int]:
        """Of all memory that a graph works on."""
        return bucket.buffers.cache.storage.version, self._memory.version

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
        self.versions: tuple[int, int] | None = None
        self.hidden: Tensor

    def is_captured(self, versions: tuple[int, int]) -> bool:
        """Whether its graph works on the memory of these versions; drops one that does not."""
        if self.graph is not None and self.versions != versions:
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
