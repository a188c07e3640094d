"""decode_attention against float64, and against what transformers' layers compute step by step."""

from __future__ import annotations

import pytest
import torch
from conftest import Kernels
from oracle import assert_accurate, to_double
from torch.nn import functional
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRMSNorm
from windows import assert_margins_untouched, windowed

from grace.ops import decode_attention
from grace.ops.decode_attention import reference

HALF = [torch.bfloat16, torch.float16]
PLACES = ("q", "k", "v", "cos", "sin", "keys", "values", "position", "mask")


def make(
    rows=2, heads=4, kv_heads=2, dim=64, length=50, position=40, dtype=torch.bfloat16, norms=True
) -> dict:
    draw = lambda *shape: torch.randn(shape).to(dtype)  # noqa: E731
    angle = torch.rand(rows, dim // 2).mul(6).repeat(1, 2)
    return {
        "q": draw(rows, heads, dim),
        "k": draw(rows, kv_heads, dim),
        "v": draw(rows, kv_heads, dim),
        "cos": angle.cos().to(dtype),
        "sin": angle.sin().to(dtype),
        "keys": draw(rows, kv_heads, length, dim),
        "values": draw(rows, kv_heads, length, dim),
        "position": torch.tensor([position]),
        "mask": torch.rand(rows, length) < 0.8,
        "q_weight": torch.rand(dim).add(0.5).to(dtype) if norms else None,
        "k_weight": torch.rand(dim).add(0.5).to(dtype) if norms else None,
        "eps": 1e-6,
        "scale": dim**-0.5,
    }


def assert_attends(kernels: Kernels, given: dict) -> None:
    """Output and cache are as near to float64 as those of the reference."""
    exact, working = to_double(*given.values()), [_copy(value) for value in given.values()]
    exact = [_copy(value) for value in exact]
    actual = kernels.put(*(_copy(value) for value in given.values()))
    outputs = [
        op(*values)
        for op, values in (
            (kernels.decode_attention, actual),
            (reference, exact),
            (reference, working),
        )
    ]
    assert_accurate(*outputs, name="output")
    for name in ("keys", "values"):
        place = list(given).index(name)
        cached = [values[place] for values in (actual, exact, working)]
        assert_accurate(*cached, name=name)
        untouched = torch.arange(given[name].shape[2]) != given["position"]
        assert cached[0].cpu()[:, :, untouched].equal(given[name][:, :, untouched])


def _copy(value):
    return value.clone() if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"),
    [(2, 2, 128), (4, 1, 128), (12, 2, 64), (8, 1, 128), (9, 1, 64), (16, 1, 128), (14, 2, 128)],
)
def test_is_accurate(kernels: Kernels, heads, kv_heads, dim, dtype, norms):
    assert_attends(kernels, make(1, heads, kv_heads, dim, dtype=dtype, norms=norms))


@pytest.mark.parametrize("position", [0, 1, 14, 15, 16, 17, 127, 128, 129, 255, 399])
def test_anywhere_in_the_cache(kernels: Kernels, position):
    assert_attends(kernels, make(1, 2, 1, length=400, position=position))


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_rows(kernels: Kernels, rows):
    assert_attends(kernels, make(rows, position=33))


