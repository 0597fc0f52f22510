"""Checkpoints: one consistent cut of a run, of which a crash at any moment leaves a valid one.

A checkpoint is a directory of safetensors files and JSON. It is written under a temporary
name, every file is fsynced and checksummed, the directory is renamed, and only then does
`manifest.json` name it. The loader trusts neither name: it takes the newest directory whose
checksums hold. Tensors are whole, not per rank, so the number of ranks, shards and workers
may differ on resume.

A file may be a difference: some rows of the arrays, with the numbers of those rows, and in
`meta.json` the checkpoint that holds the same file whole and that file's checksum. Differences
never refer to differences, so two files at most make one set of arrays.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import PositiveInt
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ebm_dist.errors import UserError
from ebm_dist.section import Section

FORMAT = 2
_READABLE = (1, FORMAT)  # format 1 has no differences

ROWS = "row"
"""In a file that is a difference: the numbers of the rows that it holds, (M,) int64."""


class CheckpointConfig(Section):
    """When a cut is taken and how many are kept."""

    every: PositiveInt = 500
    """Updates between checkpoints; one more is written when the run ends or is told to stop."""

    keep: PositiveInt = 3
    """Newest checkpoints that stay on disk, with those that they refer to."""


@dataclass(frozen=True, slots=True)
class Base:
    """The whole file that a difference refers to."""

    checkpoint: str
    """Name of the checkpoint directory, beside the one that refers to it."""
    sha256: str


@dataclass(frozen=True, slots=True)
class CheckpointDir:
    """A checkpoint whose checksums held when it was opened."""

    path: Path
    meta: dict[str, Any]
    skipped: tuple[str, ...] = field(default=())
    """One line for each newer checkpoint that was damaged."""

    @property
    def step(self) -> int:
        return int(self.meta["step"])

    @property
    def names(self) -> list[str]:
        return sorted(file.stem for file in self.path.glob("*.safetensors"))

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of `<name>.safetensors`."""
        return load_file(self.path / f"{name}.safetensors")

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        """The arrays of `<name>.safetensors`, whole also where the file is a difference."""
        own = {key: tensor.numpy() for key, tensor in self.tensors(name).items()}
        if name not in (bases := _bases(self.meta)):
            return own
        rows = own.pop(ROWS)
        base = self.path.parent / bases[name].checkpoint / f"{name}.safetensors"
        whole = {key: tensor.numpy() for key, tensor in load_file(base).items()}
        for key, value in own.items():
            whole[key][rows] = value
        return whole


def save(
    run_dir: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor | np.ndarray]],
    meta: Mapping[str, Any],
    *,
    keep: int,
    bases: Mapping[str, Base] | None = None,
) -> Path:
    """Write the cut of `step` atomically and prune old ones; returns its directory.

    Args:
        tensors: file stem -> tensors, each whole or a difference.
        meta: JSON-able state of everything that is no tensor.
        keep: newest checkpoints that stay, with what they refer to; see `prune`.
        bases: file stem -> what it differs from, of those that are differences. Not the
            checkpoint of this step itself, which is replaced.

    Raises:
        OSError: the disk refused. The checkpoints before this one are untouched.
    """
    root = run_dir / "checkpoints"
    root.mkdir(parents=True, exist_ok=True)
    final = root / name_of(step)
    temporary = root / f".tmp-{final.name}-{os.getpid()}"
    for abandoned in root.glob(".tmp-*"):  # a run directory has one writer: those are of the dead
        shutil.rmtree(abandoned, ignore_errors=True)
    temporary.mkdir()
    refers = {name: asdict(base) for name, base in (bases or {}).items()}
    assert all(base["checkpoint"] != final.name for base in refers.values())
    try:
        for name, entries in tensors.items():
            _save_tensors(entries, temporary / f"{name}.safetensors")
        content = {"format": FORMAT, "step": step, **meta, "bases": refers}
        _write_json(temporary / "meta.json", content)
        files = sorted(temporary.iterdir())
        _write_json(temporary / "checksums.json", {f.name: _sha256(f) for f in files})
        for file in temporary.iterdir():
            _fsync(file)
        _fsync(temporary)
        if final.exists():  # a run that was resumed from before this step wrote it again
            shutil.rmtree(final)
        temporary.rename(final)
        _fsync(root)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    prune(root, keep)
    return final


def name_of(step: int) -> str:
    """The name of the directory of the checkpoint of `step`."""
    return f"step_{step:08d}"


def checksum(path: Path, name: str) -> str:
    """What `<name>.safetensors` was when the checkpoint at `path` was written."""
    return json.loads((path / "checksums.json").read_text())[f"{name}.safetensors"]


