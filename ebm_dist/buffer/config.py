"""The `buffer` section of the config, and how its chains are divided among the shards."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from ebm_dist.core.section import Section


class BufferConfig(Section):
    """The persistent chains."""

    capacity: PositiveInt = 10_000
    """Number of chains, over all shards together."""

    num_shards: PositiveInt = 1
    """Number of shard actors; each holds capacity / num_shards chains."""

    num_negatives: PositiveInt | None = None
    """Negatives per update, a multiple of workers.num_chains; data.batch_size when left out. More
    negatives lower the variance of the negative term of the gradient."""

    init: Literal["noise", "data"] = "noise"
    """Where a chain starts: the reference noise of the event (uniform on [-1, 1] for images,
    Gaussian for real vectors, fair coins for binary ones), or a data point. With
    reinit_prob 1 `noise` is short-run sampling and `data` is contrastive divergence."""

    reinit_prob: Annotated[float, Field(ge=0.0, le=1.0)] = 0.05
    """Probability that a chain restarts from `init` at a checkout; 0 never restarts (PCD)."""

    init_std: PositiveFloat = 1.0
    """Standard deviation of the starting noise of `real` events, in data units."""

    data_noise_std: NonNegativeFloat = 0.0
    """Gaussian noise added to a chain that starts from data, in data units."""

    storage: Literal["float32", "bfloat16", "uint8"] = "float32"
    """Number format of stored chains: bfloat16 halves the memory, uint8 quarters it. Only for
    images within [-1, 1] (for uint8, sampler.clamp keeps them there) and for discrete events, which
    lose nothing. Chains move in float32; the end of each round is rounded stochastically, which
    keeps the mean, whereas rounding to nearest would undo moves below half a quantum (uint8: .004).
    Stochastic rounding adds noise of variance q^2/6 per round, q = 2/255 for uint8: negligible
    beside 40 steps of noise_std .01, but .4 of the variance of one step of noise_std .005. Count
    it as temperature."""

    jarzynski: bool = False
    """Chains carry Jarzynski log-weights (Carbone et al. 2023). They keep the negative phase exact
    while the energy changes, and give an estimate of log Z at every update. Requires init: noise,
    reinit_prob: 0 and a sampler whose moves have a density: an exact one, or langevin unclipped.
    The error of log Z grows with learner.lr / capacity and falls with sampler.num_steps; set
    learner.grad_clip, since the first updates are the largest."""

    resample_threshold: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    """The weighted chains of a lease are resampled before they move if their effective sample
    size, as a fraction of their number, is below this."""

    lease_timeout_s: PositiveFloat = 120.0
    """Seconds after which a lease without a running round expires and its chains are free again,
    as they were before it. A worker whose round takes twice as long counts as hung and is
    replaced."""


def first_identity(capacity: int, num_shards: int, index: int) -> int:
    """The identity of the first chain of shard `index`: the number of chains in earlier shards."""
    return index * (capacity // num_shards) + min(index, capacity % num_shards)


def shard_capacities(capacity: int, num_shards: int) -> list[int]:
    """The capacity of each shard; they differ by one chain at most."""
    return [capacity // num_shards + (i < capacity % num_shards) for i in range(num_shards)]
