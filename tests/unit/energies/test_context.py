"""Claims on energies that are given a label, a level or a condition for each chain."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ebm_dist import energies
from ebm_dist.core.types import EventSpec
from ebm_dist.samplers import FAMILY, Engine, run_chain
from ebm_dist.samplers.compile import engine as engine_module

NUM = 6
LEVELS = {"num_levels": 4, "noise_stds": (0.1, 2.0)}
ALL = {**LEVELS, "num_classes": 3, "classes": "embedding", "data_std": 0.5, "embedding_width": 16}
NETWORKS: list[tuple[str, dict[str, Any]]] = [
    ("mlp", {"event_shape": (2,), "widths": (16,), "condition_shape": (3,)}),
    ("mlp", {"event_shape": (1, 4, 4), "widths": (16,), "condition_shape": (3,)}),
    ("resnet", {"event_shape": (1, 7, 5), "width": 8, "condition_shape": (2, 7, 5)}),
    ("igebm", {"event_shape": (1, 7, 5), "width": 8, "condition_shape": (2, 7, 5)}),
    ("wide_resnet", {"event_shape": (3, 8, 8), "depth": 10, "widen": 1, "norm": "group"}),
    ("unet", {"event_shape": (3, 7, 5), "width": 8, "num_heads": 2, "condition_shape": (1, 7, 5)}),
    ("unet", {"event_shape": (1, 8, 6), "width": 8, "parameterisation": "inner_product"}),
    ("unet", {"event_shape": (1, 8, 6), "patch_size": 2, "parameterisation": "denoiser"}),
    ("vit", {"event_shape": (1, 8, 8), "width": 16, "depth": 2, "num_heads": 2}),
]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def context_of(energy: Any, num: int = NUM) -> dict[str, Tensor]:
    shape = energy.condition_shape or ()
    everything = {
        "label": torch.arange(num) % 3,
        "level": torch.arange(num) % 4,
        "condition": torch.randn(num, *shape, generator=generator(1)),
    }
    return {name: value for name, value in everything.items() if name in energy.context}


@pytest.fixture(params=NETWORKS, ids=lambda v: "-".join([v[0], *v[1]]))
def energy(request: pytest.FixtureRequest) -> energies.Energy:
    name, params = request.param
    return energies.make(name, **params, **ALL).eval()


def events(energy: energies.Energy, num: int = NUM) -> Tensor:
    assert energy.event_shape is not None
    return torch.rand(num, *energy.event_shape, generator=generator())


def test_given_equals_one_chain_at_a_time(energy: energies.Energy):
    x, context = events(energy), context_of(energy)
    together = energy.given(**context)(x)
    alone = [
        energy.given(**{name: t[i : i + 1] for name, t in context.items()})(x[i : i + 1])
        for i in range(NUM)
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(energy(x, **context), together, rtol=0, atol=0)


def test_the_gradient_under_a_context_is_that_of_finite_differences(energy: energies.Energy):
    given = energy.double().given(**context_of(energy))
    x = events(energy).double().requires_grad_(True)
    (grad,) = torch.autograd.grad(given(x).sum(), x)
    direction = torch.randn(x.shape, generator=generator(2)).double()
    eps = 1e-6
    with torch.no_grad():
        slope = (given(x + eps * direction) - given(x - eps * direction)) / (2 * eps)
    torch.testing.assert_close(slope, (grad * direction).flatten(1).sum(1), rtol=1e-5, atol=1e-6)


def test_every_part_of_the_context_changes_the_energy(energy: energies.Energy):
    x, context = events(energy), context_of(energy)
    before = energy.given(**context)(x)
    for name, tensor in context.items():
        other = (tensor + 1) % 3 if name != "condition" else tensor + 1
        after = energy.given(**{**context, name: other})(x)
        assert ((after - before).abs() > 1e-6).all(), name


def test_a_cast_to_bf16_does_not_round_the_noise(energy: energies.Energy):
    stds = torch.tensor(energy.noise_stds)
    assert torch.equal(energy.bfloat16().levels(torch.arange(4)), stds)  # type: ignore[operator]
    assert energy.given(**context_of(energy))(events(energy)).dtype == torch.float32


def test_logits_give_the_marginal_without_a_label_and_the_class_with_one():
    energy = energies.make("mlp", event_shape=(2,), widths=(8,), num_classes=3, **LEVELS)
    assert isinstance(energy, energies.NetworkEnergy)
    x, context = events(energy), context_of(energy)
    label, level = context["label"], context["level"]
    logits = energy.logits(x, level=level)
    torch.testing.assert_close(energy.given(level=level)(x), -logits.logsumexp(1))
    expected = -logits.gather(1, label[:, None])[:, 0]
    torch.testing.assert_close(energy.given(label=label, level=level)(x), expected)


def test_levels_are_listed_or_lie_between_the_first_and_the_last_at_equal_ratios():
    def stds(num: int, *noise_stds: float) -> Any:
        section = energies.FAMILY.section("mlp", num_levels=num, noise_stds=noise_stds)
        return section.levels  # type: ignore[attr-defined]

    assert stds(3, 0.1, 0.2, 0.9) == (0.1, 0.2, 0.9)
    assert stds(3, 0.1, 10.0) == pytest.approx((0.1, 1.0, 10.0))
    assert stds(1, 0.5) == (0.5,)


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"num_levels": 4}, r"noise_stds: missing.*num_levels: 16"),
        ({"noise_stds": (0.1, 1.0)}, r"num_levels: missing"),
        ({"num_levels": 4, "noise_stds": (0.1, 0.2, 0.3)}, r"noise_stds: 3 of them, expected 4"),
        ({"num_levels": 2, "noise_stds": (1.0, 0.1)}, r"expected rising"),
        ({"num_levels": 1, "noise_stds": (0.1, 1.0)}, r"noise_stds: 2 of them, expected 1"),
        ({"classes": "embedding"}, r"classes: embedding, but num_classes is not set"),
    ],
)
def test_levels_and_classes_that_say_too_little_are_refused(params: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words):
        energies.make("mlp", event_shape=(2,), **params)


def test_a_condition_of_other_sides_is_refused():
    with pytest.raises(ValueError, match=r"energy\.condition_shape: \(1, 4, 4\).*\(1, 8, 8\)"):
        energies.make("resnet", event_shape=(1, 8, 8), condition_shape=(1, 4, 4))


@pytest.mark.parametrize(
    ("context", "words"),
    [
        ({"label": torch.tensor([0, 1, 2])}, r"needs the level of each chain; call energy\.given"),
        ({"label": torch.tensor([0, 1, 3]), "level": torch.zeros(3).long()}, r"label: 3.*0 to 2"),
        ({"label": torch.zeros(3).long(), "level": torch.tensor([0, -1, 1])}, r"level: -1.*0 to 3"),
        (
            {"label": torch.zeros(3), "level": torch.zeros(3).long()},
            r"label: expected \(B,\) int64",
        ),
        ({"label": torch.zeros(2).long(), "level": torch.zeros(3).long()}, r"one row for each"),
        ({"condition": torch.zeros(3, 2)}, r"takes label and level alone, got condition"),
    ],
)
def test_context_that_does_not_fit_is_refused_in_one_line(context: dict[str, Tensor], words: str):
    energy = energies.make(
        "mlp", event_shape=(2,), num_classes=3, classes="embedding", num_levels=4, noise_stds=(1, 9)
    )
    with pytest.raises(ValueError, match=words) as caught:
        energy.given(**context)
    assert "\n" not in str(caught.value)


def test_an_energy_without_context_refuses_one_and_one_with_it_refuses_a_bare_call():
    plain = energies.quadratic(1.0)
    with pytest.raises(ValueError, match=r"Quadratic takes no context, got level; leave it out"):
        plain.given(level=torch.zeros(3).long())
    assert plain.given() is plain
    energy = energies.make("mlp", event_shape=(2,), **LEVELS)
    for call in (lambda: energy(torch.zeros(3, 2)), energy.given):
        with pytest.raises(
            ValueError, match=r"needs the level.*energy\.given\(level=\.\.\.\)\(x\)"
        ):
            call()
    given = energy.given(level=torch.zeros(3).long())
    with pytest.raises(ValueError, match=r"given the level of 3 chains, called with 2"):
        given(torch.zeros(2, 2))


def test_a_composition_gives_each_member_its_own_part():
    net = energies.make("mlp", event_shape=(2,), **LEVELS)
    classes = energies.make("mlp", event_shape=(2,), num_classes=3)
    x, level, label = torch.rand(NUM, 2), torch.arange(NUM) % 4, torch.arange(NUM) % 3
    sum_ = energies.Sum([net, energies.quadratic(2.0), classes])
    assert (sum_.context, sum_.needs_context) == ({"level", "label"}, {"level"})
    expected = net(x, level=level) + energies.quadratic(2.0)(x) + classes(x, label=label)
    torch.testing.assert_close(sum_.given(level=level, label=label)(x), expected)
    guided = energies.Conditional(classes, guidance=2.0)
    logits = classes.logits(x)
    of_label = logits.log_softmax(1).gather(1, label[:, None])[:, 0]
    torch.testing.assert_close(guided.given(label=label)(x), -logits.logsumexp(1) - 2 * of_label)
    with pytest.raises(ValueError, match="takes no context"):
        energies.Conditional(classes, label=1).given(label=label)
    with pytest.raises(ValueError, match="noise levels differ"):
        energies.Sum([net, energies.make("mlp", event_shape=(2,), num_levels=1, noise_stds=(1,))])


def test_a_composition_gives_a_function_the_context_that_it_names():
    def shifted(x, label):
        return (x - label[:, None]).square().sum(1)

    shifted.context = shifted.needs_context = frozenset({"label"})
    sum_ = energies.Sum([shifted, lambda x: x.sum(1)])
    x, label = torch.rand(NUM, 2), torch.arange(NUM) % 3
    assert sum_.context == sum_.needs_context == {"label"}
    torch.testing.assert_close(sum_.given(label=label)(x), shifted(x, label) + x.sum(1))


class Own(nn.Module):
    """A user's network with the traits."""

    context = needs_context = frozenset({"label"})
    num_labels = 3

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(3, 2)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return (x - self.table(label)).square().sum(1)


