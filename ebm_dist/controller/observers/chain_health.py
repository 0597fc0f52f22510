"""Checks whether the traced chains of the shards move, and logs an alarm if they do not."""

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
    """Asks the shards for the health of their chains, once per log row."""

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
            reseed: restart stuck chains after an alarm.
            generator: the run is a short-run generator, whose chains never leave their mode: say
                so once instead of an alarm.
        """
        self._backend = backend
        self._shards = shards
        self._reseed = reseed
        self._generator = generator
        self._generator_told = False
        self._timeout = timeout
        self._alarmed: set[int] = set()
        self._num_alarms = 0
        self.alarm: str | None = None
        """The last alarm, while chains of any shard are stuck."""
        self._num_reseeded = 0

    def check(self) -> dict[str, float]:
        """Metrics by name, averaged over the shards that have new values.

        Raises:
            PartDied: a shard died.
        """
        sums: dict[str, list[float]] = defaultdict(list)
        asked = [(shard, shard.health(self._reseed)) for shard in self._shards]
        for index, (shard, ref) in enumerate(asked):
            detail = "waited for the health of the chains"
            report = answer(self._backend, shard.handle, ref, self._timeout, detail)
            if report is None:
                continue
            for name, value in report.values.items():
                if math.isfinite(value):
                    sums[name].append(value)
            self._num_reseeded += report.num_reseeded
            if report.alarm is None:
                self._alarmed.discard(index)
                self.alarm = self.alarm if self._alarmed else None
                continue
            if self._generator:
                if not self._generator_told:
                    self._generator_told = True
                    log.info(GENERATOR)
                continue
            self._num_alarms += 1
            self.alarm = report.alarm
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
