"""One self-contained HTML page about a run, from whatever its directory still holds."""

from __future__ import annotations

import base64
import html
import io
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ebm_dist.config.text import read_yaml
from ebm_dist.core.errors import UserError
from ebm_dist.files.durable import write_output
from ebm_dist.files.safe_open import open_to_read, read_bytes
from ebm_dist.metrics.credentials import scrub_known
from ebm_dist.metrics.jsonl import METRICS_FILE, SUPERSEDED_FILE, decode
from ebm_dist.metrics.names import describe
from ebm_dist.metrics.progress import number
from ebm_dist.report.health import Finding, examine
from ebm_dist.report.plots import PANELS, Pairs, collect, draw_panel, other_panels

MAX_PICTURES = 12
MAX_PICTURE_BYTES = 400_000

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1180px; padding: 1.5rem;
       color: #1c2733; background: #fff; }
h1 { margin: 0; } h2 { margin-top: 2.2rem; border-bottom: 1px solid #d8dee6; }
.lead { color: #5a6b7d; }
.grid { display: flex; flex-wrap: wrap; gap: .8rem; }
.grid figure { margin: 0; } figcaption { font-size: 12px; color: #5a6b7d; }
.curves img { width: 372px; } .samples img { width: 270px; image-rendering: pixelated; }
table { border-collapse: collapse; font-size: 13px; } td, th { padding: .2rem .7rem;
       border-bottom: 1px solid #e6ebf1; text-align: left; vertical-align: top; }
td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
ul.health { list-style: none; padding: 0; } ul.health li { margin: .3rem 0; padding: .35rem .7rem;
       border-left: 5px solid #3a9d5d; background: #f3f9f5; }
ul.health li.warn { border-color: #d99a1c; background: #fdf8ec; }
ul.health li.bad { border-color: #c8372d; background: #fdf0ef; }
.advice { display: block; color: #5a6b7d; }
pre { background: #f5f7fa; padding: 1rem; overflow-x: auto; font-size: 12.5px; }
"""


def write_report(
    run_dir: str | os.PathLike[str], out: str | os.PathLike[str] | None = None
) -> Path:
    """Write the page about `run_dir` to `out` (`run_dir/report.html` when left out).

    Pictures are inside the file, so that it can be sent to somebody. Missing, empty or torn
    parts of the directory are left out of the page, which says so.

    Returns:
        The page's path.

    Raises:
        UserError: `run_dir` is no directory of a run, or `out` cannot be written.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise UserError(f"RUN_DIR: {run_dir} is not a directory; give the directory of a run")
    known = (METRICS_FILE, "config.yaml", "manifest.json", "samples", "checkpoints")
    if not any((run_dir / name).exists() for name in known):
        raise UserError(
            f"RUN_DIR: {run_dir} holds none of {', '.join(known)}; give the directory of a run"
        )
    out = Path(out) if out is not None else run_dir / "report.html"
    write_output(out, render(run_dir))
    return out


def render(run_dir: Path) -> str:
    """The page as text."""
    rows, num_torn = _rows(run_dir / METRICS_FILE)
    series = collect(rows)
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        f"<title>{_text(run_dir.name)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{_text(run_dir.resolve().name)}</h1>",
        f"<p class='lead'>{_text(_lead(run_dir, series, num_torn))}</p>",
        *_health(series, _settings(run_dir / "config.yaml")),
        *_samples(run_dir / "samples"),
        *_curves(series),
        *_table(series),
        *_config(run_dir / "config.yaml"),
        "</body></html>",
    ]
    return "\n".join(parts)


def _rows(path: Path) -> tuple[list[dict[str, object]], int]:
    """The rows of the file, and how many lines of it were torn."""
    rows, num_torn = [], 0
    try:
        with open_to_read(path) as file:
            for line in file:
                row = decode(line)
                if row is not None:
                    rows.append(row)
                elif line.strip():
                    num_torn += 1
    except OSError:
        pass
    return rows, num_torn


def _lead(run_dir: Path, series: Mapping[str, Pairs], num_torn: int) -> str:
    steps = [pairs[-1][0] for pairs in series.values()]
    parts = [
        f"{len(series)} metrics up to update {max(steps):,}" if steps else "no metrics were found"
    ]
    if num_torn:
        parts.append(f"torn lines of {METRICS_FILE} passed over: {num_torn}")
    if (run_dir / SUPERSEDED_FILE).exists():
        parts.append(f"an earlier attempt's rows are in {SUPERSEDED_FILE}")
    parts.append(f"written {time.strftime('%Y-%m-%d %H:%M')} from {run_dir}")
    return "; ".join(parts)


def _settings(path: Path) -> Mapping[str, Any] | None:
    """The run's config, None where it is missing or no mapping."""
    try:
        config = read_yaml(read_bytes(path).decode(errors="replace"))
    except (OSError, ValueError):
        return None
    return config if isinstance(config, dict) else None


def _health(series: Mapping[str, Pairs], config: Mapping[str, Any] | None) -> Iterator[str]:
    yield "<h2>Health</h2>"
    findings = examine(series, config)
    if not findings:
        yield "<p>No metric that tells it was logged.</p>"
        return
    yield "<ul class='health'>"
    yield from (_finding(finding) for finding in findings)
    yield "</ul>"


def _finding(finding: Finding) -> str:
    sign = {"ok": "✓", "warn": "!", "bad": "✗"}[finding.state]
    advice = f"<span class='advice'>→ {_text(finding.advice)}</span>" if finding.advice else ""
    return f"<li class='{finding.state}'>{sign} {_text(finding.what)}{advice}</li>"


def _samples(directory: Path) -> Iterator[str]:
    pictures = []
    if directory.is_dir() and not directory.is_symlink():
        pictures = sorted(directory.glob("*.png"), key=lambda path: (_step_of(path), path.name))
    figures = []
    # First, last and an even choice between: what changed is seen without every picture.
    last = len(pictures) - 1
    count = min(len(pictures), MAX_PICTURES)
    for index in sorted({round(i * last / max(count - 1, 1)) for i in range(count)}):
        source = _embedded(pictures[index])
        if source:
            name = _text(pictures[index].stem)
            figures.append(
                f"<figure><img alt='{name}' src='{source}'><figcaption>{name}</figcaption></figure>"
            )
    if figures:
        yield "<h2>Samples</h2><div class='grid samples'>"
        yield from figures
        yield "</div>"


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
    return _uri(data)


def _uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _curves(series: Mapping[str, Pairs]) -> Iterator[str]:
    for section, panels in {**PANELS, "Other": other_panels(series)}.items():
        drawn = [(panel, png) for panel in panels if (png := draw_panel(panel, series))]
        if drawn:
            yield f"<h2>{_text(section)}</h2><div class='grid curves'>"
            for panel, png in drawn:
                yield f"<img alt='{_text(panel.title)}' src='{_uri(png)}'>"
            yield "</div>"


def _table(series: Mapping[str, Pairs]) -> Iterator[str]:
    if not series:
        return
    yield "<h2>Last values</h2><table><tr><th>metric</th><th>last</th><th>least</th>"
    yield "<th>greatest</th><th>unit</th><th>what it says</th></tr>"
    for name in sorted(series):
        values = [value for _, value in series[name]]
        finite = [value for value in values if math.isfinite(value)]
        low, high = (number(min(finite)), number(max(finite))) if finite else ("", "")
        metric = describe(name)
        unit, meaning = (metric.unit, metric.meaning) if metric else ("", "")
        yield (
            f"<tr><td>{_text(name)}</td><td class='n'>{number(values[-1])}</td>"
            f"<td class='n'>{low}</td><td class='n'>{high}</td>"
            f"<td>{_text('' if unit == '1' else unit)}</td><td>{_text(meaning)}</td></tr>"
        )
    yield "</table>"


def _config(path: Path) -> Iterator[str]:
    try:
        text = read_bytes(path).decode(errors="replace")
    except OSError:
        return
    yield "<h2>Config</h2>"
    yield f"<details open><summary>{path.name}</summary><pre>{_text(scrub_known(text))}</pre>"
    yield "</details>"


def _text(value: str) -> str:
    return html.escape(value, quote=True)
