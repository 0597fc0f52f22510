"""How chains of a shard start: from noise or from data, by a seed that names the occasion."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch

from ebm_dist.buffer.jarzynski import start_noise
from ebm_dist.buffer.policy import BufferConfig
from ebm_dist.generators import seeded
from ebm_dist.seeds import derive_seed
from ebm_dist.types import Batch, EventSpec


class StartSource(Protocol):
    """Where chains that start from data take them; `data.DataStream` is one."""

    def next_batch(self, num: int) -> Batch: ...
    def state(self) -> dict[str, Any]: ...
    def load_state(self, state: dict[str, Any]) -> None: ...


class Starts:
    """Chains as `buffer.init` says, for one shard."""

    def __init__(
        self,
        config: BufferConfig,
        spec: EventSpec,
        *,
        index: int,
        seed: int,
        data: StartSource | None = None,
    ) -> None:
        if config.init == "data" and data is None:
            raise ValueError("buffer.init is 'data', but the shard was given no data to start from")
        self._config = config
        self._spec = spec
        self._index = index
        self._seed = seed
        self._data = data

    def draw(self, num: int, *occasion: str | int) -> np.ndarray:
        """`num` chains (num, *event) float32; the noise in them is that of `occasion`."""
        generator = seeded(derive_seed(self._seed, "shard", self._index, *occasion))
        if self._config.init == "noise":
            return start_noise(self._config, self._spec, num, generator).numpy()
        assert self._data is not None
        x = self._data.next_batch(num).x
        if self._config.data_noise_std > 0 and not self._spec.discrete:
            x = x + self._config.data_noise_std * torch.empty_like(x).normal_(generator=generator)
        return x.numpy()

    def state(self) -> dict[str, Any] | None:
        """The cursor of the data, None without data."""
        return self._data.state() if self._data is not None else None

    def load_state(self, state: dict[str, Any] | None) -> None:
        if self._data is not None and state is not None:
            self._data.load_state(state)
