"""The auditor: runs long chains beside training, and returns what they find as negatives."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from ebm_dist.buffer.config import BufferConfig
from ebm_dist.buffer.starts import draw_context, start_noise
from ebm_dist.core.seeds import derive_seed
from ebm_dist.core.types import Batch, ChainSample, ContextField, EnergyFn, EventSpec
from ebm_dist.core.weights import FlatLayout
from ebm_dist.data import DataConfig, load_split
from ebm_dist.energies import EnergySection
from ebm_dist.energies.context import bind
from ebm_dist.evaluation.audit import long_run_audit
from ebm_dist.evaluation.config import EvaluationConfig
from ebm_dist.samplers import KernelSection
from ebm_dist.samplers.frozen import for_rows


@dataclass(frozen=True, slots=True)
class AuditFindings:
    """The result of an audit."""

    values: dict[str, float]
    """Metrics by name."""
    alarm: str | None
    """One line for the log, or None."""
    negatives: ChainSample  # the M chains to feed back
    energies: np.ndarray  # (M,), of `negatives`


class Auditor:
    """Audits one set of weights at a time."""

    def __init__(
        self,
        config: EvaluationConfig,
        data: DataConfig,
        energy: EnergySection,
        sampler: KernelSection,
        buffer: BufferConfig,
        spec: EventSpec,
        *,
        fields: tuple[ContextField, ...] = (),
        seed: int,
    ) -> None:
        """
        Args:
            fields: what chains carry; of these an energy is given the label.
        """
        self._config = config
        self._data = data
        self._buffer = buffer
        self._spec = spec
        self._fields = fields
        self._seed = seed
        self._short_steps = sampler.num_steps
        self._kernel = sampler.build()
        self._energy = energy.build().eval().requires_grad_(False)
        self._layout = FlatLayout.of(self._energy)
        self._train: Batch | None = None

    def audit(self, step: int, flat: np.ndarray, chains: ChainSample | None) -> AuditFindings:
        """Audit the weights `flat` from `chains`; None for fresh starts of chains."""
        if self._train is None:
            self._train = load_split(self._data, "train")
        self._layout.load_(self._energy, torch.from_numpy(np.array(flat)))
        seed = derive_seed(self._seed, "audit", step)
        generator = torch.Generator().manual_seed(seed)
        pick = torch.randperm(len(self._train.x), generator=generator)
        starts = self._starts(generator, pick, seed) if chains is None else chains
        data = _rows(self._train, pick[: self._config.num_test])
        energy, energy_of_data = self._energy, None
        if "label" in starts.context:
            energy = self._given(starts.context["label"])
            assert data.label is not None
            with torch.no_grad():
                energy_of_data = self._given(data.label.numpy())(data.x)
        found = long_run_audit(
            energy,
            self._kernel,
            torch.from_numpy(np.array(starts.x)),
            data.x,
            short_steps=self._short_steps,
            num_steps=self._config.audit_steps,
            generator=generator,
            persistent=chains is not None,
            energy_of_data=energy_of_data,
        )
        kept, energies = found.kept, torch.zeros(0)
        context = {name: value[kept.numpy()] for name, value in starts.context.items()}
        if kept.any():
            with torch.no_grad():
                energies = for_rows(energy, lambda rows: rows[kept])(found.negatives)
        return AuditFindings(
            values={k: v for k, v in found.metrics().items() if math.isfinite(v)},
            alarm=found.alarm,
            negatives=ChainSample(found.negatives.numpy(), context),
            energies=energies.float().numpy(),
        )

    def _given(self, label: np.ndarray) -> EnergyFn:
        return bind(self._energy, label=torch.from_numpy(np.array(label)))

    def _starts(self, generator: torch.Generator, pick: torch.Tensor, seed: int) -> ChainSample:
        num = self._config.audit_chains
        assert self._train is not None
        # From the end of the permutation: the audit measures distances to its beginning.
        data = _rows(self._train, pick[-num:])
        x = data.x
        if self._buffer.init in ("noise", "gaussian"):
            x = start_noise(self._buffer, self._spec, num, generator)
        context = draw_context(self._buffer.context, self._fields, len(x), data, seed)
        return ChainSample(x.numpy(), context)


def _rows(batch: Batch, index: torch.Tensor) -> Batch:
    return Batch(batch.x[index], None if batch.label is None else batch.label[index])
