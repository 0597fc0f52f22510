"""Devices and threads of every role on one machine, as a table."""

from __future__ import annotations

import pytest

from ebm_dist.config.sections import RuntimeConfig
from ebm_dist.core.errors import UserError
from ebm_dist.run.placement.gpu_shares import Shares
from ebm_dist.run.placement.plan import Plan, plan


def make(backend="ray", device="auto", **changes) -> Plan:
    options = {
        "mode": "async",
        "num_workers": 2,
        "num_ranks": 1,
        "worker_threads": None,
        "learner_threads": None,
        "num_cores": 8,
        "num_gpus": 0,
    }
    return plan(RuntimeConfig(backend=backend, device=device), **(options | changes))


@pytest.mark.parametrize(
    ("options", "threads"),
    [
        ({}, (4, 4)),
        ({"num_workers": 8}, (1, 4)),
        ({"num_workers": 20}, (1, 4)),
        ({"num_ranks": 4}, (4, 1)),
        ({"mode": "sync"}, (4, 8)),
        ({"mode": "sync", "num_ranks": 2}, (4, 4)),
        ({"backend": "inline", "num_workers": 4, "mode": "sync"}, (8, 8)),
        ({"num_cores": 1}, (1, 1)),
        ({"worker_threads": 3, "learner_threads": 5}, (3, 5)),
    ],
)
def test_cores_are_shared_out_on_cpu(options, threads) -> None:
    got = make(**options)
    assert (got.worker_threads, got.learner_threads) == threads
    assert (got.device, got.shares) == ("cpu", Shares())


def test_cpu_is_taken_where_asked_for_though_there_are_gpus() -> None:
    assert make(device="cpu", num_gpus=4).shares == Shares()


def test_cuda_without_a_device_is_refused() -> None:
    with pytest.raises(UserError, match=r"runtime\.device.*cpu or auto"):
        make(device="cuda")


def test_several_ranks_cannot_share_one_gpu() -> None:
    with pytest.raises(UserError, match=r"learner\.num_ranks: 2 ranks and 2 workers need"):
        make(num_gpus=1, num_ranks=2)
