"""lmms-eval's plug-in: ``lmms-eval --model grace --model_args pretrained=DIR …``.

lmms-eval (0.7 on) asks the entry points of the group ``lmms_eval.models`` for manifests of models.
Importing this package imports neither lmms-eval nor torch.
"""

from __future__ import annotations

from typing import Any

NAME = "grace"


def manifest() -> Any:
    """What lmms-eval's registry takes: the name of the model, and where its class is.

    Returns:
        An ``lmms_eval.models.registry_v2.ModelManifest``.

    Raises:
        ImportError: lmms-eval is not there, or older than 0.7.
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=NAME, chat_class_path=f"{__name__}.model.Grace")
