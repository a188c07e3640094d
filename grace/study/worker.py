"""One arm with one seed: make the model, deploy it where that is possible, score it.

Everything an arm leaves lies in its own folder; `result.json` is written last, so an arm that was
interrupted runs again and one that was finished does not.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from grace.evaluation import answer, mme, tiny
from grace.study.arms import Arm
from grace.study.config import StudyConfig
from grace.study.data import HELDOUT, TEACHER, TRAIN, PackedQuestions
from grace.training.config import GraceConfig

RESULT, METRICS = "result.json", "metrics.jsonl"
RCKA_LAYER = -2


@dataclass(frozen=True)
class Task:
    """An arm to run with a seed, in the run directory `root`."""

    arm: Arm
    seed: int
    config: StudyConfig
    root: Path
    device: str = "cpu"

    @property
    def folder(self) -> Path:
        """Where the arm's files go."""
        return self.root / "arms" / f"{self.arm.name}-s{self.seed}"


def use_one_thread() -> None:
    """For a worker process: one thread, and no chatter of libraries."""
    torch.set_num_threads(1)
    quiet()


def quiet() -> None:
    """No progress bars and warnings of libraries between our own."""
    import warnings

    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="torch|transformers|accelerate")


def finished(task: Task) -> dict[str, Any] | None:
    """The result of a task that was done before with the same configuration, else None."""
    path = task.folder / RESULT
    if not path.is_file():
        return None
    result = json.loads(path.read_text())
    return result if result["fingerprint"] == task.config.fingerprint() else None


def run_arm(task: Task) -> dict[str, Any]:
    """Run a task and return what its `result.json` holds."""
    task.folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    model = _model(task)
    trained = time.perf_counter()
    result = _score(task, model)
    result |= {
        "arm": task.arm.name,
        "seed": task.seed,
        "fingerprint": task.config.fingerprint(),
        "training_seconds": trained - started if task.arm.trained else 0.0,
        "scoring_seconds": time.perf_counter() - trained,
        "bytes": deployed_bytes(model, task.arm.bits if task.arm.quantized else None),
    }
    beside = task.folder / f"{RESULT}.unfinished"
    beside.write_text(json.dumps(result))
    beside.replace(task.folder / RESULT)
    return result


def load(task_or_config: StudyConfig, which: str, device: str = "cpu") -> nn.Module:
    """The study's `teacher` or `student`, in fp32."""
    from transformers import AutoModelForImageTextToText

    directory = model_dir(task_or_config, which)
    model: Any = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32)
    return model.to(device).eval()


def model_dir(config: StudyConfig, which: str) -> Path:
    """Directory of the study's `teacher` or `student`."""
    if config.models is not None:
        return Path(config.models) / which
    return tiny.teacher_dir() if which == "teacher" else tiny.student_dir()


@lru_cache(maxsize=1)
def processor_of(config: StudyConfig) -> Any:
    """The student's processor, which the teacher shares."""
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(model_dir(config, "student"))


@lru_cache(maxsize=1)
def heldout(config: StudyConfig, root: Path) -> tuple[list[mme.Row], list[answer.Batch]]:
    """Held-out rows, and their tokens and pixels, made once a process."""
    rows = mme.load(root / "data" / HELDOUT)
    batches = answer.prepare(processor_of(config), rows, batch_size=config.batch_size)
    return rows, batches


@lru_cache(maxsize=1)
def training_data(config: StudyConfig, root: Path) -> PackedQuestions:
    """Training images with the teacher's rows, read once a process."""
    data = root / "data"
    return PackedQuestions(data / TRAIN, processor_of(config), data / TEACHER)


def _model(task: Task) -> nn.Module:
    """The arm's model, trained where the arm trains."""
    from grace.quantization import quantize

    model = load(task.config, "teacher" if task.arm.method == "teacher" else "student", task.device)
    if task.arm.trained:
        return _train(task, model)
    if task.arm.quantized:
        quantize(model, bits=task.arm.bits, group_size=task.config.group_size)
    return model


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
        "save_strategy": "no",
        "seed": task.seed,
        "freeze_vision": False,
        "rcka_layer": RCKA_LAYER,
        "use_cpu": task.device == "cpu",
        "disable_tqdm": True,
    }
    tuned = config.options_of(task.arm.method, task.arm.name)
    return GraceConfig(**{**common, **tuned, **task.arm.training_options(), **options})


def _train(task: Task, model: nn.Module) -> nn.Module:
    from transformers import PrinterCallback

    from grace.training.trainer import GraceTrainer

    config = training_config(task)
    data = training_data(task.config, task.root)
    teacher = load(task.config, "teacher", task.device) if config.needs_teacher else None
    trainer = GraceTrainer(model, config, teacher, train_dataset=data, data_collator=data.collate)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return model.eval()


def _score(task: Task, model: nn.Module) -> dict[str, Any]:
    """Answers and scores; of the packed model where there is one."""
    rows, batches = heldout(task.config, task.root)
    said = _answers(task, model, batches)
    result: dict[str, Any] = {"deployed": False, "agreement": None}
    if task.arm.deployable:
        packed = deploy(task, model)
        deployed = _answers(task, packed, batches)
        same = sum(a == b for a, b in zip(said, deployed, strict=True))
        result = {"deployed": True, "agreement": same / len(rows)}
        said = deployed
    answered = mme.answered(rows, said)
    mme.write_results(task.folder / "answers", answered)
    return {**result, "score": mme.score(answered), "right": right(answered)}


def _answers(task: Task, model: nn.Module, batches: Sequence[answer.Batch]) -> list[str]:
    return answer.answer(
        model, processor_of(task.config), batches, max_new_tokens=1, progress=False
    )


def deploy(task: Task, model: nn.Module) -> nn.Module:
    """Export the model as compressed-tensors and load it as users do: packed, on our kernels."""
    from transformers import AutoModelForImageTextToText

    from grace.export import export
    from grace.nn import PackedLinear

    directory = task.folder / "packed"
    export(model, directory, processor=processor_of(task.config), overwrite=directory.exists())
    packed: Any = AutoModelForImageTextToText.from_pretrained(directory, dtype=_serving_dtype(task))
    if not any(isinstance(module, PackedLinear) for module in packed.modules()):
        raise RuntimeError(f"study: {directory} must load as packed layers, got none")
    return packed.to(task.device).eval()


def _serving_dtype(task: Task) -> torch.dtype:
    # A GPU's kernels take half precision. Logits of models this small lie close together: rounded
    # to bf16, one answer in a hundred changes; to fp16, none did.
    return torch.float32 if task.device == "cpu" else torch.float16


def right(rows: Sequence[mme.Row]) -> dict[str, str]:
    """For every subtask one digit an image, 0 to 2: how many of its questions were right."""
    counts: dict[str, dict[Path, int]] = {}
    for row in rows:
        hit = mme.parse_answer(row.prediction or "") == row.answer.lower()
        images = counts.setdefault(row.subtask, {})
        images[row.image] = images.get(row.image, 0) + hit
    return {subtask: "".join(map(str, images.values())) for subtask, images in counts.items()}


def deployed_bytes(model: nn.Module, bits: int | None) -> int:
    """Bytes of the weights as served: quantized layers at `bits`, scales and the rest in bf16."""
    from grace.nn import FakeQuantLinear

    total = 2 * sum(parameter.numel() for parameter in model.parameters())
    for layer in model.modules():
        if bits is not None and isinstance(layer, FakeQuantLinear):
            total -= 2 * layer.weight.numel() - -(-bits * layer.weight.numel() // 8)
    return total
