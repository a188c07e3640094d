"""Generation on static caches and CUDA graphs: `Generator`, with the arguments of `generate`."""

from grace.generation.generator import Generator
from grace.generation.timing import Timing
from grace.nn import quantize_head

__all__ = ["Generator", "Timing", "quantize_head"]
