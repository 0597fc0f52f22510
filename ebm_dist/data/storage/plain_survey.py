"""Reads small plain shards, without a dataset.json, completely before a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from ebm_dist.core.errors import UserError
from ebm_dist.data.format.decode import DATA_EXTENSIONS, Layout, decode_sample
from ebm_dist.data.format.shards import ShardFile, read_shard
from ebm_dist.data.stream.bad_samples import BadSamples

MAX_BYTES = 16 * 2**20
"""Shards up to this total size are decoded before a run, in about a second; faults of larger ones
are found in the first epoch."""


def survey(shards: Iterable[ShardFile], layout: Layout, bad: BadSamples) -> list[str]:
    """One line for each plain shard with content that a run would not read.

    Raises:
        UserError: for a sample or shard that would end an epoch.
    """
    shards = [shard for shard in shards if shard.num_samples is None]
    if sum(shard.path.stat().st_size for shard in shards) > MAX_BYTES:
        return []
    return [line for shard in shards if (line := _unread(shard, layout, bad))]


def _unread(shard: ShardFile, layout: Layout, bad: BadSamples) -> str:
    odd_names: list[str] = []
    folders: set[str] = set()
    unread: Counter[str] = Counter()
    for sample in read_shard(shard, odd_names):
        try:
            decode_sample(sample, layout)
        except UserError as error:
            bad.add(error)
            continue
        folders.add(sample["__key__"].rpartition("/")[0])
        unread.update(name for name in sample if not _is_read(name, layout))
    parts = [f"{num} members {name!r}" for name, num in unread.most_common(10)]
    if odd_names:
        parts.append(
            f"{len(odd_names)} members not named KEY.EXTENSION, the first {odd_names[0]!r}"
        )
    if len(folders) > 1 and not layout.labelled:
        parts.append(f"the names of {len(folders)} folders (labels are .cls members)")
    return f"{shard.path}: not read: {', '.join(parts)}" if parts else ""


def _is_read(name: str, layout: Layout) -> bool:
    if name.startswith("__") or name == "cls":
        return True
    if layout.member is not None:
        return name == layout.member
    return name.rsplit(".", 1)[-1] in DATA_EXTENSIONS
