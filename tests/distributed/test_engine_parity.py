"""DeepSpeed on two ranks takes the steps of a plain torch loop on the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
from engine_ranks import run_engine, run_plain, start
from torch import Tensor

STAGES = (0, 1, 2, 3)

# Adam divides by the gradient's own size, so a weight whose gradient is rounding alone would move
# by lr in either direction; an eps above rounding leaves the comparison to the real gradients.
ADAM = {"optimizer": "adamw", "eps": 1e-3, "weight_decay": 0.01}
SGD = {"optimizer": "sgd", "momentum": 0.9}

PENALTY = {"energy_l2": 0.1, "gradient_penalty": 0.5}


def assert_same_weights(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    wanted = [name for name in want if name.startswith("param/")]
    assert sorted(n for n in got if n.startswith("param/")) == sorted(wanted)
    worst = {name: (got[name] - want[name]).abs().max().item() for name in wanted}
    name = max(worst, key=lambda key: worst[key])
    assert worst[name] <= tolerance, f"{name} is off by {worst[name]:.2e}"


def compare(
    config: dict[str, Any],
    energy: tuple[str, dict[str, Any]],
    objective: tuple[str, dict[str, Any]],
    *,
    num_steps: int = 4,
    num_slices: int = 1,
    tolerance: float = 1e-6,
) -> None:
    plain = run_plain(config, energy, objective, num_steps, num_slices=num_slices)
    first, second = start().run(run_engine, config, energy, objective, num_steps)
    assert second["state"] is None
    assert second["flat"] is None
    assert first["metrics"] == second["metrics"]
    assert_same_weights(first["state"], plain["state"], tolerance)
    for got, want in zip(first["metrics"], plain["metrics"]):
        for name, value in want.items():
            assert got[name] == pytest.approx(value, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("penalty", [0.0, 0.5])
@pytest.mark.parametrize("energy", ["mlp", "resnet"])
def test_every_zero_stage_matches_plain_torch(stage: int, penalty: float, energy: str):
    objective = ("contrastive", {"energy_l2": 0.1, "gradient_penalty": penalty})
    compare({"zero_stage": stage, **SGD}, (energy, {}), objective)
    compare({"zero_stage": stage, **ADAM}, (energy, {}), objective)


@pytest.mark.parametrize("stage", STAGES)
def test_accumulated_and_clipped_steps_match_plain_torch(stage: int):
    # Weights of importance are normalised over a micro-batch, so this needs them equal: no
    # negatives at all.
    compare(
        {"zero_stage": stage, "accumulation": 2, "grad_clip": 0.1, **SGD},
        ("mlp", {}),
        ("score_matching", {}),
    )


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("energy", "objective"),
    [
        (("resnet", {"spectral_norm": True}), ("contrastive", PENALTY)),
        (("vit", {}), ("contrastive", PENALTY)),
        (("mlp", {}), ("reverse_kl", {"event_shape": (3,), "critic_widths": (8,)})),
        (("mlp", {"num_classes": 4}), ("joint", PENALTY)),
    ],
    ids=["spectral_norm", "vit", "critic", "classifier"],
)
def test_networks_that_share_or_hide_weights_match_plain_torch(
    stage: int, energy: tuple[str, dict[str, Any]], objective: tuple[str, dict[str, Any]]
):
    compare({"zero_stage": stage, **SGD}, energy, objective, num_steps=3)


@pytest.mark.parametrize("stage", STAGES)
def test_recomputed_activations_match_plain_torch_that_kept_them(stage: int):
    energy, objective = ("vit", {"depth": 2}), ("contrastive", PENALTY)
    plain = run_plain(SGD, energy, objective, 3)
    recomputed = {"zero_stage": stage, "recompute_activations": True, **SGD}
    first, _ = start().run(run_engine, recomputed, energy, objective, 3)
    assert_same_weights(first["state"], plain["state"], 1e-6)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    "objective",
    [
        ("sliced_score_matching", {}),
        ("denoising_score_matching", {"noise_std": 0.3}),
        ("noise_contrastive", {"noise": "gaussian"}),
        ("recovery_likelihood", {"noise_std": 0.5, "num_steps": 3}),
        ("energy_matching", {"contrastive_weight": 0.0}),
    ],
    ids=lambda objective: objective[0],
)
def test_objectives_with_noise_match_plain_torch_on_the_same_seeds(
    stage: int, objective: tuple[str, dict[str, Any]]
):
    compare({"zero_stage": stage, **SGD}, ("mlp", {}), objective, num_steps=3, num_slices=2)


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_moves_float32_weights_as_plain_autocast_does(stage: int):
    config = {"zero_stage": stage, "precision": "bf16", **SGD}
    objective = ("contrastive", PENALTY)
    start_state = run_plain(config, ("mlp", {}), objective, 0)["state"]
    plain = run_plain(config, ("mlp", {}), objective, 4)["state"]
    exact = run_plain({**config, "precision": "fp32"}, ("mlp", {}), objective, 4)["state"]
    got = start().run(run_engine, config, ("mlp", {}), objective, 4)[0]["state"]

    def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
        return sum((one[n] - other[n]).square().sum().item() for n in start_state) ** 0.5

    moved = distance(plain, start_state)
    # bf16 keeps 8 bits, and the halves of the batch are summed in another order.
    assert distance(got, plain) < 0.01 * moved
    # It did compute in bf16: else it would be as near to float32 as float32 is.
    assert distance(got, exact) > 1e-4 * moved


@pytest.mark.parametrize("stage", STAGES)
def test_weights_that_the_loss_does_not_read_decay_alike_on_one_rank_and_two(stage: int):
    # Score matching never reads the last bias; plain torch would leave it out of the decay.
    config = {"zero_stage": stage, **ADAM, "weight_decay": 0.5}
    energy, objective = ("mlp", {}), ("score_matching", {})
    one = run_engine(0, 0, config, energy, objective, 3, 1)["state"]
    two = start().run(run_engine, config, energy, objective, 3)[0]["state"]
    assert one["param/energy.head.bias"].abs().max() > 0
    for name, value in one.items():
        assert (value - two[name]).abs().max() <= 1e-6, name
