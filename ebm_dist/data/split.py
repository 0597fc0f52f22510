"""A whole split in memory for evaluation, the spec of a source, and what is wrong with one."""

from __future__ import annotations

import torch

from ebm_dist.core.errors import RunFailed, UserError
from ebm_dist.core.seeds import derive_seed
from ebm_dist.core.types import Batch, EventSpec
from ebm_dist.data.config import DataConfig
from ebm_dist.data.dataset import open_dataset, stored_layout
from ebm_dist.data.format.manifest import SplitName
from ebm_dist.data.stream.stream import refuse_few
from ebm_dist.data.stream.transform import Transform, event_spec


def describe(config: DataConfig) -> EventSpec:
    """The events that a stream of `config` will hand out.

    Cheap: reads at most dataset.json, or the first sample of plain shards.

    Raises:
        UserError: for a source that is not there, or keys that do not go with it.
    """
    return event_spec(config, stored_layout(config))


def load_split(config: DataConfig, split: SplitName, limit: int | None = None) -> Batch:
    """The first `limit` samples of a split: x (N, *event) scaled, not augmented; label (N,).

    Prepared shards were shuffled when they were written, so the first are a fair sample. Bernoulli
    binarisation is tossed once, alike in every call.

    Raises:
        UserError: for data that will not do, or a test split that the source does not have.
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
    return Batch(x, torch.from_numpy(labels) if labels is not None else None)


def check(config: DataConfig) -> list[str]:
    """What is wrong with the data, one line each; empty if nothing is.

    Looks at every shard's presence, size and checksum and decodes the first sample of each, so
    it reads all of the data once; of a dataset of your own it reads a part.
    """
    try:
        storage = open_dataset(config)
        event_spec(config, storage.layout)
    except (UserError, RunFailed) as error:
        return [str(error)]
    problems = storage.problems()
    try:
        refuse_few(config, storage)
    except UserError as error:
        problems.append(str(error))
    return problems
