"""``python -m benchmarks generate``: whole answers, `model.generate` against `grace.generation`.

Models have the public configs' sizes and random weights, prompts one image each, answers a fixed
number of tokens. A model is built once: dense sides first, then its linears are packed in place.
Prefill is what an answer of one token takes; decode is the rest of a whole answer, a token; both
from the host's clock, arguments and sampling included. What a `Generator` measures of itself on the
device stands beside that (``device_*``). Results are on disk after every cell.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks import generation, profile_kernels, results
from benchmarks.harness import Ceiling, measure_ceiling

NAME = "generate"
Generate = Callable[..., Any]


@dataclass(frozen=True)
class Side:
    """A way to generate."""

    make: Callable[[Any], Generate]  # of a model
    packed: bool = False
    compiled: bool = False  # starts slowly: by default at batch 1 only, and not on a CPU
    default: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)  # of `Generator`, where it is that
    warm_up: int = 2  # answers before those that count: what compiles or captures is done then


def _plain(model: Any) -> Generate:
    return model.generate


def _static(model: Any) -> Generate:
    """As transformers compiles it by itself for a static cache, on a GPU."""
    return lambda **arguments: model.generate(**arguments, cache_implementation="static")


def _ours(packed: bool, default: bool = True, **options: Any) -> Side:
    def make(model: Any) -> Generate:
        from grace.generation import Generator

        return Generator(model, **options).generate

    return Side(make, packed, "compile" in options, default, options)


PREFILL_STEP = 128
_FIRSTS = 7  # answers of one token at least: a host's noise is as large as a step

_THEIRS = {"layers": "transformers"}  # as those of sides with an attention are, too

# In the order they are run: the dense ones, the packed ones, and last what changes the model again.
SIDES: dict[str, Side] = {
    "bf16": Side(_plain, warm_up=1),
    "bf16 static compiled": Side(_static, compiled=True),
    "bf16 graph": _ours(packed=False),
    "bf16 graph transformers layers": _ours(packed=False, default=False, **_THEIRS),
    "bf16 graph prefill": _ours(packed=False, default=False, prefill_step=PREFILL_STEP),
    "grace": _ours(packed=True),
    "grace graph prefill": _ours(packed=True, prefill_step=PREFILL_STEP),
    "grace compiled": _ours(packed=True, default=False, compile=True),
    "grace transformers layers": _ours(packed=True, default=False, **_THEIRS),
    "grace transformers layers compiled": _ours(
        packed=True, default=False, compile=True, **_THEIRS
    ),
    "grace grouped": _ours(packed=True, default=False, attention="grouped"),
    "grace flex": _ours(packed=True, default=False, attention="flex"),
    "grace flash": _ours(packed=True, default=False, attention="flash"),
    "grace norms flash": _ours(packed=True, default=False, layers="torch", attention="flash"),
    "grace liger flash": _ours(packed=True, default=False, layers="liger", attention="flash"),
    "grace compiled grouped": _ours(packed=True, default=False, compile=True, attention="grouped"),
    "grace compiled flex": _ours(packed=True, default=False, compile=True, attention="flex"),
    "grace compiled flash": _ours(packed=True, default=False, compile=True, attention="flash"),
    "grace W8 head": _ours(packed=True, lm_head_bits=8),
    "grace W8 head compiled flex": _ours(
        packed=True, default=False, lm_head_bits=8, compile=True, attention="flex"
    ),
    "grace W8 head compiled flash": _ours(
        packed=True, default=False, lm_head_bits=8, compile=True, attention="flash"
    ),
}
MODELS = ("LLaVA-1.5-7B", "Qwen3-VL-2B", "Qwen2-VL-2B", "Qwen3-VL-8B")
TINY = ("tiny LLaVA student", "tiny Qwen3-VL student")


@dataclass(frozen=True)
class Plan:
    """What is to be run."""

    models: list[str]
    batches: list[int]
    sides: list[str]  # empty: the default ones
    new_tokens: int
    repeats: int
    profile: bool

    def has(self, name: str, batch: int, device: torch.device) -> bool:
        """Whether a side is run at a batch size."""
        if self.sides:
            return name in self.sides
        side = SIDES[name]
        return side.default and not (side.compiled and (batch > 1 or device.type == "cpu"))


def rows_of(plan: Plan, device: torch.device) -> Iterator[dict[str, Any]]:
    """A row a model, side and batch size."""
    for name in plan.models:
        model: Any = generation.build(name, device)
        packed = head = False
        for side_name, side in SIDES.items():
            batches = [b for b in plan.batches if plan.has(side_name, b, device)]
            if not batches:
                continue
            if side.packed and not packed:
                generation.pack_randomly(model)
                packed = True
            if "lm_head_bits" in side.options:
                side, head = _with_head_done(side, head)
            yield from _rows_of_side(plan, model, name, side_name, side, batches)
        del model
        _free()


def _with_head_done(side: Side, done: bool) -> tuple[Side, bool]:
    """The same without the step that changes the head, where that was made before."""
    if not done:
        return side, True
    return _ours(
        side.packed, **{k: v for k, v in side.options.items() if k != "lm_head_bits"}
    ), True


def _rows_of_side(
    plan: Plan, model: Any, name: str, side_name: str, side: Side, batches: list[int]
) -> Iterator[dict[str, Any]]:
    _free()
    generate = None
    for batch in batches:
        prompt = generation.PROMPTS[name].tokens
        size = {"model": name, "batch": batch, "prompt": prompt, "new": plan.new_tokens}
        row: dict[str, Any] = {"size": size, "side": side_name}
        try:
            generate = generate or side.make(model)
            inputs = generation.inputs_for(model, name, batch)
            cell = profiled if plan.profile else measured
            yield row | cell(generate, model, inputs, plan, side.warm_up)
        except Exception as error:  # noqa: BLE001 (no side takes the others' time on the GPU)
            yield row | {"absent": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
    if side.compiled:  # its programs and their graphs would keep memory
        vars(model).pop("_compiled_call", None)
        torch._dynamo.reset()


def measured(
    generate: Generate, model: Any, inputs: dict[str, Tensor], plan: Plan, warm_up: int
) -> dict[str, Any]:
    """Medians of a cell, and its memory."""
    arguments = {**inputs, "do_sample": False}
    whole = _timer(generate, {**arguments, "max_new_tokens": plan.new_tokens}, model.device)
    first = _timer(generate, {**arguments, "max_new_tokens": 1}, model.device)
    started = time.perf_counter()
    for _ in range(warm_up):
        whole()
    first()
    starting = time.perf_counter() - started
    _reset_peak(model.device)
    told = _Told(generate)
    wholes = [told.behind(whole()) for _ in range(plan.repeats)]
    firsts = [told.behind(first()) for _ in range(max(plan.repeats, _FIRSTS))]
    total, prefill = statistics.median(wholes), statistics.median(firsts)
    rows, steps = len(inputs["input_ids"]), plan.new_tokens - 1
    row = {
        "prefill_ms": round(1000 * prefill, 3),
        "ms_per_token": round(1000 * (total - prefill) / steps, 4),
        **told.medians(),
        "samples_ms": [round(1000 * sample, 2) for sample in wholes],
        "tokens_per_s": round(rows * plan.new_tokens / total, 1),
        "start_s": round(starting, 1),
        "weights_mib": generation.weights_mib(model),
        **_peak(model.device),
    }
    return row


class _Told:
    """What a `Generator` tells of its answers, by the device's clock; other sides tell nothing."""

    def __init__(self, generate: Generate) -> None:
        owner = getattr(generate, "__self__", None)
        self._owner = owner if hasattr(owner, "timing") else None
        self._prefill: list[float] = []
        self._token: list[float] = []

    def behind(self, sample: float) -> float:
        """Takes what is told of the answer that a sample is of; gives the sample."""
        timing = getattr(self._owner, "timing", None)
        if timing is not None:
            self._prefill.append(timing.prefill_ms)
            if timing.new_tokens > 1:
                self._token.append(timing.ms_per_token)
        return sample

    def medians(self) -> dict[str, float]:
        """For a row; empty where nothing was told."""
        if not self._prefill:
            return {}
        return {
            "device_prefill_ms": round(statistics.median(self._prefill), 3),
            "device_ms_per_token": round(statistics.median(self._token), 4),
        }


