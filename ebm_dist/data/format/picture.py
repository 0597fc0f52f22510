"""Reads image files as 8-bit pixels, for folders and shards."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image, ImageOps
from PIL.BmpImagePlugin import BmpImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import BITSPERSAMPLE, TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from ebm_dist.core.errors import UserError
from ebm_dist.files.safe_open import open_to_read

MAX_PIXELS = 64 * 2**20
"""Most pixels of one image. Pillow's own limit only warns; a 1 MB PNG can expand to gigabytes."""

MAX_FILE_BYTES = 256 * 2**20
"""Largest size of one image file."""

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg")
GREY_MODES = ("1", "L", "LA")


def _tiff(stream: BinaryIO) -> TiffImageFile:
    # Pillow warns about a damaged header before it raises. The warning is suppressed by global
    # state, which is safe here: only folders have TIFF files, and one thread reads them.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return TiffImageFile(stream)


# Pillow's readers, not Image.open, which would try other formats and whose size check is a warning;
# a thread can catch a warning only by changing global state.
_READERS: dict[str, tuple[bytes | tuple[bytes, ...], Callable[[Any], Image.Image]]] = {
    "PNG": (b"\x89PNG", PngImageFile),
    "BMP": (b"BM", BmpImageFile),
    "WebP": (b"RIFF", WebPImageFile),
    "TIFF": ((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), _tiff),
    "JPEG": (b"", JpegImageFile),
}
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"


def open_picture(data: bytes, where: str, *, formats: Collection[str]) -> Image.Image:
    """The image in 8-bit grey (`L`) or colour (`RGB`), rotated as its EXIF entry says.

    Raises:
        UserError: names `where`; the image has another format, is truncated or too large, or has
            more than 8 bits per channel.
    """
    try:
        image = _header(io.BytesIO(data), formats)
        if math.prod(image.size) > MAX_PIXELS:
            raise UserError(
                f"{where}: image of {image.width} x {image.height} pixels; at most "
                f"{MAX_PIXELS} are read, against decompression bombs; resize it"
            )
        # Pillow truncates 16-bit colour to 8 bits. Byte 25 of a PNG is its bit depth.
        if image.format == "PNG" and data[24] > 8:
            raise _too_deep(where)
        if isinstance(image, TiffImageFile):
            if max(image.tag_v2.get(BITSPERSAMPLE, (8,))) > 8:
                raise _too_deep(where)
            if image.is_animated:
                raise UserError(f"{where}: TIFF of several pages; write each as a file of its own")
        # Pillow accepts a truncated file that still has all rows.
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


def read_picture(path: Path, *, formats: Collection[str]) -> Image.Image:
    """The image in the file `path`; see `open_picture`."""
    with open_to_read(path, follow=True) as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise UserError(f"{path}: has more than {MAX_FILE_BYTES} bytes, so it is no single image")
    return open_picture(data, str(path), formats=formats)


def cut(image: Image.Image, where: str, *, crop: int | None, resize: int | None) -> Image.Image:
    """The central square of `image`, scaled; `image` itself if both sides are None.

    Args:
        crop: side of the square in pixels; by default the largest square.
        resize: side to which the square is scaled, with Lanczos' filter.
    """
    if crop is not None and crop > min(image.size):
        raise UserError(
            f"{where}: is {image.width} x {image.height} pixels, so no square of --crop {crop} "
            f"can be cut out of it; lower --crop to {min(image.size)} or leave the image out"
        )
    if crop is None and resize is None:
        return image
    # Cropped first, because scaling a box of the whole image would blend in pixels around the box.
    side = crop or min(image.size)
    image = ImageOps.fit(image, (side, side)) if crop is None else _middle(image, crop)
    if resize is not None and resize != side:
        image = image.resize((resize, resize), Image.Resampling.LANCZOS)
    return image


def _middle(image: Image.Image, side: int) -> Image.Image:
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def grey_or_colour(image: Image.Image, where: str) -> Image.Image:
    """The image in 8-bit grey (`L`) or colour (`RGB`).

    Raises:
        UserError: names `where`; the image has more than 8 bits per channel.
    """
    # Pillow clips 16-bit grey to white. Scaling is not possible, since the range is unknown: 12-bit
    # cameras use a sixteenth of it.
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
    """Whether the image has colour, by its header; False if the header is unreadable."""
    try:
        with open_to_read(path, follow=True) as stream:
            return not _header(stream, formats).mode.startswith((*GREY_MODES, "I", "F"))
    except Exception:  # reading the image reports the fault
        return False


def _header(stream: BinaryIO, formats: Collection[str]) -> Image.Image:
    """The image, of which only the header has been read."""
    start = stream.read(4)
    stream.seek(0)
    for name, (magic, reader) in _READERS.items():
        if name in formats and start.startswith(magic):
            return reader(stream)
    raise AssertionError("JPEG is among the formats")


def _listed(names: Collection[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} or {last}"
