"""Curves as the places of an SVG's lines, ticks and marks; the template draws them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from ebm_dist.core.errors import one_line
from ebm_dist.metrics.names import describe
from ebm_dist.metrics.progress import number
from ebm_dist.report.plots import Pairs, thin

WIDTH, HEIGHT = 400, 220
LEFT, RIGHT, TOP, BOTTOM = 54, 8, 8, 22
MAX_POINTS = 400
MAX_MARKS = 12
STRIP = 6
"""Height of a run's row in which its alarms are drawn, where several runs are compared."""


@dataclass(frozen=True, slots=True)
class Curve:
    """One line: what it is called, and its points as they were logged."""

    label: str
    pairs: Pairs
    metric: str
    """The metric's name, for what it means."""
    healthy: tuple[float, float] | None = None
    """The metric's healthy range in the run's regime; None: not judged."""


@dataclass(frozen=True, slots=True)
class Line:
    label: str
    colour: int
    path: str
    dots: list[tuple[float, float]]
    last: str
    meaning: str
    """Empty if it is that of all lines of the figure."""
    healthy: str
    """The same."""


@dataclass(frozen=True, slots=True)
class Shade:
    """Updates that are shaded: the whole height, or a strip of a run's colour."""

    x: float
    y: float
    width: float
    height: float
    what: str
    colour: int | None


@dataclass(frozen=True, slots=True)
class Figure:
    """What the template draws, in the coordinates of a box of WIDTH x HEIGHT."""

    title: str
    anchor: str
    about: str
    unit: str
    meaning: str
    """What all lines mean, where there are several of one meaning."""
    healthy: str
    """The healthy range of all lines, where there are several of one meaning."""
    lines: list[Line]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    limits: list[float] = field(default_factory=list)
    """Heights of the ends of the healthy range, where they are in view."""
    marks: list[tuple[float, float, str]] = field(default_factory=list)
    """Points that are not healthy, and what they are."""
    shades: list[Shade] = field(default_factory=list)
    """The times in which an alarm sounded."""


@dataclass(frozen=True, slots=True)
class Span:
    """Updates from `start` to `end` in which something happened."""

    start: int
    end: int
    what: str
    run: int | None = None
    """The run's place among several on the page; None where it is alone."""


def spans_of(pairs: Pairs, what: str, run: int | None = None) -> list[Span]:
    """The stretches in which a count so far rose, over single rows in which it did not."""
    found: list[Span] = []
    for (before, low), (step, high) in pairwise(pairs):
        if not high > low:
            continue
        if found and before - found[-1].end <= step - before:
            found[-1] = Span(found[-1].start, step, what, run)
        else:
            found.append(Span(before, step, what, run))
    return found


def figure(
    title: str,
    curves: Sequence[Curve],
    *,
    anchor: str,
    log: bool = False,
    about: str = "",
    spans: Sequence[Span] = (),
) -> Figure | None:
    """The figure of `curves`; None where none of them has a point.

    A curve's colour is its place among `curves`, also where others have no point.
    """
    colours = [place for place, curve in enumerate(curves) if curve.pairs]
    curves = [curve for curve in curves if curve.pairs]
    if not curves:
        return None
    thinned = [_plottable(curve.pairs) for curve in curves]
    values = [v for pairs in thinned for _, v in pairs if math.isfinite(v)]
    log = log and bool(values) and min(values) > 0
    steps = [step for pairs in thinned for step, _ in pairs]
    across = _Axis(min(steps), max(steps), LEFT, WIDTH - RIGHT)
    up = _Axis(*_room(values, log), HEIGHT - BOTTOM, TOP, log=log)
    limits = sorted({end for c in curves for end in c.healthy or () if math.isfinite(end)})
    units = {metric.unit for c in curves if (metric := describe(c.metric)) is not None}
    lines = [
        _line(curve, pairs, colour, across, up)
        for curve, pairs, colour in zip(curves, thinned, colours)
    ]
    meaning, healthy = _shared(lines)
    return Figure(
        title=one_line(title)[:60],
        anchor=anchor,
        about=about,
        unit=units.pop() if len(units) == 1 and units != {"1"} else "",
        meaning=meaning,
        healthy=healthy,
        lines=[
            replace(
                line,
                meaning="" if meaning else line.meaning,
                healthy="" if healthy else line.healthy,
            )
            for line in lines
        ],
        x_ticks=[(across(t), number(t)) for t in across.ticks() if t == int(t)],
        y_ticks=[(up(t), number(t)) for t in up.ticks()],
        limits=[up(limit) for limit in limits if up.low <= limit <= up.high],
        marks=list(_marks(curves, across, up)),
        shades=list(_shades(spans, across)),
    )


