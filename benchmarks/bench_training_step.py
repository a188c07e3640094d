"""A whole training step without its optimizer: `GraceTrainer`'s loss and backward, against the
authors' step in plain PyTorch; beside it the student's fine-tuning and the teacher's forward alone.

Models have the public configs' sizes and random weights; the vision tower is frozen, decoder layers
are checkpointed, attention is sdpa. Half of a segment's tokens or so are supervised. All sides work
on the same Parameters, in `masters` dtype: bfloat16 as the authors train, or float32 under autocast
as `GraceTrainer` does. Scales stay float32, as theirs: on a coarser grid many weights lie half way
between two codes, and all sides would not quantize alike. Memory of a side is beside both models
(`resident_mib`). Ours is compared with the authors' step by the gradient that all three terms reach
first.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import OURS, Absent, Benchmark, Case, Side
from benchmarks.models import config_of
from benchmarks.profiling import breakdown, phases
from benchmarks.training_step import (
    GROUP,
    Authors,
    Shape,
    build,
    make_batch,
    replace_layers,
    with_own_layers,
)
from grace.nn.quantize_ahead import release, size_made
from grace.training import GraceConfig, GraceTrainer
from grace.training.memory_plan import Load, activations
from grace.training.model_sizes import ModelSize, empty_model, size_of

_ROOM = 6 * 2**30  # bytes for logits in chunks, one layer's weights and libraries
_MICRO = "grace_micro_batch"
SETTINGS = {"bits": 4, "group_size": GROUP, "skip": None, "overrides": None}


class Step:
    """Both models, a batch, and every side's call on them."""

    def __init__(
        self, student: str, teacher: str, shape: Shape, masters: torch.dtype, device: torch.device
    ) -> None:
        dtype = torch.bfloat16 if device.type == "cuda" else masters
        self.device, self.student = device, build(student, device, dtype)
        mixed = masters == torch.float32 and device.type == "cuda"
        self.plain, theirs = (with_own_layers(self.student) for _ in range(2))
        options = {"bf16": mixed, "use_cpu": device.type == "cpu", "report_to": "none"}
        options["gradient_checkpointing"] = True  # as `build` makes the models
        self._folder = tempfile.TemporaryDirectory()  # the trainer wants one
        config = GraceConfig(
            output_dir=self._folder.name,
            group_size=GROUP,
            scale_init="absmax",
            scale_dtype=None,
            disable_tqdm=True,
            **options,
        )
        self.trainer = GraceTrainer(self.student, config, build(teacher, device, dtype))
        for name, parameter in self.student.named_parameters():
            if not name.endswith("log_scale"):  # the trainer holds fp32; no buffer may change
                parameter.data = parameter.data.to(masters)
        layers = self.trainer.adapter.layers
        self.trainer.holds_quantized = config.holds_quantized(size_made(layers, config.loss_dtype))
        replace_layers(theirs, self.student)
        for model in (self.student, self.plain, theirs):
            model.train()
        accelerator = self.trainer.accelerator
        self.model = accelerator.prepare_model(self.student) if mixed else self.student
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=mixed)
        self.batch = make_batch(self.student.config, shape, device, dtype)
        frozen = self.trainer.teacher.model
        self.authors = Authors(theirs, frozen, self.batch, shape, self.autocast)
        # Of the layer whose output RCKA looks at: all three terms come through it.
        self.probe = self.trainer.adapter.layers[-2].mlp.down_proj.weight

    def gradient(self, loss: Callable[[], Tensor]) -> Tensor:
        """Forward and backward; all gradients but the probe's are gone on return."""
        self._clear()
        try:
            loss().backward()
            assert self.probe.grad is not None
            return self.probe.grad
        finally:
            self._clear()

    def _clear(self) -> None:
        for parameter in self.student.parameters():
            parameter.grad = None

    def ours(self) -> Tensor:
        """The trainer's step, teacher included."""
        try:
            return self.gradient(lambda: self.trainer.compute_loss(self.model, dict(self.batch)))
        finally:
            release(self.trainer.adapter.layers)
            self.trainer._meter.take(interrupted=False)

    def other_way(self) -> Tensor:
        """Quantized weights held if by default they are not, or not held if they are."""
        trainer = self.trainer
        trainer.holds_quantized = not trainer.holds_quantized
        try:
            return self.ours()
        finally:
            trainer.holds_quantized = not trainer.holds_quantized

    def theirs(self) -> Tensor:
        """The authors' step."""
        return self.gradient(self.authors.loss)

    def fine_tuning(self) -> Tensor:
        """The student's own loss on whole logits, without quantization."""

        def loss() -> Tensor:
            with self.autocast:
                return self.plain(**self.batch, use_cache=False).loss

        return self.gradient(loss)

    def teaching(self) -> None:
        """The teacher's forward, up to its last hidden states."""
        with torch.inference_mode():
            self.trainer.teacher.model(**self.authors.inputs, use_cache=False, logits_to_keep=1)

    def phases(self) -> dict[str, float]:
        """Milliseconds of the parts of our step."""
        batch: dict[str, Any] = dict(self.batch)
        found: list[Tensor] = []

        def plan() -> None:
            batch[_MICRO] = self.trainer._plan([batch])[0]

        def forward() -> None:
            found.append(self.trainer.compute_loss(self.model, batch))

        steps = (
            ("teacher", plan),
            ("student and losses", forward),
            ("backward", lambda: found[0].backward()),
        )
        try:
            return phases(steps, self.device)
        finally:
            self._clear()
            self.trainer._meter.take(interrupted=False)


