"""The cache of keys and values that `Generator` decodes on: one memory for all sizes of it."""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from transformers.cache_utils import StaticCache, StaticLayer


class Storage:
    """Keys and values of every decoder layer, as flat memory that grows to the largest need.

    Only one batch is decoded at a time, so caches of all sizes lie in the same memory.

    Attributes:
        version: grows when memory moves; graphs that were captured before then point nowhere.
    """

    def __init__(self) -> None:
        self.version = 0
        self._flat: dict[tuple[int, str], Tensor] = {}
        self._users: WeakSet[SharedLayer] = WeakSet()

    def view(self, user: SharedLayer, kind: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Memory of a layer's keys or values as ``shape``, in dtype and on device of ``like``."""
        key, need = (user.index, kind), torch.Size(shape).numel()
        held = self._flat.get(key)
        if held is None or held.numel() < need or (held.dtype, held.device) != _place(like):
            del held
            self._leave(user.index, kind)  # before more is asked for
            fresh = torch.zeros(need, dtype=like.dtype, device=like.device)  # finite, if masked
            held = self._flat[key] = fresh
        self._users.add(user)
        return held[:need].view(shape)

    def _leave(self, index: int, kind: str) -> None:
        """Lets memory go, with all views of it."""
        self.version += 1
        self._flat.pop((index, kind), None)
        for user in self._users:
            if user.index == index:
                user.forget(kind)

    @property
    def bytes(self) -> int:
        """Memory held."""
        return sum(flat.numel() * flat.element_size() for flat in self._flat.values())


def _place(tensor: Tensor) -> tuple[torch.dtype, torch.device]:
    return tensor.dtype, tensor.device


class SharedLayer(StaticLayer):
    """A `StaticLayer` in a `Storage`, at a position that all layers share.

    transformers' own layer keeps a position each, and adds to it in three small kernels a layer.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, cache: SharedCache, index: int) -> None:
        super().__init__(max_cache_len=cache.length)
        self._owner, self.index = cache, index

    def forget(self, kind: str) -> None:
        """The memory of ``kind``, "keys" or "values", is no more."""
        setattr(self, kind, None)
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Takes this layer's part of the storage, as large as the cache."""
        owner = self._owner
        self.dtype, self.device = key_states.dtype, key_states.device
        for kind, states in (("keys", key_states), ("values", value_states)):
            shape = (owner.batch, states.shape[1], owner.length, states.shape[3])
            setattr(self, kind, owner.storage.view(self, kind, shape, states))
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Puts new keys and values [rows, heads, tokens, dim] in their place.

        Returns:
            In the prompt they themselves, so that attention looks at the prompt and at nothing
            behind it; in a decode step the whole cache.
        """
        if self._owner.filling:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            rows, _, tokens, _ = key_states.shape
            for held, new in ((self.keys, key_states), (self.values, value_states)):
                self._owner.put(held[:rows, :, :tokens], new)
                held[:rows, :, tokens:].zero_()  # a NaN of an earlier call would show through
            return key_states, value_states
        self.keys.index_copy_(2, self._owner.position, key_states)
        self.values.index_copy_(2, self._owner.position, value_states)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys that a query of this length meets, 0)."""
        return (query_length if self._owner.filling else self.max_cache_len), 0

    def get_seq_length(self) -> Any:
        """Tokens before those that come next: 0 in the prompt, else a tensor on the device."""
        return 0 if self._owner.filling else self._owner.position[0]


class SharedCache(StaticCache):
    """A static cache of ``batch`` rows and ``length`` tokens in a `Storage`.

    Attributes:
        position: int64 [1] on the device: where the next token goes. Whoever decodes moves it on.
        filling: whether the prompt goes through the model, or a decode step.
        real: bool [1, 1, tokens, 1] on the device: which of the tokens that fill the cache are the
            prompt's; others are left out. None: all.
    """

    real: Tensor | None = None

    def __init__(
        self, layers: int, batch: int, length: int, storage: Storage, device: torch.device
    ) -> None:
        self.batch, self.length, self.storage = batch, length, storage
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.filling = True
        made: list[Any] = [SharedLayer(self, index) for index in range(layers)]
        super(StaticCache, self).__init__(layers=made)
        self._zeros: dict[torch.dtype, Tensor] = {}

    def put(self, into: Tensor, new: Tensor) -> None:
        """Copies keys or values of a prompt; zeros stand for what is not real."""
        if self.real is None:
            into.copy_(new)
            return
        if new.dtype not in self._zeros:
            self._zeros[new.dtype] = new.new_zeros(())
        torch.where(self.real, new, self._zeros[new.dtype], out=into)
