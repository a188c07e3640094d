"""What a YAML file of a run may say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_checkpoints import save_models

from grace.training.run import load_teacher
from grace.training.run_config import RunConfig, read_config


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = save_models(tmp_path_factory.mktemp("models"))
    (root / "rows.json").write_text("[]")
    return root


def _read(root: Path, *overrides: str, **options: Any) -> RunConfig:
    common = {
        "student": str(root / "student"),
        "teacher": str(root / "teacher"),
        "data": str(root / "rows.json"),
        "output_dir": str(root / "run"),
        "use_cpu": True,
    }
    (root / "config.yaml").write_text(yaml.safe_dump({**common, **options}))
    return read_config(root / "config.yaml", overrides)


def test_quantization_under_one_heading(root: Path) -> None:
    quantization = {
        "bits": 8,
        "group_size": 32,
        "scale_dtype": None,
        "overrides": {"down_proj$": {"bits": 4}, "lm_head": None},
    }
    training = _read(root, quantization=quantization).training
    assert training.quantization is True
    assert (training.bits, training.group_size, training.scale_dtype) == (8, 32, None)
    assert training.overrides == quantization["overrides"]


def test_a_run_without_quantization(root: Path) -> None:
    assert _read(root, quantization=False).training.quantization is False
    assert _read(root, quantization={"enabled": False}).training.quantization is False


@pytest.mark.parametrize(("given", "found"), [("eager", "eager"), (None, "sdpa")])
def test_attention(root: Path, given: str | None, found: str) -> None:
    teacher = load_teacher(_read(root, attn_implementation=given))
    assert teacher.config._attn_implementation == found
    assert teacher.config.text_config._attn_implementation == found


@pytest.mark.parametrize("override", ["quantization.bits=3", "bits=3"])
def test_an_override_reaches_under_the_heading(root: Path, override: str) -> None:
    training = _read(root, override, "skip=[down]", quantization={"bits": 8}).training
    assert (training.bits, training.skip) == (3, ["down"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantization": {"bit": 4}}, "option quantization.bit, did you mean 'bits'"),
        ({"quantization": {"bits": 4}, "bits": 8}, "bits must be given once"),
        ({"quantization": {"bits": 1}}, "bits must be 2 to 8, got 1"),
    ],
)
def test_headings_that_do_not_fit(root: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _read(root, **options)
