"""The auditor: long chains off the training path, and what they found as negatives."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ebm_dist.buffer.config import BufferConfig
from ebm_dist.buffer.starts import start_noise
from ebm_dist.cluster.backend import Backend, Handle, PartDied, Ref, first_line
from ebm_dist.core.seeds import derive_seed
from ebm_dist.core.types import EventSpec
from ebm_dist.core.weights import FlatLayout
from ebm_dist.data import DataConfig, load_split
from ebm_dist.energies import EnergySection
from ebm_dist.evaluation.audit import long_run_audit
from ebm_dist.evaluation.config import EvaluationConfig
from ebm_dist.samplers import KernelSection


class Auditor:
    """Runs the audit of one set of weights at a time. Plain Python: a part of the graph."""

    def __init__(
        self,
        config: EvaluationConfig,
        data: DataConfig,
        energy: EnergySection,
        sampler: KernelSection,
        buffer: BufferConfig,
        spec: EventSpec,
        *,
        seed: int,
    ) -> None:
        self._config = config
        self._data = data
        self._buffer = buffer
        self._spec = spec
        self._seed = seed
        self._short_steps = sampler.num_steps
        self._kernel = sampler.build()
        self._energy = energy.build().eval().requires_grad_(False)
        self._layout = FlatLayout.of(self._energy)
        self._train: torch.Tensor | None = None

    def audit(self, step: int, flat: np.ndarray, chains: np.ndarray | None) -> dict[str, Any]:
        """Audit the weights `flat` from `chains` (N, *event), or from where chains start.

        Returns:
            `values` by metric name, the `alarm` in one line or None, and `negatives` (M, *event)
            with their energies (M,): the chains to feed back.
        """
        if self._train is None:
            self._train = load_split(self._data, "train").x
        self._layout.load_(self._energy, torch.from_numpy(np.array(flat)))
        generator = torch.Generator().manual_seed(derive_seed(self._seed, "audit", step))
        pick = torch.randperm(len(self._train), generator=generator)
        found = long_run_audit(
            self._energy,
            self._kernel,
            self._starts(generator, pick) if chains is None else torch.from_numpy(np.array(chains)),
            self._train[pick[: self._config.num_test]],
            short_steps=self._short_steps,
            num_steps=self._config.audit_steps,
            generator=generator,
            persistent=chains is not None,
        )
        with torch.no_grad():
            energies = self._energy(found.negatives) if len(found.negatives) else torch.zeros(0)
        return {
            "values": {k: v for k, v in found.metrics().items() if math.isfinite(v)},
            "alarm": found.alarm,
            "negatives": found.negatives.numpy(),
            "energies": energies.float().numpy(),
        }

    def _starts(self, generator: torch.Generator, pick: torch.Tensor) -> torch.Tensor:
        num = self._config.audit_chains
        if self._buffer.init == "noise":
            return start_noise(self._buffer, self._spec, num, generator)
        assert self._train is not None
        # The other end of the permutation: the audit measures distances to the first of it.
        return self._train[pick[-num:]]


class AuditLink:
    """One audit at a time; its findings are logged when they come, and fed back where asked."""

    def __init__(
        self,
        backend: Backend,
        spawn: Callable[[], Handle],
        config: EvaluationConfig,
        *,
        batch_size: int,
        divisor: int,
        from_chains: bool,
        wait_s: float,
        say: Callable[[str], None],
    ) -> None:
        """
        Args:
            batch_size: negatives of an update without those fed back.
            divisor: the number fed back is a multiple of it.
            from_chains: audits go on from the buffer's chains.
            wait_s: how long training waits for an audit; in sync mode its findings must enter at
                the same update in every run.
        """
        assert config.audit_every is not None
        self.restarts = 0
        self.from_chains = from_chains
        self.every: int = config.audit_every
        self.num_chains = config.audit_chains
        self.wait_s = wait_s
        self.handle = spawn()
        self._backend = backend
        self._spawn = spawn
        self._config = config
        self._batch_size = batch_size
        self._divisor = divisor
        self._say = say
        self._pending: tuple[int, Ref] | None = None
        self._extra: tuple[int, Ref] | None = None
        self._left = 0
        self._fed_back = 0

    @property
    def busy(self) -> bool:
        return self._pending is not None

    def start(self, step: int, flat: Ref, chains: np.ndarray | None) -> None:
        """Audit the weights of update `step`; nothing may be under way."""
        assert self._pending is None
        self._pending = step, self.handle.call("audit", step, flat, chains)

    def collect(self, timeout: float, version: int) -> tuple[int, dict[str, float]] | None:
        """The audit under way if it is done within `timeout` seconds, as (step, metrics).

        Args:
            version: of the learner's weights, that of negatives fed back from now on.
        """
        if self._pending is None:
            return None
        step, ref = self._pending
        if not self._backend.wait([ref], timeout):
            return None
        self._pending = None
        try:
            found = self._backend.get(ref, 60.0)
        except PartDied as died:
            self._say(f"the auditor died ({died}); update {step} goes without an audit")
            self.start_anew()
            return None
        except Exception as error:  # an audit that fails must not cost the run
            self._say(f"the audit of update {step} failed: {first_line(error)}")
            return None
        if found["alarm"] is not None:
            self._say(f"update {step}: {found['alarm']}")
        if self._config.audit_feedback:
            self._feed_back(found["negatives"], found["energies"], version)
        return step, {**found["values"], "audit/fed_back": float(self._fed_back)}

    def give_up(self, why: str) -> None:
        """Do without the audit under way."""
        if self._pending is not None:
            self._say(f"update {self._pending[0]} goes without an audit: {why}")
            self._pending = None
            self.start_anew()

    def start_anew(self) -> None:
        """Another process in place of one that is dead, or is not waited for any more."""
        self.restarts += 1
        self._backend.kill(self.handle)
        self.handle = self._spawn()

    def extra(self) -> tuple[int, Ref] | None:
        """(number, reference) of the negatives that the next update gets on top, if any."""
        if self._left == 0:
            return None
        self._left -= 1
        return self._extra

    def _feed_back(self, x: np.ndarray, energy: np.ndarray, version: int) -> None:
        self._extra, self._left = None, 0
        if len(x) == 0:
            return
        num = -(-len(x) // self._divisor) * self._divisor
        index = np.arange(num) % len(x)
        share = self._config.audit_feedback_weight
        # Chains of the buffer have log-weight 0, so that these have `share` of the whole.
        log_weight = math.log(share / (1 - share) * self._batch_size / num)
        negatives = {
            "x": x[index],
            "energy": energy[index],
            "version": np.full(num, version, np.int64),
            "log_weight": np.full(num, log_weight, np.float32),
        }
        self._extra = num, self._backend.put(negatives)
        self._left = self._config.audit_feedback_updates
        self._fed_back += len(x)
