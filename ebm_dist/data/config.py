"""The data section of a run: which samples, how they are read, and what is done to each batch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from ebm_dist.core.section import Section, UserPath


class DataConfig(Section):
    """Where the data comes from and how a stream of it is made."""

    source: UserPath | None = None
    """`digits`, `fashion-mnist`, `toy:NAME`, or prepared or plain webdataset shards: a directory,
    a file, or a brace pattern such as `path/{00..07}.tar`. `digits` if `shards` is left out too."""

    shards: UserPath | None = None
    """The same for shards alone; give `source` or `shards`, not both."""

    test_source: UserPath | None = None
    """Held-out shards, where the source has no test split of its own, as plain shards."""

    holdout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Part of the samples kept for the test split where the source has none of its own, chosen by
    a hash of the sample's key."""

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
    0 keeps the order of the shards."""

    rank_split: Literal["auto", "shard", "sample"] = "auto"
    """How ranks share an epoch. `shard`: each reads shards of its own. `sample`: every rank reads
    all shards and keeps every world_size-th sample, so that the ranks' batches together are
    the batch of one rank, bit for bit. `auto`: by shard where there are as many as ranks."""

    prefetch: NonNegativeInt = 4
    """Batches made ahead by a background thread, several at a time; 0 makes them when asked. The
    order is the same."""

    cache: Literal["auto", "always", "never"] = "auto"
    """Keep decoded samples in memory after they were read once. `auto`: up to `cache_mib`.
    The order is the same."""

    cache_mib: PositiveInt = 512
    """Memory for decoded samples of one rank, in MiB, under `cache: auto`."""

    cache_dir: UserPath | None = None
    """Where built-in sources keep their shards; `~/.cache/ebm_dist/data` when left out
    ($XDG_CACHE_HOME is honoured)."""

    verify: bool = True
    """Compare each shard with its SHA-256 in dataset.json when it is first opened."""

    kind: Literal["image", "real", "binary", "categorical"] | None = None
    """Kind of the events of plain shards; told from the first sample when left out."""

    num_classes: PositiveInt | None = None
    """Number of classes of labelled plain shards, which only all labels together would tell.
    Objectives and energies that read labels need it."""

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
        return self

    @property
    def location(self) -> str:
        """The source, or the shards, whichever was given."""
        return self.source or self.shards or "digits"
