"""How a decode step may be computed: compiled, and with other attention."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import flex_attention as flex
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import output_capturing

ATTENTIONS = ("sdpa", "eager", "grouped", "flex", "flash")
MODES = ("default", "max-autotune-no-cudagraphs")
_OURS = "grace_"  # begins the names under which transformers knows our attention
_PROGRAMS = 64  # that torch.compile may make of a step: one a size of batch and cache


def decode_forward(model: Any, compile: bool | str) -> Callable[..., Tensor]:
    """Logits [rows, vocabulary], float32, of one token a row.

    Args:
        model: of transformers.
        compile: False, True, or one of `MODES`. True turns products of a single row into
            reductions, which read weights and cache faster than a matrix product would.

    Raises:
        ValueError: another mode.
    """
    keep = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}

    def forward(**inputs: Any) -> Tensor:
        outputs = model(**inputs, **keep, use_cache=True, return_dict=True)
        return outputs.logits[:, -1].float()

    if compile is False:
        return forward
    if compile is not True and compile not in MODES:
        allowed = f"True, False or one of {', '.join(MODES)}"
        raise ValueError(f"Generator: compile must be {allowed}, got {compile!r}")
    if compile is True:
        options: dict[str, Any] = {"coordinate_descent_tuning": True, "triton.cudagraphs": False}
        compiled = torch.compile(forward, dynamic=False, options=options)
    else:
        compiled = torch.compile(forward, dynamic=False, mode=str(compile))

    def compiled_forward(**inputs: Any) -> Tensor:
        try:
            return compiled(**inputs)
        finally:
            _forget_collector()

    return compiled_forward


def _forget_collector() -> None:
    """Resets where transformers' models collect hidden states: a traced forward sets it, and what
    it resets can get lost in the trace. The next prompt's vision tower would then collect nothing.
    """
    collector = getattr(output_capturing, "_active_collector", None)
    if collector is not None:
        collector.reset(None)


def many_programs(compiles: bool) -> Any:
    """Lets torch.compile make a program for every size of batch and cache, inside."""
    if not compiles:
        return contextlib.nullcontext()
    return torch._dynamo.config.patch(recompile_limit=_PROGRAMS)


# --- attention -----------------------------------------------------------------------------------


def known_attention(name: str | None, model: Any) -> str | None:
    """The name by which transformers knows an attention; None for the model's own.

    Raises:
        ValueError: a name not in `ATTENTIONS`, or "flash" where there is none.
    """
    if name is None:
        return None
    if name not in ATTENTIONS:
        allowed = ", ".join(ATTENTIONS)
        raise ValueError(f"Generator: attention must be one of {allowed}, got {name!r}")
    half = model.dtype in (torch.float16, torch.bfloat16)
    if name == "flash" and not (model.device.type == "cuda" and half and _flash_takes_lengths()):
        raise ValueError(
            "Generator: attention 'flash' must have a model in 16 bits on a GPU, and a torch whose "
            f"op takes seqused_k; got {model.dtype} on {model.device}, torch {torch.__version__}"
        )
    own = {"grouped": grouped_attention, "flex": flex_attention, "flash": flash_attention}
    if name not in own:
        return name
    ALL_ATTENTION_FUNCTIONS.register(_OURS + name, own[name])
    ALL_MASK_ATTENTION_FUNCTIONS.register(_OURS + name, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    return _OURS + name


def without_masks() -> str:
    """The name of sdpa by which transformers makes no masks, but attends causally where none are
    given. Of sdpa by its own name it makes them always while a graph is captured."""
    name = _OURS + "causal"
    ALL_ATTENTION_FUNCTIONS.register(name, ALL_ATTENTION_FUNCTIONS["sdpa"])
    return name


@contextlib.contextmanager
def attending(model: Any, name: str | None) -> Iterator[None]:
    """Lets the language model attend by ``name`` inside; vision towers and prompts are outside."""
    text = model.config.get_text_config(decoder=True)
    was = text._attn_implementation
    if name is None or name == was:
        yield
        return
    text._attn_implementation_internal = name
    try:
        yield
    finally:
        text._attn_implementation_internal = was


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of one query a row: heads that share keys are the rows of one product.

    Keys and values are read where they lie; `sdpa` with a mask copies them for every query head.

    Args:
        module: the layer.
        query: [rows, heads, 1, dim].
        key: [rows, key heads, keys, dim].
        value: [rows, key heads, keys, dim].
        attention_mask: bool [rows, 1, 1, keys], True: seen.
        scaling: of the products; default dim^-½.
    """
    rows, heads, _one, dim = query.shape
    grouped = query.view(rows, key.shape[1], -1, dim) * (dim**-0.5 if scaling is None else scaling)
    scores = (grouped @ key.transpose(-1, -2)).float()
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, float("-inf"))
    out = scores.softmax(dim=-1).to(value.dtype) @ value
    return out.reshape(rows, 1, heads, dim), None


