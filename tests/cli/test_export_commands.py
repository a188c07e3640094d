"""`grace export` and `grace verify`, as typed."""

from __future__ import annotations

from pathlib import Path

import models
import pytest

import grace
from grace.cli import main


def run(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    return int(left.value.code or 0)


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    model = models.qwen2()
    grace.quantize(model, group_size=32)
    model.save_pretrained(tmp_path / "trained")
    return tmp_path / "trained"


def test_export_then_verify(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "out"
    assert run("export", trained, out, "--dtype", "bfloat16") == 0
    assert "14 quantized layers (73728 codes)" in capsys.readouterr().out
    assert run("verify", out, trained) == 0
    assert run("verify", out) == 0
    (out / "config.json").write_text((out / "config.json").read_text() + " ")
    assert run("verify", out) == 1
    assert "config.json: sha256 differs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("export", "nowhere", "out"), "must be a directory, got nothing"),
        (("export", "trained", "out", "--format", "gguf"), "format must be one of"),
        (("export", "trained", "out", "--dtype", "int8"), "dtype must be one of"),
        (("export", "trained", "full"), "must be new or empty"),
        (("verify", "nowhere"), "must be a directory, got nothing"),
        (("verify", "full"), "config.json must exist"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    arguments: tuple[str, ...],
    message: str,
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter").write_text("dear")
    assert run(*arguments) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert told[-1].startswith("grace: ")
    assert message in told[-1]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["full", "trained"]
