"""In which order an epoch visits its items: a function of the seed and the epoch, nothing else.

No state of a generator has to be saved, so a resumed run goes on as the uninterrupted one would,
and every rank makes the same order, of which accelerate gives it its batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_STEPS = 64  # optimizer steps that are sorted by length at once


class EpochSampler(Sampler[int]):
    """A permutation of `size` items for each epoch.

    Given lengths, items of a like length stand in one optimizer step: the permutation is cut into
    stretches of 64 steps, each stretch is sorted, and its steps are shuffled with all others. The
    step of the longest item comes first, so that a run that does not fit ends at once.

    Args:
        size: number of items.
        seed: of the order.
        lengths: int [size], where items are to be grouped.
        step: items of an optimizer step, over micro-batches and ranks: the order is the same on
            any number of ranks with the same step.
    """

    def __init__(
        self, size: int, seed: int, lengths: np.ndarray | None = None, step: int = 1
    ) -> None:
        if lengths is not None and len(lengths) != size:
            raise ValueError(f"EpochSampler: lengths must have {size} entries, got {len(lengths)}")
        if step < 1:
            raise ValueError(f"EpochSampler: step must be >= 1, got {step}")
        self.size, self.seed, self.lengths, self.step = size, seed, lengths, step
        self.epoch = 0

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        return iter(self.order().tolist())

    def set_epoch(self, epoch: int) -> None:
        """Which epoch the next iteration is of, counted from zero."""
        self.epoch = epoch

    def order(self) -> np.ndarray:
        """The items of the epoch, int64 [size]."""
        random = np.random.default_rng([self.seed, self.epoch])
        order = random.permutation(self.size)
        if self.lengths is None:
            return order
        order = self._sorted_by_stretch(order, self.lengths)
        steps = self.size // self.step
        places = random.permutation(steps)
        if steps:
            longest = int(self.lengths[order[: steps * self.step]].argmax()) // self.step
            first = int(np.flatnonzero(places == longest)[0])
            places[[0, first]] = places[[first, 0]]
        whole = order[: steps * self.step].reshape(steps, self.step)[places]
        return np.concatenate([whole.reshape(-1), order[steps * self.step :]])

    def _sorted_by_stretch(self, order: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        stretch = _STEPS * self.step
        # The last, incomplete step is drawn before sorting: it is of no particular length.
        whole = len(order) // self.step * self.step
        stretches = np.arange(whole) // stretch
        by_length = np.lexsort((-lengths[order[:whole]], stretches))
        return np.concatenate([order[:whole][by_length], order[whole:]])


class EpochSetter(TrainerCallback):
    """Tells a sampler the epoch: a resumed run's data loader does not on more than one rank."""

    sampler: EpochSampler | None = None

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Before the epoch's first batch is drawn."""
        if self.sampler is not None:
            self.sampler.set_epoch(int(state.epoch or 0))


def epoch_sampler(dataset: Any, args: TrainingArguments) -> EpochSampler | None:
    """The sampler of a run; None where transformers' own is to be taken (`sequential` and so on).

    Raises:
        ValueError: `group_by_length` of a data set that does not tell its `lengths`.
    """
    strategy = args.train_sampling_strategy
    if strategy not in ("random", "group_by_length") or not hasattr(dataset, "__len__"):
        return None
    seed = args.data_seed if args.data_seed is not None else args.seed
    if strategy == "random":
        return EpochSampler(len(dataset), seed)
    if not hasattr(dataset, "lengths"):
        raise ValueError(
            "GraceTrainer: train_dataset must have lengths for train_sampling_strategy "
            f"'group_by_length', got {type(dataset).__name__}"
        )
    return EpochSampler(len(dataset), seed, dataset.lengths, _step_items(args))


def _step_items(args: TrainingArguments) -> int:
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size


def data_state(dataset: Any, args: TrainingArguments) -> dict[str, Any]:
    """What the order of a run's items depends on, for its checkpoints."""
    return {
        "items": len(dataset) if hasattr(dataset, "__len__") else None,
        "fingerprint": getattr(dataset, "fingerprint", None),
        "seed": args.data_seed if args.data_seed is not None else args.seed,
        "strategy": str(args.train_sampling_strategy),
        "step": _step_items(args),
    }


def check_data_state(
    saved: Mapping[str, Any] | None, now: Mapping[str, Any], args: TrainingArguments
) -> None:
    """Raise ValueError where a run would not go on with the items that it has not seen.

    `ignore_data_skip` asks for another order. A checkpoint without a data state is let pass.
    """
    if not saved or args.ignore_data_skip:
        return
    for name, value in now.items():
        if value != saved.get(name, value):
            raise ValueError(
                f"GraceTrainer: data must be that of the checkpoint ({name} {saved[name]!r}), got "
                f"{name} {value!r}; ignore_data_skip=true starts an epoch anew with it"
            )
