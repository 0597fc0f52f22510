"""A data set before it is written as shards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from ebm_dist.core.errors import UserError
from ebm_dist.data.format.decode import Layout
from ebm_dist.data.format.manifest import SplitName
from ebm_dist.data.format.picture import MAX_PIXELS, cut
from ebm_dist.data.storage.indexed import Indexed


@dataclass(frozen=True, slots=True)
class Samples:
    """One split, read sample by sample, so that a folder of photographs need not fit in memory."""

    num: int
    get: Callable[[int], tuple[np.ndarray, int | None]]


@dataclass(frozen=True, slots=True)
class Original:
    """A data set: its splits, their layout and their classes."""

    name: str
    law: str
    """The origin of the samples, for dataset.json."""
    layout: Layout
    classes: tuple[str, ...]
    splits: dict[SplitName, Samples]
    shard_size: int = 2500
    """Samples per shard. Fashion-MNIST has 24 shards, so up to 24 ranks can split it by shard."""
    notes: tuple[str, ...] = ()
    """Left-out content, one line each."""


def of_arrays(x: np.ndarray, label: np.ndarray | None) -> Samples:
    if label is None:
        return Samples(len(x), lambda i: (x[i], None))
    return Samples(len(x), lambda i: (x[i], int(label[i])))


def of_storage(
    storage: Indexed,
    name: str,
    law: str,
    *,
    classes: tuple[str, ...] = (),
    notes: tuple[str, ...] = (),
) -> Original:
    """The data set in an indexed storage."""

    def samples(split: SplitName) -> Samples:
        def get(index: int) -> tuple[np.ndarray, int | None]:
            x, label = storage.take(split, np.array([index]))
            return x[0], None if label is None else int(label[0])

        return Samples(storage.num_samples(split), get)

    splits: tuple[SplitName, ...] = ("train", "test")
    numbers = tuple(map(str, range(storage.layout.spec.num_classes or 0)))
    return Original(
        name,
        law,
        storage.layout,
        classes or storage.classes or numbers,
        {split: samples(split) for split in splits if storage.has(split)},
        notes=notes,
    )


def check_sides(*, crop: int | None, resize: int | None) -> None:
    """Refuse sides of images that are out of range."""
    for option, side in (("--crop", crop), ("--resize", resize)):
        if side is not None and not 1 <= side <= MAX_PIXELS**0.5:
            raise UserError(f"{option}: expected 1 to {MAX_PIXELS**0.5:.0f} pixels, got {side}")


def scaled(original: Original, *, crop: int | None, resize: int | None) -> Original:
    """`original` with its 8-bit images cropped and scaled; see `picture.cut`."""
    layout, spec = original.layout, original.layout.spec
    if layout.levels is None:
        raise UserError(
            f"--crop, --resize: are for 8-bit images, but {original.name} holds {spec.kind} events "
            f"of shape {spec.shape}; leave them out"
        )

    def of(samples: Samples) -> Samples:
        def get(index: int) -> tuple[np.ndarray, int | None]:
            x, label = samples.get(index)
            pixels = x[0] if len(x) == 1 else np.ascontiguousarray(x.transpose(1, 2, 0))
            image = cut(Image.fromarray(pixels), original.name, crop=crop, resize=resize)
            return channels_first(image), label

        return Samples(samples.num, get)

    splits = {name: of(samples) for name, samples in original.splits.items()}
    shape = splits["train"].get(0)[0].shape
    # Scaling interpolates between grey levels, so all 256 may occur.
    layout = replace(layout, spec=replace(spec, shape=shape), levels=256)
    return replace(original, layout=layout, splits=splits)


def channels_first(image: Image.Image) -> np.ndarray:
    """The pixels (C, H, W), uint8."""
    x = np.asarray(image)
    return x[None] if x.ndim == 2 else np.ascontiguousarray(x.transpose(2, 0, 1))
