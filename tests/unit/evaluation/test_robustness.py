"""Attacks on linear classifiers, whose robust accuracy is known exactly."""

import pytest
import torch

from ebm_dist import energies
from ebm_dist.evaluation.robustness import attack, robust_accuracy

WEIGHT = torch.tensor([[1.0, -2.0, 0.5], [0.0, 1.0, -1.0]])


def linear(x):
    return x.flatten(1) @ WEIGHT.T


def data(num=2000):
    x = torch.empty(num, 3).normal_(generator=torch.Generator().manual_seed(0))
    noise = torch.empty(num).normal_(generator=torch.Generator().manual_seed(1))
    logits = linear(x)
    return x, (logits[:, 1] - logits[:, 0] + noise > 0).long()


def margin(x, label):
    logits = linear(x)
    return torch.where(label == 1, 1.0, -1.0) * (logits[:, 1] - logits[:, 0])


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.5, 1.5])
@pytest.mark.parametrize(("norm", "dual"), [("l2", 2), ("linf", 1)])
def test_robust_accuracy_of_a_linear_classifier_is_its_share_of_wide_margins(epsilon, norm, dual):
    x, label = data()
    reach = epsilon * torch.linalg.vector_norm(WEIGHT[1] - WEIGHT[0], dual)
    expected = float((margin(x, label) > reach).double().mean())
    got = robust_accuracy(linear, x, label, epsilon=epsilon, norm=norm, clamp=None)
    # Within the two or three events whose margin is the reach to float32.
    assert got == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_attacks_stay_in_the_ball_and_the_range(norm):
    x, label = data(300)
    x = x.clamp(-1, 1)
    generator = torch.Generator().manual_seed(0)
    found = attack(
        linear, x, label, epsilon=0.3, norm=norm, num_restarts=3, generator=generator, num_steps=7
    )
    order = 2 if norm == "l2" else float("inf")
    assert float(torch.linalg.vector_norm(found - x, order, dim=1).max()) <= 0.3 + 1e-5
    assert float(found.abs().max()) <= 1


def test_restarts_only_lower_the_accuracy_and_curves_fall():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(3, 32), torch.nn.Tanh(), torch.nn.Linear(32, 2))
    x, _ = data(300)
    with torch.no_grad():
        label = net(x).argmax(dim=1)
    options = {"norm": "linf", "num_steps": 3, "clamp": None}
    one = robust_accuracy(net.forward, x, label, epsilon=0.3, **options)
    generator = torch.Generator().manual_seed(0)
    many = robust_accuracy(
        net.forward, x, label, epsilon=0.3, num_restarts=5, generator=generator, **options
    )
    assert many <= one
    radii = (0.0, 0.1, 0.3, 1.0)
    curve = [robust_accuracy(net.forward, x, label, epsilon=radius, **options) for radius in radii]
    assert curve == sorted(curve, reverse=True)
    assert curve[0] == 1.0 > curve[-1]


def test_result_does_not_depend_on_the_batch_size():
    x, label = data(100)
    whole = attack(linear, x, label, epsilon=0.4, norm="l2", clamp=None)
    parts = attack(linear, x, label, epsilon=0.4, norm="l2", clamp=None, batch_size=7)
    assert torch.allclose(whole, parts, atol=1e-6)


def test_a_joint_energy_is_attacked_through_its_logits_and_keeps_no_gradients():
    energy = energies.make("mlp", event_shape=(3,), num_classes=2)
    x, label = data(50)
    robust_accuracy(energy, x, label, epsilon=0.5, num_steps=3, clamp=None)
    assert all(parameter.grad is None for parameter in energy.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"norm": "l1"}, "norm"),
        ({"epsilon": -1.0}, "epsilon >= 0"),
        ({"label": torch.zeros(3).long()}, "label: expected shape"),
        ({"num_restarts": 2}, "generator"),
        ({"energy": energies.make("mlp", event_shape=(3,))}, "num_classes"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    x, label = data(10)
    given = {"energy": linear, "x": x, "label": label, "epsilon": 0.1} | arguments
    with pytest.raises(ValueError, match=message):
        robust_accuracy(**given)
