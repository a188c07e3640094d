"""One arm with one seed: make the model, deploy it where that is possible, score it.

Everything an arm leaves lies in its own folder; `result.json` is written last, so an arm that was
interrupted runs again (from its last checkpoint, where there is one) and one that was finished
does not.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from grace.study import models
from grace.study.arms import CALIBRATED, METHODS, Arm
from grace.study.scoring import RCKA_LAYER, alignment, deployed_bytes, score
from grace.study.task import RESULT, SWEEP, TRAINED, Task, told, training_data, weights_of
from grace.study.training import OutOfTime, as_inputs, remove_checkpoints, train
from grace.training.config import GraceConfig
from grace.training.files import publish, write_whole
from grace.training.step import model_inputs

_CALIBRATION_BATCH = 16


def use_one_thread() -> None:
    """For a worker process: one thread, no chatter of libraries, and loaders that are forked.

    What was spawned spawns by default: each loader would import everything anew, for 12 seconds.
    """
    torch.set_num_threads(1)
    if "fork" in multiprocessing.get_all_start_methods():
        multiprocessing.set_start_method("fork", force=True)
    quiet()


def quiet() -> None:
    """No progress bars and warnings of libraries between our own."""
    import warnings

    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="torch|transformers|accelerate")


def run_arm(task: Task) -> dict[str, Any] | None:
    """Run a task and return what its `result.json` holds; None where its time is up before it is
    done, or would be."""
    if not _fits(task):
        return None
    try:
        return _run(task)
    except OutOfTime:
        return None


def _fits(task: Task) -> bool:
    """Whether the time left is that of the longest such arm so far (unknown: any is enough)."""
    if task.until is None:
        return True
    results = [json.loads(path.read_text()) for path in task.root.glob(f"*/*/{RESULT}")]
    same = [r for r in results if _kind(r["arm"]) == _kind(task.arm.name)]
    needed = max((r["training_seconds"] + r["scoring_seconds"] for r in same), default=0.0)
    return time.time() + needed < task.until


def _kind(name: str) -> tuple[bool, bool]:
    """Arms of one kind take about as long: those that train, those that are calibrated."""
    method = next(m for m in sorted(METHODS, key=len, reverse=True) if name.startswith(m))
    return METHODS[method].options is not None, method in CALIBRATED


def _run(task: Task) -> dict[str, Any]:
    task.folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    model = start_of(task)
    before = alignment(task, model)
    tokens = _make(task, model)
    made = time.perf_counter()
    result = {"cka": {"before": before, "after": alignment(task, model)}, **score(task, model)}
    result |= {
        "arm": task.arm.name,
        "seed": task.seed,
        "split": task.split,
        "fingerprint": task.config.fingerprint(),
        "weights": weights_of(task),
        "learning_rate": training_config(task).learning_rate if task.arm.trained else None,
        "tokens": tokens,
        "training_seconds": made - started,
        "scoring_seconds": time.perf_counter() - made,
        "bytes": deployed_bytes(task, model),
        "parameters": sum(p.numel() for p in _parameters(model)),
    }
    _keep_for_others(task, model)
    write_whole(task.folder / RESULT, json.dumps(result))
    remove_checkpoints(task.folder)
    return result


def _parameters(model: nn.Module) -> list[nn.Parameter]:
    """All but learned scales, so that an arm counts what the student does."""
    return [p for name, p in model.named_parameters() if not name.endswith("log_scale")]


def _keep_for_others(task: Task, model: Any) -> None:
    """The control's weights, where post-training arms start from it."""
    wanted = task.candidate is None and "control" in task.config.ptq_from
    if task.arm.name != "control" or not wanted:
        return
    beside = task.folder / f".{TRAINED}.unfinished"
    shutil.rmtree(beside, ignore_errors=True)
    model.save_pretrained(beside)
    publish(beside, task.folder / TRAINED)


def start_of(task: Task) -> nn.Module:
    """The model that the arm starts from, in fp32."""
    if task.arm.start == "control":
        control = Task(Arm("control"), task.seed, task.config, task.root)
        return models.load(control.folder / TRAINED, task.device)
    which = "teacher" if task.arm.method == "teacher" else "student"
    return models.load(task.model_dir(which), task.device)


def _make(task: Task, model: nn.Module) -> int:
    """Make the arm of the model it starts from, in place; tokens that it trained on."""
    if task.arm.trained:
        return _train(task, model)
    if task.arm.method in CALIBRATED:
        _calibrate(task, model)
    elif task.arm.quantized:
        _round(task, model)
    return 0


def _round(task: Task, model: nn.Module) -> None:
    options: dict[str, Any] = {"bits": task.arm.bits, "group_size": task.config.group_size}
    if METHODS[task.arm.method].zero_points:
        calibrated_quantize(task.arm.method)(model, symmetric=False, **options)
        return
    from grace.quantization import quantize

    quantize(model, **options)


def calibrated_quantize(method: str) -> Any:
    """`grace.ptq.quantize`; ValueError where this grace has none."""
    try:
        from grace.ptq import quantize
    except ImportError as error:
        raise ValueError(
            f"study: arms must not have {method} in this grace, which has no grace.ptq"
        ) from error
    return quantize