def _timer(
    generate: Generate, arguments: dict[str, Any], device: torch.device
) -> Callable[[], float]:
    def sample() -> float:
        _wait(device)
        started = time.perf_counter()
        ids = generate(**arguments)
        _wait(device)
        took = time.perf_counter() - started
        expected = arguments["input_ids"].shape[1] + arguments["max_new_tokens"]
        if ids.shape[1] != expected:
            raise RuntimeError(f"generate must make {expected} tokens, got {ids.shape[1]}")
        return took

    return sample


def profiled(
    generate: Generate, model: Any, inputs: dict[str, Tensor], plan: Plan, warm_up: int
) -> dict[str, Any]:
    """What each kernel of a decode step takes, alone and not in a graph, where kernels that are
    launched early count their waiting; nothing for sides without static steps."""
    owner = getattr(generate, "__self__", None)
    if owner is None or not hasattr(owner, "capture"):
        return {}
    owner.capture = False
    generate(**inputs, do_sample=False, max_new_tokens=plan.new_tokens)
    steps = max(owner._sizes.values(), key=lambda held: held.cache.length)

    def side(_: int) -> None:
        steps.cache.position.fill_(inputs["input_ids"].shape[1])
        steps.run(True)

    with owner.stepping(), torch.no_grad():
        return {"kernels": profile_kernels.kernels_of(side, 1)}


