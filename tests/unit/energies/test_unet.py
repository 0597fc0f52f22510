"""Claims on the U-Net: its parameterisations, its preconditioning, and what is left as it was."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ebm_dist import energies

EVENT = (1, 7, 6)
STDS = (0.1, 0.7, 5.0)
LEVELS = {"num_levels": 3, "noise_stds": STDS}
EDM = {**LEVELS, "data_std": 0.6, "data_mean": -0.4}


def unet(parameterisation: str, **params: Any) -> energies.ImageEnergy:
    energy = energies.make(
        "unet", event_shape=EVENT, width=8, parameterisation=parameterisation, **params
    )
    assert isinstance(energy, energies.ImageEnergy)
    return energy.eval().double()


def events(num: int = 3) -> Tensor:
    return torch.randn(num, *EVENT, generator=torch.Generator().manual_seed(0)).double()


def wide(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def norm2(x: Tensor) -> Tensor:
    return x.square().flatten(1).sum(1)


def dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1)


def test_the_parameterisations_are_what_they_are_called():
    x = events()
    for params, y in (({}, x), ({"data_std": 0.5, "data_mean": 0.2}, (x - 0.2) / 0.5)):
        inner, denoiser = unet("inner_product", **params), unet("denoiser", **params)
        torch.testing.assert_close(inner(x), dot(y, inner.body(y)))
        torch.testing.assert_close(denoiser(x), 0.5 * norm2(y - denoiser.body(y)))


def test_a_level_without_the_datas_scale_divides_the_distance_by_its_variance():
    x, level, std = events(), torch.arange(3), torch.tensor(STDS)
    energy = unet("denoiser", **LEVELS)
    out = energy.body(x, *energy.embedded(None, std))
    torch.testing.assert_close(energy(x, level=level), norm2(x - out) / (2 * std.double() ** 2))


def test_with_the_datas_scale_the_networks_input_and_output_are_those_of_edm():
    x, level, std = events(), torch.arange(3), torch.tensor(STDS).double()
    d, y, s = 0.6, x + 0.4, wide(std)
    c_in = 1 / (s**2 + d**2).sqrt()
    for name in ("inner_product", "denoiser"):
        energy = unet(name, **EDM)
        out = energy.body(c_in * y, *energy.embedded(None, std.float()))
        denoised = d**2 / (s**2 + d**2) * y + s * d * c_in * out
        expected = norm2(y - denoised) / (2 * std**2)
        if name == "inner_product":
            expected = dot(y, y - denoised) / (2 * std**2)
        torch.testing.assert_close(energy(x, level=level), expected, rtol=1e-6, atol=1e-6)


def test_an_inner_product_whose_network_is_zero_is_the_energy_of_gaussian_data():
    energy = unet("inner_product", **EDM)
    for layer in energy.modules():
        if isinstance(layer, nn.Conv2d) and layer is energy.body.out:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    x, std = events(), torch.tensor(STDS).double()
    expected = norm2(x + 0.4) / (2 * (std**2 + 0.36))
    torch.testing.assert_close(energy(x, level=torch.arange(3)), expected, rtol=1e-6, atol=1e-6)


def test_attention_lets_far_apart_positions_see_each_other():
    def reach(num_heads: int) -> Tensor:
        net = energies.make(
            "unet",
            event_shape=(1, 32, 1),
            width=8,
            multipliers=(1, 1),
            num_heads=num_heads,
            parameterisation="denoiser",
        ).eval()
        x = torch.randn(1, 1, 32, 1, generator=torch.Generator().manual_seed(0))
        norms = [m for m in net.modules() if isinstance(m, nn.GroupNorm)]
        for norm in norms:  # they too see the whole image
            norm.forward = lambda x: x  # type: ignore[method-assign]
        x.requires_grad_(True)
        (grad,) = torch.autograd.grad(net.body(x)[0, 0, 0].sum(), x)  # type: ignore[operator]
        return grad[0, 0, -1].abs()

    assert reach(0) == 0
    assert reach(2) > 0


# As they were before energies took context: a digest of the names and shapes of the weights, the
# sum of their absolute values, and the energy of the first of three events.
BEFORE: list[tuple[str, dict[str, Any], str, float, float]] = [
    ("mlp", {"event_shape": (2,), "widths": (8, 8)}, "3611c7d5d59c", 23.2172, 0.15182),
    (
        "resnet",
        {"event_shape": (1, 8, 8), "width": 8, "num_blocks": 2, "stem_stride": 2},
        "80f8cd5e5050",
        922.4501,
        0.05803,
    ),
    (
        "resnet",
        {"event_shape": (3, 7, 9), "width": 4, "spectral_norm": True, "num_classes": 3},
        "ef3103526639",
        175.3677,
        -1.14698,
    ),
    (
        "wide_resnet",
        {"event_shape": (3, 8, 8), "depth": 10, "widen": 1, "norm": "group", "num_classes": 4},
        "810d791574ee",
        2523.264,
        -1.31695,
    ),
    (
        "vit",
        {"event_shape": (1, 8, 8), "width": 16, "depth": 2, "num_heads": 2},
        "7a4cda3c41db",
        788.5481,
        0.4576,
    ),
    (
        "transformer_lm",
        {"event_shape": (5, 3), "width": 16, "depth": 1, "num_heads": 2},
        "aecce7b8d011",
        400.9019,
        -0.32414,
    ),
]


@pytest.mark.parametrize(("name", "params", "digest", "size", "value"), BEFORE)
def test_a_network_without_context_has_the_weights_and_energies_it_always_had(
    name: str, params: dict[str, Any], digest: str, size: float, value: float
):
    energy = energies.make(name, **params).eval()
    names = " ".join(f"{key}{list(t.shape)}" for key, t in energy.state_dict().items())
    assert hashlib.sha256(names.encode()).hexdigest()[:12] == digest
    assert sum(p.double().abs().sum().item() for p in energy.parameters()) == pytest.approx(
        size, abs=2e-3
    )
    x = torch.rand(3, *params["event_shape"], generator=torch.Generator().manual_seed(1))
    assert energy(x)[0].item() == pytest.approx(value, abs=1e-4)