def _calibrate(task: Task, model: nn.Module) -> None:
    """GPTQ and AWQ, on the first training images."""
    quantize = calibrated_quantize(task.arm.method)
    zero_points = METHODS[task.arm.method].zero_points
    quantize(
        model,
        method=task.arm.method.removesuffix("-asymmetric"),
        batches=calibration_batches(task),
        bits=task.arm.bits,
        group_size=task.config.group_size,
        progress=False,
        **({"symmetric": False} if zero_points else {}),
    )


def calibration_batches(task: Task) -> list[dict[str, Any]]:
    """Inputs of the model for the first `calibration_images` training images, on its device.

    A batch holds images whose rows are equally long: padding would be calibrated on as well.
    """
    data, pad = training_data(task), task.processor.tokenizer.pad_token_id
    by_length: dict[int, list[dict[str, Any]]] = {}
    for index in range(min(task.config.calibration_images, len(data))):
        row = _without_padding(model_inputs(data.collate([data[index]])), pad)
        by_length.setdefault(row["input_ids"].shape[1], []).append(row)
    batches = []
    for _, rows in sorted(by_length.items()):
        for start in range(0, len(rows), _CALIBRATION_BATCH):
            part = rows[start : start + _CALIBRATION_BATCH]
            joined = {name: torch.cat([row[name] for row in part]) for name in part[0]}
            batches.append(as_inputs({k: v.to(task.device) for k, v in joined.items()}))
    return batches


def _without_padding(inputs: dict[str, Any], pad: int) -> dict[str, Any]:
    """Inputs of one row up to its last token."""
    count = int((inputs["input_ids"] != pad).sum())
    tokens = ("input_ids", "position_ids", "blocks")
    cut = {name: inputs[name][:, :count] for name in tokens if name in inputs}
    if "attention_mask" in inputs:
        cut["attention_mask"] = inputs["attention_mask"][..., :count, :count]
    return {**inputs, **cut}


def training_config(task: Task, **options: Any) -> GraceConfig:
    """Options of the arm's training."""
    config = task.config
    common: dict[str, Any] = {
        "output_dir": str(task.folder),
        "max_steps": config.steps,
        "per_device_train_batch_size": config.batch_images,
        "group_size": config.group_size,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": config.warmup_steps,
        "weight_decay": config.weight_decay,
        "adam_beta2": 0.98,
        "logging_steps": max(1, config.steps // 60),
        "save_strategy": "steps" if config.save_steps else "no",
        "save_steps": config.save_steps or 500,
        "save_total_limit": 1,
        "seed": task.seed,
        "freeze_vision": False,
        "rcka_layer": RCKA_LAYER,
        # Models of the quickstart are too small for bf16: one answer in a hundred changes.
        "bf16": task.device == "cuda" and config.benchmark == "drawn",
        "use_cpu": task.device == "cpu",
        "disable_tqdm": True,
        "dataloader_num_workers": config.loader_workers,
    }
    arm = {**tuned_options(task), **task.tried(), **task.arm.training_options()}
    return GraceConfig(**{**common, **arm, **options})


def tuned_options(task: Task) -> dict[str, Any]:
    """Those of `tuned`, of the method it is tuned as and its own, over what the sweep chose."""
    arm, sweep = task.arm, task.config.sweep
    found: dict[str, Any] = {}
    swept = _swept(task.root) if sweep is not None else {}
    at = f"-{sweep.bits_for(arm.bits)}" if sweep is not None and arm.quantized else ""
    for method in filter(None, (METHODS[arm.method].tuned_as, arm.method)):
        entry = swept.get(f"{method}{at}", {})
        found |= entry.get("chosen", {})
        found |= task.config.options_of(method, f"{method}-{arm.bits}" if arm.quantized else method)
        swept_itself = f"{arm.method}{at}" in swept
        fixed = not arm.training_options().get("adaptive_beta", True)
        if method != arm.method and fixed and not swept_itself:
            # As large, on average, as the controller's: else an ablation is of β's size.
            found |= {"beta_init": entry["beta"]} if entry.get("beta") else {}
    return found


def _swept(root: Path) -> dict[str, dict[str, Any]]:
    """What the sweep found, by arm that was swept; nothing before it is done."""
    path = root / SWEEP
    return json.loads(path.read_text()) if path.is_file() else {}


def teacher_dtype(config: GraceConfig) -> torch.dtype:
    """What the teacher computes in."""
    return torch.bfloat16 if config.bf16 else torch.float32


def _train(task: Task, model: nn.Module) -> int:
    config = training_config(task)
    teacher = None
    if config.needs_teacher:
        teacher = models.load(task.model_dir("teacher"), task.device, teacher_dtype(config))
    data = told(task) if teacher is not None else training_data(task)
    with models.compiled_layers(model, teacher, enabled=task.device == "cuda"):
        made = train(model, config, data, task.processor, teacher=teacher, until=task.until)
    return made.tokens
