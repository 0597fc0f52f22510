"""Checkpoint files. A crash at any moment leaves at least one valid checkpoint.

A checkpoint is a directory of safetensors files and JSON. It is written under a temporary
name, every file is fsynced and checksummed, the directory is renamed, and only then does
`manifest.json` name it. The loader trusts no name: it takes the newest directory whose
checksums match. Directories with other names than `name_of` gives, such as a user's copies, are
neither read nor removed. Tensors are stored unsharded, so the number of ranks, shards and workers
may differ on resume.

A file may be incremental: it then holds some rows of the arrays and their row numbers, and
`meta.json` names the checkpoint with the full file and that file's checksum. An incremental file
never refers to another one, so at most two files make one set of arrays.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import PositiveInt
from torch import Tensor

from ebm_dist.core.errors import UserError
from ebm_dist.core.section import Section
from ebm_dist.files.durable import link_or_copy, new_directory, replace_text
from ebm_dist.files.safe_open import make_directory, read_bytes, sha256
from ebm_dist.files.tensor_file import save_tensors, tensors_or_refuse

FORMAT = 2
_READABLE = (1, FORMAT)  # format 1 has no incremental files

ROWS = "row"
"""Key of the row numbers, (M,) int64, in an incremental file."""

_NAME = re.compile(r"step_(\d{8,18})")


class CheckpointConfig(Section):
    """How often a checkpoint is written, and how many are kept."""

    every: PositiveInt = 500
    """Updates between checkpoints; another one is written when the run ends or is stopped."""

    keep: PositiveInt = 3
    """Number of newest checkpoints to keep, besides those to which they refer."""


@dataclass(frozen=True, slots=True)
class Base:
    """The full file to which an incremental file refers."""

    checkpoint: str
    """Name of its checkpoint directory, in the same folder."""
    sha256: str


@dataclass(frozen=True, slots=True)
class CheckpointDir:
    """A checkpoint that matched its checksums when it was opened."""

    path: Path
    meta: dict[str, Any]
    skipped: tuple[str, ...] = field(default=())
    """One line for each newer checkpoint that was damaged."""

    @property
    def step(self) -> int:
        return int(self.meta["step"])

    @property
    def names(self) -> list[str]:
        files = (Path(name) for name in _checksums(self.path))  # ignores foreign files
        return sorted(file.stem for file in files if file.suffix == ".safetensors")

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of `<name>.safetensors`."""
        return tensors_or_refuse(self.path / f"{name}.safetensors")

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        """All rows of the arrays of `<name>.safetensors`, also if the file is incremental."""
        own = {key: tensor.numpy() for key, tensor in self.tensors(name).items()}
        if name not in (bases := _bases(self.meta)):
            return own
        rows = own.pop(ROWS)
        base = self.path.parent / bases[name].checkpoint / f"{name}.safetensors"
        whole = {key: tensor.numpy() for key, tensor in tensors_or_refuse(base).items()}
        for key, value in own.items():
            whole[key][rows] = value
        return whole

    @contextmanager
    def of_a_run(self) -> Iterator[None]:
        """Context for reading the content, which may not be a run's: checksums do not prove that.

        Raises:
            UserError: replaces the exceptions of missing entries and of entries of another type.
        """
        try:
            yield
        except UserError:
            raise
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{self.path}: its checksums hold, but a run did not write this "
                f"({type(error).__name__}: {' '.join(str(error).split())}); move it away, or start "
                "anew with another --run-dir"
            ) from error


def write_whole(opened: CheckpointDir, folder: Path) -> None:
    """Write the checkpoint into the empty `folder`, with full files in place of incremental ones.

    So it needs no other checkpoint. Other files are hard links where the file system has them.
    """
    bases = _bases(opened.meta)
    for name in opened.names:
        file = f"{name}.safetensors"
        if name in bases:
            save_tensors(opened.arrays(name), folder / file)
        else:
            link_or_copy(opened.path / file, folder / file)
    _seal(folder, {**opened.meta, "bases": {}})


def save(
    run_dir: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor | np.ndarray]],
    meta: Mapping[str, Any],
    *,
    keep: int,
    bases: Mapping[str, Base] | None = None,
) -> Path:
    """Write the checkpoint of `step` atomically and prune old ones; returns its directory.

    Args:
        tensors: file stem -> tensors, full or incremental.
        meta: the rest of the state, for JSON.
        keep: the number of newest checkpoints to keep; see `prune`.
        bases: file stem -> the full file, for incremental files. It is never in the checkpoint of
            this step, which is replaced.

    Raises:
        OSError: the write failed. Earlier checkpoints are unchanged.
    """
    root = run_dir / "checkpoints"
    make_directory(root)
    final = root / name_of(step)
    for path in root.glob(".tmp-step_*"):  # left by killed writers of earlier versions
        if re.fullmatch(r"\.tmp-step_\d{8,}-\d+", path.name) and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
    refers = {name: asdict(base) for name, base in (bases or {}).items()}
    assert all(base["checkpoint"] != final.name for base in refers.values())
    # A run that resumed from an earlier step replaces its own checkpoint of this step.
    with new_directory(final, replace=True, family=_NAME.pattern) as part:
        for name, entries in tensors.items():
            save_tensors(entries, part / f"{name}.safetensors")
        _seal(part, {"format": FORMAT, "step": step, **meta, "bases": refers})
    prune(root, keep)
    return final


