"""Options of a training run: those of transformers' Trainer, and those of GRACE."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from transformers import TrainingArguments

PRESETS: dict[str, dict[str, Any]] = {
    # The hyper-parameters of the paper (arXiv 2601.22709); they are also GraceConfig's defaults.
    "paper": {
        "temperature": 2.0,
        "alpha": 1.0,
        "beta_dkd": 4.0,
        "omega": 1.0,
        "omega_warmup_steps": 0,
        "tau": 0.35,
        "eta": 0.0015,
        "beta_init": 1.0,
        "beta_min": 0.1,
        "beta_max": 5.0,
        "ema_decay": 0.99,
        "scale_lr_ratio": 10.0,
    },
    # Those of the authors' Qwen3-VL runs, where the distillation term is about ten times larger.
    "qwen3vl": {
        "omega": 3.0,
        "omega_warmup_steps": 400,
        "tau": 3.0,
        "eta": 0.003,
        "beta_init": 0.5,
        "beta_min": 0.1,
        "beta_max": 1.0,
    },
}
DISTILLATIONS = ("gdkd", "kd", "none")
SCALE_DTYPES = ("bfloat16", "float16", "float32", None)
HELD_BY_DEFAULT = 4 * 2**30  # bytes of quantized weights: of a student of 2 billion, in bf16
SCALE_INITS = ("mse", "p99", "absmax")
ATTENTIONS = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")


@dataclass
class GraceConfig(TrainingArguments):
    """Options of `GraceTrainer`: loss = CE + beta * distillation + omega * RCKA.

    Every field of transformers' `TrainingArguments` may be given too. A field outside its range
    raises ValueError at construction.
    """

    # Quantization
    quantization: bool = field(
        default=True, metadata={"help": "Train through fake quantization (False: full precision)."}
    )
    bits: int = field(default=4, metadata={"help": "Bits of a weight, 2 to 8."})
    group_size: int = field(
        default=128, metadata={"help": "Weights that share a scale; -1: one group a row."}
    )
    scale_dtype: str | None = field(
        default="bfloat16", metadata={"help": "Grid that scales are rounded to; None: fp32."}
    )
    scale_init: str = field(default="mse", metadata={"help": "First scales: mse, p99 or absmax."})
    scale_lr_ratio: float = field(
        default=10.0, metadata={"help": "Learning rate of log-scales over that of weights."}
    )
    skip: list[str] = field(
        default_factory=list, metadata={"help": "Regexes of decoder linears kept unquantized."}
    )
    overrides: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "Regex of decoder linears to their own bits, group_size, scale_dtype, init; "
            "null: not quantized. Later ones win."
        },
    )
    freeze_vision: bool = field(default=True, metadata={"help": "Keep the vision tower as it is."})
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "Attention of both models, as transformers names it; None: its choice."},
    )

    # Distillation
    distillation: str = field(
        default="gdkd",
        metadata={"help": "gdkd; kd: T²·KL over the vocabulary, without a gate; none."},
    )
    gate: bool = field(default=True, metadata={"help": "Weight tokens by the teacher's certainty."})
    temperature: float = field(default=2.0, metadata={"help": "Temperature of the distillation."})
    alpha: float = field(default=1.0, metadata={"help": "Weight of the target-class term."})
    beta_dkd: float = field(default=4.0, metadata={"help": "Weight of the non-target term."})

    keep_logits: bool = field(
        default=False,
        metadata={
            "help": "Keep both heads' logits of supervised tokens until the backward (gdkd): no "
            "product is made twice, for 2·n·(Vs + Vt) bytes in 16 bits. False: a chunk at a time."
        },
    )
    chunk_size: int | None = field(
        default=None,
        metadata={"help": "Tokens whose logits exist at a time; None: 384 MiB of logits."},
    )

    # The teacher
    teacher_bits: int | None = field(
        default=None,
        metadata={"help": "Run the teacher's decoder at 4 or 8 bits, on packed kernels."},
    )
    teacher_group_size: int = field(
        default=128, metadata={"help": "Weights of a teacher's scale; -1: one group a row."}
    )
    teacher_fsdp: bool = field(
        default=False, metadata={"help": "Shard the teacher over the ranks with FSDP2."}
    )
    teacher_stream: bool = field(
        default=False,
        metadata={"help": "Run the teacher on a CUDA stream of its own, beside the student."},
    )

    # Relational alignment
    omega: float = field(default=1.0, metadata={"help": "Weight of RCKA; 0: without it."})
    omega_warmup_steps: int = field(
        default=0, metadata={"help": "Steps in which omega rises linearly from zero."}
    )
    rcka_layer: int = field(
        default=-2,
        metadata={"help": "Decoder layer whose output is aligned, counted from the end, <= -2."},
    )
    rcka_min_tokens: int = field(
        default=4, metadata={"help": "Images with fewer visual tokens do not count in RCKA."}
    )

    # Information-bottleneck controller of beta
    adaptive_beta: bool = field(
        default=True, metadata={"help": "Let the controller move beta (False: beta_init)."}
    )
    tau: float = field(default=0.35, metadata={"help": "Distillation loss that beta aims at."})
    eta: float = field(default=0.0015, metadata={"help": "Step of the controller."})
    beta_init: float = field(default=1.0, metadata={"help": "First (or fixed) beta."})
    beta_min: float = field(default=0.1, metadata={"help": "Lower bound of beta."})
    beta_max: float = field(default=5.0, metadata={"help": "Upper bound of beta."})
    ema_decay: float = field(default=0.99, metadata={"help": "Decay of the controller's average."})

    hold_quantized: bool | None = field(
        default=None,
        metadata={
            "help": "Keep the quantized weights of all layers from forward to backward, 2 bytes a "
            "weight in bf16: gradient checkpointing then does not make them twice. Default: where "
            "it would, without FSDP, and where they are 4 GiB at most."
        },
    )

    # Defaults of TrainingArguments that do not fit: batches carry more than `forward` takes, no
    # forward makes logits to predict from, and a loss that is not finite the trainer tells itself.
    remove_unused_columns: bool = field(default=False)
    prediction_loss_only: bool = field(default=True)
    logging_nan_inf_filter: bool = field(default=False)
    logging_steps: float = field(default=10)

    def __post_init__(self) -> None:
        _check(self)
        if self.ddp_find_unused_parameters is None:
            # Every batch runs the vision tower, so that all of the rest always has a gradient; a
            # tower that trains may have layers behind the one whose features are taken.
            self.ddp_find_unused_parameters = not self.freeze_vision
        super().__post_init__()

    @classmethod
    def from_preset(cls, preset: str, **options: Any) -> GraceConfig:
        """The configuration of a preset, `paper` or `qwen3vl`, with `options` on top.

        Raises:
            ValueError: for an unknown preset, an unknown option, or a value out of range.
        """
        if preset not in PRESETS:
            raise ValueError(
                f"GraceConfig: preset must be one of {', '.join(PRESETS)}, got {preset!r}"
            )
        check_keys(options)
        return cls(**{**PRESETS[preset], **options})

    @property
    def n_gpu(self) -> int:
        """GPUs of this process: one at most. Trainer would spread a lone process over all by
        DataParallel, which copies modules and so loses what their hooks know."""
        return min(1, super().n_gpu)

    @property
    def needs_teacher(self) -> bool:
        """Whether any term of the loss looks at the teacher."""
        return self.distillation != "none" or self.omega > 0

    def holds_quantized(self, size: int) -> bool:
        """Whether quantized weights of `size` bytes are kept from forward to backward."""
        if self.hold_quantized is not None:
            return self.hold_quantized
        made_twice = self.gradient_checkpointing and not self.fsdp
        return made_twice and size <= HELD_BY_DEFAULT

    @property
    def loss_dtype(self) -> torch.dtype | None:
        """Dtype of the products with the heads: that of autocast; None: of the hidden states."""
        return torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else None

    def layer_settings(self) -> dict[str, Any]:
        """Arguments of `grace.quantize`, those of every layer and the overrides."""
        overrides = {
            pattern: None if options is None else _with_dtype(options)
            for pattern, options in self.overrides.items()
        }
        return {
            "bits": self.bits,
            "group_size": self.group_size,
            "skip": self.skip or None,
            "scale_dtype": _dtype(self.scale_dtype),
            "init": self.scale_init,
            "overrides": overrides,
        }

    def omega_at(self, step: int) -> float:
        """RCKA's weight in optimizer step `step`, counted from zero."""
        if self.omega_warmup_steps == 0:
            return self.omega
        return self.omega * min(1.0, (step + 1) / self.omega_warmup_steps)


