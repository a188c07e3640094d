"""`grace train --plan` on the worked configurations, from the models' configs alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForImageTextToText

from benchmarks.models import CONFIGS
from grace.cli import main
from grace.training.model_sizes import empty_model, read_config, size_of

CONFIG_FILES = Path(__file__).parents[2] / "configs"
WORKED = {
    "qwen3-vl-2b-from-8b": ("Qwen3-VL-2B", "Qwen3-VL-8B"),
    "qwen2-vl-2b-from-7b": ("Qwen2-VL-2B", "Qwen2-VL-7B"),
    "llava-1.5-7b-from-13b": ("LLaVA-1.5-7B", "LLaVA-1.5-13B"),
}
# As the model cards of the public checkpoints have them, in millions.
PARAMETERS = {
    "Qwen3-VL-2B": 2128,
    "Qwen3-VL-8B": 8767,
    "Qwen2-VL-2B": 2209,
    "Qwen2-VL-7B": 8291,
    "LLaVA-1.5-7B": 7063,
    "LLaVA-1.5-13B": 13351,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder a model, with config.json and nothing else."""
    root = tmp_path_factory.mktemp("configs")
    for name, config in CONFIGS.items():
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps(config))
    return root


def _plan(capsys: pytest.CaptureFixture, *arguments: Any) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(["train", "--plan", *map(str, arguments)])
    printed = capsys.readouterr()
    return int(stop.value.code or 0), printed.out, printed.err


def _sum(out: str) -> list[float]:
    """GiB with activations kept and with checkpointing."""
    line = next(line for line in out.splitlines() if line.startswith("sum"))
    return [float(word) for word in line.split()[1:]]


def test_every_worked_configuration_is_tested() -> None:
    assert {path.stem for path in CONFIG_FILES.glob("*.yaml")} == set(WORKED)


@pytest.mark.parametrize("name", WORKED)
def test_worked_configurations(
    name: str, root: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("a plan loads no weights")

    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", load)
    student, teacher = (root / model for model in WORKED[name])
    file = CONFIG_FILES / f"{name}.yaml"
    code, out, _ = _plan(capsys, file, f"student={student}", f"teacher={teacher}")
    assert code == 0
    for model in WORKED[name]:
        assert f"{PARAMETERS[model] / 1000:.3f}B parameters" in out
    kept, checkpointing = _sum(out)
    assert checkpointing < kept
    # 16 bytes a trained parameter and 2 of the teacher are the least.
    size = [PARAMETERS[model] * 1e6 / 2**30 for model in WORKED[name]]
    assert checkpointing > 16 * 0.7 * size[0] + 2 * size[1]
    assert "4 rows of 2048 tokens a GPU, 1 GPU(s), products in bf16" in out


@pytest.mark.parametrize("model", PARAMETERS)
def test_sizes_are_those_of_the_public_checkpoints(model: str, root: Path) -> None:
    size = size_of(empty_model(read_config(str(root / model))))
    assert round(size.parameters / 1e6) == PARAMETERS[model]


def test_gpus_and_tokens(root: Path, capsys: pytest.CaptureFixture) -> None:
    student, teacher = (root / model for model in WORKED["qwen3-vl-2b-from-8b"])
    file = CONFIG_FILES / "qwen3-vl-2b-from-8b.yaml"
    models = (f"student={student}", f"teacher={teacher}")
    sums = [
        _sum(_plan(capsys, *options, file, *models, *overrides)[1])[1]
        for options, overrides in (
            ((), ()),
            (("--tokens", "4096"), ()),
            (("--gpus", "8"), ("fsdp=true",)),
            ((), ("omega=0", "distillation=none")),
        )
    ]
    assert sums[1] > sums[0] > sums[2]
    assert sums[3] < sums[0] - 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "0"], "plan: gpus must be at least 1, got 0"),
        (["student=./none"], "model must be a directory with config.json, got ./none"),
        (["group_size=100"], "group_size must divide in_features 2048 or be -1, got 100"),
        (['quantization={overrides: {"lm_head": {bits: 8}}}'], "must match decoder linears"),
    ],
)
def test_plans_that_cannot_be_made(
    root: Path, capsys: pytest.CaptureFixture, arguments: list[str], message: str
) -> None:
    student, teacher = (root / model for model in WORKED["qwen3-vl-2b-from-8b"])
    file = CONFIG_FILES / "qwen3-vl-2b-from-8b.yaml"
    models = (f"student={student}", f"teacher={teacher}")
    code, _, err = _plan(capsys, file, *models, *arguments)
    assert code == 2
    assert message in err


def test_worked_configurations_name_presets_and_nothing_unknown() -> None:
    for name in WORKED:
        options = yaml.safe_load((CONFIG_FILES / f"{name}.yaml").read_text())
        assert options["preset"] == ("qwen3vl" if "qwen3" in name else "paper")
