"""The evaluator: measures sample quality, energies and likelihood beside training."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ebm_dist.buffer.answers import WeightedChains
from ebm_dist.core.events import energy_at
from ebm_dist.core.generators import seeded
from ebm_dist.core.seeds import derive_seed
from ebm_dist.core.types import Batch, ChainSample, EnergyFn, EventSpec
from ebm_dist.core.weights import FlatLayout
from ebm_dist.data import DataConfig, load_split
from ebm_dist.energies import EnergySection
from ebm_dist.energies.context import bind, chain_unit, trait
from ebm_dist.evaluation.bases import base_law
from ebm_dist.evaluation.config import EvaluationConfig
from ebm_dist.evaluation.exact import exact_log_partition, is_exact
from ebm_dist.evaluation.fidelity import Fidelity
from ebm_dist.evaluation.likelihood import log_likelihood, log_partition
from ebm_dist.evaluation.robustness import robust_accuracy
from ebm_dist.jarzynski.weights import log_z_ratio, log_z_standard_error, weights_moved
from ebm_dist.objectives import ObjectiveSection
from ebm_dist.objectives.weighting import ess_ratio
from ebm_dist.samplers import KernelSection
from ebm_dist.samplers.law import box, curvature, effective_temperature, unadjusted

log = logging.getLogger("ebm_dist")

NUM_PROBED = 64
"""Number of chains at which the curvature of the energy is measured."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The result of an evaluation."""

    values: dict[str, float]
    """Metrics by name."""
    neighbours: np.ndarray | None
    """Some chains, each followed by its nearest training images (N, C, H, W), as
    `Fidelity.neighbours` makes them; None without fidelity."""


