"""A training run from a YAML file: `grace train config.yaml key=value …`.

    student: path or hub name         teacher: path or hub name
    data: {path: rows.json, image_root: images, max_length: 2048}   … see `DataConfig`
    preset: paper                     output_dir: runs/name
    bits: 4                           … and any other field of GraceConfig
    quantization: {overrides: {"down_proj$": {bits: 8}}}    (what is quantized, under one heading)
    teacher_cache: folder of `grace precompute-teacher`, in place of running the teacher

Nothing is written before the configuration, the data and both models are known to be good. The run
directory then holds `config.yaml`, `train.log`, `metrics.jsonl`, `curves.png`, `summary.json`,
`checkpoint-*` and `final`: the trained student with its log-scales, which `grace export` turns into
a packed one.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm.auto import tqdm
from transformers.trainer_utils import get_last_checkpoint

from grace.checkpoint import Checkpoint
from grace.training import memory
from grace.training.callbacks import METRICS, read_metrics
from grace.training.config import GraceConfig, check_keys, suggestion
from grace.training.data_config import DataConfig, build_collator, build_dataset, parse_data
from grace.training.files import publish, require_writable
from grace.training.interrupt import Interrupted
from grace.training.summary import lines, summarize, write_summary
from grace.training.teacher_cache import CachedTeacher, TeacherCache, origin

_log = logging.getLogger(__name__)
FINAL = "final"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class RunConfig:
    """Everything a run is made from."""

    student: str
    data: DataConfig
    training: GraceConfig
    teacher: str | None = None
    teacher_cache: str | None = None
    source: dict[str, Any] = field(default_factory=dict, compare=False)


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration in a YAML file with `key=value` (or `data.key=value`) on top.

    Raises:
        FileNotFoundError: no such file, or no student, teacher or data file where it points.
        ValueError: not a mapping, an unknown or missing key, or a value out of range.
    """
    return parse_config(read_options(path, overrides))


def read_options(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The mapping in a YAML file with `key=value` on top, whatever its keys.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a mapping, or an override that is not key=value.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"train: config must be a file, got {path}")
    options = yaml.safe_load(path.read_text()) or {}
    if not isinstance(options, dict):
        raise ValueError(f"train: {path} must hold a mapping, got {type(options).__name__}")
    for override in overrides:
        _override(options, override)
    return options


