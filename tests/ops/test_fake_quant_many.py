"""fake_quant_many is fake_quant of each weight, bit for bit."""

from __future__ import annotations

import importlib

import pytest
import torch
from conftest import Kernels
from torch import Tensor
from windows import assert_margins_untouched, windowed

from grace.ops import fake_quant, fake_quant_many

module = importlib.import_module("grace.ops.fake_quant_many")

# Weights of all the ways that the kernels go at group size -1 (a row is a group), and none at all.
SHAPES = [(4, 96), (3, 64), (2, 33), (5, 128), (0, 64), (1, 512), (9, 256)]


def make(shapes=SHAPES, dtype=torch.float32) -> tuple[list[Tensor], list[Tensor]]:
    weights = [torch.randn(shape).to(dtype) for shape in shapes]
    return weights, [torch.randn(n, 1) * 0.3 - 1.5 for n, _ in shapes]


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_one_weight_after_another(kernels: Kernels, dtype):
    weights, log_scales = kernels.put(*make(dtype=dtype))
    grads = [torch.randn_like(w) for w in weights]
    settings = (4, -1, torch.bfloat16)
    one = [kernels.fake_quant(w, t, *settings) for w, t in zip(weights, log_scales, strict=True)]
    assert_same(kernels.fake_quant_many(weights, log_scales, *settings), one)
    single = [
        kernels.fake_quant_backward(*tensors, *settings)
        for tensors in zip(grads, weights, log_scales, strict=True)
    ]
    many = kernels.fake_quant_many_backward(grads, weights, log_scales, *settings)
    # On a CPU this is the reference, whose sums are in another order.
    if kernels.cuda_kernels:
        assert_same(many[1], [g[1] for g in single])
    assert_same(many[0], [g[0] for g in single])


def test_more_weights_than_a_launch_takes(emulated: Kernels):
    shapes = [(1 + i % 3, 32 * (1 + i % 5)) for i in range(150)]
    weights, log_scales = make(shapes)
    many = emulated.fake_quant_many(weights, log_scales, 3, -1, None)
    one = [emulated.fake_quant(w, t, 3, -1, None) for w, t in zip(weights, log_scales, strict=True)]
    assert_same(many, one)


def test_kernels_stay_inside_their_tensors(kernels: Kernels):
    weights, log_scales = kernels.put(*make())
    cut = [[windowed(t) for t in tensors] for tensors in (weights, weights, log_scales)]
    grads, inside, thetas = ([tensor for tensor, _ in part] for part in cut)
    out = kernels.fake_quant_many(inside, thetas, 4, -1, torch.bfloat16)
    made = kernels.fake_quant_many_backward(grads, inside, thetas, 4, -1, torch.bfloat16)
    assert all(t.isfinite().all() for t in (*out, *made[0], *made[1]))
    for _, buffer in (pair for part in cut for pair in part):
        assert_margins_untouched(buffer)


def test_gradients_are_those_of_fake_quant():
    weights, log_scales = make([(4, 64), (3, 96), (2, 32)])
    leaves = [t.requires_grad_() for t in (*weights, *log_scales)]

    def gradients(outputs):  # one of the outputs is not used, so its weight has no gradient
        total = outputs[0].square().sum() + outputs[2].sum()
        return torch.autograd.grad(total, leaves, allow_unused=True)

    settings = (4, -1, torch.bfloat16)
    op = torch.ops.grace.fake_quant_many(weights, log_scales, *settings)
    # What the public function calls on a GPU.
    function = module._FakeQuantMany.apply(settings, None, *leaves)
    singles = [fake_quant(w, t, group_size=-1) for w, t in zip(weights, log_scales, strict=True)]
    expected = gradients(singles)
    assert [i for i, grad in enumerate(expected) if grad is None] == [1, 4]
    torch.testing.assert_close(gradients(op), expected)
    torch.testing.assert_close(gradients(function), expected)
    public = fake_quant_many(weights, log_scales, group_size=-1)
    assert_same(public, op)


def test_opcheck_with_gradients():
    weights, log_scales = make([(4, 64), (3, 96)])
    for tensor in (*weights, *log_scales):
        tensor.requires_grad_()
    arguments = (weights, log_scales, 4, 32, torch.bfloat16)
    arguments = (weights, [torch.zeros(4, 2), torch.zeros(3, 3)], *arguments[2:])
    torch.library.opcheck(torch.ops.grace.fake_quant_many, arguments)


def test_compiles_without_graph_breaks():
    compiled = torch.compile(
        lambda w, t: torch.ops.grace.fake_quant_many(w, t, 4, -1, None),
        fullgraph=True,
        backend="aot_eager",
    )
    weights, log_scales = make([(4, 64), (3, 96)])
    expected = fake_quant_many(weights, log_scales, group_size=-1, scale_dtype=None)
    assert_same(compiled(weights, log_scales), expected)


def test_nothing_gives_nothing():
    assert fake_quant_many([], []) == []
    assert torch.ops.grace.fake_quant_many([], [], 4, 128, None) == []


