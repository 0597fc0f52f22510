"""One learner rank in this process, as `runtime.backend: inline` runs it."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ebm_dist import energies, objectives
from ebm_dist.core.errors import RunFailed
from ebm_dist.core.generators import seeded
from ebm_dist.core.seeds import derive_seed
from ebm_dist.core.types import Batch, Negatives
from ebm_dist.learner.config import LearnerConfig
from ebm_dist.learner.engine import LearnerEngine
from ebm_dist.learner.step import LearningStep
from ebm_dist.objectives.objective import Objective


def events(seed: int, num: int = 8) -> Tensor:
    return torch.randn(num, 3, generator=torch.Generator().manual_seed(seed))


def negatives(seed: int, num: int = 8) -> Negatives:
    zeros = torch.zeros(num)
    return Negatives(events(seed, num), zeros, zeros.long(), zeros)


def mlp() -> nn.Module:
    return energies.make("mlp", event_shape=(3,), widths=(8,))


class Noisy(nn.Module):
    """A loss that is its generator's first number, plus something to train."""

    def forward(self, energy: Any, batch: Batch, negatives: Any, generator: Any) -> Any:
        noise = torch.randn((), generator=generator)
        return 0.0 * energy(batch.x).mean() + noise, {"noise": noise}


def test_engines_can_be_made_again_in_one_process_and_leave_its_environment():
    # How torch finds its rank: a stale value would lead the next group astray.
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    before = {name: os.environ.get(name) for name in names}
    hook = sys.excepthook
    losses = []
    for stage in (1, 3, 0):
        with LearnerEngine(
            LearnerConfig(zero_stage=stage), mlp(), objectives.make("contrastive")
        ) as engine:
            metrics = engine.update(Batch(events(0)), negatives(1), seed=0, lr=1e-3)
        losses.append(metrics["loss/total"])
        assert not dist.is_initialized()
    assert losses == pytest.approx([losses[0]] * 3)
    assert {name: os.environ.get(name) for name in names} == before
    assert sys.excepthook is hook


def test_closing_twice_is_harmless():
    engine = LearnerEngine(LearnerConfig(), mlp(), objectives.make("contrastive"))
    engine.close()
    engine.close()


def test_two_engines_at_once_in_one_process_are_refused_and_the_first_goes_on():
    with LearnerEngine(LearnerConfig(), mlp(), objectives.make("contrastive")) as engine:
        with pytest.raises(RunFailed, match="close the other engine first"):
            LearnerEngine(LearnerConfig(), mlp(), objectives.make("contrastive"))
        assert engine.update(Batch(events(0)), negatives(1), seed=0, lr=1e-3)


def test_energy_without_weights_is_refused_before_anything_starts():
    with pytest.raises(ValueError, match="no parameters to train"):
        LearnerEngine(LearnerConfig(), nn.Identity(), objectives.make("contrastive"))
    assert not dist.is_initialized()


def test_noise_follows_the_seed_alone():
    with LearnerEngine(LearnerConfig(), mlp(), Noisy()) as engine:
        drawn = [
            engine.update(Batch(events(0)), None, seed=seed, lr=0.0)["noise"] for seed in (3, 4, 3)
        ]
    assert drawn[0] == drawn[2] != drawn[1]
    want = torch.randn((), generator=seeded(3)).item()
    assert drawn[0] == want


@pytest.mark.parametrize("draws", [False, True])
def test_a_generator_is_seeded_for_an_objective_that_draws_and_for_no_other(draws: bool):
    seen: list[torch.Generator | None] = []

    class Seeing(Objective):
        needs_generator = draws

        def loss(self, energy: Any, batch: Batch, negatives: Any, generator: Any) -> Any:
            seen.append(generator)
            return energy(batch.x).mean(), {}

    LearningStep(mlp(), Seeing())(Batch(events(0)), None, 5)
    assert (seen[0] is not None) == draws
    if seen[0] is not None:
        assert torch.equal(seen[0].get_state(), seeded(5).get_state())