# --- device --------------------------------------------------------------------------------------


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> dict[str, float]:
    if device.type != "cuda":
        return {}
    return {
        "peak_mib": round(torch.cuda.max_memory_allocated(device) / 2**20, 1),
        "reserved_mib": round(torch.cuda.memory_reserved(device) / 2**20, 1),
    }


# --- command -------------------------------------------------------------------------------------


def _names(text: str, known: Mapping[str, Any] | tuple[str, ...], what: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise typer.BadParameter(f"{what} must be one of {', '.join(known)}, got {name}")
    return names


def earlier(device: torch.device) -> list[dict[str, Any]]:
    """Rows that were measured before of the very same code, to be kept beside new ones."""
    path = results.ROOT / results.device_name(device) / f"{NAME}.json"
    if not path.exists():
        return []
    content = json.loads(path.read_text())
    now = results.versions(device)
    same = all(content["environment"].get(key) == now[key] for key in ("commit", "torch"))
    return content["rows"] if same and not now["uncommitted"] else []


def merged(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All rows, new ones in the places of old ones of the same size and side, kernels beside
    times."""
    rows: dict[str, dict[str, Any]] = {}
    for row in [*old, *new]:
        key = json.dumps([row["size"], row["side"]])
        beside = {**rows.get(key, {}), **row} if "kernels" in row else row
        rows[key] = beside
    return list(rows.values())


def table(rows: list[dict[str, Any]]) -> str:
    """A line a cell, for the terminal."""
    lines = []
    for row in rows:
        size = row["size"]
        title = f"{size['model']} b{size['batch']:<3} {row['side']:<30}"
        if "kernels" in row:
            together = sum(kernel["us_a_call"] for kernel in row["kernels"])
            lines.append(f"{title} kernels {together:8.0f} µs together")
            continue
        if "absent" in row:
            lines.append(f"{title} absent: {row['absent']}")
            continue
        peak = f"{row['peak_mib'] / 1024:.2f} GiB" if "peak_mib" in row else ""
        lines.append(
            f"{title} prefill {row['prefill_ms']:8.1f} ms  {row['ms_per_token']:8.3f} ms/token  "
            f"{row['tokens_per_s']:8.1f} tokens/s  {peak}"
        )
    return "\n".join(lines)


def main(
    models: Annotated[str, typer.Option(help="As LLaVA-1.5-7B,Qwen3-VL-2B.")] = (
        "LLaVA-1.5-7B,Qwen3-VL-2B"
    ),
    batches: Annotated[str, typer.Option(help="Rows, as 1,8,32.")] = "1,8",
    sides: Annotated[str, typer.Option(help="As 'bf16,grace,grace compiled'.")] = "",
    new_tokens: Annotated[int, typer.Option(min=2, help="Length of an answer.")] = 128,
    repeats: Annotated[int, typer.Option(min=1, help="Samples a cell, behind two.")] = 3,
    profile: Annotated[bool, typer.Option(help="Kernels of a step instead of times.")] = False,
    device: Annotated[str, typer.Option(help="cuda or cpu; cuda where there is one.")] = "",
    tiny: Annotated[bool, typer.Option("--tiny", help="Tiny models, 8 tokens: a trial.")] = False,
    keep: Annotated[bool, typer.Option(help="Write benchmarks/results.")] = True,
) -> None:
    """Times whole answers with images: bf16 as transformers generates, and packed at 4 bits."""
    on = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if tiny:
        models, new_tokens, repeats = ",".join(TINY), 8, 1
    rows = [int(batch) for batch in batches.split(",")]
    chosen = _names(models, tuple(generation.PROMPTS), "model")
    plan = Plan(chosen, rows, _names(sides, SIDES, "side"), new_tokens, repeats, profile)
    if profile:
        if on.type != "cuda":
            raise typer.BadParameter(f"--profile must be on a GPU, got {on}")
        profile_kernels.launch_one_by_one("benchmarks.bench_generate", _arguments())
    run(plan, on, keep)


def _arguments() -> list[str]:
    """Of the command line, whichever program was called by it."""
    given = sys.argv[1:]
    return given[given.index(NAME) + 1 :] if NAME in given else given


def run(plan: Plan, device: torch.device, keep: bool) -> list[dict[str, Any]]:
    """Runs and prints a plan; with ``keep``, every cell is on disk when it is done."""
    ceiling: Ceiling = measure_ceiling(device)
    done = earlier(device) if keep else []
    for row in rows_of(plan, device):
        if plan.profile and not {"kernels", "absent"} & set(row):
            continue
        if "weights_mib" in row:
            read = generation.read_mib(row["weights_mib"]) * 2**20
            row["floor_ms"] = round(1000 * read / ceiling.bytes_per_second, 4)
        done = merged(done, [row])
        print(table([row]), flush=True)
        if keep:
            results.write(NAME, device, ceiling, done)
    return done


if __name__ == "__main__":
    typer.run(main)
