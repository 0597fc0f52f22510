"""Averages updates and rounds between two log rows into metrics."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Mapping

SKIPPED = "fault/skipped_samples"


class MetricWindow:
    """Collects updates and rounds; `close` returns their means and begins a new window."""

    def __init__(self) -> None:
        self._mcmc_before = 0
        self._totals: dict[str, float] = defaultdict(float)
        self.reset()

    def reset(self) -> None:
        self._start = time.monotonic()
        self._num_updates = 0
        self._sums: dict[str, float] = defaultdict(float)
        self._counts: dict[str, int] = defaultdict(int)
        self._lag_max = 0
        self._waits: list[float] = [0.0, 0.0]

    def add_update(self, metrics: dict[str, float]) -> None:
        self._num_updates += 1
        self._add(metrics)

    def add_round(self, stats: Mapping[str, float]) -> None:
        self._add(stats)

    def add_lag(self, lags: list[int]) -> None:
        for lag in lags:
            self._add({"flow/lag_mean": float(lag)})
            self._lag_max = max(self._lag_max, lag)

    def add_wait(self, for_negatives_s: float, for_learner_s: float) -> None:
        self._waits[0] += for_negatives_s
        self._waits[1] += for_learner_s

    def count(self, name: str, num: int) -> None:
        """Add to a counter of the whole run."""
        self._totals[name] += num

    def bottleneck(self) -> str:
        """Whether the learner waits or computes most of the time, for the progress line."""
        total = sum(self._waits)
        if total <= 0:
            return ""
        share = self._waits[0] / total
        if share >= 0.5:
            return f"learner waits for negatives ({share:.0%})"
        return f"learner computes ({1 - share:.0%})"

    def close(self, *, mcmc_steps: int, idle_s: float) -> dict[str, float]:
        """Metrics since the last close.

        Args:
            mcmc_steps: committed chain steps of the whole run.
            idle_s: mean idle seconds per worker in this window.
        """
        seconds = max(time.monotonic() - self._start, 1e-9)
        updates = max(self._num_updates, 1)
        done, self._mcmc_before = mcmc_steps - self._mcmc_before, mcmc_steps
        values = {name: total / self._counts[name] for name, total in self._sums.items()}
        values |= {
            "flow/lag_max": float(self._lag_max),
            "flow/repaired": self._totals["flow/repaired"],
            "flow/dropped": self._totals["flow/dropped"],
            "flow/lost": self._totals["flow/lost"],
            "flow/mcmc_steps_per_update": done / updates,
            "throughput/updates_per_s": self._num_updates / seconds,
            "throughput/mcmc_steps_per_s": done / seconds,
            "wait/learner": self._waits[0] / seconds,
            "wait/worker": min(idle_s / seconds, 1.0),
        }
        if SKIPPED in self._totals:
            values[SKIPPED] = self._totals[SKIPPED]
        self.reset()
        return values

    def _add(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            # A diagnostic may be undefined for a round; the mean is over the other rounds.
            if math.isfinite(value):
                self._sums[name] += value
                self._counts[name] += 1