def shortage(student: ModelSize, teacher: ModelSize, shape: Shape, masters: torch.dtype) -> str:
    """Why the models do not fit this GPU; empty where they do."""
    load = Load(shape.rows, shape.packed * shape.tokens)
    weights = masters.itemsize * (student.parameters + student.trainable)
    need = weights + 12 * student.log_scales + 2 * teacher.parameters + _ROOM
    need += activations(student, load, checkpointing=True)
    total = torch.cuda.get_device_properties(0).total_memory
    if need <= total:
        return ""
    return f"needs about {need / 2**30:.0f} GiB, this GPU has {total / 2**30:.0f}"


def fitting(call: Callable[[], Any]) -> Side:
    """A side that is absent, with the reason, where its memory does not suffice."""

    def side(_: int) -> Any:
        try:
            return call()
        except torch.OutOfMemoryError as reason:
            text = str(reason).splitlines()[0]
        torch.cuda.empty_cache()
        raise Absent(f"does not fit: {text}")

    return side


def setup(
    device: torch.device,
    pair: str,
    rows: int,
    packed: int,
    tokens: int,
    visual: int,
    supervised: int,
    masters: str,
) -> Case:
    names = PAIRS[pair]
    shape, dtype = Shape(rows, packed, tokens, visual, supervised), getattr(torch, masters)
    sizes = (
        size_of(empty_model(config_of(names[0])), settings=SETTINGS),
        size_of(empty_model(config_of(names[1]))),
    )
    why = shortage(*sizes, shape, dtype) if device.type == "cuda" else ""
    if why:
        sides = (OURS, "authors", "SFT", "teacher")
        return Case({}, lambda: torch.zeros(1), 0.0, absent=dict.fromkeys(sides, why))
    step = Step(*names, shape, dtype, device)
    work = {
        OURS: step.ours,
        "not held" if step.trainer.holds_quantized else "held": step.other_way,
        "authors": step.theirs,
        "SFT": step.fine_tuning,
        "teacher": step.teaching,
    }
    sides = {name: fitting(call) for name, call in work.items()}
    yardsticks = {name: sides.pop(name) for name in ("SFT", "teacher")}
    positions = rows * packed * tokens

    def exact() -> Tensor:
        """The authors' gradient; where their step does not fit, ours only repeats itself."""
        with contextlib.suppress(Absent):
            return sides["authors"](0)
        return step.ours()

    def facts(name: str) -> Callable[[Mapping[str, float]], dict[str, Any]]:
        return lambda medians: _facts(step, name, work[name], medians)

    return Case(
        sides=sides,
        yardsticks=yardsticks,
        exact=exact,
        # Every weight read forward and backward, its gradient written; the teacher's read.
        bytes=3 * dtype.itemsize * sizes[0].parameters + 2 * sizes[1].parameters,
        flops=2.0 * positions * (3 * sizes[0].parameters + sizes[1].parameters),
        tolerance=0.1 if device.type == "cuda" else 1e-3,
        eager=True,
        rounds=5,
        facts={name: facts(name) for name in work},
    )


def _facts(
    step: Step, name: str, call: Callable[[], Any], medians: Mapping[str, float]
) -> dict[str, Any]:
    """Beside time and memory: what the time goes to, and the ratio that we aim at."""
    found: dict[str, Any] = {"breakdown_ms": breakdown(call, step.device, 1e3 * medians[name])}
    if step.device.type == "cuda":
        found["resident_mib"] = round(torch.cuda.memory_allocated() / 2**20, 1)
    if name in (OURS, "held", "not held") and {"SFT", "teacher"} <= set(medians):
        found["of_sft_and_teacher"] = round(
            medians[name] / (medians["SFT"] + medians["teacher"]), 4
        )
    return found | ({"phases_ms": step.phases()} if name == OURS else {})


PAIRS = {
    "Qwen3-VL-2B<8B": ("Qwen3-VL-2B", "Qwen3-VL-8B"),
    "LLaVA-1.5-7B<13B": ("LLaVA-1.5-7B", "LLaVA-1.5-13B"),
    "tiny Qwen3-VL": ("tiny Qwen3-VL student", "tiny Qwen3-VL teacher"),
    "tiny LLaVA": ("tiny LLaVA student", "tiny LLaVA teacher"),
}
_KEYS = ("pair", "rows", "packed", "tokens", "visual", "supervised", "masters")


def _size(*values: Any) -> dict[str, Any]:
    return dict(zip(_KEYS, values, strict=True))


BENCHMARK = Benchmark(
    "training_step",
    {
        "cuda": [
            _size("Qwen3-VL-2B<8B", 8, 1, 512, 196, 256, "bfloat16"),
            _size("Qwen3-VL-2B<8B", 8, 1, 512, 196, 256, "float32"),
            _size("Qwen3-VL-2B<8B", 2, 8, 512, 196, 256, "bfloat16"),
            _size("LLaVA-1.5-7B<13B", 4, 1, 1024, 576, 256, "bfloat16"),
            _size("LLaVA-1.5-7B<13B", 4, 1, 1024, 576, 256, "float32"),
        ],
        "cpu": [
            _size("tiny Qwen3-VL", 2, 1, 32, 4, 16, "float32"),
            _size("tiny Qwen3-VL", 1, 2, 32, 4, 16, "float32"),
            _size("tiny LLaVA", 2, 1, 48, 16, 16, "float32"),
        ],
    },
    setup,
)
