"""The page of a run stands alone, says what is wrong, and takes whatever the directory holds."""

from __future__ import annotations

import math
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from ebm_dist.core.errors import UserError
from ebm_dist.core.types import EventSpec
from ebm_dist.export.model_card import last_metrics
from ebm_dist.metrics.jsonl import encode
from ebm_dist.report.grid import save_grid
from ebm_dist.report.health import examine
from ebm_dist.report.html import write_report
from ebm_dist.report.plots import (
    MAX_OTHER_PANELS,
    PANELS,
    Panel,
    collect,
    draw_panel,
    other_panels,
    thin,
)


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        assert tag not in ("script", "link", "iframe")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def page_of(path: Path) -> tuple[str, Page]:
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    return text, page


def a_run(run_dir: Path) -> Path:
    (run_dir / "samples").mkdir(parents=True)
    rows = [
        {"step": step, "epoch": 0, "energy/gap": 0.01, "wait/learner": 0.9, "my/own": 1.0}
        for step in range(0, 200, 10)
    ]
    (run_dir / "metrics.jsonl").write_bytes(b"".join(map(encode, rows)) + b'{"step": 200, "en')
    (run_dir / "config.yaml").write_text("run: {name: <b>bold</b>}\nurl: https://me:hush@host/\n")
    spec = EventSpec((1, 8, 8), "image")
    for step in range(0, 2000, 100):
        x = spec.noise(16, torch.Generator().manual_seed(step))
        save_grid(x, run_dir / "samples" / f"step_{step:08d}.png", spec)
    (run_dir / "samples" / "step_00009999.png").write_bytes(b"\x89PNG torn")
    return run_dir


def test_the_page_holds_curves_samples_config_table_and_health(tmp_path: Path) -> None:
    path = write_report(a_run(tmp_path / "digits"), tmp_path / "out" / "page.html")
    text, page = page_of(path)
    words = " ".join(page.text)
    # 3 curves (one of a metric that no panel knows), 11 pictures of 12 (one is torn).
    assert len(page.sources) == 3 + 11
    assert "step_00000000" in words
    assert "run: {name: <b>bold</b>}" in words
    assert "<b>" not in text
    assert "hush" not in text
    assert "torn lines of metrics.jsonl passed over: 1" in words
    assert "the learner mostly waits for negatives" in words
    assert "workers.num_workers" in words
    assert "share of time that the learner waits for negatives" in words
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["page.html"]


