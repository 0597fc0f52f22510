"""Shards and leases for the tests: chains whose numbers say who they are."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch

from ebm_dist.buffer.config import BufferConfig
from ebm_dist.buffer.rows import open_rows
from ebm_dist.buffer.shard import Shard
from ebm_dist.core.types import Batch, ContextField, EventSpec, Lease, LevelNoise, MovedChains

SPEC = EventSpec((3,), "real")


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def make_shard(capacity: int = 24, max_lease: int = 4, **options: Any) -> Shard:
    config = {"capacity": capacity, "reinit_prob": 0.0, "lease_timeout_s": 10.0}
    config |= options.pop("config", {})
    options = {"index": 0, "seed": 5, "clock": Clock(), **options}
    return Shard(BufferConfig(**config), SPEC, capacity=capacity, max_lease=max_lease, **options)


def carrying(kind: type[Numbered], **options: Any) -> Shard:
    """A shard whose chains start as `kind` says and carry what it names."""
    options["config"] = {"init": kind.init, "context": kind.context, **options.get("config", {})}
    return make_shard(**{"data": kind(), "fields": kind.fields, **options})


class Numbered:
    """Data whose n-th datum is n everywhere, so that a chain says from which it started: `move`
    adds one to a chain in 3 steps, and what it carries has to agree with that."""

    context: ClassVar = {"label": "data", "clock": True, "condition": "data", "pair": "data"}
    fields = (
        ContextField("label", size=7),
        ContextField("clock"),
        ContextField("condition", (2,), "float32"),
        ContextField("pair", (3,), "float32"),
    )
    init = "data"
    width: ClassVar = 3
    roams: ClassVar = False
    """Whether a move changes the level of each chain."""

    def __init__(self) -> None:
        self.next = 0

    def next_batch(self, num: int) -> Batch:
        n = torch.arange(self.next, self.next + num)
        self.next += num
        x = n[:, None].expand(-1, self.width).float()
        return Batch(x, n % 7, torch.stack([n + 0.25, n + 0.5], 1))

    def state(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state(self, state: dict[str, int]) -> None:
        self.next = state["next"]

    @staticmethod
    def check(x: np.ndarray, context: dict[str, np.ndarray]) -> None:
        """Everything that chains (M, 3) carry is of the datum that they started from."""
        n = x[:, 0] - context["clock"] // 3
        assert np.array_equal(context["label"], n % 7)
        assert np.array_equal(context["condition"], np.stack([n + 0.25, n + 0.5], 1))
        if "pair" in context:  # which no worker is told
            assert np.array_equal(context["pair"], np.repeat(n[:, None], 3, 1))

    @classmethod
    def check_arrays(cls, arrays: dict[str, np.ndarray]) -> None:
        """As `check`, of the arrays of a snapshot, which hold every context of a chain."""
        context = {key[8:]: value for key, value in arrays.items() if key.startswith("context/")}
        assert context.keys() == {field.name for field in cls.fields}
        cls.check(arrays["position"], context)


class Paired(Numbered):
    """Noise of size 0: pairs are 10 n or 20 n by level, and chains start at noisy pairs, two or
    three times as large."""

    context: ClassVar = {
        "level": "stratified",
        "clock": True,
        "condition": "noisy_pair",
        "pair": "data",
    }
    fields = (
        ContextField("level", size=2),
        ContextField("clock"),
        ContextField("condition", (3,), "float32", noise=LevelNoise((2.0, 3.0), (0.0, 0.0))),
        ContextField("pair", (3,), "float32", noise=LevelNoise((10.0, 20.0), (0.0, 0.0))),
    )
    init = "condition"

    @staticmethod
    def check(x: np.ndarray, context: dict[str, np.ndarray]) -> None:
        start = x - context["clock"][:, None] // 3
        assert np.array_equal(context["condition"], start)
        level = context["level"][:, None]
        assert np.isin(level, (0, 1)).all()
        if "pair" in context:
            assert np.array_equal(context["condition"], (2 + level) * context["pair"])
            assert not (context["pair"] % (10 * (1 + level))).any()


class Roaming(Paired):
    """As `Paired`, and each move takes a chain to the other level: a chain's level says how often
    it has moved since it started, as its clock and its position do."""

    roams = True

    @staticmethod
    def check(x: np.ndarray, context: dict[str, np.ndarray]) -> None:
        moves = context["clock"] // 3
        assert np.array_equal(context["condition"], x - moves[:, None])
        if "pair" in context:
            first = (context["level"] + moves)[:, None] % 2
            assert np.array_equal(context["condition"], (2 + first) * context["pair"])
            assert not (context["pair"] % (10 * (1 + first))).any()


def conditions_of(lease: Lease) -> dict[str, np.ndarray]:
    """The context of a lease, its conditions read from the rows where they lie there."""
    assert "pair" not in lease.context
    if lease.grant is None:
        return lease.context
    rows = open_rows(lease.grant)
    out = np.empty((len(lease.slots), *lease.grant.event_shape), lease.grant.dtype)
    condition = np.empty((len(lease.slots), *lease.grant.condition_shape), np.float32)
    assert rows.read(lease.grant, out, lease.chain_id, condition)
    return lease.context | {"condition": condition}


def move(lease: Lease, version: int = 1, *, roams: bool = False, **changes: Any) -> MovedChains:
    """What a worker would return: every chain has moved by one. By rows, it is written there."""
    start = chains_of(lease)
    position = changes.get(
        "position", np.zeros((len(lease.slots), 1)) if start is None else start + 1
    )
    token = None
    if lease.grant is not None:
        rows = open_rows(lease.grant)
        if start is not None and rows is not None:
            written = rows.write(lease.grant, position, lease.chain_id)
            token = lease.grant.token if written else None
    fields: dict[str, Any] = {
        "lease_id": lease.lease_id,
        "shard": lease.shard,
        "shard_epoch": lease.shard_epoch,
        "slots": lease.slots,
        "generations": lease.generations,
        "chain_id": lease.chain_id,
        "position": position if lease.grant is None else None,
        "energy": position.reshape(len(position), -1).sum(1),
        "log_weight": lease.log_weight,
        "version": version,
        "num_steps": 3,
        "token": token,
        "level": 1 - lease.context["level"] if roams else None,
    }
    if lease.grant is not None:
        changes.pop("position", None)
    return MovedChains(**(fields | changes))


def chains_of(lease: Lease) -> np.ndarray | None:
    """The chains (M, *event) of a lease, sent or in the rows; None if those are void."""
    if lease.grant is None:
        assert lease.position is not None
        return np.asarray(lease.position)
    rows = open_rows(lease.grant)
    out = np.empty((len(lease.slots), *lease.grant.event_shape), lease.grant.dtype)
    return out if rows is not None and rows.read(lease.grant, out, lease.chain_id) else None


def total(shard: Shard) -> int:
    counts = shard.counts()
    return counts.free + counts.leased + counts.ready


def chain_ids(shard: Shard) -> list[int]:
    return shard.identities().tolist()
