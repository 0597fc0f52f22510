"""Out of memory, faults of a device: another process redoes the work, a bounded number of times."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file
from simulation import SimWorker
from small_runs import run
from worlds import World

from ebm_dist.actors.worker import Worker
from ebm_dist.cluster.backend import PartDied, fault_of_the_machine
from ebm_dist.controller.learners import LearnerGroup
from ebm_dist.controller.retry import MAX_ATTEMPTS
from ebm_dist.core.errors import NonFinite, RunFailed

FAULT = "CUDA error: uncorrectable ECC error encountered"


def fails(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, times: int) -> list[str]:
    """The first calls of `owner.name` find the device broken."""
    hits: list[str] = []
    real = getattr(owner, name)

    def call(self: Any, *args: Any, **options: Any) -> Any:
        if len(hits) < times:
            hits.append(name)
            raise RuntimeError(FAULT)
        return real(self, *args, **options)

    monkeypatch.setattr(owner, name, call)
    return hits


@pytest.mark.parametrize("method", ["run_round", "hold"])
def test_a_worker_whose_device_fails_is_replaced_and_the_negatives_are_the_same(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = World(mode="sync", num_workers=2)
    expected = [whole.update()[1] for _ in range(6)]
    hits = fails(monkeypatch, SimWorker, method, MAX_ATTEMPTS - 1)
    world = World(mode="sync", num_workers=2)
    assert all(np.array_equal(world.update()[1], x) for x in expected)
    # A worker that fails at one round takes the other that it has along.
    assert 1 < world.scheduler.restarts <= len(hits) == MAX_ATTEMPTS - 1
    assert (
        sum(FAULT in line and "worker-" in line for line in world.said) == world.scheduler.restarts
    )


def test_a_round_that_fails_on_one_worker_after_another_ends_the_run_with_the_cause(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fails(monkeypatch, SimWorker, "run_round", 1000)
    with pytest.raises(RunFailed, match=rf"failed {MAX_ATTEMPTS} times.*{FAULT}") as raised:
        World(mode="async", num_workers=3).update()
    assert "workers.num_chains" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_run_whose_worker_failed_once_ends_with_the_weights_of_one_where_none_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "whole", "run.steps=3")
    fails(monkeypatch, Worker, "run_round", 1)
    _, screen = run(tmp_path / "hit", "run.steps=3")
    assert f"its round failed: {FAULT}" in screen
    whole, hit = (
        load_file(tmp_path / name / "export" / "model.safetensors") for name in ("whole", "hit")
    )
    assert all((whole[key] == hit[key]).all() for key in whole)


def test_what_the_program_says_itself_is_no_fault_of_the_machine() -> None:
    for error in (NonFinite("a loss"), RunFailed("it died"), TypeError("a bug")):
        assert fault_of_the_machine(error) is None
    assert fault_of_the_machine(MemoryError()) == "MemoryError"
    wrapped = SimpleNamespace(cause=RuntimeError(f"{FAULT}\nCompile with ..."))
    assert fault_of_the_machine(wrapped) == FAULT  # type: ignore[arg-type]


def test_the_device_of_a_lone_rank_that_fails_has_it_replaced() -> None:
    def get(ref: Any, timeout: float) -> Any:
        raise RuntimeError(FAULT)

    backend: Any = SimpleNamespace(concurrent=True, get=get)
    group = LearnerGroup(
        backend,
        lambda rank, node: SimpleNamespace(name=f"learner-{rank}"),  # type: ignore[arg-type]
        num_ranks=1,
        port=None,
        start_timeout_s=1.0,
        call_timeout_s=1.0,
    )
    with pytest.raises(PartDied, match=FAULT):
        group.result("metrics")
    assert group.broken