@pytest.mark.parametrize("content", [None, b"", b"\n\n", b'{"step"', b"[1]\nnull\n3\n", b"\xff\0"])
def test_a_run_without_metrics_still_has_a_page(content: bytes | None, tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    if content is not None:
        (tmp_path / "metrics.jsonl").write_bytes(content)
    _, page = page_of(write_report(tmp_path))
    assert "no metrics were found" in " ".join(page.text)


BAD_LINES = {
    "a step that is text": b'{"step": "last", "energy/gap": 1.0}',
    "a step that is a list": b'{"step": [1], "energy/gap": 1.0}',
    "a value of 400 digits": b'{"step": 500, "energy/gap": 1' + 400 * b"0" + b"}",
    "a step of 400 digits": b'{"step": 1' + 400 * b"0" + b', "energy/gap": 1.0}',
    "a value of 5,000 digits": b'{"step": 500, "energy/gap": 1' + 5000 * b"0" + b"}",
    "a name that is half a formula": b'{"step": 500, "my/$\\\\frac{": 1.0, "my/$x": 2.0}',
    "a name that is half a pair": b'{"step": 500, "my/\\ud800": 1.0}',
    "a name without end": b'{"step": 500, "my/' + 10**5 * b"a" + b'": 1.0, "my/b": 1.0}',
    "a value of another kind": b'{"step": 500, "energy/gap": {"a": [1]}}',
    "not finite": b'{"step": 500, "energy/gap": Infinity, "my/a": NaN, "my/b": 1e308}',
    "nested to no end": b"[" * 100_000,
    "another encoding": b'{"step": 500, "my/\xff\xfe": 1.0}',
}


@pytest.mark.parametrize("bad", BAD_LINES)
def test_one_bad_line_or_value_costs_no_page(bad: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    good = encode({"step": 1, "energy/gap": 0.5}) + encode({"step": 2, "energy/gap": 0.25})
    (run / "metrics.jsonl").write_bytes(good + BAD_LINES[bad] + b"\n")
    text, _ = page_of(write_report(run))
    assert "energy/gap" in text
    assert last_metrics(run / "metrics.jsonl")["energy/gap"][1] in (2, 500)


def test_thousands_of_names_are_drawn_in_a_bounded_number_of_pictures() -> None:
    series = {f"my/{number}": [(1, 1.0)] for number in range(5000)}
    assert len(other_panels(series)) == MAX_OTHER_PANELS


def test_a_directory_that_is_no_run_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"RUN_DIR: .*missing is not a directory"):
        write_report(tmp_path / "missing")
    with pytest.raises(UserError, match=r"RUN_DIR: .* holds none of metrics\.jsonl"):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(UserError, match="--out: cannot write"):
        write_report(tmp_path, tmp_path / "metrics.jsonl" / "page.html")


def test_curves_are_in_order_of_step_and_the_later_row_holds() -> None:
    rows = [
        {"step": 10, "epoch": 0, "a": 1},
        {"step": 5, "epoch": 0, "a": 2.0, "b": None, "c": "word", "d": True},
        {"step": 10, "epoch": 1, "a": 3.0},
        {"step": "x", "a": 9.0},
        {"a": 9.0},
    ]
    series = collect(rows)
    assert series["a"] == [(5, 2.0), (10, 3.0)]
    assert math.isnan(series["b"][0][1])
    assert set(series) == {"a", "b"}


def test_a_panel_is_drawn_for_what_was_logged_only() -> None:
    panel = Panel("Energies", ("energy/positive", "energy/negative"), log=True)
    assert draw_panel(panel, {"loss/total": [(0, 1.0)]}) is None
    for values in ([0.0], [math.nan, math.nan], [1.0, math.nan, 2.0], [-1.0, 1.0]):
        pairs = list(enumerate(values))
        png = draw_panel(panel, {"energy/positive": pairs})
        assert png is not None
        assert png.startswith(b"\x89PNG")
        assert png == draw_panel(panel, {"energy/positive": pairs})


def test_thinned_curves_keep_both_ends() -> None:
    steps, values = thin([(i, float(i)) for i in range(100_000)], most=101)
    assert (len(steps), steps[0], steps[-1], values[50]) == (101, 0, 99_999, float(steps[50]))


def constant(**values: float) -> dict[str, list[tuple[int, float]]]:
    return {
        name.replace("__", "/"): [(step, value) for step in range(10)]
        for name, value in values.items()
    }


@pytest.mark.parametrize(
    ("series", "state", "says", "advises"),
    [
        (constant(sampler__acceptance=0.05), "warn", "most moves are refused", "step_size"),
        (constant(chain__self_transition=0.95), "bad", "stand still", "step_size"),
        (constant(flow__ess_ratio=0.1), "warn", "few negatives", "flow.max_lag"),
        (constant(flow__lag_max=9, flow__dropped=7), "warn", "7 chains were dropped", "max_lag"),
        (constant(energy__positive=1e5, energy__negative=1e5), "bad", "1e+05", "energy_l2"),
        (
            constant(buffer__free=1, buffer__leased=1, buffer__ready=1, buffer__capacity=4),
            "bad",
            "not conserved",
            "report it",
        ),
        (constant(energy__gap=-3, energy__noise=5, energy__test=0), "bad", "noise", "num_steps"),
        (constant(energy__gap=3, energy__noise=5, energy__test=0), "warn", "spurious", "reinit"),
        (constant(fidelity__distance=9, fidelity__gaussian=8), "warn", "Gaussian", "longer"),
        ({"loss/total": [(0, 1.0), (10, math.nan)]}, "bad", "from update 10 on", "learner.lr"),
    ],
)
def test_each_sickness_is_found_and_its_remedy_named(
    series: dict, state: str, says: str, advises: str
) -> None:
    findings = examine(series)
    worst = findings[0]
    assert worst.state == state
    assert says in worst.what
    assert advises in worst.advice


def test_a_healthy_run_has_no_complaint_and_old_troubles_are_past() -> None:
    series = constant(energy__gap=0.01, sampler__acceptance=0.6, wait__learner=0.1)
    series["sampler/acceptance"] = [(s, 0.01 if s < 50 else 0.6) for s in range(100)]
    findings = examine(series)
    assert len(findings) == 4
    assert {finding.state for finding in findings} == {"ok"}
    assert examine({}) == []


def test_panels_have_titles_of_their_own() -> None:
    titles = [panel.title for panels in PANELS.values() for panel in panels]
    assert len(titles) == len(set(titles))
