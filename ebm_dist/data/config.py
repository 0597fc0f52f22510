"""The data section of a run: which samples, how they are read, and what is done to each batch."""

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


# A `before` validator of the model makes pydantic forget that a list came from JSON.
Paths = Annotated[tuple[UserPath, ...], Field(min_length=1), BeforeValidator(_as_tuple)]


class DataConfig(Section):
    """Where the data comes from and how a stream of it is made."""

    source: UserPath | None = None
    """`digits`, `fashion-mnist`, `toy:NAME`, or prepared or plain webdataset shards: a directory,
    a file, a brace pattern such as `path/{00..07}.tar`, or a glob such as `path/*.tar`, which of a
    prepared directory takes the training part. `digits` if `shards` is left out too. `module` for
    a dataset of your own, which `target` names; `given` where one was handed over in Python."""

    target: Target | None = None
    """With `source: module`, a dataset of your own: `my_pkg.data:dataset`, the class, a function
    that returns one, or one that the module holds. It has `__len__` and `__getitem__`, which
    returns an event or (event, label) and should return the same at every call. An event is a PIL
    image, an array or a tensor. Images and uint8 arrays of 2 or 3 dimensions are of kind `image`
    and scaled from 0..255 to [-1, 1]; bools are `binary`; other numbers are `real` and taken as
    they are, also with `kind: image`, where they must lie in [-1, 1]. Every process that reads
    data makes the dataset for itself."""

    params: dict[str, JsonValue] = Field(default_factory=dict)
    """Keyword arguments for `target`. Paths should be absolute: parts of a run work elsewhere."""

    test_params: dict[str, JsonValue] | None = None
    """Keyword arguments with which `target` makes the test split, such as `{train: false}`."""

    fingerprint: str | None = None
    """Number of samples and a hash of some, for `source: module` and `given`. Filled in when a run
    starts, so that it goes on with the same data; where given, other data is refused."""

    _given: Any = PrivateAttr(default=None)
    """Of `source: given`: the train and test `Items`."""

    shards: UserPath | Paths | None = None
    """The same for shards alone, or a list of several; give `source` or `shards`, not both."""

    test_source: UserPath | None = None
    """Held-out shards, where the source has no test split of its own, as plain shards."""

    holdout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Part of the samples kept for the test split where the source has none of its own, chosen by
    a hash of the sample's key, or of its index in a dataset of your own."""

    batch_size: PositiveInt = 128
    """Samples of one update, over all learner ranks together."""

    flip: bool = False
    """Mirror each image left to right with probability 1/2."""

    crop_padding: NonNegativeInt = 0
    """Pad images by so many pixels by reflection, then crop a random window of the old size."""

    dequantize: bool = False
    """Uniform dequantisation: level k of L becomes 2 (k + u) / L - 1, u ~ U[0, 1)."""

    noise_std: NonNegativeFloat = 0.0
    """Standard deviation of Gaussian noise added to the data, in units of the scaled data
    (images lie in [-1, 1]). JEM uses 0.03. The sum is not clamped."""

    binarize: Literal["none", "threshold", "bernoulli"] = "none"
    """Make images binary: at mid-grey, or as coins whose probability is the intensity, tossed anew
    in every batch (Salakhutdinov & Murray 2008); a split loaded whole is tossed once."""

    flatten: bool = False
    """Hand out vectors (prod(shape),). An image then counts as `real`."""

    shuffle: NonNegativeInt = 5000
    """Samples in the shuffle buffer. It holds them encoded: 5000 photographs of 100 kB are 0.5 GB.
    0 keeps the order of the shards. A dataset of your own needs no buffer: an epoch is a
    permutation of all of it, or its own order where this is 0."""

    rank_split: Literal["auto", "shard", "sample"] = "auto"
    """How ranks share an epoch. `shard`: each reads shards of its own. `sample`: every rank reads
    all shards and keeps every world_size-th sample, so that the ranks' batches together are
    the batch of one rank, bit for bit. `auto`: by shard where there are as many as ranks."""

    prefetch: NonNegativeInt = 4
    """Batches made ahead by a background thread, several at a time; 0 makes them when asked. The
    order is the same."""

    cache: Literal["auto", "always", "never"] = "auto"
    """Keep decoded samples of shards in memory after they were read once. `auto`: up to
    `cache_mib`. The order is the same."""

    cache_mib: PositiveInt = 512
    """Memory for decoded samples of one rank, in MiB, under `cache: auto`."""

    cache_dir: UserPath | None = None
    """Where built-in sources keep their shards; `~/.cache/ebm_dist/data` when left out
    ($XDG_CACHE_HOME is honoured)."""

    verify: bool = True
    """Compare each shard with its SHA-256 in dataset.json when it is first opened."""

    on_bad_sample: Literal["stop", "skip"] = "stop"
    """What to do about a sample of a shard that cannot be read or has another shape than the first.
    `stop` ends the run with one line. `skip` leaves it out: `run.log` names the first few, and the
    metric `fault/skipped_samples` counts all. A shard that is missing or cut ends the run in either
    case. Where samples are left out, the ranks' batches are no longer the batch of one rank."""

    kind: Literal["image", "real", "binary", "categorical"] | None = None
    """Kind of the events of plain shards or your own dataset; told from the first sample when left
    out."""

    num_classes: PositiveInt | None = None
    """Number of classes of labelled plain shards or your own dataset, which only all labels
    together would tell (`dataset.classes` is asked first). Objectives and energies that read
    labels need it."""

    member: str | None = None
    """Extension of the member that holds x, where a sample has several: `jpg`, `image.png`, …"""

    toy_samples: PositiveInt = Field(default=8192, le=2**24)
    """Training samples of a `toy:` source; a quarter as many again are its test split."""

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
        """Whether samples come from a dataset of the user's, not from shards."""
        return self.source in ("module", "given")

    @property
    def num_given_bytes(self) -> int:
        """Bytes of the arrays given from Python, which every process that reads data is sent."""
        return sum(items.num_bytes for items in self._given or () if items is not None)

    @property
    def how_to_hold_out(self) -> str:
        """What names a test split beside `holdout`, for messages."""
        if self.source == "given":
            return 'one in data={"train": ..., "test": ...}'
        if self.source == "module":
            return "in data.test_params what makes data.target return another part"
        return "held-out shards in data.test_source"

    @property
    def location(self) -> str:
        """The source, the shards or the dataset, whichever was given."""
        if self.is_own_dataset and self.target is not None:
            return self.target
        first, *others = self.patterns
        return f"{first} and {len(others)} more" if others else first

    @property
    def patterns(self) -> tuple[str, ...]:
        """What names shards, or a built-in source."""
        if isinstance(self.shards, tuple):
            return self.shards
        return (self.source or self.shards or "digits",)
