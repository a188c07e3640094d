"""A checkpoint's model without its weights: which tensors belong to it, under which names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from grace.loading import bad_config_told


class Skeleton:
    """A model of transformers, of which only names and shapes are asked.

    Args:
        model: the model, on the meta device or elsewhere.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._state = self.model.state_dict()
        self._transforms = _transforms(self.model)
        self._converted: set[str] = set()  # names whose tensors are not as in files

    def name_of(self, stored: str) -> str:
        """The name in the model of a tensor that a file calls ``stored``."""
        from transformers.core_model_loading import rename_source_key

        prefix = self.model.base_model_prefix
        name, converter = rename_source_key(stored, *self._transforms, prefix, self._state)
        if converter is not None:
            self._converted.add(name)
        if name not in self._state and stored in self._state:
            name, _ = rename_source_key(stored, [], [], prefix, self._state)
        return name

    def linear(self, name: str, stem: str) -> nn.Linear:
        """The linear called ``name`` in the model and ``stem`` in the files.

        Raises:
            ValueError: there is no such linear, or it shares its weight with another module.
        """
        module = dict(self.model.named_modules()).get(name)
        if type(module) is not nn.Linear or f"{name}.weight" in self._tied():
            got = "nothing" if module is None else f"a {type(module).__name__}"
            raise ValueError(
                f"import: {stem} must be an untied linear of {type(self.model).__name__}, got {got}"
            )
        return module

    def other_linears(self, quantized: Iterable[str]) -> list[str]:
        """Names of the linears that are not ``quantized``."""
        known = set(quantized)
        linears = (n for n, m in self.model.named_modules() if isinstance(m, nn.Linear))
        return [name for name in linears if name not in known]

    def check_complete(
        self, shapes: Mapping[str, tuple[int, ...]], where: str, what: str, whole: bool = True
    ) -> None:
        """Requires that ``shapes`` (by names in the model) are of all its tensors.

        Args:
            shapes: of what a checkpoint holds.
            where: what messages begin with.
            what: what messages call the checkpoint.
            whole: False lets tensors be missing.

        Raises:
            ValueError: a tensor is missing or has another shape.
        """
        ignored = getattr(self.model, "_keys_to_ignore_on_load_missing", None) or ()
        for name, tensor in self._state.items():
            shape = shapes.get(name)
            if shape is not None and name not in self._converted and tuple(tensor.shape) != shape:
                expected = f"{list(tensor.shape)}{self._reason(name)}"
                raise ValueError(f"{where}: {name} must be {expected}, got {list(shape)}")
            spared = name in self._tied() or any(re.search(p, name) for p in ignored)
            if whole and shape is None and not spared:
                raise ValueError(f"{where}: {what} must hold the whole model, got no {name}")

    def _reason(self, name: str) -> str:
        """What beside the sizes of the model gives a tensor its shape."""
        size = getattr(self.model.get_submodule(name.rpartition(".")[0]), "group_size", None)
        return "" if size is None else f" for group size {size}"

    def _tied(self) -> set[str]:
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        return {*tied.keys(), *tied.values()} if tied else set()


def build(config: dict[str, Any]) -> Any:
    """The model that a checkpoint's config.json describes, on the meta device.

    Raises:
        ValueError: it describes no model of transformers.
    """
    import transformers

    names = config.get("architectures") or [None]
    kind = getattr(transformers, str(names[0]), None)
    if kind is None or not hasattr(kind, "config_class"):
        raise ValueError(f"import: architectures must name a transformers model, got {names[0]}")
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    with bad_config_told(f"import: config.json must describe a {names[0]}"):
        made = kind.config_class.from_dict(plain)
        with torch.device("meta"):
            return kind(made)


def _transforms(model: Any) -> tuple[list[Any], list[Any]]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    mapping = get_model_conversion_mapping(model)
    return (
        [entry for entry in mapping if isinstance(entry, WeightRenaming)],
        [entry for entry in mapping if isinstance(entry, WeightConverter)],
    )
