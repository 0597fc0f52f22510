"""How chains start, how far they may lag behind the learner, and what happens past that."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from ebm_dist.core.section import Section


class BufferConfig(Section):
    """The persistent chains."""

    capacity: PositiveInt = 10_000
    """Chains over all shards."""

    num_shards: PositiveInt = 1
    """Shard actors; each holds capacity / num_shards chains."""

    num_negatives: PositiveInt | None = None
    """Negatives of an update, a multiple of workers.num_chains; data.batch_size when left out. More
    of them than data make the negative phase as quiet as chains are many."""

    init: Literal["noise", "data"] = "noise"
    """Where a chain starts: the reference noise of the event (uniform on [-1, 1] for images,
    Gaussian for real vectors, fair coins for binary ones), or a data point. With
    reinit_prob 1 `noise` is short-run sampling and `data` is contrastive divergence."""

    reinit_prob: Annotated[float, Field(ge=0.0, le=1.0)] = 0.05
    """Probability that a chain starts afresh when it is checked out; 0 never restarts (PCD)."""

    init_std: PositiveFloat = 1.0
    """Standard deviation of the starting noise of `real` events, in data units."""

    data_noise_std: NonNegativeFloat = 0.0
    """Gaussian noise added to a chain that starts from data, in data units."""

    storage: Literal["float32", "bfloat16", "uint8"] = "float32"
    """What the numbers of a stored chain are kept as: bfloat16 halves the memory, uint8 quarters
    it. For images within [-1, 1] (uint8: sampler.clamp keeps them there) and discrete events,
    which lose nothing. Chains move in float32 and are rounded once a round, at random so that the
    mean is kept. Rounding to the nearest would undo moves smaller than half a quantum (uint8:
    .004); what random rounding leaves is noise of variance q^2/6, q = 2/255: nothing beside a
    round of 40 steps of noise_std .01, but .4 of one step of noise_std .005. Count it as
    temperature."""

    jarzynski: bool = False
    """Chains carry Jarzynski log-weights (Carbone et al. 2023), which keep the negative phase exact
    while the weights move, and log Z is estimated all along. For init: noise, reinit_prob 0, and
    a sampler whose moves have a density: an exact one, or langevin unclipped. log Z is as good as
    the updates are small (learner.grad_clip holds the first ones) and the chains many and
    forgetful: its error grows with learner.lr / capacity and falls with sampler.num_steps."""

    resample_threshold: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    """The weighted chains of a lease are resampled before they move where their effective share is
    below this."""

    lease_timeout_s: PositiveFloat = 120.0
    """Seconds after which a lease that nobody works on any more gives its chains back. A worker
    that is at one round for twice as long is taken for hung, and replaced."""


def first_identity(capacity: int, num_shards: int, index: int) -> int:
    """How many chains lie in the shards before `index`: its chains are numbered from there."""
    return index * (capacity // num_shards) + min(index, capacity % num_shards)


def shard_capacities(capacity: int, num_shards: int) -> list[int]:
    """`capacity` chains dealt out as evenly as whole numbers allow."""
    return [capacity // num_shards + (i < capacity % num_shards) for i in range(num_shards)]
