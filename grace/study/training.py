"""Training within a study: `GraceTrainer` on packed questions, that counts tokens and keeps to a
time limit."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from grace.evaluation.packed_questions import IGNORE, block_mask
from grace.study.pool import Pool, prefix
from grace.training.config import GraceConfig
from grace.training.trainer import GraceTrainer

_ROUND = 16  # rows of a batch are padded to a multiple of it
_LOOK = 10  # steps
_ERRORS = 0x6C6162656C  # so that the errors' random numbers are no other part's


class OutOfTime(Exception):
    """A limit came before the work was done; a checkpoint holds what was."""


class DrawnQuestions(Dataset):
    """Training rows of a pool: a picture with all its questions in one row.

    Args:
        folder: of the pool, drawn.
        processor: of the student.
        label_errors: share of the yes/no answers that are turned around, always the same ones.
    """

    def __init__(self, folder: Path, processor: Any, label_errors: float = 0.0) -> None:
        self.pool = Pool(folder)
        self.tokens, bounds = self.pool.rows()
        if label_errors:
            _turn_answers(self.tokens, processor.tokenizer, label_errors, self.pool.spec["seed"])
        self.bounds = bounds.tolist()
        start = prefix(processor, self.pool.spec["pixels"])
        places = range(len(start))
        self.prefix = torch.tensor([start, [IGNORE] * len(start), places, [0] * len(start)])
        self.padding = torch.tensor([processor.tokenizer.pad_token_id, IGNORE, 0, -1])

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, index: int) -> int:
        return index  # read a batch at a time, in `collate`

    def supervised_bounds(self) -> np.ndarray:
        """int64 [images + 1]: supervised tokens of the images before each."""
        before = np.concatenate([[0], np.cumsum(self.tokens[1].numpy() != IGNORE)])
        return before[np.array(self.bounds)].astype(np.int64)

    def collate(self, items: list[int]) -> dict[str, Tensor]:
        """A batch for `StudyTrainer`: pixels uint8 [B, 3, P, P], and `input_ids`, `labels`,
        `position_ids`, `blocks` int64 [B, S]; see `grace.evaluation.packed_questions`."""
        spans = [(self.bounds[item], self.bounds[item + 1]) for item in items]
        start = self.prefix.shape[1]
        longest = start + max(end - begin for begin, end in spans)
        size = -(-longest // _ROUND) * _ROUND
        sheets = self.padding[:, None, None].repeat(1, len(items), size)
        sheets[:, :, :start] = self.prefix[:, None]
        for row, (begin, end) in enumerate(spans):
            sheets[:, row, start : start + end - begin] = self.tokens[:, begin:end]
        names = ("input_ids", "labels", "position_ids", "blocks")
        return {
            "pixel_values": torch.from_numpy(self.pool.pixels[items]),
            "row_ids": torch.tensor(items),
            **dict(zip(names, sheets.unbind(), strict=True)),
        }


def _turn_answers(rows: Tensor, tokenizer: Any, share: float, seed: int) -> None:
    """Make Yes of some No and No of some Yes, in place, in ids and labels of [4, tokens]."""
    yes, no = (tokenizer.convert_tokens_to_ids(text) for text in ("Yes", "No"))
    ids, labels = rows[0], rows[1]
    places = ((labels == yes) | (labels == no)).nonzero().squeeze(1)
    drawn = np.random.default_rng([seed, _ERRORS]).random(len(places))
    turned = places[torch.from_numpy(drawn < share)]
    ids[turned] = yes + no - ids[turned]
    labels[turned] = ids[turned]


def as_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What models take, made on the batch's device: pixels in [-1, 1], the mask of its blocks."""
    made = dict(batch)
    pixels = made.get("pixel_values")
    if isinstance(pixels, Tensor) and pixels.dtype == torch.uint8:
        made["pixel_values"] = pixels.float() / 127.5 - 1
    if "blocks" in made:
        made["attention_mask"] = block_mask(made.pop("blocks"))
    return made


