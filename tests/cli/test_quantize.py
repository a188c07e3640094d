"""`grace quantize`, as typed: from a checkpoint and rows to what `grace export` packs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_checkpoints import save_models
from transformers import AutoModelForImageTextToText

from grace.cli import main
from grace.evaluation import synthetic
from grace.nn import FakeQuantLinear, PackedLinear


def run(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    return int(left.value.code or 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("quantize")
    save_models(root)
    synthetic.training_rows(root / "rows", images=6, seed=0)
    return root


def test_quantize_then_export(folder: Path, capsys: pytest.CaptureFixture) -> None:
    method = "gptq"
    out = folder / method
    arguments = ["--method", method, "--data", folder / "rows" / "train.json", "--samples", "5"]
    assert run("quantize", folder / "student", out, *arguments, "--group-size", "16") == 0
    assert f"14 linears at 4 bits by {method}" in capsys.readouterr().out
    assert run("export", out, folder / f"{method}-packed") == 0
    low, packed = (
        AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
        for path in (out, folder / f"{method}-packed")
    )
    layers = {n: m for n, m in low.named_modules() if isinstance(m, FakeQuantLinear)}
    assert len(layers) == 14
    for name, layer in layers.items():
        other = packed.get_submodule(name)
        assert isinstance(other, PackedLinear)
        assert torch.equal(other.dequantize().float(), layer.quantized_weight())
    assert (folder / f"{method}-packed" / "processor_config.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "gptq"), "gptq must have --data to calibrate with"),
        (("--method", "spqr"), "--method must be one of rtn, gptq, awq, got 'spqr'"),
        (("--method", "rtn", "--data", "absent.json"), "--data must not be given with rtn"),
        (
            ("--method", "gptq", "--data", "absent.json"),
            "must be a file, got nothing at absent.json",
        ),
        (
            ("--method", "rtn", "--group-size", "5"),
            "group_size must divide in_features 32 or be -1, got 5",
        ),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    arguments: tuple[str, ...],
    message: str,
    folder: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(folder)
    assert run("quantize", "student", "nothing", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not Path("nothing").exists()
