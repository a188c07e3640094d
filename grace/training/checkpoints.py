"""Checkpoints that are whole or not there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import (
    PREFIX_CHECKPOINT_DIR,
    SaveStrategy,
    get_last_checkpoint,
    rotate_checkpoints,
)

from grace.training.files import publish, require_room
from grace.training.sharding import ShardingTrainer

STATE = "grace_state.json"
_BESIDE = ".unfinished"
# What a full or vanished disk looks like: to Python, to torch.save, to safetensors.
_WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)


class AtomicTrainer(ShardingTrainer):
    """A Trainer whose checkpoints are written beside their place, synced, and renamed into it.

    A run that is killed while saving leaves `.unfinished`, which no resume looks at, and the
    checkpoints before it; older ones go (`save_total_limit`) only once the new one is in its place.
    A save that fails is an OSError that names the last whole checkpoint. The state of the run
    itself (`training_state`) goes into each one.
    """

    _saving_into: str | None = None

    def training_state(self) -> dict[str, Any]:
        """What to save beside weights, optimizer and random states; JSON keeps floats exactly."""
        raise NotImplementedError

    def load_training_state(self, state: Mapping[str, Any]) -> None:
        """Take over what `training_state` gave."""
        raise NotImplementedError

    def _get_output_dir(self, trial: Any) -> str:
        return self._saving_into or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run = Path(super()._get_output_dir(trial))
        beside = run / _BESIDE
        if self.args.should_save:
            shutil.rmtree(beside, ignore_errors=True)
        self.accelerator.wait_for_everyone()  # or another rank's file of this save would go too
        try:
            self._write_and_publish(model, trial, run, beside)
        except _WRITE_ERRORS as error:
            self._give_up(error, run, beside)

    def _write_and_publish(self, model: nn.Module, trial: Any, run: Path, beside: Path) -> None:
        self._saving_into = str(beside)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._saving_into = None
        if self.args.should_save:
            state = json.dumps(self.training_state())  # JSON keeps floats exactly
            (beside / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}" / STATE).write_text(state)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self._publish(run, beside)

    def _give_up(self, error: Exception, run: Path, beside: Path) -> NoReturn:
        """Make room again, and say which checkpoint there still is."""
        if isinstance(error, torch.OutOfMemoryError):
            raise error
        shutil.rmtree(beside, ignore_errors=True)
        last = get_last_checkpoint(str(run))
        raise OSError(
            f"GraceTrainer: checkpoint of step {self.state.global_step} must be writable in {run}, "
            f"got: {error}; the last whole one is {last or 'none'}"
        ) from error

    def _publish(self, run: Path, beside: Path) -> None:
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self._rename_best(run, beside / name)
        publish(beside / name, run / name)
        beside.rmdir()
        rotate_checkpoints(
            output_dir=str(run),
            save_total_limit=self.args.save_total_limit,
            best_model_checkpoint=self.state.best_model_checkpoint,
            use_mtime=True,
        )

    def require_room(self) -> None:
        """OSError where the disk has no room for one checkpoint beside those that there are.

        Counted are what every optimizer needs (weights), and the moments of those of Adam.
        """
        if not self.args.should_save or self.args.save_strategy == SaveStrategy.NO:
            return
        model: Any = self.model
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        moments = 2 * trained if str(self.args.optim).startswith("adamw_torch") else 0
        copies = 2 if self.is_fsdp_enabled else 1  # FSDP loads from a copy of its own
        run = Path(str(self.args.output_dir))
        run.mkdir(parents=True, exist_ok=True)
        require_room(run, copies * weights + moments, "a checkpoint")

    def _rename_best(self, run: Path, made: Path) -> None:
        """The best checkpoint may be the one being renamed; the state names its place."""
        best = self.state.best_model_checkpoint
        if best is not None and Path(best) == made:
            self.state.best_model_checkpoint = str(run / made.name)
            self.state.save_to_json(str(made / TRAINER_STATE_NAME))

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Weights, config and processor; no pickled arguments.

        A checkpoint keeps the names that the model in memory has, which is what a resume loads;
        a finished model has those of the family's published checkpoints.
        """
        output_dir = str(output_dir or self.args.output_dir)
        model: Any = self.model
        original = self._saving_into is None
        model.save_pretrained(output_dir, state_dict=state_dict, save_original_format=original)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(output_dir)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """A checkpoint that does not hold exactly the model's tensors is not a resume."""
        tied = set(getattr(self.model, "all_tied_weights_keys", None) or ())
        odd = sorted(set(load_result.missing_keys) - tied) + sorted(load_result.unexpected_keys)
        if odd:
            raise ValueError(
                f"GraceTrainer: checkpoint must hold the model's tensors, got {len(odd)} missing "
                f"or unknown, first {odd[0]!r}"
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            path = Path(checkpoint) / STATE
            if not path.is_file():
                raise FileNotFoundError(
                    f"GraceTrainer: checkpoint must hold {STATE}, got {checkpoint}"
                )
            self.load_training_state(json.loads(path.read_text()))
