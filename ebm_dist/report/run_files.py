"""What a run directory still holds, read for a report: nothing in it is trusted or required."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ebm_dist.config.text import read_yaml
from ebm_dist.core.errors import UserError
from ebm_dist.files.safe_open import open_to_read, read_bytes
from ebm_dist.metrics.credentials import scrub_known
from ebm_dist.metrics.jsonl import METRICS_FILE, SUPERSEDED_FILE, decode
from ebm_dist.report.plots import Pairs, collect

MAX_PICTURES = 12
MAX_PICTURE_BYTES = 400_000


@dataclass(frozen=True, slots=True)
class Picture:
    """One sample grid."""

    name: str
    step: int
    source: str
    """A data URI."""


class RunFiles:
    """The run in `path`; missing, empty or torn parts are as if they were not there."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            UserError: `path` is no directory of a run.
        """
        if not path.is_dir():
            raise UserError(f"RUN_DIR: {path} is not a directory; give the directory of a run")
        known = (METRICS_FILE, "config.yaml", "manifest.json", "samples", "checkpoints")
        if not any((path / name).exists() for name in known):
            raise UserError(
                f"RUN_DIR: {path} holds none of {', '.join(known)}; give the directory of a run"
            )
        self.path = path
        self.name = path.resolve().name
        self.superseded = SUPERSEDED_FILE if (path / SUPERSEDED_FILE).exists() else None
        self.num_torn = 0
        self.series: dict[str, Pairs] = collect(self._rows())

    def _rows(self) -> list[dict[str, object]]:
        rows = []
        try:
            with open_to_read(self.path / METRICS_FILE) as file:
                for line in file:
                    row = decode(line)
                    if row is not None:
                        rows.append(row)
                    elif line.strip():
                        self.num_torn += 1
        except OSError:
            pass
        return rows

    @property
    def last_step(self) -> int | None:
        return max((pairs[-1][0] for pairs in self.series.values()), default=None)

    @cached_property
    def config_text(self) -> str | None:
        """The config without secrets, None where it is missing."""
        try:
            return scrub_known(read_bytes(self.path / "config.yaml").decode(errors="replace"))
        except OSError:
            return None

    @cached_property
    def config(self) -> Mapping[str, Any] | None:
        """The config as data, None where it is missing or no mapping."""
        try:
            config = read_yaml(self.config_text or "")
        except ValueError:
            return None
        return config if isinstance(config, dict) else None

    @cached_property
    def pictures(self) -> list[Picture]:
        """First, last and an even choice between: what changed is seen without every picture."""
        files = self._pictures_in("samples")
        last, count = len(files) - 1, min(len(files), MAX_PICTURES)
        chosen = sorted({round(i * last / max(count - 1, 1)) for i in range(count)})
        return [
            Picture(files[i].stem, _step_of(files[i]), source)
            for i in chosen
            if (source := _embedded(files[i]))
        ]

    @cached_property
    def neighbours(self) -> Picture | None:
        """The last picture of chains beside their nearest training images."""
        for file in reversed(self._pictures_in("samples", "neighbours")):
            if source := _embedded(file):
                return Picture(file.stem, _step_of(file), source)
        return None

    def _pictures_in(self, *names: str) -> list[Path]:
        directory = self.path
        for name in names:
            directory /= name
            if not directory.is_dir() or directory.is_symlink():
                return []
        return sorted(directory.glob("*.png"), key=lambda file: (_step_of(file), file.name))


def _step_of(path: Path) -> int:
    numbers = re.findall(r"\d+", path.stem)
    return int(numbers[-1]) if numbers else -1


def _embedded(path: Path) -> str | None:
    """The picture as a data URI, made smaller if it is large; None if it is no picture."""
    from PIL import Image

    try:
        data = read_bytes(path)
        with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
            picture.load()
            if len(data) > MAX_PICTURE_BYTES:
                small = picture.convert("RGB")
                small.thumbnail((640, 640))
                buffer = io.BytesIO()
                small.save(buffer, format="PNG")
                data = buffer.getvalue()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    return "data:image/png;base64," + base64.b64encode(data).decode()
