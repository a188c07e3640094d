"""linear_gated_dkd: equal to gated_dkd and cross-entropy of the whole logits, in any chunks."""

from __future__ import annotations

import importlib
import math
import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_accurate, to_double
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from grace.ops import gated_dkd, linear_gated_dkd
from grace.ops._checks import accumulate_dtype
from grace.ops.gated_dkd import gated_dkd_rows
from grace.ops.linear_gated_dkd import default_chunk_size, slice_width

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IGNORE = -100
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

Case = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    return request.param


def make_case(
    n: int = 9, vs: int = 30, vt: int = 27, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Case:
    shapes = ((n, 8), (vs, 8), (n, 12), (vt, 12))
    tensors = [torch.randn(shape).to(device, dtype) for shape in shapes]
    labels = torch.randint(0, min(vs, vt), (n,))
    labels[1::3] = IGNORE
    return (*tensors, labels.to(device))  # type: ignore[return-value]


def whole(case: Case, **options: Any) -> tuple[Tensor, Tensor]:
    """The same through whole logits."""
    student, student_head, teacher, teacher_head, labels = case
    logits = student @ student_head.t()
    compute = logits.to(accumulate_dtype(logits.dtype))
    total = F.cross_entropy(compute, labels, ignore_index=IGNORE, reduction="sum")
    count = (labels != IGNORE).sum().clamp_min(1)
    return total / count, gated_dkd(logits, teacher @ teacher_head.t(), labels, **options)


def with_gradients(function: Any, case: Case, **options: Any) -> list[Tensor]:
    """(cross_entropy, gdkd, ∂hidden, ∂head) of the two losses weighed differently."""
    leaves = [t.detach().clone().requires_grad_() for t in case[:2]]
    losses = function(*leaves, *case[2:], **options)
    grads = torch.autograd.grad(0.7 * losses[0] + 1.3 * losses[1], leaves)
    return [*losses, *grads]


def through_whole_logits(*tensors: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    return whole(tensors, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk_size", [1, 4, None])
def test_is_accurate(device, chunk_size, dtype):
    case = make_case(dtype=dtype, device=device)
    actual = with_gradients(linear_gated_dkd, case, chunk_size=chunk_size)
    exact = with_gradients(through_whole_logits, to_double(*[x.cpu() for x in case]))
    working = with_gradients(through_whole_logits, case)
    names = ("cross_entropy", "gdkd", "grad_hidden", "grad_head")
    for name, *values in zip(names, actual, exact, working, strict=True):
        # Products of other shapes round otherwise, in the forward and again in the backward.
        assert_accurate(*values, name=name, factor=4.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk_size", [1, 4, None])
def test_frozen_head_is_accurate(device, chunk_size, dtype):
    case = make_case(dtype=dtype, device=device)

    def gradient(function: Any, case: Case, **options: Any) -> Tensor:
        hidden = case[0].detach().clone().requires_grad_()
        losses = function(hidden, *case[1:], **options)
        return torch.autograd.grad(0.7 * losses[0] + 1.3 * losses[1], hidden)[0]

    actual = gradient(linear_gated_dkd, case, chunk_size=chunk_size)
    exact = gradient(through_whole_logits, to_double(*[x.cpu() for x in case]))
    assert_accurate(actual, exact, gradient(through_whole_logits, case), name="grad_hidden")


@pytest.mark.parametrize("trains", ["hidden", "head", "both"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kept_logits_are_accurate(device, trains, dtype):
    case = make_case(dtype=dtype, device=device)
    which = {"hidden": [0], "head": [1], "both": [0, 1]}[trains]

    def results(function: Any, case: Case, **options: Any) -> list[Tensor]:
        tensors = [tensor.detach().clone() for tensor in case]
        leaves = [tensors[i].requires_grad_() for i in which]
        losses = function(*tensors, **options)
        return [*losses, *torch.autograd.grad(0.7 * losses[0] + 1.3 * losses[1], leaves)]

    actual = results(linear_gated_dkd, case, keep_logits=True)
    exact = results(through_whole_logits, to_double(*[x.cpu() for x in case]))
    working = results(through_whole_logits, case)
    names = ("cross_entropy", "gdkd", *(("grad_hidden", "grad_head")[i] for i in which))
    for name, *values in zip(names, actual, exact, working, strict=True):
        assert_accurate(*values, name=name)


@pytest.mark.parametrize("options", [{"chunk_size": 2}, {"keep_logits": True}])
@pytest.mark.parametrize(("temperature", "alpha", "beta", "gate"), [(1.5, 0.3, 2.0, False)])
def test_settings_reach_the_op(temperature, alpha, beta, gate, options):
    case = to_double(*make_case())
    settings = {"temperature": temperature, "alpha": alpha, "beta": beta, "gate": gate}
    actual = with_gradients(linear_gated_dkd, case, **options, **settings)
    options = settings
    torch.testing.assert_close(actual, with_gradients(through_whole_logits, case, **options))


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(0, 7),
    vs=st.integers(2, 12),
    vt=st.integers(2, 12),
    chunk_size=st.integers(1, 9),
)
def test_any_shape_in_any_chunks(n, vs, vt, chunk_size):
    case = to_double(*make_case(n, vs, vt))
    expected = with_gradients(through_whole_logits, case)
    for options in ({"chunk_size": chunk_size}, {"keep_logits": True}):
        torch.testing.assert_close(with_gradients(linear_gated_dkd, case, **options), expected)


def test_gradient_by_finite_differences():
    student, head, *rest = to_double(*make_case(5, 6, 5))
    inputs = (student.requires_grad_(), head.requires_grad_())
    assert torch.autograd.gradcheck(
        lambda x, w: linear_gated_dkd(x, w, *rest, chunk_size=2), inputs
    )


def test_tied_head_gets_both_gradients():
    student, head, teacher, teacher_head, labels = to_double(*make_case())
    embedding = head.requires_grad_()
    tokens = torch.arange(len(labels)) % len(embedding)

    def loss_of(function: Any) -> Tensor:
        hidden = student + F.embedding(tokens, embedding)
        return sum(function(hidden, embedding, teacher, teacher_head, labels))

    (actual,) = torch.autograd.grad(loss_of(linear_gated_dkd), embedding)
    (expected,) = torch.autograd.grad(loss_of(through_whole_logits), embedding)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("frozen", [0, 1])
def test_frozen_head_or_hidden(frozen):
    case = list(to_double(*make_case()))
    expected = with_gradients(linear_gated_dkd, tuple(case))[2 + 1 - frozen]
    case[1 - frozen] = case[1 - frozen].detach().requires_grad_()
    cross_entropy, gdkd = linear_gated_dkd(*case)
    (0.7 * cross_entropy + 1.3 * gdkd).backward()
    torch.testing.assert_close(case[1 - frozen].grad, expected)
    assert case[frozen].grad is None


@pytest.mark.parametrize("keep_logits", [True, False])
@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("which", [0, 1])
def test_one_loss_alone(which, trains, keep_logits, zeros_made):
    """The trainer drops a term that is not finite; what is left must not feel it."""
    case = to_double(*make_case())
    leaves = [case[0].requires_grad_(), *([case[1].requires_grad_()] if trains else [])]
    loss = linear_gated_dkd(*case, keep_logits=keep_logits)[which]
    with zeros_made() as made:
        actual = torch.autograd.grad(loss, leaves)
    torch.testing.assert_close(actual, torch.autograd.grad(whole(case)[which], leaves))
    assert all(len(shape) == 1 for shape in made if shape != list(case[0].shape))


def test_num_items_divides_the_cross_entropy_alone():
    case = make_case()
    count = (case[4] != IGNORE).sum()
    cross_entropy, gdkd = linear_gated_dkd(*case)
    for num_items in (24, torch.tensor(24)):
        scaled, same = linear_gated_dkd(*case, num_items=num_items)
        torch.testing.assert_close(scaled, cross_entropy * count / 24)
        torch.testing.assert_close(same, gdkd, rtol=0, atol=0)


def test_labels_beyond_the_teachers_vocabulary_count_for_cross_entropy():
    case = make_case(3, vs=30, vt=27)
    labels = torch.tensor([28, 2, IGNORE])
    cross_entropy, gdkd = linear_gated_dkd(*case[:4], labels)
    expected = whole((*case[:4], labels))
    torch.testing.assert_close((cross_entropy, gdkd), expected)
    alone = linear_gated_dkd(*case[:4], torch.tensor([IGNORE, 2, IGNORE]))[1]
    torch.testing.assert_close(gdkd, alone)


def test_label_that_is_no_class_is_seen():
    case = make_case(3)
    cross_entropy, gdkd = linear_gated_dkd(*case[:4], torch.tensor([30, 2, 3]))
    assert cross_entropy.isnan()
    assert gdkd.isnan()


def test_all_rows_ignored():
    case = make_case()
    case[4].fill_(IGNORE)
    results = with_gradients(linear_gated_dkd, case)
    assert all(x.eq(0).all() for x in results)


def test_ignored_rows_are_not_computed_on_the_host():
    case = make_case()
    for hidden in (case[0], case[2]):
        hidden[case[4] == IGNORE] = math.nan
    results = with_gradients(linear_gated_dkd, case, chunk_size=2)
    assert all(x.isfinite().all() for x in results)


@pytest.mark.parametrize("options", [{"chunk_size": 2}, {"keep_logits": True}])
@pytest.mark.parametrize("trains", [True, False])
def test_ignored_rows_leak_nothing(device, trains, options):
    case = make_case(device=device)
    expected = with_gradients(linear_gated_dkd, case, **options)
    for hidden in (case[0], case[2]):
        hidden[case[4] == IGNORE] = math.nan
    leaves = [case[0].clone().requires_grad_(), case[1].clone().requires_grad_(trains)]
    losses = linear_gated_dkd(*leaves, *case[2:], **options)
    (0.7 * losses[0] + 1.3 * losses[1]).backward()
    actual = [*losses, leaves[0].grad, *([leaves[1].grad] if trains else [])]
    torch.testing.assert_close(actual, expected[: len(actual)])


@pytest.mark.parametrize("options", [{"chunk_size": 2}, {"keep_logits": True}])
@pytest.mark.parametrize("trains", [True, False])
def test_rows_that_do_not_count_may_be_computed_too(monkeypatch, trains, options):
    """What labels on a GPU lead to, here on the host."""
    case = list(make_case())
    case[1].requires_grad_(trains)
    for hidden in (case[0], case[2]):
        hidden[case[4] == IGNORE] = math.nan

    def results() -> list[Tensor]:
        leaves = [case[0].clone().requires_grad_(), *([case[1]] if trains else [])]
        losses = linear_gated_dkd(leaves[0], *case[1:], **options)
        return [*losses, *torch.autograd.grad(0.7 * losses[0] + 1.3 * losses[1], leaves)]

    expected = results()
    module = importlib.import_module("grace.ops.linear_gated_dkd")
    monkeypatch.setattr(module, "_counting", lambda *_: slice(None))
    torch.testing.assert_close(results(), expected)


@pytest.mark.parametrize("chunk_size", [1, None])
def test_one_row_that_counts(chunk_size):
    case = make_case(5)
    labels = torch.full((5,), IGNORE)
    labels[3] = 26
    actual = with_gradients(linear_gated_dkd, (*case[:4], labels), chunk_size=chunk_size)
    torch.testing.assert_close(actual, with_gradients(through_whole_logits, (*case[:4], labels)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_labels_may_stay_on_the_host():
    case = make_case(device="cuda")
    expected = with_gradients(linear_gated_dkd, case, chunk_size=2)
    actual = with_gradients(linear_gated_dkd, (*case[:4], case[4].cpu()), chunk_size=2)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("keep_logits", [True, False])
def test_autocast_changes_nothing(keep_logits):
    case = make_case()
    expected = with_gradients(linear_gated_dkd, case, keep_logits=keep_logits)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = with_gradients(linear_gated_dkd, case, keep_logits=keep_logits)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_keeps_no_logits_for_the_backward():
    case = make_case()
    case[0].requires_grad_()
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.append(t.numel()) or t, lambda t: t
    ):
        linear_gated_dkd(*case)
    assert max(sizes) <= max(t.numel() for t in case)


class Storages(TorchDispatchMode):
    """Bytes of every storage that is made, largest first."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.made: set[tuple[int, int]] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.made.add((storage.nbytes(), storage.data_ptr()))
        return result

    def largest(self) -> list[int]:
        return sorted((size for size, place in self.made if place not in self.known), reverse=True)


@pytest.mark.parametrize("trains", [True, False])
def test_memory_is_that_of_a_chunk_and_the_gradients(trains):
    n, vocabulary, chunk_size = 256, 4096, 8
    shapes = ((n, 64), (vocabulary, 64), (n, 64), (vocabulary, 64))
    case = (*map(torch.randn, shapes), torch.randint(0, vocabulary, (n,)))
    case[0].requires_grad_()
    case[1].requires_grad_(trains)
    with Storages(*case) as storages:
        sum(linear_gated_dkd(*case, chunk_size=chunk_size)).backward()
    sizes = storages.largest()
    if trains:
        assert sizes.pop(0) == case[1].nbytes  # of the gradients, that of the head is the only one
    vectors = 2 * case[0].nbytes  # kept with a frozen head
    assert sizes[0] <= max(chunk_size * vocabulary * 4, vectors)


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket is torch.ops.aten.mm
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("trains", [True, False])
def test_kept_logits_are_made_once_and_become_their_gradient(trains):
    n, vocabulary, features = 64, 4096, 16
    shapes = ((n, features), (vocabulary, features)) * 2
    case = (*map(torch.randn, shapes), torch.randint(0, vocabulary, (n,)))
    case[0].requires_grad_()
    case[1].requires_grad_(trains)
    with Storages(*case) as storages, Products() as products:
        sum(linear_gated_dkd(*case, keep_logits=True)).backward()
    assert products.count == 3 + trains
    logits = n * vocabulary * 4
    assert [size for size in storages.largest() if size >= logits] == [logits, logits]


def test_kept_logits_have_one_backward():
    case = make_case()
    loss = sum(linear_gated_dkd(case[0].requires_grad_(), *case[1:], keep_logits=True))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_logits_are_not_kept_without_a_gradient():
    case = make_case()
    expected = linear_gated_dkd(*case)
    with Products() as products, torch.no_grad():
        actual = linear_gated_dkd(case[0].requires_grad_(), *case[1:], keep_logits=True)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert products.count == 0  # chunks are made inside the op


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_default_chunk_bounds_the_logits(dtype):
    heads = [torch.empty(rows, 8, dtype=dtype, device="meta") for rows in (151936, 152064)]
    rows = default_chunk_size(*heads)
    row_bytes = (151936 + 152064) * heads[0].element_size()
    assert rows * row_bytes <= 384 * 2**20 < (rows + 128) * row_bytes
    assert default_chunk_size(*[torch.empty(10**9, 1, device="meta")] * 2) == 1


def test_slices_hold_as_many_logits_as_chunks():
    for rows, chunk_size in ((8192, 640), (100, 640), (7, 1), (0, 3), (300000, 640)):
        width = slice_width(151936, rows, chunk_size)
        assert 1 <= width <= 151936
        assert rows * width <= max(chunk_size * 151936, rows)
    assert slice_width(151936, 8192, 640) % 128 == 0
    assert slice_width(32064, 100, 640) == 32064
    assert slice_width(151936, 2048, 640) == 38016  # four slices alike, the last a little smaller


@pytest.mark.parametrize("keep_gradients", [True, False])
def test_opcheck(keep_gradients):
    case = make_case()
    case[0].requires_grad_()
    case[1].requires_grad_(not keep_gradients)
    arguments = (*case, 2.0, 1.0, 4.0, IGNORE, 4, keep_gradients)
    torch.library.opcheck(torch.ops.grace.linear_gated_dkd, arguments)


def test_compiles_once_for_any_number_of_rows():
    compiled = torch.compile(linear_gated_dkd, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in (4, 6, 9):
            case = make_case(n)
            actual = with_gradients(compiled, case)
            torch.testing.assert_close(actual, with_gradients(linear_gated_dkd, case))


def test_compiles_with_a_frozen_head():
    compiled = torch.compile(linear_gated_dkd, fullgraph=True, backend="aot_eager", dynamic=True)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in (4, 6, 9):
            case = make_case(n)
            hidden = case[0].requires_grad_()
            grads = [
                torch.autograd.grad(sum(function(*case)), hidden)[0]
                for function in (compiled, linear_gated_dkd)
            ]
            torch.testing.assert_close(*grads)


@pytest.mark.parametrize("trains", [True, False])
def test_compiles_with_kept_logits(trains):
    torch._dynamo.reset()
    compiled = torch.compile(linear_gated_dkd, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in (4, 6, 9):
            case = make_case(n)
            leaves = [case[0].requires_grad_(), *([case[1].requires_grad_()] if trains else [])]
            grads = [
                torch.autograd.grad(sum(function(*case, keep_logits=True)), leaves)
                for function in (compiled, linear_gated_dkd)
            ]
            torch.testing.assert_close(*grads)


def _leave() -> None:
    """Ends a rank without C++ destructors, in which gloo's threads now and then abort it."""
    torch.distributed.destroy_process_group()
    os._exit(0)


def _sharded_head(rank: int, ranks: int, rendezvous: str) -> None:
    """On each rank: a head sharded as FSDP2 shards it gives what the whole head gives."""
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=ranks
    )
    mesh = init_device_mesh("cpu", (ranks,))
    torch.manual_seed(0)
    cases = [make_case(n) for n in (9, 4)[:ranks]]  # tokens of each rank, the same heads
    heads = cases[0][1], cases[0][3]
    student_head, teacher_head = (distribute_tensor(x, mesh, [Shard(0)]) for x in heads)
    student_head.requires_grad_()
    case = cases[rank]
    hidden = case[0].clone().requires_grad_()
    losses = linear_gated_dkd(hidden, student_head, case[2], teacher_head, case[4], chunk_size=3)
    (0.7 * losses[0] + 1.3 * losses[1]).backward()
    wholes = [
        with_gradients(linear_gated_dkd, (x[0], heads[0], x[2], heads[1], x[4])) for x in cases
    ]
    torch.testing.assert_close([*losses, hidden.grad], wholes[rank][:3])
    mean = sum(results[3] for results in wholes) / ranks
    torch.testing.assert_close(student_head.grad.full_tensor(), mean)
    _leave()


class Student(torch.nn.Module):
    """Hidden states behind a layer, and a head; runs ``inside`` where FSDP2 has the head whole."""

    def __init__(self, head: Tensor) -> None:
        super().__init__()
        self.body = torch.nn.Linear(head.shape[1], head.shape[1], bias=False)
        torch.nn.init.eye_(self.body.weight)
        self.head = torch.nn.Linear(head.shape[1], head.shape[0], bias=False)
        self.head.weight.data.copy_(head)

    def forward(self, x: Tensor, inside: Any = None) -> Tensor:
        hidden = self.body(x)
        self.head(hidden[:1])
        return hidden if inside is None else inside(hidden, self.head.weight)


def _fsdp2(rank: int, ranks: int, rendezvous: str) -> None:
    """Gradients of FSDP2's parameters, whether the head is sharded or not when it is used."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=ranks
    )
    mesh = init_device_mesh("cpu", (ranks,))
    torch.manual_seed(0)
    cases = [make_case(n) for n in (9, 4)]
    head, teacher_head = cases[0][1], cases[0][3]
    wholes = [
        with_gradients(linear_gated_dkd, (x[0], head, x[2], teacher_head, x[4])) for x in cases
    ]
    mean = sum(results[3] for results in wholes) / ranks
    hidden, _, teacher, _, labels = cases[rank]

    def losses(hidden: Tensor, weight: Tensor) -> Tensor:
        ce, gdkd = linear_gated_dkd(hidden, weight, teacher, teacher_head, labels)
        return 0.7 * ce + 1.3 * gdkd

    for inside, alone in ((True, False), (False, False), (False, True)):
        student = Student(head)
        if alone:  # sharded again behind its own forward
            fully_shard(student.head, mesh=mesh)
        fully_shard(student, mesh=mesh)
        if inside:
            student(hidden, losses).backward()
        else:
            losses(student(hidden), student.head.weight).backward()
        torch.testing.assert_close(student.head.weight.grad.full_tensor(), mean)
    _leave()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
@pytest.mark.parametrize(("ranks", "check"), [(1, _sharded_head), (2, _sharded_head), (2, _fsdp2)])
def test_sharded_heads(tmp_path, ranks, check):
    torch.multiprocessing.spawn(check, (ranks, str(tmp_path / "rendezvous")), nprocs=ranks)


@pytest.mark.parametrize("gate", [True, False])
def test_micro_batches_and_ranks_add_up(gate):
    """As the trainer weighs them: by tokens and, of gdkd, by the sum of gates."""
    case = to_double(*make_case(12))
    whole_batch = linear_gated_dkd(*case, gate=gate)
    total, weights = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for rows in (slice(0, 3), slice(3, 8), slice(8, 12)):
        hidden, head, teacher, teacher_head, labels = case
        part = (hidden[rows], head, teacher[rows], teacher_head, labels[rows])
        logits = (part[0] @ head.t(), part[2] @ teacher_head.t())
        gates = gated_dkd_rows(*logits, part[4])[1]
        share = torch.stack([(part[4] != IGNORE).sum(), (gates if gate else gates > 0).sum()])
        total += share * torch.stack(linear_gated_dkd(*part, gate=gate))
        weights += share
    torch.testing.assert_close(total / weights, torch.stack(whole_batch))


def test_non_contiguous_input(device):
    case = make_case(device=device)
    strided = tuple(t.t().contiguous().t() for t in case[:4])
    actual = with_gradients(linear_gated_dkd, (*strided, case[4].repeat_interleave(2)[::2]))
    torch.testing.assert_close(actual, with_gradients(linear_gated_dkd, case))


@pytest.mark.parametrize("op", ["linear_gated_dkd", "linear_gated_dkd_backward"])
def test_kernels_are_given_contiguous_rows(monkeypatch, op):
    """Gradients of sums are expanded, labels may be strided; on a GPU chunks are views of them."""
    per_row = {"linear_gated_dkd": [4], "linear_gated_dkd_backward": [0, 1, 6, 7]}[op]
    case = make_case()
    case = (*case[:4], case[4].repeat_interleave(2)[::2])
    called, given = getattr(torch.ops.grace, op), []

    def record(*arguments: Any) -> Any:
        given.extend(arguments[i] for i in per_row)
        return called(*arguments)

    monkeypatch.setattr(torch.ops.grace, op, record)
    with_gradients(linear_gated_dkd, case)
    assert len(given) == len(per_row)
    assert all(tensor.is_contiguous() for tensor in given)


@pytest.mark.parametrize("options", [{"chunk_size": 2}, {"keep_logits": True}])
def test_repeats_bitwise(device, options):
    case = make_case(dtype=torch.bfloat16, device=device)
    first, second = (with_gradients(linear_gated_dkd, case, **options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student_hidden": torch.zeros(9, 7)}, r"student_head must have 7 features, got 8"),
        ({"teacher_head": torch.zeros(27, 8)}, r"teacher_head must have 12 features, got 8"),
        ({"teacher_hidden": torch.zeros(8, 12)}, r"teacher_hidden must have 9 rows like student_h"),
        ({"student_head": torch.zeros(30, 8).half()}, r"student_head must be torch.float32 like"),
        ({"teacher_hidden": torch.zeros(9, 12).half()}, r"teacher_hidden must be torch.float32"),
        ({"teacher_head": torch.zeros(1, 12)}, r"teacher_head must have at least 2 classes, got 1"),
        ({"student_hidden": torch.zeros(9, 8).int()}, r"student_hidden must be one of float32"),
        ({"labels": torch.zeros(9)}, r"labels must be int64, got torch.float32"),
        ({"labels": torch.zeros(8).long()}, r"labels must have 9 rows like student_hidden, got 8"),
        ({"temperature": -1.0}, r"temperature must be positive and finite, got -1.0"),
        ({"chunk_size": 0}, r"chunk_size must be at least 1, got 0"),
        (
            {"chunk_size": 4, "keep_logits": True},
            r"chunk_size must be None with keep_logits, got 4",
        ),
    ],
)
def test_bad_arguments(changes, message):
    names = ("student_hidden", "student_head", "teacher_hidden", "teacher_head", "labels")
    arguments = dict(zip(names, make_case(), strict=True)) | changes
    with pytest.raises(ValueError, match="linear_gated_dkd: " + message):
        linear_gated_dkd(**arguments)
