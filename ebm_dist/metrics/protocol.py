"""The interface of a sink, to which the hub passes on what it has written to its files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class Sink(Protocol):
    """Takes one item after another, in one thread."""

    def put(self, item: Mapping[str, Any]) -> None:
        """Take an item; may raise."""
        ...

    def close(self, exit_code: int = 0) -> None:
        """Send what is left; `exit_code` is 0 for a run that did not fail."""
        ...
