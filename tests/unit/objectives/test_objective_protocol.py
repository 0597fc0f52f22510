"""What holds for every registered objective: a new one is covered by being registered."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch
from torch import Tensor, nn

from ebm_dist import energies, objectives
from ebm_dist.core.types import Batch, EventSpec, Negatives
from ebm_dist.learner.micro_batch import micro_batches
from ebm_dist.metrics import names

NAMES = sorted(objectives.FAMILY.members.keys() - {"module"})  # what a user brings has no example
# Their loss is a surrogate: its gradient is not the slope of its value, by design.
SURROGATES = {"recovery_likelihood", "reverse_kl"}


def build(name: str, **params) -> objectives.Objective:
    section = objectives.FAMILY.members[name]
    return objectives.make(name, **{**section.example, **params})


def energy_of(seed: int = 0) -> nn.Module:
    section = energies.FAMILY.section("mlp", event_shape=(2,), widths=(16,), num_classes=3)
    return section.build(seed)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Batch, Negatives]:
    g = torch.Generator().manual_seed(1)
    # Bits, so that the same batch serves objectives on discrete events.
    x = torch.randint(0, 2, (6, 2), generator=g).to(dtype)
    negatives = torch.randint(0, 2, (8, 2), generator=g).to(dtype)
    spread = torch.randn(8, generator=g)
    return (
        Batch(x, torch.randint(0, 3, (6,), generator=g)),
        Negatives(negatives, torch.zeros(8), torch.zeros(8, dtype=torch.int64), spread),
    )


def evaluate(
    objective: nn.Module, energy: nn.Module, dtype: torch.dtype = torch.float32, seed: int = 2
) -> tuple[Tensor, dict[str, Tensor]]:
    batch, negatives = inputs(dtype)
    return objective(energy, batch, negatives, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", NAMES)
def test_loss_is_a_finite_scalar_and_metrics_are_named_detached_scalars(name):
    loss, metrics = evaluate(build(name), energy_of())
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
    assert metrics["loss/total"].item() == pytest.approx(loss.item())
    assert names.unknown(metrics) == []
    for value in metrics.values():
        assert value.shape == ()
        assert not value.requires_grad


@pytest.mark.parametrize("name", NAMES)
def test_every_weight_of_energy_and_objective_is_trained(name):
    objective, energy = build(name), energy_of()
    loss, _ = evaluate(objective, energy)
    loss.backward()
    trained = [*energy.named_parameters(), *objective.named_parameters()]
    # The constant of an energy is free: nothing that depends on gradients or gaps moves it.
    missing = [n for n, p in trained if p.grad is None and n != "head.bias"]
    assert missing == []
    assert sum(float(p.grad.abs().sum()) for _, p in trained if p.grad is not None) > 0


@pytest.mark.parametrize("name", NAMES)
def test_forward_leaves_gradients_inputs_and_the_global_generator_alone(name):
    objective, energy = build(name), energy_of()
    batch, negatives = inputs()
    before = [batch.x.clone(), negatives.x.clone(), torch.random.get_rng_state()]
    objective(energy, batch, negatives, torch.Generator().manual_seed(2))
    after = [batch.x, negatives.x, torch.random.get_rng_state()]
    assert all(torch.equal(a, b) for a, b in zip(before, after))
    assert batch.x.grad is None
    assert not batch.x.requires_grad
    assert all(p.grad is None for p in [*energy.parameters(), *objective.parameters()])


@pytest.mark.parametrize("name", NAMES)
def test_loss_is_determined_by_the_generator(name):
    objective, energy = build(name), energy_of()
    first, again = (evaluate(objective, energy, seed=5)[0] for _ in range(2))
    assert torch.equal(first, again)
    other = evaluate(objective, energy, seed=6)[0]
    if name == "contrastive_levels":
        return  # its noise is that of levels, which this energy does not have
    assert torch.equal(first, other) != objective.needs_generator


@pytest.mark.parametrize("name", NAMES)
def test_bare_tensors_serve_as_batch_and_negatives(name):
    objective, energy = build(name), energy_of()
    if objective.needs_labels:
        pytest.skip("a bare tensor has no labels")
    batch, negatives = inputs()
    loss, _ = objective(energy, batch.x, negatives.x, torch.Generator().manual_seed(2))
    equal = Negatives(negatives.x, negatives.energy, negatives.version, torch.zeros(8))
    same, _ = objective(energy, batch, equal, torch.Generator().manual_seed(2))
    assert torch.equal(loss, same)


@pytest.mark.parametrize("name", NAMES)
def test_a_metric_is_computed_without_gradient_tracking(name):
    objective, energy = build(name), energy_of()
    tracked = evaluate(objective, energy)[0]
    with torch.no_grad():
        untracked = evaluate(objective, energy)[0]
    assert untracked.item() == pytest.approx(tracked.item(), rel=1e-6)


@pytest.mark.parametrize("name", sorted(set(NAMES) - SURROGATES))
def test_gradient_is_the_slope_of_the_loss(name):
    # Central differences in double precision along a random direction in weight space; a
    # gradient in x taken without create_graph loses whole terms of it.
    objective, energy = build(name).double(), energy_of().double()
    parameters = [*energy.parameters(), *objective.parameters()]
    g = torch.Generator().manual_seed(3)
    direction = [torch.randn(p.shape, generator=g, dtype=torch.float64) for p in parameters]
    loss, _ = evaluate(objective, energy, torch.float64)
    grads = torch.autograd.grad(loss, parameters, materialize_grads=True, allow_unused=True)
    slope = sum(float((a * b).sum()) for a, b in zip(grads, direction))
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, d in zip(parameters, direction):
                p.add_(sign * 1e-5 * d)
        values.append(evaluate(objective, energy, torch.float64)[0].item())
        with torch.no_grad():
            for p, d in zip(parameters, direction):
                p.sub_(sign * 1e-5 * d)
    assert slope == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_builds_the_same_weights_and_leaves_the_global_generator(name):
    section = objectives.FAMILY.section(name, **objectives.FAMILY.members[name].example)
    before = torch.random.get_rng_state()
    first, again = section.build(3), section.build(3)
    assert torch.equal(before, torch.random.get_rng_state())
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_a_section_binds_to_data_that_it_takes_and_refuses_the_rest(name):
    params = objectives.FAMILY.members[name].example
    section = objectives.FAMILY.section(name, **params)
    specs = {
        "real": EventSpec((2,), "real", 3),
        "image": EventSpec((1, 2, 2), "image", 3),
        "binary": EventSpec((2,), "binary", 3),
        "categorical": EventSpec((2, 3), "categorical", 3),
    }
    for kind, spec in specs.items():
        # Without the example's choices, what is left to the data comes from the data.
        kept = {k: v for k, v in params.items() if k in ("noise_std", "num_steps")}
        free = objectives.FAMILY.section(name, **kept)
        if kind not in section.kinds:
            with pytest.raises(ValueError, match=r"objective\.name: .* takes"):
                free.bind(spec)
            continue
        bound = free.bind(spec)
        assert bound.bind(spec) == bound
        assert type(section)(**bound.model_dump()) == bound
        bound.build()


def test_refusals_name_the_argument_and_the_remedy():
    energy, (batch, negatives) = energy_of(), inputs()
    g = torch.Generator().manual_seed(0)
    contrastive = build("contrastive")
    cases = [
        (lambda: contrastive(energy, batch, None, g), "negatives: .*sampler"),
        (lambda: build("joint")(energy, batch.x, negatives, g), r"batch\.label: .*labels"),
        (lambda: build("denoising_score_matching")(energy, batch, None, None), "generator: "),
        (lambda: contrastive(energy, batch.x.long(), negatives, g), r"batch\.x: .*float"),
        (lambda: contrastive(energy, batch, negatives.x.long(), g), r"negatives\.x: .*float"),
        (lambda: contrastive(energy, batch, torch.zeros(3, 5), g), r"negatives\.x: events of"),
        (lambda: contrastive(energy, batch.x[:0], negatives, g), r"batch\.x: .*no event"),
        (
            lambda: contrastive(energy, Batch(batch.x, batch.label[:2]), negatives, g),
            r"batch\.label: shape",
        ),
        (
            lambda: contrastive(lambda x: x.sum(1, keepdim=True), batch, negatives, g),
            r"energy: returned shape .*squeeze\(1\)",
        ),
        (lambda: build("joint")(lambda x: x.sum(1), batch, negatives, g), "num_classes"),
        (lambda: objectives.make("contrastiv"), "did you mean 'contrastive'"),
        (lambda: objectives.make("contrastive", kl_weight=1.0), r"kl_step_size: .*step_size"),
        (lambda: objectives.make("noise_contrastive", low=1.0, high=0.0), "above low"),
        (lambda: objectives.make("reverse_kl"), r"objective\.event_shape"),
        (lambda: objectives.make("denoising_score_matching"), r"noise_std: missing"),
        (
            lambda: objectives.make(
                "denoising_score_matching", conditioning="level", noise_std=1.0
            ),
            r"noise_std: conditioning: level takes the noise from energy\.noise_stds",
        ),
        (
            lambda: objectives.make("denoising_score_matching", noise_std=1, level_weight="edm"),
            r"level_weight, log_noise: only with conditioning: level",
        ),
        (
            lambda: build("score_matching", max_event_size=1)(energy, batch, None, g),
            "sliced_score_matching",
        ),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_bare_negatives_cannot_be_reweighted():
    objective = build("contrastive")
    objective.reweight = True
    batch, negatives = inputs()
    with pytest.raises(ValueError, match="recorded"):
        objective(energy_of(), batch, negatives.x)


@pytest.mark.parametrize("name", ["contrastive", "reverse_kl", "joint"])
def test_two_ranks_have_the_gradient_of_one_rank_on_the_whole_batch(name):
    # Weights that each rank normalised for itself would fail this: the log-weights differ.
    params = {"reverse_kl": {}, "joint": {}, "contrastive": {"gradient_penalty": 0.1}}[name]
    batch, negatives = inputs()
    stale = Negatives(
        negatives.x, torch.linspace(-1, 1, 8), negatives.version, negatives.log_weight
    )
    energy = energy_of()

    def gradient(objective, parts):
        total = [torch.zeros_like(p) for p in [*energy.parameters(), *objective.parameters()]]
        for b, n in parts:
            loss, _ = objective(energy, b, n)
            for t, grad in zip(
                total,
                torch.autograd.grad(
                    loss, [*energy.parameters(), *objective.parameters()], allow_unused=True
                ),
            ):
                t += 0 if grad is None else grad / len(parts)
        return total

    whole = build(name, **params)
    whole.reweight = True
    expected = gradient(whole, [(batch, stale)])

    halves = micro_batches(batch, stale, 2, torch.device("cpu"))
    ranked = build(name, **params)
    ranked.reweight = True
    ranked.gather_ranks = _lockstep(ranked, energy, halves)
    came = gradient(ranked, halves)
    for a, b in zip(expected, came, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    ranked.gather_ranks = None
    apart = gradient(ranked, halves)
    assert not all(torch.allclose(a, b, rtol=1e-2) for a, b in zip(expected, apart))


def _lockstep(objective, energy, halves):
    """A gather over two ranks in one process.

    Both run, round after round, until every collective has both its parts; then they are
    replayed in the order in which each rank asks.
    """
    parts: list[dict[int, Tensor]] = []
    for _ in range(8):
        added = False
        for rank, (b, n) in enumerate(halves):
            count = [0]

            def gather(x, rank=rank, count=count):
                if count[0] == len(parts):
                    parts.append({})
                seen = parts[count[0]]
                seen.setdefault(rank, x.detach().clone())
                count[0] += 1
                if len(seen) < 2:
                    raise InterruptedError
                return torch.stack([seen[0], seen[1]])

            objective.gather_ranks = gather
            before = len(parts) + sum(len(p) for p in parts)
            with suppress(InterruptedError):
                objective(energy, b, n)
            added |= before != len(parts) + sum(len(p) for p in parts)
        if not added:
            break
    served = [0]

    def replay(x):
        del x
        both = parts[served[0] % len(parts)]
        served[0] += 1
        return torch.stack([both[0], both[1]])

    return replay
