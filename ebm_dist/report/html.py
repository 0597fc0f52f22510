"""One self-contained HTML page about a run, or about several beside each other."""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from ebm_dist.core.errors import UserError
from ebm_dist.files.durable import write_output
from ebm_dist.metrics.names import describe
from ebm_dist.metrics.progress import number
from ebm_dist.report.explanation import explanation
from ebm_dist.report.figure import (
    HEIGHT,
    LEFT,
    RIGHT,
    WIDTH,
    Curve,
    Figure,
    Span,
    figure,
    healthy_text,
    spans_of,
)
from ebm_dist.report.health import examine, judged
from ebm_dist.report.plots import FAULTS, PANELS, names_in, other_panels
from ebm_dist.report.run_files import RunFiles

MAX_RUNS = 8
"""Runs on one page: there are as many colours that can be told apart."""

STUCK, CHAINS = "chains stuck", "Sampler and chains"
"""The alarm about chains, and the section whose figures it is drawn on."""

_ALARMS = {
    "chain/alarms": STUCK,
    "fault/restarts": "actors restarted",
    "fault/rollbacks": "went back to a checkpoint",
}


def write_report(
    *run_dirs: str | os.PathLike[str], out: str | os.PathLike[str] | None = None
) -> Path:
    """Write the page about `run_dirs` to `out`; `run_dir/report.html` where there is one.

    Pictures are inside the file, so that it can be sent to somebody. Missing, empty or torn
    parts of the directory are left out of the page, which says so.

    Returns:
        The page's path.

    Raises:
        UserError: one is no directory of a run, or `out` is missing or cannot be written.
    """
    if len(run_dirs) > MAX_RUNS:
        raise UserError(
            f"RUN_DIR: {len(run_dirs)} runs, at most {MAX_RUNS} are compared; name fewer"
        )
    runs = [Path(run) for run in run_dirs]
    if out is None and len(runs) > 1:
        raise UserError(
            "--out: missing; several runs are compared in one page: name its file, e.g. --out "
            "comparison.html"
        )
    path = Path(out) if out is not None else runs[0] / "report.html"
    write_output(path, render(runs[0]) if len(runs) == 1 else compare(runs))
    return path


def render(run_dir: Path) -> str:
    """The page about one run as text."""
    run = RunFiles(run_dir)
    limits = judged(run.series, run.config)
    spans = _alarms(run)
    sections = {}
    for section, panels in {**PANELS, "Other": other_panels(run.series)}.items():
        figures = [
            figure(
                panel.title,
                _eventful(
                    section,
                    [
                        Curve(name, run.series.get(name, []), name, limits.get(name))
                        for name in names_in(panel, run.series)
                    ],
                ),
                # Of names that are a run's own two may differ in signs that an anchor cannot hold.
                anchor=_anchor(panel.names[0]) if section in PANELS else f"figure-other-{index}",
                log=panel.log,
                about=panel.about,
                spans=_shown_in(section, spans),
            )
            for index, panel in enumerate(panels)
        ]
        sections[section] = [drawn for drawn in figures if drawn]
    return _page(
        "one_run.html",
        title=run.name,
        run=run,
        lead=_lead(run),
        findings=examine(run.series, run.config),
        sections={name: figures for name, figures in sections.items() if figures},
        anchors=_anchors(sections),
        alarms=[what for what, found in spans.items() if found],
        rows=list(_table(run, limits)),
    )


