"""A learner's state is whole tensors: it continues at any number of ranks and any ZeRO stage."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from engine_ranks import draws, make_energy, make_objective, run_engine, slice_of, start

from ebm_dist.core.weights import FlatLayout
from ebm_dist.learner.config import LearnerConfig
from ebm_dist.learner.engine import LearnerEngine

# An odd number of weights: the last rank's slice is padded at every stage.
ENERGY: tuple[str, dict[str, Any]] = ("mlp", {"widths": (7, 5), "spectral_norm": True})
OBJECTIVE = ("contrastive", {"energy_l2": 0.1, "gradient_penalty": 0.5})
ADAM = {"optimizer": "adamw", "eps": 1e-3, "weight_decay": 0.01}
SGD = {"optimizer": "sgd", "momentum": 0.9}


def train(stage: int, num_steps: int, world_size: int = 2, **more: Any) -> dict[str, Any]:
    optimizer = more.pop("optimizer", ADAM)
    config = {"zero_stage": stage, **optimizer}
    if world_size == 1:
        return run_engine(0, 0, config, ENERGY, OBJECTIVE, num_steps, 1, **more)
    arguments = (config, ENERGY, OBJECTIVE, num_steps, world_size, 0.02)
    return start().run(run_engine, *arguments, more.get("first", 0), more.get("state"))[0]


@pytest.mark.parametrize("optimizer", [ADAM, SGD], ids=["adamw", "sgd"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_resumed_learner_is_bitwise_the_uninterrupted_one(stage: int, optimizer: dict[str, Any]):
    whole = train(stage, 6, optimizer=optimizer)
    half = train(stage, 3, optimizer=optimizer)
    assert int(half["state"]["step"]) == 3
    rest = train(stage, 6, first=3, state=half["state"], optimizer=optimizer)
    assert whole["state"].keys() == rest["state"].keys()
    for name, value in whole["state"].items():
        assert torch.equal(value, rest["state"][name]), name
    assert whole["metrics"][3:] == rest["metrics"]


@pytest.mark.parametrize(("stage", "world_size"), [(1, 1), (3, 1), (0, 2), (1, 2), (3, 2)])
def test_two_ranks_of_stage_2_resume_as_other_ranks_of_another_stage(stage: int, world_size: int):
    whole = train(2, 6)["state"]
    half = train(2, 3)["state"]
    rest = train(stage, 6, world_size=world_size, first=3, state=half)["state"]
    assert whole.keys() == rest.keys()
    for name, value in whole.items():
        torch.testing.assert_close(rest[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_one_rank_of_stage_1_resumes_as_two_ranks_of_stage_3():
    whole = train(1, 6, world_size=1)["state"]
    half = train(1, 3, world_size=1)["state"]
    rest = train(3, 6, first=3, state=half)["state"]
    for name, value in whole.items():
        torch.testing.assert_close(rest[name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_flat_weights_are_the_energys_in_layout_order(stage: int):
    out = train(stage, 2)
    layout = FlatLayout.of(make_energy(ENERGY[0], **ENERGY[1]))
    assert out["flat"].dtype == np.float32
    assert out["flat"].shape == (layout.size,)
    for name, view in layout.views(torch.from_numpy(out["flat"])).items():
        key = f"param/energy.{name}"
        value = out["state"].get(key, out["state"].get(f"buffer/energy.{name}"))
        assert torch.equal(view, value), name


def test_state_before_the_first_update_has_the_form_of_every_other():
    before, after = train(2, 0)["state"], train(2, 1)["state"]
    assert before.keys() == after.keys()
    assert int(before["optim/step"]) == 0
    assert int(after["optim/step"]) == 1
    for name, value in before.items():
        assert value.shape == after[name].shape
        if name.startswith("optim/"):
            assert not value.any(), name


@pytest.mark.parametrize("stage", [1, 3])
def test_making_the_optimiser_moves_no_weight(stage: int):
    # DeepSpeed has initialised optimiser states by a step of zero gradient, which decays weights.
    fresh = make_energy(ENERGY[0], **ENERGY[1])
    state = train(stage, 0)["state"]
    for name, parameter in fresh.named_parameters():
        assert torch.equal(state[f"param/energy.{name}"], parameter), name


def fresh_engine(widths: tuple[int, ...], **config: Any) -> LearnerEngine:
    energy = make_energy("mlp", widths=widths)
    return LearnerEngine(LearnerConfig(**config), energy, make_objective("contrastive"))


@pytest.mark.parametrize(
    ("widths", "config", "fault"),
    [
        ((9, 5), {}, r"weight has shape \(7, 3\), expected \(9, 3\)"),
        ((7, 5, 3), {}, "is missing"),
        ((7,), {}, "is unknown"),
        ((7, 5), {"optimizer": "sgd"}, r"optim/exp_avg/.* is unknown"),
        ((7, 5), SGD, r"optim/momentum_buffer/.* is missing"),
    ],
)
def test_state_of_another_learner_is_refused_in_one_line(
    widths: tuple[int, ...], config: dict[str, Any], fault: str
):
    with fresh_engine((7, 5)) as engine:
        state = engine.state()
    assert state is not None
    with (
        fresh_engine(widths, **config) as engine,
        pytest.raises(ValueError, match=f"checkpoint does not fit.*{fault}.*learner") as error,
    ):
        engine.load_state(state)
    assert "\n" not in str(error.value)


def test_a_state_is_a_copy_that_later_updates_leave_alone():
    energy = make_energy("mlp")
    with LearnerEngine(LearnerConfig(), energy, make_objective("contrastive")) as engine:
        state, flat = engine.state(), engine.flat_weights()
        assert state is not None
        assert flat is not None
        kept, kept_flat = {k: v.clone() for k, v in state.items()}, flat.copy()
        batch, negatives = slice_of(draws("mlp", 1)[0], 0, 1)
        engine.update(batch, negatives, seed=0, lr=0.1)
        assert all(torch.equal(kept[k], v) for k, v in state.items())
        assert np.array_equal(flat, kept_flat)
        later = engine.flat_weights()
        assert later is not None
        assert not np.array_equal(flat, later)
