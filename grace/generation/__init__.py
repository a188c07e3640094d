"""Generation on static caches and CUDA graphs: `Generator`, with the arguments of `generate`."""

from grace.generation.generator import Generator
from grace.generation.head import quantize_head
from grace.generation.timing import Timing

__all__ = ["Generator", "Timing", "quantize_head"]
