"""Measurements off the training path, by a part of their own: sample quality, energies."""

from __future__ import annotations

import math

import numpy as np
import torch

from ebm_dist.data import DataConfig, load_split
from ebm_dist.energies import EnergySection
from ebm_dist.evaluation.config import EvaluationConfig
from ebm_dist.evaluation.fidelity import Fidelity
from ebm_dist.seeds import derive_seed
from ebm_dist.types import EventSpec
from ebm_dist.weights import FlatLayout


class Evaluator:
    """Trains the feature network at its first call, then answers what the controller asks."""

    def __init__(
        self,
        config: EvaluationConfig,
        data: DataConfig,
        energy: EnergySection,
        spec: EventSpec,
        *,
        seed: int,
    ) -> None:
        self._config = config
        self._data = data
        self._spec = spec
        self._seed = seed
        self._energy = energy.build().eval().requires_grad_(False)
        self._layout = FlatLayout.of(self._energy)
        self._fidelity: Fidelity | None = None
        self._test: torch.Tensor | None = None

    def evaluate(self, step: int, chains: np.ndarray, ema: np.ndarray) -> dict[str, float]:
        """Metrics of `chains` (N, *event) and of the averaged weights `ema`, by name."""
        if self._test is None:
            self._prepare()
        assert self._test is not None
        self._layout.load_(self._energy, torch.from_numpy(np.array(ema)))
        generator = torch.Generator().manual_seed(derive_seed(self._seed, "evaluate", step))
        with torch.no_grad():
            values = {
                "energy/test": _mean_energy(self._energy, self._test),
                "energy/noise": _mean_energy(self._energy, self._spec.noise(256, generator)),
            }
        if self._fidelity is not None:
            x = torch.from_numpy(np.array(chains[: self._config.num_samples]))
            values["fidelity/distance"] = self._fidelity.distance(x)
            values |= {f"fidelity/{k}": v for k, v in self._fidelity.reference().items()}
            values["fidelity/accuracy"] = self._fidelity.accuracy
        return {name: value for name, value in values.items() if math.isfinite(value)}

    def _prepare(self) -> None:
        test = load_split(self._data, "test", self._config.num_test)
        self._test = test.x
        if wants_fidelity(self._config, self._spec):
            self._fidelity = Fidelity.fit(
                load_split(self._data, "train", self._config.fidelity_train),
                test,
                self._spec,
                derive_seed(self._seed, "fidelity"),
                num_epochs=self._config.fidelity_epochs,
                num_reference=self._config.num_samples,
            )


def wants_fidelity(config: EvaluationConfig, spec: EventSpec) -> bool:
    if config.fidelity == "auto":
        return spec.kind == "image" and len(spec.shape) == 3 and spec.num_classes is not None
    return config.fidelity


def _mean_energy(energy: torch.nn.Module, x: torch.Tensor) -> float:
    return float(torch.cat([energy(part) for part in x.split(256)]).mean())
