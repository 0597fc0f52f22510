"""Describes the events of a source, and loads a whole split for evaluation."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from ebm_dist.core.errors import UserError
from ebm_dist.core.section import one_line_each
from ebm_dist.core.seeds import derive_seed
from ebm_dist.core.types import Batch, EventSpec
from ebm_dist.data.config import DataConfig
from ebm_dist.data.dataset import open_dataset, stored_layout
from ebm_dist.data.format.manifest import SplitName
from ebm_dist.data.stream.transform import Transform, event_spec


def describe(config: DataConfig) -> EventSpec:
    """The events of a stream of `config`.

    Reads at most dataset.json, or the first sample of plain shards.

    Raises:
        UserError: the source is missing, or a key does not apply to it.
    """
    return event_spec(config, stored_layout(config))


def load_data(source: str, split: SplitName = "train", **keys: Any) -> tuple[Tensor, Tensor | None]:
    """All events (N, *event) of a data source, as a network is given them, and their labels (N,).

    Args:
        source: as `data.source` of a config: a built-in set such as `digits`, `toy:NAME`, or the
            directory that `ebm-dist data prepare` wrote.
        split: `train`, or `test` for the held-out part.
        keys: other keys of the config's section `data`, such as `holdout=0.1`.

    Raises:
        UserError: the data cannot be used, or has no such part.
    """
    try:
        config = DataConfig(source=source, **keys)
    except ValidationError as error:
        faults = one_line_each(error, DataConfig)
        raise UserError("; ".join(f"data.{fault}" for fault in faults)) from None
    batch = load_split(config, split)
    return batch.x, batch.label


def load_split(config: DataConfig, split: SplitName, limit: int | None = None) -> Batch:
    """The first `limit` samples of a split: x (N, *event), scaled but not augmented; label (N,).

    Prepared shards were shuffled when they were written, so the first samples are representative.
    Bernoulli binarisation draws the same bits in every call.

    Raises:
        UserError: the data cannot be used, or the source has no test split.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 or None, got {limit}")
    storage = open_dataset(config)
    if not storage.has(split):
        raise UserError(
            f"data.holdout: {config.location} has no test split; set data.holdout to the part to "
            f"hold out, such as 0.1, or name {config.how_to_hold_out}"
        )
    transform = Transform(config, storage.layout)
    stored, labels = storage.read(split, limit)
    if not len(stored):
        raise UserError(
            f"data.holdout: {config.holdout} leaves no {split} samples in {config.location}; "
            "change it or add data"
        )
    generator = torch.Generator().manual_seed(derive_seed(0, "data", "binarize", split))
    x = transform(torch.from_numpy(stored), generator, augment=False)
    x, condition = transform.divided(x)
    return Batch(x, torch.from_numpy(labels) if labels is not None else None, condition)
