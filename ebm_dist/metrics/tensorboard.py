"""Writes metrics to TensorBoard's event files. Only this module imports torch.utils.tensorboard."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


class TensorBoardSink:
    """Writes items into `RUN/tensorboard`, in the thread that calls `put`.

    A resume continues there: TensorBoard hides the old points of the updates that it repeats.
    """

    def __init__(self, folder: Path, *, resume_step: int | None) -> None:
        self.folder = folder
        self._epoch: int | None = None
        self._open(None if resume_step is None else resume_step + 1)

    def _open(self, hidden_from: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(self.folder), purge_step=hidden_from)

    def put(self, item: Mapping[str, Any]) -> None:
        """Write one item; artifacts are left out, since TensorBoard has none."""
        kind, step = item["kind"], item["step"]
        if kind == "row":
            epoch = item["epoch"]
            if self._epoch is not None and epoch > self._epoch:  # the run returned to a checkpoint
                self._writer.close()
                self._open(step)
            self._epoch = epoch
            for name, value in item["values"].items():
                self._writer.add_scalar(name, math.nan if value is None else value, step)
        elif kind == "image":
            self._writer.add_image(item["name"], _pixels(item["path"]), step, dataformats="HWC")
        elif kind == "histogram":
            counts, edges = np.array(item["counts"], float), np.array(item["edges"], float)
            middles = (edges[1:] + edges[:-1]) / 2
            self._writer.add_histogram_raw(
                item["name"],
                min=edges[0],
                max=edges[-1],
                num=counts.sum(),
                sum=counts @ middles,
                sum_squares=counts @ middles**2,
                bucket_limits=edges[1:].tolist(),
                bucket_counts=counts.tolist(),
                global_step=step,
            )
        elif kind == "alert":
            self._writer.add_text(f"alerts/{item['title']}", item["text"], step)

    def close(self, exit_code: int = 0) -> None:
        """Write what is left."""
        self._writer.close()


def _pixels(path: str) -> np.ndarray:
    from PIL import Image

    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))
