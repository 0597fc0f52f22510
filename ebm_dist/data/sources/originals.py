"""Reads the originals of named data sets: digits, MNIST, CIFAR, image folders, arrays, toys."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ebm_dist.core.errors import UserError
from ebm_dist.core.section import nearest
from ebm_dist.core.seeds import derive_seed
from ebm_dist.core.types import EventSpec
from ebm_dist.data.format.decode import Layout
from ebm_dist.data.sources import arrays, cifar, image_folder, mnist
from ebm_dist.data.sources.original import Original, Samples, check_sides, of_arrays, scaled
from ebm_dist.data.sources.toys import TOYS, toy

NAMES = (
    "digits",
    "mnist",
    "fashion-mnist",
    "idx",
    "cifar10",
    "cifar100",
    "imagefolder",
    "arrays",
    "toy:NAME",
)
"""Names that `prepare` accepts."""

WITHOUT_ORIGINALS = {
    "cifar10": "cifar-10-python.tar.gz",
    "cifar100": "cifar-100-python.tar.gz",
    "mnist": "the directory of its IDX files",
    "idx": "the directory of IDX files",
    "imagefolder": "the directory of images",
    "arrays": "a file FILE.npz or FILE.npy",
}
"""Names that only `prepare` accepts, and the --source of each."""

_STATIC = {
    "digits": Layout(EventSpec((1, 8, 8), "image", 10), 17, labelled=True),
    "fashion-mnist": mnist.LAYOUT,
}


def static_layout(name: str) -> Layout | None:
    """The layout of a built-in source, without reading it; None for any other source."""
    if name.startswith("toy:"):
        spec = toy(name.removeprefix("toy:")).spec
        return Layout(spec, None, labelled=spec.num_classes is not None)
    return _STATIC.get(name)


def load_original(
    name: str,
    source: Path | None,
    *,
    labels: Path | None = None,
    crop: int | None = None,
    resize: int | None = None,
    toy_samples: int = 8192,
) -> Original:
    """Read the originals of `name`.

    Raises:
        UserError: the name is unknown, or the originals are missing or damaged.
    """
    if name.startswith("toy:") and name.removeprefix("toy:") not in TOYS:
        raise _unknown(name)
    if labels is not None and name not in ("imagefolder", "arrays"):
        raise UserError(f"--labels: is for imagefolder and arrays, not for {name}; leave it out")
    check_sides(crop=crop, resize=resize)
    if name == "imagefolder":
        return image_folder.load(source, labels=labels, crop=crop, resize=resize)
    original = _load(name, source, labels, toy_samples)
    if crop is None and resize is None:
        return original
    return scaled(original, crop=crop, resize=resize)


def _load(name: str, source: Path | None, labels: Path | None, toy_samples: int) -> Original:
    if name == "digits" or name.startswith("toy:"):
        if source is not None:
            raise UserError(f"--source: {name} needs no originals, got {source}; leave it out")
        if name == "digits":
            return _digits()
        return _toy(name.removeprefix("toy:"), toy_samples)
    if name == "mnist":
        return mnist.load(name, source)
    if name == "fashion-mnist":
        return mnist.load(name, source or mnist.DIRECTORY)
    if name == "idx":
        return mnist.load_any(source)
    if name in ("cifar10", "cifar100"):
        return cifar.load(cifar.CIFAR10 if name == "cifar10" else cifar.CIFAR100, source)
    if name == "arrays":
        return arrays.load(source, labels)
    raise _unknown(name)


def is_target(name: str) -> bool:
    """Whether `name` is the target of a user's own dataset."""
    return ":" in name and not name.startswith("toy:")


def _unknown(name: str) -> UserError:
    if name.endswith((".npz", ".npy")):
        return UserError(
            f"unknown data set {name!r}, which is a file; run `ebm-dist data prepare arrays OUT "
            f"--source {name}`"
        )
    if Path(name).expanduser().is_dir():
        return UserError(
            f"unknown data set {name!r}, which is a directory; of images, run `ebm-dist data "
            f"prepare imagefolder OUT --source {name}`"
        )
    known = [*NAMES[:-1], *(f"toy:{toy_name}" for toy_name in TOYS)]
    return UserError(
        f"unknown data set {name!r}{nearest(name, known)}; known: {', '.join(NAMES)}, where the "
        f"toys are {', '.join(sorted(TOYS))}, and MODULE:NAME for a dataset of your own"
    )


def _digits() -> Original:
    """scikit-learn's digits, 1,797 images of 8x8 with 17 grey levels.

    Every fifth image of each class is a test image. The file is sorted by writer, so both splits
    have all writers and all classes.
    """
    from sklearn.datasets import load_digits

    pixels, target = (np.asarray(part) for part in load_digits(return_X_y=True))
    x = np.rint(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
    test = np.zeros(len(x), dtype=bool)
    for digit in range(10):
        test[np.flatnonzero(target == digit)[4::5]] = True
    return Original(
        "digits",
        "scikit-learn's digits (UCI optical recognition of handwritten digits, test part)",
        _STATIC["digits"],
        tuple(str(digit) for digit in range(10)),
        {"train": of_arrays(x[~test], target[~test]), "test": of_arrays(x[test], target[test])},
    )


def _toy(name: str, num_train: int) -> Original:
    law = toy(name)

    def split(split_name: str, num: int) -> Samples:
        rng = np.random.default_rng(derive_seed(0, "data", "toy", name, split_name))
        x, label = law.draw(num, rng)
        return of_arrays(x.astype(np.uint8 if law.spec.discrete else np.float32), label)

    num_classes = law.spec.num_classes
    return Original(
        f"toy:{name}",
        law.law,
        Layout(law.spec, None, labelled=num_classes is not None),
        tuple(f"component {k}" for k in range(num_classes or 0)),
        {"train": split("train", num_train), "test": split("test", max(1, num_train // 4))},
        shard_size=max(2500, num_train),
    )
