"""The certificate of a packed checkpoint: what was compared, what differed, of which files."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from grace.checkpoint import Checkpoint, read_json
from grace.logits_check import LogitsCheck
from grace.version import __version__

FILE = "grace_certificate.json"


@dataclass
class Certificate:
    """What was compared, and every difference that was found."""

    quantized_layers: int = 0
    other_tensors: int = 0
    codes: int = 0
    differences: list[str] = field(default_factory=list)
    logits: LogitsCheck | None = None
    files: dict[str, str] = field(default_factory=dict)  # name: sha256
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether the checkpoint is the model, in every code, scale, weight and tensor."""
        return not self.differences

    def summary(self) -> str:
        """One line for people."""
        if not self.ok:
            return f"differs in {len(self.differences)} places, first {self.differences[0]}"
        if not self.quantized_layers:
            return f"{len(self.files)} files are as certified"
        compared = (
            f"{self.quantized_layers} quantized layers ({self.codes} codes) and "
            f"{self.other_tensors} other tensors equal the reference"
        )
        if self.logits is None:
            return compared
        return (
            f"{compared}; logits differ by {self.logits.relative_error:.1e}, "
            f"{self.logits.top1_agreement:.1%} of the tokens come out the same"
        )

    def write(self, directory: Path) -> None:
        """Writes the certificate into the checkpoint's directory."""
        content = json.dumps({"ok": self.ok, **asdict(self)}, indent=2) + "\n"
        partial = directory / f".{FILE}.{os.getpid()}"
        try:
            partial.write_text(content, encoding="utf-8")
            partial.replace(directory / FILE)
        finally:
            partial.unlink(missing_ok=True)


def start(checkpoint: Checkpoint) -> Certificate:
    """A certificate that names the checkpoint's files and this machine's versions."""
    return Certificate(files=_hashes(checkpoint), versions=_versions())


def check_files(checkpoint: Checkpoint) -> Certificate:
    """Compares a checkpoint's files with the certificate that lies beside them."""
    written = read_json(checkpoint.directory / FILE)
    certificate = start(checkpoint)
    certificate.differences = [f"as certified: {text}" for text in written.get("differences", ())]
    expected = written.get("files") or {}
    for name in sorted(expected.keys() | certificate.files.keys()):
        if expected.get(name) != certificate.files.get(name):
            certificate.differences.append(f"{name}: sha256 differs from the certificate's")
    return certificate


def _hashes(checkpoint: Checkpoint) -> dict[str, str]:
    hashes = {}
    for file in [*checkpoint.files, checkpoint.directory / "config.json"]:
        digest = hashlib.sha256()
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
        hashes[file.name] = digest.hexdigest()
    return hashes


def _versions() -> dict[str, str]:
    import transformers

    return {
        "grace": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
