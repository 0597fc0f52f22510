"""The learner rank: one DeepSpeed step on its own data and its slice of the negatives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch

from ebm_dist.core.seeds import derive_seed
from ebm_dist.core.types import Cursor, NegativeArrays, Negatives, RankState
from ebm_dist.core.weights import as_sent
from ebm_dist.data import DataConfig, DataStream
from ebm_dist.energies import EnergySection
from ebm_dist.learner import LearnerConfig
from ebm_dist.learner.weight_outbox import WeightOutbox
from ebm_dist.objectives import ObjectiveSection, ess_ratio


class LearnerRank:
    """One of `config.num_ranks` processes that hold the model together.

    `start`, `update`, `weights`, `state` and `load` are collective: unless the controller calls
    them on every rank, the called ranks wait until `learner.timeout_s`. `published` is called on
    rank 0 alone and may run in a thread beside the others: no update waits while large weights are
    copied from the device into Ray's shared memory.
    """

    def __init__(
        self,
        config: LearnerConfig,
        data: DataConfig,
        energy: EnergySection,
        objective: ObjectiveSection,
        *,
        rank: int,
        seed: int,
        device: str,
        reweight: bool = False,
        jarzynski: bool = False,
    ) -> None:
        self._config = config
        self._rank = rank
        self._run_seed = self._seed = seed
        self._batch_size = data.batch_size // config.num_ranks
        self._device = device
        self._data_config = data
        self._data = DataStream(data, rank=rank, world_size=config.num_ranks, seed=seed)
        self._num_skipped = 0
        """Bad samples that this stream has skipped and updates have reported."""
        self._energy = energy.build(seed=derive_seed(seed, "energy"))
        self._objective = objective.build(seed=derive_seed(seed, "objective"))
        self._objective.reweight = reweight and self._objective.needs_negatives
        self._jarzynski = jarzynski
        self._outbox: WeightOutbox | None = None
        """Set on rank 0 by `start`."""

    def start(self, rendezvous: tuple[str, int]) -> None:
        """Form the process group at (host, port) and build the engine. Collective."""
        # The import of DeepSpeed takes seconds and is needed by learners alone.
        from ebm_dist.learner.engine import LearnerEngine

        self._engine = LearnerEngine(
            self._config,
            self._energy,
            self._objective,
            rank=self._rank,
            world_size=self._config.num_ranks,
            master_addr=rendezvous[0],
            master_port=rendezvous[1],
            device=self._device,
        )
        if (flat := self._engine.flat_weights()) is not None:
            num = self._engine.layout.num_parameters
            self._outbox = WeightOutbox(self._config.ema_decay, flat, num_averaged=num)

    def update(
        self,
        step: int,
        lr: float,
        after: bool | None,
        parts: Sequence[tuple[int, int]],
        *negatives: NegativeArrays,
    ) -> dict[str, float]:
        """Make one update with the next batch of data. Rank 0 queues the weights for `published`.

        Args:
            step: number of the update; seeds the noise of the objective.
            after: unused; its reference makes Ray wait for another call first.
            parts: (start, stop) that this rank consumes of each entry of `negatives`.
            negatives: negatives of leases, from the shards.

        Returns:
            Metrics averaged over ranks, and the number of bad samples that this rank skipped.

        Raises:
            NonFinite: on all ranks, with unchanged parameters.
        """
        batch = self._data.next_batch(self._batch_size)
        joined = _join(parts, negatives) if negatives else None
        metrics = self._engine.update(
            batch,
            joined,
            seed=derive_seed(self._seed, "update", self._rank, step),
            lr=lr,
        )
        if self._jarzynski and joined is not None and "flow/ess_ratio" not in metrics:
            metrics["flow/ess_ratio"] = float(ess_ratio(joined.log_weight))
        if self._data_config.on_bad_sample == "skip":
            before, self._num_skipped = self._num_skipped, self._data.num_skipped
            metrics["fault/skipped_samples"] = float(self._num_skipped - before)
        packed = self._engine.packed_weights()
        if self._outbox is not None and packed is not None:
            self._outbox.add(packed)
        return metrics

    def published(self, average: bool) -> tuple[bool, np.ndarray, np.ndarray | None]:
        """True, the flat weights of the oldest queued update, and the averaged weights or None.

        The first result is small and tells the driver that the others exist. Called on rank 0
        alone, once per update.

        Args:
            average: also return the averaged weights, which are as large and rarely read.
        """
        assert self._outbox is not None, "asked of another rank than the first"
        flat, mean = self._outbox.take(average)
        return True, as_sent(flat, self._config.wire), mean

    def weights(self) -> np.ndarray | None:
        """The current flat weights in the wire format; None on ranks other than 0. Collective."""
        flat = self._engine.flat_weights()
        return as_sent(flat, self._config.wire) if flat is not None else None

    def fetched(self, *negatives: NegativeArrays) -> None:
        """Do nothing. Ray runs this call once `negatives` are on this node."""

    def state(self) -> tuple[bool, RankState]:
        """True, and this rank's part of a checkpoint. Collective.

        The first result is small and tells the driver that the state has been copied.
        """
        learner = self._engine.state()
        return True, RankState(
            learner=_arrays(learner) if learner is not None else None,
            ema=_arrays(self._outbox.state()) if self._outbox is not None else None,
            data=self._data.state(),
        )

    def load(
        self,
        learner: Mapping[str, torch.Tensor | np.ndarray],
        ema: Mapping[str, torch.Tensor | np.ndarray] | None,
        data: Cursor | None,
        attempt: int = 0,
    ) -> None:
        """Load a checkpoint, or results of `state`, of any world size and ZeRO stage. Collective.

        Args:
            attempt: number of rollbacks; selects the noise and the order of the data.
        """
        seed = derive_seed(self._run_seed, "attempt", attempt) if attempt else self._run_seed
        if seed != self._seed:
            self._seed = seed
            self._data.close()
            self._num_skipped = 0
            self._data = DataStream(
                self._data_config, rank=self._rank, world_size=self._config.num_ranks, seed=seed
            )
        self._engine.load_state(_tensors(learner))
        flat = self._engine.flat_weights()
        if self._outbox is not None and flat is not None:
            self._outbox.begin(flat, _tensors(ema) if ema is not None else None)
        if data is not None:
            self._data.load_state(data)

    def close(self) -> None:
        self._engine.close()


def _arrays(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def _tensors(entries: Mapping[str, torch.Tensor | np.ndarray]) -> dict[str, torch.Tensor]:
    """Tensors of `entries`. Arrays are copied: those from Ray are read-only, and torch warns."""
    return {
        name: torch.from_numpy(np.array(value)) if isinstance(value, np.ndarray) else value
        for name, value in entries.items()
    }


def _join(parts: Sequence[tuple[int, int]], leases: Sequence[NegativeArrays]) -> Negatives:
    """Concatenate the (start, stop) slice of each lease."""

    def joined(arrays: Iterable[np.ndarray]) -> torch.Tensor:
        pieces = [array[start:stop] for (start, stop), array in zip(parts, arrays)]
        return torch.from_numpy(np.concatenate(pieces))

    return Negatives(
        x=joined(lease.x for lease in leases),
        energy=joined(lease.energy for lease in leases),
        version=joined(lease.version for lease in leases),
        log_weight=joined(lease.log_weight for lease in leases),
        context={
            name: joined(lease.context[name] for lease in leases) for name in leases[0].context
        },
    )
