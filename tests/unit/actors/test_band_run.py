"""The band in whole runs of one process: the metric shows it, a resumed run goes on counting."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_runs import curve, run

from ebm_dist.checkpoint import files as checkpoint

NEEDED = 128 * 4
"""Negatives of an update and steps of a round in `small_runs.SMALL`."""


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_the_metric_shows_the_lower_bound_held_and_a_resumed_run_goes_on_counting(
    mode: str, tmp_path: Path
) -> None:
    options = (
        f"flow.mode={mode}",
        f"flow.min_steps_per_update={1.75 * NEEDED}",
        "buffer.capacity=512",
        "evaluation.trace_chains=0",
    )
    for steps in (20, 40):
        run(tmp_path / "run", *options, f"run.steps={steps}", "checkpoint.every=20")
        found = checkpoint.latest(tmp_path / "run")
        assert found is not None
        assert found.meta["updates"] == steps
        spare = found.meta["extra_steps"]
        assert 0.75 * NEEDED * steps <= spare <= 0.75 * NEEDED * steps + 64 * 4
    # Windows of five updates; a spare round is half of what an update needs.
    steps_taken = curve(tmp_path / "run", "flow/mcmc_steps_per_update")
    assert sorted(steps_taken) == list(range(5, 41, 5))
    for value in steps_taken.values():
        assert value == pytest.approx(1.75 * NEEDED, abs=2 * 64 * 4 / 5)


def test_the_chains_add_up_before_every_shard_has_had_a_round(tmp_path: Path) -> None:
    # One lease an update and four shards: three of them are not heard of in the first row.
    run(
        tmp_path / "run",
        *("buffer.num_shards=4", "workers.num_chains=64", "data.batch_size=64"),
        *("tracking.log_every=1", "run.steps=6"),
    )
    names = ("buffer/free", "buffer/leased", "buffer/ready")
    parts = [curve(tmp_path / "run", name) for name in names]
    for step, capacity in curve(tmp_path / "run", "buffer/capacity").items():
        assert capacity == 256
        assert sum(part[step] for part in parts) == capacity
