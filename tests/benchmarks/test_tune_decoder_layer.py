"""Plans inside a decoder layer: the descent, the sizes, and a step as the generator makes it."""

from __future__ import annotations

from benchmarks import tune_decoder_layer as tune


def test_finds_plans_that_are_better_together():
    cost = {"qkv": {-1: 5.0, 1: 4.0, 2: 3.0}, "o": {-1: 2.0, 7: 2.5}}

    def time(choice):
        both = -0.5 if choice == {"qkv": 2, "o": 7} else 0.0
        return sum(cost[part][plan] for part, plan in choice.items()) + both

    found = tune.descend({"qkv": [1, 2], "o": [7]}, time, time)
    assert found == ({"qkv": 2, "o": -1}, 5.0, 7.0)


def test_keeps_the_table_where_nothing_is_faster():
    choice, best, before = tune.descend({"qkv": [3], "o": [4]}, lambda _: 1.0, lambda _: 1.0)
    assert choice == {"qkv": -1, "o": -1}
    assert best == before == 1.0
    assert tune.found_rows(tune.Sizes.of("LLaVA-1.5-7B"), 8, choice, best) == []


def test_a_rough_time_does_not_decide():
    exact = {-1: 1.0, 5: 1.2, 6: 0.9}
    choice, *_ = tune.descend(
        {"o": [5, 6]}, lambda c: {5: 0.1, 6: 0.2, -1: 1.0}[c["o"]], lambda c: exact[c["o"]]
    )
    assert choice == {"o": 6}


def test_sizes_of_layers():
    llava, qwen = tune.Sizes.of("LLaVA-1.5-7B"), tune.Sizes.of("Qwen3-VL-2B")
    assert llava.shapes["qkv"] == (12288, 4096)
    assert llava.shapes["gate_up"] == (22016, 4096)
    assert qwen.shapes["qkv"] == (4096, 2048)
    assert (llava.norms, qwen.norms) == (False, True)
    size = sum(n * k for n, k in qwen.shapes.values()) // 2
    assert qwen.layers * size >= tune.BYTES


def test_a_row_of_the_table():
    sizes = tune.Sizes.of("Qwen3-VL-2B")
    (row,) = tune.found_rows(sizes, 8, {**dict.fromkeys(tune.PARTS, -1), "o": 3005}, 25e-6)
    assert row == {"bits": 4, "n": 2048, "k": 2048, "m": 8, "plan": 3005, "layer_us": 25.0}
