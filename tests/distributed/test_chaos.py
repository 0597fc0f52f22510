"""The chaos soak of `make chaos`, for under a minute."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from chaos import soak
from chaos_contexts import Contexts, Labels, NoisyPairs
from graph_runs import chains, run
from rich.console import Console


def assert_survives(run_dir: Path, contexts: Contexts | None = None) -> None:
    report = soak(
        run_dir, seconds=25.0, period_s=3.0, seed=0, leg=60, min_kills=6, contexts=contexts
    )
    Console().print(report.table())
    assert not report.faults, "\n".join(report.faults)
    assert len(report.kills) >= 6
    assert len({kill.role for kill in report.kills}) >= 2
    assert report.updates >= 60
    assert report.observations >= 60
    assert report.identity_checks >= 2


@pytest.mark.ray
def test_a_run_survives_the_death_of_a_random_part_every_few_seconds(tmp_path: Path) -> None:
    assert_survives(tmp_path / "soak")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("contexts", [Labels, NoisyPairs])
def test_every_chain_keeps_its_context_while_random_parts_die(
    contexts: type[Labels] | type[NoisyPairs], tmp_path: Path
) -> None:
    assert_survives(tmp_path / "soak", contexts())
    # The last checkpoint is of chains that have moved.
    assert (chains(tmp_path / "soak")["age"] > 0).mean() > 0.9


@pytest.mark.parametrize("contexts", [Labels, NoisyPairs])
def test_the_soak_notices_a_context_that_went_to_another_chain(
    contexts: type[Labels] | type[NoisyPairs], tmp_path: Path
) -> None:
    run(tmp_path / "r", *contexts.overrides, "buffer.num_shards=3")
    whole, check = chains(tmp_path / "r"), contexts()
    assert check.faults(whole) == []
    for name in whole:
        if name == "position" or name.startswith("context/"):
            moved = {**whole, name: np.roll(whole[name], 1, axis=0)}
            # Labels alone do not say where a chain is.
            assert bool(check.faults(moved)) == (name != "position" or contexts is NoisyPairs), name