def test_bad_arguments():
    weights, log_scales = make([(4, 64), (3, 96)])
    with pytest.raises(
        ValueError, match=r"fake_quant_many: log_scales must be 2 like weights, got"
    ):
        fake_quant_many(weights, log_scales[:1], group_size=-1)
    with pytest.raises(
        ValueError, match=r"fake_quant_many: weights must all be torch.float32, got"
    ):
        fake_quant_many([weights[0], weights[1].half()], log_scales, group_size=-1)
    with pytest.raises(ValueError, match=r"fake_quant_many: bits must be 2 to 8, got 1"):
        fake_quant_many(weights, log_scales, bits=1, group_size=-1)
    with pytest.raises(ValueError, match=r"log_scale must have shape \[3, 3\], got \[3, 1\]"):
        fake_quant_many([weights[1]], [log_scales[1]], group_size=32)


HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALVES)
def test_float32_weights_quantized_to_16_bits_are_a_cast_less(kernels: Kernels, dtype):
    weights, log_scales = kernels.put(*make())
    grads = [torch.randn_like(w).to(dtype) for w in weights]
    settings = (4, -1, torch.bfloat16)
    wide = kernels.fake_quant_many(weights, log_scales, *settings)
    out = kernels.fake_quant_many_to(weights, log_scales, *settings, dtype)
    assert {w.dtype for w in out} == {dtype}
    assert_same(out, [w.to(dtype) for w in wide])
    made = kernels.fake_quant_many_backward(grads, weights, log_scales, *settings)
    expected = kernels.fake_quant_many_backward(
        [g.float() for g in grads], weights, log_scales, *settings
    )
    for actual, whole in zip(made, expected, strict=True):
        assert {t.dtype for t in actual} == {torch.float32}
        assert_same(actual, whole)


@pytest.mark.parametrize("columns", [128, 33])  # by vectors, by elements
def test_irregular_scales_to_16_bits(kernels: Kernels, columns: int):
    weights = [torch.randn(4, columns) * 1e30]
    log_scales = [torch.tensor([[-80.0], [68.0], [88.0], [0.0]])]
    weights, log_scales = kernels.put(weights, log_scales)
    settings = (4, -1, None)
    out = kernels.fake_quant_many_to(weights, log_scales, *settings, torch.bfloat16)
    wide = kernels.fake_quant_many(weights, log_scales, *settings)
    assert_same(out, [w.to(torch.bfloat16) for w in wide])


def test_kernels_that_make_16_bits_stay_inside_their_tensors(kernels: Kernels):
    weights, log_scales = kernels.put(*make())
    grads = [windowed(w.to(torch.bfloat16)) for w in weights]
    inside = [tensor for tensor, _ in grads]
    made = kernels.fake_quant_many_backward(inside, weights, log_scales, 4, -1, torch.bfloat16)
    assert all(t.isfinite().all() for part in made for t in part)
    for _, buffer in grads:
        assert_margins_untouched(buffer)


@pytest.mark.parametrize("dtype", HALVES)
def test_gradients_through_16_bits(dtype):
    weights, log_scales = make([(4, 64), (3, 96), (2, 32)])
    leaves = [t.requires_grad_() for t in (*weights, *log_scales)]

    def gradients(outputs):
        assert {out.dtype for out in outputs} == {dtype}
        return torch.autograd.grad(sum(out.float().square().sum() for out in outputs), leaves)

    settings = (4, -1, torch.bfloat16, dtype)
    wide = torch.ops.grace.fake_quant_many(weights, log_scales, *settings[:-1])
    expected = gradients([w.to(dtype) for w in wide])
    op = torch.ops.grace.fake_quant_many_to(weights, log_scales, *settings)
    assert_same(gradients(op), expected)
    # What the public function calls on a GPU.
    function = module._FakeQuantMany.apply(settings[:-1], dtype, *leaves)
    assert_same(gradients(function), expected)
    public = fake_quant_many(weights, log_scales, group_size=-1, dtype=dtype)
    for a, b in zip(gradients(public), expected, strict=True):  # sums in another order
        torch.testing.assert_close(a, b)
    unused = torch.ops.grace.fake_quant_many_to(weights, log_scales, *settings)
    first = torch.autograd.grad(unused[0].float().square().sum(), [weights[0], log_scales[0]])
    assert_same(first, [expected[0], expected[3]])


def test_opcheck_to_16_bits():
    weights, log_scales = make([(4, 64), (3, 96)])
    for tensor in (*weights, *log_scales):
        tensor.requires_grad_()
    arguments = (weights, log_scales, 4, -1, None, torch.bfloat16)
    torch.library.opcheck(torch.ops.grace.fake_quant_many_to, arguments)


def test_bad_dtypes():
    weights, log_scales = make([(4, 64)])
    message = "dtype must be the weights' or, of float32 weights, bfloat16 or float16, got"
    for weight, dtype in ((weights[0].half(), torch.float32), (weights[0], torch.float64)):
        with pytest.raises(ValueError, match=message):
            fake_quant_many([weight], log_scales, group_size=-1, dtype=dtype)
