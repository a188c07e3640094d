"""``python -m benchmarks.scaling``: how training speed grows with the number of GPUs.

Weak scaling: every rank has the same micro-batches, so that N GPUs that lost nothing would do N
times the tokens a second of one. For each way of sharing the work (DDP; FSDP2 of the student;
FSDP2 of student and teacher) one torchrun is started for every number of GPUs:

    efficiency = tokens/s on N GPUs / (N · tokens/s of the same step on one GPU without sharing)

A step is `GraceTrainer`'s own, with a teacher, GDKD, RCKA, fake quantization and AdamW, on a LLaVA
with random weights and rows that lie in memory. Written to ``benchmarks/results/<gpu>/
scaling.json``. ``--size tiny`` runs it on a CPU, over gloo, and is for tests.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    TrainerCallback,
)

from benchmarks import results

SIDES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp2": {"fsdp": True},
    "fsdp2, teacher too": {"fsdp": True, "teacher_fsdp": True},
}
_IMAGE = 5  # the token of an image


@dataclass(frozen=True)
class Size:
    """Student and teacher (width, inner, layers, heads), vision tower (width, layers, pixels,
    patch), vocabulary, tokens a row, rows a micro-batch, steps before and while timing, and whether
    it is of GPUs."""

    student: tuple[int, int, int, int]
    teacher: tuple[int, int, int, int]
    vision: tuple[int, int, int, int]
    vocabulary: int
    tokens: int
    rows: int
    group_size: int
    warm: int
    timed: int
    cuda: bool


SIZES = {
    # 1.1 billion parameters under 3 billion; 576 visual tokens an image.
    "default": Size(
        student=(2048, 5632, 22, 16),
        teacher=(3072, 8192, 26, 24),
        vision=(1024, 24, 336, 14),
        vocabulary=32064,
        tokens=1024,
        rows=4,
        group_size=128,
        warm=4,
        timed=16,
        cuda=True,
    ),
    "tiny": Size(
        student=(16, 32, 2, 2),
        teacher=(32, 32, 3, 2),
        vision=(16, 1, 16, 8),
        vocabulary=64,
        tokens=16,
        rows=2,
        group_size=16,
        warm=1,
        timed=2,
        cuda=False,
    ),
}


def make_model(size: Size, text: tuple[int, int, int, int], device: torch.device) -> Any:
    """A LLaVA with random weights, made on the device in fp32."""
    width, inner, layers, heads = text
    vision_width, vision_layers, pixels, patch = size.vision
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=vision_width,
            intermediate_size=4 * vision_width,
            num_hidden_layers=vision_layers,
            num_attention_heads=max(1, vision_width // 64),
            image_size=pixels,
            patch_size=patch,
            projection_dim=vision_width,
        ),
        text_config=LlamaConfig(
            vocab_size=size.vocabulary,
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=max(64, size.tokens),
        ),
        image_token_index=_IMAGE,
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return LlavaForConditionalGeneration(config)


class Rows(torch.utils.data.Dataset):
    """Rows of one image each; the tokens behind it are supervised."""

    def __init__(self, size: Size, count: int) -> None:
        _, _, pixels, patch = size.vision
        self.size, self.count, self.pixels = size, count, pixels
        self.visual = (pixels // patch) ** 2

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(index)
        ids = torch.randint(_IMAGE + 1, self.size.vocabulary, (self.size.tokens,), generator=random)
        ids[1 : 1 + self.visual] = _IMAGE
        labels = ids.clone()
        labels[: 1 + self.visual] = -100
        pixels = torch.rand(3, self.pixels, self.pixels, generator=random)
        return {"input_ids": ids, "labels": labels, "pixel_values": pixels}


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


class Clock(TrainerCallback):
    """Seconds of each step, with the device idle at both ends."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: list[float] = []
        self.started = 0.0

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Start."""
        self.started = self._now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Take a step's time."""
        now = self._now()
        self.seconds.append(now - self.started)
        self.started = now


