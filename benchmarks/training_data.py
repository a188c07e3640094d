"""How long until the first batch of a large data set, and in how much memory.

    python -m benchmarks.training_data --rows 665000 --out results.json

writes a file of that many rows (LLaVA's form, about 1.5 kB each, some of several turns and some
without an image) as JSON and as JSON lines, and starts a run's data on each in a process of its
own: once without an index, once with the one that the first start left. The image is one file, so
that what is measured is the data layer and not a disk.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_WORDS = ["is", "there", "a", "red", "green", "blue", "star", "circle", "left", "right", "above"]


def rows(count: int) -> Iterator[dict[str, Any]]:
    """Rows like those of LLaVA's instruction mix: 1 to 5 answers, a tenth without an image."""
    draw = random.Random(0)
    for number in range(count):
        turns = []
        for turn in range(draw.randint(1, 5)):
            mark = "<image>\n" if turn == 0 and number % 10 else ""
            question = mark + " ".join(draw.choices(_WORDS, k=draw.randint(6, 30))) + " ?"
            answer = " ".join(draw.choices(_WORDS, k=draw.randint(3, 80)))
            turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        image = {"image": "one.png"} if number % 10 else {}
        yield {"id": f"{number:09d}", **image, "conversations": turns}


def write(path: Path, count: int) -> None:
    """The rows in a file of the form that its suffix says."""
    with path.open("w") as file:
        listed = path.suffix == ".json"
        file.write("[" if listed else "")
        for number, row in enumerate(rows(count)):
            file.write(", " if listed and number else "")
            file.write(json.dumps(row) + ("" if listed else "\n"))
        file.write("]" if listed else "")


def start(path: Path, pack_length: int | None, check_files: bool) -> dict[str, float]:
    """Seconds until data set, order and first batch are there, and peak memory, of this process.

    Seconds of this process's own on a core stand beside: they do not grow with the machine's load.
    """
    from torch.utils.data import DataLoader

    from grace.evaluation import tiny
    from grace.training import GraceConfig
    from grace.training.data_config import build_collator, build_dataset, parse_data
    from grace.training.sampler import EpochSampler

    processor, model = tiny.make_processor(), tiny.make_model(tiny.STUDENT, 0)
    options = {"path": str(path), "pack_length": pack_length, "check_files": check_files}
    data, before = parse_data(options), _memory()
    began, worked = time.perf_counter(), time.process_time()
    training = GraceConfig(output_dir=str(path.parent / "run"), use_cpu=True)
    dataset = build_dataset(data, training, processor)
    ready = time.perf_counter()
    collator = build_collator(data, processor, model)
    sampler = EpochSampler(len(dataset), 0)
    loader = DataLoader(dataset, 4, sampler=sampler, collate_fn=collator, num_workers=2)
    next(iter(loader))
    first, worked = time.perf_counter(), time.process_time() - worked
    return {
        "items": len(dataset),
        "seconds_until_data_set": round(ready - began, 2),
        "seconds_until_first_batch": round(first - began, 2),
        "cpu_seconds": round(worked, 2),
        "load": round(os.getloadavg()[0], 1),
        "peak_mib_above_imports": round((_memory() - before) / 2**10),
    }


def _memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(path: Path, *options: str) -> dict[str, float]:
    """`start` in a process of its own."""
    program = [sys.executable, "-m", "benchmarks.training_data", "--start", str(path), *options]
    done = subprocess.run(program, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure_all(count: int, folder: Path) -> dict[str, Any]:
    """Every form of file, first and second start, plain and packed."""
    import torch
    from PIL import Image

    from benchmarks.results import versions

    Image.new("RGB", (32, 32), "red").save(folder / "one.png")
    found: dict[str, Any] = {**versions(torch.device("cpu")), "rows": count, "starts": []}
    for suffix in (".json", ".jsonl"):
        path = folder / f"rows{suffix}"
        write(path, count)
        size = round(path.stat().st_size / 2**20)
        for name, options in (
            ("first", []),
            ("second", []),
            ("second, without looking for files", ["--no-check-files"]),
            ("second, packed to 2048", ["--pack-length", "2048", "--no-check-files"]),
        ):
            numbers = measure(path, *options)
            found["starts"].append({"file": suffix, "mib": size, "start": name, **numbers})
            print(found["starts"][-1], flush=True)
        path.unlink()
    return found


def main() -> None:
    """Parse arguments; measure, or be one of the processes that are measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=665_000)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--pack-length", type=int)
    parser.add_argument("--no-check-files", dest="check_files", action="store_false")
    arguments = parser.parse_args()
    if arguments.start:
        found = start(arguments.start, arguments.pack_length, arguments.check_files)
        print(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as folder:
        result = measure_all(arguments.rows, Path(folder))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
