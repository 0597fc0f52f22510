"""Returns a run to a checkpoint: at a resume, after a death, or after non-finite numbers.

If a learner rank dies, the group restarts from the last checkpoint. In `async` mode the other parts
keep their state; in `sync` mode the whole run goes back, also if a shard dies, and repeats the
updates bit for bit. After non-finite numbers everything goes back, and the next attempt has other
noise.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from ebm_dist.buffer.answers import Origin
from ebm_dist.checkpoint import files as checkpoint
from ebm_dist.checkpoint.cut import Progress, deal_chains, read_manifest, write_manifest
from ebm_dist.cluster.backend import PartDied, Ref, T
from ebm_dist.cluster.stall import answer
from ebm_dist.config.sections import FlowConfig
from ebm_dist.controller.checkpointer import Checkpointer
from ebm_dist.controller.clients import ShardClient
from ebm_dist.controller.learners import Wait
from ebm_dist.controller.negatives.source import NegativeSource
from ebm_dist.controller.parts import Parts
from ebm_dist.controller.retry import RETRY_S, Attempts, Decision, GoBack, Redo, RollBack, obey
from ebm_dist.controller.rounds.scheduler import RoundScheduler
from ebm_dist.core.errors import NonFinite, RunFailed
from ebm_dist.learner import LearnerConfig

log = logging.getLogger("ebm_dist.run")

Trouble = PartDied | NonFinite | RollBack
TROUBLE = (PartDied, NonFinite, RollBack)
"""The exceptions from which a run recovers."""


class Recovery:
    """Replaces dead parts and loads a checkpoint into the learners, or into all parts."""

    def __init__(
        self,
        parts: Parts,
        flow: FlowConfig,
        learner: LearnerConfig,
        progress: Progress,
        attempts: Attempts,
        cuts: Checkpointer,
        *,
        wait: Wait,
        publish: Callable[[], None],
        run_dir: Path,
        name: str,
    ) -> None:
        """
        Args:
            progress, attempts, cuts: shared with the controller.
            publish: hands the learners' current weights to the workers.
            name: name of the run.
        """
        self._parts = parts
        self._backend = parts.backend
        self._flow = flow
        self._learner = learner
        self._progress = progress
        self._attempts = attempts
        self._cuts = cuts
        self._wait = wait
        self._publish = publish
        self._run_dir = run_dir
        self._name = name
        self.chains_go_back = False
        """Whether the chains are to be loaded from a checkpoint; until then no round starts."""

    def connect(self, scheduler: RoundScheduler, negatives: NegativeSource) -> None:
        """Set the two objects that are built after this one, since they call it."""
        self._scheduler = scheduler
        self._negatives = negatives

    def restore(self, found: checkpoint.CheckpointDir) -> None:
        """Continue from `found`, of any number of ranks and shards."""
        # First, since it determines the noise of this attempt; in place, since others hold it.
        self._progress.resume(found.step, found.meta, read_manifest(self._run_dir))
        self._attempts.reached(found.step)
        self._cuts.resumed_from(found.step)
        try:
            self._load_learners(found)
            self._load_shards(found)
        except PartDied as died:
            self.chains_go_back = True
            self.recover(RollBack(GoBack(f"a part died while the run was restored: {died}")))

    def _load_learners(self, found: checkpoint.CheckpointDir) -> None:
        learner, ema = found.tensors("learner"), found.tensors("ema") or None
        self._parts.learners.load(
            learner, ema, found.meta["ranks"], self._wait, attempt=self._progress.rollbacks
        )

    def _load_shards(self, found: checkpoint.CheckpointDir | None, only: int | None = None) -> bool:
        """Load the chains of the checkpoint into the shards; return False if it has none."""
        dealt = deal_chains(found, self._parts.shards.capacities)
        if dealt is None:
            return False
        asked = [
            (shard, shard.restore(part.arrays, Origin(part.data, part.next_chain)))
            for index, (shard, part) in enumerate(zip(self._parts.shards, dealt))
            if only in (None, index)
        ]
        for shard, ref in asked:
            self._answer(shard, ref, "to load the chains of a checkpoint")
        return True

    def _answer(self, shard: ShardClient, ref: Ref[T], what: str) -> T:
        detail = f"update {self._progress.step}: {shard.name} was told {what}"
        # The shard may be a successor that has to start before it answers.
        timeout = max(self._flow.stall_timeout_s, self._parts.start_timeout_s)
        return answer(self._backend, shard.handle, ref, timeout, detail)

    def recover(self, trouble: Trouble) -> None:
        """Replace dead parts; if state is lost or not finite, go back to the last checkpoint.

        Raises:
            NonFinite: learner.on_nonfinite is `stop`, or learner.max_rollbacks is reached.
            RunFailed: parts died too often without a new update.
        """
        self._attempts.reached(self._progress.step)
        decision = self._decide(trouble)
        while True:
            try:
                if isinstance(decision, GoBack):
                    self._attempts.begin_start()
                    self._go_back(decision)
                    self._attempts.started()
                    decision = Redo()
                obey(self._scheduler.check(trouble))
                return
            except TROUBLE as again:
                trouble = again
            time.sleep(RETRY_S)
            following = self._decide(trouble)
            if isinstance(decision, GoBack):  # a failed attempt to go back is repeated
                following = GoBack(str(trouble))
            decision = following

    def _decide(self, trouble: Trouble) -> Decision:
        """Count the attempt that `trouble` ended, and decide whether to go back."""
        if isinstance(trouble, NonFinite):
            self._count_rollback(trouble)
            return GoBack(str(trouble))
        self._attempts.failed(trouble)
        if isinstance(trouble, RollBack) or self._parts.learners.lost():
            return GoBack(str(trouble))
        return Redo()

    def _count_rollback(self, trouble: NonFinite) -> None:
        """Count a rollback; the next attempt has other noise and a smaller learning rate."""
        learner, progress = self._learner, self._progress
        if learner.on_nonfinite == "stop":
            raise trouble
        if progress.rollbacks >= learner.max_rollbacks:
            raise NonFinite(
                f"{trouble}. The run went back {progress.rollbacks} times already "
                "(learner.max_rollbacks)"
            ) from trouble
        progress.rollbacks += 1
        progress.lr_factor *= learner.rollback_lr_factor
        progress.next_lease = max(progress.next_lease, progress.lease_of(0))
        self.chains_go_back = True

    def _go_back(self, decision: GoBack) -> None:
        """Load the last checkpoint into the learners, and into the shards if `chains_go_back`."""
        start = time.monotonic()
        self.chains_go_back = self.chains_go_back or self._negatives.exact
        if self.chains_go_back:
            self._scheduler.forget_all()
        found = self._cuts.latest()
        untouched = not self.chains_go_back or self._scheduler.num_started == 0
        if found is None and self._progress.step == 0 and untouched:
            # No update and no round was made: ranks and chains restart from the seed.
            self._parts.learners.rebuild(self._wait)
            self._replace_dead_shards()
            self.chains_go_back = False
            self._publish()
            self._scheduler.redo_lost()
            return
        if found is None:
            raise RunFailed(f"{decision.reason}, and there is no checkpoint to go back to")
        lost = self._progress.step - found.step
        what = " and ".join(self._parts.learners.dead())
        why = f"{what} died ({decision.reason})" if what else decision.reason
        log.info(f"{why}: going back {lost} updates to {found.path.name}")
        if self._parts.learners.lost():
            self._parts.learners.rebuild(self._wait)
        self._load_learners(found)
        if self.chains_go_back:
            self._replace_dead_shards()
            self._load_shards(found)
            self.chains_go_back = False
        progress = self._progress
        progress.step, progress.epoch = found.step, progress.epoch + 1
        # The version still increases: a lag is a difference of versions and never negative.
        progress.version += 1
        self._cuts.resumed_from(found.step)
        write_manifest(self._run_dir, found.path.name, progress, self._name)
        self._publish()
        self._scheduler.redo_lost()
        rate = f", learning rate x {progress.lr_factor:g}" if progress.rollbacks else ""
        seconds = time.monotonic() - start
        log.info(f"the learners go on after {seconds:.1f} s{rate}")

    def _replace_dead_shards(self) -> None:
        for index, shard in enumerate(self._parts.shards):
            if not self._backend.alive(shard.handle):
                # The returned decision is ignored: the run already goes back.
                self._scheduler.replace_shard(index, "its process is gone")

    def on_replaced(self, index: int) -> Decision:
        """Give shard `index`, a new process, its chains: those on its node or of the last cut."""
        start = time.monotonic()
        shard = self._parts.shards[index]
        # A rank may have died with the same node. Start its successor now: it takes seconds.
        self._parts.learners.renew_if_dead()
        if self._negatives.exact:
            return GoBack(f"shard {index} died with the leases of this update")
        status = self._answer(shard, shard.status(), "to attach to its chains")
        what = f"all {status.counts.capacity} chains"
        if not status.attached:
            found = self._cuts.latest()
            taken = self._load_shards(found, only=index)
            what = f"{status.counts.capacity} chains rolled back to update " + (
                str(found.step) if found is not None and taken else "0"
            )
        log.info(f"{shard.name} is back with {what} after {time.monotonic() - start:.1f} s")
        return Redo()

    def on_rejected(self, shard: int) -> Decision:
        """Decide what follows when a shard has refused a round."""
        # A new lease would have other slots than in an undisturbed run.
        if self._negatives.exact:
            return GoBack(
                f"shard {shard} refused a round of this update, which ended after its lease had "
                "expired (buffer.lease_timeout_s)"
            )
        return Redo()
