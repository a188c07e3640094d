"""The tuner's choice among plans, and the table it writes."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from benchmarks import tune_dequant_gemm
from benchmarks.layers import RandomLayer, Shape
from benchmarks.tune_dequant_gemm import Finding, as_text, choose, merged, runnable, tune


class FakeTimes:
    """Plans with given times, counted as they are asked for."""

    def __init__(self, **times: list[float]):
        self.asked = {int(plan[1:]): 0 for plan in times}
        self._times = {int(plan[1:]): itertools.cycle(t) for plan, t in times.items()}

    def samplers(self):
        return {plan: lambda plan=plan: self._sample(plan) for plan in self.asked}

    def _sample(self, plan):
        self.asked[plan] += 1
        return next(self._times[plan])


def test_the_fastest_median_wins_though_another_started_faster():
    # p200's first sample is the best of all, its median is not.
    times = FakeTimes(p100=[5.0], p200=[1.0, 1.3, 1.3, 1.3, 1.3, 1.3], p201=[1.1])
    assert choose(times.samplers()) == (201, 1.1)


def test_plans_far_from_the_best_are_not_timed_again():
    times = FakeTimes(p100=[5.0], p200=[1.0], p300=[1.21])
    choose(times.samplers(), rounds=3)
    assert times.asked == {100: 3, 200: 6, 300: 3}


def test_no_plan_is_an_error():
    with pytest.raises(ValueError, match="at least one plan"):
        choose({})


def test_the_slow_family_is_timed_only_where_nothing_else_runs():
    assert runnable([0, 1000, 2003]) == [1000, 2003]
    assert runnable([0]) == [0]


def _row(n, m, plan):
    return Finding(4, Shape(n, 4096), m, (plan, 1e-5), 3, {}).rows()[0]


def test_what_is_measured_anew_replaces_what_was_known_of_it():
    old = [_row(4096, 1, 200), _row(4096, 64, 300), _row(2048, 1, 201)]
    new = [_row(4096, 64, 302), _row(4096, 16, 202)]
    assert merged(old, new) == [old[2], old[0], new[1], new[0]]


def test_the_table_is_json_with_a_line_a_row():
    rows = [_row(4096, 1, 200), _row(4096, 8, 201)]
    text = as_text({"device": "NVIDIA H200", "environment": {"torch": "2.11"}}, rows)
    assert json.loads(text) == {
        "device": "NVIDIA H200",
        "environment": {"torch": "2.11"},
        "rows": rows,
    }
    assert [line for line in text.splitlines() if '"plan": 200' in line] == [
        "  " + json.dumps(rows[0]) + ","
    ]


def test_a_layer_gets_the_fastest_of_the_right_plans(monkeypatch):
    seconds = {1000: 3e-5, 2000: 1e-5, 2001: 2e-5, 3000: 0.5e-5}

    def op(x, weight, scales, *, plan, **shape):
        if plan == 2001:
            raise RuntimeError("dequant_gemm: no such launch")
        right = real(x, weight, scales, **shape)
        return right * 2 if plan == 3000 else right

    real = tune_dequant_gemm.dequant_gemm
    monkeypatch.setattr(tune_dequant_gemm, "dequant_gemm", op)
    monkeypatch.setattr(tune_dequant_gemm, "plans", lambda *_: [0, *seconds])
    monkeypatch.setattr(tune_dequant_gemm, "between_events", lambda work, calls: 1e-5)
    monkeypatch.setattr(
        tune_dequant_gemm, "graph_timer", lambda side, sets: lambda: seconds[side.args[0]]
    )
    finding = tune(RandomLayer(torch.device("cpu"), Shape(64, 256)), m=3)
    assert finding.best == (2000, 1e-5)
    assert set(finding.faults) == {2001, 3000}
    assert finding.candidates == 4
    assert finding.rows()[0]["plan"] == 2000
