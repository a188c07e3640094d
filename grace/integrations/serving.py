"""transformers' own server with packed models: ``transformers serve`` in a process that has grace.

Its command line knows no plug-ins, so a process that nobody imports grace in would leave a packed
checkpoint to transformers' loader, which multiplies the weights out at the first request.
"""

from __future__ import annotations

import importlib.util
import time
from typing import Any

PACKAGES = ("fastapi", "openai", "pydantic", "uvicorn")


def serve(model: str, *, fuse: bool = True, lm_head_bits: int | None = None, **options: Any) -> Any:
    """Serves a model over an OpenAI-compatible API until the process is told to stop.

    Args:
        model: directory of the checkpoint; requests name it the same way, or none.
        fuse: run packed layers of one input as one call (`grace.nn.fuse`).
        lm_head_bits: 8 packs the output head, too (`grace.nn.quantize_head`): it changes logits.
        options: those of ``transformers serve``, by name.

    Returns:
        transformers' ``Serve``; at once with ``non_blocking=True``, else when it has stopped.

    Raises:
        ValueError: the server's packages are missing, or the checkpoint is damaged.
        OSError: the checkpoint is not there.
    """
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise ValueError(
            f"serve: {', '.join(PACKAGES)} must be installed (pip install grace-vlm[serve]), "
            f"got no {missing[0]}"
        )
    from transformers.cli import serve as command
    from transformers.cli.serving import model_manager

    import grace.nn  # also: from here on transformers loads packed models

    class Manager(model_manager.ModelManager):
        """Loads as transformers' does; packed layers run fused, the head as asked."""

        def _load_model(self, *arguments: Any, **named: Any) -> Any:
            loaded = super()._load_model(*arguments, **named)
            if lm_head_bits is not None:
                grace.nn.quantize_head(loaded, lm_head_bits)
            if fuse:
                grace.nn.fuse(loaded)
            return loaded

        @staticmethod
        def get_gen_models(  # type: ignore[override]  # transformers caches it
            cache_dir: str | None = None,
        ) -> list[dict[str, Any]]:
            """The one model that is served: transformers lists the hub's cache, and fails where
            there is none."""
            return [{"id": model, "object": "model", "created": started, "owned_by": "grace"}]

    started = int(time.time())
    stock = model_manager.ModelManager
    model_manager.ModelManager = Manager  # type: ignore[misc]
    try:
        return command.Serve(force_model=model, **options)
    finally:
        model_manager.ModelManager = stock  # type: ignore[misc]
