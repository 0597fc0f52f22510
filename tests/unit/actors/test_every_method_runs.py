"""Every sampler and every energy that has parameters works in a whole run, from its config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import SMALL, run

import ebm_dist
from ebm_dist import energies, samplers
from ebm_dist.metrics import names

REAL: dict[str, Any] = {**SMALL, "run": {"name": "real", "seed": 3, "steps": 6}}
REAL["learner"] = {**SMALL["learner"], "lr": 0.05}
BITS: dict[str, Any] = {
    **REAL,
    "data": {**SMALL["data"], "source": "toy:ising"},
    "energy": {"name": "ising", "shape": (4, 4), "coupling": 0.0, "learnable": True},
}
CATEGORIES: dict[str, Any] = {
    **REAL,
    "data": {**SMALL["data"], "source": "toy:potts_chain"},
    "energy": {
        "name": "potts",
        "shape": (8,),
        "num_values": 4,
        "coupling": 0.0,
        "learnable": True,
    },
}


def sampler(name: str) -> dict[str, Any]:
    """The sampler's example, as a config would write it; rounds that an annealed one cools in."""
    return {"name": name, **samplers.FAMILY.members[name].example, "num_steps": 30}  # type: ignore[attr-defined]


def cases() -> list[tuple[str, dict[str, Any]]]:
    out = []
    for name, section in samplers.FAMILY.members.items():
        if name in ("simulated_tempering", "predictor_corrector"):
            continue  # for energies with levels: tests/unit/run/test_level_runs.py
        discrete = section.discrete  # type: ignore[attr-defined]
        out += [(name, base) for base in ((BITS, CATEGORIES) if discrete else (REAL,))]
    return out


def rows(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("name", "base"), cases(), ids=lambda v: v if isinstance(v, str) else v["energy"]["name"]
)
def test_every_sampler_drives_a_run_towards_its_data(name, base, tmp_path):
    run_dir = tmp_path / "r"
    if name == "flow_langevin":  # without a clock every round is a whole life
        base = {**base, "buffer": {**base["buffer"], "reinit_prob": 1.0}}
    result, _ = run(run_dir, base={**base, "sampler": sampler(name)})
    assert result.finished
    logged = rows(run_dir)
    assert not names.unknown(key for row in logged for key in row)
    last = {key: value for row in logged for key, value in row.items()}
    assert last["sampler/temperature"] == 1.0
    assert last["sampler/displacement"] > 0
    if hasattr(samplers.FAMILY.make(**sampler(name)), "target_acceptance"):
        assert 0 < last["sampler/acceptance"] <= 1
        assert last["chain/self_transition"] == pytest.approx(1 - last["sampler/accepted"])
    learnt = ebm_dist.load_energy(result.export_dir).state_dict()
    if base["energy"] is REAL["energy"]:
        # Data of variance 1, a model that began with .5: its precision falls from 2.
        assert learnt["precision"].item() < 1.9
    else:
        # Neighbours agree in the data, and were independent in the model.
        assert learnt["coupling"].item() > 0.1


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("name", dict(cases()))
def test_every_sampler_on_ray_moves_chains_as_it_does_in_one_process(name, tmp_path):
    base = BITS if samplers.FAMILY.members[name].discrete else REAL  # type: ignore[attr-defined]
    base = {**base, "sampler": sampler(name)}
    if name == "flow_langevin":
        base["buffer"] = {**base["buffer"], "reinit_prob": 1.0}
    inline, _ = run(tmp_path / "inline", base=base)
    ray, _ = run(tmp_path / "ray", "runtime.backend=ray", "workers.num_workers=2", base=base)
    left, right = (ebm_dist.load_energy(r.export_dir).state_dict() for r in (inline, ray))
    assert all(torch.equal(left[key], right[key]) for key in left)


DIGITS = {"source": "digits", "batch_size": 128, "prefetch": 0}
PLANE = {**SMALL["data"], "source": "toy:gaussian_mixture"}
STRIPES = {**SMALL["data"], "source": "toy:bars_and_stripes"}
FLIPS = {"name": "discrete_langevin", "step_size": 0.5, "num_steps": 3}
STEPS = {"name": "langevin", "step_size": 0.05, "temperature": 1.0, "num_steps": 3}
PARABOLA = {"name": "quadratic", "precision": (1.0, 1.0), "learnable": True}
BUMPS = {"name": "gaussian_mixture", "learnable": True}

ENERGIES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "mlp": ({"widths": (16,)}, PLANE, STEPS),
    "resnet": ({"width": 8}, DIGITS, STEPS),
    "igebm": ({"width": 8, "num_blocks": 1}, DIGITS, STEPS),
    "wide_resnet": ({"depth": 10, "widen": 1}, DIGITS, STEPS),
    "unet": ({"width": 8, "multipliers": (1, 2)}, DIGITS, STEPS),
    "vit": ({"patch_size": 4, "width": 16, "depth": 1}, DIGITS, STEPS),
    "transformer_lm": ({"width": 16, "depth": 1}, CATEGORIES["data"], FLIPS),
    "quadratic": ({"precision": (1.0, 1.0), "learnable": True}, PLANE, STEPS),
    "gaussian_mixture": ({"learnable": True}, PLANE, STEPS),
    "hopfield": (
        {"num_units": 16, "learnable": True},
        {**STRIPES, "flatten": True},
        {"name": "gibbs", "num_steps": 2},
    ),
    "modern_hopfield": ({"num_dims": 2, "learnable": True}, PLANE, STEPS),
    "rbm": ({"num_hidden": 4}, STRIPES, {"name": "gibbs", "num_steps": 2}),
    "ising": ({"learnable": True}, STRIPES, {"name": "gibbs", "num_steps": 2}),
    "potts": (
        {"shape": (8,), "num_values": 4, "learnable": True},
        CATEGORIES["data"],
        {"name": "gibbs", "num_steps": 2},
    ),
    "sum": ({"members": (PARABOLA, {"name": "mlp", "widths": (8,)})}, PLANE, STEPS),
    "mixture": ({"members": (PARABOLA, BUMPS)}, PLANE, STEPS),
    "tempered": ({"member": BUMPS, "temperature": 2.0}, PLANE, STEPS),
    "conditional": (
        {"member": {"name": "mlp", "widths": (8,), "num_classes": 3}, "label": 1},
        PLANE,
        STEPS,
    ),
}


def test_energies_that_are_not_trained_have_no_parameters():
    for name in energies.FAMILY.members.keys() - ENERGIES.keys():
        section: Any = energies.FAMILY.members[name]
        assert not list(energies.make(name, **section.example).parameters()), name


@pytest.mark.parametrize("name", ENERGIES)
def test_every_energy_with_parameters_trains_in_a_run_and_loads_again(name, tmp_path):
    params, data, moves = ENERGIES[name]
    base = {**REAL, "energy": {"name": name, **params}, "data": data, "sampler": moves}
    first, _ = run(tmp_path / "r", "run.steps=1", base=base)
    before = ebm_dist.load_energy(first.export_dir).state_dict()
    result, _ = run(tmp_path / "r", "run.steps=3", base=base, resume="must")
    energy = ebm_dist.load_energy(result.export_dir)
    after = energy.state_dict()
    assert any(not torch.equal(before[key], after[key]) for key in before)
    assert all(value.isfinite().all() for value in after.values())
