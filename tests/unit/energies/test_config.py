"""Claims on energy sections: what the data fills in, and what is refused in one line."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from ebm_dist import energies
from ebm_dist.core.types import EventSpec
from ebm_dist.energies import EnergyConfig, EnergySection

DIGITS = EventSpec((1, 8, 8), "image", 10)
BITS = EventSpec((1, 8, 8), "binary")
PLANE = EventSpec((2,), "real")
TEXT = EventSpec((16, 27), "categorical")


def section(name: str, **params: Any) -> EnergySection:
    made = energies.FAMILY.section(name, **params)
    assert isinstance(made, EnergySection)
    return made


def test_every_promised_energy_is_registered():
    promised = (
        "mlp resnet igebm wide_resnet unet vit transformer_lm quadratic gaussian_mixture ring "
        "double_well checkerboard hopfield modern_hopfield rbm ising potts lattice_phi4 sum "
        "mixture tempered conditional"
    )
    assert set(promised.split()) <= set(energies.FAMILY.members)


def test_promised_functions_build_energies():
    x = torch.rand(3, 2)
    assert energies.quadratic(torch.tensor([1.0, 2.0]))(x).shape == (3,)
    assert energies.quadratic(2.0)(x).shape == (3,)
    assert energies.double_well(4.0)(x[:, :1]).shape == (3,)
    assert energies.ring(2.0, 0.2)(x).shape == (3,)
    assert energies.ising((4, 4), 1.0, 0.0)(torch.ones(3, 4, 4)).tolist() == [-32.0] * 3
    assert energies.rbm(2, 3)(x.round()).shape == (3,)
    assert energies.hopfield([[0, 1], [1, 1]])(x.round()).shape == (3,)


@pytest.mark.parametrize("name", ["mlp", "resnet", "igebm", "wide_resnet", "unet", "vit"])
def test_network_takes_its_event_shape_from_the_data(name: str):
    bound = section(name).bind(DIGITS)
    assert bound.build().event_shape == (1, 8, 8)
    # Labelled data alone does not make an energy a classifier.
    assert getattr(bound, "num_classes") is None  # noqa: B009


@pytest.mark.parametrize("name", ["mlp", "resnet", "igebm", "wide_resnet", "unet", "vit"])
def test_network_takes_its_classes_from_the_data_when_asked(name: str):
    small = {"wide_resnet": {"depth": 10, "widen": 1}, "igebm": {"width": 8}}.get(name, {})
    energy = section(name, num_classes="data", **small).bind(DIGITS).build()
    assert isinstance(energy, energies.NetworkEnergy)
    x = DIGITS.noise(3, torch.Generator().manual_seed(0))
    logits = energy.logits(x)
    assert logits.shape == (3, 10)
    torch.testing.assert_close(energy(x), -logits.logsumexp(1))


def test_rbm_takes_its_visible_units_from_the_data():
    bound = section("rbm", num_hidden=10).bind(BITS)
    energy = bound.build()
    assert energy.event_shape == (1, 8, 8)
    assert isinstance(energy, energies.Rbm)
    assert energy.weight.shape == (10, 64)
    assert bound.bind(BITS) == bound


def test_members_of_a_composition_are_bound_too():
    bound = section("sum", members=[{"name": "mlp"}, {"name": "quadratic"}]).bind(PLANE)
    assert bound.build().event_shape == (2,)


def test_two_equal_members_start_from_different_weights():
    net = {"name": "mlp", "event_shape": (2,), "widths": (4,)}
    energy = section("sum", members=[net, net]).build()
    assert isinstance(energy, energies.Sum)
    first, second = energy.members
    x = torch.rand(4, 2)
    assert not torch.allclose(first(x), second(x))


@pytest.mark.parametrize(
    ("name", "params", "spec", "words"),
    [
        ("mlp", {"event_shape": (3,)}, PLANE, r"energy\.event_shape: \(3,\).*\(2,\)"),
        ("ring", {}, DIGITS, r"energy\.name: ring takes real events, the data is image"),
        ("ring", {}, EventSpec((3,), "real"), r"ring has events of shape \(2,\).*\(3,\)"),
        ("rbm", {}, DIGITS, r"rbm takes binary events, the data is image"),
        ("rbm", {"num_visible": 63}, BITS, r"energy\.num_visible: 63.*64"),
        ("ising", {"shape": (4, 4)}, BITS, r"\(4, 4\).*\(1, 8, 8\)"),
        ("transformer_lm", {}, DIGITS, r"takes categorical events, the data is image"),
        ("mlp", {"num_classes": "data"}, PLANE, r"energy\.num_classes.*names no classes"),
        (
            "sum",
            {"members": [{"name": "ring"}]},
            EventSpec((3,), "real"),
            r"ring has events of shape",
        ),
        (
            "conditional",
            {"member": {"name": "mlp", "num_classes": "data"}, "label": 10},
            DIGITS,
            r"energy\.label: 10.*10 classes",
        ),
    ],
)
def test_energy_that_cannot_take_the_data_is_refused_at_bind(
    name: str, params: dict[str, Any], spec: EventSpec, words: str
):
    with pytest.raises(ValueError, match=words):
        section(name, **params).bind(spec)


@pytest.mark.parametrize(
    ("name", "params", "words"),
    [
        ("resnt", {}, r"unknown 'resnt'; did you mean 'resnet'"),
        ("resnet", {}, r"energy\.event_shape: resnet does not know its events yet"),
        ("resnet", {"event_shape": (8, 8)}, r"resnet takes images \(C, H, W\)"),
        ("wide_resnet", {"event_shape": (64,)}, r"wide_resnet takes images"),
        ("wide_resnet", {"depth": 27}, r"depth: 27 is not 6n \+ 4"),
        ("unet", {"event_shape": (1, 7, 7), "patch_size": 2}, r"energy\.patch_size: 2 does not"),
        ("unet", {"event_shape": (1, 8, 8), "num_heads": 3}, r"energy\.num_heads: 3.*64 channels"),
        ("unet", {"parameterisation": "denoiser", "num_classes": 3}, r"set classes: embedding"),
        ("vit", {"event_shape": (1, 9, 9)}, r"energy\.patch_size: 4 does not divide"),
        ("vit", {"event_shape": (1, 8, 8), "num_heads": 3}, r"not a multiple of num_heads"),
        ("transformer_lm", {"event_shape": (8,)}, r"one-hot sequences"),
        ("transformer_lm", {"causal": True, "num_classes": 2}, r"causal"),
        ("resnet", {"width": 0}, r"energy\.width.*greater than 0"),
        ("resnet", {"widht": 8}, r"energy\.widht: unknown key; did you mean 'width'"),
        ("mlp", {"widths": ()}, r"energy\.widths"),
        ("mlp", {"event_shape": (2,), "num_classes": "data"}, r"num_classes: 'data'"),
        ("quadratic", {"precision": -1.0}, r"energy\.precision: not positive definite"),
        ("quadratic", {"precision": ((1.0, 2.0), (2.0, 1.0))}, r"not positive definite"),
        ("quadratic", {"precision": (1.0, 2.0), "mean": (1.0,)}, r"energy\.mean: 1 entries"),
        ("quadratic", {"precision": (1.0,), "event_shape": (2,)}, r"energy\.precision: 1 entries"),
        ("gaussian_mixture", {"means": ((0.0,), (1.0, 2.0))}, r"rows of lengths \[1, 2\]"),
        ("gaussian_mixture", {"means": ((0.0,),), "stds": (1.0, 2.0)}, r"energy\.stds: 2"),
        ("ring", {"width": 0.0}, r"energy\.width"),
        ("double_well", {"depth": -4.0}, r"energy\.depth"),
        ("ising", {"shape": (4, 1)}, r"energy\.shape: \(4, 1\)"),
        ("potts", {"num_values": 1}, r"energy\.num_values"),
        ("potts", {"field": (1.0,)}, r"energy\.field: 1 entries, but 3 values"),
        ("lattice_phi4", {"mass2": -1.0, "quartic": 0.0}, r"no finite Z"),
        ("rbm", {"num_visible": 4, "event_shape": (5,)}, r"num_visible: 4"),
        ("hopfield", {"patterns": ((0, 2),)}, r"energy\.patterns"),
        ("hopfield", {"patterns": ((0, -1),)}, r"all in \{0, 1\} or all in"),
        ("hopfield", {"patterns": ((0, 1), (1,))}, r"rows of lengths \[1, 2\]"),
        ("sum", {"members": ()}, r"energy\.members"),
        ("sum", {"members": [{"width": 3}]}, r"energy\.members\.0.*\{name"),
        ("sum", {"members": [{"name": "rign"}]}, r"did you mean 'ring'"),
        ("sum", {"members": [{"name": "ring"}], "weights": (1.0, 2.0)}, r"energy\.weights: 2"),
        ("sum", {"members": [{"name": "ring"}, {"name": "double_well"}]}, r"event shapes differ"),
        ("tempered", {"member": {"name": "ring"}, "temperature": 0}, r"energy\.temperature"),
        ("conditional", {"member": {"name": "ring"}}, r"member: has no num_classes"),
        (
            "conditional",
            {"member": {"name": "mlp", "num_classes": 3}, "label": 3},
            r"label: 3, but the member has 3 classes",
        ),
        (
            "mixture",
            {"members": [{"name": "mlp", "event_shape": (2,)}], "normalised": True},
            r"log Z is not known exactly",
        ),
    ],
)
def test_bad_parameters_give_one_line_that_names_them(
    name: str, params: dict[str, Any], words: str
):
    with pytest.raises(ValueError, match=words) as caught:
        energies.make(name, **params)
    assert "\n" not in str(caught.value)


def test_network_without_classes_refuses_logits_and_says_what_to_set():
    energy = energies.make("mlp", event_shape=(2,))
    assert isinstance(energy, energies.NetworkEnergy)
    with pytest.raises(ValueError, match=r"energy\.num_classes: not set"):
        energy.logits(torch.zeros(3, 2))


def test_yaml_sections_reach_nested_members_and_come_back_whole():
    adapter = TypeAdapter(EnergyConfig)
    config = adapter.validate_python(
        {"name": "tempered", "temperature": 2, "member": {"name": "resnet", "width": 8}}
    )
    dumped = json.loads(json.dumps(config.model_dump(mode="json")))
    assert dumped["member"]["width"] == 8
    assert dumped["member"]["multipliers"] == [1, 2, 2]
    assert adapter.validate_python(dumped) == config
    with pytest.raises(ValidationError, match="widht"):
        adapter.validate_python(
            {"name": "tempered", "temperature": 2, "member": {"name": "resnet", "widht": 8}}
        )


def test_json_schema_describes_every_energy():
    schema = json.dumps(TypeAdapter(EnergyConfig).json_schema())
    for name, member in energies.FAMILY.members.items():
        assert f'"const": "{name}"' in schema
        for key, info in member.model_fields.items():
            assert key == "name" or info.description, f"{name}.{key} has no description"
