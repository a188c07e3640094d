"""The controller: the published run, its bounds, its state."""

from __future__ import annotations

import json
import math

import pytest
from conftest import DATA

from grace.losses import AdaptiveIBController


@pytest.fixture
def golden() -> dict:
    return json.loads((DATA / "controller.json").read_text())


def test_matches_published_numbers(golden):
    controller = AdaptiveIBController(**golden["args"])
    assert [controller.update(x) for x in golden["gdkd"]] == golden["beta"]


def test_defaults_are_the_papers():
    controller = AdaptiveIBController()
    assert (controller.tau, controller.eta, controller.ema_decay) == (0.35, 0.0015, 0.99)
    assert (controller.beta, controller.beta_min, controller.beta_max) == (1.0, 0.1, 5.0)


def test_first_value_sets_the_average():
    controller = AdaptiveIBController(tau=1.0, eta=0.5, beta_init=2.0, ema_decay=0.75)
    assert controller.update(3.0) == 3.0
    assert controller.ema == 3.0
    assert controller.update(1.0) == 3.75
    assert controller.ema == 2.5


@pytest.mark.parametrize(("value", "bound"), [(1e6, 5.0), (-1e6, 0.1)])
def test_stays_within_its_bounds(value, bound):
    controller = AdaptiveIBController()
    assert controller.update(value) == bound


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_drops_and_counts_what_is_not_finite(value):
    controller = AdaptiveIBController()
    assert controller.update(value) == 1.0
    controller.update(2.0)
    state = controller.state_dict()
    assert controller.update(value) == state["beta"]
    assert controller.state_dict() == {**state, "dropped": 2}


def test_resumes_exactly(golden):
    whole = AdaptiveIBController(**golden["args"])
    halfway = AdaptiveIBController(**golden["args"])
    for value in golden["gdkd"][:7]:
        whole.update(value)
        halfway.update(value)
    state = json.loads(json.dumps(halfway.state_dict()))
    resumed = AdaptiveIBController(**golden["args"])
    resumed.load_state_dict(state)
    rest = [math.nan, *golden["gdkd"][7:]]
    assert [resumed.update(x) for x in rest] == [whole.update(x) for x in rest]
    assert resumed.state_dict() == whole.state_dict()


def test_state_before_the_first_update():
    controller = AdaptiveIBController()
    controller.load_state_dict(AdaptiveIBController().state_dict())
    assert controller.update(3.0) == AdaptiveIBController().update(3.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tau": math.nan}, r"tau must be finite, got nan"),
        ({"eta": -1.0}, r"eta must be finite and not negative, got -1.0"),
        ({"beta_init": 6.0}, r"beta_init must lie in \[beta_min, beta_max\] = \[0.1, 5.0\]"),
        ({"beta_min": 2.0}, r"beta_init must lie in .* = \[2.0, 5.0\]"),
        ({"beta_min": -1.0}, r"beta_init must lie in .*, 0 <= beta_min, got 1.0"),
        ({"ema_decay": 1.0}, r"ema_decay must lie in \[0, 1\), got 1.0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match="AdaptiveIBController: " + message):
        AdaptiveIBController(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": 7.0}, r"beta must lie in \[0.1, 5.0\], got 7.0"),
        ({"x": 1}, r"state must have keys"),
    ],
)
def test_bad_state(changes, message):
    controller = AdaptiveIBController()
    with pytest.raises(ValueError, match=message):
        controller.load_state_dict(controller.state_dict() | changes)
