"""Reads the samples of one webdataset tar as bytes; errors name the file."""

from __future__ import annotations

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
from ebm_dist.files.safe_open import sha256

MAX_MEMBER_BYTES = 256 * 2**20
"""Largest size of one member, uncompressed; a tar.gz of kilobytes can expand to gigabytes."""

BROKEN = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, OSError, RecursionError)
"""Exceptions of reading a damaged or truncated archive."""

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
"""Suffixes of shards in a directory. A file with another name is read if data.source names it."""

MAX_MEMBERS = 1000
"""Most members of one sample."""

MAX_NAME_BYTES = 2**20
"""Largest size of a header for a long name or attributes."""

_NAMING = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)

_BLOCK = 512
_MAX_PADDING = 64 * 2**20
"""Bytes to check after the end of a tar: GNU tar pads to 10 kB, and `cat` may add another tar."""


@dataclass(frozen=True, slots=True)
class ShardFile:
    """A tar, and its entries in dataset.json (None for plain shards)."""

    path: Path
    num_samples: int | None = None
    num_bytes: int | None = None
    sha256: str | None = None


def check_shard(shard: ShardFile, *, checksum: bool) -> None:
    """Raise UserError unless the shard exists with its size and, with `checksum`, its SHA-256."""
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
    if checksum and shard.sha256 is not None and sha256(path, follow=True) != shard.sha256:
        raise UserError(
            f"{path}: SHA-256 differs from dataset.json; the shard is damaged or was changed: "
            "copy it again or prepare the data set again"
        )


def read_shard(shard: ShardFile, left_out: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """The samples of a shard in their order: `__key__`, `__url__` and bytes by extension.

    Args:
        left_out: receives the names of members that belong to no sample.

    Raises:
        UserError: the tar is missing, truncated, empty or not a tar, or has another number of
            samples than dataset.json says.
    """
    # Imported here, because it takes a second and `describe` of a built-in source needs no shard.
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
    """The members of a local tar, in the form of webdataset's `tar_file_expander`.

    That function has no limit on the size of a member, and does not detect links or a tar that is
    truncated or damaged between two members.
    """
    _refuse_cut_tar(path)
    url = str(path)
    # `r:` seeks; the streaming mode `r|` copies the rest of its buffer at every read.
    with (
        path.open("rb", buffering=2**18) as file,
        tarfile.open(fileobj=file, mode="r:*", tarinfo=Header) as stream,
    ):
        for info in stream:
            # Otherwise a tarfile keeps every header in memory.
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
    """`members`, with a limit on the members and bytes of one sample."""
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
    """Check the end of an uncompressed tar. That of a compressed one is checked while reading."""
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
    """Raise UserError for a link or device: it is not read, so its sample would be lost."""
    if not info.isreg():
        what = "link" if info.islnk() or info.issym() else "device"
        raise UserError(
            f"{path}: member {info.name!r} is a {what}, which is not read; write its content "
            "instead (tar --dereference --hard-dereference)"
        )


def _refuse_more(padding: BinaryIO, path: Path) -> None:
    """Raise UserError if `padding`, the bytes after the end of a tar, is not zero."""
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
    """Refuses headers that tarfile accepts.

    Tarfile takes a damaged or missing header for the end of the tar, and reads a name of any length
    into memory, twice.
    """

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
        except EOFHeaderError:  # the block of zeros that marks the end
            raise
        except HeaderError as error:
            raise ReadError(
                f"no end-of-archive mark but {error} at byte {tarfile.offset}"
            ) from None


def base_plus_ext(name: str) -> tuple[str | None, str | None]:
    """webdataset's key and extension of a member; (None, None) if the name has no key."""
    from webdataset.tariterators import base_plus_ext as split

    return split(name)


def reason(error: BaseException) -> str:
    """The first line of an exception, or its type."""
    text = str(error.args[0]) if error.args else ""
    return text.splitlines()[0].rstrip(":") if text else type(error).__name__
