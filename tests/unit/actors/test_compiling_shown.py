"""Workers that compile their steps beside their rounds are counted, and the view shows them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from simulation import SimWorker
from small_runs import run
from worlds import World

from ebm_dist.metrics.progress import TerminalView
from ebm_dist.samplers import Engine
from ebm_dist.samplers.compile import engine as engine_module


def test_workers_count_as_compiling_until_they_say_otherwise_or_die(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    moved, compiling = SimWorker.run_round, True

    def told(self: SimWorker, *args: Any) -> Any:
        chains = moved(self, *args)
        return chains and replace(chains, compiling=compiling)

    monkeypatch.setattr(SimWorker, "run_round", told)
    world = World(mode="async", max_lag=5, num_workers=3)

    def counted() -> int:
        for _ in range(10):
            world.update(busy_ticks=5)
        return world.scheduler.workers.members.num_compiling

    assert counted() == 3
    compiling = False
    assert counted() == 0
    compiling = True
    assert counted() == 3
    member = next(iter(world.scheduler.workers.members))
    world.scheduler.workers.replace(member, "its process is gone")
    assert world.scheduler.workers.members.num_compiling == 2


def test_a_run_shows_that_its_worker_compiles_and_then_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown, update = [], TerminalView.update

    def watched(self: TerminalView, step: int, *args: Any) -> None:
        update(self, step, *args)
        shown.append("compiling on 1 worker" in self.line())

    monkeypatch.setattr(TerminalView, "update", watched)
    monkeypatch.setattr(Engine, "compiling", property(lambda self: len(shown) < 3))
    run(tmp_path / "run", "run.steps=8")
    assert shown[0]
    assert not shown[-1]


@pytest.mark.parametrize(
    ("mode", "waits"),
    [("sync", "the first round waits for it"), ("async", "rounds run in single steps until")],
)
def test_a_run_of_compiled_blocks_says_so_before_the_first_round(
    mode: str, waits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        engine_module, "compile_graph", lambda graph, inputs: lambda tensors: graph(*tensors)
    )
    _, screen = run(tmp_path / "run", "sampler.engine=compiled", f"flow.mode={mode}")
    line = f"sampler.engine: compiled compiles the steps now, and {waits}"
    assert line in screen[: screen.index("update 1/")]
