"""One webdataset tar -> its samples as bytes, or one clear error that names the file."""

from __future__ import annotations

import gzip
import hashlib
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ebm_dist.errors import UserError

MAX_MEMBER_BYTES = 256 * 2**20
"""Bytes of one member, after decompression: a tar.gz of kilobytes can unfold into gigabytes."""

_END_OF_ARCHIVE = bytes(512)


@dataclass(frozen=True, slots=True)
class ShardFile:
    """A tar, and what dataset.json says of it (None for plain shards)."""

    path: Path
    num_samples: int | None = None
    num_bytes: int | None = None
    sha256: str | None = None


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_shard(shard: ShardFile, *, checksum: bool) -> None:
    """Raise UserError unless the shard is there, whole, and (if asked) has its checksum."""
    path = shard.path
    if not path.is_file():
        raise UserError(f"{path}: shard is missing; restore it or prepare the data set again")
    size = path.stat().st_size
    if size == 0:
        raise UserError(f"{path}: shard is an empty file; write it again")
    if shard.num_bytes is not None and size != shard.num_bytes:
        raise UserError(
            f"{path}: {size} bytes, but dataset.json says {shard.num_bytes}; the shard was "
            "truncated or changed: copy it again or prepare the data set again"
        )
    if checksum and shard.sha256 is not None and sha256_of(path) != shard.sha256:
        raise UserError(
            f"{path}: SHA-256 differs from dataset.json; the shard is damaged or was changed: "
            "copy it again or prepare the data set again"
        )


def read_shard(shard: ShardFile) -> Iterator[dict[str, Any]]:
    """The samples of a shard in their order: `__key__`, `__url__` and bytes by extension.

    Raises:
        UserError: for a tar that is missing, truncated, empty, no tar, or has other samples than
            dataset.json says.
    """
    # Here, not above: importing it costs a second that `describe` of a built-in does not need.
    from webdataset.tariterators import group_by_keys

    check_shard(shard, checksum=False)
    count = 0
    try:
        for sample in group_by_keys(_members(shard.path)):
            count += 1
            yield sample
    except UserError:
        raise
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, OSError) as error:
        raise UserError(
            f"{shard.path}: not a whole tar file ({_reason(error)}); copy or write it again"
        ) from None
    except ValueError as error:
        raise UserError(
            f"{shard.path}: not a webdataset shard ({_reason(error)}); members of one sample "
            "share a key and have different extensions"
        ) from None
    if count == 0:
        raise UserError(
            f"{shard.path}: holds no samples; members must be named KEY.png, KEY.npy, KEY.cls, …"
        )
    if shard.num_samples is not None and count != shard.num_samples:
        raise UserError(
            f"{shard.path}: {count} samples, but dataset.json says {shard.num_samples}; prepare "
            "the data set again"
        )


def _members(path: Path) -> Iterator[dict[str, Any]]:
    """webdataset's `tar_file_expander` for a local file, which knows neither a limit on the size
    of a member nor a tar that was cut between two members."""
    _refuse_cut_tar(path)
    url = str(path)
    # Seeking, not streaming (`r|`): the latter copies the rest of its buffer at every read.
    with path.open("rb", buffering=2**18) as file, tarfile.open(fileobj=file, mode="r:*") as stream:
        for info in stream:
            if not info.isreg() or re.match(r"__[^/]*__($|/)", info.name):
                continue
            if info.size > MAX_MEMBER_BYTES:
                raise UserError(
                    f"{path}: member {info.name!r} has {info.size} bytes; at most "
                    f"{MAX_MEMBER_BYTES} are read; split it into samples"
                )
            member = stream.extractfile(info)
            assert member is not None
            yield {"fname": info.name, "data": member.read(), "__url__": url}
            # A tarfile remembers every header it saw.
            stream.members = []  # pyright: ignore[reportAttributeAccessIssue]


def _refuse_cut_tar(path: Path) -> None:
    with path.open("rb") as stream:
        start = stream.read(512)
        plain = start[257:262] == b"ustar"
        if not plain:  # compressed files end with checksums of their own
            return
        stream.seek(-512, 2)
        if stream.read(512) != _END_OF_ARCHIVE:
            raise UserError(
                f"{path}: tar without its end-of-archive mark: it was truncated, or its writer "
                "did not finish; copy or write it again"
            )


def _reason(error: BaseException) -> str:
    text = str(error.args[0]) if error.args else ""
    return text.splitlines()[0] if text else type(error).__name__
