"""Bytes of an image file -> its 8-bit pixels, alike for folders and shards."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image, ImageOps
from PIL.BmpImagePlugin import BmpImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from ebm_dist.core.errors import UserError

MAX_PIXELS = 64 * 2**20
"""Pixels of one image. Pillow's own limit only warns; a 1 MB PNG can unfold into gigabytes."""

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg")
GREY_MODES = ("1", "L", "LA")

# The readers themselves, not Image.open: no other format is tried, and its check of the size comes
# as a warning, which in a thread can be caught only by changing global state.
_READERS: dict[str, tuple[bytes, Callable[[Any], Image.Image]]] = {
    "PNG": (b"\x89PNG", PngImageFile),
    "BMP": (b"BM", BmpImageFile),
    "WebP": (b"RIFF", WebPImageFile),
    "JPEG": (b"", JpegImageFile),
}
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"


def open_picture(data: bytes, where: str, *, formats: Collection[str]) -> Image.Image:
    """The image, turned as its EXIF entry says, in 8-bit grey (`L`) or colour (`RGB`).

    Raises:
        UserError: naming `where`, for an image of another format, cut, too large or of more than
            8 bits a channel.
    """
    try:
        image = _header(io.BytesIO(data), formats)
        if math.prod(image.size) > MAX_PIXELS:
            raise UserError(
                f"{where}: image of {image.width} x {image.height} pixels; at most "
                f"{MAX_PIXELS} are read, against decompression bombs; resize it"
            )
        # Pillow cuts 16-bit colour to 8 bits. The depth is PNG's 25th byte.
        if image.format == "PNG" and data[24] > 8:
            raise _too_deep(where)
        # Pillow is content once it has all rows, and a cut file may still have them.
        if image.format == "PNG" and _PNG_END not in data:
            raise ValueError("PNG without its end: truncated")
        ImageOps.exif_transpose(image, in_place=True)
        return grey_or_colour(image, where)
    except UserError:
        raise
    except Exception as error:  # pillow raises SyntaxError, OSError, struct.error, …
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        names = _listed(formats)
        raise UserError(f"{where}: not a readable {names} ({reason}); write it again") from None


def grey_or_colour(image: Image.Image, where: str) -> Image.Image:
    """The image in 8-bit grey (`L`) or colour (`RGB`); UserError for more than 8 bits a channel."""
    # Pillow clips 16-bit grey to white. Scaling would be a guess: 12-bit cameras fill a sixteenth
    # of the range.
    if image.mode.startswith(("I", "F")):
        raise _too_deep(where)
    if image.mode in ("L", "RGB"):
        return image
    return image.convert("L" if image.mode in GREY_MODES else "RGB")


def _too_deep(where: str) -> UserError:
    return UserError(
        f"{where}: image of more than 8 bits a channel; rescale it to 8 bits, or store it in a "
        "shard as a float .npy in [-1, 1] with data.kind: image"
    )


def is_colour(path: Path, *, formats: Collection[str]) -> bool:
    """Whether the file's header announces colour; False where it is unreadable."""
    try:
        with path.open("rb") as stream:
            return not _header(stream, formats).mode.startswith((*GREY_MODES, "I", "F"))
    except Exception:  # as above; reading the image will say what is wrong
        return False


def _header(stream: BinaryIO, formats: Collection[str]) -> Image.Image:
    """The image before its pixels are read."""
    start = stream.read(4)
    stream.seek(0)
    for name, (magic, reader) in _READERS.items():
        if name in formats and start.startswith(magic):
            return reader(stream)
    raise AssertionError("JPEG is among the formats")


def _listed(names: Collection[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} or {last}"
