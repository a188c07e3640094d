from __future__ import annotations

from typing import Any

import pytest
import torch

from grace.training import GraceConfig
from grace.training.config import PRESETS


def test_the_paper_s_preset_is_the_default(tmp_path: Any) -> None:
    default = GraceConfig(output_dir=str(tmp_path))
    for name, value in PRESETS["paper"].items():
        assert getattr(default, name) == value


def test_a_preset_yields_to_options(tmp_path: Any) -> None:
    config = GraceConfig.from_preset("qwen3vl", output_dir=str(tmp_path), tau=1.5)
    assert (config.tau, config.omega, config.beta_max) == (1.5, 3.0, 1.0)


def test_omega_rises_linearly_and_stays(tmp_path: Any) -> None:
    config = GraceConfig(output_dir=str(tmp_path), omega=3.0, omega_warmup_steps=4)
    assert [config.omega_at(step) for step in (0, 1, 3, 9)] == [0.75, 1.5, 3.0, 3.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 9}, r"GraceConfig: bits must be 2 to 8, got 9"),
        ({"bits": 4.0}, "bits must be 2 to 8, got 4.0"),
        ({"group_size": 0}, "group_size must be > 0 or -1, got 0"),
        ({"distillation": "dkd"}, "distillation must be one of .*, got 'dkd'"),
        ({"rcka_layer": -1}, "rcka_layer must be <= -2, got -1"),
        ({"temperature": 0.0}, "temperature must be > 0, got 0.0"),
        ({"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\), got 1.0"),
        ({"beta_init": 7.0}, r"beta_init must lie in \[0.1, 5.0\], got 7.0"),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, "use_reentrant"),
        ({"scale_dtype": "int8"}, "scale_dtype must be one of"),
        ({"attn_implementation": "flash"}, "attn_implementation must be None or one of .*'flash'"),
        ({"chunk_size": 64, "keep_logits": True}, "chunk_size must be None with keep_logits"),
        ({"overrides": ["x"]}, r"overrides must map regexes to options, got \['x'\]"),
        ({"overrides": {"(": None}}, "must have a regex as its key"),
        ({"overrides": {"x": 8}}, r"overrides\['x'\] must be null or options, got 8"),
        ({"overrides": {"x": {"bit": 8}}}, "must have bits, group_size, .*, got 'bit'"),
        ({"overrides": {"x": {"bits": 9}}}, r"overrides\['x'\].bits must be one of .*, got 9"),
    ],
)
def test_values_out_of_range(tmp_path: Any, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GraceConfig(output_dir=str(tmp_path), **options)


def test_the_values_of_the_second_preset(tmp_path: Any) -> None:
    config = GraceConfig.from_preset("qwen3vl", output_dir=str(tmp_path))
    assert (config.tau, config.eta) == (3.0, 0.003)
    assert (config.beta_init, config.beta_min, config.beta_max) == (0.5, 0.1, 1.0)
    assert (config.omega, config.omega_warmup_steps) == (3.0, 400)
    assert (config.temperature, config.alpha, config.beta_dkd) == (2.0, 1.0, 4.0)
    assert (config.ema_decay, config.scale_lr_ratio) == (0.99, 10.0)


def test_arguments_of_quantize(tmp_path: Any) -> None:
    overrides = {"a": {"scale_dtype": "float16", "bits": 8}, "b": None}
    config = GraceConfig(output_dir=str(tmp_path), overrides=overrides, skip=["c"], bits=3)
    settings = config.layer_settings()
    assert settings["overrides"] == {"a": {"scale_dtype": torch.float16, "bits": 8}, "b": None}
    assert (settings["bits"], settings["skip"], settings["scale_dtype"]) == (
        3,
        ["c"],
        torch.bfloat16,
    )


def test_unknown_names(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="preset must be one of paper, qwen3vl, got 'papr'"):
        GraceConfig.from_preset("papr")
    with pytest.raises(ValueError, match="unknown option 'group_sise', did you mean 'group_size'"):
        GraceConfig.from_preset("paper", group_sise=64)


def test_quantized_weights_are_held_where_checkpointing_would_make_them_twice(
    tmp_path: Any,
) -> None:
    def holds(size: int, **options: object) -> bool:
        return GraceConfig(output_dir=str(tmp_path), **options).holds_quantized(size)

    at_most = 4 * 2**30
    assert holds(at_most, gradient_checkpointing=True)
    assert not holds(at_most + 1, gradient_checkpointing=True)
    assert not holds(1)
    assert holds(at_most + 1, hold_quantized=True)
    assert not holds(1, gradient_checkpointing=True, hold_quantized=False)
    assert not holds(1, gradient_checkpointing=True, fsdp=True)


def test_a_lone_process_has_one_gpu(tmp_path: Any) -> None:
    config = GraceConfig(output_dir=str(tmp_path))
    assert config.n_gpu in (0, 1)
    config._n_gpu = 2  # as transformers finds two
    assert config.n_gpu == 1
    assert config.train_batch_size == config.per_device_train_batch_size
