"""How chains start, how far they may lag behind the learner, and what happens past that."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from ebm_dist.section import Section


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


class FlowConfig(Section):
    """The order in which sampling and learning take turns."""

    mode: Literal["sync", "async"] = "async"
    """sync: every update uses chains moved under its own weights, bit for bit the same however
    many workers there are. async: workers run ahead, within max_lag."""

    max_lag: PositiveInt = 8
    """Largest version(learner) - version(negatives) at consumption, in updates."""

    stale: Literal["repair", "reweight", "drop"] = "repair"
    """What happens to negatives past max_lag: a few more steps under today's weights, truncated
    self-normalised importance weights, or nothing but a count."""

    repair_steps: PositiveInt | None = None
    """MCMC steps of a repair; a quarter of sampler.num_steps when left out."""

    min_steps_per_update: PositiveFloat | None = None
    """The learner waits until the workers have taken this many MCMC steps (chains x steps) for each
    update, as flow/mcmc_steps_per_update counts them. What its negatives do not take goes to
    chains that stay in the buffer. Negatives of an update * sampler.num_steps when left out."""

    max_steps_per_update: PositiveFloat | None = None
    """Workers take no more MCMC steps than this for each update, on the average of the run. Where
    repairs and drops would, the learner waits for late rounds instead. No limit when left out."""

    stall_timeout_s: PositiveFloat = 300.0
    """Seconds without progress after which the run stops and names what it waited for."""

    @model_validator(mode="after")
    def _ordered(self) -> FlowConfig:
        low, high = self.min_steps_per_update, self.max_steps_per_update
        if low is not None and high is not None and low > high:
            raise ValueError(
                f"expected min_steps_per_update <= max_steps_per_update, got {low:g} > {high:g}"
            )
        return self


def first_identity(capacity: int, num_shards: int, index: int) -> int:
    """How many chains lie in the shards before `index`: its chains are numbered from there."""
    return index * (capacity // num_shards) + min(index, capacity % num_shards)


def shard_capacities(capacity: int, num_shards: int) -> list[int]:
    """`capacity` chains dealt out as evenly as whole numbers allow."""
    return [capacity // num_shards + (i < capacity % num_shards) for i in range(num_shards)]
