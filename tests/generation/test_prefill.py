"""Prompts on static buffers say what prompts say that run as they are."""

from __future__ import annotations

import itertools
import logging
from typing import Any

import families
import pytest
import torch
from generating import GREEDY, NEW, SAMPLED, asked, both, capturing, logits_of, made
from recorded_graphs import Recorded, waits
from torch import Tensor
from torch.utils._pytree import tree_leaves

from grace.generation import Generator, prefill, prompts
from grace.generation.names import CACHE

STEP = 24  # prompts of all families and four tokens more lie in one bucket


def longer(inputs: dict[str, Tensor], more: int) -> dict[str, Tensor]:
    """With so many more words at the end."""
    rows = len(inputs["input_ids"])
    words = (torch.arange(rows * more).view(rows, more) % 9) + 3
    added = {"input_ids": words, "attention_mask": torch.ones_like(words)}
    added["mm_token_type_ids"] = torch.zeros_like(words)
    return {
        name: torch.cat([value, added[name].to(value.dtype)], dim=1) if name in added else value
        for name, value in inputs.items()
    }


def buckets_of(generator: Generator) -> list[Any]:
    assert generator._prefill is not None
    return list(generator._prefill._buckets.values())


def tensors_of(buffers: Any) -> list[Tensor]:
    leaves = tree_leaves((dict(buffers.arguments), buffers.real, buffers.last))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def is_prompt(graph: Recorded) -> bool:
    """Decode steps write where a position on the device says; prompts do not."""
    return "index_copy_" not in {call[0].overloadpacket.__name__ for call in graph.calls}


def quiet(caplog: pytest.LogCaptureFixture) -> bool:
    return not [r for r in caplog.records if r.levelno >= logging.WARNING and "grace" in r.name]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", families.FAMILIES)
def test_replayed_prompts_say_the_same(
    kind: str, packed: bool, recorded_graphs: list[Recorded], caplog: pytest.LogCaptureFixture
) -> None:
    """Long ones, then short ones in the same bucket, with and without padding on the left."""
    model: Any = made(kind, packed=packed)
    generator = capturing(model, prefill_step=STEP)
    for padded in (False, True):
        for more in (4, 0, 2) if not padded else (1, 0):
            inputs = longer(asked(kind, padded), more)
            theirs, ours = both(model, generator, inputs, **GREEDY)
            assert torch.equal(theirs, ours), (padded, more)
    assert len(buckets_of(generator)) == 2  # with a mask and without
    assert [graph.replays for graph in recorded_graphs if is_prompt(graph)] == [2, 1]
    assert quiet(caplog)