def check_keys(options: dict[str, Any]) -> None:
    """Raise ValueError for a key that no field has, with the nearest that there is."""
    known = [item.name for item in fields(GraceConfig) if item.init]
    for key in options:
        if key not in known:
            raise ValueError(f"GraceConfig: unknown option {key!r}{suggestion(key, known)}")


def suggestion(key: str, known: list[str]) -> str:
    """`, did you mean …?` where a known key is near."""
    from difflib import get_close_matches

    near = get_close_matches(key, known, n=1)
    return f", did you mean {near[0]!r}?" if near else ""


def _dtype(name: str | None) -> torch.dtype | None:
    return None if name is None else getattr(torch, name)


def _with_dtype(options: dict[str, Any]) -> dict[str, Any]:
    return {key: _dtype(v) if key == "scale_dtype" else v for key, v in options.items()}


def _check_overrides(overrides: Any) -> None:
    """The form of `overrides`; what a model has to match is checked where there is one."""
    allowed: dict[str, Any] = {
        "bits": range(2, 9),
        "group_size": None,
        "scale_dtype": SCALE_DTYPES,
        "init": SCALE_INITS,
    }
    if not isinstance(overrides, dict):
        raise ValueError(f"GraceConfig: overrides must map regexes to options, got {overrides!r}")
    for pattern, options in overrides.items():
        where = f"GraceConfig: overrides[{pattern!r}]"
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ValueError(f"{where} must have a regex as its key, got {error}") from None
        if options is not None and not isinstance(options, dict):
            raise ValueError(f"{where} must be null or options, got {options!r}")
        for key, value in (options or {}).items():
            if key not in allowed:
                raise ValueError(f"{where} must have {', '.join(allowed)}, got {key!r}")
            if allowed[key] is not None and value not in allowed[key]:
                raise ValueError(f"{where}.{key} must be one of {list(allowed[key])}, got {value}")


