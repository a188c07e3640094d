"""Logits of a model in training and of its packed copy, side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_TOKENS = (2, 16)  # rows and columns of the random batch


@dataclass
class LogitsCheck:
    """How far two models' logits lie apart on the same inputs."""

    tokens: int
    relative_error: float  # norm of the difference / norm of the reference's logits
    tolerance: float  # of that
    largest_difference: float
    top1_agreement: float

    @property
    def ok(self) -> bool:
        """Whether the error is within the tolerance; never where there is a NaN."""
        return self.relative_error <= self.tolerance


@torch.no_grad()
def compare_logits(
    reference: Any, packed: Any, inputs: Mapping[str, Tensor] | None, tolerance: float
) -> LogitsCheck:
    """Runs both models on ``inputs``, or on random tokens, without dropout.

    Sums are taken in another order by the packed layers, so that logits are not bitwise equal even
    where all weights are: that is proven elsewhere, this looks at the kernels and at the loading.
    """
    device = reference.device
    batch = random_tokens(reference.config) if inputs is None else inputs
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    expected = _logits(reference, batch).float()
    actual = _logits(packed.to(device), batch).float()
    agreement = (expected.argmax(-1) == actual.argmax(-1)).float().mean()
    return LogitsCheck(
        tokens=expected[..., 0].numel(),
        relative_error=((expected - actual).norm() / expected.norm()).item(),
        tolerance=tolerance,
        largest_difference=(expected - actual).abs().max().item(),
        top1_agreement=agreement.item(),
    )


def run_dtype(reference: Any) -> torch.dtype:
    """The dtype to run a packed copy in: the reference's, or bfloat16 on a GPU for float32.

    GPU kernels take 16-bit activations; a float32 reference there runs under autocast beside it.
    """
    on_gpu = reference.device.type == "cuda"
    return torch.bfloat16 if on_gpu and reference.dtype == torch.float32 else reference.dtype


def random_tokens(config: Any) -> dict[str, Tensor]:
    """A batch of random text tokens, none of them special, the same for every call."""
    special = set(_token_ids(config.to_dict()))
    size = config.get_text_config().vocab_size
    ordinary = torch.tensor([token for token in range(size) if token not in special] or [0])
    picks = torch.randint(len(ordinary), _TOKENS, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ordinary[picks], "attention_mask": torch.ones(_TOKENS, dtype=torch.long)}


def _token_ids(config: Mapping[str, Any]) -> Iterator[int]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _token_ids(value)
        elif str(name).endswith(("token_id", "token_index")) and value is not None:
            yield from value if isinstance(value, list) else [value]


def _logits(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    training = [module for module in model.modules() if module.training]
    mixed = model.device.type == "cuda" and model.dtype == torch.float32
    model.eval()
    try:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=mixed):
            return model(**batch).logits
    finally:
        for module in training:
            module.training = True
