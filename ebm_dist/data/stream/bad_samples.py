"""`data.on_bad_sample`: an unusable sample stops the run, or is left out and counted."""

from __future__ import annotations

import logging
from typing import Literal

from ebm_dist.core.errors import UserError, one_line

Policy = Literal["stop", "skip"]

_log = logging.getLogger("ebm_dist")

_MAX_NAMED = 10


class BadSamples:
    """Raises the error of a bad sample, or counts it and logs the first few."""

    def __init__(self, policy: Policy) -> None:
        self.skips = policy == "skip"
        self.num = 0
        """Samples left out so far; a bad sample counts once per epoch."""
        self._named: set[str] = set()

    def add(self, error: UserError) -> None:
        if not self.skips:
            raise error
        self.num += 1
        line = one_line(error)
        if len(self._named) < _MAX_NAMED and line not in self._named:
            self._named.add(line)
            more = "; further ones are only counted" if len(self._named) == _MAX_NAMED else ""
            _log.warning("data: left out: %s%s", line, more)