@pytest.mark.parametrize("kind", families.FAMILIES)
def test_logits_behind_a_prompt_are_the_same(
    kind: str, recorded_graphs: list[Recorded], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made(kind)
    generator = capturing(model, prefill_step=STEP)
    for padded in (False, True):
        inputs = asked(kind, padded)
        exact = logits_of(model.generate, inputs)
        first, replayed = (logits_of(generator.generate, inputs) for _ in range(2))
        torch.testing.assert_close(first, exact, rtol=1e-5, atol=1e-5)
        assert torch.equal(first, replayed)
    # Features that are not added would show: all else that goes into a bucket does, too.
    for name in ("inputs_embeds", "position_ids", "attention_mask", "deepstack_visual_embeds"):
        load = prompts.Buffers.load

        def changed(buffers: Any, prompt: Any, name: str = name, load: Any = load) -> None:
            load(buffers, prompt)
            _change(buffers.arguments.get(name))

        with monkeypatch.context() as patch:
            patch.setattr(prompts.Buffers, "load", changed)
            off = (logits_of(generator.generate, inputs) - exact)[0].abs().amax(dim=1)
        is_there = name != "deepstack_visual_embeds" or kind == "qwen3_vl"
        assert ((off > 1e-3) == is_there).all(), name


def _change(given: Any) -> None:
    """Another row of numbers; positions twice as far; a place more that is hidden."""
    if isinstance(given, dict):
        (given,) = given.values()
    if isinstance(given, list):
        for each in given:
            each.zero_()
    elif given is not None and given.dtype == torch.bool:
        given[..., 5] = False
    elif given is not None:
        given.mul_(2 if given.dtype == torch.int64 else torch.linspace(0.5, 2, given.shape[-1]))


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_rows_are_filled_up(count: int, recorded_graphs: list[Recorded]) -> None:
    model: Any = made("llava")
    inputs = asked("llava", padded=False)
    ids = inputs["input_ids"][1:].repeat(count, 1)
    ids[:, -1] = torch.arange(count) + 8
    mask = torch.ones_like(ids)
    for padding in (0, 2):
        mask[-1, :padding] = 0
        given = {"input_ids": ids, "attention_mask": mask}
        given["pixel_values"] = torch.randn(count, 3, 16, 16)
        generator = capturing(model, prefill_step=STEP)
        for arguments in (GREEDY, SAMPLED):
            theirs, ours = both(model, generator, given, **arguments)
            assert torch.equal(theirs, ours)
        (bucket,) = buckets_of(generator)
        assert bucket.buffers.cache.batch == {1: 1, 2: 2, 3: 4, 5: 8}[count]
        embeds = bucket.buffers.arguments["inputs_embeds"]
        assert torch.equal(embeds[count:], embeds[:1].expand_as(embeds[count:]))
        if padding:  # places behind a prompt see themselves: no softmax is of nothing
            seen = bucket.buffers.arguments["attention_mask"][:, 0, ids.shape[1] :]
            assert (seen.sum(dim=-1) == 1).all()


@pytest.mark.parametrize("kind", ["llava", "qwen3_vl"])
def test_what_lies_in_unused_places_does_not_matter(
    kind: str, recorded_graphs: list[Recorded]
) -> None:
    model: Any = made(kind, packed=True)
    generator = capturing(model, prefill_step=64, length_step=64)
    for padded in (False, True):
        inputs = asked(kind, padded)
        right = generator.generate(**inputs, max_new_tokens=NEW, **GREEDY)
        held = [bucket.buffers._held.values() for bucket in buckets_of(generator)]
        for flat in itertools.chain(generator._storage._flat.values(), *held):
            flat.fill_(torch.nan if flat.is_floating_point() else 1)
        again = generator.generate(**inputs, max_new_tokens=NEW, **GREEDY)
        assert torch.equal(right, again)
        generator.generate(**inputs, max_new_tokens=1, **GREEDY)
        tokens = inputs["input_ids"].shape[1]
        for layer in generator._sizes[2, 64].cache.layers:
            for held in (layer.keys, layer.values):
                assert held.isfinite().all()
                assert (held[:, :, tokens:] == 0).all()
                assert (held[0, :, tokens - 1] != 0).any()


@pytest.mark.parametrize("kind", families.FAMILIES)
@pytest.mark.parametrize("padded", [False, True])
def test_a_prompt_in_a_graph_waits_for_nothing(
    kind: str, padded: bool, recorded_graphs: list[Recorded]
) -> None:
    model: Any = made(kind, packed=True)
    generator = capturing(model, prefill_step=STEP)
    generator.generate(**asked(kind, padded), max_new_tokens=1, **GREEDY)
    (graph,) = recorded_graphs  # also where no token follows the first
    assert [call[0] for call in graph.calls if waits(call[0], call[1])] == []
    attention = [c for c in graph.calls if "scaled_dot_product" in c[0].overloadpacket.__name__]
    assert len(attention) == 4
    for _, args, kwargs, _ in attention:  # dropout, and whether it is causal, behind three tensors
        assert args[3:5] == (() if padded else (0.0, True))
        assert (kwargs.get("attn_mask") is not None) == padded
    names = [call[0].overloadpacket.__name__ for call in graph.calls]
    assert names.count("arange") == 0  # of which transformers makes masks
    (bucket,) = buckets_of(generator)
    places = [leaf.data_ptr() for leaf in tensors_of(bucket.buffers)]
    generator.generate(**asked(kind, padded), max_new_tokens=1, **GREEDY)
    assert graph.replays == 1
    assert places == [leaf.data_ptr() for leaf in tensors_of(bucket.buffers)]


def test_prompts_are_captured_again_where_memory_moved(recorded_graphs: list[Recorded]) -> None:
    model: Any = made("qwen2_vl")
    large = asked("qwen2_vl")
    small = {name: large[name][:1, -4:] for name in ("input_ids", "attention_mask")}
    generator = capturing(model, prefill_step=8, length_step=8)
    seen = []
    for given in (small, large, small, large, small):
        theirs, ours = both(model, generator, given, **GREEDY)
        assert torch.equal(theirs, ours)
        seen.append(sum(map(is_prompt, recorded_graphs)))
    assert seen == [1, 2, 3, 3, 3]  # the small one again, in memory that is now as large


def test_few_graphs_are_kept(
    recorded_graphs: list[Recorded], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefill, "_BUCKETS", 2)
    model: Any = made("llava")
    text = {name: asked("llava")[name][:1, -4:] for name in ("input_ids", "attention_mask")}
    generator = capturing(model, prefill_step=4)
    for more in (0, 4, 0, 8):
        theirs, ours = both(model, generator, longer(text, more), **GREEDY)
        assert torch.equal(theirs, ours)
    assert [bucket.buffers.length for bucket in buckets_of(generator)] == [4, 12]
    assert sum(map(is_prompt, recorded_graphs)) == 3


def test_prompts_that_keep_a_gpu_busy_run_as_they_are(
    recorded_graphs: list[Recorded],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(prefill, "_MOST_TOKENS", 2 * STEP)
    model: Any = made("qwen2_vl")
    generator = capturing(model, prefill_step=STEP)
    for more, buckets in ((STEP, 0), (0, 1)):
        inputs = longer(asked("qwen2_vl"), more)
        theirs, ours = both(model, generator, inputs, **GREEDY)
        assert torch.equal(theirs, ours)
        assert len(buckets_of(generator)) == buckets
    assert quiet(caplog)


def test_a_bucket_is_no_longer_than_the_cache() -> None:
    model: Any = made("llava")
    generator = Generator(model, prefill_step=1000, length_step=8)
    theirs, ours = both(model, generator, asked("llava"), **GREEDY)
    assert torch.equal(theirs, ours)
    (bucket,) = buckets_of(generator)
    assert bucket.buffers.length == bucket.buffers.cache.length == 56


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_models_that_attend_as_they_do(attention: str, recorded_graphs: list[Recorded]) -> None:
    model: Any = made("internvl")
    model.set_attn_implementation(attention)
    generator = capturing(model, prefill_step=STEP)
    for padded in (False, True, False):
        theirs, ours = both(model, generator, asked("internvl", padded), **GREEDY)
        assert torch.equal(theirs, ours)
    text = model.config.get_text_config()
    assert text._attn_implementation == attention
    assert "forward" not in vars(model.get_decoder())


# --- what runs as it is --------------------------------------------------------------------------


def test_language_models_that_take_more_run_as_they_are(
    recorded_graphs: list[Recorded], caplog: pytest.LogCaptureFixture
) -> None:
    model: Any = made("llava")
    generator = capturing(model, prefill_step=STEP)

    def more(module: Any, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "cross_states": torch.ones(1)}

    model.get_decoder().register_forward_pre_hook(more, with_kwargs=True)
    for _ in range(2):
        theirs, ours = both(model, generator, asked("llava"), **GREEDY)
        assert torch.equal(theirs, ours)
    assert buckets_of(generator) == []
    told = "prompts run as transformers runs them: its language model takes cross_states"
    assert caplog.text.count(told) == 1


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"inputs_embeds": None}, "not called with inputs_embeds and the cache"),
        ({CACHE: None}, "not called with inputs_embeds and the cache"),
        ({"position_ids": None}, r"no position_ids \[rows, tokens\]"),
        ({"position_ids": torch.zeros(3, 5)}, r"no position_ids \[rows, tokens\]"),
        ({"attention_mask": torch.ones(2, 5)}, r"no mask \[rows, 1, tokens, tokens\]"),
        ({"attention_mask": {"a": None, "b": None}}, r"no mask \[rows, 1, tokens, tokens\]"),
        ({"visual_pos_masks": torch.ones(2, 5)}, "one of visual_pos_masks and deepstack"),
        (
            {"visual_pos_masks": torch.ones(2, 4), "deepstack_visual_embeds": []},
            r"no visual_pos_masks \[rows, tokens\]",
        ),
        ({"hooks": [1]}, "takes hooks"),
    ],
)
def test_what_is_no_prompt_for_buffers(change: dict[str, Any], why: str) -> None:
    cache: Any = object()
    usual = {"inputs_embeds": torch.ones(2, 5, 8), "position_ids": torch.zeros(1, 5)}
    usual = {**usual, CACHE: cache, "use_cache": True, "attention_mask": None}
    prompt = prompts.read(usual, cache)
    assert isinstance(prompt, prompts.Prompt)
    assert (prompt.rows, prompt.tokens, prompt.positions.shape) == (2, 5, (2, 5))
    assert prompt.rest == (("use_cache", True),)
    with pytest.raises(AssertionError, match=why):
        raise AssertionError(prompts.read({**usual, **change}, cache))


def test_models_whose_prompts_cannot(caplog: pytest.LogCaptureFixture) -> None:
    window = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}
    assert Generator(made("internvl", **window), prefill_step=STEP)._prefill is None
    assert "prompts run as transformers runs them: its layers have sliding" in caplog.text
    model: Any = made("llava")
    model.get_decoder().layers.append(model.get_decoder().layers[0])
    assert Generator(model, prefill_step=STEP)._prefill is None
    assert "its language model has 5 layers" in caplog.text
    with pytest.raises(ValueError, match=r"prefill_step must be a number of at least 1, got 0"):
        Generator(model, prefill_step=0)
    assert Generator(model)._prefill is None