def _check(config: GraceConfig) -> None:
    """Raise ValueError for a field of GRACE that is out of its range."""
    _check_overrides(config.overrides)
    _require(config, "bits", isinstance(config.bits, int) and 2 <= config.bits <= 8, "be 2 to 8")
    _require(config, "group_size", config.group_size == -1 or config.group_size > 0, "be > 0 or -1")
    for name, allowed in (
        ("scale_dtype", SCALE_DTYPES),
        ("scale_init", SCALE_INITS),
        ("distillation", DISTILLATIONS),
    ):
        _require(config, name, getattr(config, name) in allowed, f"be one of {allowed}")
    attention = config.attn_implementation
    fits = attention is None or attention in ATTENTIONS
    _require(config, "attn_implementation", fits, f"be None or one of {ATTENTIONS}")
    for name in ("scale_lr_ratio", "temperature", "beta_init", "beta_max"):
        _require(config, name, getattr(config, name) > 0, "be > 0")
    _require(config, "chunk_size", config.chunk_size is None or config.chunk_size > 0, "be > 0")
    kept = config.keep_logits and config.chunk_size is not None
    _require(config, "chunk_size", not kept, "be None with keep_logits")
    _require(config, "teacher_bits", config.teacher_bits in (None, 4, 8), "be 4, 8 or None")
    group = config.teacher_group_size
    _require(config, "teacher_group_size", group == -1 or group > 0, "be > 0 or -1")
    both = config.teacher_fsdp and config.teacher_bits is not None  # packed weights are buffers
    _require(config, "teacher_fsdp", not both, "be False with teacher_bits")
    for name in ("alpha", "beta_dkd", "omega", "omega_warmup_steps", "eta", "beta_min"):
        _require(config, name, getattr(config, name) >= 0, "be >= 0")
    _require(config, "ema_decay", 0 <= config.ema_decay < 1, "be in [0, 1)")
    ordered = config.beta_min <= config.beta_init <= config.beta_max
    _require(config, "beta_init", ordered, f"lie in [{config.beta_min}, {config.beta_max}]")
    # At -1 `hidden_states` holds the normed output and a layer's own output is not normed:
    # two tensors that only go by the same index up to the layer before the last.
    _require(config, "rcka_layer", config.rcka_layer <= -2, "be <= -2")
    _require(config, "rcka_min_tokens", config.rcka_min_tokens >= 2, "be >= 2")
    reentrant = _as_dict(config.gradient_checkpointing_kwargs).get("use_reentrant", False)
    _require(config, "gradient_checkpointing_kwargs", not reentrant, "not ask for use_reentrant")
    _require(config, "label_smoothing_factor", config.label_smoothing_factor == 0, "be 0")


def _as_dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _require(config: GraceConfig, name: str, holds: bool, rule: str) -> None:
    if not holds:
        raise ValueError(f"GraceConfig: {name} must {rule}, got {getattr(config, name)!r}")