def _seal(folder: Path, meta: Mapping[str, Any]) -> None:
    """Write `meta.json` and the checksums of all files."""
    _write_json(folder / "meta.json", meta)
    files = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    _write_json(folder / "checksums.json", {file.name: sha256(file) for file in files})


def name_of(step: int) -> str:
    """The name of the directory of the checkpoint of `step`."""
    return f"step_{step:08d}"


def checksum(path: Path, name: str) -> str:
    """The recorded checksum of `<name>.safetensors` in the checkpoint at `path`."""
    return _checksums(path)[f"{name}.safetensors"]


def newest_name(run_dir: Path) -> str | None:
    """The name of the newest checkpoint, valid or not; None if there is none."""
    paths = _by_age(run_dir / "checkpoints")
    return paths[0].name if paths else None


def prune(root: Path, keep: int) -> None:
    """Remove all but the `keep` newest checkpoints under `root` and those to which they refer.

    If `keep` is 2 or more, it also keeps a checkpoint that shares no file with the newest one, if
    any exists: a damaged file to which several refer must not invalidate all of them.
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
        meta = json.loads(read_bytes(path / "meta.json"))
        return [base.checkpoint for base in _bases(meta).values()]
    except (OSError, ValueError, TypeError, AttributeError):  # damaged: no one will load it
        return []


def _bases(meta: Mapping[str, Any]) -> dict[str, Base]:
    return {name: Base(**base) for name, base in meta.get("bases", {}).items()}


def latest(run_dir: Path | str) -> CheckpointDir | None:
    """The newest valid checkpoint of a run, or None if the run has no checkpoint.

    Damaged ones are skipped; `skipped` has a line for each.
    """
    root = Path(run_dir) / "checkpoints"
    skipped: list[str] = []
    for path in _by_age(root):
        try:
            opened = open_checkpoint(path)
            if name_of(opened.step) != path.name:
                raise UserError(f"{path.name}: holds update {opened.step}, so it was renamed")
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
        UserError: a file is missing, truncated or altered, or the format is not readable.
    """
    try:
        sums = _checksums(path)
        for name, expected in sums.items():
            if Path(name).name != name:
                raise UserError(f"{path.name}: checksums.json names a file outside the checkpoint")
            if sha256(path / name) != expected:
                raise UserError(
                    f"{path.name}: {name} does not match its checksum (torn or altered)"
                )
        meta = json.loads(read_bytes(path / "meta.json"))
        if "meta.json" not in sums or not isinstance(meta, dict):
            raise UserError(f"{path.name}: meta.json is not covered by a checksum")
        if "learner.safetensors" not in sums:
            raise UserError(f"{path.name}: learner.safetensors is missing")
        if type(meta.get("step")) is not int:
            raise UserError(f"{path.name}: meta.json holds no step")
        for name, base in _bases(meta).items():
            _check_base(path, name, base)
    except FileNotFoundError as error:
        raise UserError(f"{path.name}: {Path(error.filename).name} is missing") from None
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
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
    """Raise UserError unless the full file to which `name` of `path` refers is unchanged."""
    if Path(base.checkpoint).name != base.checkpoint or base.checkpoint == "..":
        raise UserError(f"{path.name}: meta.json names a file outside the checkpoints")
    file = path.parent / base.checkpoint / f"{name}.safetensors"
    if not file.is_file():
        raise UserError(f"{path.name}: {base.checkpoint}/{file.name}, to which it refers, is gone")
    if sha256(file) != base.sha256:
        raise UserError(
            f"{path.name}: {base.checkpoint}/{file.name}, to which it refers, does not match its "
            "checksum (torn or altered)"
        )


def write_manifest(run_dir: Path, content: Mapping[str, Any]) -> None:
    """Replace `manifest.json` in one step."""
    replace_text(run_dir / "manifest.json", _json(content))


def _by_age(root: Path) -> list[Path]:
    """Checkpoint directories, newest first."""
    found: list[tuple[int, Path]] = []
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for path in root.iterdir():
            match = _NAME.fullmatch(path.name)
            if match and path.name == name_of(int(match[1])) and not path.is_symlink():
                found.append((int(match[1]), path))
    return [path for _, path in sorted(found, reverse=True)]


def _checksums(path: Path) -> dict[str, str]:
    return json.loads(read_bytes(path / "checksums.json"))


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=1, sort_keys=True) + "\n"


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(_json(content), encoding="utf-8")