def prune(root: Path, keep: int) -> None:
    """Remove all but the `keep` newest checkpoints under `root` and what those refer to.

    With `keep` of 2 or more one stays, if there is one, that shares no file with the newest: a
    damaged file that many refer to must not be the end of all of them.
    """
    everything = _by_age(root)
    files = {path.name: {path.name, *_referred(path)} for path in everything}
    names = [path.name for path in everything]
    kept = names[:keep]
    if keep > 1 and all(files[name] & files[kept[0]] for name in kept[1:]):
        kept += [name for name in names[keep:] if not files[name] & files[kept[0]]][:1]
    wanted = set().union(*(files[name] for name in kept))
    for path in everything:
        if path.name not in wanted:
            shutil.rmtree(path, ignore_errors=True)


def _referred(path: Path) -> Iterable[str]:
    try:
        meta = json.loads((path / "meta.json").read_text())
        return [base.checkpoint for base in _bases(meta).values()]
    except (OSError, ValueError, TypeError, AttributeError):  # damaged: no one will load it
        return []


def _bases(meta: Mapping[str, Any]) -> dict[str, Base]:
    return {name: Base(**base) for name, base in meta.get("bases", {}).items()}


def latest(run_dir: Path | str) -> CheckpointDir | None:
    """The newest valid checkpoint of a run, or None if it has none.

    Damaged ones are passed over; `skipped` says which and why.
    """
    root = Path(run_dir) / "checkpoints"
    skipped: list[str] = []
    for path in _by_age(root):
        try:
            opened = open_checkpoint(path)
        except UserError as error:
            skipped.append(str(error))
            continue
        return CheckpointDir(opened.path, opened.meta, tuple(skipped))
    if skipped:
        raise UserError(
            f"{root}: no checkpoint is whole ({'; '.join(skipped)}); "
            "start anew with --resume never and another --run-dir"
        )
    return None


def open_checkpoint(path: Path) -> CheckpointDir:
    """Open `path` and verify every checksum.

    Raises:
        UserError: a file is missing, truncated or altered, or the format is another one.
    """
    try:
        sums = json.loads((path / "checksums.json").read_text())
        for name, expected in sums.items():
            if Path(name).name != name:
                raise UserError(f"{path.name}: checksums.json names a file outside the checkpoint")
            if _sha256(path / name) != expected:
                raise UserError(
                    f"{path.name}: {name} does not match its checksum (torn or altered)"
                )
        meta = json.loads((path / "meta.json").read_text())
        if "meta.json" not in sums or not isinstance(meta, dict):
            raise UserError(f"{path.name}: meta.json is not covered by a checksum")
        for name, base in _bases(meta).items():
            _check_base(path, name, base)
    except FileNotFoundError as error:
        raise UserError(f"{path.name}: {Path(error.filename).name} is missing") from None
    except (OSError, ValueError, AttributeError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path.name}: unreadable ({type(error).__name__})") from None
    if meta.get("format") not in _READABLE:
        raise UserError(
            f"{path.name}: format {meta.get('format')!r}, this version reads up to {FORMAT}; "
            "resume with the version of ebm_dist that wrote it"
        )
    return CheckpointDir(path, meta)


def _check_base(path: Path, name: str, base: Base) -> None:
    """Raises UserError unless the file that `name` of `path` differs from is as it was."""
    if Path(base.checkpoint).name != base.checkpoint:
        raise UserError(f"{path.name}: meta.json names a file outside the checkpoints")
    file = path.parent / base.checkpoint / f"{name}.safetensors"
    if not file.is_file():
        raise UserError(f"{path.name}: {base.checkpoint}/{file.name}, to which it refers, is gone")
    if _sha256(file) != base.sha256:
        raise UserError(
            f"{path.name}: {base.checkpoint}/{file.name}, to which it refers, does not match its "
            "checksum (torn or altered)"
        )


def write_manifest(run_dir: Path, content: Mapping[str, Any]) -> None:
    """Replace `manifest.json` in one step."""
    temporary = run_dir / "manifest.json.tmp"
    _write_json(temporary, content)
    _fsync(temporary)
    temporary.replace(run_dir / "manifest.json")


def tensors_or_refuse(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file from outside; UserError if it is not one."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error})") from None


def _by_age(root: Path) -> list[Path]:
    """Checkpoint directories, newest first."""
    return sorted(root.glob("step_*"), key=lambda path: path.name, reverse=True)


def _save_tensors(entries: Mapping[str, Tensor | np.ndarray], path: Path) -> None:
    try:
        save_file({key: _contiguous(value) for key, value in entries.items()}, path)
    except SafetensorError as error:
        # safetensors has its own type for a full disk too, with the number in its text.
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        code = int(number.group(1))
        raise OSError(code, os.strerror(code), str(path)) from error


def _contiguous(value: Tensor | np.ndarray) -> Tensor:
    tensor = torch.from_numpy(np.array(value)) if isinstance(value, np.ndarray) else value
    return tensor.detach().cpu().contiguous()


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
