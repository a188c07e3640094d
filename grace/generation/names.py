"""Names that differ between versions of transformers."""

from __future__ import annotations

import inspect

from transformers import GenerationMixin

_TAKEN = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
# What models and layers call the cache, and outputs too: renamed in 5.24.
CACHE = "cache" if "cache" in _TAKEN else "past_key_values"
