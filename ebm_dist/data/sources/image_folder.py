"""Reads a folder of PNG, JPEG, BMP, WebP and TIFF images."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ebm_dist.core.errors import UserError
from ebm_dist.core.types import EventSpec
from ebm_dist.data.format.decode import Layout
from ebm_dist.data.format.manifest import SplitName
from ebm_dist.data.format.picture import cut, is_colour, read_picture
from ebm_dist.data.sources.folder_scan import SUFFIXES, Labelled, scan
from ebm_dist.data.sources.original import Original, Samples, channels_first

_FORMATS = ("PNG", "JPEG", "BMP", "WebP", "TIFF")


def load(
    source: Path | None,
    *,
    labels: Path | None = None,
    crop: int | None = None,
    resize: int | None = None,
) -> Original:
    """The images of `source`, sorted by `folder_scan.scan`; all in colour if one of them is."""
    if source is None or not source.is_dir():
        came = "none" if source is None else f"{source}, which is not a directory"
        raise UserError(f"imagefolder: needs --source, a directory of images; got {came}")
    found = scan(source, labels)
    if not found.train:
        raise UserError(
            f"{source}: holds no training images ({', '.join(SUFFIXES)}); check --source"
            + "".join(f"; {note}" for note in found.notes)
        )
    colour = any(is_colour(path, formats=_FORMATS) for path, _ in (*found.train, *found.test))
    first = found.train[0][0]

    def read(path: Path) -> np.ndarray:
        image = read_picture(path, formats=_FORMATS).convert("RGB" if colour else "L")
        return channels_first(cut(image, str(path), crop=crop, resize=resize))

    shape = read(first).shape

    def split(files: list[Labelled]) -> Samples:
        def get(index: int) -> tuple[np.ndarray, int | None]:
            path, label = files[index]
            x = read(path)
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
