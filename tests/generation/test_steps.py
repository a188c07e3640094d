"""Decode steps: what graphs hold, what they are replayed on, and other ways to compute one."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch
from generating import GREEDY, NEW, SAMPLED, asked, both, capturing, made
from recorded_graphs import Recorded, waits
from torch.utils._python_dispatch import TorchDispatchMode

import grace.generation.generator
from grace.generation import Generator

# --- what a graph may hold -----------------------------------------------------------------------


class _Watch(TorchDispatchMode):
    """Collects calls that make the host wait for a GPU, or bring it values from Python."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.calls: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = function.overloadpacket.__name__
        self.calls.append(name)
        if waits(function, args):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", families.FAMILIES)
def test_a_step_waits_for_nothing_and_moves_no_buffer(kind: str) -> None:
    model, inputs = made(kind, packed=True), asked(kind)
    generator = Generator(model)
    generator.generate(**inputs, max_new_tokens=3, **GREEDY)
    (steps,) = generator._sizes.values()
    mask = steps._inputs["attention_mask"]
    mask = mask["full_attention"] if isinstance(mask, dict) else mask
    assert mask.dtype == torch.float32  # as sdpa adds it
    places = [tensor.data_ptr() for tensor in steps._state()]
    cache = [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in steps.cache.layers]
    position = int(steps.cache.position)
    with torch.no_grad(), _Watch() as watch:
        steps.run(choose=True)
    assert watch.found == []
    assert watch.calls.count("index_copy_") == 2 * 4 + 1  # keys and values of four layers, tokens
    assert int(steps.cache.position) == position + 1
    assert places == [tensor.data_ptr() for tensor in steps._state()]
    assert cache == [
        (layer.keys.data_ptr(), layer.values.data_ptr()) for layer in steps.cache.layers
    ]


def test_the_watch_sees_what_waits() -> None:
    with _Watch() as watch:
        x = torch.arange(4)
        x[x > 2]
        int(x[0])
        torch.tensor(3)
    assert sorted(set(watch.found)) == ["_local_scalar_dense", "index", "lift_fresh"]


@pytest.mark.parametrize("kind", families.FAMILIES)
def test_replayed_graphs_say_the_same(kind: str, recorded_graphs: list[Recorded]) -> None:
    model, inputs = made(kind, packed=True), asked(kind)
    generator = capturing(model)
    for arguments in (GREEDY, SAMPLED, GREEDY):
        theirs, ours = both(model, generator, inputs, **arguments)
        assert torch.equal(theirs, ours), arguments
    greedy, sampled = recorded_graphs  # one of each kind, captured once
    assert (greedy.replays, sampled.replays) == (2 * (NEW - 1), NEW - 1)
    end = int(theirs[0, -3])
    theirs, ours = both(model, generator, inputs, eos_token_id=end, **GREEDY)
    assert torch.equal(theirs, ours)
    assert len(recorded_graphs) == 2


def test_graphs_are_captured_again_where_the_cache_moved(recorded_graphs: list[Recorded]) -> None:
    model, large = made("llava"), asked("llava")
    small = {name: large[name][:1, -4:] for name in ("input_ids", "attention_mask")}
    generator = capturing(model, length_step=8)
    for given, graphs in ((small, 1), (large, 2), (small, 3), (large, 3), (small, 3)):
        theirs, ours = both(model, generator, given, **GREEDY)
        assert torch.equal(theirs, ours)
        assert len(recorded_graphs) == graphs
    assert len(generator._sizes) == 2


def test_few_sizes_are_kept(
    recorded_graphs: list[Recorded], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grace.generation.generator, "_SIZES", 2)
    model, inputs = made("qwen2_vl"), asked("qwen2_vl")
    text = {name: inputs[name][:1, -4:] for name in ("input_ids", "attention_mask")}
    generator = capturing(model, length_step=1)
    for new in (2, 3, 2, 4):
        generator.generate(**text, max_new_tokens=new, **GREEDY)
    assert list(generator._sizes) == [(1, 4 + 2 + 1), (1, 4 + 4 + 1)]


# --- other ways to compute a step ----------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager", "grouped", "flex"])
def test_attention_of_steps(attention: str) -> None:
    model, inputs = made("qwen3_vl"), asked("qwen3_vl")
    text = model.config.get_text_config()
    was = text._attn_implementation
    generator = Generator(model, attention=attention)
    theirs, ours = both(model, generator, inputs, **GREEDY)
    assert torch.equal(theirs, ours)
    assert text._attn_implementation == was


def test_a_compiled_step_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced as for the compiler, which itself takes long and has no say in this."""

    def traced(function: Any, **options: Any) -> Any:
        assert options == {"dynamic": False, "mode": "default"}
        return compiler(function, dynamic=False, fullgraph=True, backend="aot_eager")

    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", traced)
    model, inputs = made("qwen3_vl", packed=True, num_hidden_layers=1), asked("qwen3_vl")
    seen = []
    torch._dynamo.reset()
    generator = Generator(model, compile="default")
    counters = torch._dynamo.utils.counters
    counters.clear()
    for _ in range(2):
        theirs, ours = both(model, generator, inputs, **GREEDY)
        assert torch.equal(theirs, ours)
        seen.append(counters["stats"]["unique_graphs"])
    assert seen == [1, 1]  # one program, and no second for the next tokens or the next call


def test_models_that_cannot_be_static_run_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    window = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}
    model, inputs = made("internvl", **window), asked("internvl")
    generator = Generator(model)
    assert "sliding_attention" in caplog.text
    for arguments in (GREEDY, SAMPLED):
        torch.manual_seed(5)
        theirs = model.generate(**inputs, max_new_tokens=NEW, **arguments)
        torch.manual_seed(5)
        assert torch.equal(theirs, generator.generate(**inputs, max_new_tokens=NEW, **arguments))
