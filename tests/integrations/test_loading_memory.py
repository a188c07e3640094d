"""Loading a packed model never holds its dense weights: peak memory of a process that loads one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

from grace.formats.compressed_tensors import Scheme
from grace.formats.compressed_tensors_config import make_config

LAYERS, WIDTH, INNER = 6, 1024, 4096  # 100 million codes: 201 MB in bfloat16, 54 MB packed

# Loads a small model first, so that what is counted is weights and not code. VmHWM is the peak of
# resident memory since it was last cleared; of large blocks malloc keeps none (see ENVIRONMENT).
PROGRAM = """
import gc, sys, torch, transformers, grace
from grace.nn import PackedLinear

def kilobytes(key):
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1])

def grown(work):
    gc.collect()
    open("/proc/self/clear_refs", "w").write("5")
    before = kilobytes("VmRSS")
    result = work()
    return result, 1024 * (kilobytes("VmHWM") - before)

load = transformers.AutoModelForCausalLM.from_pretrained
load(sys.argv[1])
model, loading = grown(lambda: load(sys.argv[2]))
layers = [layer for layer in model.modules() if isinstance(layer, PackedLinear)]
weights, dense = grown(lambda: [layer.dequantize().bfloat16() for layer in layers])
print(len(layers), loading, dense)
"""
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def write(directory: Path, layers: int, width: int, inner: int, shards: int) -> None:
    """A packed Qwen2 of random words: made without a model, which would take half a minute."""
    config = transformers.Qwen2Config(
        vocab_size=128,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        dtype="bfloat16",
        architectures=["Qwen2ForCausalLM"],
    )
    with torch.device("meta"):
        model = transformers.Qwen2ForCausalLM(config)
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    tensors = {}
    for name, linear in linears.items():
        rows, columns = linear.weight.shape
        tensors[f"{name}.weight_packed"] = torch.randint(2**31, (rows, columns // 8)).int()
        scale = torch.full((rows, columns // 128), 2.0**-7, dtype=torch.bfloat16)
        tensors[f"{name}.weight_scale"] = scale
        tensors[f"{name}.weight_shape"] = torch.tensor([rows, columns])
    for name, parameter in model.named_parameters():
        if name.removesuffix(".weight") not in linears:
            tensors[name] = torch.zeros(parameter.shape, dtype=torch.bfloat16)
    directory.mkdir()
    names = list(tensors)
    files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    for index, file in enumerate(files):
        part = {name: tensors[name] for name in names[index::shards]}
        save_file(part, directory / file, metadata={"format": "pt"})
    weight_map = {name: files[i % shards] for i, name in enumerate(names)}
    index_file = directory / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config.quantization_config = make_config(dict.fromkeys(linears, Scheme(4, 128)), ["lm_head"])
    config.save_pretrained(directory)


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's peak of memory"
)
def test_dense_weights_never_exist(tmp_path: Path):
    write(tmp_path / "small", 1, 128, 128, shards=1)
    write(tmp_path / "large", LAYERS, WIDTH, INNER, shards=3)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "small"), str(tmp_path / "large")],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    layers, loading, meter = map(int, done.stdout.split()[-3:])
    packed = sum(file.stat().st_size for file in (tmp_path / "large").glob("*.safetensors"))
    dense = 2 * LAYERS * (4 * WIDTH * WIDTH + 3 * WIDTH * INNER)
    assert layers == 7 * LAYERS
    assert meter > dense  # dense weights do show
    # The pages of the files, the packed weights, and a block of one layer in work.
    assert packed < loading < 2 * packed + 64 * 2**20 < dense
