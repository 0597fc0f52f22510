"""Claims that hold for every registered sampler; a new one is covered by being registered."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ebm_dist.core.types import EventSpec
from ebm_dist.samplers import (
    FAMILY,
    Kernel,
    KernelSection,
    run_chain,
)
from ebm_dist.samplers.kernel import DepartingKernel, InPlaceKernel
from ebm_dist.samplers.module import OwnKernel
from ebm_dist.samplers.tempering.parallel_tempering import ParallelTempering
from ebm_dist.samplers.tempering.simulated_tempering import SimulatedTempering
from ebm_dist.samplers.tempering.tempered_transitions import TemperedTransitions

NUM_CHAINS = 6


class Bowl(nn.Module):
    """A learnable energy with a floor, of real events or of bits or one-hot codes."""

    def __init__(self, event_shape: tuple[int, ...]) -> None:
        super().__init__()
        size = torch.Size(event_shape).numel()
        noise = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(size, 5, generator=noise) * 0.4)
        self.bias = nn.Parameter(torch.randn(size, generator=noise))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        bowl = 0.5 * flat.square().sum(1) + flat @ self.bias.to(x.dtype)
        return bowl + (flat @ self.weight.to(x.dtype)).tanh().sum(1)


def variants() -> list[tuple[str, dict[str, Any], tuple[int, ...], bool]]:
    """(name, parameters, event shape, one-hot) of everything to be claimed about."""
    out = []
    for name, section in FAMILY.members.items():
        assert issubclass(section, KernelSection)
        out.append((name, section.example, (3,), False))
        out.append((name, section.example, (2, 4, 3), False))
        if section.discrete:
            out.append((name, {**section.example, "kind": "categorical"}, (3, 4), True))
    real, image = (3,), (2, 3, 4)
    for kernel, shape, one_hot in (
        ({"name": "sghmc", "step_size": 0.1, "friction": 1.0}, real, False),
        ({"name": "langevin", "step_size": 0.1}, image, False),
        ({"name": "gibbs"}, (3, 4), True),
    ):
        ladder = {"kernel": kernel, "temperatures": (1.0, 2.0, 3.0)}
        out.append(("parallel_tempering", ladder, shape, one_hot))
    for kernel, shape, one_hot in (
        ({"name": "nuts", "step_size": 0.3, "max_tree_depth": 3}, image, False),
        ({"name": "gibbs_with_gradients"}, (3, 4), True),
    ):
        ladder = {"kernel": kernel, "temperatures": (1.0, 1.5, 2.0)}
        out.append(("tempered_transitions", ladder, shape, one_hot))
    scales = {"step_size": 0.1, "scales": (0.1, 1.0, 3.0)}
    out.append(("preconditioned_langevin", scales, real, False))
    clipped = {"step_size": 0.1, "noise_std": 0.1, "grad_clip": 0.1, "clamp": (-1, 1)}
    out.append(("langevin", clipped, real, False))
    frozen = {"step_size": 0.1, "temperature": 0.0}
    out.append(("langevin", {**frozen, "grad_norm_clip": 0.2}, image, False))
    out.append(("sghmc", {**frozen, "friction": 1.0}, real, False))
    return out


def discrete(name: str, params: dict[str, Any]) -> bool:
    if "kernel" in params:
        return discrete(params["kernel"]["name"], {})
    return FAMILY.members[name].discrete  # type: ignore[attr-defined]


@pytest.fixture(params=variants(), ids=lambda v: f"{v[0]}-{len(v[2])}d-{'-'.join(map(str, v[1]))}")
def case(request) -> tuple[Kernel[Any], Tensor, Bowl]:
    name, params, shape, one_hot = request.param
    noise = torch.Generator().manual_seed(2)
    if one_hot:
        index = torch.randint(0, shape[-1], (NUM_CHAINS, *shape[:-1]), generator=noise)
        x = torch.nn.functional.one_hot(index, shape[-1]).float()
    elif discrete(name, params):
        x = torch.randint(0, 2, (NUM_CHAINS, *shape), generator=noise).float()
    else:
        x = torch.randn(NUM_CHAINS, *shape, generator=noise)
    return FAMILY.make(name, **params), x, Bowl(shape)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tensors(state: Any) -> list[Tensor]:
    """Every tensor inside a state, replicas included."""
    out = []
    for f in fields(state):
        value = getattr(state, f.name)
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, Tensor):
                out.append(part)
            elif is_dataclass(part):
                out += tensors(part)
    return out


def test_chain_has_the_promised_shapes_and_dtypes(case):
    kernel, x, energy = case
    chain = run_chain(kernel, x, energy, 5, generator(), record_every=2)
    assert isinstance(kernel, Kernel)
    assert kernel.temperature >= 0
    assert chain.position.shape == x.shape
    assert chain.position.dtype == torch.float32
    assert chain.position.is_contiguous()
    assert chain.energy.shape == (NUM_CHAINS,)
    assert chain.energy.dtype == torch.float32
    assert chain.energies.shape == (5, NUM_CHAINS)
    assert chain.trace is not None
    assert chain.trace.shape == (2, *x.shape)
    assert chain.info
    for name, value in chain.info.items():
        assert value.shape == (NUM_CHAINS,), name
        assert value.isfinite().all(), name
    for tensor in (chain.position, chain.energy, chain.energies, *chain.info.values()):
        assert not tensor.requires_grad
    # The energy of a chain is the energy of where it is.
    torch.testing.assert_close(chain.energy, energy(chain.position).detach())
    assert torch.equal(chain.energies[-1], chain.energy)
    assert run_chain(kernel, x, energy, 5, generator()).trace is None


def test_chains_move_and_x_stays(case):
    kernel, x, energy = case
    before = x.clone()
    chain = run_chain(kernel, x, energy, 20, generator())
    assert torch.equal(x, before)
    moved = (chain.position != x).flatten(1).any(1)
    assert moved.float().mean() > 0.5


def test_run_chain_is_init_and_steps_bit_for_bit(case):
    kernel, x, energy = case
    chain = run_chain(kernel, x, energy, 7, generator(3), record_every=3)
    noise = generator(3)
    state, infos, visited = kernel.init(x, energy), [], []
    for _ in range(7):
        state, info = kernel.step(state, energy, noise)
        assert torch.equal(chain.energies[len(infos)], state.energy)
        infos.append(info)
        visited.append(state.position)
    assert torch.equal(chain.position, state.position)
    assert torch.equal(chain.energy, state.energy)
    assert chain.trace is not None
    assert torch.equal(chain.trace, torch.stack([visited[2], visited[5]]))
    for name, mean in chain.info.items():
        torch.testing.assert_close(mean, torch.stack([getattr(i, name) for i in infos]).mean(0))
    last = chain.state
    if isinstance(kernel, DepartingKernel):
        assert last is None
        last = kernel.init(chain.position, energy)
    for came, expected in zip(tensors(last), tensors(state), strict=True):
        assert torch.equal(came, expected)


def test_a_step_leaves_the_state_it_was_given_valid(case):
    kernel, x, energy = case
    state, _ = kernel.step(kernel.init(x, energy), energy, generator(1))
    before = [t.clone() for t in tensors(state)]
    kernel.step(state, energy, generator(2))
    for came, expected in zip(tensors(state), before, strict=True):
        assert torch.equal(came, expected)


def test_the_generator_alone_decides(case):
    kernel, x, energy = case
    torch.manual_seed(1)
    first = run_chain(kernel, x, energy, 12, generator(5))
    torch.manual_seed(2)
    untouched = torch.get_rng_state()
    again = run_chain(kernel, x, energy, 12, generator(5))
    assert torch.equal(torch.get_rng_state(), untouched)
    assert torch.equal(first.position, again.position)
    for name in first.info:
        assert torch.equal(first.info[name], again.info[name])
    if kernel.temperature > 0:
        other = run_chain(kernel, x, energy, 12, generator(6))
        assert not torch.equal(first.position, other.position)


def test_a_chain_does_not_depend_on_the_other_chains(case):
    kernel, x, energy = case
    shuffled = x.clone()
    # Another start for every chain but the first; binary and one-hot events stay legal.
    shuffled[1:] = x[1:].flip(0).roll(1, 1)
    assert not torch.equal(shuffled, x)
    one = run_chain(kernel, x, energy, 12, generator(7))
    two = run_chain(kernel, shuffled, energy, 12, generator(7))
    assert torch.equal(one.position[0], two.position[0])
    assert torch.equal(one.energies[:, 0], two.energies[:, 0])
    for name in one.info:
        assert torch.equal(one.info[name][0], two.info[name][0])


def test_parameters_and_their_gradients_are_left_alone(case):
    kernel, x, energy = case
    energy.bias.requires_grad_(False)
    energy.weight.grad = torch.full_like(energy.weight, 3.0)
    run_chain(kernel, x, energy, 3, generator())
    state = kernel.init(x, energy)
    kernel.step(state, energy, generator())
    assert torch.equal(energy.weight.grad, torch.full_like(energy.weight, 3.0))
    assert energy.bias.grad is None
    assert energy.weight.requires_grad
    assert not energy.bias.requires_grad


def test_sampling_works_under_no_grad(case):
    kernel, x, energy = case
    outside = run_chain(kernel, x, energy, 3, generator(8))
    with torch.no_grad():
        inside = run_chain(kernel, x, energy, 3, generator(8))
    assert torch.equal(outside.position, inside.position)


def test_the_kernel_in_place_uses_up_nothing_but_its_state(case):
    kernel, x, energy = case
    if not isinstance(kernel, InPlaceKernel):
        pytest.skip("no in-place step")
    own = x.clone()
    state = kernel.init(own, energy)
    after, _ = kernel.step_(state, energy, generator(1), torch.empty_like(x))
    expected, _ = kernel.step(kernel.init(x, energy), energy, generator(1))
    for came, wanted in zip(tensors(after), tensors(expected), strict=True):
        assert torch.equal(came, wanted)
    # That is what it is for: the position was moved where it lay.
    assert after.position.data_ptr() == own.data_ptr()


def test_temperature_is_a_field_that_can_be_replaced(case):
    kernel, x, energy = case
    if isinstance(kernel, OwnKernel):
        pytest.skip("a sampler of the user is not told its temperature; none may temper it")
    if isinstance(kernel, ParallelTempering | TemperedTransitions):
        hot = replace(kernel, temperatures=(2.0, 4.0, 6.0))
    elif isinstance(kernel, SimulatedTempering):  # the temperature is that of the inner kernel
        hot = replace(kernel, kernel=replace(kernel.kernel, temperature=2.0))
    else:
        hot = replace(kernel, temperature=2.0)
    assert hot.temperature == 2.0
    hotter = run_chain(hot, x, energy, 10, generator(9))
    colder = run_chain(kernel, x, energy, 10, generator(9))
    assert not torch.equal(hotter.position, colder.position)


# A sampler of the user takes what events it likes.
@pytest.mark.parametrize("name", sorted(FAMILY.members.keys() - {"module"}))
def test_every_section_round_trips_and_binds(name):
    section = FAMILY.section(name, **FAMILY.members[name].example)  # type: ignore[attr-defined]
    assert isinstance(section, KernelSection)
    again = FAMILY.section(**section.model_dump())
    assert again.model_dump() == section.model_dump()
    assert type(section).model_json_schema()
    real, bits = EventSpec((3,), "real"), EventSpec((3,), "binary")
    right, wrong = (bits, real) if section.discrete else (real, bits)
    bound = section.bind(right)
    assert type(bound.build()) is type(section.build())
    with pytest.raises(ValueError, match=r"sampler\.name: .* moves"):
        section.bind(wrong)


def test_half_precision_positions_become_float32_and_double_stays(case):
    kernel, x, energy = case
    assert run_chain(kernel, x.bfloat16(), energy, 2, generator()).position.dtype == torch.float32
    double = run_chain(kernel, x.double(), energy.double(), 2, generator())
    assert double.position.dtype == double.energy.dtype == torch.float64
