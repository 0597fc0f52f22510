"""Progress of a command on stderr, with the time left: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

INTERVAL_S = 10.0
"""Between lines, where there is no terminal."""


@contextlib.contextmanager
def progress(title: str) -> Iterator[Stages]:
    """Shows the stages of a command while the context lasts."""
    console = Console(stderr=True)
    columns = (TextColumn(title), BarColumn(), TextColumn("{task.fields[text]}"))
    with Progress(
        *columns,
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        yield Stages(title, bar, bar.add_task(title, total=None, text=""))


class Stages:
    """The stages of a command, one after another, each with steps that take about as long."""

    def __init__(self, title: str, bar: Progress, task: TaskID) -> None:
        self._title, self._bar, self._task = title, bar, task
        self.begin("")

    def begin(self, text: str) -> None:
        """Begin a stage that `text` names."""
        self._text = text
        self._began = self._said = time.monotonic()
        self._bar.reset(self._task, total=None, text=text)
        if text and self._bar.disable:
            self._print(text)

    def step(self, done: int, total: int, text: str = "") -> None:
        """`done` of `total` steps of the stage are made; `text` stands in place of its name."""
        text = text or self._text
        self._bar.update(self._task, completed=done, total=total, text=text)
        now = time.monotonic()
        if self._bar.disable and now - self._said >= INTERVAL_S and done:
            self._said = now
            left = round((now - self._began) * (total - done) / done)
            minutes = f"{left // 60} min " if left >= 60 else ""
            self._print(f"{done / total:.0%}, {text}, about {minutes}{left % 60} s left")

    def _print(self, text: str) -> None:
        print(f"{self._title}: {text}", file=sys.stderr, flush=True)
