"""Where the time of a call went, measured where it runs."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Timing:
    """Of one call of `Generator.generate`; times without those of captures."""

    rows: int
    prompt_tokens: int  # of a row, padding included
    new_tokens: int  # of the longest row
    prefill_ms: float  # prompt and first token
    decode_ms: float  # all tokens behind the first

    @property
    def ms_per_token(self) -> float:
        """Of a decode step; 0 where there was none."""
        return self.decode_ms / (self.new_tokens - 1) if self.new_tokens > 1 else 0.0

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all rows, over the whole time."""
        total = self.prefill_ms + self.decode_ms
        return 1000 * self.rows * self.new_tokens / total if total else 0.0


class Clock:
    """Marks points in time on the device's own clock."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: dict[str, Any] = {}

    def mark(self, name: str) -> None:
        """Notes this point; on a GPU that which its work has reached."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks[name] = event
        else:
            self._marks[name] = time.perf_counter()

    def timing(self, rows: int, prompt: int, new: int) -> Timing:
        """From the marks start, first, (ready) and end; waits for the last."""
        if self._cuda:
            self._marks["end"].synchronize()
        decode = self._between("ready", "end") if "ready" in self._marks else 0.0
        return Timing(rows, prompt, new, self._between("start", "first"), decode)

    def _between(self, first: str, last: str) -> float:
        begin, end = self._marks[first], self._marks[last]
        return begin.elapsed_time(end) if self._cuda else 1000 * (end - begin)
