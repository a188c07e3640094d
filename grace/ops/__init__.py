"""The ops: each a function here, all about it in the module, kernels and tests of the same name.

The name ``grace.ops.<op>`` is the function; its module's other names come by
``from grace.ops.<op> import …``.
"""

from grace import _library
from grace.ops.cka import cka
from grace.ops.decode_attention import decode_attention
from grace.ops.dequant_gemm import dequant_gemm, load_plans
from grace.ops.fake_quant import fake_quant
from grace.ops.fake_quant_many import fake_quant_many
from grace.ops.gated_dkd import gated_dkd
from grace.ops.linear_gated_dkd import linear_gated_dkd
from grace.ops.quantize_pack import quantize_pack
from grace.ops.rms_norm import rms_norm
from grace.ops.rotary import rotary
from grace.ops.search_log_scale import search_log_scale

if _library.load():
    load_plans()

__all__ = [
    "cka",
    "decode_attention",
    "dequant_gemm",
    "fake_quant",
    "fake_quant_many",
    "gated_dkd",
    "linear_gated_dkd",
    "quantize_pack",
    "rms_norm",
    "rotary",
    "search_log_scale",
]