def test_micro_batches_have_noise_of_their_own():
    with LearnerEngine(LearnerConfig(accumulation=2), mlp(), Noisy()) as engine:
        got = engine.update(Batch(events(0)), None, seed=3, lr=0.0)["noise"]
    want = [torch.randn((), generator=seeded(derive_seed(3, "micro", i))).item() for i in range(2)]
    assert want[0] != want[1]
    assert got == pytest.approx(sum(want) / 2)


@pytest.mark.parametrize("which", ["data.batch_size", "the negatives"])
def test_batches_that_accumulation_does_not_divide_are_refused(which: str):
    batch = Batch(events(0, 7 if which == "data.batch_size" else 8))
    chains = negatives(1, 7 if which == "the negatives" else 8)
    with (
        LearnerEngine(
            LearnerConfig(accumulation=2), mlp(), objectives.make("contrastive")
        ) as engine,
        pytest.raises(ValueError, match=f"accumulation: 2 does not divide the 7 .*{which}"),
    ):
        engine.update(batch, chains, seed=0, lr=1e-3)


def test_learning_rate_is_that_of_the_call():
    with LearnerEngine(
        LearnerConfig(optimizer="sgd", lr=7.0), mlp(), objectives.make("contrastive")
    ) as engine:
        start = engine.flat_weights()
        metrics = engine.update(Batch(events(0)), negatives(1), seed=0, lr=0.0)
        still = engine.flat_weights()
        engine.update(Batch(events(0)), negatives(1), seed=0, lr=0.5)
        moved = engine.flat_weights()
    assert metrics["learner/lr"] == 0.0
    assert start is not None
    assert still is not None
    assert moved is not None
    assert (start == still).all()
    # SGD moves by lr times the gradient, whose norm is a metric.
    step = float(((moved - still) ** 2).sum() ** 0.5)
    assert step == pytest.approx(0.5 * metrics["learner/param_grad_norm"], rel=1e-4)


def test_clipping_bounds_the_step_and_reports_the_norm_before_it():
    config = LearnerConfig(optimizer="sgd", grad_clip=0.01)
    with LearnerEngine(config, mlp(), objectives.make("contrastive")) as engine:
        start = engine.flat_weights()
        metrics = engine.update(Batch(events(0)), negatives(1), seed=0, lr=1.0)
        moved = engine.flat_weights()
    assert metrics["learner/param_grad_norm"] > 0.02
    assert start is not None
    assert moved is not None
    assert float(((moved - start) ** 2).sum() ** 0.5) == pytest.approx(0.01, rel=1e-3)


def test_packed_weights_are_those_of_their_update_and_not_of_the_next():
    energy = mlp()
    with LearnerEngine(LearnerConfig(), energy, objectives.make("contrastive")) as engine:
        engine.update(Batch(events(0)), negatives(1), seed=0, lr=1e-2)
        wanted = engine.layout.pack(energy)
        packed = engine.packed_weights()
        engine.update(Batch(events(2)), negatives(3), seed=1, lr=1e-2)
        assert packed is not None
        assert torch.equal(torch.from_numpy(packed.on_host()), wanted)
        assert not torch.equal(engine.layout.pack(energy), wanted)


def test_frozen_weights_stay_and_are_saved():
    energy = mlp()
    frozen = next(iter(energy.parameters()))
    frozen.requires_grad_(False)
    kept = frozen.clone()
    name = next(iter(dict(energy.named_parameters())))
    with LearnerEngine(
        LearnerConfig(zero_stage=2), energy, objectives.make("contrastive")
    ) as engine:
        engine.update(Batch(events(0)), negatives(1), seed=0, lr=0.1)
        state = engine.state()
    assert state is not None
    assert torch.equal(state[f"param/energy.{name}"], kept)
    assert f"optim/exp_avg/energy.{name}" not in state


def test_objective_that_returns_no_scalar_is_refused():
    class Vector(nn.Module):
        def forward(self, energy: Any, batch: Batch, negatives: Any, generator: Any) -> Any:
            return energy(batch.x), {}

    step = LearningStep(mlp(), Vector())
    with pytest.raises(ValueError, match=r"Vector returned a loss of shape \(8,\)"):
        step(Batch(events(0)), None, 0)
