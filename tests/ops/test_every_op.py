"""What holds for every op: a new one is covered here as soon as ``examples.py`` knows arguments."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from conftest import Kernels
from ops.examples import EXAMPLES
from oracle import assert_accurate, to_double
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from grace import _library

ROOT = Path(__file__).parents[2]
# In-place twins, whose names end in an underscore, are tested beside what they are twins of.
OPS = sorted(name for name in _library.schemas() if not name.endswith("_"))
# Ops in the files of another, whose public function calls them; and their reference there.
BESIDE = {"fake_quant_many_to": ("fake_quant_many", "reference_to")}
PUBLIC_OPS = [name for name in OPS if not name.endswith("_backward") and name not in BESIDE]
TRAINS = [
    name
    for name in OPS
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"grace::{name}", "Autograd")
]
COMPOSED = {name for name in OPS if _library.is_composed(name)}
# On a GPU these take no float32: see the op's documentation.
HALF_ONLY = {"decode_attention", "dequant_gemm"}


def reference_of(name: str):
    file, of_reference = BESIDE.get(name, (name.removesuffix("_backward"), ""))
    module = importlib.import_module(f"grace.ops.{file}")
    if of_reference:
        return getattr(module, of_reference)
    return module.reference_backward if name.endswith("_backward") else module.reference


def as_tuple(result) -> tuple[Tensor, ...]:
    if isinstance(result, tuple | list):
        return tuple(tensor for item in result for tensor in as_tuple(item))
    return (result,)


def test_examples_cover_all_ops():
    assert sorted(EXAMPLES) == OPS


@pytest.mark.parametrize("name", PUBLIC_OPS)
def test_is_found_by_its_name(name):
    for path in (
        f"grace/ops/{name}.py",
        f"tests/ops/test_{name}.py",
        f"benchmarks/bench_{name}.py",
        f"docs/ops/{name}.md",
    ):
        assert (ROOT / path).is_file(), f"{name} has no {path}"
    if name not in COMPOSED:
        assert (ROOT / f"csrc/ops/{name}/{name}.cu").is_file()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", OPS)
def test_is_as_accurate_as_its_reference(kernels: Kernels, name, dtype):
    if kernels.namespace == "grace_emulated" and name in COMPOSED:
        pytest.skip("composed of ops that are emulated themselves")
    arguments = EXAMPLES[name](dtype)
    if dtype == torch.float32 and name in HALF_ONLY and kernels.cuda_kernels:
        pytest.skip("float32 is for CPUs")
    actual = as_tuple(getattr(kernels, name)(*kernels.put(*arguments)))
    exact = as_tuple(reference_of(name)(*to_double(*arguments)))
    working = as_tuple(reference_of(name)(*arguments))
    for i, values in enumerate(zip(actual, exact, working, strict=True)):
        assert_accurate(*values, name=f"{name} output {i}")


@pytest.mark.parametrize("name", OPS)
def test_repeats_bitwise(kernels: Kernels, name):
    if kernels.namespace == "grace_emulated" and name in COMPOSED:
        pytest.skip("composed of ops that are emulated themselves")
    arguments = kernels.put(*EXAMPLES[name](torch.bfloat16))
    first, second = (as_tuple(getattr(kernels, name)(*arguments)) for _ in range(2))
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", OPS)
def test_passes_opcheck(name):
    torch.library.opcheck(getattr(torch.ops.grace, name), EXAMPLES[name](torch.float32))


@pytest.mark.parametrize("name", TRAINS)
def test_trains_in_a_checkpointed_layer(name):
    op, arguments = getattr(torch.ops.grace, name), _with_gradients(EXAMPLES[name](torch.float32))
    leaves = [x for x in pytree.tree_leaves(arguments) if isinstance(x, Tensor) and x.requires_grad]

    def loss(*arguments) -> Tensor:
        outputs = as_tuple(op(*arguments))
        return sum(x.double().sum() for x in outputs if x.requires_grad)

    plain = torch.autograd.grad(loss(*arguments), leaves, allow_unused=True)
    again = checkpoint(loss, *arguments, use_reentrant=False)
    checkpointed = torch.autograd.grad(again, leaves, allow_unused=True)
    assert any(grad is not None for grad in plain)
    for a, b in zip(plain, checkpointed, strict=True):
        assert a is b is None or a.equal(b)


def _with_gradients(arguments):
    def leaf(value):
        trains = isinstance(value, Tensor) and value.is_floating_point()
        return value.requires_grad_() if trains else value

    return pytree.tree_map(leaf, arguments)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.gpu
def test_replays_as_a_graph(name):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    kernels = Kernels("grace", "cuda")
    arguments = kernels.put(*EXAMPLES[name](torch.bfloat16))
    op = getattr(kernels, name)
    eager = as_tuple(op(*arguments))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = as_tuple(op(*arguments))
    graph.replay()
    assert all(a.equal(b) for a, b in zip(eager, captured, strict=True))


@pytest.mark.parametrize("name", sorted(set(OPS) - COMPOSED))
def test_has_a_cuda_kernel(name, emulated: Kernels):
    key = torch._C.DispatchKey.CPU
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"grace_emulated::{name}", key.name)
