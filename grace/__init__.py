"""grace: train vision-language models at 4 bits under a large teacher, and run them on fast kernels."""

from grace.version import __version__

__all__ = ["__version__"]
