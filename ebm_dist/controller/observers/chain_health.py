"""Looks at the followed chains of every shard, and raises the alarm where they stand still."""

from __future__ import annotations

import logging
import math
from collections import defaultdict

from ebm_dist.cluster.backend import Backend
from ebm_dist.cluster.stall import answer
from ebm_dist.controller.shards import Shards
from ebm_dist.evaluation.regime import GENERATOR

log = logging.getLogger("ebm_dist.run")


class ChainMonitor:
    """Asks the shards how their chains move, at each log line."""

    def __init__(
        self,
        backend: Backend,
        shards: Shards,
        *,
        reseed: bool,
        generator: bool,
        timeout: float,
    ) -> None:
        """
        Args:
            reseed: give stuck chains a fresh start where the alarm sounds.
            generator: chains are a short-run generator's, which keep their mode: it is said once,
                and is no alarm.
        """
        self._backend = backend
        self._shards = shards
        self._reseed = reseed
        self._generator = generator
        self._generator_told = False
        self._timeout = timeout
        self._alarmed: set[int] = set()
        self._num_alarms = 0
        self._num_reseeded = 0

    def look(self) -> dict[str, float]:
        """Means over the shards that have something new to tell, by metric name.

        Raises:
            PartDied: a shard is gone.
        """
        sums: dict[str, list[float]] = defaultdict(list)
        asked = [(shard, shard.health(self._reseed)) for shard in self._shards]
        for index, (shard, ref) in enumerate(asked):
            detail = "waited for how the chains move"
            report = answer(self._backend, shard.handle, ref, self._timeout, detail)
            if report is None:
                continue
            for name, value in report.values.items():
                if math.isfinite(value):
                    sums[name].append(value)
            self._num_reseeded += report.num_reseeded
            if report.alarm is None:
                self._alarmed.discard(index)
                continue
            if self._generator:
                if not self._generator_told:
                    self._generator_told = True
                    log.info(GENERATOR)
                continue
            self._num_alarms += 1
            if index not in self._alarmed:
                self._alarmed.add(index)
                log.info(report.alarm)
        if not sums:
            return {}
        return {
            **{name: sum(values) / len(values) for name, values in sums.items()},
            "chain/alarms": float(self._num_alarms),
            "chain/reseeded": float(self._num_reseeded),
        }
