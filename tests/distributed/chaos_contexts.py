"""Chains with contexts for the chaos soak, and what holds of them in every checkpoint."""

from __future__ import annotations

from typing import ClassVar, Protocol

import numpy as np
from graph_runs import TINY

from ebm_dist.data import DataConfig, load_split

NUM_STEPS = TINY["sampler"]["num_steps"]
DROP = "flow.stale=drop"
"""A round that is too old is dropped and not repaired, so every round has as many steps."""


class Contexts(Protocol):
    """What the chains of a soak carry."""

    overrides: ClassVar[tuple[str, ...]]
    """Of the soak's config."""

    def faults(self, chains: dict[str, np.ndarray]) -> list[str]:
        """What is wrong with all chains of a checkpoint, arrays by identity; a line for each."""
        ...


class Labels:
    """Chains that never restart: each keeps its label from the first checkpoint to the last."""

    overrides: ClassVar[tuple[str, ...]] = (
        "energy={name: mlp, num_classes: data}",
        "buffer.context={label: data, clock: true}",
        "buffer.reinit_prob=0",
        DROP,
    )

    def __init__(self) -> None:
        self._first: np.ndarray | None = None

    def faults(self, chains: dict[str, np.ndarray]) -> list[str]:
        label = chains["context/label"]
        if self._first is None:
            self._first = label
        found = faults_of_clock(chains)
        if len(np.unique(label)) < 5:
            found.append(f"the chains are of {len(np.unique(label))} classes")
        if changed := int((label != self._first).sum()):
            found.append(f"{changed} chains have another label than at first")
        return found


class NoisyPairs:
    """Chains that restart with other pairs: each has a datum as its pair, a condition with the
    noise of its own level about it, and stays near its condition."""

    noise: ClassVar[tuple[float, float]] = (0.05, 0.2)
    overrides: ClassVar[tuple[str, ...]] = (
        f"sampler={{name: langevin, step_size: 2e-4, temperature: 1.0, num_steps: {NUM_STEPS}}}",
        "objective={name: recovery_likelihood, chains: pool, noise_std: [0.05, 0.2]}",
        "buffer.init=condition",
        "buffer.context={level: stratified, clock: true, condition: noisy_pair, pair: data}",
        DROP,
    )

    def __init__(self) -> None:
        x = load_split(DataConfig(source="digits"), "train").x.numpy()
        self._data = {datum.tobytes() for datum in x}

    def faults(self, chains: dict[str, np.ndarray]) -> list[str]:
        level, pair, condition = (chains[f"context/{k}"] for k in ("level", "pair", "condition"))
        found = faults_of_clock(chains)
        if set(level.tolist()) != {0, 1}:
            found.append(f"the chains are at levels {sorted(set(level.tolist()))}")
        if strangers := sum(datum.tobytes() not in self._data for datum in pair):
            found.append(f"{strangers} pairs are no data")
        # In units of the noise. The root of the mean of 64 squares has a standard deviation of .09,
        # and neighbours among the data are 2 or more apart.
        std = np.asarray(self.noise)[level]
        tied, moved = distance(condition, pair) / std, distance(chains["position"], condition) / std
        if strays := int((abs(tied - 1) > 0.5).sum()):
            found.append(f"{strays} conditions are not the pairs with the noise of their levels")
        if strays := int((moved > 2).sum()):
            found.append(f"{strays} chains are far from their conditions")
        return found


def distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Root of the mean square over each event's numbers, (N,), of events (N, *event)."""
    return np.sqrt(np.square(a - b).reshape(len(a), -1).mean(1))


def faults_of_clock(chains: dict[str, np.ndarray]) -> list[str]:
    """The clock is committed beside the other contexts, and tells of a commit that was made by
    half."""
    wrong = int((chains["context/clock"] != NUM_STEPS * chains["age"]).sum())
    return [f"the clocks of {wrong} chains are not those of their rounds"] if wrong else []
