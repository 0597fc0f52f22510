"""The `buffer` section of the config: what chains carry, and how shards divide them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from ebm_dist.core.section import Section
from ebm_dist.core.types import CONTEXTS, ContextField, EventSpec, LevelNoise


class ContextConfig(Section):
    """What a chain carries beside its position, and where it comes from when the chain starts. It
    stays with the chain until the chain restarts."""

    label: Literal["data", "uniform"] | None = None
    """A class, for a class-conditional energy E(x, y). data: that of a datum, of the very one that
    the chain starts at under `init: data`; uniform: each class equally often."""

    level: Literal["stratified"] | None = None
    """A noise or temperature level: of energy.num_levels for an energy E(x, t), or of the objective
    where that adds noise to data. Each level has its equal share of the chains that start
    together."""

    clock: bool = False
    """The number of steps since the chain started."""

    condition: Literal["data", "noisy_pair"] | None = None
    """data: the given half of a datum, for a conditional energy E(y | x): y is sampled while x
    stays. noisy_pair: the chain's pair with the further noise that the objective adds at the
    chain's level; needs level and pair."""

    pair: Literal["data"] | None = None
    """The datum that the chain starts at, which objectives contrast the chain with. An objective
    that adds noise to data pairs the chain with the datum at the noise of the chain's level."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the contexts that chains have."""
        return tuple(name for name in CONTEXTS if getattr(self, name))

    @property
    def from_data(self) -> bool:
        """Whether a chain needs a datum when it starts."""
        return "data" in (self.label, self.condition, self.pair)


class BufferConfig(Section):
    """The persistent chains."""

    capacity: PositiveInt = 10_000
    """Number of chains, over all shards together."""

    num_shards: PositiveInt = 1
    """Number of shard actors; each holds capacity / num_shards chains."""

    num_negatives: PositiveInt | None = None
    """Negatives per update, a multiple of workers.num_chains; data.batch_size when left out. More
    negatives lower the variance of the negative term of the gradient."""

    init: Literal["noise", "gaussian", "data", "condition"] = "noise"
    """Where a chain starts: the reference noise of the event (uniform on [-1, 1] for images,
    Gaussian for real vectors, fair coins for binary ones), Gaussian noise for images too, a data
    point (with the noise of its context.level), or its own context.condition, a noisy_pair. With
    reinit_prob 1 `noise` is short-run sampling and `data` is contrastive divergence."""

    reinit_prob: Annotated[float, Field(ge=0.0, le=1.0)] = 0.05
    """Probability that a chain restarts from `init` at a checkout; 0 never restarts (PCD)."""

    init_std: PositiveFloat = 1.0
    """Standard deviation of Gaussian starting noise, in data units."""

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

    context: ContextConfig = ContextConfig()
    """What chains carry beside their positions: labels, levels, conditions."""

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

    @property
    def starts_from_data(self) -> bool:
        """Whether a chain needs a datum when it starts."""
        return self.init == "data" or self.context.from_data


def context_fields(
    config: ContextConfig,
    spec: EventSpec,
    noise_stds: tuple[float, ...] | None = None,
    pair_noise: tuple[LevelNoise, LevelNoise] | None = None,
) -> tuple[ContextField, ...]:
    """The contexts of a run's chains.

    Args:
        noise_stds: the noise of each level of the energy; None for an energy without.
        pair_noise: makes the pair of a datum, and the noisy pair of the pair; None where there are
            no noisy pairs.

    Raises:
        ValueError: data or energy cannot give one; the message names its key.
    """
    fields: list[ContextField] = []
    if config.label is not None:
        if spec.num_classes is None:
            raise ValueError(
                "buffer.context.label: the data names no classes; set data.num_classes if it has "
                "labels, choose labelled data, or leave the key out"
            )
        fields.append(ContextField("label", size=spec.num_classes))
    if config.level is not None:
        if not noise_stds:
            raise ValueError(
                "buffer.context.level: the energy has no levels; set energy.num_levels, or leave "
                "the key out"
            )
        num = len(noise_stds)
        noise = LevelNoise((1.0,) * num, noise_stds) if pair_noise is None else None
        fields.append(ContextField("level", size=num, noise=noise))
    if config.clock:
        fields.append(ContextField("clock"))
    of_pair, of_noisy_pair = pair_noise or (None, None)
    if config.condition == "noisy_pair":
        fields.append(ContextField("condition", spec.shape, "float32", noise=of_noisy_pair))
    elif config.condition is not None:
        if spec.condition_shape is None:
            raise ValueError(
                "buffer.context.condition: the data has no conditions; set data.condition_size, or "
                "leave the key out"
            )
        fields.append(ContextField("condition", spec.condition_shape, "float32"))
    if config.pair is not None:
        fields.append(ContextField("pair", spec.shape, "float32", noise=of_pair))
    return tuple(fields)


def first_identity(capacity: int, num_shards: int, index: int) -> int:
    """The identity of the first chain of shard `index`: the number of chains in earlier shards."""
    return index * (capacity // num_shards) + min(index, capacity % num_shards)


def shard_capacities(capacity: int, num_shards: int) -> list[int]:
    """The capacity of each shard; they differ by one chain at most."""
    return [capacity // num_shards + (i < capacity % num_shards) for i in range(num_shards)]
