"""Result files: JSON with everything needed to read a number later, and tables made from it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Ceiling

ROOT = Path(__file__).parent / "results"

# Changed files without the results, which a run of several benchmarks changes as it goes.
_CHANGES = ("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude)results")


def device_name(device: torch.device) -> str:
    """A folder's name for the device: ``h200``, ``cpu-amd-epyc`` …."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device).removeprefix("NVIDIA ")
    else:
        name = "cpu-" + _cpu_model()
    return "-".join(name.lower().replace("(r)", "").replace("(tm)", "").split())


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def environment(device: torch.device, ceiling: Ceiling) -> dict:
    """Versions, device and measured ceilings of a run."""
    return versions(device) | {
        "read_gb_per_s": round(ceiling.bytes_per_second / 1e9, 1),
        "matmul_tflop_per_s": round(ceiling.flops_per_second / 1e12, 2),
    }


def versions(device: torch.device) -> dict:
    """What a measurement was made on, and of what code."""
    facts: dict[str, str | int | None] = {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        **_commit(),
    }
    if device.type == "cuda":
        facts["cuda"] = torch.version.cuda
        facts["driver"] = _driver()
    return facts


def _commit() -> dict[str, str | bool]:
    """Of the code measured; ``GRACE_COMMIT`` names it where a tree was copied without its git."""
    if (named := os.environ.get("GRACE_COMMIT", "")) != "":
        return {"commit": named, "uncommitted": False}
    return {
        "commit": _output("git", "rev-parse", "HEAD") or "unknown",
        "uncommitted": _output("git", *_CHANGES) != "",
    }


def _driver() -> str:
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return (_output(*query) or "unknown").splitlines()[0]


def _output(*command: str) -> str | None:
    """What a command prints; None where it fails or does not exist."""
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def write(name: str, device: torch.device, ceiling: Ceiling, rows: list[dict]) -> Path:
    """Writes ``results/<device>/<name>.json``, whole or not at all."""
    path = _path(name, device)
    content = {"benchmark": name, "environment": environment(device, ceiling), "rows": rows}
    write_whole(path, json.dumps(content, indent=1) + "\n")
    _partial(path).unlink(missing_ok=True)
    return path


def with_other_sizes(name: str, device: torch.device, rows: list[dict]) -> list[dict]:
    """The rows, and behind them those that the committed result has of other sizes, each with the
    ``commit`` that it was measured at."""
    path = _path(name, device)
    if not path.exists():
        return rows
    content = json.loads(path.read_text())
    measured, before = [row["size"] for row in rows], content["environment"]["commit"]
    others = [row for row in content["rows"] if row["size"] not in measured]
    return rows + [{"commit": before, **row} for row in others]


def since(row: Mapping[str, Any]) -> str:
    """Behind the name of a size that was measured at another commit than the rest."""
    return f" (commit {row['commit'][:7]})" if "commit" in row else ""


def write_partial(name: str, device: torch.device, ceiling: Ceiling, rows: list[dict]) -> Path:
    """Writes what a run has so far to ``<name>.partial.json``, which no table reads."""
    path = _partial(_path(name, device))
    content = {"benchmark": name, "environment": environment(device, ceiling), "rows": rows}
    write_whole(path, json.dumps(content) + "\n")
    return path


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that it is never there in part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text)
    beside.replace(path)


def _path(name: str, device: torch.device) -> Path:
    return ROOT / device_name(device) / f"{name}.json"


def _partial(path: Path) -> Path:
    return path.with_suffix(".partial.json")


def table(content: dict) -> str:
    """Markdown: a line a size, a column a side (µs, median) and grace's ratio to each peer."""
    rows = [row for row in content["rows"] if "us" in row]
    sides = list(dict.fromkeys(row["side"] for row in rows))
    sizes = list(dict.fromkeys(json.dumps(row["size"]) for row in rows))
    peers = [side for side in sides if side != "grace"]
    head = ["size", "floor", *sides, *(f"grace vs {peer}" for peer in peers)]
    lines = [head, ["---"] * len(head)]
    for size in sizes:
        here = {row["side"]: row for row in rows if json.dumps(row["size"]) == size}
        times = [f"{here[s]['us']:.1f}" if s in here else "–" for s in sides]
        ratios = [_ratio(here, peer) for peer in peers]
        floor = f"{next(iter(here.values()))['floor_us']:.1f}"
        lines.append([_size_text(json.loads(size)), floor, *times, *ratios])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _ratio(here: dict[str, dict], peer: str) -> str:
    if peer not in here or "grace" not in here:
        return "–"
    return f"{here[peer]['us'] / here['grace']['us']:.2f}×"


def _size_text(size: dict) -> str:
    return " ".join(f"{key}={value}" for key, value in size.items())
