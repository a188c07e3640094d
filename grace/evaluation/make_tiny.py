"""Make the tiny teacher and student from scratch: `python -m grace.evaluation.make_tiny`.

`grace.evaluation.tiny_training` tells how they learn. Minutes on a GPU or two idle CPU cores.
`make_tiny.json` beside the checkpoints records seed, recipe, steps, time, device, scores, versions
and the hashes of the files.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

import torch
import transformers
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from . import mme, synthetic, tiny
from .answer import answer
from .tiny_training import Recipe, Report, train

HELDOUT_IMAGES = 200  # a subtask: 2400 questions in all
HELDOUT_SEED = 20261123

# The student stops long before it has learned all it can: there has to be something to distill.
RECIPES = {
    "teacher": Recipe(
        tiny.TEACHER, threshold=0.95, drill=800, early=1600, steps=2400, cooldown=500
    ),
    "student": Recipe(
        tiny.STUDENT, threshold=0.60, drill=800, early=1600, steps=2400, cooldown=300
    ),
}


def make(
    name: str, out: str | Path, *, seed: int = 0, device: str = "cpu", report: Report = print
) -> dict[str, Any]:
    """Train "teacher" or "student" and save it, whole or not at all, as `out/name`.

    Returns what `make_tiny.json` then records of it. Raises ValueError for another name.
    """
    if name not in RECIPES:
        raise ValueError(f"make_tiny: name must be one of {', '.join(RECIPES)}, got {name!r}")
    start, busy = time.perf_counter(), time.process_time()
    processor = tiny.make_processor()
    recipe = RECIPES[name]
    model: Any = tiny.make_model(recipe.size, seed)
    model.to(device)
    steps, validation = train(model, processor, recipe, Random(f"{name} {seed}"), report)
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    directory = Path(out) / name
    save(model, processor, directory)
    scores = evaluate(directory, device)
    report(f"{name}: held-out {json.dumps(scores['subtasks'])}")
    return {
        "seed": seed,
        "recipe": asdict(recipe),
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": steps,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(busy, 1),
        "device": _device_name(device),
        "threads": torch.get_num_threads(),
        "validation_accuracy": validation,
        "heldout": scores,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "sha256": {path.name: _sha256(path) for path in sorted(directory.iterdir())},
    }


def evaluate(directory: Path, device: str) -> dict[str, Any]:
    """MME scores of a saved checkpoint on the held-out benchmark of seed `HELDOUT_SEED`."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "heldout"
        synthetic.draw(root, images_per_subtask=HELDOUT_IMAGES, seed=HELDOUT_SEED)
        rows = mme.load(root)
        model: Any = transformers.AutoModelForImageTextToText.from_pretrained(directory)
        model.to(device)
        processor = transformers.AutoProcessor.from_pretrained(directory)
        said = answer(model, processor, rows, batch_size=128, max_new_tokens=1, progress=False)
    scores = mme.score(mme.answered(rows, said))
    return scores | {"benchmark_seed": HELDOUT_SEED, "images_per_subtask": HELDOUT_IMAGES}


def save(model: LlavaForConditionalGeneration, processor: LlavaProcessor, directory: Path) -> None:
    """Write a checkpoint beside `directory`, then put it in its place."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=directory.parent) as folder:
        made, old = Path(folder) / "made", Path(folder) / "old"
        model.save_pretrained(made)
        processor.save_pretrained(made)
        if directory.exists():
            os.replace(directory, old)
        os.replace(made, directory)


def _device_name(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()})"


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> None:
    """The command line; see the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=tiny.ROOT, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", choices=sorted(RECIPES), help="make one of the two")
    arguments = parser.parse_args()
    for name in [arguments.only] if arguments.only else RECIPES:
        made = make(name, arguments.out, seed=arguments.seed, device=arguments.device)
        _record(arguments.out / "make_tiny.json", name, made)


def _record(path: Path, name: str, made: dict[str, Any]) -> None:
    """Put what was made of one model into the record, leaving that of the other."""
    record = json.loads(path.read_text()) if path.is_file() else {}
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(record | {name: made}, indent=1, sort_keys=True) + "\n")
    os.replace(beside, path)


if __name__ == "__main__":
    main()
