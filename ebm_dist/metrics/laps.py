"""Measures what the time of a run went into, for its last screen."""

from __future__ import annotations

import time


class Laps:
    """The seconds of each part of a run, in order."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.monotonic()

    def end(self, name: str, *, of_which: tuple[str, float] | None = None) -> None:
        """End the part `name`; `of_which` names seconds in it that count as a part of their own."""
        now = time.monotonic()
        self.seconds[name], self._since = now - self._since, now
        if of_which is not None:
            self.seconds[name] -= of_which[1]
            self.seconds[of_which[0]] = of_which[1]

    def __str__(self) -> str:
        minutes, seconds = divmod(round(sum(self.seconds.values())), 60)
        total = f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
        parts = ", ".join(f"{value:.0f} s {name}" for name, value in self.seconds.items())
        return f"{total}: {parts}"
