"""Commands say how far they are and how long it will take."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import get_args

import pytest
import torch

from ebm_dist import energies, samplers
from ebm_dist.commands import progress
from ebm_dist.core.types import EventSpec
from ebm_dist.data import DataConfig, describe
from ebm_dist.evaluation import Fidelity, log_partition, long_run_audit, ood_report
from ebm_dist.evaluation.likelihood import _stages_left
from ebm_dist.export import suites
from ebm_dist.export.reader import open_export
from ebm_dist.export.writer import write_export
from ebm_dist.samplers import make


def test_where_there_is_no_terminal_a_line_every_ten_seconds_has_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with progress.progress("density") as stages:
        stages.begin("log Z")
        for done in range(1, 5):
            now += 5.0
            stages.step(done, 40)
        stages.begin("drawing")  # the time of the stage before does not count
        now += 11.0
        stages.step(2, 4, "mean energy 1.5")
    assert capsys.readouterr().err.splitlines() == [
        "density: log Z",
        "density: 5%, log Z, about 3 min 10 s left",
        "density: 10%, log Z, about 3 min 0 s left",
        "density: drawing",
        "density: 50%, mean energy 1.5, about 11 s left",
    ]


def half_square(x: torch.Tensor) -> torch.Tensor:
    return x.square().sum(1) / 2


@pytest.mark.parametrize("growth", [0.0, 0.2, 1.0])
def test_the_pilot_knows_how_many_stages_are_left_of_equal_and_of_growing_steps(
    growth: float,
) -> None:
    steps = [(1 + growth) ** k for k in range(30)]
    b = [sum(steps[:k]) / sum(steps) for k in range(31)]
    for done in range(2, 31):
        assert _stages_left(b[: done + 1]) == pytest.approx(30 - done, abs=0.01)


def test_the_pilot_counts_evenly_to_its_end_though_most_of_its_stages_are_at_small_b() -> None:
    """A model a hundred times narrower than its base: half of the stages are below b = .01."""
    stages: dict[str, list[tuple[int, int]]] = {}
    log_partition(
        lambda x: 1e4 * half_square(x),
        EventSpec((20,), "real"),
        generator=torch.Generator().manual_seed(0),
        num_chains=4,
        num_temperatures=5,
        say=lambda text: stages.update({text: []}),
        on_step=lambda done, total: stages[[*stages][-1]].append((done, total)),
    )
    pilot, _ = stages.values()
    percents = [done for done, _ in pilot]
    assert {total for _, total in pilot} == {100}
    assert percents[0] == 0
    assert percents[-1] == 100
    assert max(after - before for before, after in pairwise(percents)) <= 20


@pytest.mark.parametrize("of", ["log_partition", "ood_report", "long_run_audit"])
def test_measurements_that_take_long_count_their_steps_from_few_to_all(of: str) -> None:
    steps: list[tuple[int, int]] = []
    generator = torch.Generator().manual_seed(0)
    x = torch.empty(20, 2).normal_(generator=generator)

    def count(done: int, total: int) -> None:
        steps.append((done, total))

    if of == "log_partition":
        log_partition(
            half_square,
            EventSpec((2,), "real"),
            generator=generator,
            num_chains=4,
            num_temperatures=5,
            say=lambda text: steps.clear(),
            on_step=count,
        )
    elif of == "ood_report":
        ood_report(half_square, x, {"far": x + 9, "near": x + 1}, on_step=count)
    else:
        kernel = make("langevin", step_size=0.1, temperature=1.0)
        long_run_audit(
            half_square,
            kernel,
            x,
            x,
            short_steps=2,
            num_steps=20,
            generator=generator,
            chunk=5,
            on_step=count,
        )
    done, totals = zip(*steps)
    assert len(steps) >= 4
    assert list(done) == sorted({*done})
    assert len({*totals}) == 1
    assert totals[0] - 1 <= done[-1] <= totals[0]


@pytest.mark.parametrize("suite", get_args(suites.Suite))
def test_every_stage_of_a_suite_counts_its_steps_to_their_end(
    suite: suites.Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without them a stage shows no time left."""
    monkeypatch.setattr(suites, "log_partition", partial(log_partition, num_temperatures=5))
    monkeypatch.setattr(Fidelity, "fit", staticmethod(partial(Fidelity.fit, num_epochs=1)))
    monkeypatch.setattr("ebm_dist.export.sample.NUM_STEPS", 3)
    data = DataConfig(source="digits")
    spec = describe(data)
    section = energies.FAMILY.section("mlp", widths=[8], num_classes="data").bind(spec)
    write_export(
        tmp_path / "model",
        energy=section.build(),
        section=section,
        spec=spec,
        sampler=samplers.FAMILY.section("langevin", step_size=0.05, temperature=1.0, num_steps=10),
        about={"data": data.model_dump(mode="json")},
    )
    stages: dict[str, list[tuple[int, int]]] = {}
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        stages[text] = []

    suites.evaluate(
        open_export(tmp_path / "model"),
        suite,
        say=say,
        on_step=lambda done, total: stages[said[-1]].append((done, total)),
    )
    assert stages
    for text, steps in stages.items():
        assert len(steps) >= 2, text
        done, totals = zip(*steps)
        assert list(done) == sorted({*done}), text
        assert len({*totals}) == 1, text
        assert totals[0] - 1 <= done[-1] <= totals[0], text
