"""Stopping at the end of a step when asked to: Ctrl-C, and the SIGTERM of schedulers and torchrun.

A signal is only remembered. Ranks get theirs at different times, so the trainer adds up at the end
of every step who got one, and all stop behind the same step, with a checkpoint.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_log = logging.getLogger(__name__)
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A run stopped by a signal, behind a checkpoint. No `except Exception` takes it for an error
    of the run, and nothing behind `train` takes a half-trained model for a trained one.

    Attributes:
        exit_code: 128 + the signal, as shells give it.
    """

    def __init__(self, step: int, signum: int, directory: str) -> None:
        name = signal.Signals(signum).name
        super().__init__(
            f"train: stopped by {name} at step {step}, checkpoint in {directory}; go on with "
            "resume_from_checkpoint=true"
        )
        self.exit_code = 128 + signum


class StopSignals:
    """Remembers the first SIGINT or SIGTERM; a second one does what it does without us.

    Attributes:
        received: the signal's number, 0 for none.
    """

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Within the context, signals are remembered; outside the main thread nothing is done."""
        self.received = 0
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._before = {number: signal.signal(number, self._remember) for number in _SIGNALS}
        try:
            yield
        finally:
            self._restore()

    def _remember(self, number: int, _: FrameType | None) -> None:
        self.received = number
        self._restore()
        name = signal.Signals(number).name
        _log.warning("%s: stopping behind this step, with a checkpoint", name)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
