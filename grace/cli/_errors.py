"""Which exceptions are the user's input and not a fault of the program, and their one line."""

from __future__ import annotations

import sys

_MAX_CHARACTERS = 500


def bad_input(error: BaseException) -> bool:
    """Whether `error` tells of bad input: usage, a value, a file, a checkpoint that is corrupt,
    data or a learning rate that make a loss that is not finite, more than memory holds."""
    if hasattr(error, "format_message"):  # usage errors of click, wherever typer keeps it
        return True
    kinds = (ValueError, OSError, FloatingPointError, MemoryError)
    return isinstance(error, kinds) or _is_third_party(error)


def _is_third_party(error: BaseException) -> bool:
    """Errors of readers whose packages are imported only when they have something to say."""
    names = (("yaml", "YAMLError"), ("safetensors", "SafetensorError"))
    loaded = [(sys.modules[package], name) for package, name in names if package in sys.modules]
    kinds = tuple(getattr(package, name) for package, name in loaded if hasattr(package, name))
    return isinstance(error, kinds)


def one_line(error: BaseException) -> str:
    """The message of `error` on one line, without the layout that libraries give theirs."""
    text = error.format_message() if hasattr(error, "format_message") else _message(error)
    text = " ".join(text.split())
    return text if len(text) <= _MAX_CHARACTERS else text[: _MAX_CHARACTERS - 1] + "…"


def _message(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    text = str(error)
    return text if text else type(error).__name__
