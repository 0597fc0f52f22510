"""Finds the samples that `data.source` names, and their layout."""

from __future__ import annotations

import glob
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from ebm_dist.core.errors import UserError
from ebm_dist.core.section import nearest
from ebm_dist.data.config import DataConfig
from ebm_dist.data.format.decode import Layout, guess_layout
from ebm_dist.data.format.manifest import FILE_NAME, read_manifest
from ebm_dist.data.format.shards import SUFFIXES, ShardFile, read_shard
from ebm_dist.data.sources.module import open_module
from ebm_dist.data.sources.originals import WITHOUT_ORIGINALS, static_layout
from ebm_dist.data.sources.prepare import materialise
from ebm_dist.data.storage.protocol import Storage
from ebm_dist.data.storage.shards import Shards

_MAX_SHARDS = 1_000_000


def stored_layout(config: DataConfig) -> Layout:
    """The layout of the source's samples. Does not write the shards of a built-in source."""
    layout = static_layout(config.location) if not config.is_own_dataset else None
    if layout is None:
        return open_dataset(config).layout
    _refuse_plain_keys(config, f"{config.location}, which is built in,")
    return layout


def open_dataset(config: DataConfig) -> Storage:
    """Find the samples; a built-in source writes its shards into the cache at the first use.

    Raises:
        UserError: the source is missing or cannot be used.
    """
    if config.is_own_dataset:
        return open_module(config)
    layout = static_layout(config.location)
    if layout is None:
        return _find(config)
    _refuse_plain_keys(config, f"{config.location}, which is built in,")
    directory = materialise(config.location, config.cache_dir, toy_samples=config.toy_samples)
    return _of_manifest(directory, None, config)


def located(config: DataConfig) -> DataConfig:
    """`config` with absolute paths, since parts of a run have other working directories, and with
    the fingerprint of a dataset that is not in shards."""
    if config.is_own_dataset:
        found = config.fingerprint or open_module(config).fingerprint()
        return config.model_copy(update={"fingerprint": found})
    here = os.getcwd()

    def absolute(path: Any) -> Any:
        if isinstance(path, tuple):
            return tuple(map(absolute, path))
        # A brace pattern may begin with absolute paths; braces in `here` would become a pattern.
        if path is None or path.startswith("{/") or "{" in here:
            return path
        return os.path.join(here, path)

    paths = {"cache_dir": config.cache_dir, "test_source": config.test_source}
    if static_layout(config.location) is None:
        paths |= {"source": config.source, "shards": config.shards}
    return config.model_copy(update={key: absolute(path) for key, path in paths.items()})


def _find(config: DataConfig) -> Shards:
    key = "data.shards" if config.source is None else "data.source"
    found = [(pattern, *_expand(pattern, key)) for pattern in config.patterns]
    prepared = list(dict.fromkeys(directory for _, _, directory in found))
    if None not in prepared:
        parts = [
            _of_manifest(
                directory,
                list(dict.fromkeys(p for _, paths, of in found if of == directory for p in paths)),
                config,
            )
            for directory in prepared
            if directory is not None
        ]
        whole = _joined(parts, config, key)
        what = f"{config.location}, whose {FILE_NAME} says so,"
        _refuse_plain_keys(config, what, has_test=whole.test is not None)
        return _with_test(whole, config)
    if len(prepared) > 1:
        raise UserError(
            f"{key}: names prepared shards, of {next(filter(None, prepared))}, and plain ones; "
            "prepare all of them, or none"
        )
    train = tuple(dict.fromkeys(ShardFile(path) for _, paths, _ in found for path in paths))
    for pattern, paths, _ in found:
        if not paths[0].exists():
            raise UserError(_not_there(pattern, paths[0], key))
    return _with_test(
        Shards(
            _guessed(train[0], config), train, None, verify=config.verify, bad=config.on_bad_sample
        ),
        config,
    )


def _guessed(shard: ShardFile, config: DataConfig) -> Layout:
    """The layout of plain shards, from the first usable sample."""
    fault: UserError | None = None
    for sample in read_shard(shard):
        try:
            return guess_layout(
                sample, kind=config.kind, num_classes=config.num_classes, member=config.member
            )
        except UserError as error:
            fault = fault or error
            if config.on_bad_sample == "stop":
                break
    assert fault is not None, "a shard holds a sample"
    raise fault


def _joined(parts: list[Shards], config: DataConfig, key: str) -> Shards:
    first, *others = parts
    for part in others:
        if part.layout != first.layout:
            raise UserError(
                f"{key}: {first.train[0].path.parent} holds events of {first.layout.spec} and "
                f"{part.train[0].path.parent} of {part.layout.spec}; name shards of one layout"
            )
    test = tuple(shard for part in parts for shard in part.test or ())
    train = tuple(shard for part in parts for shard in part.train)
    return Shards(first.layout, train, test or None, verify=config.verify, bad=config.on_bad_sample)


def _with_test(dataset: Shards, config: DataConfig) -> Shards:
    if config.test_source is not None:
        paths, _ = _expand(config.test_source, "data.test_source")
        return replace(dataset, test=tuple(ShardFile(path) for path in paths))
    if config.holdout > 0:
        return replace(dataset, test=dataset.train, holdout=config.holdout)
    return dataset


