"""dataset.json, which describes the content of a directory of prepared shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt, ValidationError

from ebm_dist.core.errors import UserError
from ebm_dist.core.section import Section, one_line_each
from ebm_dist.core.types import EventKind, EventSpec
from ebm_dist.data.format.decode import Layout
from ebm_dist.data.format.shards import ShardFile

FILE_NAME = "dataset.json"
FORMAT, VERSION = "ebm_dist.dataset", 1
_MAX_BYTES = 64 * 2**20

SplitName = Literal["train", "test"]


class ShardEntry(Section):
    """One tar of a split."""

    # A name, not a path: a manifest from elsewhere must not point outside its directory.
    file: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$")
    num_samples: PositiveInt
    num_bytes: PositiveInt
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class EventEntry(Section):
    """The `EventSpec` of the stored samples."""

    shape: tuple[PositiveInt, ...] = Field(min_length=1)
    kind: EventKind
    num_classes: PositiveInt | None = None


class Manifest(Section):
    """The content of dataset.json."""

    format: Literal["ebm_dist.dataset"] = FORMAT
    version: Literal[1] = VERSION
    name: str
    law: str = ""
    """The origin of the samples: a toy's density, or the original files."""
    event: EventEntry
    levels: int | None = Field(default=None, ge=2, le=256)
    """Grey levels of the original; level k is stored as round(255 k / (levels - 1))."""
    classes: tuple[str, ...] = ()
    splits: dict[SplitName, tuple[ShardEntry, ...]]

    @property
    def layout(self) -> Layout:
        event = self.event
        spec = EventSpec(event.shape, event.kind, event.num_classes)
        return Layout(spec, self.levels, labelled=event.num_classes is not None)

    def files(self, split: SplitName, directory: Path) -> list[ShardFile]:
        """The shards of a split, in their order."""
        return [
            ShardFile(directory / entry.file, entry.num_samples, entry.num_bytes, entry.sha256)
            for entry in self.splits.get(split, ())
        ]

    def num_samples(self, split: SplitName) -> NonNegativeInt:
        return sum(entry.num_samples for entry in self.splits.get(split, ()))


def read_manifest(directory: Path) -> Manifest:
    """Read DIRECTORY/dataset.json; raises UserError, which names the file and the fault."""
    path = directory / FILE_NAME
    fix = "prepare the data set again"
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise UserError(f"{path}: more than {_MAX_BYTES} bytes; {fix}")
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); {fix}") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise UserError(f"{path}: is not a {FORMAT} file; {fix}")
    if values.get("version") != VERSION:
        raise UserError(
            f"{path}: format version {values.get('version')!r}, this program reads {VERSION}; {fix}"
        )
    try:
        manifest = Manifest(**values)
    except ValidationError as error:
        raise UserError(f"{path}: {one_line_each(error, Manifest)[0]}; {fix}") from None
    if not manifest.splits.get("train"):
        raise UserError(f"{path}: names no training shards; {fix}")
    return manifest
