"""The consistent cut of a graph: what it holds, how it is written, how chains come back from it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ebm_dist import checkpoint
from ebm_dist.actors.handles import Handle, Ref
from ebm_dist.errors import RunFailed


@dataclass(slots=True)
class Progress:
    """What a checkpoint remembers of the controller."""

    step: int = 0
    version: int = 0
    """Of the weights; counts on when the learner goes back, so that versions are monotone."""
    epoch: int = 0
    """Times that the run went back to a checkpoint."""
    next_lease: int = 0
    wall_s: float = 0.0


def write_cut(
    run_dir: Path,
    progress: Progress,
    ranks: Sequence[Mapping[str, Any]],
    shards: Sequence[Mapping[str, Any]],
    meta: Mapping[str, Any],
    *,
    keep: int,
) -> Path:
    """Write the states of all ranks and shards, taken between two updates, as one checkpoint.

    Raises:
        OSError: the disk refused; the checkpoints before this one are untouched.
    """
    tensors = {"learner": ranks[0]["learner"], "ema": ranks[0]["ema"] or {}}
    tensors |= {f"shard_{i:04d}": shard["arrays"] for i, shard in enumerate(shards)}
    content = {
        **meta,
        "version": progress.version,
        "epoch": progress.epoch,
        "next_lease": progress.next_lease,
        "wall_s": progress.wall_s,
        "ranks": [rank["data"] for rank in ranks],
        "shards": [shard["meta"] for shard in shards],
    }
    path = checkpoint.save(run_dir, progress.step, tensors, content, keep=keep)
    write_manifest(run_dir, path.name, progress, str(meta["name"]))
    return path


def write_manifest(run_dir: Path, latest: str, progress: Progress, name: str) -> None:
    """Say which checkpoint the run goes on from, and the newest version and epoch given out."""
    checkpoint.write_manifest(
        run_dir,
        {
            "format": checkpoint.FORMAT,
            "run": name,
            "latest": latest,
            "step": progress.step,
            "version": progress.version,
            "epoch": progress.epoch,
        },
    )


def read_manifest(run_dir: Path) -> dict[str, Any]:
    """The manifest, or nothing: a checkpoint can be resumed from without one."""
    try:
        content = json.loads((run_dir / "manifest.json").read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def restore_shards(
    shards: Sequence[Handle],
    found: checkpoint.CheckpointDir | None,
    capacities: Sequence[int],
    *,
    only: int | None = None,
) -> list[Ref]:
    """Deal the chains of the checkpoint out to today's shards, none lost and none doubled.

    Args:
        only: the one shard that is given its part; all when left out.

    Returns:
        References of the calls; none if the checkpoint holds no chains.

    Raises:
        RunFailed: they do not fit.
    """
    names = [name for name in found.names if name.startswith("shard_")] if found else []
    if found is None or not names:
        return []
    saved = [found.arrays(name) for name in names]
    merged = {key: np.concatenate([part[key] for part in saved]) for key in saved[0]}
    total, room = len(merged["generation"]), sum(capacities)
    if total > room:
        raise RunFailed(
            f"the checkpoint holds {total} chains, buffer.capacity has room for {room}; "
            f"set buffer.capacity to {total} or more"
        )
    metas = found.meta["shards"]
    # Room for more chains than there were is numbered on from them, over all shards.
    merged.setdefault("chain_id", np.arange(total))
    next_chain = int(merged["chain_id"].max()) + 1
    refs, start = [], 0
    for index, (shard, capacity) in enumerate(zip(shards, capacities)):
        stop = min(start + capacity, total)
        if only in (None, index):
            arrays = {key: value[start:stop] for key, value in merged.items()}
            cursor = metas[index]["data"] if index < len(metas) else None
            refs.append(shard.call("restore", arrays, {"next_chain": next_chain, "data": cursor}))
        next_chain += capacity - (stop - start)
        start = stop
    return refs
