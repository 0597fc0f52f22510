"""`data.on_bad_sample`: samples that will not do stop the run, or are left out and counted."""

from __future__ import annotations

import logging
from typing import Literal

from ebm_dist.core.errors import UserError, one_line

Policy = Literal["stop", "skip"]

_log = logging.getLogger("ebm_dist")

_MAX_NAMED = 10


class BadSamples:
    """Told of each bad sample: raises the error, or counts it and names the first few."""

    def __init__(self, policy: Policy) -> None:
        self.skips = policy == "skip"
        self.num = 0
        """Left out so far; a sample counts each time that an epoch meets it."""
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
