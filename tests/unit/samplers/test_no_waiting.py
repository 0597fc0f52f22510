"""No step waits for its device: nothing between two moves reads a number to decide by.

Tensors of the meta device have shapes and no numbers, so reading one is an error there. That
stands for a GPU, whose queue of work would run dry at every such read.
"""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

from ebm_dist import energies
from ebm_dist.energies.family import FAMILY as ENERGY_FAMILY
from ebm_dist.samplers import FAMILY, chain, kernel, run_chain
from ebm_dist.samplers.compile.block import flatten, rebuild

ENERGIES: dict[str, Any] = ENERGY_FAMILY.members  # type: ignore[assignment]
DISCRETE = ("rbm", "hopfield", "ising", "potts")

# It stops when its trees turn, which is for the device to say: once a leaf.
WAITS = ("nuts",)


def cases() -> list[tuple[str, str]]:
    """Every sampler with some energies, every energy with a sampler."""
    some = [
        (name, target)
        for name, section in FAMILY.members.items()
        for target in (DISCRETE if section.discrete else ("mlp", "ring"))  # type: ignore[attr-defined]
        if name not in WAITS
    ]
    own = [("gibbs" if target in DISCRETE else "langevin", target) for target in ENERGIES]
    return sorted({*some, *own})


def make(name: str, **params: Any) -> Any:
    return FAMILY.make(name, **{**FAMILY.members[name].example, **params})  # type: ignore[attr-defined]


def on_meta(value: Any) -> Any:
    tensors: list[torch.Tensor] = []
    skeleton = flatten(value, tensors)
    return rebuild(skeleton, [t.to("meta") for t in tensors])


@pytest.fixture
def without_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    # Autocast is what an energy turns off around its last layer, and does not know the device.
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *args: False)


def start(target: str) -> tuple[Any, torch.Tensor]:
    energy = energies.make(target, **ENERGIES[target].example).eval().requires_grad_(False)
    if target in DISCRETE:
        return energy, energy.event.noise(4, torch.Generator().manual_seed(0))  # type: ignore[union-attr]
    shape = getattr(energy, "event_shape", None) or energy.event.shape  # type: ignore[union-attr]
    return energy, torch.randn(4, *shape)


@pytest.mark.parametrize(("name", "target"), cases())
def test_a_step_reads_no_numbers(without_numbers, name, target):
    energy, x = start(target)
    mover = make(name)
    state = on_meta(mover.init(x, energy))
    energy.to("meta")
    for _ in range(2):
        state, info = mover.step(state, energy, torch.Generator())
    assert state.position.device.type == "meta"
    assert all(t.device.type == "meta" for t in vars_of(info))


def vars_of(info: Any) -> list[torch.Tensor]:
    tensors: list[torch.Tensor] = []
    flatten(info, tensors)
    return tensors


@pytest.mark.parametrize("name", WAITS)
def test_what_waits_is_known(without_numbers, name):
    energy, x = start("mlp")
    mover = make(name)
    state = on_meta(mover.init(x, energy))
    energy.to("meta")
    with pytest.raises(RuntimeError, match="item"):
        mover.step(state, energy, torch.Generator())


@pytest.mark.parametrize("options", [{}, {"channels_last": True}, {"record_every": 2}])
@pytest.mark.parametrize("target", ["mlp", "resnet"])
def test_a_round_waits_where_its_energies_are_checked_and_nowhere_else(
    without_numbers, monkeypatch, target, options
):
    waits: list[str] = []
    for module in (kernel, chain):
        monkeypatch.setattr(module, "require_finite", lambda energy, where: waits.append(where))
    monkeypatch.setattr(chain, "_check_arguments", lambda *args: None)  # a generator of the CPU
    energy, x = start(target)
    moved = run_chain(
        make("langevin", clamp=(-1.0, 1.0), grad_clip=0.1),
        x.to("meta"),
        energy.to("meta"),
        5,
        torch.Generator(),
        **options,
    )
    assert moved.position.device.type == "meta"
    assert waits == ["at the start of the chains (x)", "after 5 steps"]