def compare(run_dirs: Sequence[Path]) -> str:
    """The page about several runs as text: verdicts, samples, curves and numbers side by side."""
    runs = [RunFiles(path) for path in run_dirs]
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = str(run.path)
    known = {name for run in runs for name in run.series}
    limits = [judged(run.series, run.config) for run in runs]
    spans = [_alarms(run, place) for place, run in enumerate(runs)]
    sections: dict[str, list[Figure]] = {}
    for section, panels in PANELS.items():
        figures = [
            figure(
                f"{panel.title}: {name}" if len(names) > 1 else panel.title,
                _eventful(
                    section,
                    [
                        Curve(run.name, run.series.get(name, []), name, of_run.get(name))
                        for run, of_run in zip(runs, limits)
                    ],
                ),
                anchor=_anchor(name),
                log=panel.log,
                about=panel.about,
                spans=[span for of_run in spans for span in _shown_in(section, of_run)],
            )
            for panel in panels
            for names in [names_in(panel, known)]
            for name in names
        ]
        if drawn := [each for each in figures if each]:
            sections[section] = drawn
    return _page(
        "several_runs.html",
        title=" · ".join(run.name for run in runs),
        runs=runs,
        leads=[_lead(run) for run in runs],
        findings=[examine(run.series, run.config) for run in runs],
        sections=sections,
        anchors=_anchors(sections),
        alarms=[what for what in _ALARMS.values() if any(of_run[what] for of_run in spans)],
        differences=list(_differences(runs)),
        rows=[
            (
                name,
                [number(r.series[name][-1][1]) if r.series.get(name) else "" for r in runs],
                metric.meaning if (metric := describe(name)) else "",
            )
            for name in sorted(known)
        ],
    )


def _alarms(run: RunFiles, place: int | None = None) -> dict[str, list[Span]]:
    """When each alarm sounded, by its words; `place` is the run's among several."""
    return {
        what: spans_of(
            run.series.get(name, []), what if place is None else f"{run.name}: {what}", place
        )
        for name, what in _ALARMS.items()
    }


def _shown_in(section: str, alarms: Mapping[str, Sequence[Span]]) -> list[Span]:
    return [
        span
        for what, spans in alarms.items()
        for span in spans
        if what != STUCK or section == CHAINS
    ]


def _eventful(section: str, curves: list[Curve]) -> list[Curve]:
    """`curves`, or none of them if they count faults and there were none."""
    happened = any(value for curve in curves for _, value in curve.pairs)
    return curves if happened or section != FAULTS else []


def _page(template: str, **values: Any) -> str:
    environment = Environment(
        loader=PackageLoader("ebm_dist.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["explanation"] = explanation  # for macros of other files, too
    box = {"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT}
    return environment.get_template(template).render(
        **values, box=box, written=time.strftime("%Y-%m-%d %H:%M")
    )


def _lead(run: RunFiles) -> str:
    parts = ["no metrics were found"]
    if run.last_step is not None:
        parts = [f"{len(run.series)} metrics up to update {run.last_step:,}"]
    if run.num_torn:
        parts.append(f"torn lines of metrics.jsonl passed over: {run.num_torn}")
    if run.superseded:
        parts.append(f"an earlier attempt's rows are in {run.superseded}")
    return "; ".join([*parts, f"read from {run.path}"])


def _anchor(metric: str) -> str:
    return "figure-" + re.sub(r"[^a-z0-9]+", "-", metric.lower())[:60]


def _anchors(sections: Mapping[str, Sequence[Figure]]) -> dict[str, str]:
    """Metric name to the figure on the page that shows it."""
    drawn = {figure.anchor for figures in sections.values() for figure in figures}
    return {
        name: anchor
        for panels in PANELS.values()
        for panel in panels
        for name in panel.names
        # Of a run every panel has a figure, of a comparison every metric: that one is the nearer.
        for anchor in (_anchor(panel.names[0]), _anchor(name))
        if anchor in drawn
    }


def _table(run: RunFiles, limits: Mapping[str, tuple[float, float]]) -> Iterator[tuple[str, ...]]:
    """Name, last, least and greatest value, healthy range, unit and meaning of each metric."""
    for name in sorted(run.series):
        values = [value for _, value in run.series[name]]
        finite = [value for value in values if math.isfinite(value)]
        low, high = (number(min(finite)), number(max(finite))) if finite else ("", "")
        metric = describe(name)
        unit, meaning = "", ""
        if metric is not None:
            unit, meaning = metric.unit if metric.unit != "1" else "", metric.meaning
        yield name, number(values[-1]), low, high, healthy_text(limits.get(name)), unit, meaning


def _differences(runs: Sequence[RunFiles]) -> Iterator[tuple[str, list[str]]]:
    """The config's keys in which the runs differ, and what each has."""
    flat = [dict(_leaves(run.config or {})) for run in runs]
    for key in sorted({key for each in flat for key in each}):
        values = [each.get(key, "") for each in flat]
        if len(set(values)) > 1:
            yield key, values


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, str(value)
