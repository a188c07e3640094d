"""What a run takes of a GPU's memory, before anything is loaded: `grace train --plan`.

Parameters, gradients and optimizer are counted exactly, from configs. Activations follow what
PyTorch keeps for the backward of a decoder layer of these families (norm, attention by sdpa, gated
MLP). All parts are added up, as if their peaks came together: an upper bound, but for what the
allocator loses to fragmentation.
"""

from __future__ import annotations

from dataclasses import dataclass

from grace.ops.linear_gated_dkd import CHUNK_BYTES
from grace.training.config import GraceConfig
from grace.training.model_sizes import Decoder, ModelSize
from grace.training.objective import CHUNK_LOGITS

_MASTER = 4  # bytes of a weight, gradient or log-scale in fp32
_CONTEXT = 2**30  # CUDA context, cuBLAS workspace, kernels
# Bytes a trainable parameter of optimizers' states; others keep two moments in fp32, as AdamW.
_OPTIMIZER = {"sgd": 0, "lion": 4, "lion_8bit": 1, "adamw_8bit": 2, "adamw_bnb_8bit": 2}
_OPTIMIZER |= {"paged_adamw_8bit": 2, "paged_lion_8bit": 1, "paged_lion_32bit": 4}
_OPTIMIZER |= {"lion_32bit": 4, "rmsprop": 4, "adagrad": 4, "adafactor": 0}


@dataclass(frozen=True)
class Load:
    """What one GPU works on at a time.

    Attributes:
        rows: sequences of a micro-batch.
        tokens: of a sequence.
        compute: bytes of a number in products: 2 under autocast, else 4.
        gpus: ranks of the run.
        sharded: whether parameters, gradients and optimizer are shared out over them (FSDP).
    """

    rows: int
    tokens: int
    compute: int = 2
    gpus: int = 1
    sharded: bool = False

    @property
    def positions(self) -> int:
        """Tokens of a micro-batch."""
        return self.rows * self.tokens


def estimate(
    student: ModelSize, teacher: ModelSize | None, config: GraceConfig, load: Load
) -> dict[str, int]:
    """Bytes a GPU, by part, in the order they are told of; activations as `config` has them.

    Args:
        student: `size_of` it, with the run's quantization.
        teacher: None where no term needs one.
        config: the run's options.
        load: batch and ranks.
    """
    shards = load.gpus if load.sharded else 1
    trained = student.trainable + student.log_scales
    parts = {
        "student, fp32 masters": _MASTER * (student.parameters + student.log_scales) // shards,
        "gradients": _MASTER * trained // shards,
        "optimizer": optimizer_bytes(str(config.optim)) * trained // shards,
        "teacher": 0 if teacher is None else load.compute * teacher.parameters,
        "activations": activations(student, load, config.gradient_checkpointing),
        "quantized weights held": held_weights(student, load, config),
        "teacher's forward": 0 if teacher is None else _forward(teacher.decoder, load),
        "logits, in chunks": logits(student, teacher, config, load),
        "workspace": workspace(student, load, shards),
    }
    if load.gpus > 1 and not load.sharded:
        parts["buckets of DDP"] = _MASTER * trained
    return parts


def optimizer_bytes(name: str) -> int:
    """State of an optimizer of transformers, bytes a parameter; 8 for one that is not listed."""
    return _OPTIMIZER.get(name.rpartition(".")[2].lower(), 8)


def layer_activations(decoder: Decoder, compute: int) -> int:
    """Bytes a token that a decoder layer keeps for its backward, beside weights.

    With the residual stream in fp32 and d, h, k, f the widths of stream, queries, keys, MLP:

        norms: 4·d numbers in fp32 (input and normed, twice)
        products' inputs: x for q, k, v, gate, up (autocast casts each: 5·d; fp32: 2·d), h, f
        attention: h + 2·k; gate, its activation, up: 3·f; log-sum-exp and the norms' factors
    """
    d, h, k, f = decoder.width, decoder.query_width, decoder.key_width, decoder.inner
    inputs = 5 * d if compute < _MASTER else 2 * d
    rows = _MASTER * (4 * d + decoder.heads + 2) + compute * (inputs + 2 * h + 2 * k + 4 * f)
    if not decoder.normed_heads:
        return rows
    return rows + (compute + _MASTER) * (h + k) + _MASTER * (decoder.heads + decoder.key_heads)


def activations(student: ModelSize, load: Load, checkpointing: bool) -> int:
    """Bytes kept from forward to backward: every layer's, or its inputs and one layer's."""
    decoder = student.decoder
    copied = student.quantized > 0 or load.compute < _MASTER  # weights as they are multiplied
    weights = load.compute * decoder.layer_weights if copied else 0
    one = load.positions * layer_activations(decoder, load.compute) + weights
    if not checkpointing:
        return decoder.layers * one
    return decoder.layers * load.positions * _MASTER * decoder.width + one


def held_weights(student: ModelSize, load: Load, config: GraceConfig) -> int:
    """Bytes of quantized weights that `hold_quantized` keeps beside the activations; without
    checkpointing the activations hold them already."""
    size = load.compute * student.quantized
    return size if config.gradient_checkpointing and config.holds_quantized(size) else 0


def _forward(decoder: Decoder, load: Load) -> int:
    """Bytes of a forward that keeps nothing: the widest layer's tensors, and the rows it leaves."""
    widest = 3 * decoder.inner + 4 * decoder.width + 2 * decoder.query_width
    return load.compute * load.positions * (widest + 2 * decoder.width)


def logits(student: ModelSize, teacher: ModelSize | None, config: GraceConfig, load: Load) -> int:
    """Bytes of logits that exist at a time with their gradient, and of the head as it is
    multiplied with its gradient; every token counted as supervised."""
    decoder = student.decoder
    cast = load.compute * decoder.classes * decoder.width if load.compute < _MASTER else 0
    classes = decoder.classes + (0 if teacher is None else teacher.decoder.classes)
    whole = load.compute * load.positions * classes
    if config.distillation == "gdkd" and teacher is not None:
        return min(whole, CHUNK_BYTES) * 3 // 2 + 2 * cast
    return min(4 * load.positions * classes, 4 * CHUNK_LOGITS) * 4 + 2 * cast


def workspace(student: ModelSize, load: Load, shards: int) -> int:
    """Bytes of context and libraries, of one layer's q·s and its gradient as they are made, and,
    sharded, of one layer and its gradient gathered."""
    quantizing = 2 * load.compute * student.decoder.layer_weights if student.quantized else 0
    gathered = 2 * _MASTER * student.decoder.layer_weights if shards > 1 else 0
    return _CONTEXT + quantizing + gathered
