"""Sorts the images of a folder into classes and training and test parts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ebm_dist.core.errors import UserError
from ebm_dist.data.sources import labels as labels_file

SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".webp", ".tif", ".tiff")
_TRAIN_NAMES = ("train", "training")
_TEST_NAMES = ("test", "val", "valid", "validation")
_NOT_DATA = ("__MACOSX", "@eaDir")
"""Folders of copies and thumbnails that macOS and Synology create."""

Labelled = tuple[Path, int | None]


@dataclass(frozen=True, slots=True)
class Scan:
    """Images with the index of their class, None without classes."""

    classes: tuple[str, ...]
    train: list[Labelled]
    test: list[Labelled]
    notes: tuple[str, ...]
    """Left-out files, and choices that the folder's structure left open; one line each."""


def scan(source: Path, labels: Path | None = None) -> Scan:
    """Sort SOURCE/CLASS/*.png, SOURCE/{train,test}/CLASS/…, or images without subfolders.

    Without a folder for the test part, every tenth image of each class, by name, is a test image.
    Hidden files and folders are ignored.

    Args:
        labels: a file of labels by name, which replaces the folders as classes.

    Raises:
        UserError: it is ambiguous whether an image has a class.
    """
    images, others = _walk(source, frozenset())
    images.sort()
    notes = _left_out(others)
    named: dict[Path, int] | None = None
    classes: list[str] = []
    if labels is not None:
        classes, named, notes = _named(source, images, labels, notes)
        images = list(named)

    def labelled(folder: Path, some: list[Path]) -> list[Labelled]:
        if named is not None:
            return [(path, named[path]) for path in some]
        return _labelled(folder, some, classes)

    train_folder, test_folder = _split_folders(source, images)
    if train_folder is None:
        classes = classes or _subfolders(source, images)
        train, test = _every_tenth(labelled(source, images))
    else:
        own = [path for path in images if train_folder in path.parents]
        held_out = [path for path in images if test_folder in path.parents]
        classes = classes or _subfolders(train_folder, own)
        train = labelled(train_folder, own)
        if test_folder is not None:
            test = labelled(test_folder, held_out)
        else:
            train, test = _every_tenth(train)
        notes += _beside(source, set(images) - set(own) - set(held_out), train_folder, test_folder)
    if len(classes) == 1:
        notes += (f"{classes[0]} is the only class, which tells nothing: written without labels",)
        classes = []
        train: list[Labelled] = [(path, None) for path, _ in train]
        test: list[Labelled] = [(path, None) for path, _ in test]
    return Scan(tuple(classes), train, test, notes)


def _named(
    source: Path, images: list[Path], labels: Path, notes: tuple[str, ...]
) -> tuple[list[str], dict[Path, int], tuple[str, ...]]:
    """Classes, images with their index, and notes, from a file of labels.

    The file names images by their path below `source`, with or without the suffix.
    """
    by_name = labels_file.by_name(labels)
    given: dict[Path, str] = {}
    for path in images:
        name = path.relative_to(source)
        for form in (name.as_posix(), name.with_suffix("").as_posix()):
            if form in by_name:
                given[path] = by_name[form]
                break
    if not given:
        first = f"; it names {next(iter(by_name))!r}, and there is {images[0]}" if images else ""
        raise UserError(
            f"{labels}: names no image of {source}{first}; name them by their path below --source"
        )
    if missing := [path for path in images if path not in given]:
        notes += (
            f"left out: {len(missing)} images that {labels} does not name; the first is "
            f"{missing[0]}",
        )
    if (num := len(by_name) - len(given)) > 0:
        notes += (f"{labels}: {num} of its names are no image of {source}",)
    index = labels_file.classes_of(given.values(), labels)
    return list(index), {path: index[label] for path, label in given.items()}, notes


def _walk(folder: Path, above: frozenset[Path]) -> tuple[list[Path], list[Path]]:
    """Images and other files below `folder`. Does not follow links to a folder above."""
    above |= {folder.resolve()}
    images, others = [], []
    for path in folder.iterdir():
        if path.name.startswith(".") or path.name in _NOT_DATA:
            continue
        if path.is_dir() and path.resolve() not in above:
            inner, rest = _walk(path, above)
            images += inner
            others += rest if inner or rest else [path]
        elif path.is_file() and path.suffix.lower() in SUFFIXES:
            images.append(path)
        else:
            others.append(path)
    return images, others


def _left_out(others: list[Path]) -> tuple[str, ...]:
    if not others:
        return ()
    kinds = Counter(map(_kind, others))
    listed = ", ".join(f"{num} of {kind}" for kind, num in kinds.most_common(10))
    return (f"left out: {listed}; the first is {min(others)}",)


def _kind(path: Path) -> str:
    """The kind of a file that is not an image."""
    if path.is_dir():
        # The files in a folder are listed one by one, so only an empty folder is listed itself.
        back = path.is_symlink() and path.parent.resolve().is_relative_to(path.resolve())
        return "link to a folder above it" if back else "empty folder"
    if path.is_file():
        return path.suffix.lower() or "no suffix"
    return "dead link" if path.is_symlink() else "FIFO, socket or device"


def _split_folders(source: Path, images: list[Path]) -> tuple[Path | None, Path | None]:
    names = {name.lower(): name for name in _subfolders(source, images)}
    train = [source / names[name] for name in _TRAIN_NAMES if name in names]
    test = [source / names[name] for name in _TEST_NAMES if name in names]
    if test and not train and len(test) == len(names):
        raise UserError(
            f"{source}: holds {test[0].name} but no train folder; name the folder of the training "
            f"images train, or take {test[0]} as --source"
        )
    # `train` beside other folders, without a test folder, is a class, such as a vehicle.
    if train and (test or len(names) == 1):
        return train[0], test[0] if test else None
    return None, None


def _subfolders(folder: Path, images: Iterable[Path]) -> list[str]:
    """The subfolders of `folder` that hold some of `images`."""
    parts = (path.relative_to(folder).parts for path in images)
    return sorted({own[0] for own in parts if len(own) > 1})


def _labelled(folder: Path, images: list[Path], classes: list[str]) -> list[Labelled]:
    if not classes:
        return [(path, None) for path in images]
    index = {name: k for k, name in enumerate(classes)}
    listed = ", ".join(classes[:3]) + (", …" if len(classes) > 3 else "")
    labelled = []
    for path in images:
        name, *below = path.relative_to(folder).parts
        if not below:
            raise UserError(
                f"{path}: lies beside the class folders {listed}; move it into one of them in "
                f"{folder}"
            )
        if name not in index:
            num = sum(folder / name in other.parents for other in images)
            raise UserError(
                f"{folder / name}: {num} images of a class that the training part lacks (it has "
                f"{listed}); sort them into its classes, add the class to it, or move the folder "
                "elsewhere"
            )
        labelled.append((path, index[name]))
    return labelled


def _every_tenth(files: list[Labelled]) -> tuple[list[Labelled], list[Labelled]]:
    train, test = [], []
    for label in dict.fromkeys(label for _, label in files):
        own = [file for file in files if file[1] == label]
        test += own[9::10]
        train += [file for index, file in enumerate(own) if index % 10 != 9]
    return train, test


def _beside(source: Path, images: set[Path], train: Path, test: Path | None) -> tuple[str, ...]:
    used = train.name if test is None else f"{train.name} and {test.name}"
    counts = Counter(path.relative_to(source).parts[0] for path in images)
    return tuple(
        f"left out: {num} images of {source / name}, which lies beside {used}"
        for name, num in sorted(counts.items())
    )
