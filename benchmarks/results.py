"""Result files: JSON with everything needed to read a number later, and tables made from it."""

from __future__ import annotations

import json
import platform
import subprocess
from pathlib import Path

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
    facts = {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted": _git(*_CHANGES) != "",
        "read_gb_per_s": round(ceiling.bytes_per_second / 1e9, 1),
        "matmul_tflop_per_s": round(ceiling.flops_per_second / 1e12, 2),
    }
    if device.type == "cuda":
        facts["cuda"] = torch.version.cuda
        facts["driver"] = _driver()
    return facts


def _git(*arguments: str) -> str:
    here = Path(__file__).parent
    done = subprocess.run(
        ["git", *arguments], cwd=here, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 else "unknown"


def write(name: str, device: torch.device, ceiling: Ceiling, rows: list[dict]) -> Path:
    """Writes ``results/<device>/<name>.json``, whole or not at all."""
    path = ROOT / device_name(device) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    content = {"benchmark": name, "environment": environment(device, ceiling), "rows": rows}
    beside.write_text(json.dumps(content, indent=1) + "\n")
    beside.replace(path)
    return path


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
