"""Untrained LLaVA models for the drawn benchmark, and the processor they share.

The tokenizer knows every word of the benchmark. What is no word (letters to be read, numbers,
names in programs) it spells: `KABO` is `K ##A ##B ##O`, `127` is `1 ##2 ##7`.
"""

from __future__ import annotations

import re
import string
from functools import cache
from random import Random

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast

from ..tiny import SPECIAL, Size, llava_model, llava_processor
from ..topics import SUFFIX, plural
from .describing import DESCRIBE
from .topics import (
    ask_color,
    ask_condition,
    ask_count,
    ask_existence,
    ask_landscape,
    ask_place,
    ask_position,
    ask_result,
    ask_translation,
    pose,
)
from .vocabulary import ADJECTIVES, COLORS, CONDITIONS, NOUNS, PLACES, SHAPES, french

PATCH = 14
# Words (a name or what is quoted may touch punctuation) and single signs.
_PIECES = r"[^\W_]+|[^\w\s]|_"


def _sentences() -> list[str]:
    """Texts that hold every word that is asked, answered or described."""
    texts = [DESCRIBE, "text : ; nothing Yes No", ask_result("sum", 1), ask_result("program", 1)]
    texts += [ask_existence(color, "star") for color in COLORS]
    texts += [
        f"{ask_count('', s)} {ask_color(s)} {plural(s)} {ask_existence('red', s)}" for s in SHAPES
    ]
    texts += [ask_position("star", side, "moon") for side in ("left", "right", "above", "below")]
    texts += [ask_condition("day"), ask_place("beach")]
    texts += [ask_landscape(place, condition) for place in PLACES for condition in CONDITIONS]
    texts += [f"{french(n, a)} {ask_translation(n, a)}" for n in NOUNS for a in ADJECTIVES]
    rng = Random(0)
    subtasks = ("existence", "count", "position", "OCR", "numerical_calculation")
    for subtask in (*subtasks, "text_translation", "code_reasoning", "scene", "color"):
        for level in ("easy", "hard"):
            for _ in range(8):  # the wordings; what varies in them is spelled or stands above
                topic = pose(subtask, level, "train", rng)
                texts += [*topic.questions, topic.open_question]
    return texts


@cache
def vocabulary() -> tuple[str, ...]:
    """All tokens, in the order of their ids; the benchmark's suffix is one."""
    # Programs are spelled out of their keywords; the names in them are random.
    keywords = "a b c n i j x name print len total for in range if else append sum"
    words = sorted({w for text in _sentences() for w in re.findall(_PIECES, text) if _is_word(w)})
    signs = list("+-×*=<>%()[]{}:;,.?\"'_/")
    letters = [*string.ascii_uppercase, *string.ascii_lowercase, *string.digits]
    spelled = [*letters, *(f"##{letter}" for letter in letters)]
    tokens = [*SPECIAL, SUFFIX.strip(), *words, *keywords.split(), *signs, *spelled]
    return tuple(dict.fromkeys(tokens))


def _is_word(piece: str) -> bool:
    """Not a number, and not capitals that have to be read."""
    return not piece.isdigit() and not (len(piece) > 1 and piece.isupper())


def make_processor(pixels: int, patch: int = PATCH) -> LlavaProcessor:
    """The processor of images `pixels` wide.

    Raises:
        ValueError: `patch` does not divide `pixels`.
    """
    if pixels % patch:
        raise ValueError(f"drawn: pixels must be a multiple of the patch {patch}, got {pixels}")
    ids = {word: index for index, word in enumerate(vocabulary())}
    pieces = Tokenizer(models.WordPiece(ids, unk_token="<unk>", max_input_chars_per_word=64))
    pieces.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(_PIECES), "isolated")]
    )
    pieces.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    pieces.add_special_tokens([AddedToken(token, lstrip=True) for token in SPECIAL])
    pieces.add_tokens([AddedToken(SUFFIX.strip(), lstrip=True, normalized=False)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=pieces,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
    return llava_processor(tokenizer, pixels, patch)


def make_model(
    size: Size, seed: int, pixels: int, patch: int = PATCH
) -> LlavaForConditionalGeneration:
    """An untrained model in fp32 for the processor of `make_processor`."""
    ids = {word: index for index, word in enumerate(vocabulary())}
    return llava_model(size, seed, ids, pixels, patch)