class Evaluator:
    """Measures chains and weights. The first call trains the feature network."""

    def __init__(
        self,
        config: EvaluationConfig,
        data: DataConfig,
        energy: EnergySection,
        spec: EventSpec,
        sampler: KernelSection | None = None,
        *,
        objective: ObjectiveSection | None = None,
        seed: int,
        temperature: float = 1.0,
        start_std: float = 1.0,
        run_estimates_log_z: bool = False,
    ) -> None:
        """
        Args:
            sampler: sampler of the chains, for the bias of its step size; None to leave it out.
            objective: makes the energy function of the chains from the learned energy; None to use
                the learned energy itself. If it reads labels, the energy is a classifier, whose
                accuracy is measured.
            temperature: T of the run's chains; the likelihood is that of exp(-E/T)/Z.
            start_std: standard deviation of the noise from which chains start, buffer.init_std.
            run_estimates_log_z: training logs its own estimate as `likelihood/log_z`; the exact
                value then has another name.
        """
        self._config = config
        self._temperature = temperature
        self._start_std = start_std
        self._run_estimates_log_z = run_estimates_log_z
        self._data = data
        self._spec = spec
        self._moves = unadjusted(sampler.build()) if sampler is not None else None
        self._box = box(sampler.build()) if sampler is not None else None
        self._seed = seed
        self._energy = self._chain_energy = energy.build()
        self._classifies = False
        if objective is not None:
            self._chain_energy = objective.chain_energy(self._energy)
            # Other energies with logits are no classifiers: by E(x, y) alone nothing compares the
            # classes, each of which has its own log Z.
            reads_labels = objective.build().needs_labels
            self._classifies = reads_labels and not trait(self._energy, "needs_context")
        self._chain_energy.eval().requires_grad_(False)
        self._layout = FlatLayout.of(self._energy)
        self._fidelity: Fidelity | None = None
        self._test: Batch | None = None
        self._train: torch.Tensor | None = None

    def evaluate(
        self,
        step: int,
        chains: ChainSample,
        ema: np.ndarray,
        flat: np.ndarray | None = None,
        *weighted: WeightedChains,
    ) -> Evaluation:
        """Measure `chains` and the averaged weights `ema`.

        Args:
            flat: the current weights. With `weighted`, or if the run estimates log Z itself, the
                likelihood is that of `flat`: such an estimate follows the current weights.
            weighted: all chains of each shard with their Jarzynski log-weights.
        """
        if self._test is None:
            self._prepare(min(self._config.num_samples, len(chains.x)))
        assert self._test is not None
        self._layout.load_(self._energy, torch.from_numpy(np.array(ema)))
        generator = seeded(derive_seed(self._seed, "evaluate", step))
        noise = self._spec.noise(256, generator, std=self._start_std)
        with torch.no_grad():
            values = {
                "energy/test": self._mean_energy(self._test.x),
                "energy/noise": self._mean_energy(noise),
            }
        if self._classifies and self._test.label is not None:
            values["classifier/accuracy"] = robust_accuracy(
                self._energy, self._test.x, self._test.label, epsilon=0.0
            )
        if self._moves is not None:
            x = torch.from_numpy(np.array(chains.x[:NUM_PROBED]))
            given = self._given(chains, NUM_PROBED)
            unit = chain_unit(given, x)
            a = curvature(self._moves, given, x if unit is None else x / unit, generator)
            values["sampler/curvature"] = a
            values["sampler/effective_temperature"] = effective_temperature(self._moves, a)
        neighbours = None
        # A buffer whose size changes may have fewer chains than before.
        if self._fidelity is not None and len(chains.x) >= self._fidelity.num:
            # The noise of unclamped chains leaves the range of the data; an image cannot.
            x = torch.from_numpy(np.array(chains.x[: self._fidelity.num])).clamp(-1.0, 1.0)
            label = chains.context.get("label")
            asked = None if label is None else torch.from_numpy(label[: self._fidelity.num])
            measured = self._fidelity.measure(x, asked) | self._fidelity.reference()
            values |= {f"fidelity/{name}": value for name, value in measured.items()}
            values["fidelity/accuracy"] = self._fidelity.accuracy
            neighbours = self._fidelity.neighbours(x).numpy()
        if flat is not None and (weighted or self._run_estimates_log_z):
            self._layout.load_(self._energy, torch.from_numpy(np.array(flat)))
        if weighted:
            values |= self._running_likelihood(weighted)
        values |= self._likelihood(step, bool(weighted) or self._run_estimates_log_z)
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        return Evaluation(finite, neighbours)

    def _given(self, chains: ChainSample, num: int) -> EnergyFn:
        """The energy function with the context of the first `num` chains."""
        context = {
            name: torch.from_numpy(chains.context[name][:num].copy())
            for name in trait(self._chain_energy, "context") & chains.context.keys()
        }
        return bind(self._chain_energy, **context)

    def _mean_energy(self, x: torch.Tensor) -> float:
        """Mean energy of events (N, *event).

        If the energy needs a context, event i gets that of held-out datum i, and the cleanest
        level.
        """
        assert self._test is not None
        index = torch.arange(len(x)) % len(self._test.x)
        known = {
            "label": self._test.label,
            "condition": self._test.condition,
            "level": torch.zeros(len(self._test.x), dtype=torch.int64),
        }
        needed = sorted(trait(self._energy, "needs_context"))
        context = {k: value[index] for k in needed if (value := known[k]) is not None}
        return mean_energy(self._energy, x, context)

    def _running_likelihood(self, shards: Sequence[WeightedChains]) -> dict[str, float]:
        """log Z from the chains' Jarzynski weights, each updated to the current weights."""

        def joined(arrays: list[np.ndarray]) -> torch.Tensor:
            return torch.from_numpy(np.concatenate(arrays))

        x = joined([shard.x for shard in shards])
        with torch.no_grad():
            energy = torch.cat([self._energy(part) for part in x.split(256)])
        log_weight = weights_moved(
            joined([shard.log_weight for shard in shards]).double(),
            joined([shard.energy for shard in shards]).double(),
            energy.double(),
            temperature=self._temperature,
        )
        log_z = float(log_z_ratio(log_weight))
        return {
            "likelihood/log_z": log_z,
            "likelihood/log_z_std_error": float(log_z_standard_error(log_weight)),
            "likelihood/ess_ratio": float(ess_ratio(log_weight)),
            **self._log_probs(log_z),
        }

    def _likelihood(self, step: int, beside: bool) -> dict[str, float]:
        """log Z: exact if possible, else by annealing if evaluation.likelihood is true."""
        wanted = self._config.likelihood
        if wanted is False or trait(self._energy, "needs_context"):
            return {}  # such an energy has one log Z per context
        if is_exact(self._energy, self._spec):
            try:
                log_z = exact_log_partition(
                    self._energy, self._spec, temperature=self._temperature, box=self._box
                )
                if beside:
                    return {
                        "likelihood/log_z_exact": log_z,
                        "likelihood/log_prob_exact": self._log_probs(log_z)["likelihood/log_prob"],
                    }
                return {"likelihood/log_z": log_z, **self._log_probs(log_z)}
            except ValueError as error:  # Z may be infinite, if the energy does not rise far out
                log.info("no exact likelihood at update %d: %s", step, error)
        if wanted == "auto" or beside:
            return {}
        estimate = log_partition(
            self._energy,
            self._spec,
            generator=torch.Generator().manual_seed(derive_seed(self._seed, "ais", step)),
            temperature=self._temperature,
            num_chains=self._config.num_ais_chains,
            num_temperatures=self._config.num_ais_temperatures,
            base=base_law(self._spec, self._train, box=self._box),
            box=self._box,
        )
        return {
            "likelihood/log_z": estimate.combined,
            "likelihood/log_z_std_error": estimate.combined_se,
            "likelihood/log_z_lower": estimate.forward,
            "likelihood/log_z_upper": estimate.reverse,
            **self._log_probs(estimate.combined),
        }

    def _log_probs(self, log_z: float) -> dict[str, float]:
        assert self._train is not None
        assert self._test is not None
        return {
            f"likelihood/{name}": log_likelihood(
                self._energy, x, log_z, temperature=self._temperature
            )[0]
            for name, x in (("log_prob", self._train), ("log_prob_test", self._test.x))
        }

    def _prepare(self, num_chains: int) -> None:
        test = load_split(self._data, "test", self._config.num_test)
        self._test = test
        self._train = load_split(self._data, "train", self._config.num_test).x
        if wants_fidelity(self._config, self._spec):
            self._fidelity = Fidelity.fit(
                load_split(self._data, "train", self._config.fidelity_train),
                test,
                self._spec,
                derive_seed(self._seed, "fidelity"),
                num_epochs=self._config.fidelity_epochs,
                num_reference=num_chains,
            )


def wants_fidelity(config: EvaluationConfig, spec: EventSpec) -> bool:
    """Whether to measure fidelity; `auto` means for images with classes."""
    if config.fidelity == "auto":
        return spec.kind == "image" and len(spec.shape) == 3 and spec.num_classes is not None
    return config.fidelity


def mean_energy(
    energy: EnergyFn, x: torch.Tensor, context: Mapping[str, torch.Tensor] | None = None
) -> float:
    """Mean energy of events (N, *event), each with its row of `context` (N, ...)."""
    parts = []
    for start in range(0, len(x), 256):
        rows = slice(start, start + 256)
        given = bind(energy, **{name: value[rows] for name, value in (context or {}).items()})
        parts.append(energy_at(given, x[rows]))
    return float(torch.cat(parts).mean())
