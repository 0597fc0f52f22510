"""A whole split in memory for evaluation, the spec of a source, and what is wrong with one."""

from __future__ import annotations

import numpy as np
import torch

from ebm_dist.core.errors import RunFailed, UserError
from ebm_dist.core.seeds import derive_seed
from ebm_dist.core.types import Batch, EventSpec
from ebm_dist.data.config import DataConfig
from ebm_dist.data.dataset import Dataset, open_dataset, stored_layout
from ebm_dist.data.format.decode import decode_sample
from ebm_dist.data.format.manifest import SplitName
from ebm_dist.data.format.shards import check_shard, read_shard
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
    dataset = open_dataset(config)
    transform = Transform(config, dataset.layout)
    xs: list[np.ndarray] = []
    labels: list[int | None] = []
    for x, label in _stored(config, dataset, split):
        xs.append(x)
        labels.append(label)
        if limit is not None and len(xs) == limit:
            break
    if not xs:
        raise UserError(
            f"data.holdout: {config.holdout} leaves no {split} samples in {config.location}; "
            "change it or add data"
        )
    generator = torch.Generator().manual_seed(derive_seed(0, "data", "binarize", split))
    x = transform(torch.from_numpy(np.stack(xs)), generator, augment=False)
    label = torch.tensor(labels, dtype=torch.int64) if dataset.layout.labelled else None
    return Batch(x, label)


def _stored(config: DataConfig, dataset: Dataset, split: SplitName):
    shards = dataset.train if split == "train" else dataset.test
    if shards is None:
        raise UserError(
            f"data.holdout: {config.location} has no test split; set data.holdout to the part to "
            "hold out, such as 0.1, or name held-out shards in data.test_source"
        )
    for shard in shards:
        check_shard(shard, checksum=config.verify)
        for raw in read_shard(shard):
            if dataset.belongs(raw, split):
                yield decode_sample(raw, dataset.layout)


def check(config: DataConfig) -> list[str]:
    """What is wrong with the data, one line each; empty if nothing is.

    Looks at every shard's presence, size and checksum and decodes the first sample of each, so
    it reads all of the data once.
    """
    try:
        dataset = open_dataset(config)
        event_spec(config, dataset.layout)
    except (UserError, RunFailed) as error:
        return [str(error)]
    problems = []
    for shard in dict.fromkeys((*dataset.train, *(dataset.test or ()))):
        try:
            check_shard(shard, checksum=config.verify)
            decode_sample(next(iter(read_shard(shard))), dataset.layout)
        except UserError as error:
            problems.append(str(error))
    count = dataset.num_samples("train")
    if count is not None and count < config.batch_size:
        problems.append(
            f"data.batch_size: is {config.batch_size}, but {config.location} holds {count} "
            f"training samples; lower data.batch_size to at most {count}"
        )
    return problems
