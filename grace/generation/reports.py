"""What a decode step tells the host, read without waiting for the step that runs now."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Reports:
    """Takes the report of every step and streams its tokens, ``lag`` steps behind the device.

    With a lag of one the host reads a report while the device already works on the next step, and
    learns of the end a step late: that step is then for nothing, and never shown.

    A report is int64 [rows + 1]: the rows' new tokens, and whether any row goes on.
    """

    def __init__(self, rows: int, lag: int, device: torch.device, streamer: Any = None) -> None:
        self._rows, self._lag, self._streamer = rows, lag, streamer
        self._cuda = device.type == "cuda"
        self._slots = [self._slot() for _ in range(lag + 1)]
        self._posted = self._read = 0
        self.ended = False

    def _slot(self) -> tuple[Tensor, Any]:
        held = torch.empty(self._rows + 1, dtype=torch.int64, pin_memory=self._cuda)
        return held, torch.cuda.Event() if self._cuda else None

    @property
    def tokens(self) -> int:
        """How many steps' tokens belong to the answer, as far as was read."""
        return self._read

    def post(self, report: Tensor) -> bool:
        """Starts to copy a step's report; whether the answer is known to be at its end."""
        held, event = self._slots[self._posted % len(self._slots)]
        held.copy_(report, non_blocking=self._cuda)
        if event is not None:
            event.record()
        self._posted += 1
        if self._posted - self._read > self._lag:
            self._take()
        return self.ended

    def finish(self) -> int:
        """Reads what is left, up to the end; returns `tokens`."""
        while not self.ended and self._read < self._posted:
            self._take()
        if self._streamer is not None:
            self._streamer.end()
        return self._read

    def _take(self) -> None:
        held, event = self._slots[self._read % len(self._slots)]
        if event is not None:
            event.synchronize()
        self._read += 1
        if self._streamer is not None:
            self._streamer.put(held[: self._rows].clone())
        self.ended = not bool(held[self._rows])