def flex_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The same by torch's FlexAttention, which divides the keys of a row among blocks of a GPU:
    arguments as for `grouped_attention`."""

    def seen(score: Tensor, row: Tensor, head: Tensor, one: Tensor, place: Tensor) -> Tensor:
        return torch.where(attention_mask[row, 0, 0, place], score, -float("inf"))

    grouped = query.shape[1] != key.shape[1]
    alone = query.is_cuda and not torch.compiler.is_compiling()
    attend: Any = _compiled_flex() if alone else flex.flex_attention
    out = attend(query, key, value, score_mod=seen, scale=scaling, enable_gqa=grouped)
    return out.transpose(1, 2).contiguous(), None


@cache
def _compiled_flex() -> Callable[..., Any]:
    """Alone it is a kernel only when it is compiled; inside a compiled step it is part of that."""
    return torch.compile(flex.flex_attention, dynamic=False)


def flash_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The same by torch's FlashAttention for sequences of unlike lengths, which reads what is seen.

    Every row and key head is a sequence of its own, that begins behind the row's padding and ends
    with the row: arguments as for `grouped_attention`; what is seen lies together.
    """
    rows, heads, _one, dim = query.shape
    kv_heads, keys = key.shape[1:3]
    sequences = rows * kv_heads
    each, starts, counts = _lengths(attention_mask, kv_heads)
    # The op itself: torch's varlen_attn need not hand on seqused_k.
    out = torch.ops.aten._flash_attention_forward(
        query.reshape(sequences, heads // kv_heads, dim),
        key.reshape(sequences * keys, 1, dim),
        value.reshape(sequences * keys, 1, dim),
        each,
        starts,
        1,
        keys,
        0.0,
        False,
        False,
        scale=scaling,
        seqused_k=counts,
    )[0]
    return out.view(rows, 1, heads, dim), None


_Lengths = tuple[Tensor, Tensor, Tensor]
_last: tuple[Tensor, int, int, _Lengths] | None = None  # mask, its version, key heads, lengths


def _lengths(mask: Tensor, kv_heads: int) -> _Lengths:
    """Where sequences of queries and of keys begin, and how long these are: once a step."""
    global _last
    if (
        torch.compiler.is_compiling() or mask.is_inference()
    ):  # there the compiler finds what is alike
        return sequence_lengths(mask, kv_heads)
    key = (mask, mask._version, kv_heads)
    if _last is None or _last[0] is not mask or _last[1:3] != key[1:]:
        _last = (*key, sequence_lengths(mask, kv_heads))
    return _last[3]


def sequence_lengths(mask: Tensor, kv_heads: int) -> _Lengths:
    """Of a mask bool [rows, 1, 1, keys], int32: [sequences + 1], [sequences + 1], [sequences].

    Every row and key head is a sequence: one query, and keys in ``keys`` places of which those
    from the first that is seen are used.
    """
    rows, keys = mask.shape[0], mask.shape[-1]
    seen = mask.view(rows, keys).to(torch.int32)
    first = seen.argmax(dim=1).to(torch.int32)
    counts = seen.sum(dim=1, dtype=torch.int32)
    spread = (rows, kv_heads)
    each = torch.arange(rows * kv_heads + 1, dtype=torch.int32, device=mask.device)
    begins = first[:, None].expand(spread).reshape(-1)
    starts = each * keys + torch.cat([begins, begins.new_zeros(1)])
    # The op wants them one after another in memory; of one row, reshape gives a view.
    return each, starts, counts[:, None].expand(spread).reshape(-1).contiguous()


def _flash_takes_lengths() -> bool:
    schema = torch.ops.aten._flash_attention_forward.default._schema
    return any(argument.name == "seqused_k" for argument in schema.arguments)
