"""`model.generate`'s look at a model's config, without what it makes anew for it in each call."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cache
from typing import Any

from transformers import GenerationConfig

_ASKED = "_get_generation_parameters"


class LookOnce:
    """Remembers that no generation parameters were put into a model's config.

    transformers asks the config for them in every call, which makes a whole default config while a
    GPU waits for its prompt. Here it is asked once, and again when other attributes by the names of
    generation parameters are there, which is all that its answer hangs on; what it says then, and
    what transformers makes of it, is transformers'.
    """

    def __init__(self) -> None:
        self._seen: tuple[Any, list[bool]] | None = None  # a config, and which of them it has

    @contextlib.contextmanager
    def asking(self, config: Any) -> Iterator[None]:
        """Inside, the config's next answer comes from memory where it can."""
        held = vars(config)
        if _ASKED in held or not hasattr(type(config), _ASKED):
            yield
            return

        def once() -> dict[str, Any]:
            held.pop(_ASKED, None)
            return self._parameters(config)

        held[_ASKED] = once
        try:
            yield
        finally:  # not asked; another call may have taken it away
            held.pop(_ASKED, None)

    def _parameters(self, config: Any) -> dict[str, Any]:
        now = [getattr(config, name, None) is not None for name in _names()]
        if self._seen is not None and self._seen[0] is config and self._seen[1] == now:
            return {}
        found: dict[str, Any] = config._get_generation_parameters()
        self._seen = None if found else (config, now)
        return found


@cache
def _names() -> tuple[str, ...]:
    return tuple(vars(GenerationConfig()))
