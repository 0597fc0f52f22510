"""Decodes the members of a shard into arrays, and checks their sizes before it allocates memory.

Nothing is unpickled: pillow reads PNG and JPEG images, `.npy` headers with an object dtype are
refused, and a label is an integer in text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ebm_dist.core.errors import UserError
from ebm_dist.core.types import EventKind, EventSpec
from ebm_dist.data.format.npy import read_npy
from ebm_dist.data.format.picture import IMAGE_EXTENSIONS, open_picture

DATA_EXTENSIONS = (*IMAGE_EXTENSIONS, "npy")
TOGETHER = "The members of a sample must follow each other in the tar (tar --sort=name)"

PICKLE_EXTENSIONS = ("pyd", "pickle", "pkl", "pck", "p", "pt", "pth", "joblib", "dill")
"""Members that webdataset or others would unpickle; a shard that holds one is refused."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The format of the stored samples of one data set."""

    spec: EventSpec
    """The events as stored, before binarisation and flattening."""
    levels: int | None
    """Grey levels of an 8-bit image; None if x is stored as floats or bits."""
    labelled: bool
    member: str | None = None

    @property
    def dtype(self) -> np.dtype[Any]:
        """uint8 if a byte holds every value exactly, else float32."""
        exact = self.levels is not None or self.spec.discrete
        return np.dtype(np.uint8 if exact else np.float32)


def decode_sample(sample: Mapping[str, Any], layout: Layout) -> tuple[np.ndarray, int | None]:
    """x (*shape) in `layout.dtype` and the label of one webdataset sample.

    Raises:
        UserError: names a shard and sample that do not fit `layout`.
    """
    where = place(sample)
    x = fit(_read_member(sample, layout.member, where), layout, where)
    label = read_label(sample, where)
    advice = f"give every sample a .cls member or none. {TOGETHER}"
    check_label(label, layout, where, name=".cls label", advice=advice)
    return x, label


def check_label(
    label: int | None, layout: Layout, where: str, *, name: str = "label", advice: str
) -> None:
    """Refuse a label that `layout` does not have, and a missing one that it has.

    Args:
        name: how messages call the label.
        advice: what to change where some samples have labels and others have none.
    """
    if layout.labelled != (label is not None):
        came, others = ("a", "none") if label is not None else ("no", "one")
        raise UserError(f"{where}: has {came} {name}, but the first sample has {others}; {advice}")
    num_classes = layout.spec.num_classes
    if label is not None and num_classes is not None and label >= num_classes:
        raise UserError(
            f"{where}: label {label}, but there are {num_classes} classes, 0 to "
            f"{num_classes - 1}; correct the {name} or data.num_classes"
        )


def guess_layout(
    sample: Mapping[str, Any],
    *,
    kind: EventKind | None,
    num_classes: int | None,
    member: str | None,
) -> Layout:
    """The layout of plain shards, guessed from their first sample.

    PNG, JPEG and uint8 arrays of 2 or 3 dimensions are images, bool arrays are binary, other arrays
    real; `kind` overrides that.
    """
    where = place(sample)
    x = _read_member(sample, member, where)
    labelled = read_label(sample, where) is not None
    if num_classes is not None and not labelled:
        raise UserError(
            f"{where}: has no .cls label, but data.num_classes is {num_classes}; add the labels "
            f"or leave data.num_classes out. {TOGETHER}"
        )
    return layout_of(x, where, kind=kind, labelled=labelled, num_classes=num_classes, member=member)


def layout_of(
    x: np.ndarray,
    where: str,
    *,
    kind: EventKind | None,
    labelled: bool,
    num_classes: int | None,
    member: str | None = None,
) -> Layout:
    """The layout guessed from the event `x`; see `guess_layout`."""
    if kind is None:
        if x.dtype == np.uint8 and x.ndim in (2, 3):
            kind = "image"
        else:
            kind = "binary" if x.dtype == np.bool_ else "real"
    levels = 256 if kind == "image" and x.dtype == np.uint8 else None
    shape = _as_image(x, where).shape if kind == "image" else x.shape
    if not shape or 0 in shape:
        raise UserError(
            f"{where}: an event of shape {tuple(x.shape)} holds no numbers"
            + ("" if shape else " but is one; give it the shape (1,)")
        )
    layout = Layout(EventSpec(shape, kind, num_classes), levels, labelled, member)
    fit(x, layout, where)
    return layout


def place(sample: Mapping[str, Any]) -> str:
    return f"{sample['__url__']}: sample {sample['__key__']!r}"


