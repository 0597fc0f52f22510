"""The chains of a new run, taken from another run's and spread over the shards."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np

from ebm_dist.actors.shard import start_stream
from ebm_dist.buffer.chains import CONTEXT, ShardChains
from ebm_dist.buffer.codec import Codec
from ebm_dist.buffer.config import shard_capacities
from ebm_dist.checkpoint.files import CheckpointDir
from ebm_dist.config.run_config import RunConfig
from ebm_dist.core.errors import UserError
from ebm_dist.core.types import Arrays, EventSpec, ShardState

Chains = Arrays
"""Fields of chains by name: always `position`, and a shard's other fields if they are known."""


def chains_of(found: CheckpointDir, codec: Codec, spec: EventSpec) -> Chains:
    """Every chain of a checkpoint, as this run stores them."""
    parts = [found.arrays(name) for name in found.names if name.startswith("shard_")]
    if not parts:
        raise UserError(
            f"run.init_chains: true, but the checkpoint at {found.path} holds no chains; set it "
            "to false"
        )
    names = ["position", "energy", "version", "age", "log_weight"]
    names += [name for name in parts[0] if name.startswith(CONTEXT)]
    chains = {name: np.concatenate([part[name] for part in parts]) for name in names}
    if chains["position"].shape[1:] != spec.shape or len({len(v) for v in chains.values()}) > 1:
        raise ValueError(f"its chains have shape {chains['position'].shape}")
    chains["position"] = codec.converted(chains["position"])
    if not np.isfinite(codec.to_numpy(chains["position"])).all():
        raise ValueError("its chains are not finite")
    # Versions count this run's weights: 0 for chains that another run has moved, -1 for unmoved
    # ones.
    return {**chains, "version": np.minimum(chains["version"], 0)}


def check_context(config: RunConfig, spec: EventSpec, chains: Chains, path: Path) -> None:
    """Raise UserError if `chains` lack a context of this run's chains, which cannot be computed."""
    for carried in config.context_fields(spec):
        found = chains.get(CONTEXT + carried.name)
        if found is None or found.shape[1:] != carried.shape:
            raise UserError(
                f"run.init_chains: true, but the chains of {path} carry no {carried.name} as "
                f"buffer.context.{carried.name} asks; set run.init_chains: false, or leave "
                f"buffer.context.{carried.name} out"
            )
        if (
            carried.size is not None
            and len(found)
            and (found.min() < 0 or found.max() >= carried.size)
        ):
            raise UserError(
                f"run.init_chains: true, but the chains of {path} carry a {carried.name} of "
                f"{found.max()}, here they are 0 to {carried.size - 1}; set run.init_chains: false"
            )


def first_shards(config: RunConfig, spec: EventSpec, chains: Chains | None) -> list[ShardState]:
    """Snapshots of the shards at update 0."""
    buffer, seed = config.buffer, config.run.seed
    if not config.objective.takes_negatives:
        return []
    capacities = shard_capacities(buffer.capacity, buffer.num_shards)
    fields = config.context_fields(spec)
    num = len(chains["position"]) if chains is not None else 0
    # Evenly spaced chains if there are more than fit.
    rows = np.linspace(0, num - 1, min(num, buffer.capacity)).round().astype(np.int64)
    shares = np.split(rows, np.cumsum(shard_capacities(len(rows), buffer.num_shards))[:-1])
    shards = []
    for index, (capacity, share) in enumerate(zip(capacities, shares)):
        with contextlib.ExitStack() as stack:
            data = None
            if buffer.starts_from_data:
                data = start_stream(config.data, index, buffer.num_shards, seed)
                stack.callback(data.close)
            shard = ShardChains(
                buffer,
                spec,
                index=index,
                capacity=capacity,
                max_lease=1,
                seed=seed,
                data=data,
                fields=fields,
            )
            snapshot = shard.snapshot()
        for name, array in (chains or {}).items():
            if name in snapshot.arrays:  # otherwise a context that this run's chains do not have
                snapshot.arrays[name][: len(share)] = array[share]
        shards.append(snapshot)
    return shards


def check_event(theirs: EventSpec, ours: EventSpec, path: Path) -> None:
    if (theirs.kind, theirs.shape) != (ours.kind, ours.shape):
        raise UserError(
            f"run.init_chains: the chains of {path} are {theirs.kind} events of shape "
            f"{theirs.shape}, this run's data are {ours.kind} of {ours.shape}; set it to false"
        )


def check_jarzynski(config: RunConfig, weighted: bool, path: Path) -> None:
    if config.buffer.jarzynski and not weighted:
        raise UserError(
            f"run.init_chains: the chains of {path} carry no Jarzynski weights, which "
            "buffer.jarzynski needs; set one of the two to false"
        )
