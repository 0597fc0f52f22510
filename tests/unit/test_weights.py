"""Weights travel as one flat array and arrive as they were."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from ebm_dist import energies
from ebm_dist.core.weights import FlatLayout, as_sent, flat_tensors

NETWORKS = [
    ("mlp", {"event_shape": (5,)}),
    ("mlp", {"event_shape": (5,), "spectral_norm": True}),
    ("resnet", {"event_shape": (1, 8, 8), "width": 4}),
    ("resnet", {"event_shape": (1, 8, 8), "width": 4, "spectral_norm": True}),
    ("vit", {"event_shape": (1, 8, 8)}),
]


def build(name: str, params: dict, seed: int) -> nn.Module:
    return energies.FAMILY.section(name, **params).build(seed=seed)  # type: ignore[attr-defined]


def events(params: dict) -> torch.Tensor:
    return torch.rand(3, *params["event_shape"], generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("name", "params"), NETWORKS)
def test_weights_arrive_as_they_were(name: str, params: dict) -> None:
    source, target = build(name, params, 1), build(name, params, 2)
    x = events(params)
    # In training the power iteration of spectral norm moves its buffers: they travel too.
    source.train()(x)
    layout = FlatLayout.of(source)
    flat = layout.pack(source)
    assert flat.shape == (layout.size,)
    assert layout.size == sum(t.numel() for t in flat_tensors(source).values())
    assert not torch.equal(source.eval()(x), target.eval()(x))
    layout.load_(target, flat.numpy())
    state = target.state_dict()
    for key, value in source.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert torch.equal(source(x), target(x))


def test_spectral_norms_vectors_are_in_the_layout() -> None:
    plain, normed = (FlatLayout.of(build(*NETWORKS[i], 0)) for i in (0, 1))
    assert normed.size > plain.size
    assert any(name.endswith("_u") for name in normed.names)


def test_a_packed_array_is_a_copy() -> None:
    energy = build(*NETWORKS[0], 0)
    flat = FlatLayout.of(energy).pack(energy)
    before = flat.clone()
    with torch.no_grad():
        for parameter in energy.parameters():
            parameter.add_(1.0)
    assert torch.equal(flat, before)


def test_weights_of_another_size_are_refused_with_both_numbers() -> None:
    energy = build(*NETWORKS[0], 0)
    layout = FlatLayout.of(energy)
    with pytest.raises(ValueError, match=f"7 numbers, the energy has {layout.size}"):
        layout.load_(energy, np.zeros(7, np.float32))


def test_a_buffer_that_cannot_travel_is_refused_by_name() -> None:
    module = nn.Linear(2, 1)
    module.register_buffer("count", torch.zeros((), dtype=torch.int64))
    with pytest.raises(ValueError, match=r"'count' is torch\.int64.*persistent=False"):
        FlatLayout.of(module)


def test_a_buffer_that_is_not_persistent_stays_at_home() -> None:
    module = nn.Linear(2, 1)
    module.register_buffer("table", torch.zeros(9), persistent=False)
    assert FlatLayout.of(module).names == ("weight", "bias")


@pytest.mark.parametrize(("name", "params"), NETWORKS)
def test_bound_weights_are_read_where_they_lie_and_give_the_same_bits(name, params, recwarn):
    bound, copied = build(name, params, 1).eval().requires_grad_(False), build(name, params, 1)
    copied.eval()
    layout, x = FlatLayout.of(bound), events(params)
    for seed in range(3):
        flat = layout.pack(build(name, params, seed)).numpy()
        flat.flags.writeable = False  # as an array of Ray's object store is
        num_copied = layout.bind_(bound, flat)
        layout.load_(copied, flat.copy())
        assert torch.equal(bound(x), copied(x))
        there = {name for name, p in bound.named_parameters() if _lies_in(p, flat)}
        assert there
        assert num_copied == sum(
            tensor.numel() for name, tensor in flat_tensors(bound).items() if name not in there
        )
        # Where torch's own memory would begin as well, so that kernels take the same path.
        assert all(p.data_ptr() % 64 == 0 for p in bound.parameters())
    assert not [w for w in recwarn if "writable" in str(w.message)]


@pytest.mark.parametrize(("name", "params"), NETWORKS)
def test_weights_sent_as_bfloat16_arrive_as_the_nearest_of_them(name, params) -> None:
    source, bound = build(name, params, 1), build(name, params, 2).requires_grad_(False)
    layout = FlatLayout.of(source)
    flat = layout.pack(source).numpy()
    sent = as_sent(flat, "bfloat16")
    assert sent.nbytes == flat.nbytes // 2
    sent.flags.writeable = False
    layout.bind_(bound, sent)
    copied = build(name, params, 3)
    layout.load_(copied, sent)
    for energy in (bound, copied):
        received = flat_tensors(energy)
        for key, tensor in flat_tensors(source).items():
            assert torch.equal(received[key], tensor.bfloat16().float()), key
    assert as_sent(flat, "float32") is flat


def test_weights_that_are_trained_are_not_bound() -> None:
    energy = build("mlp", {"event_shape": (5,)}, 0)
    layout = FlatLayout.of(energy)
    with pytest.raises(AssertionError, match="trained"):
        layout.bind_(energy, layout.pack(energy).numpy())


def _lies_in(tensor: torch.Tensor, flat: np.ndarray) -> bool:
    return 0 <= tensor.data_ptr() - flat.ctypes.data < flat.nbytes
