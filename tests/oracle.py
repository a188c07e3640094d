"""The one rule by which every op is compared with the truth, on every device and dtype.

Truth is the op's reference in float64 on the same (already rounded) inputs. A result passes when
its error is at most twice the error of the reference in the working dtype, plus the rounding of
the result itself to that dtype. The message gives both numbers and the worst place.
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_double(*values: object) -> tuple[object, ...]:
    """The values with every floating tensor in float64: the inputs of the oracle."""
    return tuple(_double(value) for value in values)


def _double(value: object) -> object:
    if isinstance(value, list):
        return [_double(item) for item in value]
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def error_of(actual: Tensor, exact: Tensor) -> Tensor:
    """|actual − exact|; infinite where only one side is NaN or infinities differ."""
    actual, exact = actual.detach().double().cpu(), exact.detach().double().cpu()
    same = (actual == exact) | (actual.isnan() & exact.isnan())
    return torch.where(same, 0.0, (actual - exact).abs().nan_to_num(nan=torch.inf))


def assert_accurate(
    actual: Tensor,
    exact: Tensor,
    working: Tensor,
    *,
    name: str = "result",
    factor: float = 2.0,
    ulps: float = 1.0,
) -> None:
    """Passes when ``actual`` is at most ``factor`` times as far from ``exact`` as ``working`` is.

    ``exact``: the reference on float64 inputs. ``working``: the reference in the working dtype,
    whose dtype also sets the rounding noise: ``ulps`` units in the last place of the largest value.
    Integers must be those of ``working``.
    """
    assert actual.shape == exact.shape, f"{name}: shape {actual.shape}, expected {exact.shape}"
    assert actual.dtype == working.dtype, f"{name}: dtype {actual.dtype}, expected {working.dtype}"
    if actual.numel() == 0:
        return
    if not actual.is_floating_point():
        torch.testing.assert_close(
            actual.cpu(), working, rtol=0, atol=0, msg=lambda m: f"{name}: {m}"
        )
        return
    error, own = error_of(actual, exact), error_of(working, exact)
    largest = exact.detach().abs().double().nan_to_num(0, 0, 0).max().item()
    allowed = factor * own.max().item() + ulps * torch.finfo(working.dtype).eps * largest
    worst = int(error.argmax())
    place = [int(i) for i in torch.unravel_index(torch.tensor(worst), error.shape)]
    assert error.max().item() <= allowed, (
        f"{name}: error {error.max().item():.3e} at {place}, allowed {allowed:.3e} "
        f"(reference's own {own.max().item():.3e}); got {actual.flatten()[worst].item()!r}, "
        f"exact {exact.flatten()[worst].item()!r}"
    )
