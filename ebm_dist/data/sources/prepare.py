"""Writes a data set as webdataset shards; after a failure no files remain."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from ebm_dist.core.errors import RunFailed, UserError
from ebm_dist.core.paths import user_path
from ebm_dist.core.seeds import derive_seed
from ebm_dist.data.config import DataConfig
from ebm_dist.data.format.manifest import (
    FILE_NAME,
    EventEntry,
    Manifest,
    ShardEntry,
    SplitName,
    read_manifest,
)
from ebm_dist.data.sources.module import open_module
from ebm_dist.data.sources.original import Original, Samples, of_storage
from ebm_dist.data.sources.originals import is_target, load_original
from ebm_dist.files.durable import new_directory
from ebm_dist.files.private import scratch
from ebm_dist.files.safe_open import sha256

_MAX_LISTED = 100
"""Largest number of classes whose counts are listed."""


def prepare(
    name: str | DataConfig,
    out_dir: str | os.PathLike[str],
    source: str | os.PathLike[str] | None = None,
    *,
    labels: str | os.PathLike[str] | None = None,
    crop: int | None = None,
    resize: int | None = None,
    shard_size: int | None = None,
    toy_samples: int = 8192,
    say: Callable[[str], None] = lambda line: None,
) -> Manifest:
    """Write `name` as shards and dataset.json in `out_dir`, which appears once it is complete.

    Args:
        name: digits, mnist, fashion-mnist, idx, cifar10, cifar100, imagefolder, arrays, toy:NAME,
            or a dataset of your own: MODULE:NAME, or the data section of a run that has one.
        out_dir: the directory to create; if it exists, it must be empty. Not inside `source`.
        source: the path of the originals, for names that have originals.
        labels: a file of labels for imagefolder (by name) or arrays (in order).
        crop: side in pixels of the central square to cut out of each image.
        resize: side to which images are scaled; without `crop`, their largest square is cut first.
        shard_size: samples per shard.
        toy_samples: training samples of a toy.
        say: receives lines on left-out content and on the number of samples of each class.

    Raises:
        UserError: the originals or the directory cannot be used.
    """
    try:
        out = Path(user_path(out_dir))
        originals = Path(user_path(source)) if source is not None else None
        labels_path = Path(user_path(labels)) if labels is not None else None
    except ValueError as error:
        raise UserError(str(error)) from None
    _refuse_occupied(out)
    if shard_size is not None and shard_size < 1:
        raise UserError(f"shard_size: must be at least 1 sample, got {shard_size}")
    if name == "imagefolder" and originals and out.resolve().is_relative_to(originals.resolve()):
        raise UserError(
            f"{out}: lies in {originals}, where the shards would stand among the originals; name a "
            "directory beside it"
        )
    if isinstance(name, str) and is_target(name):
        name = DataConfig(source="module", target=name)
    if isinstance(name, DataConfig):
        if any(given is not None for given in (originals, labels, crop, resize)):
            raise UserError(
                "--source, --labels, --crop, --resize: are for names of originals, not for "
                f"{name.location}; leave them out"
            )
        original = _of_module(name)
    else:
        original = load_original(
            name,
            originals,
            labels=labels_path,
            crop=crop,
            resize=resize,
            toy_samples=toy_samples,
        )
    for note in original.notes:
        say(note)
    manifest = None
    try:
        with new_directory(out, replace=False) as part:
            manifest = _write(original, part, shard_size or original.shard_size, say)
    except OSError as error:
        if manifest is not None and (out / FILE_NAME).is_file():
            raise UserError(f"{out}: another process wrote it meanwhile; use it as it is") from None
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise UserError(
                f"{out}: cannot be written ({error.strerror or error}); choose another directory"
            ) from None
        raise RunFailed(
            f"{out}: writing failed ({error.strerror}); nothing was left there"
        ) from None
    return manifest


def _of_module(config: DataConfig) -> Original:
    if not config.is_own_dataset:
        raise UserError(
            f"data.source: expected module or given, got {config.location!r}; prepare another "
            "source by its name alone"
        )
    storage = open_module(config)
    num_classes = storage.layout.spec.num_classes
    if storage.layout.labelled and num_classes is None:
        raise UserError(
            f"data.num_classes: {config.location} has labels, but no `classes` that says how many "
            "there are; set data.num_classes"
        )

    return of_storage(storage, config.location, f"the samples of {config.location}")


def materialise(name: str, cache_dir: str | None, *, toy_samples: int) -> Path:
    """The directory of a built-in source's shards, which the first use creates.

    Processes that start together each write a copy, and the first complete one is kept.
    """
    key = name.replace(":", "-")
    if name.startswith("toy:"):
        key += f"-{toy_samples}"
    out = _cache_root(cache_dir) / f"{key}-v1"
    if not (out / FILE_NAME).is_file():
        try:
            prepare(name, out, toy_samples=toy_samples)
        except (UserError, RunFailed):
            # Another process may have finished between the check and the rename.
            if not (out / FILE_NAME).is_file():
                raise
    return out


def _cache_root(cache_dir: str | None) -> Path:
    if cache_dir is not None:
        return Path(cache_dir)
    base = os.environ.get("XDG_CACHE_HOME")
    root = (Path(base) if base else Path.home() / ".cache") / "ebm_dist" / "data"
    with contextlib.suppress(OSError):
        root.mkdir(parents=True, exist_ok=True)
    if os.access(root, os.W_OK):
        return root
    # Containers often have no writable home directory.
    return scratch() / "data"


def _refuse_occupied(out: Path) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"{out}: is a file; name a directory that does not exist yet")
    if (out / FILE_NAME).is_file():
        held = read_manifest(out)
        raise UserError(
            f"{out}: already holds {held.name} ({held.num_samples('train')} training samples); "
            "use it as data.source, or remove it first"
        )
    if any(out.iterdir()):
        raise UserError(f"{out}: is not empty and holds no {FILE_NAME}; name a new directory")


def _write(
    original: Original, directory: Path, shard_size: int, say: Callable[[str], None]
) -> Manifest:
    splits: dict[SplitName, tuple[ShardEntry, ...]] = {}
    for split, samples in original.splits.items():
        entries, counts = _write_split(original, split, samples, directory, shard_size)
        splits[split] = tuple(entries)
        say(f"{split}: {counted(samples.num, counts, original.classes)}")
    if "test" not in splits:
        say("test: no samples; a run that evaluates needs data.holdout or data.test_source")
    spec = original.layout.spec
    manifest = Manifest(
        name=original.name,
        law=original.law,
        event=EventEntry(shape=spec.shape, kind=spec.kind, num_classes=spec.num_classes),
        levels=original.layout.levels,
        classes=original.classes,
        splits=splits,
    )
    text = json.dumps(manifest.model_dump(mode="json"), indent=1)
    (directory / FILE_NAME).write_text(text, encoding="utf-8")
    return manifest


def _write_split(
    original: Original, split: SplitName, samples: Samples, directory: Path, shard_size: int
) -> tuple[list[ShardEntry], Counter[int]]:
    from webdataset.writer import TarWriter

    # Shuffled once on disk: originals are sorted by class or writer, and a shuffle buffer smaller
    # than the data cannot undo that.
    rng = np.random.default_rng(derive_seed(0, "data", "prepare", original.name, split))
    order = rng.permutation(samples.num)
    entries = []
    counts: Counter[int] = Counter()
    for number, start in enumerate(range(0, samples.num, shard_size)):
        path = directory / f"{split}-{number:06d}.tar"
        chosen = order[start : start + shard_size]
        # mtime 0, so that equal originals give equal bytes and checksums.
        with path.open("wb") as stream, TarWriter(stream, encoder=False, mtime=0) as writer:
            for index in chosen:
                x, label = samples.get(int(index))
                sample: dict[str, str | bytes] = {"__key__": f"{index:08d}", **encode(x)}
                if label is not None:
                    sample["cls"] = str(label).encode()
                    counts[label] += 1
                writer.write(sample)
        entries.append(
            ShardEntry(
                file=path.name,
                num_samples=len(chosen),
                num_bytes=path.stat().st_size,
                sha256=sha256(path),
            )
        )
    return entries, counts


def counted(num: int, counts: Counter[int], classes: tuple[str, ...]) -> str:
    """The number of samples, in total and of each class."""
    if not classes:
        return f"{num} samples without labels"
    if len(classes) > _MAX_LISTED:
        each = [counts[k] for k in range(len(classes))]
        return f"{num} samples, {min(each)} to {max(each)} of each of {len(classes)} classes"
    names = [f"of class {name}" if name.isdecimal() else name for name in classes]
    return f"{num} samples: " + ", ".join(f"{counts[k]} {name}" for k, name in enumerate(names))


def encode(x: np.ndarray) -> dict[str, bytes]:
    """`x` as one member: PNG for uint8 images (C, H, W) with 1 or 3 channels, else npy."""
    stream = io.BytesIO()
    if x.dtype == np.uint8 and x.ndim == 3 and len(x) in (1, 3):
        pixels = x[0] if len(x) == 1 else np.ascontiguousarray(x.transpose(1, 2, 0))
        Image.fromarray(pixels).save(stream, format="PNG")
        return {"png": stream.getvalue()}
    np.save(stream, x, allow_pickle=False)
    return {"npy": stream.getvalue()}
