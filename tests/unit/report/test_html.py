"""The page of a run stands alone, says what is wrong, and takes whatever the directory holds."""

from __future__ import annotations

import base64
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from ebm_dist.core.errors import UserError
from ebm_dist.core.types import EventSpec
from ebm_dist.export.model_card import last_metrics
from ebm_dist.metrics.jsonl import encode
from ebm_dist.metrics.names import METRICS
from ebm_dist.report.explanation import explanation
from ebm_dist.report.figure import HEIGHT, LEFT, RIGHT, WIDTH, Curve, Figure, figure, spans_of
from ebm_dist.report.grid import save_grid
from ebm_dist.report.health import GENERATOR, examine, judged
from ebm_dist.report.html import MAX_RUNS, write_report
from ebm_dist.report.plots import MAX_OTHER_PANELS, PANELS, collect, other_panels, thin
from ebm_dist.report.rules import RULES


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.figures = 0
        self.text: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img", "input"):
            self.open.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "srcset")]
        self.links += [value or "" for name, value in attrs if name in ("href", "xlink:href")]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.figures += tag == "svg"
        assert tag not in ("script", "link", "iframe", "object", "embed", "base", "form")
        assert not any(name.startswith("on") for name, _ in attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def page_of(path: Path) -> tuple[str, Page]:
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert all(link.removeprefix("#") in page.ids for link in page.links)
    assert len(page.ids) == len(set(page.ids))
    assert "url(" not in text
    assert "@import" not in text
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
    path = write_report(a_run(tmp_path / "digits"), out=tmp_path / "out" / "page.html")
    text, page = page_of(path)
    words = " ".join(page.text)
    # 3 curves (one of a metric that no panel knows), 11 pictures of 12 (one is torn).
    assert page.figures == 3
    assert len(page.sources) == 11
    assert "step_00000000" in words
    assert "run: {name: <b>bold</b>}" in words
    assert "<b>" not in text
    assert "hush" not in text
    assert "torn lines of metrics.jsonl passed over: 1" in words
    assert "the learner mostly waits for negatives" in words
    assert "workers.num_workers" in words
    assert METRICS["wait/learner"].meaning in words
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["page.html"]


def test_the_page_shows_the_last_picture_of_nearest_training_images(tmp_path: Path) -> None:
    run_dir = a_run(tmp_path / "digits")
    pictures = [run_dir / "samples" / f"step_{step:08d}.png" for step in (100, 200)]
    (run_dir / "samples" / "neighbours").mkdir()
    for picture in pictures:
        shutil.copy(picture, run_dir / "samples" / "neighbours")
    (run_dir / "samples" / "neighbours" / "step_00009999.png").write_bytes(b"\x89PNG torn")
    _, page = page_of(write_report(run_dir))
    assert len(page.sources) == 12
    assert page.sources[-1].endswith(base64.b64encode(pictures[1].read_bytes()).decode())
    assert "Chains of update 200, two in a row" in " ".join(page.text)


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
        write_report(tmp_path, out=tmp_path / "metrics.jsonl" / "page.html")
    with pytest.raises(UserError, match="--out: missing; several runs"):
        write_report(tmp_path, tmp_path)
    with pytest.raises(UserError, match=f"at most {MAX_RUNS} are compared"):
        write_report(*[tmp_path] * (MAX_RUNS + 1), out=tmp_path / "page.html")


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


def drawn(pairs: list[tuple[int, float]], metric: str = "energy/positive", **options) -> Figure:
    found = figure("t", [Curve(metric, pairs, metric)], anchor="a", **options)
    assert found is not None
    return found


@pytest.mark.parametrize("log", [True, False])
@pytest.mark.parametrize(
    "values",
    [[0.0], [math.nan, math.nan], [1.0, math.nan, 2.0], [-1.0, 1.0], [1e300, 1.0], [5.0] * 40],
)
def test_every_series_is_a_figure_inside_its_box(values: list[float], log: bool) -> None:
    found = drawn(list(enumerate(values)), log=log)
    numbers = re.findall(r"-?[\d.]+(?:e[+-]?\d+)?|nan|inf", found.lines[0].path)
    assert all(0 <= float(number) <= max(WIDTH, HEIGHT) for number in numbers)
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in found.lines[0].dots)
    assert found.y_ticks
    assert figure("t", [Curve("a", [], "a")], anchor="a") is None


def test_a_gap_of_numbers_that_are_not_finite_stays_a_gap() -> None:
    line = drawn([(0, 1.0), (1, 2.0), (2, math.nan), (3, 1.0), (4, 2.0)]).lines[0]
    assert line.path.count("M") == 2
    # Higher values stand higher, and later ones to the right.
    (x0, y0), (x1, y1) = line.dots[:2]
    assert x1 > x0
    assert y1 < y0