def measure(size: Size, side: str, accumulation: int, out: Path) -> None:
    """In a rank: train, and let rank 0 write what it took."""
    from grace.training import GraceConfig, GraceTrainer

    options = SIDES[side] if int(os.environ.get("WORLD_SIZE", "1")) > 1 else {}
    steps = size.warm + size.timed
    with tempfile.TemporaryDirectory() as folder:
        config = GraceConfig(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=size.rows,
            gradient_accumulation_steps=accumulation,
            group_size=size.group_size,
            learning_rate=1e-5,
            bf16=size.cuda,
            use_cpu=not size.cuda,
            gradient_checkpointing=size.cuda,
            logging_steps=10**6,
            save_strategy="no",
            dataloader_num_workers=2 if size.cuda else 0,
            disable_tqdm=True,
            **options,
        )
        clock = Clock(config.device)
        teacher = make_model(size, size.teacher, config.device)
        trainer = GraceTrainer(
            make_model(size, size.student, config.device),
            config,
            teacher.to(torch.bfloat16) if size.cuda else teacher,
            train_dataset=Rows(size, steps * size.rows * accumulation * config.world_size),
            data_collator=collate,
            callbacks=[clock],
        )
        trainer.train()
    if trainer.is_world_process_zero():
        out.write_text(json.dumps(_row(trainer, size, side, accumulation, clock.seconds)))


def _row(trainer: Any, size: Size, side: str, accumulation: int, seconds: list[float]) -> dict:
    timed, ranks = seconds[size.warm :], trainer.args.world_size
    tokens = size.tokens * size.rows * accumulation * ranks
    device = trainer.args.device
    peak = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None
    return {
        "side": side,
        "gpus": ranks,
        "accumulation": accumulation,
        "step_ms": round(1e3 * statistics.median(timed), 2),
        "step_ms_spread": [round(1e3 * min(timed), 2), round(1e3 * max(timed), 2)],
        "tokens_per_second": round(tokens / statistics.median(timed), 1),
        "peak_mib": None if peak is None else round(peak, 1),
    }


def launch(size: str, side: str, gpus: int, accumulation: int) -> dict:
    """One torchrun; its row."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "row.json"
        torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}"]
        worker = ["-m", "benchmarks.scaling", "--size", size, "--worker", str(out)]
        chosen = ["--side", side, "--accumulation", str(accumulation)]
        subprocess.run([sys.executable, "-m", *torchrun, *worker, *chosen], check=True)
        return json.loads(out.read_text())


def with_efficiency(rows: list[dict]) -> list[dict]:
    """The rows, each with its `efficiency` against one GPU of the same accumulation."""
    alone = {row["accumulation"]: row["tokens_per_second"] for row in rows if row["gpus"] == 1}
    return [
        {
            **row,
            "efficiency": round(
                row["tokens_per_second"] / (row["gpus"] * alone[row["accumulation"]]), 4
            ),
        }
        for row in rows
    ]


def main(
    size: Annotated[str, typer.Option(help="default or tiny.")] = "default",
    gpus: Annotated[int, typer.Option(help="Ranks beside the one; 0: all GPUs.")] = 0,
    accumulation: Annotated[int, typer.Option(help="Micro-batches a step.")] = 1,
    side: Annotated[str, typer.Option(help="Only this side.")] = "",
    worker: Annotated[Path | None, typer.Option(hidden=True)] = None,
    keep: Annotated[bool, typer.Option(help="Write benchmarks/results.")] = True,
) -> None:
    """Measure every side on one GPU and on all of them."""
    if size not in SIZES or (side and side not in SIDES):
        raise typer.BadParameter(f"size and side must be of {[*SIZES]}, {[*SIDES]}")
    if worker is not None:
        measure(SIZES[size], side, accumulation, worker)
        return
    gpus = gpus or torch.cuda.device_count()
    if gpus < 2 or (SIZES[size].cuda and torch.cuda.device_count() < gpus):
        print(f"scaling needs two GPUs, found {torch.cuda.device_count()}: skipped")
        return
    sides = [side] if side else list(SIDES)
    rows = [launch(size, "ddp", 1, accumulation)]
    rows += [launch(size, name, gpus, accumulation) for name in sides]
    rows = with_efficiency(rows)
    for row in rows:
        print(json.dumps(row))
    if keep and SIZES[size].cuda:
        device = torch.device("cuda")
        content = {"benchmark": "scaling", "environment": results.versions(device), "rows": rows}
        path = results.ROOT / results.device_name(device) / "scaling.json"
        results.write_whole(path, json.dumps(content, indent=1) + "\n")
        print(f"written: {path}")


if __name__ == "__main__":
    typer.run(main)
