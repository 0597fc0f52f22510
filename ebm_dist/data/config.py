"""The `data` section of the config: the source of samples, how they are read and transformed."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    JsonValue,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    PrivateAttr,
    model_validator,
)

from ebm_dist.core.plugins import Target
from ebm_dist.core.section import Section, UserPath


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


# With a `before` validator of the model, pydantic no longer converts a JSON list to a tuple.
Paths = Annotated[tuple[UserPath, ...], Field(min_length=1), BeforeValidator(_as_tuple)]


class DataConfig(Section):
    """The source of the data, and how samples are read and transformed."""

    source: UserPath | None = None
    """`digits`, `fashion-mnist`, `toy:NAME`, or prepared or plain webdataset shards: a directory,
    a file, a brace pattern such as `path/{00..07}.tar`, or a glob such as `path/*.tar`, which in a
    prepared directory matches the training shards. `digits` if `shards` is left out too. `module`
    for a dataset of your own, which `target` names; `given` for one given from Python."""

    target: Target | None = None
    """With `source: module`, a dataset of your own: `my_pkg.data:dataset`, the class, a function
    that returns one, or one that the module holds. It has `__len__` and `__getitem__`, which
    returns an event or (event, label) and should return the same at every call. An event is a PIL
    image, an array or a tensor. Images and uint8 arrays of 2 or 3 dimensions are of kind `image`
    and scaled from 0..255 to [-1, 1]; bools are `binary`; other numbers are `real` and unchanged,
    also with `kind: image`, which requires [-1, 1]. Every process that reads data constructs the
    dataset itself."""

    params: dict[str, JsonValue] = Field(default_factory=dict)
    """Keyword arguments for `target`. Use absolute paths: parts of a run have other working
    directories."""

    test_params: dict[str, JsonValue] | None = None
    """Keyword arguments of `target` for the test split, such as `{train: false}`."""

    fingerprint: str | None = None
    """Number of samples and a hash of some, for `source: module` and `given`. A run fills it in at
    its start, so that a resume with other data is refused."""

    _given: Any = PrivateAttr(default=None)
    """The train and test `Items` of `source: given`."""

    shards: UserPath | Paths | None = None
    """The same for shards alone, or a list of several; give `source` or `shards`, not both."""

    test_source: UserPath | None = None
    """Held-out shards, for a source without a test split, such as plain shards."""

    holdout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Fraction of the samples in the test split, for a source without one. A hash of the sample's
    key, or of its index in a dataset of your own, chooses them."""

    batch_size: PositiveInt = 128
    """Samples per update, over all learner ranks together."""

    flip: bool = False
    """Mirror each image left to right with probability 1/2."""

    crop_padding: NonNegativeInt = 0
    """Pad images by this number of pixels by reflection, then crop a random window of the old
    size."""

    dequantize: bool = False
    """Uniform dequantisation: level k of L becomes 2 (k + u) / L - 1, u ~ U[0, 1)."""

    noise_std: NonNegativeFloat = 0.0
    """Standard deviation of Gaussian noise added to the data, in units of the scaled data
    (images lie in [-1, 1]). JEM uses 0.03. The sum is not clamped."""

    binarize: Literal["none", "threshold", "bernoulli"] = "none"
    """Make images binary: by a threshold at mid-grey, or as Bernoulli variables with the intensity
    as probability, drawn anew in every batch (Salakhutdinov & Murray 2008) and once for a split
    that is loaded whole."""

    flatten: bool = False
    """Flatten events to vectors (prod(shape),). An image then counts as `real`."""

    condition_size: PositiveInt | None = None
    """Number of entries of the last axis that are given, for a conditional energy E(y | x): the
    leftmost columns of an image, the first numbers of a vector. They are the event's condition,
    and the rest of the axis is the event, after all of the above."""

    shuffle: NonNegativeInt = 5000
    """Samples in the shuffle buffer, which holds them encoded: 5000 photographs of 100 kB take
    0.5 GB. 0 keeps the order of the shards. A dataset of your own needs no buffer: an epoch is a
    permutation of all samples, or their own order if this is 0."""

    rank_split: Literal["auto", "shard", "sample"] = "auto"
    """How ranks share an epoch. `shard`: each reads other shards. `sample`: every rank reads all
    shards and keeps every world_size-th sample, so that the ranks' batches together are the batch
    of one rank, bit for bit. `auto`: by shard if there are at least as many shards as ranks."""

    prefetch: NonNegativeInt = 4
    """Batches that a background thread reads ahead; 0 reads each when it is needed. The order does
    not change."""

    cache: Literal["auto", "always", "never"] = "auto"
    """Keep decoded samples of shards in memory after the first reading. `auto`: up to `cache_mib`.
    The order is the same."""

    cache_mib: PositiveInt = 512
    """Memory for decoded samples of one rank, in MiB, with `cache: auto`."""

    cache_dir: UserPath | None = None
    """Directory for the shards of built-in sources; `~/.cache/ebm_dist/data` when left out
    ($XDG_CACHE_HOME replaces `~/.cache`)."""

    verify: bool = True
    """Compare each shard with its SHA-256 in dataset.json when it is opened first."""

    on_bad_sample: Literal["stop", "skip"] = "stop"
    """What to do about a sample of a shard that cannot be read or has another shape than the first.
    `stop` ends the run with one line. `skip` leaves it out: `run.log` names the first few, and the
    metric `fault/skipped_samples` counts all. A missing or truncated shard always ends the run.
    With samples left out, the ranks' batches together are no longer the batch of one rank."""

    kind: Literal["image", "real", "binary", "categorical"] | None = None
    """Kind of the events of plain shards or your own dataset; by default that of the first
    sample."""

    num_classes: PositiveInt | None = None
    """Number of classes of labelled plain shards or your own dataset, since it is unknown without
    reading all labels; a dataset's own `classes` is used when this is left out. Objectives and
    energies that read labels need it."""

    member: str | None = None
    """Extension of the member with x, for samples with several members: `jpg`, `image.png`, …"""

    toy_samples: PositiveInt = Field(default=8192, le=2**24)
    """Training samples of a `toy:` source; its test split has a quarter of that."""

    @model_validator(mode="before")
    @classmethod
    def _default_source(cls, values: Any) -> Any:
        if (
            isinstance(values, dict)
            and values.get("source") is None
            and values.get("shards") is None
        ):
            return {**values, "source": "digits"}
        return values

    @model_validator(mode="after")
    def _fits_together(self) -> DataConfig:
        if self.source is not None and self.shards is not None:
            raise ValueError(
                f"source is {self.source!r} and shards is {self.shards!r}; give one of the two"
            )
        if self.binarize != "none" and (self.dequantize or self.noise_std > 0):
            raise ValueError(
                f"binarize: {self.binarize} makes events of 0 and 1, which dequantize and "
                "noise_std would take away; set dequantize: false and noise_std: 0"
            )
        if self.test_source is not None and self.holdout > 0:
            raise ValueError("test_source and holdout both name a test split; give one of the two")
        if self.is_own_dataset:
            self._check_own_dataset()
        elif self.params or (self.target, self.test_params, self.fingerprint) != (None,) * 3:
            raise ValueError(
                "target, params, test_params and fingerprint are for source: module, but source "
                f"is {self.location!r}; set source: module or leave them out"
            )
        return self

    def _check_own_dataset(self) -> None:
        if self.target is None:
            raise ValueError(
                f"source is {self.source} and names no dataset; set target to MODULE:NAME, such as "
                "my_pkg.data:dataset"
            )
        for key, value, instead in (
            ("test_source", self.test_source, "test_params"),
            ("member", self.member, "a dataset that returns that part"),
            ("rank_split", self.rank_split if self.rank_split == "shard" else None, "sample"),
            ("on_bad_sample", None if self.on_bad_sample == "stop" else "skip", "one without them"),
            ("cache", self.cache if self.cache == "always" else None, "a dataset that keeps them"),
        ):
            if value is not None:
                raise ValueError(f"{key}: {value} is for shards; use {instead}")
        if self.test_params is not None and self.holdout > 0:
            raise ValueError("test_params and holdout both name a test split; give one of the two")

    @property
    def is_own_dataset(self) -> bool:
        """Whether samples come from a user's own dataset, not from shards."""
        return self.source in ("module", "given")

    @property
    def num_given_bytes(self) -> int:
        """Bytes of the arrays given from Python; every process that reads data gets a copy."""
        return sum(items.num_bytes for items in self._given or () if items is not None)

    @property
    def how_to_hold_out(self) -> str:
        """The other way to name a test split, for messages."""
        if self.source == "given":
            return 'one in data={"train": ..., "test": ...}'
        if self.source == "module":
            return "in data.test_params what makes data.target return another part"
        return "held-out shards in data.test_source"

    @property
    def location(self) -> str:
        """The source, the shards or the dataset that the section names."""
        if self.is_own_dataset and self.target is not None:
            return self.target
        first, *others = self.patterns
        return f"{first} and {len(others)} more" if others else first

    @property
    def patterns(self) -> tuple[str, ...]:
        """Paths and patterns of shards, or the name of a built-in source."""
        if isinstance(self.shards, tuple):
            return self.shards
        return (self.source or self.shards or "digits",)
