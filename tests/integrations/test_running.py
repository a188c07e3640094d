"""What transformers does with a packed model: auto classes, places, generation, compilation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import transformers
from families import FAMILIES
from packed_models import assert_same_files, export_tiny, packed_layers
from PIL import Image
from torch import nn

import grace
from grace.evaluation import synthetic
from grace.evaluation.answer import answer

CHATS = "Is there a red circle in this image ?", "How many squares are there ?"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("running") / "packed"
    export_tiny(directory)
    return directory


@pytest.fixture(scope="module")
def model(packed: Path) -> Any:
    return transformers.AutoModelForImageTextToText.from_pretrained(packed)


@pytest.fixture(scope="module")
def inputs(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    processor = transformers.AutoProcessor.from_pretrained(packed)
    image = picture(tmp_path_factory.mktemp("picture"))
    return processor.apply_chat_template(
        [chat(image, CHATS[0])],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def picture(directory: Path) -> Image.Image:
    synthetic.draw(directory / "drawn", images_per_subtask=1, seed=0)
    with Image.open(directory / "drawn" / "existence" / "000.png") as image:
        return image.convert("RGB")


def chat(image: Image.Image, question: str) -> list[dict[str, Any]]:
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


def generate(model: Any, inputs: Any, **options: Any) -> list[int]:
    """Eight new tokens, greedily, whatever the model would end with."""
    tokens = model.generate(
        **inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False, **options
    )
    return tokens[0, inputs["input_ids"].shape[1] :].tolist()


def gemma3() -> nn.Module:
    """A vision-language model that AutoModelForCausalLM knows too."""
    torch.manual_seed(0)
    config = transformers.Gemma3Config(
        text_config={**models.TEXT, "head_dim": 16},
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 8,
        },
        mm_tokens_per_image=4,
        image_token_index=90,
        boi_token_index=91,
        eoi_token_index=92,
    )
    return transformers.Gemma3ForConditionalGeneration(config).eval()


def test_both_auto_classes_where_transformers_has_both(tmp_path: Path):
    trained = gemma3()
    names = grace.quantize(trained, group_size=32)
    grace.export(trained, tmp_path / "out")
    tokens = torch.arange(3, 27).view(2, 12)
    for kind in ("AutoModelForCausalLM", "AutoModelForImageTextToText"):
        loaded = getattr(transformers, kind).from_pretrained(tmp_path / "out")
        assert list(packed_layers(loaded)) == names
        with torch.no_grad():
            torch.testing.assert_close(
                loaded(input_ids=tokens).logits, trained(input_ids=tokens).logits
            )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("trained", [False, True])
def test_every_family_is_loaded_whole(family: str, trained: bool, tmp_path: Path):
    """Packed, and as it is in training: no tensor is missed, none is made up."""
    model = FAMILIES[family]()
    names = grace.quantize(model, group_size=16)
    if trained:
        model.save_pretrained(tmp_path / "out")
    else:
        grace.export(model, tmp_path / "out")
    loaded, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    kind = grace.nn.FakeQuantLinear if trained else grace.nn.PackedLinear
    assert [n for n, m in loaded.named_modules() if isinstance(m, kind)] == names


def test_a_causal_lm_is_not_made_of_what_transformers_has_none_for(packed: Path):
    with pytest.raises(ValueError, match=r"LlavaConfig.* for this kind of AutoModel"):
        transformers.AutoModelForCausalLM.from_pretrained(packed)


@pytest.mark.parametrize("options", [{}, {"max_shard_size": 20_000}])
@pytest.mark.parametrize("fused", [False, True])
def test_saved_again_it_is_the_same(
    fused: bool, options: dict[str, Any], packed: Path, tmp_path: Path
):
    loaded = transformers.AutoModelForImageTextToText.from_pretrained(packed)
    if fused:
        assert len(grace.nn.fuse(loaded)) == 6  # three layers' attention and MLP
    loaded.save_pretrained(tmp_path, **options)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3 * len(options)
    assert_same_files(packed, tmp_path)
    configs = [json.loads((d / "config.json").read_text()) for d in (packed, tmp_path)]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    again = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert len(packed_layers(again)) == 21


@pytest.mark.parametrize("places", ["auto", "cpu", {"": "cpu"}])
def test_device_maps(places: Any, packed: Path, model: Any, inputs: Any):
    load = transformers.AutoModelForImageTextToText.from_pretrained
    loaded = load(packed, device_map=places)
    assert all(not layer.qweight.is_meta for layer in packed_layers(loaded).values())
    loaded.cpu()  # auto takes the GPU where there is one
    assert generate(loaded, inputs) == generate(model, inputs)


@pytest.mark.parametrize("by", ["map", "memory"])
def test_offloaded_to_disk(by: str, packed: Path, model: Any, inputs: Any, tmp_path: Path):
    """Norms and embeddings come from the disk; packed weights stay, being too small to matter."""
    places = {
        "model.vision_tower": "cpu",
        "model.multi_modal_projector": "cpu",
        "model.language_model": "disk",
        "lm_head": "cpu",
    }
    options = {
        "map": {"device_map": places},
        "memory": {"device_map": "auto", "max_memory": {"cpu": 100_000}},
    }
    loaded = transformers.AutoModelForImageTextToText.from_pretrained(
        packed, offload_folder=tmp_path, **options[by]
    )
    assert loaded.get_submodule("model.language_model.norm").weight.is_meta
    assert not any(layer.qweight.is_meta for layer in packed_layers(loaded).values())
    assert generate(loaded, inputs) == generate(model, inputs)


def test_the_pipeline_answers(packed: Path, model: Any, tmp_path: Path):
    asked = transformers.pipeline("image-text-to-text", model=str(packed), device="cpu")
    assert len(packed_layers(asked.model)) == 21
    image = picture(tmp_path)
    answers = asked(
        text=[chat(image, question) for question in CHATS],
        generate_kwargs={"max_new_tokens": 4, "do_sample": False},
    )
    said = [told[0]["generated_text"][-1]["content"].strip() for told in answers]
    assert said[0] in ("Yes", "No")
    assert said == answer(
        model,
        transformers.AutoProcessor.from_pretrained(packed),
        [Row(image, question) for question in CHATS],
        max_new_tokens=4,
        progress=False,
    )


class Row:
    """An image and a question about it."""

    def __init__(self, image: Image.Image, question: str) -> None:
        self.image, self.question = image, question


@pytest.mark.parametrize("fused", [False, True])
def test_a_static_cache_gives_the_same_tokens(fused: bool, packed: Path, model: Any, inputs: Any):
    loaded = transformers.AutoModelForImageTextToText.from_pretrained(packed)
    if fused:
        grace.nn.fuse(loaded)
    expected = generate(model, inputs)
    assert generate(loaded, inputs, cache_implementation="static") == expected


def test_the_decode_step_compiles_in_one_graph_and_once(model: Any, inputs: Any):
    """By torch.compile(fullgraph=True), over a static cache, at several positions."""
    cache = transformers.StaticCache(config=model.config.get_text_config(), max_cache_len=64)
    compiled: list[Any] = []

    def backend(graph: torch.fx.GraphModule, example: list[Any]) -> Any:
        compiled.append(graph)
        return graph.forward

    def step(token: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        out = model(input_ids=token, position_ids=position, past_key_values=cache)
        return out.logits[:, -1:].argmax(-1)

    torch.compiler.reset()
    fast = torch.compile(step, fullgraph=True, backend=backend)
    length, tokens = inputs["input_ids"].shape[1], []
    with torch.no_grad():
        token = model(**inputs, past_key_values=cache).logits[:, -1:].argmax(-1)
        for place in range(length, length + 4):
            tokens.append(token.item())
            token = fast(token, torch.tensor([[place]]))
    ops = {str(node.target) for graph in compiled for node in graph.graph.nodes}
    assert any("dequant_gemm" in op for op in ops)
    assert len(compiled) == 1
    unforced = model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=-1)
    assert tokens == unforced[0, length:].tolist()


def test_dequantized_it_is_a_dense_model(packed: Path, inputs: Any, tmp_path: Path):
    loaded = transformers.AutoModelForImageTextToText.from_pretrained(packed)
    weights = {name: layer.dequantize() for name, layer in packed_layers(loaded).items()}
    with torch.no_grad():
        expected = loaded(**inputs).logits
        dense = loaded.dequantize()
        torch.testing.assert_close(dense(**inputs).logits, expected)
    for name, weight in weights.items():
        assert type(dense.get_submodule(name)) is nn.Linear
        assert torch.equal(dense.get_submodule(name).weight, weight)
    dense.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    again = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, dense(**inputs).logits)
