"""``python -m benchmarks.tune_decoder_layer``: plans of dequant_gemm inside a decoder layer's step.

By itself a product runs behind the same product. In a decode step it runs behind a norm or an
attention, begins while that is running, and shares the GPU with what begins behind it: another plan
can then be the fastest. Here layers of a model's size run as `Generator` runs them, as one graph,
and the plans of their four products are changed one at a time, as long as the layer gets faster.
Those found go into ``grace/ops/dequant_gemm_plans/<device>.json``, each with the time of a layer.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, NamedTuple

import torch
import typer
from torch import Tensor
from tqdm import tqdm

from benchmarks import results
from benchmarks.generation import PROMPTS
from benchmarks.harness import graph_timer
from benchmarks.layers import GROUP
from benchmarks.models import config_of
from benchmarks.tune_dequant_gemm import FOLDER, runnable, write
from grace.ops import decode_attention, dequant_gemm, rms_norm
from grace.ops.dequant_gemm import plans
from grace.packing import pack

BITS, HEAD_DIM, EPS = 4, 128, 1e-6
PARTS = ("qkv", "o", "gate_up", "down")
BYTES = 400 * 2**20  # of weights in a graph: more than any cache holds
NEAR = 1.5  # plans that by themselves are within this factor of the fastest are tried
GAIN = 0.995  # of the time before: what counts as faster

Choice = Mapping[str, int]  # part → plan; -1: that of the table
Timer = Callable[[Choice], float]  # seconds of a layer


class Weight(NamedTuple):
    """A packed weight, as ``dequant_gemm`` takes it."""

    qweight: Tensor
    scales: Tensor
    rows: int

    def __call__(self, x: Tensor, plan: int, **options: Any) -> Tensor:
        """The product with x [rows, K]."""
        sizes = {"bits": BITS, "group_size": GROUP, "out_features": self.rows}
        return dequant_gemm(x, self.qweight, self.scales, **sizes, plan=plan, **options)


@dataclass(frozen=True)
class Sizes:
    """Of a decoder layer."""

    hidden: int
    inner: int
    heads: int
    kv_heads: int
    norms: bool  # of heads

    @classmethod
    def of(cls, model: str) -> Sizes:
        """By the model's name in the benchmarks."""
        text = config_of(model).get_text_config(decoder=True)
        heads = text.num_attention_heads
        kv_heads = text.num_key_value_heads or heads
        norms = "qwen3" in text.model_type
        return cls(text.hidden_size, text.intermediate_size, heads, kv_heads, norms)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """[N, K] of every part."""
        attention = self.heads * HEAD_DIM
        return {
            "qkv": (attention + 2 * self.kv_heads * HEAD_DIM, self.hidden),
            "o": (self.hidden, attention),
            "gate_up": (2 * self.inner, self.hidden),
            "down": (self.hidden, self.inner),
        }

    @property
    def layers(self) -> int:
        """That a graph holds."""
        size = sum(n * k for n, k in self.shapes.values()) * BITS // 8
        return max(2, -(-BYTES // size))


class Layers:
    """Decoder layers with random weights, and a step of some rows through them."""

    def __init__(self, sizes: Sizes, rows: int, tokens: int, device: torch.device):
        self.sizes, self.rows = sizes, rows
        made = partial(torch.randn, device=device, dtype=torch.bfloat16)
        self.x = made(rows, sizes.hidden)
        self.weights = [
            {part: _random(shape, device) for part, shape in sizes.shapes.items()}
            for _ in range(sizes.layers)
        ]
        length = -(-(tokens + 1) // 256) * 256
        shape = (rows, sizes.kv_heads, length, HEAD_DIM)
        self.caches = [(made(shape), made(shape)) for _ in range(sizes.layers)]
        self.position = torch.tensor([tokens], device=device)
        self.mask = torch.ones(rows, length, dtype=torch.bool, device=device)
        self.norm, self.head_norm = made(sizes.hidden), made(HEAD_DIM) if sizes.norms else None
        self.cos, self.sin = made(1, HEAD_DIM), made(1, HEAD_DIM)

    def step(self, choice: Choice) -> Tensor:
        """What `grace.generation.decoder` does, layer by layer."""
        x = self.x.clone()
        for weights, (keys, values) in zip(self.weights, self.caches, strict=True):
            qkv = weights["qkv"](rms_norm(x, self.norm, eps=EPS), choice["qkv"])
            out = self._attention(qkv, keys, values)
            x = weights["o"](out, choice["o"], residual=x)
            normed = rms_norm(x, self.norm, eps=EPS)
            inner = weights["gate_up"](normed, choice["gate_up"], swiglu=True)
            x = weights["down"](inner, choice["down"], residual=x)
        return x

    def _attention(self, qkv: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        heads, kv_heads = self.sizes.heads, self.sizes.kv_heads
        q, k, v = qkv.unflatten(1, (-1, HEAD_DIM)).split([heads, kv_heads, kv_heads], dim=1)
        places = (self.cos, self.sin, keys, values, self.position, self.mask)
        norms = {"q_weight": self.head_norm, "k_weight": self.head_norm}
        return decode_attention(q, k, v, *places, **norms, settled=True)

    def timed(self, choice: Choice, samples: int) -> float:
        """Median seconds of a layer, by graph replay."""
        sample = graph_timer(lambda _: self.step(choice), 1)
        return statistics.median(sample() for _ in range(samples)) / self.sizes.layers

    def near(self, part: str) -> list[int]:
        """Plans that by themselves are not far from the fastest, the fastest first."""
        n, k = self.sizes.shapes[part]
        x = torch.randn(self.rows, k, device=self.x.device, dtype=self.x.dtype)
        weights = [layer[part] for layer in self.weights]
        times = {}
        for plan in runnable(plans(x, *weights[0][:2], BITS, GROUP, n)):
            sample = graph_timer(lambda i, plan=plan: weights[i](x, plan), len(weights))
            times[plan] = min(sample() for _ in range(3))
        limit = NEAR * min(times.values())
        return sorted((plan for plan in times if times[plan] <= limit), key=times.__getitem__)


def _random(shape: tuple[int, int], device: torch.device) -> Weight:
    n, k = shape
    codes = torch.randint(-8, 8, shape, dtype=torch.int8, device=device)
    scales = torch.rand(n, k // GROUP, device=device).mul(0.02 / k**0.5).bfloat16()
    return Weight(*pack(codes, scales, BITS), n)


def descend(
    candidates: Mapping[str, Sequence[int]], rough: Timer, exact: Timer, passes: int = 2
) -> tuple[dict[str, int], float, float]:
    """Changes one part's plan at a time, as long as that makes a layer faster.

    Args:
        candidates: of every part.
        rough: a quick timer, by which the three best are found.
        exact: the timer that decides.

    Returns:
        (plans, seconds of a layer with them, seconds with those of the table).
    """
    choice = dict.fromkeys(candidates, -1)
    before = best = exact(choice)
    for _ in range(passes):
        start = best
        for part, numbers in candidates.items():
            times = {plan: rough({**choice, part: plan}) for plan in numbers}
            for plan in sorted(times, key=times.__getitem__)[:3]:
                time = exact({**choice, part: plan})
                if time < GAIN * best:
                    choice, best = {**choice, part: plan}, time
        if best >= GAIN * start:
            break
    return choice, best, before


def found_rows(sizes: Sizes, m: int, choice: Choice, seconds: float) -> list[dict[str, Any]]:
    """Rows of the table, without the parts that keep their plan."""
    us = round(seconds * 1e6, 2)
    return [
        {"bits": BITS, "n": n, "k": k, "m": m, "plan": choice[part], "layer_us": us}
        for part, (n, k) in sizes.shapes.items()
        if choice.get(part, -1) != -1
    ]


def main(
    models: Annotated[str, typer.Option(help="Names, as LLaVA-1.5-7B,Qwen3-VL-2B.")] = (
        "LLaVA-1.5-7B,Qwen3-VL-2B,Qwen2-VL-2B,Qwen3-VL-8B"
    ),
    rows: Annotated[str, typer.Option(help="Rows of a step, as 1,8.")] = "1,8",
    tokens: Annotated[int, typer.Option(min=0, help="Cached; 0: a prompt and 64.")] = 0,
    keep: Annotated[bool, typer.Option(help="Write the op's table.")] = True,
) -> None:
    """Measures which plans make a decoder layer's step the fastest, and writes the op's table."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("tuning needs a GPU")
    device = torch.device("cuda")
    for model in tqdm(models.split(","), desc="models"):
        sizes = Sizes.of(model)
        for m in map(int, rows.split(",")):
            layers = Layers(sizes, m, tokens or PROMPTS[model].tokens + 64, device)
            candidates = {part: layers.near(part) for part in PARTS}
            timers = (partial(layers.timed, samples=n) for n in (5, 25))
            choice, best, before = descend(candidates, *timers)
            counts = {part: len(numbers) for part, numbers in candidates.items()}
            print(
                f"{model} {m} rows: {1e6 * before:.2f} µs a layer, {1e6 * best:.2f} with {choice}"
            )
            print(f"  of so many plans: {counts}", flush=True)
            if keep:
                path = FOLDER / f"{results.device_name(device)}.json"
                write(path, device, found_rows(sizes, m, choice, best))
            del layers
            torch.cuda.empty_cache()


if __name__ == "__main__":
    typer.run(main)
