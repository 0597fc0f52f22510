"""Claims on the energy networks: attention, normalisation, pooling, sequences."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ebm_dist import energies
from ebm_dist.energies.networks.layers import Attention, Head, _attention_weight, _FusedAttention


def qkv(seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(2, 3, 5, 4, generator=generator, dtype=dtype).requires_grad_(True)
        for _ in range(3)
    ]


@pytest.mark.parametrize("causal", [False, True])
def test_fused_attention_equals_the_formula_to_second_order(causal: bool):
    q, k, v = qkv()
    fused = _FusedAttention.apply(q, k, v, causal)
    plain = _attention_weight(q, k, 0.5, causal) @ v
    torch.testing.assert_close(fused, plain)
    assert torch.autograd.gradcheck(lambda *a: _FusedAttention.apply(*a, causal), (q, k, v))
    assert torch.autograd.gradgradcheck(lambda *a: _FusedAttention.apply(*a, causal), (q, k, v))


@pytest.mark.parametrize("causal", [False, True])
def test_attentions_gradient_is_the_same_whether_or_not_it_can_be_differentiated_again(causal):
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 3, 50, 8, generator=generator).requires_grad_() for _ in range(3))
    grad = torch.randn(2, 3, 50, 8, generator=generator)
    once, twice = (
        torch.autograd.grad(
            _FusedAttention.apply(q, k, v, causal), (q, k, v), grad, create_graph=again
        )
        for again in (False, True)
    )
    assert not once[0].requires_grad
    assert twice[0].requires_grad
    for a, b in zip(once, twice):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_fused_attention_keeps_working_under_vmap():
    q, k, v = qkv()
    one_by_one = torch.vmap(lambda a, b, c: _FusedAttention.apply(a, b, c, False))(q, k, v)
    torch.testing.assert_close(one_by_one, _FusedAttention.apply(q, k, v, False))


def test_causal_attention_does_not_look_ahead():
    layer = Attention(8, 2, causal=True)
    x = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    (grad,) = torch.autograd.grad(layer(x)[0, 2].sum(), x)
    assert grad[0, :3].abs().min() > 0
    assert grad[0, 3:].abs().max() == 0


def test_head_is_float32_under_autocast():
    head = Head(64, 1)
    x = 10 + torch.randn(512, 64, generator=torch.Generator().manual_seed(0))
    exact = head(x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(head(x), exact, rtol=0, atol=0)


def test_spectral_norm_bounds_every_layers_gain_by_one():
    energy = energies.make(
        "resnet", event_shape=(1, 8, 8), width=8, num_blocks=2, spectral_norm=True
    )
    for _ in range(30):  # the power iteration converges in training mode
        energy(torch.rand(2, 1, 8, 8))
    energy.eval()
    gains = [
        torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item()
        for layer in energy.modules()
        if isinstance(layer, torch.nn.Conv2d)
    ]
    assert len(gains) == 14
    # An upper bound would also hold for weights that were never rescaled: ask for 1.
    assert all(abs(gain - 1) < 0.02 for gain in gains)
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(energy(x), energy(x))


def test_sum_pooling_adds_the_energies_of_far_apart_parts():
    # Two copies of one picture side by side, wide apart: the borders between them are flat.
    picture = torch.zeros(1, 1, 16, 16)
    picture[..., 6:10, 6:10] = torch.rand(4, 4, generator=torch.Generator().manual_seed(0))
    empty = torch.zeros_like(picture)
    params = {"width": 8, "multipliers": (1,)}
    wide = energies.make("resnet", event_shape=(1, 16, 32), **params)
    both, left, right, none = (
        wide(torch.cat(pair, 3))
        for pair in ((picture, picture), (picture, empty), (empty, picture), (empty, empty))
    )
    torch.testing.assert_close(both - none, (left - none) + (right - none), rtol=1e-4, atol=1e-5)
    assert (left - none).abs() > 1e-3


def test_odd_sizes_are_pooled_without_losing_the_last_row():
    energy = energies.make("resnet", event_shape=(1, 7, 7), width=4, multipliers=(1, 1, 1))
    x = torch.zeros(1, 1, 7, 7, requires_grad=True)
    (grad,) = torch.autograd.grad(energy(x).sum(), x)
    assert (grad.abs() > 0).all()


def test_confinement_makes_the_energy_grow_like_a_quadratic():
    energy = energies.make("mlp", event_shape=(2,), widths=(8,), confinement=3.0)
    far = torch.tensor([[1e3, 0.0], [0.0, 1e3]])
    torch.testing.assert_close(energy(far), torch.full((2,), 1.5e6), rtol=1e-2, atol=0)


def test_wide_resnet_has_the_size_of_wrn_28_10():
    section = energies.WideResNetSection(event_shape=(3, 32, 32), num_classes=10)
    with torch.device("meta"):
        energy = section.module()
    count = sum(parameter.numel() for parameter in energy.parameters())
    # WRN-28-10 of Zagoruyko & Komodakis has 36.5 million; without batch norm a little less.
    assert 36.4e6 < count < 36.6e6


@pytest.fixture
def language_model() -> energies.LanguageModel:
    energy = energies.make(
        "transformer_lm", event_shape=(4, 3), causal=True, width=16, depth=2, num_heads=2
    )
    assert isinstance(energy, energies.LanguageModel)
    with torch.no_grad():  # away from the uniform law
        energy.head.weight.mul_(6)
        energy.body.embed.weight.mul_(6)
    return energy.eval()


def all_sequences(length: int, num_values: int) -> Tensor:
    index = torch.tensor(list(itertools.product(range(num_values), repeat=length)))
    return F.one_hot(index, num_values).float()


def test_causal_transformer_is_normalised(language_model: energies.LanguageModel):
    x = all_sequences(4, 3)
    log_prob = -language_model(x)
    assert log_prob.std() > 0.3
    assert abs(log_prob.double().logsumexp(0).item() - language_model.log_z()) < 1e-5


def test_causal_transformer_draws_from_its_own_law(language_model: energies.LanguageModel):
    num = 40_000
    x = all_sequences(4, 3)
    prob = (-language_model(x)).exp().detach().double()
    drawn = language_model.sample(num, torch.Generator().manual_seed(0))
    place = 3 ** torch.arange(3, -1, -1)
    index = (drawn.argmax(-1) * place).sum(1)
    frequency = torch.bincount(index, minlength=81).double() / num
    error = (prob * (1 - prob) / num).sqrt()
    assert ((frequency - prob).abs() < 4.5 * error).all()  # 81 comparisons


def test_conditional_energy_is_minus_the_logit_and_guidance_sharpens_it():
    net = energies.make("mlp", event_shape=(2,), widths=(8,), num_classes=3)
    assert isinstance(net, energies.NetworkEnergy)
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    logits = net.logits(x)
    torch.testing.assert_close(energies.Conditional(net)(x), net(x))
    torch.testing.assert_close(energies.Conditional(net, label=2)(x), -logits[:, 2])
    label = torch.tensor([0, 1, 2, 1, 0])
    torch.testing.assert_close(
        energies.Conditional(net).given(label=label)(x), -logits.gather(1, label[:, None])[:, 0]
    )
    guided = energies.Conditional(net, label=1, guidance=3.0)(x)
    torch.testing.assert_close(guided, net(x) - 3 * logits.log_softmax(1)[:, 1])


def test_any_classifier_module_becomes_an_energy():
    classifier = torch.nn.Linear(2, 4)
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    energy = energies.Conditional(classifier)
    torch.testing.assert_close(energy(x), -classifier(x).logsumexp(1))
    with pytest.raises(ValueError, match=r"logits of shape \(5,\)"):
        energies.Conditional(energies.quadratic(1.0))(x)
