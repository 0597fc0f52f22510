"""The auditor: long chains off the training path, and what they found as negatives."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from ebm_dist.buffer.config import BufferConfig
from ebm_dist.buffer.starts import start_noise
from ebm_dist.core.seeds import derive_seed
from ebm_dist.core.types import EventSpec
from ebm_dist.core.weights import FlatLayout
from ebm_dist.data import DataConfig, load_split
from ebm_dist.energies import EnergySection
from ebm_dist.evaluation.audit import long_run_audit
from ebm_dist.evaluation.config import EvaluationConfig
from ebm_dist.samplers import KernelSection


@dataclass(frozen=True, slots=True)
class AuditFindings:
    """What an audit measured, and what it found."""

    values: dict[str, float]
    """By metric name."""
    alarm: str | None
    """In one line."""
    negatives: np.ndarray  # (M, *event): the chains to feed back
    energies: np.ndarray  # (M,), theirs


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

    def audit(self, step: int, flat: np.ndarray, chains: np.ndarray | None) -> AuditFindings:
        """Audit the weights `flat` from `chains` (N, *event), or from where chains start."""
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
        return AuditFindings(
            values={k: v for k, v in found.metrics().items() if math.isfinite(v)},
            alarm=found.alarm,
            negatives=found.negatives.numpy(),
            energies=energies.float().numpy(),
        )

    def _starts(self, generator: torch.Generator, pick: torch.Tensor) -> torch.Tensor:
        num = self._config.audit_chains
        if self._buffer.init == "noise":
            return start_noise(self._buffer, self._spec, num, generator)
        assert self._train is not None
        # The other end of the permutation: the audit measures distances to the first of it.
        return self._train[pick[-num:]]
