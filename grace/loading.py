"""What can go wrong when transformers makes a model of a checkpoint's config, told in one way."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from huggingface_hub.errors import StrictDataclassError

# What transformers raises for a config that it cannot make a model of.
_BAD_CONFIG = (
    ArithmeticError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)


@contextlib.contextmanager
def bad_config_told(must: str) -> Iterator[None]:
    """Gives what transformers raises for a bad config one kind, and a sentence.

    ``ValueError``s of grace's own, which say more, and a full memory pass as they are.

    Args:
        must: what was to be done, such as "import: config.json must describe a Llava".

    Raises:
        ValueError: ``must``, and what transformers said.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except _BAD_CONFIG as error:
        if type(error) is ValueError and ": " in str(error) and " must " in str(error):
            raise
        told = str(error).strip()
        kind = "" if isinstance(error, ValueError | RuntimeError) and told else type(error).__name__
        raise ValueError(f"{must}, got {': '.join(filter(None, (kind, told)))}") from error