def test_alarms_are_drawn_where_they_sounded() -> None:
    pairs = [(0, 0.1), (10, 0.5), (20, 0.9), (30, 0.3)]
    spans = spans_of(
        [(0, 0.0), (10, 0.0), (20, 1.0), (30, 2.0), (50, 2.0), (60, 2.0), (70, 3.0)], "stuck"
    )
    assert [(span.start, span.end) for span in spans] == [(10, 30), (60, 70)]
    curve = Curve("self", pairs, "chain/self_transition", (-math.inf, 0.8))
    found = figure("t", [curve], anchor="a", spans=spans[:1])
    assert found is not None
    (mark,) = found.marks
    assert mark[2] == "0.9 at update 20"
    assert len(found.limits) == 1
    (shade,) = found.shades
    assert (shade.x, shade.what) == (found.lines[0].dots[1][0], "stuck")
    assert shade.x + shade.width == pytest.approx(found.lines[0].dots[3][0])
    assert found.lines[0].healthy == "healthy: at most 0.8"
    late = figure("t", [Curve("self", pairs[2:], "self")], anchor="a", spans=spans)
    assert late is not None
    (shade,) = late.shades
    assert (shade.x, shade.width) == (
        late.lines[0].dots[0][0],
        pytest.approx(WIDTH - LEFT - RIGHT),
    )


def test_the_page_is_for_phones_and_for_dark_rooms(tmp_path: Path) -> None:
    text, page = page_of(write_report(a_run(tmp_path / "digits")))
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    assert "@media (prefers-color-scheme: dark)" in text
    words = " ".join(page.text)
    assert words.rindex("Last values") > words.index("config.yaml")
    assert text.count('<input type="radio"') == 11
    assert text.count(" checked") == 1
    assert "#figure-energy-gap" in page.links  # from the verdict to its curve
    assert "more: docs/flow.md, “How many workers”" in words
    # What the docs say there stands in the page itself, which may be read far from them.
    assert "`" not in explanation("docs/flow.md#How many workers")
    assert explanation("docs/flow.md#How many workers") in text


def test_what_the_verdicts_refer_to_is_in_the_docs() -> None:
    root = Path(__file__).parents[3]
    pages = {page for _, page, _ in RULES} | {"docs/report.md#Two regimes"}
    for page in pages:
        assert len(explanation(page)) > 100
        assert "href" not in explanation(page)
        file, heading = page.split("#")
        assert re.search(rf"^#+ {re.escape(heading)}$", (root / file).read_text(), re.MULTILINE), (
            page
        )


HOSTILE = "</style></pre><script>alert(1)</script><img src=http://x/ onerror=a><!--"


def test_what_comes_from_a_runs_files_is_text_wherever_it_stands(tmp_path: Path) -> None:
    runs = []
    for number in range(2):
        run = tmp_path / f"{number}<script>&'\" onload='x"
        run.mkdir()
        rows = [{"step": 1, HOSTILE: 1.0, "energy/gap": 0.5}, {"step": 2, "energy/gap": 0.1}]
        (run / "metrics.jsonl").write_bytes(b"".join(map(encode, rows)))
        config = f"'{HOSTILE}': '{number}'\nrun: '{HOSTILE}{number}'\n"
        (run / "config.yaml").write_text(config)
        (run / "samples").mkdir()
        grid = save_grid(torch.zeros(4, 1, 4, 4), tmp_path / "g.png", EventSpec((1, 4, 4), "image"))
        grid.rename(run / "samples" / "<script>alert(1)<!--.png".replace("/", ""))
        runs.append(run)
    for page in (write_report(runs[0]), write_report(*runs, out=tmp_path / "both.html")):
        text, _ = page_of(page)
        assert "<script" not in text
        assert "<!--" not in text
        assert "&lt;script" in text


def test_several_runs_are_one_page_of_their_differences(tmp_path: Path) -> None:
    runs = [a_run(tmp_path / name) for name in ("first", "second")]
    for run, lr in zip(runs, ("0.001", "0.002"), strict=True):
        (run / "config.yaml").write_text(f"run: {{name: a}}\nlearner: {{lr: {lr}}}\n")
    text, page = page_of(write_report(*runs, out=tmp_path / "both.html"))
    words = " ".join(" ".join(page.text).split())
    assert page.figures == 2  # energy/gap and wait/learner
    assert "learner.lr 0.001 0.002" in words
    assert "run.name" not in words
    assert "my/own" in words
    assert len(page.sources) == 2  # the last grid of each
    assert text.count("the learner mostly waits") == 2
    assert page.links.count("#figure-wait-learner") == 2
    again = a_run(tmp_path / "elsewhere" / "first")
    words = " ".join(page_of(write_report(runs[0], again, out=tmp_path / "both.html"))[1].text)
    assert str(again) in words  # two of one name are told apart by their places


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
        (
            constant(
                fidelity__class_ratio_1=0.9,
                fidelity__class_ratio_3=0.1,
                fidelity__class_ratio_12=0.0,
                buffer__capacity=8,
            ),
            "warn",
            "samples miss 2 of 3 classes (3, 12)",
            "reinit_prob",
        ),
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


