"""Traces of chains over many rounds, to see whether they still move between modes.

Within one round every image chain looks confined, and between two log lines a chain may not have
moved at all. So a record is made when a lease is committed, one per round; a chain that restarts
begins a new trace. After a full window the next slots are traced, so that in time every slot of the
shard is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ebm_dist.diagnostics import effective_sample_size, stagnation

MIN_RECORDS = 20
"""With fewer records the variance of a healthy chain can be small by chance."""

MIN_CHAINS = 4


@dataclass(frozen=True, slots=True)
class TracePlan:
    """How many chains of a shard are traced, over how many rounds, and the alarm's thresholds."""

    num_chains: int
    num_records: int
    max_stuck: float
    max_rhat: float = 1.2
    one_law: bool = True
    """Whether all chains have the same law. The law of a chain with a context is its own."""


@dataclass(frozen=True, slots=True)
class TraceReport:
    values: dict[str, float]
    """By metric name."""
    alarm: str | None
    stuck: np.ndarray  # (S,), int64, slots


class ChainTrace:
    """The last records of the traced slots of one shard."""

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
        """The traced slots, (num_chains,)."""
        return (self._first + np.arange(self._num)) % self._capacity

    def follows(self, slots: np.ndarray) -> np.ndarray:
        """The indices into `slots` (M,) of those that are traced."""
        return np.flatnonzero((slots - self._first) % self._capacity < self._num)

    def record(
        self, slots: np.ndarray, position: np.ndarray, energy: np.ndarray, fresh: np.ndarray
    ) -> None:
        """Record `position` (M, *event) and `energy` (M,) of `slots` (M,) after a round.

        All slots are traced ones; the energies are under the weights of that round.
        """
        row = (slots - self._first) % self._capacity
        self._counts[row[fresh]] = 0
        place = self._counts[row] % self._plan.num_records, row
        self._records[place], self._energies[place] = position, energy
        self._counts[row] += 1
        self._recorded += len(row)

    def report(self, where: str) -> TraceReport | None:
        """Diagnostics of the chains with a long enough trace; None if there is nothing new."""
        # At most eight reports per window, since diagnostics cost more than records.
        if self._recorded - self._reported < self._num * max(1, self._plan.num_records // 8):
            return None
        rows = np.flatnonzero(self._counts >= self._min_records)
        if len(rows) < min(MIN_CHAINS, self._num):
            return None
        self._reported = self._recorded
        length = int(min(self._counts[rows].min(), self._plan.num_records))
        # The last `length` rounds of each chain, oldest first.
        at = (self._counts[rows] - length + np.arange(length)[:, None]) % self._plan.num_records
        trace = torch.from_numpy(self._records[at, rows])
        energies = torch.from_numpy(self._energies[at, rows])
        # The weights change between rounds, which shifts all energies together.
        energies = energies - energies.mean(dim=1, keepdim=True)
        if not self._plan.one_law:
            # The means of chains differ then, however well they mix: measured from its own mean,
            # the halves of a chain disagree only if it drifts.
            trace, energies = trace - trace.mean(0), energies - energies.mean(0)
        found = stagnation(
            trace,
            energies,
            where=where,
            max_fraction=self._plan.max_stuck,
            max_rhat=self._plan.max_rhat,
        )
        ess = float(effective_sample_size(trace).min())
        report = TraceReport(
            values={
                "chain/stagnant": found.fraction,
                "chain/trace_rhat": found.rhat,
                "chain/trace_energy_rhat": found.energy_rhat,
                "chain/trace_autocorrelation": trace.shape[0] * trace.shape[1] / ess,
                "chain/trace_ess": ess,
            },
            alarm=found.alarm,
            stuck=self.slots[rows[found.stuck.numpy()]],
        )
        if self._recorded >= self._num * self._plan.num_records:
            self._first = (self._first + self._num) % self._capacity
            self._clear()
        return report
