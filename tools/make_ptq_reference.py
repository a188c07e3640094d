"""Make tests/data/llmcompressor.npz: what llm-compressor's GPTQ and AWQ give for random weights.

    python -m venv /tmp/peer && /tmp/peer/bin/pip install llmcompressor
    /tmp/peer/bin/python tools/make_ptq_reference.py

In an environment of its own: llm-compressor pins compressed-tensors and the newest torch and
transformers it takes. Nothing of grace is imported here. The file holds

- GPTQ of one linear: `weight`, `hessian`, the `scale` of its min-max observer, and its codes with
  columns in order (`gptq`) and by falling diagonal (`gptq_act_order`);
- AWQ of a decoder of one layer: its state (`model/…`), the `tokens` it was calibrated with, and the
  state afterwards (`awq/…`), folded and quantized.
"""

from __future__ import annotations

import importlib.metadata
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

OUT = Path(__file__).parents[1] / "tests" / "data" / "llmcompressor.npz"
GROUP = 32
CONFIG = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def arguments(actorder: str | None = None) -> QuantizationArgs:
    """Four bits, symmetric, in groups."""
    return QuantizationArgs(
        num_bits=4, type="int", symmetric=True, strategy="group", group_size=GROUP,
        actorder=actorder,
    )  # fmt: skip


def gptq() -> dict[str, np.ndarray]:
    """One linear [24, 160]: K is no multiple of GPTQ's block of 128."""
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 160, generator=random)
    mixing = torch.randn(160, 160, generator=random) / 13 + torch.eye(160)
    x = torch.randn(512, 160, generator=random) @ mixing
    hessian = 2 / len(x) * x.t() @ x
    made = {"weight": weight, "hessian": hessian}
    for name, order in (("gptq", None), ("gptq_act_order", "static")):
        args = arguments(order)
        absmax = weight.unflatten(1, (-1, GROUP)).abs().amax(-1)
        scale = absmax / 7.5  # the code range -8 … 7, halved, as its min-max observer has it
        zero = torch.zeros_like(scale, dtype=torch.int8)
        found, _, fallback = quantize_weight(
            weight[None].clone(), hessian[None].clone(), scale[None], zero[None], None, args
        )
        assert not bool(fallback.any())
        codes = (found[0] / scale.repeat_interleave(GROUP, 1)).round()
        made |= {"scale": scale, name: codes.to(torch.int8)}
    return {name: value.numpy() for name, value in made.items()}


def awq() -> dict[str, np.ndarray]:
    """A random decoder; a few channels of its norms are large, which is what AWQ is about."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm" in name:
                parameter[:4] *= 12
            elif "proj" in name:
                parameter.normal_(0, 0.1)
    made = {f"model/{name}": value.numpy().copy() for name, value in model.state_dict().items()}
    tokens = torch.randint(1, 64, (8, 32))
    if not torch.cuda.is_available():  # it pins what waits on a CPU, which needs an accelerator
        torch.Tensor.pin_memory = lambda self, *_: self
    model = _from_folder(model)
    rows = Dataset.from_list([{"input_ids": row.tolist()} for row in tokens])
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments())
    oneshot(
        model=model,
        processor=_tokenizer(),
        dataset=rows,
        recipe=[
            AWQModifier(duo_scaling=False),
            QuantizationModifier(config_groups={"group_0": scheme}, ignore=["lm_head"]),
        ],
        max_seq_length=32,
        num_calibration_samples=8,
        data_collator=lambda batch: {
            "input_ids": torch.tensor([row["input_ids"] for row in batch])
        },
    )
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            scale = module.weight_scale.repeat_interleave(GROUP, 1)
            codes = (module.weight / scale).round().clamp(-8, 7)
            module.weight.data = codes * scale
    state = {n: v for n, v in model.state_dict().items() if f"model/{n}" in made}
    made |= {f"awq/{name}": value.detach().numpy() for name, value in state.items()}
    return {**made, "tokens": tokens.numpy()}


def _from_folder(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """It looks its model up by the path that it came from."""
    folder = tempfile.mkdtemp()
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder)


def _tokenizer() -> transformers.PreTrainedTokenizerFast:
    """It asks for one, though rows are tokens already."""
    words = Tokenizer(WordLevel({str(token): token for token in range(64)}, unk_token="0"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0")


if __name__ == "__main__":
    version = np.array(importlib.metadata.version("llmcompressor"))
    np.savez_compressed(OUT, version=version, **gptq(), **awq())
    print(OUT, OUT.stat().st_size)
