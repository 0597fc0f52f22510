"""Claims that hold for every registered energy; a new one is covered by being registered."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from ebm_dist import energies
from ebm_dist.core.types import EventSpec
from ebm_dist.core.weights import FlatLayout
from ebm_dist.energies import Energy, EnergySection

IMAGE = {"event_shape": (2, 6, 5)}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, section.example) for name, section in energies.FAMILY.members.items()),
    ("mlp", {"event_shape": (2, 3), "widths": (8,), "num_classes": 4, "confinement": 0.5}),
    ("mlp", {"event_shape": (3,), "widths": (8, 8), "spectral_norm": True}),
    ("resnet", {**IMAGE, "width": 4, "stem_stride": 2, "num_classes": 3, "pool": "mean"}),
    ("resnet", {**IMAGE, "width": 4, "spectral_norm": True, "num_blocks": 2}),
    ("resnet", {**IMAGE, "width": 4, "activation": "gelu", "stem_stride": 4}),
    ("igebm", {**IMAGE, "width": 4, "multipliers": (1, 2, 1, 1), "spectral_norm": True}),
    ("wide_resnet", {**IMAGE, "depth": 10, "widen": 1, "norm": "group", "num_classes": 3}),
    ("wide_resnet", {**IMAGE, "depth": 10, "widen": 1, "norm": "instance"}),
    ("unet", {"event_shape": (3, 7, 5), "width": 8, "num_blocks": 2, "num_heads": 2}),
    ("unet", {**IMAGE, "width": 4, "parameterisation": "inner_product", "data_std": 0.5}),
    ("unet", {"event_shape": (1, 8, 4), "parameterisation": "denoiser", "patch_size": 2}),
    ("vit", {"event_shape": (3, 4, 6), "patch_size": 2, "width": 8, "num_classes": 3}),
    ("transformer_lm", {"event_shape": (4, 3), "width": 8, "depth": 2, "causal": True}),
    ("transformer_lm", {"event_shape": (4, 3), "width": 8, "depth": 1, "num_classes": 2}),
    ("quadratic", {"precision": ((2.0, 0.5), (0.5, 1.0)), "mean": (1.0, -1.0), "learnable": True}),
    ("gaussian_mixture", {"means": ((0.0,), (3.0,)), "stds": (1.0, 0.5), "learnable": True}),
    ("hopfield", {"num_patterns": 3, "num_units": 8, "learnable": True, "bias": 0.1}),
    ("modern_hopfield", {"num_patterns": 3, "num_dims": 2, "learnable": True}),
    ("ising", {"shape": (5,), "learnable": True}),
    ("potts", {"shape": (2, 3), "num_values": 2, "field": (0.1, -0.2), "learnable": True}),
    ("double_well", {"depth": 2.0, "tilt": 0.3, "num_dims": 3}),
    ("mixture", {"members": ({"name": "ring"}, {"name": "checkerboard"}), "hard": True}),
]


@pytest.fixture(params=VARIANTS, ids=lambda v: f"{v[0]}-{'-'.join(map(str, v[1]))}")
def section(request: pytest.FixtureRequest) -> EnergySection:
    name, params = request.param
    made = energies.FAMILY.section(name, **params)
    assert isinstance(made, EnergySection)
    return made


def events(section: EnergySection, energy: Energy, num: int, seed: int = 0) -> Tensor:
    assert energy.event_shape is not None
    spec = EventSpec(energy.event_shape, section.kinds[0])
    return spec.noise(num, torch.Generator().manual_seed(seed))


def built(section: EnergySection) -> Energy:
    # Eval, as samplers use it: spectral norm moves its vectors in training mode.
    return section.build().eval()


def test_energy_is_one_finite_float32_number_per_event(section: EnergySection):
    energy = built(section)
    value = energy(events(section, energy, 5))
    assert value.shape == (5,)
    assert value.dtype == torch.float32
    assert value.isfinite().all()
    assert energy(events(section, energy, 1)).shape == (1,)


def test_energy_of_a_chain_does_not_depend_on_the_other_chains(section: EnergySection):
    for training in (False, True):
        energy = section.build().train(training)
        if training and any("parametrizations" in name for name, _ in energy.named_parameters()):
            continue  # the power iteration moves between two calls
        x = events(section, energy, 6)
        x.requires_grad_(True)
        together = energy(x)
        (grad,) = torch.autograd.grad(together.sum(), x)
        y = x[2:3].detach().clone().requires_grad_(True)
        alone = energy(y)
        (grad_alone,) = torch.autograd.grad(alone.sum(), y)
        torch.testing.assert_close(together[2:3], alone, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(grad[2:3], grad_alone, rtol=1e-5, atol=1e-5)


def test_energy_depends_on_every_number_of_the_event(section: EnergySection):
    energy = built(section)
    x = events(section, energy, 16)
    x.requires_grad_(True)
    (grad,) = torch.autograd.grad(energy(x).sum(), x)
    seen = grad.abs().amax(0) > 0
    assert seen.all()


def test_input_gradient_matches_finite_differences(section: EnergySection):
    energy = built(section).double()
    x = events(section, energy, 3).double() * 0.9 + 0.03
    x.requires_grad_(True)
    (grad,) = torch.autograd.grad(energy(x).sum(), x)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).double()
    eps = 1e-6
    with torch.no_grad():
        slope = (energy(x + eps * direction) - energy(x - eps * direction)) / (2 * eps)
    expected = (grad * direction).flatten(1).sum(1)
    torch.testing.assert_close(slope, expected, rtol=1e-5, atol=1e-6)


def test_gradient_penalty_reaches_the_weights(section: EnergySection):
    if hasattr(section, "activation"):
        # A piecewise linear network's gradient jumps, so differences would measure jumps.
        smooth = getattr(section, "activation").replace("leaky_relu", "silu")  # noqa: B009
        section = section.model_copy(update={"activation": smooth})
    energy = built(section).double()
    parameters = dict(energy.named_parameters())
    x = events(section, energy, 3).double() * 0.9 + 0.03
    x.requires_grad_(True)
    if not parameters:
        (grad,) = torch.autograd.grad(energy(x).sum(), x, create_graph=True)
        if grad.requires_grad:  # a piecewise linear energy has no second derivative
            (second,) = torch.autograd.grad(grad.square().sum(), x, allow_unused=True)
            assert second is None or second.isfinite().all()
        return

    def penalty() -> Tensor:
        (grad,) = torch.autograd.grad(energy(x).sum(), x, create_graph=True)
        return grad.square().sum()

    names = list(parameters)
    grads = torch.autograd.grad(penalty(), list(parameters.values()), allow_unused=True)
    assert any(g is not None and g.abs().max() > 0 for g in grads)
    # Against finite differences along one direction over all parameters.
    generator = torch.Generator().manual_seed(2)
    step = [torch.randn(p.shape, generator=generator).double() for p in parameters.values()]
    expected = sum((g * s).sum() for g, s in zip(grads, step) if g is not None)
    eps = 1e-6
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for name, s in zip(names, step):
                parameters[name].add_(sign * eps * s)
        values.append(penalty().detach())
        with torch.no_grad():
            for name, s in zip(names, step):
                parameters[name].sub_(sign * eps * s)
    torch.testing.assert_close(
        (values[0] - values[1]) / (2 * eps), torch.as_tensor(expected), rtol=1e-4, atol=1e-5
    )


def test_wrong_event_shape_is_named_with_the_right_one(section: EnergySection):
    energy = built(section)
    x = events(section, energy, 4)
    for wrong in (x[0], x[:, None], torch.cat([x, x], -1)):
        with pytest.raises(ValueError, match=r"x has shape .*, expected \(B") as caught:
            energy(wrong)
        assert str(tuple(wrong.shape)) in str(caught.value)


def test_integer_events_are_refused(section: EnergySection):
    energy = built(section)
    with pytest.raises(ValueError, match=r"x is torch.int64.*x.float\(\)"):
        energy(events(section, energy, 2).long())


def test_same_seed_gives_the_same_weights_and_leaves_torchs_generator_alone(
    section: EnergySection,
):
    before = torch.random.get_rng_state()
    first = section.build(3).state_dict()
    torch.randn(5)
    second = section.build(3).state_dict()
    torch.random.set_rng_state(before)
    section.build(3)
    assert torch.equal(before, torch.random.get_rng_state())
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_flat_weights_carry_the_energy_to_another_module(section: EnergySection):
    sender, receiver = section.build(1).eval(), section.build(1).eval()
    with torch.no_grad():
        for parameter in sender.parameters():
            parameter.add_(0.1)
    layout = FlatLayout.of(sender)
    layout.load_(receiver, layout.pack(sender))
    x = events(section, sender, 4)
    assert torch.equal(sender(x), receiver(x))


def test_energy_under_bf16_autocast_is_float32_and_near_the_float32_one(section: EnergySection):
    energy = built(section)
    x = events(section, energy, 8)
    exact = energy(x)
    with torch.autocast("cpu", torch.bfloat16):
        rough = energy(x)
        y = x.clone().requires_grad_(True)
        (grad,) = torch.autograd.grad(energy(y).sum(), y, create_graph=True)
    assert rough.dtype == torch.float32
    assert grad.dtype == torch.float32
    # bf16 rounds each layer to 2^-9; the sums behind an energy are of order 10.
    torch.testing.assert_close(rough, exact, rtol=0.05, atol=0.1)


def test_a_copy_is_the_same_energy(section: EnergySection):
    energy = built(section)
    x = events(section, energy, 3)
    assert torch.equal(copy.deepcopy(energy)(x), energy(x))


def test_section_survives_its_own_dump(section: EnergySection):
    data = section.model_dump(mode="json")
    again = energies.FAMILY.section(**data)
    assert again == section


def test_parameters_keep_no_gradient_after_an_input_gradient(section: EnergySection):
    energy = built(section)
    x = events(section, energy, 2)
    x.requires_grad_(True)
    torch.autograd.grad(energy(x).sum(), x)
    assert all(parameter.grad is None for parameter in energy.parameters())


@pytest.mark.parametrize(("name", "params"), [v for v in VARIANTS if "event_shape" in v[1]])
def test_memory_layout_of_the_events_does_not_matter(name: str, params: dict[str, Any]):
    section = energies.FAMILY.section(name, **params)
    assert isinstance(section, EnergySection)
    energy = built(section)
    x = events(section, energy, 4)
    # The same numbers, the batch innermost in memory.
    other = x.movedim(0, -1).contiguous().movedim(-1, 0)
    assert not other.is_contiguous()
    torch.testing.assert_close(energy(other), energy(x), rtol=1e-5, atol=1e-5)


def test_a_bf16_module_still_gives_float32_energies(section: EnergySection):
    energy = built(section)
    x = events(section, energy, 4)
    rough = copy.deepcopy(energy).bfloat16()(x)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, energy(x), rtol=0.1, atol=0.2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_every_energy_and_its_gradient_agree_on_the_gpu():
    for name, params in VARIANTS:
        section = energies.FAMILY.section(name, **params)
        assert isinstance(section, EnergySection)
        energy = built(section)
        x = events(section, energy, 4)
        x.requires_grad_(True)
        (grad,) = torch.autograd.grad(energy(x).sum(), x)
        there = copy.deepcopy(energy).cuda()
        y = x.detach().cuda().requires_grad_(True)
        value = there(y)
        (grad_there,) = torch.autograd.grad(value.sum(), y)
        # TF32 convolutions keep 10 bits of the mantissa.
        torch.testing.assert_close(value.cpu(), energy(x), rtol=5e-3, atol=5e-3, msg=name)
        torch.testing.assert_close(grad_there.cpu(), grad, rtol=2e-2, atol=5e-3, msg=name)
