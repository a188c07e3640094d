"""cka forward and backward, against the formulas in eager PyTorch and torch.compile of an image.

Liger-Kernel has nothing to compare with.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Benchmark, Case, Side, buffer_sets, compiled
from grace.ops import cka


def one_image(
    student: Tensor, teacher: Tensor, product_dtype: torch.dtype = torch.float32
) -> Tensor:
    """Normalized rows, Grams, centered by their means, HSIC: n×n in memory."""
    rows = (F.normalize(x.float()).to(product_dtype) for x in (student, teacher))
    k, m = (_centered((x @ x.t()).float()) for x in rows)
    return (k * m).sum() / ((k * k).sum() * (m * m).sum()).sqrt()


def _centered(gram: Tensor) -> Tensor:
    return gram - gram.mean(0, keepdim=True) - gram.mean(1, keepdim=True) + gram.mean()


def each(image: Callable[..., Tensor], lengths: list[int]) -> Callable[..., Tensor]:
    """One image after another."""

    def values(student: Tensor, teacher: Tensor) -> Tensor:
        pairs = zip(student.split(lengths), teacher.split(lengths), strict=True)
        return torch.stack([image(*pair) for pair in pairs])

    return values


def flops(images: int, n: int, ds: int, dt: int) -> float:
    """Of the cheaper form, forward and backward, what is symmetric once, nothing kept of it."""
    gram = n * n * (ds + dt) * 2 + 2 * n * n * ds
    features = n * (ds + dt) ** 2 + n * (2 * ds * dt + ds * ds) + 2 * n * ds * (ds + dt)
    return float(images * min(gram, features))


def setup(device: torch.device, images: int, n: int, ds: int, dt: int) -> Case:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    size = images * n * (2 * ds + dt) * dtype.itemsize
    sets = buffer_sets(size, device)
    students, teachers = (
        [torch.randn(images * n, d, device=device, dtype=dtype) for _ in range(sets)]
        for d in (ds, dt)
    )
    for student in students:
        student.requires_grad_()
    cu_seqlens = torch.arange(images + 1, device=device, dtype=torch.int32) * n
    lengths = [n] * images
    ones = torch.ones(images, device=device)

    def side(function: Callable[..., Tensor]) -> Side:
        def call(i: int) -> Tensor:
            return torch.autograd.grad(function(students[i], teachers[i]), students[i], ones)[0]

        return call

    def exact() -> Tensor:
        s = students[0].detach().double().requires_grad_()
        value = torch.stack(
            [
                _by_features(*pair) if n > ds + dt else _by_grams(*pair)
                for pair in zip(s.split(lengths), teachers[0].double().split(lengths), strict=True)
            ]
        )
        return torch.autograd.grad(value.sum(), s)[0]

    return Case(
        sides={
            "grace": side(lambda s, t: cka(s, t, cu_seqlens)),
            "eager": side(each(one_image, lengths)),
            "compile": side(each(compiled(one_image), lengths)),
            "compile, bfloat16 Grams": side(
                each(partial(compiled(one_image), product_dtype=torch.bfloat16), lengths)
            ),
        },
        exact=exact,
        bytes=images * n * (2 * (ds + dt) + ds) * dtype.itemsize,
        flops=flops(images, n, ds, dt),
        sets=sets,
        tolerance=3e-2,
    )


def _centered_rows(x: Tensor) -> Tensor:
    unit = F.normalize(x, dim=1)
    return unit - unit.mean(0)


def _by_grams(student: Tensor, teacher: Tensor) -> Tensor:
    k, m = (x @ x.t() for x in (_centered_rows(student), _centered_rows(teacher)))
    return (k * m).sum() / (k.norm() * m.norm())


def _by_features(student: Tensor, teacher: Tensor) -> Tensor:
    s, t = _centered_rows(student), _centered_rows(teacher)
    return (s.t() @ t).square().sum() / ((s.t() @ s).norm() * (t.t() @ t).norm())


BENCHMARK = Benchmark(
    "cka",
    {
        "cuda": [
            {"images": 1, "n": 576, "ds": 4096, "dt": 5120},
            {"images": 8, "n": 576, "ds": 4096, "dt": 5120},
            {"images": 4, "n": 1024, "ds": 2048, "dt": 4096},
            {"images": 1, "n": 4096, "ds": 2048, "dt": 4096},
            {"images": 1, "n": 16384, "ds": 2048, "dt": 4096},
        ],
        "cpu": [{"images": 2, "n": 196, "ds": 512, "dt": 1024}],
    },
    setup,
)
