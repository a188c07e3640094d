"""gated_dkd forward and backward, against the formula in eager PyTorch and torch.compile of it.

Yardsticks of Liger-Kernel: its cross-entropy, which reads one logits tensor and writes its
gradient, and its divergence of two models (here KL, at temperature 1) behind their log-softmaxes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.distillation import compiled, eager, exact_gradients, liger, peer
from benchmarks.harness import Benchmark, Case, Side, buffer_sets
from grace.ops import gated_dkd


def liger_cross_entropy(logits: Tensor, labels: Tensor) -> Side:
    """Its backward puts the gradient where the logits are, so these are its own."""
    own: list[Tensor] = []

    def call(_: int) -> Tensor:
        loss = liger("LigerCrossEntropyLoss")
        if not own:
            own.append(logits.detach().clone().requires_grad_())
        return torch.autograd.grad(loss(own[0], labels), own[0])[0]

    return call


def liger_divergence(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """KL(teacher ‖ student) over the vocabulary: without target terms, gate and temperature."""
    loss = liger("LigerJSD", beta=0.0)
    return loss(student.log_softmax(-1), teacher.log_softmax(-1), labels)


def setup(device: torch.device, n: int, V: int) -> Case:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    size = n * V * dtype.itemsize
    sets = buffer_sets(size * 2, device)
    student = [torch.randn(n, V, device=device, dtype=dtype).requires_grad_() for _ in range(sets)]
    teacher = [torch.randn(n, V, device=device, dtype=dtype) for _ in range(sets)]
    labels = torch.randint(0, V, (n,), device=device)

    def side(function: Callable[..., Tensor]) -> Side:
        def call(i: int) -> Tensor:
            return torch.autograd.grad(function(student[i], teacher[i], labels), student[i])[0]

        return call

    def chunks() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        tensors = (student[0].detach(), teacher[0], labels)
        return zip(*(tensor.split(256) for tensor in tensors), strict=True)

    return Case(
        sides={"grace": side(gated_dkd), "eager": side(eager), "compile": side(compiled())},
        yardsticks={
            "liger cross-entropy": peer(liger_cross_entropy(student[0], labels)),
            "liger JSD": peer(side(liger_divergence)),
        },
        exact=lambda: torch.cat([x.float() for x in exact_gradients(chunks, n, False)]),
        bytes=5 * size,  # both logits twice, the gradient once
        sets=sets,
    )


BENCHMARK = Benchmark(
    "gated_dkd",
    {
        "cuda": [{"n": n, "V": V} for V in (151936, 32064) for n in (2048, 8192)],
        "cpu": [{"n": 64, "V": 32064}],
    },
    setup,
)
