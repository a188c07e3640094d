"""rotary, against float64 and against transformers' functions."""

from __future__ import annotations

import pytest
import torch
from conftest import Kernels
from oracle import assert_accurate, to_double
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb
from windows import MARGIN, assert_margins_untouched, windowed

from grace.ops import rotary
from grace.ops.rotary import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-6
SIZES = {"rows": 2, "tokens": 3, "heads": 4, "kv_heads": 2, "dim": 32}


def make(
    dtype: torch.dtype = torch.float32,
    *,
    rows: int = 2,
    tokens: int = 3,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 32,
    norms: bool = True,
) -> tuple[Tensor | None, ...]:
    """The op's tensors; the halves of cosines and of sines differ."""
    q, k = (torch.randn(rows, tokens, n, dim).mul(3).to(dtype) for n in (heads, kv_heads))
    cos, sin = torch.randn(2, rows, tokens, dim).to(dtype)
    weights = torch.randn(2, dim).to(dtype) if norms else (None, None)
    return q, k, cos, sin, *weights


def assert_turns(kernels: Kernels, *arguments: Tensor | None, eps: float = EPS) -> None:
    actual = kernels.rotary(*kernels.put(*arguments), eps)
    exact = reference(*to_double(*arguments), eps)
    for name, *values in zip("qk", actual, exact, reference(*arguments, eps), strict=True):
        assert_accurate(*values, name=name)
        assert values[0].is_contiguous()


@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [2, 6, 16, 64, 80, 96, 128, 256, 264, 520, 1040])
def test_any_dim(kernels: Kernels, dim, dtype, norms):
    assert_turns(kernels, *make(dtype, dim=dim, norms=norms))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "tokens", "heads", "kv_heads"),
    [(1, 1, 1, 1), (3, 1, 7, 1), (1, 5, 16, 8), (2, 2, 33, 11), (1, 2, 80, 3), (1, 1, 0, 2)],
)
def test_any_heads(kernels: Kernels, rows, tokens, heads, kv_heads, dtype):
    sizes = {"rows": rows, "tokens": tokens, "heads": heads, "kv_heads": kv_heads}
    assert_turns(kernels, *make(dtype, dim=128, **sizes))
    assert_turns(kernels, *make(dtype, dim=18, **sizes))


@pytest.mark.parametrize("dim", [30, 128])
@pytest.mark.parametrize("absent", [4, 5])
def test_a_norm_of_only_one(kernels: Kernels, absent, dim):
    arguments = list(make(torch.bfloat16, heads=5, kv_heads=3, dim=dim))
    arguments[absent] = None
    assert_turns(kernels, *arguments)


@pytest.mark.parametrize("dim", [30, 64])
def test_one_embedding_for_all_rows(kernels: Kernels, dim):
    q, k, cos, sin, *weights = make(rows=3, dim=dim)
    one = kernels.rotary(*kernels.put(q, k, cos[:1], sin[:1], *weights), EPS)
    each = (x[:1].repeat(3, 1, 1) for x in (cos, sin))
    many = kernels.rotary(*kernels.put(q, k, *each, *weights), EPS)
    assert all(a.equal(b) for a, b in zip(one, many, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("skipped", [0, 1, 8])
def test_views_of_a_fused_product(kernels: Kernels, skipped, dtype):
    """Rows and tokens that lie apart, on the 16-byte grid and off it."""
    rows, tokens, heads, kv_heads, dim = SIZES.values()
    width = (heads + 2 * kv_heads) * dim
    fused = torch.randn(rows + 1, tokens, width + 16).to(dtype)
    (fused,) = kernels.put(fused)
    seen = fused[1:, :, skipped : skipped + width].unflatten(-1, (-1, dim))
    q, k, _ = seen.split([heads, kv_heads, kv_heads], dim=2)
    rest = kernels.put(*make(dtype)[2:])
    actual = kernels.rotary(q, k, *rest, EPS)
    whole = [x.cpu().contiguous() for x in (q, k)] + [x.cpu() for x in rest]
    exact, working = reference(*to_double(*whole), EPS), reference(*whole, EPS)
    for values in zip(actual, exact, working, strict=True):
        assert_accurate(*values)


@pytest.mark.parametrize("which", range(6))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_off_the_16_byte_grid(kernels: Kernels, dtype, which):
    arguments = make(dtype, dim=64)
    put = kernels.put(*arguments)
    x = put[which]
    put[which] = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    exact, working = reference(*to_double(*arguments), EPS), reference(*arguments, EPS)
    for values in zip(kernels.rotary(*put, EPS), exact, working, strict=True):
        assert_accurate(*values)


@pytest.mark.parametrize("dim", [30, 128])
def test_touches_nothing_outside(kernels: Kernels, dim):
    arguments = kernels.put(*make(torch.bfloat16, heads=5, kv_heads=3, dim=dim))
    inside, buffers = zip(*(windowed(x) for x in arguments), strict=True)
    actual, expected = kernels.rotary(*inside, EPS), kernels.rotary(*arguments, EPS)
    assert all(a.equal(b) for a, b in zip(actual, expected, strict=True))
    assert all(a.equal(b) for a, b in zip(inside, arguments, strict=True))
    for buffer in buffers:
        assert_margins_untouched(buffer)


def test_a_head_knows_nothing_of_the_others(kernels: Kernels):
    q, k, *rest = kernels.put(*make(torch.float16, dim=64))
    before = kernels.rotary(q, k, *rest, EPS)
    q[1, 2, 3] = torch.nan
    after = kernels.rotary(q, k, *rest, EPS)
    assert after[0][1, 3, 2].isnan().all()
    after[0][1, 3, 2] = before[0][1, 3, 2]
    assert all(a.equal(b) for a, b in zip(after, before, strict=True))


def test_squares_of_the_largest_values(kernels: Kernels):
    q, k, cos, sin, *weights = make(torch.float16, dim=128)
    ones, zeros = torch.ones_like(cos), torch.zeros_like(sin)
    arguments = (q.fill_(65504.0), k.fill_(-65504.0), ones, zeros, *map(torch.ones_like, weights))
    turned = kernels.rotary(*kernels.put(*arguments), EPS)
    for x, sign in zip(turned, (1.0, -1.0), strict=True):
        torch.testing.assert_close(x.cpu(), torch.full_like(x.cpu(), sign), rtol=1e-3, atol=0)


@pytest.mark.parametrize("eps", [0.0, 1e-30, 1e30])
def test_any_eps(kernels: Kernels, eps):
    assert_turns(kernels, *make(dim=64), eps=eps)


@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_what_transformers_does_with_fewer_roundings(dtype, norms):
    q, k, cos, sin, q_weight, k_weight = make(dtype, dim=64, norms=norms)
    actual = rotary(q, k, cos, sin, q_weight=q_weight, k_weight=k_weight, eps=1e-5)
    if norms:
        q, k = _normed(q, q_weight), _normed(k, k_weight)
    expected = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    for a, b in zip(actual, expected, strict=True):
        largest = b.abs().max().item()
        torch.testing.assert_close(a, b, rtol=0, atol=3 * torch.finfo(dtype).eps * largest)


def _normed(x: Tensor, weight: Tensor) -> Tensor:
    norm = LlamaRMSNorm(x.shape[-1], eps=1e-5).to(x.dtype)
    norm.weight.data.copy_(weight)
    return norm(x).detach()


def test_keeps_lengths():
    """A rotation: of cosines and sines of angles that are equal in both halves."""
    q, k, cos, _, *_ = make(norms=False)
    angles = torch.randn_like(cos[..., :16]).repeat(1, 1, 2)
    for x, turned in zip((q, k), rotary(q, k, angles.cos(), angles.sin()), strict=True):
        torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1).transpose(1, 2))


