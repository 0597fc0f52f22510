"""Checkpoints: one consistent cut of a run, of which a crash at any moment leaves a valid one.

A checkpoint is a directory of safetensors files and JSON. It is written under a temporary
name, every file is fsynced and checksummed, the directory is renamed, and only then does
`manifest.json` name it. The loader trusts neither name: it takes the newest directory whose
checksums hold. Tensors are whole, not per rank, so the number of ranks, shards and workers
may differ on resume.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
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

FORMAT = 1


class CheckpointConfig(Section):
    """When a cut is taken and how many are kept."""

    every: PositiveInt = 500
    """Updates between checkpoints; one more is written when the run ends or is told to stop."""

    keep: PositiveInt = 3
    """Newest checkpoints that stay on disk."""


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
        return {key: tensor.numpy() for key, tensor in self.tensors(name).items()}


def save(
    run_dir: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor | np.ndarray]],
    meta: Mapping[str, Any],
    *,
    keep: int,
) -> Path:
    """Write the cut of `step` atomically and prune old ones; returns its directory.

    Args:
        tensors: file stem -> tensors, each whole.
        meta: JSON-able state of everything that is no tensor.

    Raises:
        OSError: the disk refused. The checkpoints before this one are untouched.
    """
    root = run_dir / "checkpoints"
    root.mkdir(parents=True, exist_ok=True)
    final = root / f"step_{step:08d}"
    temporary = root / f".tmp-{final.name}-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        for name, entries in tensors.items():
            _save_tensors(entries, temporary / f"{name}.safetensors")
        _write_json(temporary / "meta.json", {"format": FORMAT, "step": step, **meta})
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
    for old in _by_age(root)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return final


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
    except FileNotFoundError as error:
        raise UserError(f"{path.name}: {Path(error.filename).name} is missing") from None
    except (OSError, ValueError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path.name}: unreadable ({type(error).__name__})") from None
    if meta.get("format") != FORMAT:
        raise UserError(
            f"{path.name}: format {meta.get('format')!r}, this version reads {FORMAT}; "
            "resume with the version of ebm_dist that wrote it"
        )
    return CheckpointDir(path, meta)


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
