"""Chains of a shard followed over their rounds: do they still move between modes?

Within a round every image chain looks confined, and between two log lines a chain may not have
moved at all. So positions are recorded where a lease is committed, one record a round, and a
chain that starts afresh starts a new trace. After a full window the next slots are followed, so
that the whole shard is seen in turn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ebm_dist.diagnostics import effective_sample_size, stagnation

MIN_RECORDS = 20
"""Below it a healthy chain's own spread is small by chance."""

MIN_CHAINS = 4


@dataclass(frozen=True, slots=True)
class TracePlan:
    """How many chains of a shard are followed, for how long, and when the alarm sounds."""

    num_chains: int
    num_records: int
    max_stuck: float
    max_rhat: float = 1.2


class ChainTrace:
    """The last records of some of the slots of one shard."""

    def __init__(self, plan: TracePlan, capacity: int, event_shape: tuple[int, ...]) -> None:
        self._plan = plan
        self._num = min(plan.num_chains, capacity)
        self._min_records = min(MIN_RECORDS, plan.num_records)
        self._first = 0
        self._capacity = capacity
        self._records = np.zeros((plan.num_records, self._num, *event_shape), np.float32)
        self._energies = np.zeros((plan.num_records, self._num), np.float32)
        self._clear()

    def _clear(self) -> None:
        self._counts = np.zeros(self._num, np.int64)
        self._recorded = self._reported = 0

    @property
    def slots(self) -> np.ndarray:
        """The slots that are followed, (num_chains,)."""
        return (self._first + np.arange(self._num)) % self._capacity

    def follows(self, slots: np.ndarray) -> np.ndarray:
        """Which of `slots` (M,) are followed, as their places in it."""
        return np.flatnonzero((slots - self._first) % self._capacity < self._num)

    def record(
        self, slots: np.ndarray, position: np.ndarray, energy: np.ndarray, fresh: np.ndarray
    ) -> None:
        """The chains of `slots` (M,), all followed, are at `position` (M, *event) after a round,
        at `energy` (M,) under the weights of the day."""
        row = (slots - self._first) % self._capacity
        self._counts[row[fresh]] = 0
        place = self._counts[row] % self._plan.num_records, row
        self._records[place], self._energies[place] = position, energy
        self._counts[row] += 1
        self._recorded += len(row)

    def report(self, where: str) -> dict[str, Any] | None:
        """Diagnostics of the chains with a trace long enough; None where there is nothing new.

        Returns:
            `values` by metric name, the `alarm` if it sounds, and the `stuck` slots.
        """
        # An eighth of a window: the diagnostics cost more than the records.
        if self._recorded - self._reported < self._num * max(1, self._plan.num_records // 8):
            return None
        rows = np.flatnonzero(self._counts >= self._min_records)
        if len(rows) < min(MIN_CHAINS, self._num):
            return None
        self._reported = self._recorded
        length = int(min(self._counts[rows].min(), self._plan.num_records))
        # Each chain's own last `length` rounds, oldest first.
        at = (self._counts[rows] - length + np.arange(length)[:, None]) % self._plan.num_records
        trace = torch.from_numpy(self._records[at, rows])
        energies = torch.from_numpy(self._energies[at, rows])
        # The weights move from round to round, and all energies with them.
        energies = energies - energies.mean(dim=1, keepdim=True)
        found = stagnation(
            trace,
            energies,
            where=where,
            max_fraction=self._plan.max_stuck,
            max_rhat=self._plan.max_rhat,
        )
        ess = float(effective_sample_size(trace).min())
        report = {
            "values": {
                "chain/stagnant": found.fraction,
                "chain/trace_rhat": found.rhat,
                "chain/trace_energy_rhat": found.energy_rhat,
                "chain/trace_autocorrelation": trace.shape[0] * trace.shape[1] / ess,
                "chain/trace_ess": ess,
            },
            "alarm": found.alarm,
            "stuck": self.slots[rows[found.stuck.numpy()]],
        }
        if self._recorded >= self._num * self._plan.num_records:
            self._first = (self._first + self._num) % self._capacity
            self._clear()
        return report
