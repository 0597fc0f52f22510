"""One webdataset tar -> its samples as bytes, or one clear error that names the file."""

from __future__ import annotations

import hashlib
import lzma
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tarfile import (
    EOFHeaderError,  # pyright: ignore[reportAttributeAccessIssue]
    HeaderError,
    ReadError,
)
from typing import Any, BinaryIO, Self, cast

from ebm_dist.core.errors import UserError

MAX_MEMBER_BYTES = 256 * 2**20
"""Bytes of one member, after decompression: a tar.gz of kilobytes can unfold into gigabytes."""

BROKEN = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, OSError, RecursionError)
"""What reading a damaged or truncated archive raises."""

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
"""What tarfile reads. A file of another name is read too where data.source names it."""

MAX_MEMBERS = 1000
"""Of one sample."""

MAX_NAME_BYTES = 2**20
"""Of the headers that hold long names and attributes."""

_NAMING = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)

_BLOCK = 512
_MAX_PADDING = 64 * 2**20
"""Bytes after a tar's end that are looked at; GNU tar fills up to 10 kB, `cat` puts a tar there."""


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
        if path.exists():
            what = "directory" if path.is_dir() else "device, FIFO or socket"
            raise UserError(f"{path}: is a {what}, not a shard; name a .tar file")
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


def read_shard(shard: ShardFile, left_out: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """The samples of a shard in their order: `__key__`, `__url__` and bytes by extension.

    Args:
        left_out: is given the names of members that belong to no sample.

    Raises:
        UserError: for a tar that is missing, truncated, empty, no tar, or has other samples than
            dataset.json says.
    """
    # Here, not above: importing it costs a second that `describe` of a built-in does not need.
    from webdataset.tariterators import group_by_keys

    check_shard(shard, checksum=False)
    count = 0
    try:
        for sample in group_by_keys(_bounded(_members(shard.path, left_out), shard.path)):
            count += 1
            yield sample
    except UserError:
        raise
    except BROKEN as error:
        raise UserError(
            f"{shard.path}: not a whole tar file ({reason(error)}); copy or write it again"
        ) from None
    except ValueError as error:
        raise UserError(
            f"{shard.path}: not a webdataset shard ({reason(error)}); members of one sample "
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


def _members(path: Path, left_out: list[str] | None) -> Iterator[dict[str, Any]]:
    """webdataset's `tar_file_expander` for a local file, which knows neither a limit on the size
    of a member nor links nor a tar that was cut or damaged between two members."""
    _refuse_cut_tar(path)
    url = str(path)
    # Seeking, not streaming (`r|`): the latter copies the rest of its buffer at every read.
    with (
        path.open("rb", buffering=2**18) as file,
        tarfile.open(fileobj=file, mode="r:*", tarinfo=Header) as stream,
    ):
        for info in stream:
            # A tarfile remembers every header it saw.
            stream.members = []  # pyright: ignore[reportAttributeAccessIssue]
            if info.isdir() or re.match(r"__[^/]*__($|/)", info.name):
                continue
            if base_plus_ext(info.name)[0] is None:
                if left_out is not None and info.isreg():
                    left_out.append(info.name)
                continue
            _refuse_link(info, path)
            if info.size > MAX_MEMBER_BYTES:
                raise UserError(
                    f"{path}: member {info.name!r} has {info.size} bytes; at most "
                    f"{MAX_MEMBER_BYTES} are read; split it into samples"
                )
            member = stream.extractfile(info)
            assert member is not None
            yield {"fname": info.name, "data": member.read(), "__url__": url}
        _refuse_more(cast(BinaryIO, stream.fileobj), path)


def _bounded(members: Iterator[dict[str, Any]], path: Path) -> Iterator[dict[str, Any]]:
    """`members`, refusing a sample that would be gathered without end."""
    key, num_members, num_bytes = None, 0, 0
    for member in members:
        if (own := base_plus_ext(member["fname"])[0]) != key:
            key, num_members, num_bytes = own, 0, 0
        num_members, num_bytes = num_members + 1, num_bytes + len(member["data"])
        if num_members > MAX_MEMBERS or num_bytes > MAX_MEMBER_BYTES:
            raise UserError(
                f"{path}: sample {key!r} has more than {MAX_MEMBERS} members or "
                f"{MAX_MEMBER_BYTES} bytes in all; split it into samples"
            )
        yield member


def _refuse_cut_tar(path: Path) -> None:
    """At once, for the usual form of a tar; the end of the others is seen when they are read."""
    with path.open("rb") as stream:
        if stream.read(_BLOCK)[257:262] != b"ustar":
            return
        stream.seek(-_BLOCK, 2)
        if stream.read(_BLOCK) != bytes(_BLOCK):
            raise UserError(
                f"{path}: tar without its end-of-archive mark: it was truncated, or its writer "
                "did not finish; copy or write it again"
            )


def _refuse_link(info: tarfile.TarInfo, path: Path) -> None:
    """Links are never followed; one in a sample's place is a sample lost."""
    if not info.isreg():
        what = "link" if info.islnk() or info.issym() else "device"
        raise UserError(
            f"{path}: member {info.name!r} is a {what}, which is not read; write its content "
            "instead (tar --dereference --hard-dereference)"
        )


def _refuse_more(padding: BinaryIO, path: Path) -> None:
    """`padding` is what follows a tar's end, and nobody reads."""
    for _ in range(0, _MAX_PADDING, 2**20):
        block = padding.read(2**20)
        if block.count(0) != len(block):
            raise UserError(
                f"{path}: something follows the end of the tar, perhaps another tar (`cat` does "
                "not join tars); give each tar as a shard of its own"
            )
        if not block:
            return


class Header(tarfile.TarInfo):
    """Refuses a damaged header, or none, which tarfile takes for the end of the tar, and a name
    longer than a name can be, which it would read whole, twice."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        header = super().frombuf(buf, encoding, errors)
        if header.type in _NAMING and header.size > MAX_NAME_BYTES:
            raise OSError(
                f"a name or attribute of {header.size} bytes, at most {MAX_NAME_BYTES} are read"
            )
        return header

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(tarfile)
        except EOFHeaderError:  # the block of zeros that is the end
            raise
        except HeaderError as error:
            raise ReadError(
                f"no end-of-archive mark but {error} at byte {tarfile.offset}"
            ) from None


def base_plus_ext(name: str) -> tuple[str | None, str | None]:
    """webdataset's key and extension of a member; (None, None) for a name that has no key."""
    from webdataset.tariterators import base_plus_ext as split

    return split(name)


def reason(error: BaseException) -> str:
    """The first line of an exception, or its type."""
    text = str(error.args[0]) if error.args else ""
    return text.splitlines()[0].rstrip(":") if text else type(error).__name__
