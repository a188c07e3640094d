"""Weights as peers take them, and what the harness does with peers that fail."""

from __future__ import annotations

import pytest
import torch
import typer

from benchmarks import __main__ as command
from benchmarks.harness import Absent, Benchmark, Case, Ceiling, Selection, verify
from benchmarks.peers.gptq import pack_gptq
from benchmarks.peers.humming import _words
from benchmarks.peers.peer import Peer


@pytest.fixture
def codes():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-8, 8, (24, 64), generator=generator, dtype=torch.int8)


def _nibbles(words):
    return torch.stack([(words >> 4 * j) & 15 for j in range(8)], dim=-1)


def test_gptq_words_hold_eight_rows_of_the_transposed_weight(codes):
    packed = pack_gptq(codes)
    assert packed.shape == (8, 24)
    assert torch.equal(_nibbles(packed).permute(1, 0, 2).reshape(24, 64) - 8, codes.int())


def test_hummings_words_hold_eight_columns(codes):
    packed = _words(codes)
    assert packed.shape == (24, 8)
    assert torch.equal(_nibbles(packed).reshape(24, 64) - 8, codes.int())


def test_a_peer_that_fails_is_absent_with_what_it_said():
    peer = Peer("broken", prepare=lambda codes, scales: lambda x: x)
    with pytest.raises(Absent, match="OSError: no such file"), peer.getting_ready():
        raise OSError("no such file\nand more")


def test_a_peer_may_not_take_more_than_its_budget():
    peer = Peer("slow", prepare=lambda codes, scales: lambda x: x, budget_seconds=1)
    with peer.getting_ready():
        peer.spent_seconds = 2.0
    with pytest.raises(Absent, match="1 s"), peer.getting_ready():
        pass


def _case(**sides):
    return Case(sides=sides, exact=lambda: torch.ones(3), bytes=1.0)


def _absent(_):
    raise Absent("not here")


def test_absent_and_wrong_peers_are_left_out_and_named():
    case = _case(
        grace=lambda _: torch.ones(3),
        good=lambda _: torch.ones(3) * 1.001,
        off=lambda _: torch.tensor([1.0, 1.0, float("nan")]),
        gone=_absent,
    )
    left_out = verify(case, case.sides)
    assert set(left_out) == {"off", "gone"}
    assert left_out["gone"] == {"absent": "not here"}
    assert "within 0.01" in left_out["off"]["wrong"]


def test_our_own_wrong_result_is_reported_and_the_run_fails(monkeypatch):
    case = _case(grace=lambda _: torch.zeros(3), good=lambda _: torch.ones(3))
    benchmark = Benchmark("x", {"cpu": [{"M": 1}]}, lambda device, M: case)
    monkeypatch.setattr(command, "load", lambda name: benchmark)
    monkeypatch.setattr(command, "measure_ceiling", lambda device: Ceiling(1.0, 1.0))
    with pytest.raises(typer.Exit):
        command.main(["x"], device="cpu", rounds=3, keep=False)


def test_a_selection_keeps_our_side():
    chosen = Selection(sides=["marlin"], sizes={"M": {"1", "16"}})
    assert chosen.has_side("grace")
    assert chosen.has_side("marlin")
    assert not chosen.has_side("bf16")
    assert chosen.has_size({"M": 16, "N": 64})
    assert not chosen.has_size({"M": 4, "N": 64})
