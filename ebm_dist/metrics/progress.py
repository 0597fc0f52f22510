"""Terminal output of the driver while it trains: a live view."""

from __future__ import annotations

import contextlib
import importlib
import math
import threading
import time
from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ebm_dist.core.errors import one_line

PLAIN_EVERY = 10.0
"""Seconds between two lines where the output is not a terminal."""

PANEL_EVERY = 0.5
"""Seconds between two drawings of the panel in a notebook."""

RATE_WINDOW = 60.0
"""Seconds of recent updates from which the time left is estimated."""

NUM_EVENTS = 4
QUIET_AFTER = 20.0
"""Seconds without an update after which the view reports it."""


class TerminalView:
    """A live view of a run, as a context manager.

    On a terminal it is a panel that redraws itself: update, time left, energy gap, MCMC steps/s,
    lag, waiting parts, and the last events. In a notebook the panel is a part of the cell's output
    that redraws itself, and events are lines of their own. Elsewhere (a pipe, a batch system's log)
    it prints one plain line about every ten seconds. No method raises, and the terminal is always
    restored at the end of the block.

    Args:
        total: the update at which the run ends.
        title: the run's name.
        console: where to draw; stdout when left out.
        is_pool: whether parts run beside one another. In one process each waits while another
            works, which says nothing, so the view leaves it out.
    """

    def __init__(
        self, total: int, title: str, console: Console | None = None, *, is_pool: bool = True
    ) -> None:
        self.total = max(int(total), 1)
        self.title = title
        self._console = console if console is not None else Console()
        self._is_pool = is_pool
        self._lock = threading.Lock()
        self._live: Live | None = None
        self._panel: Any = None  # IPython's handle of the output that holds the panel
        self._began = time.monotonic()
        self._step: int | None = None
        self._seen: deque[tuple[float, int]] = deque()
        self._metrics: dict[str, float] = {}
        self._waits = ""
        self._num_compiling = 0
        self._events: deque[str] = deque(maxlen=NUM_EVENTS)
        self._printed = -math.inf

    def __enter__(self) -> TerminalView:
        self._began = time.monotonic()
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            live = Live(console=self._console, get_renderable=self.render, refresh_per_second=4)
            try:
                live.start()
                self._live = live
            except Exception:  # a failure of the view must not stop a run
                self._live = None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        live, self._live = self._live, None
        if live is None:
            if self._step is not None and error is None:
                self._show()
            return
        try:
            live.stop()
        except Exception:
            self._console.show_cursor(True)

    def update(
        self,
        step: int,
        metrics: Mapping[str, float] | None = None,
        waits: str = "",
        num_compiling: int = 0,
    ) -> None:
        """Show learner update `step` and the newest `metrics`.

        Args:
            waits: the parts that wait.
            num_compiling: workers that compile their steps beside their rounds.
        """
        try:
            now = time.monotonic()
            with self._lock:
                self._step = int(step)
                self._metrics.update(metrics or {})
                self._waits = waits
                self._num_compiling = num_compiling
                # After a rollback the old pairs would give a negative rate.
                if self._seen and self._seen[-1][1] > self._step:
                    self._seen.clear()
                self._seen.append((now, self._step))
                while len(self._seen) > 2 and now - self._seen[0][0] > RATE_WINDOW:
                    self._seen.popleft()
            every = PANEL_EVERY if self._console.is_jupyter else PLAIN_EVERY
            if self._live is None and now - self._printed >= every:
                self._printed = now
                self._show()
        except Exception:
            return

    def say(self, line: str) -> None:
        """Show an event: in the panel with the last few, elsewhere as a line of its own."""
        text = one_line(" ".join(str(line).split()))
        if self._live is not None:
            with self._lock:
                self._events.append(f"{time.strftime('%H:%M:%S')}  {text}")
        else:
            self._print(text)

    def seconds_left(self) -> float | None:
        """Seconds to the end at the rate of the last minute; None before a rate is known."""
        with self._lock:
            if self._step is None:
                return None
            if self._step >= self.total:
                return 0.0
            if len(self._seen) < 2:
                return None
            (start, first), (end, last) = self._seen[0], self._seen[-1]
            if last <= first or end <= start:
                return None
            # Also counts down between updates, so that the display of a slow run does not freeze.
            left = (self.total - last) * (end - start) / (last - first)
            return max(0.0, left - (time.monotonic() - end))

    def line(self) -> str:
        """The view as one plain line."""
        step = self._step or 0
        parts = [f"{self.title}: update {step:,}/{self.total:,} ({step / self.total:.0%})"]
        parts += [f"{label} {text}" for label, text in self._facts()]
        waits = self._waiting()
        if waits:
            parts.append(f"waits: {waits}")
        parts.append(f"elapsed {clock(time.monotonic() - self._began)}")
        parts.append(f"left {clock(self.seconds_left())}")
        return ", ".join(parts)

    def render(self) -> RenderableType:
        """The view as a rich renderable."""
        step = self._step or 0
        head = Table.grid(expand=True, padding=(0, 2, 0, 0))
        head.add_column(no_wrap=True)
        head.add_column(ratio=1)
        head.add_column(no_wrap=True, justify="right")
        head.add_row(
            f"update [bold]{step:,}[/] of {self.total:,}",
            ProgressBar(total=self.total, completed=min(step, self.total)),
            f"time left [bold]{clock(self.seconds_left())}[/]",
        )
        facts = Text()
        for label, value in self._facts():
            facts.append(f"{label} ", style="dim")
            facts.append(f"{value}   ", style="bold")
        rows: list[RenderableType] = [head, facts]
        waits = self._waiting()
        if waits:
            rows.append(Text.assemble(("waits ", "dim"), (waits, "yellow")))
        rows += [
            Text(event, style="dim", no_wrap=True, overflow="ellipsis")
            for event in list(self._events)
        ]
        elapsed = clock(time.monotonic() - self._began)
        return Panel(
            Group(*rows),
            title=Text(self.title),
            title_align="left",
            subtitle=f"elapsed {elapsed}",
            subtitle_align="right",
            border_style="cyan",
        )

    def _facts(self) -> list[tuple[str, str]]:
        with self._lock:
            metrics, num = dict(self._metrics), self._num_compiling
        facts = [("compiling on", f"{num} worker{'s'[: num != 1]}")] if num else []
        if "energy/gap" in metrics:
            facts.append(("energy gap", number(metrics["energy/gap"])))
        if speed := metrics.get("throughput/mcmc_steps_per_s"):  # 0 in a run without chains
            facts.append(("MCMC steps/s", number(speed)))
        if "throughput/updates_per_s" in metrics:
            facts.append(("updates/s", number(metrics["throughput/updates_per_s"])))
        if "flow/lag_mean" in metrics:
            text = number(metrics["flow/lag_mean"])
            if "flow/lag_max" in metrics:
                text += f" (max {number(metrics['flow/lag_max'])})"
            facts.append(("lag", text))
        for name, label in (
            ("fidelity/distance", "Fréchet"),
            ("likelihood/log_prob", "log p"),
            ("loss/total", "loss"),
        ):
            if name in metrics:
                facts.append((label, number(metrics[name])))
        return facts

    def _waiting(self) -> str:
        with self._lock:
            waits, metrics = self._waits, dict(self._metrics)
            quiet = time.monotonic() - (self._seen[-1][0] if self._seen else self._began)
        shares = [
            f"{who} {metrics[name]:.0%} of the time"
            for name, who in (("wait/learner", "learner"), ("wait/worker", "workers"))
            if math.isfinite(metrics.get(name, math.nan))
        ]
        parts = [waits or ", ".join(shares)] if self._is_pool and (waits or shares) else []
        if quiet > QUIET_AFTER and (self._step or 0) < self.total:
            parts.append(f"no update for {clock(quiet)}")
        return "; ".join(parts)

    def _show(self) -> None:
        """Draw the progress where there is no terminal."""
        if not self._console.is_jupyter:
            self._print(self.line())
            return
        with contextlib.suppress(Exception):  # a failure of the view must not stop a run
            if self._panel is None:
                display = importlib.import_module("IPython.display").display
                self._panel = display(self.render(), display_id=True)
            else:
                self._panel.update(self.render())

    def _print(self, text: str) -> None:
        try:
            # Not wrapped and not coloured, so that grep works on these lines.
            self._console.print(
                Text(text), soft_wrap=True, highlight=False, markup=False, no_wrap=True
            )
        except Exception:
            return


def number(value: float) -> str:
    """`value` in at most a handful of characters."""
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e6:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def clock(seconds: float | None) -> str:
    """`seconds` as 1:05 or 2:03:04; `--:--` if unknown."""
    if seconds is None or not math.isfinite(seconds):
        return "--:--"
    whole = int(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"
