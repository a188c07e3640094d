"""The `data` section of a training configuration, and the data set that it describes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grace.training.config import GraceConfig, suggestion

_ON_ERROR = ("raise", "skip")


@dataclass(frozen=True)
class DataFile:
    """One file of rows: `path`, `weight` in an epoch, and the folder of its images."""

    path: str
    weight: float = 1.0
    image_root: str | None = None


@dataclass(frozen=True)
class DataConfig:
    """Where training rows come from and how they become batches.

    Attributes:
        files: JSON, JSON lines, parquet or Arrow files.
        image_root: folder that paths in rows are relative to; default the file's own.
        cache_dir: where indexes (and the Arrow copy of a parquet file) are kept; default beside
            each file.
        on_error: "raise" or "skip": what a row that cannot be used does.
        max_length: most tokens of a row; default `pack_length`.
        truncate: cut longer rows at their end, unless that would cut an image.
        pack_length: tokens that rows are packed up to; None: a row by itself.
        check_files: look for all images before training (with on_error "raise").
    """

    files: tuple[DataFile, ...]
    image_root: str | None = None
    cache_dir: str | None = None
    on_error: str = "raise"
    max_length: int | None = None
    truncate: bool = False
    pack_length: int | None = None
    check_files: bool = True

    def __post_init__(self) -> None:
        _require("on_error", self.on_error, self.on_error in _ON_ERROR, f"be one of {_ON_ERROR}")
        for name in ("max_length", "pack_length"):
            value = getattr(self, name)
            _require(name, value, value is None or (_is_int(value) and value > 0), "be > 0 or null")
        for name in ("truncate", "check_files"):
            value = getattr(self, name)
            _require(name, value, isinstance(value, bool), "be true or false")
        if self.pack_length is not None:
            fits = (self.max_length or self.pack_length) <= self.pack_length
            _require("max_length", self.max_length, fits, f"be <= pack_length {self.pack_length}")
        _require("truncate", True, not self.truncate or self.longest is not None, "have max_length")

    @property
    def longest(self) -> int | None:
        """Most tokens of a row."""
        return self.max_length or self.pack_length


def parse_data(options: Any) -> DataConfig:
    """The configuration of a path, a list of files, or a mapping with `path`.

    A file is a path or a mapping of `path`, `weight` and `image_root`.

    Raises:
        FileNotFoundError: a file that does not exist.
        ValueError: an unknown or missing key, or a value out of range.
    """
    options = dict(options) if isinstance(options, dict) else {"path": options}
    given = options.pop("path", None)
    known = [item.name for item in dataclasses.fields(DataConfig) if item.name != "files"]
    for key in options:
        if key not in known:
            raise ValueError(f"train: unknown option data.{key}{suggestion(key, ['path', *known])}")
    files = given if isinstance(given, list) else [given]
    if not files or not all(files):
        raise ValueError(f"train: data must be a path or a mapping with a path, got {given!r}")
    return DataConfig(files=tuple(_file(item) for item in files), **options)


def _file(item: Any) -> DataFile:
    item = {"path": item} if isinstance(item, str) else item
    known = [part.name for part in dataclasses.fields(DataFile)]
    if not isinstance(item, dict) or not isinstance(item.get("path"), str):
        raise ValueError(f"train: data.path must be a path or a mapping with a path, got {item!r}")
    for key in item:
        if key not in known:
            raise ValueError(f"train: unknown option data.path.{key}{suggestion(key, known)}")
    weight = item.get("weight", 1.0)
    number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
    _require("path.weight", weight, number and weight > 0, "be > 0")
    if not Path(item["path"]).is_file():
        raise FileNotFoundError(f"train: data.path must be a file, got {item['path']}")
    return DataFile(**item)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _require(name: str, value: Any, holds: bool, rule: str) -> None:
    if not holds:
        raise ValueError(f"train: data.{name} must {rule}, got {value!r}")


def build_dataset(config: DataConfig, training: GraceConfig, processor: Any) -> Any:
    """The `ConversationDataset` or `PackedDataset` of a run, the same on every rank.

    The first process of each host reads the files and leaves their indexes to the others; the
    first of all fits the model of lengths.
    """
    from grace.training.data import ConversationDataset
    from grace.training.sequence_packing import PackedDataset

    seed = training.data_seed if training.data_seed is not None else training.seed
    with training.main_process_first(desc="index of the data"):
        dataset = ConversationDataset(
            _sources(config),
            processor,
            on_error=config.on_error,
            max_length=config.longest,
            truncate=config.truncate,
            check_files=config.check_files and training.process_index == 0,
            seed=seed,
        )
    grouped = training.train_sampling_strategy == "group_by_length"
    if config.pack_length is not None or grouped:
        _share_lengths(dataset, training)
    return PackedDataset(dataset, config.pack_length, seed) if config.pack_length else dataset


def _sources(config: DataConfig) -> Sequence[Any]:
    from grace.training.data import Source, read_rows

    return [
        Source(
            read_rows(file.path, config.cache_dir),
            file.image_root or config.image_root or Path(file.path).parent,
            file.weight,
        )
        for file in config.files
    ]


def _share_lengths(dataset: Any, training: GraceConfig) -> None:
    """Estimates that differ in a bit would give ranks different orders: the first one's count."""
    from accelerate.utils import broadcast_object_list

    from grace.training.lengths import LengthModel

    fitted = [LengthModel.fit(dataset) if training.process_index == 0 else None]
    dataset.set_length_model(broadcast_object_list(fitted)[0])


def build_collator(config: DataConfig, processor: Any, model: Any) -> Any:
    """The collator of a run's batches, for a model's positions and attention."""
    from grace.training.collator import Collator, PackedCollator

    if config.pack_length is None:
        return Collator(processor)
    attention = getattr(model.config, "_attn_implementation", None) or ""
    return PackedCollator(processor, model.config, flatten="flash" in attention)
