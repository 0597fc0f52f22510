"""A figure draws and says the healthy range of its metric in the run's regime, and no other."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from ebm_dist.metrics.jsonl import encode
from ebm_dist.metrics.names import METRICS
from ebm_dist.report.figure import STRIP, TOP, Curve, Span, figure
from ebm_dist.report.health import OF_A_SAMPLER, judged
from ebm_dist.report.html import render, write_report

GENERATOR = {"sampler": {"temperature": 1e-6, "num_steps": 60}, "buffer": {"reinit_prob": 0.1}}
SAMPLER = {"sampler": {"temperature": 1.0, "num_steps": 60}, "buffer": {"reinit_prob": 0.1}}


def a_run(run_dir: Path, config: Mapping[str, Any], *values: Mapping[str, float]) -> Path:
    """A run that logged each of `values` in a row of its own."""
    run_dir.mkdir()
    rows = [{"step": 10 * k, "epoch": 0, **each} for k, each in enumerate(values)]
    (run_dir / "metrics.jsonl").write_bytes(b"".join(map(encode, rows)))
    (run_dir / "config.yaml").write_text(yaml.safe_dump(dict(config)))
    return run_dir


def of_each(names: Iterable[str], value: float) -> dict[str, list[tuple[int, float]]]:
    return {name: [(0, value), (1, value)] for name in names}


def test_a_generators_page_says_no_range_that_its_regime_does_not_have(tmp_path: Path) -> None:
    stuck = {"chain/stagnant": 1.0, "chain/trace_rhat": 3.0, "energy/gap": 0.0}
    frozen = render(a_run(tmp_path / "frozen", GENERATOR, stuck, stuck))
    assert "as usual at this temperature" in frozen
    for said in ("healthy: ", "at most 0.2", "at most 1.2", 'class="limit"', 'class="mark"'):
        assert said not in frozen, said
    hot = render(a_run(tmp_path / "hot", SAMPLER, stuck, stuck))
    assert "healthy: at most 0.2" in hot
    assert "<td>at most 1.2</td>" in hot
    assert 'class="mark"' in hot


@pytest.mark.parametrize(
    ("name", "fine", "wrong", "says"),
    [
        ("chain/trace_rhat", 1.05, 1.5, "healthy: at most 1.2"),
        ("chain/trace_energy_rhat", 1.05, 1.5, "healthy: at most 1.2"),
        ("chain/alarms", 0.0, 2.0, "healthy: 0"),
        ("flow/lag_max", 4.0, 5.0, "healthy: at most 4"),
        ("flow/dropped", 0.0, 3.0, "healthy: 0"),
        ("fault/restarts", 0.0, 1.0, "healthy: 0"),
        ("buffer/expired_leases", 0.0, 1.0, "healthy: 0"),
        ("fidelity/class_ratio_7", 0.9, 0.1, "healthy: at least 0.2"),
    ],
)
def test_a_value_beyond_its_range_is_marked_and_the_range_is_said(
    name: str, fine: float, wrong: float, says: str
) -> None:
    pairs = [(0, fine), (10, wrong)]
    limits = judged({name: pairs}, {**SAMPLER, "flow": {"max_lag": 4}})
    drawn = figure("t", [Curve(name, pairs, name, limits[name])], anchor="a")
    assert drawn is not None
    assert drawn.lines[0].healthy == says
    assert len(drawn.limits) == 1
    assert [what for _, _, what in drawn.marks] == [f"{wrong:g} at update 10"]


def test_the_ranges_that_hold_for_a_sampler_alone_are_those_of_chains() -> None:
    series = of_each(METRICS.keys() - {"sampler/temperature"}, 0.0)
    lost = judged(series, SAMPLER).keys() - judged(series, GENERATOR).keys()
    assert lost == OF_A_SAMPLER
    assert all(METRICS[name].healthy is not None for name in OF_A_SAMPLER)


@pytest.mark.parametrize(
    ("time", "buffer", "is_judged"),
    [
        (3.0, {}, True),
        (3.1, {}, False),  # chains have no time to agree
        (math.nan, {}, False),
        (3.0, {"context": {"label": "data", "clock": False}}, False),  # each class has a law
        (3.0, {"context": {"label": None, "clock": False}}, True),
        (3.0, {"reinit_prob": 1.0}, False),  # a short-run generator
    ],
)
def test_a_rounds_rhat_is_judged_where_chains_have_one_law_and_the_time_to_visit_it(
    time: float, buffer: Mapping[str, Any], is_judged: bool, tmp_path: Path
) -> None:
    config = {**SAMPLER, "buffer": {**SAMPLER["buffer"], **buffer}}
    row = {"chain/autocorrelation": time, "chain/rhat": 1.3}
    page = render(a_run(tmp_path / "run", config, row, row))
    assert ("healthy: at most 1.1" in page) == is_judged
    assert ("1.3 at update 10" in page) == is_judged


def test_waiting_costs_time_and_is_never_marked_as_wrong() -> None:
    pairs = [(0, 0.1), (10, 0.9)]
    series = {"wait/learner": pairs}
    assert judged(series, {"runtime": {"backend": "inline"}}) == {}
    drawn = figure(
        "t", [Curve("w", pairs, "wait/learner", judged(series)["wait/learner"])], anchor="a"
    )
    assert drawn is not None
    assert drawn.lines[0].healthy == "efficient: at most 0.5"
    assert (len(drawn.limits), drawn.marks) == (1, [])


def test_a_run_is_compared_within_the_range_of_its_own_regime(tmp_path: Path) -> None:
    rows = [{"chain/stagnant": 1.0, "chain/alarms": k, "flow/dropped": 0.0} for k in (0.0, 1.0)]
    runs = [
        a_run(tmp_path / name, config, *rows)
        for name, config in (("frozen", GENERATOR), ("hot", SAMPLER))
    ]
    text = write_report(*runs, out=tmp_path / "both.html").read_text()
    assert text.count("healthy: at most 0.2") == 1  # the second run's alone
    assert text.count("healthy: 0") == 1  # of both, once
    assert text.count("Each line: " + METRICS["chain/stagnant"].meaning) == 1
    assert 'class="strip c1"' in text
    assert "hot: chains stuck" in text


def test_a_runs_colour_and_strip_are_its_own_where_others_logged_nothing() -> None:
    curves = [Curve("a", [], "m"), Curve("b", [(0, 1.0), (9, 2.0)], "m")]
    drawn = figure("t", curves, anchor="a", spans=[Span(0, 5, "b: stuck", 1)])
    assert drawn is not None
    (shade,) = drawn.shades
    assert drawn.lines[0].colour == shade.colour == 1
    assert (shade.y, shade.height) == (TOP + STRIP, STRIP - 1)


def test_lines_of_different_meanings_each_say_theirs() -> None:
    pairs = [(0, 1.0), (1, 1.0)]
    names = ("buffer/free", "buffer/leased")
    drawn = figure("t", [Curve(name, pairs, name) for name in names], anchor="a")
    assert drawn is not None
    assert (drawn.meaning, drawn.healthy) == ("", "")
    assert [line.meaning for line in drawn.lines] == [METRICS[name].meaning for name in names]


def test_every_class_of_samples_is_a_line_of_one_figure(tmp_path: Path) -> None:
    ratios = {f"fidelity/class_ratio_{k}": 1.0 for k in range(12)}
    text = render(a_run(tmp_path / "run", GENERATOR, ratios, {**ratios, "energy/gap": math.nan}))
    (drawn,) = [part for part in text.split("</figure>") if "Classes of samples<" in part]
    places = [drawn.index(f"{name} <") for name in ratios]
    assert places == sorted(places)
    assert drawn.count("share of samples that are of class K") == 1
    assert 'class="c3 again"' in drawn  # a twelfth line is told from the fourth
