"""Decides which events of a run are worth an alert: few, each with what to do about it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from ebm_dist.cluster.backend import Node

Level = Literal["INFO", "WARN", "ERROR"]

PAUSE_S = 3600.0
"""Least time between two alerts of one title."""

NUM_LAGGING = 20
"""Rows of metrics in a row with the lag at its bound, before this is an alert."""

NEAR_BOUND = 0.9
"""Fraction of flow.max_lag from which on the mean lag counts as at the bound."""

NODES_EVERY_S = 30.0
"""Time between two looks at the nodes of the cluster."""


class Alerts:
    """Looks at each row of metrics, and at the nodes of the cluster."""

    def __init__(
        self,
        send: Callable[[int, str, str, Level], None],
        *,
        max_lag: int | None,
        nodes: Callable[[], Sequence[Node]],
        sent_at: dict[str, float],
    ) -> None:
        """
        Args:
            send: sends an alert of an update, with title, text and level.
            max_lag: flow.max_lag of an `async` run, else None.
            nodes: the nodes of the cluster that live; empty if unknown.
            sent_at: the time of the last alert of each title, also of earlier attempts; kept up to
                date here.
        """
        self.rollbacks = 0
        """Rollbacks of which no alert is to be sent, as those before a resume."""
        self._send = send
        self._max_lag = max_lag
        self._nodes = nodes
        self._num_lagging = 0
        self._present: dict[str, Node] = {}
        self._look_at = 0.0
        self._sent_at = sent_at

    def look(self, step: int, row: Mapping[str, float], alarm: str | None) -> None:
        """Send what a row of metrics is worth.

        Args:
            alarm: what the stagnation test says of stuck chains; None if they move.
        """
        rollbacks = int(row.get("fault/rollbacks", 0))
        if rollbacks > self.rollbacks:
            self._alert(
                step,
                "Training diverged and went back",
                f"Rollback {rollbacks}: numbers were not finite, or the energy gap was beyond its "
                "limit, so the run went back to its last checkpoint and has a lower learning rate. "
                "If it happens again, lower learner.lr or set learner.grad_clip.",
                "ERROR",
            )
        self.rollbacks = rollbacks
        if alarm is not None:
            self._alert(step, "Chains are stuck", f"{alarm}.", "WARN")
        self._look_at_lag(step, row)
        self._look_at_nodes(step)

    def _look_at_lag(self, step: int, row: Mapping[str, float]) -> None:
        if self._max_lag is None or "flow/lag_mean" not in row:
            return
        # A bound of 1 is reached by every healthy run.
        late = self._max_lag > 1 and row["flow/lag_mean"] >= NEAR_BOUND * self._max_lag
        late = late or row.get("flow/dropped", 0.0) > 0
        self._num_lagging = self._num_lagging + 1 if late else 0
        if self._num_lagging >= NUM_LAGGING:
            self._alert(
                step,
                "Negatives lag at flow.max_lag",
                f"The last {self._num_lagging} rows of metrics have negatives that are "
                f"{row['flow/lag_mean']:.1f} updates old (flow.max_lag is {self._max_lag}). Raise "
                "workers.num_workers, or lower workers.num_chains or sampler.num_steps, so that "
                "rounds keep up with the learner.",
                "WARN",
            )

    def _look_at_nodes(self, step: int) -> None:
        if time.monotonic() < self._look_at:
            return
        self._look_at = time.monotonic() + NODES_EVERY_S
        if not (found := {node.id: node for node in self._nodes()}):
            return
        # A drained node was meant to go.
        lost = [node for node in self._present.values() if node.id not in found]
        lost = [node.id[:8] for node in lost if not node.draining]
        self._present = found
        if lost:
            self._alert(
                step,
                "A node of the cluster is lost",
                f"Lost: {', '.join(lost)}; {len(found)} nodes are left. The run goes on with them. "
                "Look at fault/restarts and run.log, and start the node again to have its cores "
                "back.",
                "WARN",
            )

    def _alert(self, step: int, title: str, text: str, level: Level) -> None:
        now = time.time()  # the clock of all attempts, which may also be set back
        if not 0 <= now - self._sent_at.get(title, -math.inf) < PAUSE_S:
            self._sent_at[title] = now
            self._send(step, title, text, level)
