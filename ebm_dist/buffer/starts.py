"""Initial chains of a shard: noise, data or noisy data, with a seed derived from the occasion.

With Jarzynski weights, a chain that has not moved yet is a draw from a known density q. Its slot
holds energy 0 and log-weight -log q(x). The first round then applies the usual weight update
A' = A + (0 - E(x)/T), and the mean of exp(A) estimates Z itself rather than a ratio.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ebm_dist.buffer.config import BufferConfig, ContextConfig
from ebm_dist.core.generators import seeded
from ebm_dist.core.seeds import derive_seed
from ebm_dist.core.types import Arrays, Batch, ContextField, EventSpec, LevelNoise


class StartSource(Protocol):
    """The data from which chains start; `data.DataStream` implements it."""

    def next_batch(self, num: int) -> Batch: ...
    def state(self) -> dict[str, Any]: ...
    def load_state(self, state: dict[str, Any]) -> None: ...


class Starts:
    """Draws the initial chains of one shard, as `buffer.init` says."""

    def __init__(
        self,
        config: BufferConfig,
        spec: EventSpec,
        *,
        index: int,
        seed: int,
        data: StartSource | None = None,
        fields: tuple[ContextField, ...] = (),
    ) -> None:
        if config.starts_from_data and data is None:
            raise ValueError("buffer.init is 'data', but the shard was given no data to start from")
        self._config = config
        self._spec = spec
        self._index = index
        self._seed = seed
        self._data = data
        self._fields = fields

    def draw(self, num: int, *occasion: str | int) -> tuple[np.ndarray, Arrays]:
        """`num` chains (num, *event) float32 and their contexts (num, ...); `occasion` is part of
        the seed of their noise."""
        seed = derive_seed(self._seed, "shard", self._index, *occasion)
        batch = None
        if self._config.starts_from_data:
            assert self._data is not None
            batch = self._data.next_batch(num)
        context = draw_context(self._config.context, self._fields, num, batch, seed)
        if self._config.init == "condition":
            return context["condition"], context
        x = self._position(num, batch, seeded(seed))
        noise = next((field.noise for field in self._fields if field.name == "level"), None)
        if self._config.init == "data" and noise is not None:
            rng = np.random.default_rng(derive_seed(seed, "noise of the level"))
            x = _noised(x, context["level"], noise, rng)
        return x, context

    def _position(self, num: int, batch: Batch | None, generator: torch.Generator) -> np.ndarray:
        if self._config.init in ("noise", "gaussian"):
            return start_noise(self._config, self._spec, num, generator).numpy()
        assert batch is not None
        x = batch.x
        if self._config.data_noise_std > 0 and not self._spec.discrete:
            x = x + self._config.data_noise_std * torch.empty_like(x).normal_(generator=generator)
        return x.numpy()

    def state(self) -> dict[str, Any] | None:
        """The cursor of the data, None without data."""
        return self._data.state() if self._data is not None else None

    def load_state(self, state: dict[str, Any] | None) -> None:
        if self._data is not None and state is not None:
            self._data.load_state(state)


def draw_context(
    config: ContextConfig,
    fields: tuple[ContextField, ...],
    num: int,
    batch: Batch | None,
    seed: int,
) -> Arrays:
    """The contexts of `num` chains that start together, (num, ...) each.

    Args:
        batch: the data that they start at or beside; None if nothing comes from data.
        seed: of this occasion.
    """
    drawn: Arrays = {}
    # The condition comes last: it may be made of the pair.
    for field in sorted(fields, key=lambda field: field.name == "condition"):
        rng = np.random.default_rng(derive_seed(seed, field.name))
        if field.name == "clock":
            drawn["clock"] = np.zeros(num, np.int64)
        elif field.name == "level" or (field.name == "label" and config.label == "uniform"):
            drawn[field.name] = _stratified(num, field.size, rng)
        elif field.name == "condition" and config.condition == "noisy_pair":
            drawn["condition"] = drawn["pair"]
        else:
            assert batch is not None
            given = {"label": batch.label, "condition": batch.condition, "pair": batch.x}
            value = given[field.name]
            assert value is not None, f"data without a {field.name}"
            drawn[field.name] = value.numpy().astype(field.dtype)
        if field.noise is not None and field.name != "level":
            drawn[field.name] = _noised(drawn[field.name], drawn["level"], field.noise, rng)
    return drawn


def _noised(
    x: np.ndarray, level: np.ndarray, noise: LevelNoise, rng: np.random.Generator
) -> np.ndarray:
    """x (num, *event) float32 with the noise of each one's level (num,)."""
    scale, std = (
        np.asarray(values, np.float32)[level].reshape(-1, *[1] * (x.ndim - 1))
        for values in (noise.scale, noise.std)
    )
    return scale * x + std * rng.standard_normal(x.shape, np.float32)


def _stratified(num: int, size: int | None, rng: np.random.Generator) -> np.ndarray:
    """`num` of 0 .. size - 1 in random order, each equally often up to one."""
    assert size is not None
    return rng.permutation((rng.integers(size) + np.arange(num)) % size)


def start_noise(
    config: BufferConfig, spec: EventSpec, num: int, generator: torch.Generator
) -> Tensor:
    """`num` chains (num, *event) for `buffer.init: noise` and `gaussian`.

    Images with Jarzynski weights start from N(0, init_std^2) and not from the cube [-1, 1]:
    importance weights need a start density that is positive wherever the model's is. The flow of
    energy matching starts there too (`gaussian`).
    """
    if (config.jarzynski or config.init == "gaussian") and spec.kind == "image":
        spec = EventSpec(spec.shape, "real")
    return spec.noise(num, generator, std=config.init_std)


def start_log_weight(config: BufferConfig, spec: EventSpec, x: np.ndarray) -> np.ndarray:
    """-log q(x), (num,) float32, of chains x (num, *event) drawn by `start_noise`."""
    if spec.kind == "binary":
        return np.full(len(x), math.prod(spec.shape) * math.log(2), np.float32)
    if spec.kind == "categorical":
        num_sites, num_values = math.prod(spec.shape[:-1]), spec.shape[-1]
        return np.full(len(x), num_sites * math.log(num_values), np.float32)
    white = x.reshape(len(x), -1).astype(np.float64) / config.init_std
    constant = math.log(config.init_std) + 0.5 * math.log(2 * math.pi)
    return (0.5 * (white**2).sum(1) + white.shape[1] * constant).astype(np.float32)
