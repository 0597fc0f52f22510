"""Reads every sample of a set of shards, and names the unusable ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from ebm_dist.core.errors import UserError
from ebm_dist.data.config import DataConfig
from ebm_dist.data.dataset import open_dataset
from ebm_dist.data.format.decode import Layout, decode_sample
from ebm_dist.data.format.shards import ShardFile, check_shard, read_shard
from ebm_dist.data.storage.shards import Shards


@dataclass(slots=True)
class Findings:
    """Counts of shards and samples."""

    num_shards: int = 0
    num_samples: int = 0
    """Usable samples, those of bad shards included."""
    num_bad_samples: int = 0
    num_bad_shards: int = 0
    """Shards that are missing, altered, truncated or not a tar."""
    by_class: Counter[int] = field(default_factory=Counter)


def examine(config: DataConfig, say: Callable[[str], None]) -> Findings:
    """Read all samples of both splits.

    Args:
        say: receives each fault, in one line that names the shard and the sample.

    Raises:
        UserError: there are no shards, or the first holds no usable sample.
    """
    storage = open_dataset(config.model_copy(update={"on_bad_sample": "skip"}))
    if not isinstance(storage, Shards):
        raise UserError(f"data.source: {config.location} is a dataset of your own, not shards")
    findings = Findings()
    for shard in storage.all():
        findings.num_shards += 1
        faults = [] if _is_as_described(shard, say) else [shard]
        try:
            for sample in read_shard(shard):
                _count(sample, storage.layout, findings, say)
        except UserError as error:
            if not faults:  # otherwise it is the same fault
                say(str(error))
            faults.append(shard)
        findings.num_bad_shards += bool(faults)
    return findings


def _is_as_described(shard: ShardFile, say: Callable[[str], None]) -> bool:
    try:
        check_shard(shard, checksum=True)
    except UserError as error:
        say(str(error))
        return False
    return True


def _count(
    sample: dict[str, object], layout: Layout, findings: Findings, say: Callable[[str], None]
) -> None:
    try:
        _, label = decode_sample(sample, layout)
    except UserError as error:
        findings.num_bad_samples += 1
        say(str(error))
        return
    findings.num_samples += 1
    if label is not None:
        findings.by_class[label] += 1