def _override(options: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ValueError(f"train: an override must be key=value, got {override!r}")
    *parents, name = key.split(".")
    for parent in parents:
        options = options.setdefault(parent, {})
        if not isinstance(options, dict):
            raise ValueError(f"train: {parent} must be a mapping to set {key}, got {options!r}")
    under = options.get("quantization")  # `bits=8` also where the file has it under its heading
    if not parents and isinstance(under, dict) and name in under:
        options = under
    options[name] = yaml.safe_load(value)


def parse_config(options: dict[str, Any]) -> RunConfig:
    """As `read_config`, from a mapping."""
    source, options = options, dict(options)
    for name in ("student", "data", "output_dir"):
        if not options.get(name):
            raise ValueError(f"train: {name} must be given, got {options.get(name)!r}")
    student, teacher = options.pop("student"), options.pop("teacher", None)
    data, cache = parse_data(options.pop("data")), options.pop("teacher_cache", None)
    if cache and data.pack_length is not None:
        raise ValueError(
            "train: data.pack_length must be null with teacher_cache, whose rows are not packed, "
            f"got {data.pack_length}"
        )
    preset = options.pop("preset", "paper")
    options = flat_quantization(options)
    check_keys(options)
    if not (options.get("fp16") or options.get("use_cpu")) and torch.cuda.is_available():
        options.setdefault("bf16", torch.cuda.is_bf16_supported())
    training = GraceConfig.from_preset(preset, **as_numbers(options))
    if training.needs_teacher and not teacher:
        raise ValueError("train: teacher must be given unless distillation is none and omega 0")
    for name in filter(None, (student, teacher)):
        if Path(name).exists() or not is_hub_name(name):
            Checkpoint(name)  # raises where it is not whole
    if cache and not (teacher and Path(teacher).is_dir()):
        raise ValueError(
            f"train: teacher must be the directory that teacher_cache was made from, got {teacher}"
        )
    return RunConfig(student, data, training, teacher, cache, source)


# Options that may stand under `quantization`, and the fields they are.
_QUANTIZATION = {
    "enabled": "quantization",
    "bits": "bits",
    "group_size": "group_size",
    "scale_dtype": "scale_dtype",
    "scale_init": "scale_init",
    "scale_lr_ratio": "scale_lr_ratio",
    "skip": "skip",
    "overrides": "overrides",
}


def flat_quantization(options: dict[str, Any]) -> dict[str, Any]:
    """The options with those under `quantization`, where it is a mapping, among the others."""
    nested = options.get("quantization")
    if not isinstance(nested, dict):
        return options
    flat = {key: value for key, value in options.items() if key != "quantization"}
    for key, value in nested.items():
        if key not in _QUANTIZATION:
            near = suggestion(key, list(_QUANTIZATION))
            raise ValueError(f"train: unknown option quantization.{key}{near}")
        if _QUANTIZATION[key] in flat:
            raise ValueError(f"train: {key} must be given once, got it under quantization as well")
        flat[_QUANTIZATION[key]] = value
    return flat


def as_numbers(options: dict[str, Any]) -> dict[str, Any]:
    """YAML reads 1e-4 as text: make numbers of the texts given for fields that are numbers."""
    kinds = {item.name: item.type for item in dataclasses.fields(GraceConfig)}
    numbers = {"float": float, "int": int, float: float, int: int}
    made = {}
    for key, value in options.items():
        kind = numbers.get(kinds[key])
        if kind is not None and isinstance(value, str):
            try:
                value = kind(value)
            except ValueError:
                raise ValueError(f"train: {key} must be a number, got {value!r}") from None
        made[key] = value
    return made


def is_hub_name(name: str) -> bool:
    """Whether `name` can be one of the hub: owner/name."""
    return _HUB_NAME.fullmatch(name) is not None


def run(config: RunConfig) -> Path:
    """Train, and return the directory of the finished student.

    Raises:
        ValueError: data or models that cannot be used together, or an output directory that holds
            another run (resume it with `resume_from_checkpoint: true`, or `auto`).
        OSError: an output directory that cannot be written or has no room for a checkpoint.
        OutOfMemory: with what to lower.
        Interrupted: SIGINT or SIGTERM ended the run, behind a checkpoint.
    """
    output, training = Path(str(config.training.output_dir)), config.training
    resume = _resume_point(training.resume_from_checkpoint, output)
    if not resume and (list(output.glob("checkpoint-*")) or (output / FINAL).exists()):
        raise ValueError(
            f"train: output_dir must not hold another run, got {output}; choose another or give "
            "resume_from_checkpoint=true"
        )
    require_writable(output)
    with memory.explained_while_loading():
        trainer = build(config)
    if trainer.is_world_process_zero():
        _describe(config, output)
    started = time.perf_counter()
    try:
        trainer.train(resume_from_checkpoint=resume)
    except Interrupted:
        _report(trainer, output, time.perf_counter() - started)
        raise
    _report(trainer, output, time.perf_counter() - started)
    return save_final(trainer, output / FINAL)


def _resume_point(value: Any, output: Path) -> bool | str | None:
    """`auto` is true where there is a checkpoint, for jobs that a scheduler starts again."""
    words = {"true": True, "false": None, "none": None, "": None}
    if isinstance(value, str) and value.lower() == "auto":
        return True if output.is_dir() and get_last_checkpoint(str(output)) else None
    return words.get(value.lower(), value) if isinstance(value, str) else value


def _report(trainer: Any, output: Path, seconds: float) -> None:
    """Draw the curves, write the summary and say it."""
    from grace.training.plots import plot_curves

    peak = memory.peak_of_all_ranks(trainer.accelerator)  # on every rank
    if not trainer.is_world_process_zero():
        return
    rows = read_metrics(output / METRICS)
    plot_curves(rows, output / "curves.png")
    summary = summarize(
        rows,
        steps=trainer.state.global_step,
        seconds=seconds,
        memory=peak,
        ranks=trainer.args.world_size,
    )
    write_summary(summary, output)
    for text in lines(summary):
        _log.info(text)
        if not trainer.args.disable_tqdm:
            tqdm.write(text)


def build(config: RunConfig) -> Any:
    """The trainer of a run: data read, both models loaded, the student quantized."""
    from grace.training.trainer import GraceTrainer

    dataset, processor = read_data(config)
    teacher: Any = None
    if config.training.needs_teacher and config.teacher_cache is not None:
        made_from = cache_origin(config, processor)
        dataset = TeacherCache(dataset, Path(config.teacher_cache), made_from)
        teacher = CachedTeacher(dataset.head())
    elif config.training.needs_teacher:
        teacher = load_teacher(config)
    student = _load(config, config.student, torch.float32)
    return GraceTrainer(
        student,
        config.training,
        teacher,
        train_dataset=dataset,
        data_collator=build_collator(config.data, processor, student),
        processing_class=processor,
    )


def read_data(config: RunConfig) -> tuple[Any, Any]:
    """The dataset, and the student's processor."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(config.student)
    return build_dataset(config.data, config.training, processor), processor


def _load(config: RunConfig, name: str, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForImageTextToText

    attention = config.training.attn_implementation
    options = {} if attention is None else {"attn_implementation": attention}
    return AutoModelForImageTextToText.from_pretrained(name, dtype=dtype, **options)


def load_teacher(config: RunConfig) -> Any:
    """The teacher: in bf16 on a GPU, in fp32 on a CPU."""
    on_gpu = config.training.device.type == "cuda"
    return _load(config, str(config.teacher), torch.bfloat16 if on_gpu else torch.float32)


def cache_origin(config: RunConfig, processor: Any) -> dict[str, Any]:
    """What the run's teacher's cache must be made from."""
    return origin(
        rows=[Path(file.path) for file in config.data.files],
        processor=processor,
        teacher=Path(str(config.teacher)),
        layer=config.training.rcka_layer,
        max_length=config.data.longest,
    )


def _describe(config: RunConfig, output: Path) -> None:
    """Write what the run is, and send the log to a file as well."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "config.yaml").write_text(yaml.safe_dump(config.source, sort_keys=False))
    handler = logging.FileHandler(output / "train.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    for name in ("grace", "transformers"):
        logging.getLogger(name).addHandler(handler)
    logging.getLogger("grace").setLevel(logging.INFO)


def save_final(trainer: Any, directory: Path) -> Path:
    """Save the trained student, processor and run facts; `directory` appears whole or not."""
    beside = directory.with_name(directory.name + ".unfinished")
    if trainer.args.should_save:
        shutil.rmtree(beside, ignore_errors=True)
    trainer.save_model(str(beside))
    if trainer.args.should_save:
        facts = {"steps": trainer.state.global_step, "modules": trainer.quantized}
        (beside / "grace_training.json").write_text(json.dumps(facts, indent=1))
        publish(beside, directory)
    trainer.accelerator.wait_for_everyone()
    return directory
