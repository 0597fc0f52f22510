"""Typed clients for the remote methods of every part. No other module calls a method by name.

A method has the name and the arguments of the part's own method, except that a reference here is a
value there. `tests/unit/actors/test_clients.py` compares the two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from ebm_dist.actors.auditor import AuditFindings
from ebm_dist.actors.evaluator import Evaluation
from ebm_dist.buffer.answers import (
    ChainHealth,
    CheckinReply,
    Distribution,
    Origin,
    ShardStatus,
    WeightedChains,
)
from ebm_dist.cluster.backend import Handle, Ref
from ebm_dist.core.types import (
    Arrays,
    ChainSample,
    Cursor,
    Lease,
    MovedChains,
    NegativeArrays,
    RankState,
    ShardMeta,
)
from ebm_dist.metrics.hub import HubInfo


@dataclass(frozen=True, slots=True, eq=False)
class Client:
    """Base of all clients: a part in any process."""

    handle: Handle

    @property
    def name(self) -> str:
        return self.handle.name

    @property
    def node(self) -> str | None:
        """Id of the node that was chosen for it; None if Ray chose."""
        return self.handle.node

    @property
    def runs_on(self) -> str | None:
        """Id of the node on which it has started; None if unknown."""
        return getattr(self.handle, "runs_on", None)

    @property
    def num_gpus(self) -> float:
        """GPUs that it reserves in Ray."""
        return self.handle.num_gpus


class ShardClient(Client):
    """Client of `buffer.shard.Shard`."""

    __slots__ = ()

    def checkout(
        self, lease_id: int, num: int, by_rows: bool, drawn: Ref[int] | None = None
    ) -> Ref[Lease | None]:
        return self.handle.call("checkout", lease_id, num, by_rows, drawn)

    def checkout_many(
        self, lease_ids: Sequence[int], num: int, by_rows: bool
    ) -> list[Ref[Lease | None]]:
        """One reference for each lease."""
        num_leases = len(lease_ids)
        if num_leases == 1:  # Ray would return the list itself
            return [self.checkout(lease_ids[0], num, by_rows)]
        return self.handle.call("checkout_many", lease_ids, num, by_rows, num_returns=num_leases)

    def checkout_ready(self, lease_id: int, ready_id: int, by_rows: bool) -> Ref[Lease | None]:
        return self.handle.call("checkout_ready", lease_id, ready_id, by_rows)

    def draw(self, lease_ids: Sequence[int], num: int) -> Ref[int]:
        return self.handle.call("draw", lease_ids, num)

    def checkin(self, moved: Ref[MovedChains | None], lease_id: int) -> Ref[CheckinReply]:
        return self.handle.call("checkin", moved, lease_id)

    def take(self, lease_id: int) -> tuple[Ref[bool], Ref[NegativeArrays]]:
        """References of whether the lease was ready, and of its negatives if it was."""
        ready, negatives = self.handle.call("take", lease_id, num_returns=2)
        return ready, negatives

    def release(self, lease_id: int) -> Ref[int]:
        return self.handle.call("release", lease_id)

    def renew(self, lease_ids: Sequence[int]) -> Ref[None]:
        return self.handle.call("renew", lease_ids)

    def status(self) -> Ref[ShardStatus]:
        return self.handle.call("status")

    def health(self, reseed: bool) -> Ref[ChainHealth | None]:
        return self.handle.call("health", reseed)

    def distribution(self) -> Ref[Distribution]:
        return self.handle.call("distribution")

    def extremes(self, num: int) -> Ref[dict[str, np.ndarray]]:
        return self.handle.call("extremes", num)

    def peek(self, num: int, key: int) -> Ref[ChainSample]:
        return self.handle.call("peek", num, key)

    def weighted(self) -> Ref[WeightedChains]:
        return self.handle.call("weighted")

    def cut(self, number: int, since: int | None) -> tuple[Ref[ShardMeta], Ref[Arrays]]:
        meta, arrays = self.handle.call("cut", number, since, num_returns=2)
        return meta, arrays

    def restore(self, arrays: Arrays | Ref[Arrays], origin: Origin | Ref[Origin]) -> Ref[None]:
        return self.handle.call("restore", arrays, origin)

    def hand_over(self) -> tuple[Ref[Origin], Ref[Arrays]]:
        origin, arrays = self.handle.call("hand_over", num_returns=2)
        return origin, arrays

    def remove_files(self) -> Ref[None]:
        return self.handle.call("remove_files")


class WorkerClient(Client):
    """Client of `actors.worker.Worker`."""

    __slots__ = ()

    def run_round(
        self, lease: Ref[Lease | None], weights: Ref[np.ndarray], version: int, num_steps: int
    ) -> Ref[MovedChains | None]:
        return self.handle.call("run_round", lease, weights, version, num_steps)

    def hold(self, weights: Ref[np.ndarray], version: int) -> Ref[int]:
        return self.handle.call("hold", weights, version)

    def sample(
        self, num: int, num_steps: int, weights: Ref[np.ndarray], seed: int, start_std: float
    ) -> Ref[ChainSample]:
        return self.handle.call("sample", num, num_steps, weights, seed, start_std)


class LearnerClient(Client):
    """Client of `actors.learner_rank.LearnerRank`."""

    __slots__ = ()

    def start(self, rendezvous: tuple[str, int]) -> Ref[None]:
        return self.handle.call("start", rendezvous)

    def update(
        self,
        step: int,
        lr: float,
        after: Ref[bool] | None,
        parts: Sequence[tuple[int, int]],
        *negatives: Ref[NegativeArrays],
    ) -> Ref[dict[str, float]]:
        return self.handle.call("update", step, lr, after, parts, *negatives)

    def published(self, average: bool) -> tuple[Ref[bool], Ref[np.ndarray], Ref[np.ndarray]]:
        """References of True, the flat weights, and with `average` the averaged ones, else None.

        Runs beside the other calls.
        """
        done, flat, mean = self.handle.aside("published", average, num_returns=3)
        return done, flat, mean

    def weights(self) -> Ref[np.ndarray]:
        """The flat weights, from rank 0; None from the others. Collective."""
        return self.handle.call("weights")

    def fetched(self, *negatives: Ref[NegativeArrays]) -> Ref[None]:
        return self.handle.call("fetched", *negatives)

    def state(self) -> tuple[Ref[bool], Ref[RankState]]:
        taken, state = self.handle.call("state", num_returns=2)
        return taken, state

    def load(
        self,
        learner: Mapping[str, torch.Tensor | np.ndarray],
        ema: Mapping[str, torch.Tensor | np.ndarray] | None,
        data: Cursor | None,
        attempt: int,
    ) -> Ref[None]:
        return self.handle.call("load", learner, ema, data, attempt)

    def close(self) -> Ref[None]:
        return self.handle.call("close")


class HubClient(Client):
    """Client of `metrics.hub.MetricHub`."""

    __slots__ = ()

    def log(self, step: int, epoch: int, values: Mapping[str, float]) -> Ref[None]:
        return self.handle.call("log", step, epoch, values)

    def images(self, name: str, step: int, path: str) -> Ref[None]:
        return self.handle.call("images", name, step, path)

    def histogram(self, name: str, step: int, values: np.ndarray) -> Ref[None]:
        return self.handle.call("histogram", name, step, values)

    def artifact(
        self,
        step: int,
        kind: Literal["dataset", "model", "checkpoint"],
        folder: str,
        aliases: Sequence[str],
        metadata: Mapping[str, object],
    ) -> Ref[None]:
        return self.handle.call("artifact", step, kind, folder, aliases, metadata)

    def table(self, name: str, step: int, values: Mapping[str, float]) -> Ref[None]:
        return self.handle.call("table", name, step, values)

    def alert(self, step: int, title: str, text: str, level: str) -> Ref[None]:
        return self.handle.call("alert", step, title, text, level)

    def info(self) -> Ref[HubInfo]:
        return self.handle.call("info")

    def flush(self) -> Ref[bool]:
        return self.handle.call("flush")

    def close(self, exit_code: int) -> Ref[None]:
        return self.handle.call("close", exit_code)


class EvaluatorClient(Client):
    """Client of `actors.evaluator.Evaluator`."""

    __slots__ = ()

    def evaluate(
        self,
        step: int,
        chains: ChainSample,
        ema: Ref[np.ndarray],
        flat: Ref[np.ndarray],
        *weighted: Ref[WeightedChains],
    ) -> Ref[Evaluation]:
        return self.handle.call("evaluate", step, chains, ema, flat, *weighted)


class AuditorClient(Client):
    """Client of `actors.auditor.Auditor`."""

    __slots__ = ()

    def audit(
        self, step: int, flat: Ref[np.ndarray], chains: ChainSample | None
    ) -> Ref[AuditFindings]:
        return self.handle.call("audit", step, flat, chains)