def _of_manifest(directory: Path, chosen: list[Path] | None, config: DataConfig) -> Shards:
    """The shards of a prepared directory.

    Args:
        chosen: the shards that a pattern names; None for all.
    """
    manifest = read_manifest(directory)
    train, test = manifest.files("train", directory), manifest.files("test", directory)
    if chosen is not None:
        by_name = {shard.path.name: shard for shard in (*train, *test)}
        unknown = [path for path in chosen if path.name not in by_name]
        if unknown:
            raise UserError(
                f"{unknown[0]}: is not named in {directory / FILE_NAME}; set data.source to "
                f"{directory}, or move other shards elsewhere"
            )
        train = [by_name[path.name] for path in chosen]
        used = {shard.path.name for shard in train}
        test = [shard for shard in test if shard.path.name not in used]
    return Shards(
        manifest.layout,
        tuple(train),
        tuple(test) or None,
        verify=config.verify,
        bad=config.on_bad_sample,
    )


def _expand(location: str, key: str = "data.source") -> tuple[list[Path], Path | None]:
    """The shards that a directory, file or brace pattern names, and the directory of their
    dataset.json, if there is one."""
    import braceexpand

    if "://" in location or location.startswith("pipe:"):
        raise UserError(
            f"{key}: {location!r} is not a local path; copy the shards to a disk that every "
            "node sees (commands and URLs are not run or fetched)"
        )
    path = Path(location).expanduser()
    if path.is_dir():
        if (path / FILE_NAME).is_file():
            manifest = read_manifest(path)
            return [shard.path for shard in manifest.files("train", path)], path
        return _shards_of(path, key), None
    try:
        names: list[str] = []
        for name in braceexpand.braceexpand(str(path)):
            names.append(name)
            if len(names) > _MAX_SHARDS:
                raise UserError(f"{key}: {location!r} names more than {_MAX_SHARDS} shards")
    except (ValueError, MemoryError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{key}: {location!r} is no brace pattern ({error})") from None
    paths = [path for name in names for path in _matching(name, location, key)]
    parents = {item.parent for item in paths}
    parent = paths[0].parent
    if len(parents) == 1 and (parent / FILE_NAME).is_file():
        return paths, parent
    if any(map(glob.has_magic, names)):
        _refuse_held_out([path.name for path in paths], location, key)
    return paths, None


def _matching(name: str, location: str, key: str) -> list[Path]:
    """The shards that a glob matches; in a prepared directory, only training shards."""
    if not glob.has_magic(name) or os.path.lexists(name):
        return [Path(name)]
    paths = [Path(found) for found in sorted(glob.glob(name, recursive=True))]
    if not paths:
        raise UserError(f"{key}: {location!r} matches no file; correct the pattern")
    if len(paths) > _MAX_SHARDS:
        raise UserError(f"{key}: {location!r} matches more than {_MAX_SHARDS} shards")
    to_train_on = {
        directory: {shard.path for shard in read_manifest(directory).files("train", directory)}
        for directory in {path.parent for path in paths}
        if (directory / FILE_NAME).is_file()
    }
    kept = [path for path in paths if path in to_train_on.get(path.parent, {path})]
    # A glob that matches only held-out shards means them.
    return kept or paths


def _shards_of(directory: Path, key: str) -> list[Path]:
    """All tars of a directory without a dataset.json."""
    names = sorted(item.name for item in directory.iterdir() if not item.name.startswith("."))
    found = [name for name in names if name.endswith(SUFFIXES)]
    if not found:
        raise UserError(
            f"{key}: {directory} holds neither {FILE_NAME} nor .tar shards; run `ebm-dist "
            "data prepare` or name the shards"
        )
    unread = [name for name in names if re.search(r"\.(tar\.\w+|tzst|tlz)$", name)]
    if unread := [name for name in unread if name not in found]:
        raise UserError(
            f"{key}: {directory} holds {unread[0]} beside {found[0]}; {', '.join(SUFFIXES)} are "
            "read, so unpack it to a .tar or move it elsewhere"
        )
    _refuse_held_out(found, directory, key)
    return [directory / name for name in found]


def _refuse_held_out(names: list[str], where: object, key: str) -> None:
    held_out = [name for name in names if re.match(r"(test|val|valid|validation)([^a-z]|$)", name)]
    if key != "data.test_source" and 0 < len(held_out) < len(names):
        raise UserError(
            f"{key}: {where} holds {held_out[0]} beside other shards, and all would be trained "
            "on; move what is held out to a directory of its own and name it in data.test_source"
        )


def _not_there(location: str, first: Path, key: str) -> str:
    if location in WITHOUT_ORIGINALS:
        return (
            f"data.source: {location} is not built in; run `ebm-dist data prepare {location} OUT "
            f"--source SOURCE`, where SOURCE is {WITHOUT_ORIGINALS[location]}, and set data.source "
            "to OUT"
        )
    known = ["digits", "fashion-mnist", "toy:NAME"]
    close = nearest(location, [*known, *WITHOUT_ORIGINALS]) if "/" not in location else ""
    return (
        f"{key}: {location!r} is neither built in ({', '.join(known)}) nor shards on this "
        f"machine ({first} does not exist){close}; run `ebm-dist data prepare` or correct the path"
    )


def _refuse_plain_keys(config: DataConfig, what: str, *, has_test: bool = True) -> None:
    given = {
        "kind": config.kind,
        "num_classes": config.num_classes,
        "member": config.member,
    }
    if has_test:
        given |= {"test_source": config.test_source, "holdout": config.holdout or None}
    for key, value in given.items():
        if value is not None:
            raise UserError(
                f"data.{key}: is {value!r}, but {what} knows it already; leave data.{key} out "
                "(it is for plain shards)"
            )
