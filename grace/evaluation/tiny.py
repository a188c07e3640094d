"""The tiny teacher and student: LLaVA in a few hundred thousand parameters, shipped with grace.

Both are ordinary transformers checkpoints (`LlavaForConditionalGeneration`, CLIP vision tower,
Llama language model, word-level tokenizer, `LlavaProcessor`) that answer the questions of
`grace.evaluation.synthetic`. `python -m grace.evaluation.make_tiny` makes them from scratch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from .drawing import CELL_PIXELS, CELLS, COLORS, IMAGE_PIXELS, SHAPES, THINGS
from .topics import NUMBERS, SUFFIX, SUMS, plural

ROOT = Path(__file__).parent / "tiny_models"
IMAGE_TOKEN = "<image>"
IMAGE_TOKENS = CELLS  # one visual token a cell
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>", IMAGE_TOKEN, "USER:", "ASSISTANT:"]
_PHRASES = (
    "Is there a or one in this image ? Are are How many What color is the text answer to sum "
    "on left right of above below Yes No nothing row column"
)
_TEMPLATE = (
    "<s>{% for message in messages %}{% if message['role'] == 'user' %}USER:"
    "{% for part in message['content'] if part['type'] == 'image' %} <image>{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %} {{ part['text'] }}{% endfor %}"
    "{% else %} ASSISTANT:{% generation %}"
    "{% for part in message['content'] if part['type'] == 'text' %} {{ part['text'] }}{% endfor %}"
    "</s>{% endgeneration %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


@dataclass(frozen=True)
class Size:
    """Widths and depths of a tiny model; every decoder linear has `width` or `inner` inputs."""

    width: int
    inner: int
    layers: int
    heads: int
    vision_width: int
    vision_layers: int = 2
    kv_heads: int | None = None  # None: as many as heads


TEACHER = Size(width=96, inner=192, layers=4, heads=4, vision_width=64)
STUDENT = Size(width=64, inner=128, layers=3, heads=4, vision_width=32, kv_heads=2)


def teacher_dir() -> Path:
    """Directory of the shipped teacher checkpoint; FileNotFoundError when it is not there."""
    return _shipped("teacher")


def student_dir() -> Path:
    """Directory of the shipped student checkpoint; FileNotFoundError when it is not there."""
    return _shipped("student")


def _shipped(name: str) -> Path:
    directory = ROOT / name
    if not (directory / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"tiny: the shipped {name} must be in {directory}, got no model.safetensors there; "
            "make it with: python -m grace.evaluation.make_tiny"
        )
    return directory


def vocabulary() -> list[str]:
    """All words, in the order of their ids; the benchmark's suffix is one token."""
    words = [*SPECIAL, SUFFIX.strip(), *_PHRASES.split(), *COLORS, *THINGS, *NUMBERS]
    words += [plural(shape) for shape in SHAPES] + [str(total) for total in SUMS]
    return list(dict.fromkeys(words))


def make_processor() -> LlavaProcessor:
    """Word-level tokenizer, PIL image processor (no torchvision) and a LLaVA-1.5 chat template."""
    ids = {word: index for index, word in enumerate(vocabulary())}
    words = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("?", "isolated")]
    )
    words.add_special_tokens([AddedToken(token, lstrip=True) for token in SPECIAL])
    words.add_tokens([AddedToken(SUFFIX.strip(), lstrip=True, normalized=False)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    return llava_processor(tokenizer, IMAGE_PIXELS, CELL_PIXELS)


def llava_processor(tokenizer: Any, pixels: int, patch: int) -> LlavaProcessor:
    """A processor of square images, `pixels` wide in patches of `patch`, with a LLaVA-1.5 chat
    template; the tokenizer knows the tokens of `SPECIAL`."""
    size = {"height": pixels, "width": pixels}
    images = CLIPImageProcessorPil(
        size=size, crop_size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_TEMPLATE,
    )


def make_model(size: Size, seed: int) -> LlavaForConditionalGeneration:
    """An untrained model in fp32 with fan-in initialisation from `seed`."""
    ids = {word: index for index, word in enumerate(vocabulary())}
    return llava_model(size, seed, ids, IMAGE_PIXELS, CELL_PIXELS)


def llava_model(
    size: Size, seed: int, ids: Mapping[str, int], pixels: int, patch: int
) -> LlavaForConditionalGeneration:
    """As `make_model`, for a tokenizer's `ids` and images `pixels` wide in patches of `patch`."""
    vision = CLIPVisionConfig(
        hidden_size=size.vision_width,
        intermediate_size=2 * size.vision_width,
        num_hidden_layers=size.vision_layers,
        num_attention_heads=4,
        image_size=pixels,
        patch_size=patch,
        projection_dim=size.vision_width,
    )
    text = LlamaConfig(
        vocab_size=len(ids),
        hidden_size=size.width,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads or size.heads,
        max_position_embeddings=max(512, 2 * (pixels // patch) ** 2),
        pad_token_id=ids["<pad>"],
        bos_token_id=ids["<s>"],
        eos_token_id=ids["</s>"],
        tie_word_embeddings=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=ids[IMAGE_TOKEN],
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # for what `initialize` leaves alone: CLIP's class embedding
        model = LlavaForConditionalGeneration(config)
    initialize(model, seed)
    return model


@torch.no_grad()
def initialize(model: LlavaForConditionalGeneration, seed: int) -> None:
    """Normal weights of standard deviation fan_in^-1/2; layers that write to a residual stream
    of L layers have (2 L fan_in)^-1/2, and embeddings 1/2.

    transformers' default, 0.02 whatever the width, leaves layers this narrow near zero: such
    models stay at chance for minutes.
    """
    random = torch.Generator().manual_seed(seed)
    layers = len(model.model.language_model.layers)
    for name, module in sorted(model.named_modules()):
        if isinstance(module, nn.Linear | nn.Conv2d):
            gain = 2 * layers if re.search(r"o_proj|down_proj|out_proj|fc2", name) else 1
            deviation = 1 / math.sqrt(gain * module.weight[0].numel())
        elif isinstance(module, nn.Embedding):
            deviation = 0.5
        else:
            continue
        module.weight.normal_(0.0, deviation, generator=random)
        if getattr(module, "bias", None) is not None:
            module.bias.zero_()