def read_label(sample: Mapping[str, Any], where: str) -> int | None:
    """The `.cls` member as an integer of at least 0; None if there is none."""
    data = sample.get("cls")
    if data is None:
        for name in sample:
            if name.endswith(".cls"):
                raise UserError(
                    f"{where}: its label is the member .{name}, since a key ends at the first dot "
                    "of the name; rename the members so that only the extension follows a dot"
                )
        return None
    text = bytes(data[:40]).decode("ascii", "replace").strip()
    # Checked first, since int() accepts '1_0' and '+1', and takes minutes for a megabyte of digits.
    if not (text.isascii() and text.isdigit() and len(text) <= 9):
        raise UserError(f"{where}: .cls must hold an integer from 0, got {text[:20]!r}")
    return int(text)


def _read_member(sample: Mapping[str, Any], member: str | None, where: str) -> np.ndarray:
    names = [name for name in sample if not name.startswith("__")]
    for name in names:
        if name.rsplit(".", 1)[-1] in PICKLE_EXTENSIONS:
            raise UserError(
                f"{where}: member .{name} is a pickle, which runs code when it is read; store "
                "arrays as .npy and images as .png"
            )
    if member is not None:
        if member not in sample:
            raise UserError(
                f"{where}: has no member .{member} (data.member); it holds "
                + (", ".join("." + name for name in names) or "nothing")
                + f". {TOGETHER}"
            )
        chosen = member
    else:
        found = [name for name in names if name.rsplit(".", 1)[-1] in DATA_EXTENSIONS]
        if len(found) != 1:
            held = ", ".join("." + name for name in names) or "nothing"
            advice = "say which by data.member" if found else f"write x as one of these. {TOGETHER}"
            if any("." in name for name in found):
                advice += "; a key ends at the first dot of the name"
            raise UserError(f"{where}: expected one of .png, .jpg, .npy, got {held}; {advice}")
        chosen = found[0]
    data = bytes(sample[chosen])
    return read_npy(data, where) if chosen.endswith("npy") else _read_image(data, where)


def _read_image(data: bytes, where: str) -> np.ndarray:
    """(H, W) or (H, W, 3), uint8."""
    return np.asarray(open_picture(data, where, formats=("PNG", "JPEG")))


def _as_image(x: np.ndarray, where: str) -> np.ndarray:
    """(H, W), (H, W, C) or (C, H, W) with C of 1 or 3 -> (C, H, W)."""
    if x.ndim == 2:
        return x[None]
    if x.ndim == 3:
        first, last = x.shape[0] in (1, 3), x.shape[2] in (1, 3)
        if first and not last:
            return x
        if last and not first:
            return np.ascontiguousarray(x.transpose(2, 0, 1))
        if first and x.shape[1] == x.shape[2]:
            return x
    raise UserError(
        f"{where}: an image must be (H, W), (H, W, C) or (C, H, W) with 1 or 3 channels, got "
        f"{tuple(x.shape)}; set data.kind: real if it is none"
    )


def fit(x: np.ndarray, layout: Layout, where: str) -> np.ndarray:
    """`x` in the layout's shape and dtype; raises UserError if it does not fit."""
    spec = layout.spec
    if spec.kind == "image":
        x = _as_image(x, where)
        wants_colour = spec.shape[0] == 3
        if layout.levels is not None and wants_colour and x.shape == (1, *spec.shape[1:]):
            # Folders of JPEGs mix grey and colour files; a grey image has three equal channels.
            x = np.repeat(x, 3, axis=0)
    if x.shape != spec.shape:
        raise UserError(
            f"{where}: shape {tuple(x.shape)}, but the data set has {spec.shape}; bring all "
            "samples to one shape (`ebm-dist data prepare imagefolder` has --resize, and makes "
            "all images colour where one is)"
        )
    return fit_numbers(x, layout, where)


def fit_numbers(x: np.ndarray, layout: Layout, where: str) -> np.ndarray:
    """Events `x` (..., *shape) in the layout's dtype; raises UserError if they do not fit."""
    spec = layout.spec
    if layout.levels is not None:
        if x.dtype != np.uint8:
            raise UserError(f"{where}: {x.dtype} image among 8-bit images; store all as one dtype")
        return x
    if not np.isfinite(x).all():
        raise UserError(f"{where}: holds NaN or infinity; leave the sample out")
    if spec.discrete:
        if not ((x == 0) | (x == 1)).all():
            raise UserError(
                f"{where}: {spec.kind} data must be 0 and 1, got values from {x.min()} to {x.max()}"
            )
        if spec.kind == "categorical" and not (x.sum(axis=-1) == 1).all():
            raise UserError(f"{where}: categorical data must be one-hot in its last axis")
        return x.astype(np.uint8)
    with np.errstate(over="ignore"):
        stored, x = x, x.astype(np.float32)
    if not np.isfinite(x).all():
        raise UserError(
            f"{where}: {stored.dtype} values up to {np.abs(stored).max():.3g} are too large for "
            "float32; rescale them"
        )
    if spec.kind == "image" and (x.min() < -1 or x.max() > 1):
        raise UserError(
            f"{where}: a float image must lie in [-1, 1], got values from {x.min()} to {x.max()}; "
            "rescale it, or store uint8"
        )
    return x
