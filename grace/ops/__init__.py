"""The ops: each a function here, all about it in the module, kernels and tests of the same name.

The name ``grace.ops.<op>`` is the function; its module's other names come by
``from grace.ops.<op> import …``.
"""

from grace import _library
from grace.ops.fake_quant import fake_quant

_library.load()

__all__ = ["fake_quant"]
