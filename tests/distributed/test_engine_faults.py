"""What a learner does with a loss that is not finite, and with a rank that is gone."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from engine_ranks import draws, free_port, make_energy, make_objective, slice_of, start

from ebm_dist.core.errors import NonFinite, RunFailed
from ebm_dist.core.types import Batch
from ebm_dist.learner.config import LearnerConfig
from ebm_dist.learner.engine import LearnerEngine

OBJECTIVE = ("contrastive", {"energy_l2": 0.1, "gradient_penalty": 0.5})


def poisoned_run(
    rank: int, port: int, config: dict[str, Any], bad_rank: int | None, poison: float
) -> dict[str, Any]:
    """Three updates, with one that `bad_rank` spoils between the first and the second."""
    engine = LearnerEngine(
        LearnerConfig(**config),
        make_energy("mlp"),
        make_objective(OBJECTIVE[0], **OBJECTIVE[1]),
        rank=rank,
        world_size=2,
        master_port=port,
    )
    raised, untouched = "", True
    with engine:
        for step, draw in enumerate(draws("mlp", 3)):
            batch, negatives = slice_of(draw, rank, 2)
            if step == 1 and bad_rank is not None:
                before = engine.state()
                x = batch.x.clone()
                if rank == bad_rank:
                    x[0, 0] = poison
                try:
                    engine.update(Batch(x), negatives, seed=5, lr=0.02)
                except NonFinite as error:
                    raised = str(error)
                after = engine.state()
                if before is not None and after is not None:
                    untouched = all(torch.equal(v, after[k]) for k, v in before.items())
            engine.update(batch, negatives, seed=step, lr=0.02)
        return {"state": engine.state(), "raised": raised, "untouched": untouched}


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_one_ranks_nan_stops_the_update_on_every_rank_and_moves_nothing(
    stage: int, accumulation: int
):
    config = {"zero_stage": stage, "accumulation": accumulation, "optimizer": "adamw"}
    clean = start().run(poisoned_run, config, None, 0.0)
    bad = start().run(poisoned_run, config, 1, float("nan"))
    for result in bad:
        assert result["raised"].startswith("update 1: the loss is nan")
        assert "\n" not in result["raised"]
    assert bad[0]["untouched"]
    for name, value in clean[0]["state"].items():
        assert torch.equal(value, bad[0]["state"][name]), name


def test_a_gradient_that_overflows_under_a_finite_loss_stops_the_update():
    class Steep(torch.nn.Module):
        def forward(self, energy: Any, batch: Batch, negatives: Any, generator: Any) -> Any:
            total = energy(batch.x).mean()
            # sqrt at 0: the loss is 0, its derivative is not finite.
            return (total - total.detach()).abs().sqrt(), {}

    with LearnerEngine(LearnerConfig(), make_energy("mlp"), Steep()) as engine:
        before = engine.flat_weights()
        with pytest.raises(
            NonFinite, match=r"the loss is 0 and the norm of its gradient (nan|inf)"
        ):
            engine.update(Batch(torch.ones(4, 3)), None, seed=0, lr=0.1)
        after = engine.flat_weights()
        assert before is not None
        assert (before == after).all()


def lone_update(rank: int, port: int) -> tuple[str, float]:
    engine = LearnerEngine(
        LearnerConfig(timeout_s=2.0),
        make_energy("mlp"),
        make_objective("contrastive"),
        rank=rank,
        world_size=2,
        master_port=port,
    )
    began = time.monotonic()
    with engine:
        if rank == 0:
            batch, negatives = slice_of(draws("mlp", 1)[0], 0, 2)
            try:
                engine.update(batch, negatives, seed=0, lr=0.1)
            except RuntimeError as error:
                return str(error), time.monotonic() - began
        else:
            time.sleep(6.0)
    return "", 0.0


def test_a_rank_that_does_not_come_is_an_error_within_the_timeout():
    message, seconds = start().run(lone_update)[0]
    assert "2000ms" in message
    assert seconds < 5.0


def test_ranks_that_do_not_find_each_other_fail_with_the_address_and_leave_no_group():
    port = free_port()
    with pytest.raises(RunFailed, match=f"rank 1 of 2 could not join 127.0.0.1:{port} within 1 s"):
        LearnerEngine(
            LearnerConfig(timeout_s=1.0),
            make_energy("mlp"),
            make_objective("contrastive"),
            rank=1,
            world_size=2,
            master_port=port,
        )
    with LearnerEngine(
        LearnerConfig(), make_energy("mlp"), make_objective("contrastive")
    ) as engine:
        assert engine.flat_weights() is not None
