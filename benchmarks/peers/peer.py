"""What every peer gives: whether it is here, and weights made ready for it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from benchmarks.harness import Absent

Product = Callable[[Tensor], Tensor]  # x [M, K] → x · weightᵀ [M, N]


@dataclass
class Peer:
    """A library's product with int4 weights in groups of 128."""

    name: str
    # Codes int8 [N, K] in [-8, 7] and scales [N, K/128] → the product with that weight.
    prepare: Callable[[Tensor, Tensor], Product]
    why_absent: Callable[[], str] = lambda: ""  # on this machine; "" where it is there
    why_not_at: Callable[[int, int, int], str] = lambda m, n, k: ""  # sizes that are left out
    budget_seconds: float = math.inf  # to compile and tune itself, over a whole run
    spent_seconds: float = 0.0

    def reason(self, m: int, n: int, k: int) -> str:
        """Why it is not run at that size; "" where it is."""
        return self.why_absent() or self.why_not_at(m, n, k)

    @contextmanager
    def getting_ready(self) -> Iterator[None]:
        """Round preparation and first calls: counts their time, and makes failures ``Absent``."""
        if self.spent_seconds > self.budget_seconds:
            raise Absent(f"its {self.budget_seconds:g} s of compiling and tuning are used up")
        start = time.monotonic()
        try:
            yield
        except Absent:
            raise
        except Exception as error:  # whatever a foreign library raises
            raise Absent(f"{type(error).__name__}: {_first_line(error)}") from error
        finally:
            self.spent_seconds += time.monotonic() - start


def _first_line(error: Exception) -> str:
    lines: list[Any] = str(error).strip().splitlines() or [""]
    return lines[0][:200]
