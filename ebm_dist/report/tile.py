"""Tiles images into one picture, with numpy only."""

from __future__ import annotations

import math

import numpy as np

BETWEEN = (170, 180, 200)
"""Colour of the gaps: neither black nor white, so that the edges of binary images stay visible."""
GAP = 1
"""Pixels between two images."""
MIN_SIDE = 480
"""Pixels of the longer side of an enlarged picture."""


def tile(images: np.ndarray, *, num_columns: int | None = None) -> np.ndarray:
    """One picture (H', W', 3) uint8 from `images` (N, C, H, W) in [-1, 1], row by row.

    One channel is drawn grey, three as RGB; for other numbers the mean over channels is drawn.
    Values outside [-1, 1] are clipped. Non-finite values are magenta, so that broken chains are
    visible.

    Raises:
        ValueError: `images` is not (N, C, H, W) with at least one image.
    """
    images = np.asarray(images, dtype=np.float32)
    if images.ndim != 4 or min(images.shape) < 1:
        raise ValueError(f"images must have shape (N, C, H, W) with N >= 1, got {images.shape}")
    num, channels, height, width = images.shape
    if channels not in (1, 3):
        images = images.mean(axis=1, keepdims=True)
    broken = ~np.isfinite(images).all(axis=1)  # (N, H, W)
    scaled = np.rint((np.clip(np.nan_to_num(images), -1.0, 1.0) + 1.0) * 127.5).astype(np.uint8)
    pixels = np.broadcast_to(scaled.transpose(0, 2, 3, 1), (num, height, width, 3)).copy()
    pixels[broken] = (255, 0, 255)

    columns = min(num, num_columns or math.ceil(math.sqrt(num)))
    rows = math.ceil(num / columns)
    picture = np.full(
        (rows * (height + GAP) + GAP, columns * (width + GAP) + GAP, 3), BETWEEN, dtype=np.uint8
    )
    for index in range(num):
        top = GAP + (index // columns) * (height + GAP)
        left = GAP + (index % columns) * (width + GAP)
        picture[top : top + height, left : left + width] = pixels[index]
    return picture


def enlarge(picture: np.ndarray) -> np.ndarray:
    """`picture` (H, W, 3) enlarged until its longer side has `MIN_SIDE` pixels.

    Repeats pixels by an integer factor, so that browsers do not blur small images.
    """
    factor = max(1, math.ceil(MIN_SIDE / max(picture.shape[:2])))
    return picture.repeat(factor, axis=0).repeat(factor, axis=1)
