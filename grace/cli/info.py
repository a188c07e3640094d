"""`grace info`: versions, build, devices, and which kernel runs for every op."""

from typing import Annotated, Any

import typer

_PACKAGES = ("torch", "transformers", "accelerate", "compressed-tensors", "safetensors")


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Versions, how the library was built, devices, and which kernel every op runs."""
    facts = collect()
    if as_json:
        import json

        typer.echo(json.dumps(facts, indent=1))
    else:
        _show(facts)


def collect() -> dict[str, Any]:
    """What `grace info` tells: versions, build, devices, ops."""
    import platform
    import warnings

    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is not compiled stands in the table
        import grace.ops  # noqa: F401 (defines the ops)
    from grace import __version__, _library

    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    devices = ["cpu", *(torch.cuda.get_device_name(index) for index in gpus)]
    names = [name for name in _library.schemas() if not name.endswith("_backward")]
    return {
        "versions": {
            "grace": __version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in _PACKAGES},
        },
        "build": _library.build_info(),
        "devices": devices,
        "threads": torch.get_num_threads(),
        "ops": {
            name: {device: _library.kernel_for(name, device) for device in ("cpu", "cuda")}
            for name in sorted(names)
        },
    }


def _version(package: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


def _show(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table("", "", show_header=False, box=None)
    for name, version in facts["versions"].items():
        table.add_row(name, version)
    build = facts["build"] or {"compiled library": "none: every op runs its PyTorch reference"}
    for name, fact in build.items():
        table.add_row(f"build: {name}", str(fact) or "none")
    table.add_row("devices", ", ".join(facts["devices"]))
    table.add_row("threads", str(facts["threads"]))
    console.print(table)
    ops = Table("op", "cpu", "cuda", title="kernels", title_justify="left")
    for name, kernels in facts["ops"].items():
        ops.add_row(name, kernels["cpu"], kernels["cuda"])
    console.print(ops)