class StopAt(TrainerCallback):
    """Ends training behind the first step past a time of the clock, with a checkpoint.

    Ranks go by the clock of the first: every `_LOOK` steps, as looking waits for the device.
    """

    def __init__(self, until: float) -> None:
        self.until = until

    def _is_late(self, args: TrainingArguments, step: int) -> bool:
        late = time.time() >= self.until
        if args.world_size == 1:
            return late
        if step % _LOOK and step > 1:
            return False
        told = torch.tensor([int(late)], device=args.device)
        torch.distributed.broadcast(told, 0)
        return bool(told.item())

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Behind every step."""
        if self._is_late(args, state.global_step) and state.global_step < state.max_steps:
            control.should_save = True
            control.should_training_stop = True


class StudyTrainer(GraceTrainer):
    """A `GraceTrainer` that counts what it trained on.

    Attributes:
        tokens: read by the student so far, padding left out, over interruptions and by all ranks.
        seconds: that it took so far, over interruptions.
    """

    def __init__(self, *args: Any, pad: int, **kwargs: Any) -> None:
        self._pad = pad
        self._tokens: Tensor | int = 0
        self._started = time.perf_counter()
        super().__init__(*args, **kwargs)

    @property
    def tokens(self) -> int:
        """See the class; waits for the device."""
        return int(self._tokens)

    @property
    def seconds(self) -> float:
        """See the class."""
        return time.perf_counter() - self._started

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return as_inputs(super()._prepare_inputs(inputs))

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """As `GraceTrainer`'s, counting tokens."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        read = sum((batch["input_ids"] != self._pad).sum() for batch in batches)
        if self.args.world_size > 1:
            read = torch.as_tensor(read, device=self.args.device)
            torch.distributed.all_reduce(read)
        self._tokens = self._tokens + read
        return batches, items

    def training_state(self) -> dict[str, Any]:
        """As `GraceTrainer`'s, and tokens and seconds."""
        return {**super().training_state(), "tokens": self.tokens, "seconds": self.seconds}

    def load_training_state(self, state: Mapping[str, Any]) -> None:
        """As `GraceTrainer`'s, and tokens and seconds."""
        super().load_training_state(state)
        self._tokens = state["tokens"]
        self._started -= state["seconds"]


@dataclass(frozen=True)
class Trained:
    """What a training took, over interruptions: tokens that the student read, seconds."""

    tokens: int
    seconds: float


def train(
    model: nn.Module,
    config: GraceConfig,
    data: Any,
    processor: Any,
    *,
    teacher: nn.Module | None = None,
    until: float | None = None,
) -> Trained:
    """Train `model` in place, from the last checkpoint in the run's directory where there is one.

    Args:
        model: the student.
        config: its training; the directory is its own.
        data: a data set with `collate`.
        processor: of the student.
        teacher: where a term needs one.
        until: stop, with a checkpoint, at this time of the clock.

    Raises:
        OutOfTime: it had to stop before it was done.
    """
    folder = Path(str(config.output_dir))
    trainer = StudyTrainer(
        model,
        config,
        teacher,
        train_dataset=data,
        data_collator=data.collate,
        pad=processor.tokenizer.pad_token_id,
        callbacks=[StopAt(until)] if until is not None else [],
    )
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    if trainer.state.global_step < trainer.state.max_steps:
        raise OutOfTime(f"study: {folder.name} stopped at step {trainer.state.global_step}")
    # Its forward stays under autocast otherwise, and rounds what is scored.
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    model.eval()
    return Trained(trainer.tokens, trainer.seconds)


def remove_checkpoints(folder: Path) -> None:
    """What a finished training no longer needs."""
    for path in [*folder.glob("checkpoint-*"), folder / ".unfinished"]:
        shutil.rmtree(path, ignore_errors=True)