def test_a_network_of_the_users_own_takes_context_by_its_traits():
    own, x, label = Own(), torch.rand(NUM, 2), torch.arange(NUM) % 3
    torch.testing.assert_close(energies.bind(own, label=label)(x), own(x, label))
    with pytest.raises(ValueError, match=r"label: 7"):
        energies.bind(own, label=label + 5)
    section = energies.given(Own).bind(EventSpec((2,), "real"))
    assert section.build().needs_context == {"label"}


# Samplers.


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The traced graphs, run as they are instead of being compiled."""
    seen: list[Any] = []

    def keep(graph: Any, inputs: list[Tensor]) -> Any:
        seen.append(graph)
        return lambda tensors: graph(*tensors)

    monkeypatch.setattr(engine_module, "compile_graph", keep)
    return seen


def well(x: Tensor, label: Tensor) -> Tensor:
    """|x - place(label)|^2, (B,)."""
    flat = x.flatten(1)
    return (flat - label[:, None] * torch.arange(flat.shape[1]).cos()).square().sum(1)


def by_label(x: Tensor) -> Tensor:
    """Wells of chains with the labels 0, 1, 2, 0, ..., or of whole copies of them."""
    return well(x, (torch.arange(NUM) % 3).repeat(len(x) // NUM))


class Wells(energies.Energy):
    """An energy with a label, on any events."""

    context = needs_context = frozenset({"label"})
    num_labels = 3

    def __init__(self) -> None:
        super().__init__(None)

    def energy(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        assert label is not None
        return well(x, label)


@pytest.mark.parametrize("name", sorted(FAMILY.members.keys() - {"module"}))
def test_every_sampler_moves_given_chains_as_those_of_the_function_written_out(name: str):
    member: Any = FAMILY.members[name]
    kernel, label = FAMILY.make(name, **member.example), torch.arange(NUM) % 3
    x = torch.rand(NUM, 4)
    if member.discrete:
        x = torch.eye(4)[torch.arange(5 * NUM).reshape(NUM, 5) % 4]
    given = run_chain(kernel, x, Wells().given(label=label), 5, generator())
    explicit = run_chain(kernel, x, by_label, 5, generator())
    assert torch.equal(given.position, explicit.position)
    assert torch.equal(given.energies, explicit.energies)


@pytest.mark.parametrize(
    ("name", "net"), [("langevin", "unet"), ("mala", "resnet"), ("hmc", "resnet")]
)
def test_compiled_blocks_take_each_rounds_context_without_a_compilation(graphs, name, net):
    params = {"parameterisation": "denoiser"} if net == "unet" else {}
    energy = energies.make(
        net, event_shape=(1, 7, 7), width=4, multipliers=(1, 1), **params, **ALL
    ).eval()
    kernel = FAMILY.make(name, **FAMILY.members[name].example)  # type: ignore[attr-defined]
    engine, x, ends = Engine("compiled", background=False), events(energy), []
    for shift in range(3):
        context = {key: t.roll(shift) for key, t in context_of(energy).items()}
        eager = run_chain(kernel, x, energy.given(**context), 4, generator())
        given = energy.given(**context)
        blocks = run_chain(kernel, x, given, 4, generator(), engine=engine)
        torch.testing.assert_close(blocks.position, eager.position, rtol=1e-4, atol=1e-4)
        ends.append(eager.position)
    assert len(graphs) == (2 if name == "langevin" else 1)
    assert not torch.allclose(ends[0], ends[1], atol=1e-3)


def test_a_bf16_round_takes_context():
    energy = energies.make("resnet", event_shape=(1, 8, 8), width=4, **ALL).eval()
    kernel = FAMILY.make("langevin", step_size=0.1, noise_std=0.01)
    given, x = energy.given(**context_of(energy)), events(energy)
    rough = run_chain(kernel, x, given, 3, generator(), precision="bf16", channels_last=True)
    exact = run_chain(kernel, x, given, 3, generator())
    torch.testing.assert_close(rough.position, exact.position, rtol=0.05, atol=0.05)
    assert energy.body.stem.weight.dtype == torch.float32  # type: ignore[union-attr]


def test_a_quadratic_with_a_slope_is_a_linear_regression_on_its_condition() -> None:
    energy = energies.make("quadratic", precision=(4.0,), mean=(1.0,), slope=((2.0, -1.0),))
    x, c = torch.randn(5, 1), torch.randn(5, 2)
    expected = 2 * (x[:, 0] - 1 - 2 * c[:, 0] + c[:, 1]).square()
    torch.testing.assert_close(energy.given(condition=c)(x), expected)
    with pytest.raises(ValueError, match="needs the condition of each chain"):
        energy(x)
    with pytest.raises(ValueError, match=r"energy\.slope: the law depends on a condition"):
        energy.sample(3, torch.Generator())
    with pytest.raises(ValueError, match=r"energy\.slope: 2 entries, .* have 1 numbers"):
        energies.make("quadratic", precision=(4.0,), slope=((2.0,), (1.0,)))
