"""`GraceTrainer`: quantization-aware distillation on transformers' Trainer."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, ProgressCallback

from grace.losses import AdaptiveIBController
from grace.nn.quantize_ahead import hold, quantize_ahead, release, size_made
from grace.ops.linear_gated_dkd import whole_head
from grace.training import memory
from grace.training.adapters import HiddenStates, adapter_for
from grace.training.callbacks import MetricsWriter
from grace.training.checkpoints import AtomicTrainer
from grace.training.config import GraceConfig
from grace.training.drift import CodeDrift
from grace.training.interrupt import Interrupted, StopSignals
from grace.training.meter import SUMS, Meter, share_of
from grace.training.optimizer import parameter_groups, use_fp32_masters
from grace.training.progress import Progress
from grace.training.sampler import EpochSetter, check_data_state, data_state, epoch_sampler
from grace.training.sharding import tell_of_idle_gpus
from grace.training.step import MicroBatch, identity, model_inputs, plan
from grace.training.teacher_placement import TeacherStream, place_teacher
from grace.training.terms import drop_nonfinite, loss_terms

_MICRO = "grace_micro_batch"  # key under which a batch carries its MicroBatch


class GraceTrainer(AtomicTrainer):
    """Trains a student through fake quantization under a frozen teacher.

        loss = CE + β · distillation + ω · RCKA

    All terms come from hidden states: neither model makes logits of more than a chunk of
    supervised tokens, or with `keep_logits` of all of them. β moves once an optimizer step, by
    `AdaptiveIBController` on the step's mean distillation loss over all micro-batches and ranks,
    and is saved with every checkpoint.

    A distillation or alignment term that is not finite is dropped for its micro-batch, counted
    and logged (`dropped_terms`); a cross-entropy that is not finite stops the run.

    Args:
        model: the student, of a family that `grace.training.adapters` knows. Its decoder linears
            become `FakeQuantLinear` unless they are already, or `args.quantization` is off; its
            parameters become fp32, its vision tower is frozen unless told otherwise.
        args: the options.
        teacher: a model that takes the student's inputs, or a `CachedTeacher` where batches bring
            its rows; needed unless `args.needs_teacher` is False, and ignored then.
        **trainer: what transformers' Trainer takes: train_dataset, data_collator,
            processing_class, callbacks …

    Raises:
        ValueError: a family that is not known, a missing teacher, a group size that does not fit.
        FloatingPointError: in `train`, on a cross-entropy that is not finite, with its row ids.
    """

    args: GraceConfig

    def __init__(
        self,
        model: nn.Module,
        args: GraceConfig,
        teacher: nn.Module | None = None,
        **trainer: Any,
    ) -> None:
        if args.needs_teacher and teacher is None:
            raise ValueError(
                "GraceTrainer: teacher must be given unless distillation is 'none' and omega 0"
            )
        tell_of_idle_gpus(args)
        self.adapter = adapter_for(model)
        self.quantized = _prepare_student(model, args)
        self.controller = AdaptiveIBController(
            tau=args.tau,
            eta=args.eta,
            beta_init=args.beta_init,
            beta_min=args.beta_min,
            beta_max=args.beta_max,
            ema_decay=args.ema_decay,
        )
        self._drift = CodeDrift(model)
        saved = vars(model.config).get("use_cache")
        super().__init__(model=model, args=args, **trainer)
        _set_use_cache(model.config, saved)
        self.shard_by(self.adapter.layer_class())
        # The loss is already divided by the whole step's tokens: Trainer must not divide it again
        # by the number of micro-batches. The second name is that of later transformers.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self.teacher = self._place_teacher(teacher)
        self._stream = TeacherStream(self.args.device, args.teacher_stream)
        self.dropped_terms = 0
        self.skipped_rows = getattr(self.train_dataset, "skipped", 0)
        self.longest_row = 0
        self._stopped_by = 0  # the signal that ended `train` early
        self._signals = StopSignals()
        self._meter = Meter(self.args.device)
        self._order = EpochSetter()
        for replaced in (PrinterCallback, ProgressCallback):  # Progress does the work of both
            self.remove_callback(replaced)
        for callback in (self._drift, MetricsWriter(), Progress(), self._order):
            self.add_callback(callback)
        quantize_ahead(self.adapter.layers)
        self.holds_quantized = args.holds_quantized(size_made(self.adapter.layers, args.loss_dtype))

    def _place_teacher(self, teacher: nn.Module | None) -> Any:
        if teacher is None or not self.args.needs_teacher:
            return None
        return place_teacher(teacher, self.args)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's. SIGINT and SIGTERM end it behind the step that runs, with a checkpoint.

        Raises:
            Interrupted: a signal ended it.
            OutOfMemory: with what to lower.
            OSError: no room for a checkpoint, or one that could not be written.
        """
        self.require_room()
        self._stopped_by = 0
        self._meter.restart()
        with self._signals.watched(), memory.explained(self):
            output = super().train(*args, **kwargs)
        if self._stopped_by:
            where = str(self.args.output_dir)
            raise Interrupted(self.state.global_step, self._stopped_by, where)
        return output

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Trainer makes a step before it looks: one beyond the last, of a checkpoint that is done.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    # One optimizer step

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """The micro-batches of the next step, each with what its loss needs to know of the rest."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        if batches:
            batches = [self._prepare_inputs(batch) for batch in batches]
            longest = max(batch["input_ids"].shape[1] for batch in batches)
            self.longest_row = max(self.longest_row, longest)
            with self._stream.ahead():
                micros = self._plan(batches)
            for batch, micro in zip(batches, micros, strict=True):
                batch[_MICRO] = micro
        return batches, items

    def _plan(self, batches: list[dict[str, Any]]) -> list[MicroBatch]:
        reduce = self._sum_over_ranks if self.args.world_size > 1 else identity
        return plan(batches, self.adapter, self.teacher, self.args, reduce)

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        return self.accelerator.reduce(values, reduction="sum")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The micro-batch's part of the step's loss, times the ranks that its gradient is averaged
        over."""
        micro = inputs.pop(_MICRO, None) or self._plan([inputs])[0]
        states, outputs = self._student(model, inputs)
        self._stream.join(micro)
        terms = loss_terms(self.args, states, micro)
        dropped = drop_nonfinite(terms, self.args, states, micro)
        if dropped and not terms["ce"].isfinite():
            raise FloatingPointError(self._nonfinite_message(terms["ce"], inputs))
        self._meter.dropped += len([name for name in dropped if name != "ce"])
        values = {name: term.detach() for name, term in terms.items()}
        weights = {
            "ce": 1.0,
            "distillation": self.controller.beta,
            "rcka": self.args.omega_at(self.state.global_step),
        }
        loss = sum(weights[name] * term * share_of(micro, name) for name, term in terms.items())
        if model.training:
            self._meter.add(values, micro, inputs)
        loss = loss * self.args.world_size
        return (loss, outputs) if return_outputs else loss

    def _student(self, model: nn.Module, inputs: Mapping[str, Any]) -> tuple[HiddenStates, Any]:
        """The student's forward: what it left behind, and its outputs."""
        if self.holds_quantized and model.training:
            hold(self.adapter.layers, self.args.loss_dtype)
        vision = self.adapter.vision_always(inputs, self.args.world_size > 1)
        capture = self.adapter.capture(self.args.rcka_layer)
        with self.autocast(), vision, capture as states:
            outputs = model(**model_inputs(inputs), use_cache=False, logits_to_keep=1)
        # Gathered here, where every rank comes by, and not again where a term is dropped.
        states.heads = whole_head(self.adapter.head), self._teacher_head()
        return states, outputs

    def _teacher_head(self) -> Tensor | None:
        if self.teacher is None or not self.teacher.distils:
            return None
        return whole_head(self.teacher.adapter.head)

    def _nonfinite_message(self, ce: Tensor, inputs: Mapping[str, Any]) -> str:
        rows = inputs.get("row_ids")
        ids = rows.tolist() if isinstance(rows, Tensor) else "unknown"
        return (
            f"GraceTrainer: cross-entropy must be finite, got {ce.item()} in step "
            f"{self.state.global_step + 1}, rows {ids}; a lower learning_rate or "
            "max_grad_norm may help, or a look at these rows"
        )

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Forward and backward of a micro-batch; behind the last of a step, β moves."""
        try:
            loss = super().training_step(*args, **kwargs)
        finally:
            if self.holds_quantized:
                release(self.adapter.layers)
        if self.accelerator.sync_gradients:
            self._end_step()
        return loss

    def _end_step(self) -> None:
        """Add up the step over ranks, unconditionally, and move β on the step's mean."""
        sums = self._meter.take(interrupted=self._signals.received > 0)
        if self.args.world_size > 1:
            sums = self._sum_over_ranks(sums)
        step = dict(zip(SUMS, sums.tolist(), strict=True))
        share = step.pop("distillation_share")
        self.dropped_terms += int(step.pop("dropped"))
        self.skipped_rows += int(step.pop("skipped"))
        if step.pop("interrupted") > 0:
            self._stop()
        if share > 0:
            step["distillation"] /= share
            if self.args.adaptive_beta:
                self.controller.update(step["distillation"])
        self._meter.end_step(step)

    def _stop(self) -> None:
        """End training behind this step, with a checkpoint, on every rank."""
        self._stopped_by = self._signals.received or signal.SIGTERM
        self.control.should_save = True
        self.control.should_training_stop = True

    # Order of the data

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """An order that is a function of seed and epoch, the same on every rank."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        self._order.sampler = epoch_sampler(dataset, self.args)
        return self._order.sampler or super()._get_train_sampler(train_dataset)

    # Optimizer and logs

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer over `parameter_groups`: log-scales learn faster and never decay."""
        if self.optimizer is None:
            trained: Any = model or self.model
            groups = parameter_groups(
                trained,
                learning_rate=self.args.learning_rate,
                weight_decay=self.args.weight_decay,
                scale_lr_ratio=self.args.scale_lr_ratio,
            )
            optimizer, options = self.get_optimizer_cls_and_kwargs(self.args, trained)
            self.optimizer = optimizer(groups, **options)
        return self.optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds to a training log: the terms' means, β, ω, tokens/s, dropped terms, code flips and
        drift of scales."""
        if "loss" in logs:
            logs.update(self._step_logs())
        super().log(logs, start_time)

    def _step_logs(self) -> dict[str, float]:
        logs = self._meter.means()
        if self.teacher is None or not self.teacher.distils:
            logs.pop("distillation", None)
        else:
            logs[self.args.distillation] = logs.pop("distillation")
            logs["beta"] = self.controller.beta
        if self.teacher is None or not self.teacher.aligns:
            logs.pop("rcka", None)
        else:
            logs["omega"] = self.args.omega_at(max(0, self.state.global_step - 1))
        logs["dropped_terms"] = self.dropped_terms
        logs["skipped_rows"] = self.skipped_rows
        reduce = self._sum_over_ranks if self.args.world_size > 1 else identity
        return {**logs, **self._drift.rates(reduce)}

    # State beside weights and optimizer

    def training_state(self) -> dict[str, Any]:
        """What a checkpoint holds of the run itself: the controller, counters, the steps that the
        next log averages over, which data."""
        return {
            "controller": self.controller.state_dict(),
            "dropped_terms": self.dropped_terms,
            "skipped_rows": self.skipped_rows,
            "steps": self._meter.steps,
            "data": data_state(self.train_dataset, self.args),
        }

    def load_training_state(self, state: Mapping[str, Any]) -> None:
        """Continue from what `training_state` gave."""
        self.controller.load_state_dict(state["controller"])
        self.dropped_terms = state["dropped_terms"]
        self.skipped_rows = state.get("skipped_rows", self.skipped_rows)
        self._meter.steps = list(state.get("steps", ()))
        check_data_state(state.get("data"), data_state(self.train_dataset, self.args), self.args)


def _set_use_cache(config: Any, value: bool | None) -> None:
    """Undo what Trainer does to a config: it switches the cache off for who loads the result."""
    vars(config).pop("use_cache", None)
    if value is not None:
        config.use_cache = value


def _prepare_student(model: nn.Module, args: GraceConfig) -> list[str]:
    """Freeze, hold in fp32 and quantize the student in place; names of its quantized layers."""
    from grace.nn import FakeQuantLinear
    from grace.quantization import quantize

    use_fp32_masters(model)
    if args.freeze_vision:
        adapter_for(model).freeze_vision()
    made = [name for name, part in model.named_modules() if isinstance(part, FakeQuantLinear)]
    if made or not args.quantization:
        return made
    return quantize(model, **args.layer_settings())