@pytest.mark.parametrize("view", ["heads", "dim"])
def test_what_lies_otherwise_is_copied(view):
    q, k, cos, sin, *_ = make()
    expected = rotary(q, k, cos, sin)
    wide = torch.zeros(2, 3, 8, 64)
    apart = wide[:, :, ::2, :32] if view == "heads" else wide[:, :, :4, ::2]
    apart.copy_(q)
    across = cos.transpose(1, 2).contiguous().transpose(1, 2)
    actual = rotary(apart, k, across, sin)
    assert all(a.equal(b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("sizes", [{"rows": 0}, {"tokens": 0}, {"heads": 0, "kv_heads": 0}])
def test_empty(kernels: Kernels, sizes):
    arguments = make(**sizes)
    rows, tokens, heads, kv_heads, dim = (SIZES | sizes).values()
    q, k = kernels.rotary(*kernels.put(*arguments), EPS)
    assert q.shape == (rows, heads, tokens, dim)
    assert k.shape == (rows, kv_heads, tokens, dim)
    assert [x.shape for x in rotary(*arguments[:4])] == [q.shape, k.shape]


def test_compiles_once_for_all_sizes():
    torch._dynamo.reset()
    compiled = torch.compile(rotary, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows, tokens in ((3, 5), (6, 9), (5, 70)):
            fused = torch.randn(rows, tokens, 8 * 32).unflatten(-1, (8, 32))
            q, k, _ = fused.split([4, 2, 2], dim=2)
            *embedding, q_weight, k_weight = make(rows=rows, tokens=tokens)[2:]
            weights = {"q_weight": q_weight, "k_weight": k_weight}
            actual = compiled(q, k, *embedding, **weights)
            expected = rotary(q, k, *embedding, **weights)
            assert all(a.equal(b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(2, 3, 4, 32).int()}, r"rotary: q must be one of .*int32"),
        ({"q": torch.zeros(2, 3, 4)}, r"q must have shape \[rows, tokens, heads, dim\], got \[2"),
        ({"q": torch.zeros(2, 3, 4, 31)}, r"rotary: q must have an even dim, got 31"),
        ({"k": torch.zeros(2, 4, 2, 32)}, r"k must have shape \[2, 3, kv_heads, 32\], got \[2, 4"),
        ({"k": torch.zeros(2, 3, 2, 32).half()}, r"k must be torch.float32 like q, got .*float16"),
        ({"k": torch.zeros(2, 3, 2, 32, device="meta")}, r"k must be on q's device cpu, got meta"),
        ({"cos": torch.zeros(3, 3, 32)}, r"cos must be torch.float32 \[2, 3, 32\], got .*\[3, 3"),
        ({"sin": torch.zeros(1, 3, 32)}, r"sin must be torch.float32 \[2, 3, 32\], got .*\[1, 3"),
        ({"sin": torch.zeros(2, 3, 16)}, r"sin must be torch.float32 \[2, 3, 32\], got .*16\]"),
        ({"q_weight": torch.zeros(16)}, r"q_weight must be torch.float32 \[32\], got .*\[16\]"),
        ({"k_weight": torch.zeros(32).half()}, r"k_weight must be torch.float32 \[32\], got .*16"),
    ],
)
def test_bad_arguments(changes, message):
    arguments = dict(zip(("q", "k", "cos", "sin"), make()[:4], strict=True)) | changes
    with pytest.raises(ValueError, match=message):
        rotary(**arguments)


def test_the_window_keeps_alignment():
    """The tests of windows above are of vectors only while this holds."""
    assert MARGIN * torch.float16.itemsize % 16 == 0