def healthy_text(limits: tuple[float, float] | None) -> str:
    """The range in words, "" where there is none."""
    if limits is None:
        return ""
    low, high = limits
    if low == high:
        return number(low)
    if math.isfinite(low) and math.isfinite(high):
        return f"{number(low)} to {number(high)}"
    return f"at least {number(low)}" if math.isfinite(low) else f"at most {number(high)}"


class _Axis:
    """From numbers to places."""

    def __init__(
        self, low: float, high: float, start: float, end: float, *, log: bool = False
    ) -> None:
        self.low, self.high, self.log = low, high, log
        self._start, self._end = start, end
        self._from, self._to = self._scaled(low), self._scaled(high)

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def __call__(self, value: float) -> float:
        # Of a single point the ends are the same.
        size = (self._to - self._from) or 1.0
        share = (self._scaled(value) - self._from) / size
        return round(self._start + share * (self._end - self._start), 1)

    def ticks(self) -> list[float]:
        from matplotlib.ticker import LogLocator, MaxNLocator

        locators: list[LogLocator | MaxNLocator] = [MaxNLocator(4)]
        if self.log:
            # Within a decade or two the powers of ten leave an axis without a tick.
            locators = [LogLocator(numticks=6), LogLocator(subs=(1, 2, 5)), *locators]
        for locator in locators:
            found = [float(t) for t in locator.tick_values(self.low, self.high)]
            inside = [t for t in found if self.low <= t <= self.high]
            if len(inside) > 1:
                return inside
        return [self.low]


def _plottable(pairs: Pairs) -> Pairs:
    # Beyond this the ticks of an axis overflow.
    steps, values = thin(pairs, MAX_POINTS)
    return [(s, v if abs(v) < 1e100 else math.nan) for s, v in zip(steps, values)]


def _room(values: Sequence[float], log: bool) -> tuple[float, float]:
    """The ends of the axis: those of the values, with a little room."""
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    if log:
        return low / 1.1, high * 1.1
    pad = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - pad, high + pad


def _line(curve: Curve, pairs: Pairs, colour: int, across: _Axis, up: _Axis) -> Line:
    segments: list[list[tuple[float, float]]] = [[]]
    for step, value in pairs:
        if math.isfinite(value):
            segments[-1].append((across(step), up(value)))
        elif segments[-1]:
            segments.append([])
    path = " ".join(
        "M" + " L".join(f"{x:g} {y:g}" for x, y in segment) for segment in segments if segment
    )
    few = len(pairs) < 30
    dots = [point for s in segments if few or len(s) == 1 for point in s]
    metric = describe(curve.metric)
    healthy = healthy_text(curve.healthy)
    if healthy:
        healthy = f"{'efficient' if _costs_time(curve) else 'healthy'}: {healthy}"
    return Line(
        label=one_line(curve.label)[:80],
        colour=colour,
        path=path,
        dots=dots,
        last=number(curve.pairs[-1][1]),
        meaning=metric.meaning if metric else "",
        healthy=healthy,
    )


def _costs_time(curve: Curve) -> bool:
    metric = describe(curve.metric)
    return metric is not None and metric.costs_time


def _shared(lines: Sequence[Line]) -> tuple[str, str]:
    """The meaning and the healthy range of several lines; empty where they differ."""
    meanings, ranges = {line.meaning for line in lines}, {line.healthy for line in lines}
    if len(lines) == 1 or len(meanings) > 1:
        return "", ""
    return meanings.pop(), ranges.pop() if len(ranges) == 1 else ""


def _shades(spans: Sequence[Span], across: _Axis) -> Iterator[Shade]:
    for span in spans:
        if span.end < across.low or span.start > across.high:
            continue
        left = across(max(span.start, across.low))
        width = max(1.5, across(min(span.end, across.high)) - left)
        if span.run is None:
            yield Shade(left, TOP, width, HEIGHT - TOP - BOTTOM, span.what, None)
        else:
            y = TOP + STRIP * span.run
            yield Shade(left, y, width, STRIP - 1, span.what, span.run)


def _marks(curves: Sequence[Curve], across: _Axis, up: _Axis) -> Iterator[tuple[float, float, str]]:
    """The unhealthy points, an even choice of each curve's."""
    for curve in curves:
        low, high = curve.healthy or (-math.inf, math.inf)
        if _costs_time(curve):
            low, high = -math.inf, math.inf
        bad = [(s, v) for s, v in _plottable(curve.pairs) if not low <= v <= high]
        steps, values = thin(bad, MAX_MARKS) if bad else ([], [])
        for step, value in zip(steps, values):
            # A value that is not finite has no height: its mark stands on the axis.
            y = up(value) if math.isfinite(value) else float(HEIGHT - BOTTOM)
            yield across(step), y, f"{number(value)} at update {step:,}"
