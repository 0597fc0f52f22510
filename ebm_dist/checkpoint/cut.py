"""A consistent cut of a run: its content, how it is written, and how shards are restored."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ebm_dist.checkpoint import files as checkpoint
from ebm_dist.core.errors import NonFinite, RunFailed
from ebm_dist.core.types import Arrays, Cursor, RankState, ShardState
from ebm_dist.files.safe_open import read_bytes

log = logging.getLogger("ebm_dist")

_RETRY_STRIDE = 1 << 40
"""The offset between the lease ids of successive attempts, one attempt per rollback."""


@dataclass(slots=True)
class Progress:
    """The controller's state in a checkpoint."""

    step: int = 0
    version: int = 0
    """Version of the weights; keeps increasing after a rollback, so versions are monotone."""
    epoch: int = 0
    """Number of times that the run was restored from a checkpoint."""
    next_lease: int = 0
    updates: int = 0
    """Updates so far, with those repeated after a fault; for the bounds on steps per update."""
    extra_steps: int = 0
    """Chain steps other than those of consumed negatives; for the same bounds."""
    wall_s: float = 0.0
    rollbacks: int = 0
    """Number of rollbacks because of non-finite numbers. Part of the noise seed. Unlike `epoch`
    it does not change after a kill, since the repeat must be identical."""
    lr_factor: float = 1.0
    """Product of the rollbacks' factors on the learning rate."""
    alerts: dict[str, float] = field(default_factory=dict)
    """When the last alert of each title was sent, in seconds since the Unix epoch."""

    def lease_of(self, number: int) -> int:
        """The id of lease `number` of this attempt. The id alone seeds the noise of the lease."""
        return self.rollbacks * _RETRY_STRIDE + number

    def remembered(self) -> dict[str, Any]:
        """The fields that a checkpoint and the manifest both hold."""
        return {
            "version": self.version,
            "epoch": self.epoch,
            "rollbacks": self.rollbacks,
            "lr_factor": self.lr_factor,
            "alerts": dict(self.alerts),
        }

    def resume(self, step: int, meta: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
        """Continue at `step` from the content of a checkpoint and of the newest manifest."""
        self.step, self.wall_s = step, float(meta["wall_s"])
        # The manifest may hold newer numbers, used by an attempt that was then rolled back.
        self.version = max(int(meta["version"]), manifest.get("version", 0))
        self.epoch = max(int(meta["epoch"]), manifest.get("epoch", 0)) + 1
        newer = max(meta, manifest, key=lambda content: content.get("rollbacks", 0))
        self.rollbacks = newer.get("rollbacks", 0)
        self.lr_factor = newer.get("lr_factor", 1.0)
        # In place, since the monitor holds it.
        self.alerts.update(meta.get("alerts", {}) | manifest.get("alerts", {}) | self.alerts)
        self.next_lease = max(int(meta["next_lease"]), self.lease_of(0))
        self.updates = int(meta.get("updates", step))
        self.extra_steps = int(meta.get("extra_steps", 0))


def write_cut(
    run_dir: Path,
    progress: Progress,
    ranks: Sequence[RankState],
    shards: Sequence[ShardState],
    meta: Mapping[str, Any],
    *,
    keep: int,
    bases: Mapping[str, checkpoint.Base] | None = None,
) -> Path:
    """Write the states of all ranks and shards, taken between two updates, as one checkpoint.

    Args:
        bases: the full file of each incremental shard file, by file stem.

    Raises:
        NonFinite: a state is not finite, so no run could continue from it.
        OSError: the write failed; earlier checkpoints are unchanged.
    """
    assert ranks[0].learner is not None
    tensors = {"learner": ranks[0].learner, "ema": ranks[0].ema or {}}
    tensors |= {shard_file(i): shard.arrays for i, shard in enumerate(shards)}
    for file, entries in tensors.items():
        _refuse_non_finite(file, entries)
    content = {
        **meta,
        **progress.remembered(),
        "next_lease": progress.next_lease,
        "updates": progress.updates,
        "extra_steps": progress.extra_steps,
        "wall_s": progress.wall_s,
        "ranks": [rank.data for rank in ranks],
        "shards": [asdict(shard.meta) for shard in shards],
    }
    path = checkpoint.save(run_dir, progress.step, tensors, content, keep=keep, bases=bases)
    write_manifest(run_dir, path.name, progress, str(meta["name"]))
    return path


def shard_file(index: int) -> str:
    """The stem of the checkpoint file of shard `index`."""
    return f"shard_{index:04d}"


def _refuse_non_finite(file: str, entries: Mapping[str, Any]) -> None:
    """Check weights, optimiser state and chains. Infinities are valid elsewhere: in a buffer such
    as a mask, and in a log-weight, where minus infinity means weight zero."""
    for key, value in entries.items():
        if not (key == "position" or key.startswith(("param/", "optim/"))):
            continue
        if not np.isfinite(np.asarray(value)).all():
            raise NonFinite(
                f"{file}/{key} holds numbers that are not finite; lower learner.lr or "
                "sampler.step_size, or set learner.grad_clip or objective.energy_l2"
            )


def write_manifest(run_dir: Path, latest: str, progress: Progress, name: str) -> None:
    """Record the checkpoint to resume from, and the newest version and epoch in use.

    If the disk is full, the run continues without a manifest: the checkpoints suffice to resume.
    """
    content = {
        "format": checkpoint.FORMAT,
        "run": name,
        "latest": latest,
        "step": progress.step,
        **progress.remembered(),
    }
    try:
        checkpoint.write_manifest(run_dir, content)
    except OSError as error:
        log.warning("manifest.json not written (%s)", error.strerror or error)


def read_manifest(run_dir: Path) -> dict[str, Any]:
    """The manifest; empty if it is missing or damaged, since a resume works without it."""
    try:
        content = json.loads(read_bytes(run_dir / "manifest.json"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


@dataclass(frozen=True, slots=True)
class Dealt:
    """Chains of a checkpoint for one of the current shards."""

    arrays: Arrays
    next_chain: int
    """First identity of the chains that fill the remaining slots."""
    data: Cursor | None


def deal_chains(
    found: checkpoint.CheckpointDir | None, capacities: Sequence[int]
) -> list[Dealt] | None:
    """Distribute the chains of the checkpoint over shards of `capacities`, each exactly once.

    Returns:
        A part for each shard; None if the checkpoint holds no chains.

    Raises:
        RunFailed: the chains do not fit.
    """
    names = [name for name in found.names if name.startswith("shard_")] if found else []
    if found is None or not names:
        return None
    saved = [found.arrays(name) for name in names]
    merged = {key: np.concatenate([part[key] for part in saved]) for key in saved[0]}
    total, room = len(merged["generation"]), sum(capacities)
    if total > room:
        raise RunFailed(
            f"the checkpoint holds {total} chains, buffer.capacity has room for {room}; "
            f"set buffer.capacity to {total} or more"
        )
    metas = found.meta["shards"]
    # If the capacity has grown, new chains get the next identities, over all shards.
    merged.setdefault("chain_id", np.arange(total))
    next_chain = int(merged["chain_id"].max()) + 1
    dealt, start = [], 0
    for index, capacity in enumerate(capacities):
        stop = min(start + capacity, total)
        arrays = {key: value[start:stop] for key, value in merged.items()}
        dealt.append(
            Dealt(arrays, next_chain, metas[index]["data"] if index < len(metas) else None)
        )
        next_chain += capacity - (stop - start)
        start = stop
    return dealt
