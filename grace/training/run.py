"""A training run: `grace train config.yaml key=value …`, of what `run_config` reads.

Nothing is written before the configuration, the data and both models are known to be good. The run
directory then holds `config.yaml`, `train.log`, `metrics.jsonl`, `curves.png`, `summary.json`,
`checkpoint-*` and `final`: the trained student with its log-scales, which `grace export` turns into
a packed one.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm.auto import tqdm
from transformers.trainer_utils import get_last_checkpoint

from grace.training import memory
from grace.training.callbacks import METRICS, read_metrics
from grace.training.data_config import build_collator, build_dataset
from grace.training.files import publish, require_writable
from grace.training.interrupt import Interrupted
from grace.training.run_config import RunConfig
from grace.training.summary import lines, summarize, write_summary
from grace.training.teacher_cache import CachedTeacher, TeacherCache, origin

_log = logging.getLogger(__name__)
FINAL, FACTS = "final", "grace_training.json"


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
    if resume and _is_done(config, output, resume):
        _log.warning("train: %s is done, nothing was changed", output)
        return output / FINAL
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


def _is_done(config: RunConfig, output: Path, resume: bool | str) -> bool:
    """Whether the checkpoint to go on from is the last one of a run whose end is saved, and no more
    is asked for: then nothing need be loaded, and no file be written again."""
    last = get_last_checkpoint(str(output)) if resume is True and output.is_dir() else resume
    facts = output / FINAL / FACTS
    if not isinstance(last, str) or not facts.is_file():
        return False
    path = Path(last) / "trainer_state.json"
    state = json.loads(path.read_text()) if path.is_file() else {}
    done, planned = state.get("global_step", -1), state.get("max_steps", 0)
    if done < planned or json.loads(facts.read_text())["steps"] != done:
        return False
    if config.training.max_steps > 0:
        return config.training.max_steps <= done
    return config.training.num_train_epochs <= state.get("num_train_epochs", 0)


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
        (beside / FACTS).write_text(json.dumps(facts, indent=1))
        publish(beside, directory)
    trainer.accelerator.wait_for_everyone()
    return directory
