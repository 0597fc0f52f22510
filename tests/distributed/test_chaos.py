"""The chaos soak of `make chaos`, for under a minute."""

from __future__ import annotations

from pathlib import Path

import pytest
from chaos import soak
from rich.console import Console


@pytest.mark.ray
def test_a_run_survives_the_death_of_a_random_part_every_few_seconds(tmp_path: Path) -> None:
    report = soak(tmp_path / "soak", seconds=25.0, period_s=3.0, seed=0, leg=60, min_kills=6)
    Console().print(report.table())
    assert not report.faults, "\n".join(report.faults)
    assert len(report.kills) >= 6
    assert len({kill.role for kill in report.kills}) >= 2
    assert report.updates >= 60
    assert report.observations >= 60
    assert report.identity_checks >= 2