def test_a_run_in_one_process_is_not_told_that_its_learner_waits() -> None:
    series = constant(wait__learner=0.9)
    (finding,) = examine(series, {"runtime": {"backend": "ray"}})
    assert "waits" in finding.what
    assert examine(series, {"runtime": {"backend": "inline"}}) == []
    assert len(examine(series, {"runtime": 3})) == 1


STUCK = {"chain/stagnant": 0.9, "chain/self_transition": 0.9}


@pytest.mark.parametrize(
    ("logged", "config"),
    [
        ({"sampler/temperature": 5e-6}, None),
        ({}, {"sampler": {"step_size": 10.0, "noise_std": 0.01}}),
        ({"sampler/temperature": 1.0}, {"buffer": {"reinit_prob": 1.0}}),
    ],
)
def test_chains_of_a_short_run_generator_keep_their_mode_and_are_no_alarm(logged, config) -> None:
    series = {name: [(1, value)] for name, value in {**STUCK, **logged}.items()}
    findings = examine(series, config)
    assert {finding.state for finding in findings} == {"note"}
    assert all(GENERATOR in finding.what and not finding.advice for finding in findings)
    assert "landscape" in GENERATOR
    assert {finding.page for finding in findings} == {"docs/report.md#Two regimes"}
    assert not judged(series, config).keys() & STUCK.keys()


@pytest.mark.parametrize(
    ("temperature", "config"),
    [
        (1.0, None),
        (1.0, {"sampler": 3, "buffer": {"reinit_prob": "much"}}),
        (5e-6, {"buffer": {"reinit_prob": 0.0}}),  # frozen, and nothing starts anew
        (math.nan, {"sampler": {"step_size": 1e-300, "noise_std": 1e200}}),
        (math.nan, {"sampler": {"step_size": 10**400, "noise_std": True}}),
    ],
)
def test_chains_of_a_sampler_that_keep_their_mode_are_an_alarm(temperature, config) -> None:
    logged = {**STUCK, "sampler/temperature": temperature}
    series = {name: [(1, value)] for name, value in logged.items()}
    assert {finding.state for finding in examine(series, config)} == {"bad"}
    assert judged(series, config).keys() >= STUCK.keys()


def test_values_like_those_of_the_default_recipe_show_no_warning() -> None:
    series = constant(
        energy__positive=0.02,
        energy__negative=0.03,
        energy__gap=-0.01,
        energy__noise=0.4,
        energy__test=0.02,
        loss__total=0.1,
        sampler__temperature=5e-6,
        chain__stagnant=1.0,
        chain__self_transition=0.0,
        flow__lag_max=1,
        flow__repaired=40,
        wait__learner=0.8,
        fault__restarts=0,
        fidelity__distance=3.0,
        fidelity__gaussian=12.0,
        **{f"fidelity__class_ratio_{k}": 0.7 for k in range(10)},
    )
    assert {finding.state for finding in examine(series)} == {"ok", "note"}


def test_faults_have_figures_only_in_a_run_that_had_some(tmp_path: Path) -> None:
    counts = ("fault/restarts", "fault/rollbacks", "buffer/late_checkins", "flow/lost")
    for name, restarts in (("calm", 0.0), ("rough", 2.0)):
        (tmp_path / name).mkdir()
        row = {"epoch": 0, "energy/gap": 0.0, **dict.fromkeys(counts, 0.0)}
        rows = [{"step": step, **row} for step in (0, 10)]
        rows[-1]["fault/restarts"] = restarts
        (tmp_path / name / "metrics.jsonl").write_bytes(b"".join(map(encode, rows)))

    def figures(*names: str) -> list[str]:
        runs = [tmp_path / name for name in names]
        _, page = page_of(write_report(*runs, out=tmp_path / "page.html"))
        return [id for id in page.ids if id.startswith("figure-")]

    assert figures("calm") == ["figure-energy-gap"]
    assert figures("rough") == ["figure-energy-gap", "figure-fault-restarts"]
    assert figures("calm", "rough") == ["figure-energy-gap", "figure-fault-restarts"]


def test_panels_have_titles_of_their_own() -> None:
    titles = [panel.title for panels in PANELS.values() for panel in panels]
    assert len(titles) == len(set(titles))
