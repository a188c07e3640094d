"""Post-training quantization: what a low-bit model is without training it.

`quantize` puts a model's decoder linears on the grid that servers run, by round-to-nearest, GPTQ or
AWQ; they are the baselines that training at low bits is measured against.
"""

from grace.ptq.methods import METHODS, quantize

__all__ = ["METHODS", "quantize"]
