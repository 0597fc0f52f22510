"""The average of the weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from ebm_dist.core.weights import FlatLayout
from ebm_dist.learner.ema import Ema


def test_average_follows_its_recursion_with_the_early_decay():
    weights = np.random.default_rng(0).normal(size=(30, 5)).astype(np.float32)
    ema = Ema(0.8, weights[0])
    expected = weights[0].astype(np.float64)
    for n, flat in enumerate(weights[1:], start=1):
        ema.update(flat)
        decay = min(0.8, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * flat
    np.testing.assert_allclose(ema.flat.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_one_update_for_many_decays_as_many_of_the_same_weights():
    one, many = Ema(0.9, np.zeros(3)), Ema(0.9, np.zeros(3))
    one.num_updates = many.num_updates = 1000
    flat = np.ones(3, dtype=np.float32)
    one.update(flat, num_updates=5)
    for _ in range(5):
        many.update(flat)
    torch.testing.assert_close(one.flat, many.flat)
    assert one.num_updates == many.num_updates


def test_decay_zero_is_the_weights_themselves():
    ema = Ema(0.0, np.zeros(3))
    ema.update(np.array([1.0, 2.0, 3.0], dtype=np.float32))
    assert ema.flat.tolist() == [1.0, 2.0, 3.0]


def test_average_is_a_copy_of_what_it_was_given():
    flat = np.zeros(3, dtype=np.float32)
    ema = Ema(0.9, flat)
    ema.update(np.ones(3, dtype=np.float32))
    assert not flat.any()


def test_resumed_average_continues_bitwise():
    weights = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    whole, half = Ema(0.99, weights[0]), Ema(0.99, weights[0])
    for flat in weights[1:]:
        whole.update(flat)
    for flat in weights[1:4]:
        half.update(flat)
    rest = Ema(0.99, torch.zeros(5))
    rest.load_state(half.state())
    for flat in weights[4:]:
        rest.update(flat)
    assert torch.equal(whole.flat, rest.flat)


def test_weights_of_another_energy_are_refused():
    ema = Ema(0.9, np.zeros(3))
    with pytest.raises(ValueError, match="holds 3 weights, got 4"):
        ema.update(np.zeros(4))
    with pytest.raises(ValueError, match="averages 4 weights, the energy has 3"):
        ema.load_state(Ema(0.9, np.zeros(4)).state())


def test_the_average_keeps_spectral_norms_vectors_at_unit_length():
    # Averaged along with the weights they shrink; sigma = u^T W v then comes out too small.
    energy = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 4))
    layout = FlatLayout.of(energy)
    generator = torch.Generator().manual_seed(0)
    ema = Ema(0.99, layout.pack(energy), num_averaged=layout.num_parameters)
    for _ in range(50):
        with torch.no_grad():
            for parameter in energy.parameters():
                parameter.copy_(torch.empty_like(parameter).normal_(generator=generator))
        energy(torch.zeros(1, 6))  # moves the vectors
        ema.update(layout.pack(energy))
    vectors = [view for name, view in layout.views(ema.flat).items() if name.endswith(("_u", "_v"))]
    assert len(vectors) == 2
    for vector in vectors:
        assert abs(vector.norm().item() - 1) < 1e-5


def test_the_average_has_the_same_bits_on_any_number_of_threads():
    # The thread that publishes has one, the one that writes checkpoints those of the learner.
    weights = torch.randn(5, 200_003, generator=torch.Generator().manual_seed(0))
    before, averages = torch.get_num_threads(), []
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            ema = Ema(0.999, weights[0])
            for flat in weights[1:]:
                ema.update(flat)
            averages.append(ema.flat)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(averages[0], average) for average in averages[1:])