@pytest.mark.gpu
@pytest.mark.parametrize("length", [128, 256, 700, 1024, 4096])
@pytest.mark.parametrize(("rows", "heads", "kv_heads"), [(1, 32, 32), (1, 16, 8), (8, 12, 2)])
def test_long_caches(rows, heads, kv_heads, length):
    """Clusters of two, four and eight blocks."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    given = make(rows, heads, kv_heads, 128, length, length - 1)
    assert_attends(Kernels("grace", "cuda"), given)
    assert_attends(Kernels("grace", "cuda"), {**given, "position": torch.tensor([length // 3])})


def test_one_embedding_for_all_rows(kernels: Kernels):
    given = make(3)
    assert_attends(kernels, {**given, "cos": given["cos"][:1], "sin": given["sin"][:1]})


def test_halves_of_the_embedding_may_differ(kernels: Kernels):
    given = make()
    assert_attends(kernels, {**given, "cos": torch.randn_like(given["cos"])})


def test_what_is_not_seen_does_not_matter(kernels: Kernels):
    given = make(length=80, position=50)
    given["mask"][:, :7] = False
    changed = {name: _copy(value) for name, value in given.items()}
    for name in ("keys", "values"):
        hidden = ~given["mask"][:, None, :, None].expand_as(given[name])
        changed[name][hidden] = 1e4
        changed[name][:, :, 50:] = torch.nan  # what comes later, and what is written now
    changed["mask"][:, 50:] = torch.rand(2, 30) < 0.5
    first, second = (
        kernels.decode_attention(*kernels.put(*map(_copy, values.values())))
        for values in (given, changed)
    )
    assert first.equal(second)


def test_sees_itself_alone(kernels: Kernels):
    given = make(position=20)
    given["mask"][:] = False
    actual = kernels.decode_attention(*kernels.put(*given.values())).cpu()
    expected = given["v"].repeat_interleave(2, dim=1).flatten(1)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", HALF)
def test_large_scores(kernels: Kernels, dtype):
    given = make(dtype=dtype, norms=False)
    assert_attends(kernels, {**given, "q": given["q"] * 60, "k": given["k"] * 60})


def test_views_of_a_fused_product(kernels: Kernels):
    given = make(3, 4, 2)
    fused = torch.cat([given[name].flatten(1) for name in "qkv"], dim=1)
    parts = fused.split([4 * 64, 2 * 64, 2 * 64], dim=1)
    views = {n: p.unflatten(1, (-1, 64)) for n, p in zip("qkv", parts, strict=True)}
    assert not views["q"].is_contiguous()
    whole, apart = (
        kernels.decode_attention(*kernels.put(*map(_copy, values.values())))
        for values in (given, {**given, **views})
    )
    fused_there = kernels.put(fused)[0].split([4 * 64, 2 * 64, 2 * 64], dim=1)
    there = [part.unflatten(1, (-1, 64)) for part in fused_there]
    rest = kernels.put(*map(_copy, list(given.values())[3:]))
    assert whole.equal(apart)
    assert whole.equal(kernels.decode_attention(*there, *rest))


def test_writes_nothing_outside(kernels: Kernels):
    given = dict(zip(make(), kernels.put(*make().values()), strict=True))
    margins = []
    for name in ("q", "keys", "values"):
        given[name], whole = windowed(given[name])
        margins.append(whole)
    kernels.decode_attention(*given.values())
    for whole in margins:
        assert_margins_untouched(whole)


def test_a_place_outside_of_the_cache_writes_inside(kernels: Kernels):
    given = dict(zip(make(), kernels.put(*make(length=32, position=31).values()), strict=True))
    given["keys"], margin = windowed(given["keys"])
    if kernels.cuda_kernels:  # undefined, but never somebody else's memory
        kernels.decode_attention(*{**given, "position": given["position"] + 100}.values())
    assert_margins_untouched(margin)


def test_equals_transformers():
    given = make(2, 4, 2, 64, dtype=torch.float32)
    q, k = given["q"][:, :, None], given["k"][:, :, None]
    norm = Qwen3VLTextRMSNorm(64, eps=1e-6)
    for name in "qk":
        norm.weight.data = given[f"{name}_weight"]
        q, k = (norm(q), k) if name == "q" else (q, norm(k))
    q, k = apply_rotary_pos_emb(q, k, given["cos"][:, None], given["sin"][:, None])
    keys, values = given["keys"].clone()[:, :, :41], given["values"].clone()[:, :, :41]
    keys[:, :, 40:], values[:, :, 40:] = k, given["v"][:, :, None]
    mask = given["mask"][:, None, None, :41].clone()
    mask[..., 40] = True
    expected = functional.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True)
    actual = decode_attention(**given)
    torch.testing.assert_close(actual, expected[:, :, 0].flatten(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(given["keys"][:, :, 40], k[:, :, 0], rtol=1e-5, atol=1e-5)


def test_no_rows():
    given = make(2)
    empty = {n: v[:0] if n in PLACES and n != "position" else v for n, v in given.items()}
    assert decode_attention(**empty).shape == (0, 256)


def test_compiles_once_for_all_sizes():
    torch._dynamo.reset()
    compiled = torch.compile(decode_attention, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows, length in ((3, 50), (5, 64), (7, 90)):
            given = make(rows, length=length)
            expected = decode_attention(**{n: _copy(v) for n, v in given.items()})
            assert compiled(**given).equal(expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(2, 4)}, r"q must have 3 dimensions, got shape \[2, 4\]"),
        ({"q": torch.zeros(2, 4, 64, dtype=torch.int32)}, "q must be one of float32, bfloat16"),
        ({"keys": torch.zeros(2, 3, 50, 64)}, "a number of heads that divides 4, got 3"),
        ({"k": torch.zeros(2, 2, 32)}, r"k must be torch.bfloat16 \[2, 2, 64\], got torch.float32"),
        ({"position": torch.tensor(3)}, r"position must be int64 \[1\], got torch.int64 \[\]"),
        ({"mask": torch.ones(2, 49).bool()}, r"mask must be bool \[2, 50\], got torch.bool"),
        ({"cos": torch.zeros(3, 64).bfloat16()}, r"cos must be torch.bfloat16 \[2, 64\]"),
        ({"k_weight": torch.zeros(1, 64).bfloat16()}, r"k_weight must be torch.bfloat16 \[64\]"),
    ],
)
def test_bad_arguments(changes, message):
    with pytest.raises(ValueError, match=f"decode_attention: .*{message}"):
        decode_attention(**{**make(), **changes})


def test_a_cache_with_gaps_is_refused():
    given = make(length=100)
    with pytest.raises(ValueError, match="keys must be contiguous"):
        decode_attention(
            **{**given, "keys": given["keys"][:, :, ::2], "mask": given["mask"][:, ::2]}
        )
