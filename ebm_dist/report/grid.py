"""Samples of any kind of event as one PNG: `save_grid`."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ebm_dist.core.types import EventSpec
from ebm_dist.files.durable import replacing
from ebm_dist.report.tile import enlarge, tile

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL import Image

MAX_POINTS = 20_000
"""More dots than this only blacken a scatter plot."""


def save_grid(
    x: Tensor,
    path: str | os.PathLike[str],
    spec: EventSpec,
    *,
    num_columns: int | None = None,
    condition: Tensor | None = None,
) -> Path:
    """Draw samples `x` (N, *event) into the PNG file `path` and return it.

    image: a grid; real (2,): a scatter; real (1,) or (): a histogram; other real events, binary
    and categorical ones: heat maps, one-hot classes by their index. The same input gives the same
    bytes.

    Args:
        num_columns: images or maps in a row; a square grid when left out.
        condition: of each sample (N, ...), drawn at its left if they differ in the last axis alone.

    Raises:
        ValueError: `x` does not fit `spec`, or holds no sample.
    """
    if tuple(x.shape[1:]) != tuple(spec.shape) or x.shape[0] < 1:
        raise ValueError(
            f"x must have shape (N, {', '.join(map(str, spec.shape))}) with N >= 1, "
            f"got {tuple(x.shape)}"
        )
    path = Path(path)
    values = x.detach().float().cpu()
    if condition is not None and condition.shape[:-1] == x.shape[:-1]:
        values = torch.cat([condition.detach().float().cpu(), values], -1)
        spec = replace(spec, shape=tuple(values.shape[1:]))
    if spec.kind == "image":
        pixels = enlarge(tile(values.numpy(), num_columns=num_columns))
        _write_pixels(pixels, path)
    elif spec.kind == "real" and values[0].numel() <= 2:
        flat = values.reshape(len(values), -1)
        plot = _histogram if flat.shape[1] == 1 else _scatter
        _write_figure(lambda axes: plot(axes, flat), path, size=(5.0, 5.0))
    else:
        _save_maps(values, path, spec, num_columns)
    return path


def picture(x: Tensor, *, num_columns: int | None = None) -> Image.Image:
    """Images `x` (N, C, H, W) in [-1, 1] as one picture, row by row; a notebook shows it.

    Args:
        num_columns: images in a row; a square grid when left out.
    """
    from PIL import Image

    pixels = tile(x.detach().float().cpu().numpy(), num_columns=num_columns)
    return Image.fromarray(enlarge(pixels))


def _write_pixels(pixels: np.ndarray, path: Path) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:  # a reader (W&B, a browser) must never meet half a picture
        Image.fromarray(pixels).save(file, format="PNG")


def _write_figure(plot: Callable[[Axes], Any], path: Path, *, size: tuple[float, float]) -> None:
    figure = new_figure(size)
    plot(figure.add_subplot())
    save_figure(figure, path)


def new_figure(size: tuple[float, float]) -> Figure:
    """A figure of `size` inches on the Agg canvas, whatever the display or the user's rc."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)  # not pyplot: it keeps global state, and a GUI loop on a desktop
    return figure


def save_figure(figure: Figure, path: Path, *, dpi: int = 100) -> None:
    """Write `figure` to `path` as PNG, without the version stamp that changes its bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=dpi, metadata={"Software": None})


def _histogram(axes: Axes, flat: Tensor) -> None:
    values = flat[:, 0][flat[:, 0].isfinite()].numpy()
    if len(values):
        axes.hist(values, bins=64, density=True, color="tab:blue")
    axes.set_xlabel("x")
    axes.set_ylabel("density")


def _scatter(axes: Axes, flat: Tensor) -> None:
    points = flat[flat.isfinite().all(dim=1)][:MAX_POINTS]
    # Dots shrink as they multiply, so that 64 samples are seen and 20,000 show a density.
    size = float(np.clip(4000.0 / max(len(points), 1), 0.5, 16.0))
    axes.scatter(points[:, 0], points[:, 1], s=size, alpha=0.6, color="tab:blue", linewidths=0)
    axes.set_aspect("equal", adjustable="datalim")
    axes.set_xlabel("x0")
    axes.set_ylabel("x1")


def _save_maps(values: Tensor, path: Path, spec: EventSpec, num_columns: int | None) -> None:
    """Heat maps: a two-dimensional event is a panel each, a vector is one row of one panel."""
    classes = None
    if spec.kind == "categorical":
        classes = spec.shape[-1]
        values = values.argmax(dim=-1).float()
    elif spec.kind == "binary":
        classes = 2
    colours, low, high = _colours(values, classes)
    if values.ndim <= 2:
        panel = values.reshape(len(values), -1)[:256].numpy()

        def plot(axes: Axes) -> None:
            axes.imshow(
                panel, cmap=colours, vmin=low, vmax=high, aspect="auto", interpolation="nearest"
            )
            axes.set_xlabel("site")
            axes.set_ylabel("sample")

        _write_figure(plot, path, size=(6.0, 5.0))
        return
    from matplotlib import colormaps

    # Leading axes of an event (channels, layers) become rows of its panel.
    panels = values[:64].reshape(len(values[:64]), -1, values.shape[-1])
    scaled = ((panels - low) / max(high - low, 1e-12)).clamp(0, 1)
    rgb = colormaps[colours](scaled.numpy())[..., :3]  # (N, H, W, 3)
    images = np.moveaxis(rgb, -1, 1) * 2.0 - 1.0
    _write_pixels(enlarge(tile(images, num_columns=num_columns)), path)


def _colours(values: Tensor, classes: int | None) -> tuple[str, float, float]:
    if classes == 2:
        return "gray", 0.0, 1.0
    if classes is not None:
        return ("tab20" if classes <= 20 else "viridis"), 0.0, float(classes - 1)
    finite = values[values.isfinite()]
    bound = float(finite.abs().max()) if finite.numel() else 1.0
    return "coolwarm", -max(bound, 1e-12), max(bound, 1e-12)
