"""The information-bottleneck controller of the distillation weight β."""

from __future__ import annotations

import math

from grace.ops._checks import require

_OP = "AdaptiveIBController"


class AdaptiveIBController:
    """Raises β while the smoothed GDKD loss x lies above τ and lowers it below.

        ema ← d·ema + (1 − d)·x  (the first x sets it)      β ← clip(β + η·(ema − τ), β_min, β_max)

    Call ``update`` once an optimizer step, with the token-weighted mean over ranks and
    micro-batches, so that every rank holds the same β. A value that is not finite changes nothing
    and is counted in ``dropped``. The defaults are the paper's.

    Args:
        tau: τ, the level of GDKD that leaves β as it is.
        eta: η ≥ 0, the step.
        beta_init: β before the first update.
        beta_min: lower bound of β.
        beta_max: upper bound of β.
        ema_decay: d in [0, 1).

    Raises:
        ValueError: for a value out of these ranges, or β_init outside [β_min, β_max].

    Source: GRACE (arXiv 2601.22709), adaptive information-bottleneck control.
    """

    def __init__(
        self,
        tau: float = 0.35,
        eta: float = 0.0015,
        beta_init: float = 1.0,
        beta_min: float = 0.1,
        beta_max: float = 5.0,
        ema_decay: float = 0.99,
    ) -> None:
        require(math.isfinite(tau), _OP, "tau", "be finite", tau)
        require(math.isfinite(eta) and eta >= 0, _OP, "eta", "be finite and not negative", eta)
        ordered = 0 <= beta_min <= beta_init <= beta_max and math.isfinite(beta_max)
        allowed = f"lie in [beta_min, beta_max] = [{beta_min}, {beta_max}], 0 <= beta_min"
        require(ordered, _OP, "beta_init", allowed, beta_init)
        require(0 <= ema_decay < 1, _OP, "ema_decay", "lie in [0, 1)", ema_decay)
        self.tau = tau
        self.eta = eta
        self.beta_min = beta_min
        self.beta_max = beta_max
        self.ema_decay = ema_decay
        self.beta = beta_init
        self.ema: float | None = None
        self.dropped = 0

    def update(self, gdkd: float) -> float:
        """Takes the step's GDKD loss and returns the next step's β."""
        gdkd = float(gdkd)
        if not math.isfinite(gdkd):
            self.dropped += 1
            return self.beta
        if self.ema is None:
            self.ema = gdkd
        else:
            self.ema = self.ema_decay * self.ema + (1 - self.ema_decay) * gdkd
        beta = self.beta + self.eta * (self.ema - self.tau)
        self.beta = min(max(beta, self.beta_min), self.beta_max)
        return self.beta

    def state_dict(self) -> dict[str, float | int | None]:
        """What a resumed run needs: β, the average and the count of dropped values."""
        return {"beta": self.beta, "ema": self.ema, "dropped": self.dropped}

    def load_state_dict(self, state: dict[str, float | int | None]) -> None:
        """Restores ``state_dict``; ValueError unless it has exactly its keys and a β in bounds."""
        keys = sorted(self.state_dict())
        require(sorted(state) == keys, _OP, "state", f"have keys {keys}", sorted(state))
        beta, ema, dropped = state["beta"], state["ema"], state["dropped"]
        inside = beta is not None and self.beta_min <= beta <= self.beta_max
        allowed = f"lie in [{self.beta_min}, {self.beta_max}]"
        require(inside, _OP, "beta", allowed, beta)
        self.beta = float(beta or 0.0)
        self.ema = None if ema is None else float(ema)
        self.dropped = int(dropped or 0)
