"""A folder of PNG, JPEG, BMP and WebP images."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ebm_dist.core.errors import UserError
from ebm_dist.core.types import EventSpec
from ebm_dist.data.format.decode import Layout
from ebm_dist.data.format.manifest import SplitName
from ebm_dist.data.format.picture import MAX_PIXELS, is_colour, open_picture
from ebm_dist.data.sources.folder_scan import SUFFIXES, Labelled, scan
from ebm_dist.data.sources.original import Original, Samples

_FORMATS = ("PNG", "JPEG", "BMP", "WebP")


def load(source: Path | None, resize: int | None) -> Original:
    """The images of `source` as `folder_scan.scan` sorts them, in colour where one of them is."""
    if source is None or not source.is_dir():
        came = "none" if source is None else f"{source}, which is not a directory"
        raise UserError(f"imagefolder: needs --source, a directory of images; got {came}")
    if resize is not None and not 1 <= resize <= MAX_PIXELS**0.5:
        raise UserError(f"--resize: expected 1 to {MAX_PIXELS**0.5:.0f} pixels, got {resize}")
    found = scan(source)
    if not found.train:
        raise UserError(
            f"{source}: holds no training images ({', '.join(SUFFIXES)}); check --source"
            + "".join(f"; {note}" for note in found.notes)
        )
    colour = any(is_colour(path, formats=_FORMATS) for path, _ in (*found.train, *found.test))
    first = found.train[0][0]
    shape = _read_photo(first, resize, colour=colour).shape

    def split(files: list[Labelled]) -> Samples:
        def get(index: int) -> tuple[np.ndarray, int | None]:
            path, label = files[index]
            x = _read_photo(path, resize, colour=colour)
            if x.shape != shape:
                raise UserError(
                    f"{path}: is {x.shape[2]} x {x.shape[1]} pixels, but {first} is "
                    f"{shape[2]} x {shape[1]}; pass --resize {min(shape[1:])} to cut and scale all "
                    "to one size"
                )
            return x, label

        return Samples(len(files), get)

    splits: dict[SplitName, Samples] = {"train": split(found.train)}
    if found.test:
        splits["test"] = split(found.test)
    spec = EventSpec(shape, "image", len(found.classes) or None)
    layout = Layout(spec, 256, labelled=bool(found.classes))
    law = f"images of {source.name}"
    return Original("imagefolder", law, layout, found.classes, splits, notes=found.notes)


def _read_photo(path: Path, resize: int | None, *, colour: bool) -> np.ndarray:
    """(C, H, W) uint8.

    `resize` cuts the middle square out and scales it (Lanczos) to resize x resize.
    """
    from PIL import Image, ImageOps

    image = open_picture(path.read_bytes(), str(path), formats=_FORMATS)
    image = image.convert("RGB" if colour else "L")
    if resize is not None:
        # Cut first: scaling a box of the whole image would blend in what lies around it.
        side = min(image.size)
        image = ImageOps.fit(image, (side, side))
        image = image.resize((resize, resize), Image.Resampling.LANCZOS)
    x = np.asarray(image)
    return x[None] if x.ndim == 2 else np.ascontiguousarray(x.transpose(2, 0, 1))
