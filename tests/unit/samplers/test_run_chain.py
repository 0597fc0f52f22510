"""What `run_chain` promises beside the kernels: bad use, precision, layout, frozen parameters."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ebm_dist import samplers
from ebm_dist.core import errors
from ebm_dist.energies import ising, rbm
from ebm_dist.samplers import FAMILY, adapt_step_size, run_chain

GRADIENT = ["langevin", "mala", "hmc", "sghmc", "annealed_langevin", "flow_langevin"]


def make(name: str, **params: Any) -> Any:
    return FAMILY.make(name, **{**FAMILY.members[name].example, **params})  # type: ignore[attr-defined]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def bowl(x: Tensor) -> Tensor:
    return 0.5 * x.square().flatten(1).sum(1)


class Conv(nn.Module):
    """A small image energy."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            self.body = nn.Sequential(
                nn.Conv2d(3, 8, 3, padding=1),
                nn.SiLU(),
                nn.Conv2d(8, 8, 3, 2, padding=1),
                nn.SiLU(),
            )
            self.head = nn.Linear(8 * 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).flatten(1)).squeeze(1).float()


@pytest.mark.parametrize("name", FAMILY.members)
@pytest.mark.parametrize(
    ("x", "energy", "message"),
    [
        (torch.zeros(4, 2, dtype=torch.long), bowl, r"^x: expected floating-point.*x\.float\(\)"),
        (torch.zeros(4), bowl, r"^x: expected \(B, \*event\)"),
        (torch.zeros(0, 2), bowl, r"^x: expected \(B, \*event\)"),
        ([[0.0, 1.0]], bowl, r"^x: expected a tensor"),
        (torch.zeros(4, 2), nn.Linear(3, 1), r"^x: the energy cannot take events of shape \(2,\)"),
        (torch.zeros(4, 2), lambda x: bowl(x)[:, None], r"^energy: .*\(4,\).*\(4, 1\).*squeeze"),
        (torch.zeros(4, 2), lambda x: bowl(x).sum(), r"^energy: .*\(4,\), got \(\)"),
        (torch.zeros(4, 2), lambda x: bowl(x).long(), r"^energy: expected floats"),
        (torch.zeros(4, 2), lambda x: bowl(x) + torch.nan, r"^energy: 4 of 4 .*non-finite"),
        (torch.zeros(4, 2), lambda x: bowl(x) + torch.inf, r"^energy: 4 of 4 .*non-finite"),
        (torch.zeros(4, 2), lambda x: None, r"^energy: .*got NoneType"),
    ],
)
def test_bad_use_names_the_argument_and_the_remedy(name, x, energy, message):
    with pytest.raises(ValueError, match=message):
        run_chain(make(name), x, energy, 3, generator())


def test_wrong_event_shape_is_told_from_what_the_energy_says_of_itself():
    with pytest.raises(ValueError, match=r"x: chains have event shape \(3, 3\), .* \(4, 4\)"):
        run_chain(make("gibbs"), torch.zeros(2, 3, 3), ising((4, 4)), 1, generator())


@pytest.mark.parametrize("name", [*GRADIENT, "gibbs_with_gradients", "discrete_langevin"])
def test_an_energy_without_a_gradient_is_refused_by_those_that_need_one(name):
    with pytest.raises(ValueError, match=r"^energy: has no gradient in x.*random_walk or gibbs"):
        run_chain(make(name), torch.ones(4, 2), lambda x: bowl(x.detach()), 3, generator())


@pytest.mark.parametrize("name", ["gibbs", "gibbs_with_gradients", "discrete_langevin"])
def test_discrete_samplers_refuse_events_that_are_not_discrete(name):
    with pytest.raises(ValueError, match=r"x: a discrete sampler moves \{0, 1\} floats"):
        run_chain(make(name), torch.randn(4, 3, generator=generator()), bowl, 1, generator())
    kernel, ones = make(name, kind="categorical"), torch.ones(4, 2, 3)
    with pytest.raises(ValueError, match=r"x: categorical events are one-hot"):
        run_chain(kernel, ones, bowl, 1, generator())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_steps": 0}, r"^num_steps: .* at least 1"),
        ({"num_steps": 2.0}, r"^num_steps: expected a whole number"),
        ({"record_every": -1}, r"^record_every: "),
        ({"generator": 0}, r"^generator: expected a torch.Generator, got int"),
        ({"precision": "fp16"}, r"^precision: expected 'fp32' or 'bf16'"),
    ],
)
def test_run_chain_refuses_arguments_that_make_no_sense(change, message):
    arguments = {"num_steps": 3, "generator": generator(), **change}
    with pytest.raises(ValueError, match=message):
        run_chain(make("mala"), torch.zeros(4, 2), bowl, **arguments)


@pytest.mark.parametrize("whole", [np.int64(5), np.uint8(5), torch.tensor(5)])
def test_counts_may_be_whole_numbers_of_any_library(whole):
    chain = run_chain(make("mala"), torch.zeros(4, 2), bowl, whole, generator(), record_every=whole)
    assert chain.energies.shape == (5, 4)
    assert chain.trace is not None
    assert len(chain.trace) == 1


@pytest.mark.parametrize("name", ["langevin", "hmc", "random_walk"])
def test_inference_mode_around_run_chain_changes_nothing(name):
    x = torch.ones(4, 2)
    right = run_chain(make(name), x, bowl, 5, generator())
    with torch.inference_mode():
        came = run_chain(make(name), x.clone(), bowl, 5, generator())
        assert not torch.is_grad_enabled()
    assert torch.equal(came.position, right.position)
    assert not came.position.is_inference()


def test_a_kernel_alone_says_that_inference_mode_leaves_no_gradients():
    with torch.inference_mode(), pytest.raises(ValueError, match=r"inference_mode.*run_chain"):
        make("langevin").init(torch.zeros(4, 2), bowl)


def multiplied(x: Tensor) -> Tensor:
    x.mul_(2)
    return bowl(x)


@torch.no_grad()
def clamped(x: Tensor) -> Tensor:
    x.clamp_(-0.5, 0.5)
    return bowl(x)


@pytest.mark.parametrize("name", FAMILY.members)
@pytest.mark.parametrize("energy", [multiplied, clamped])
def test_an_energy_that_changes_its_argument_is_refused_by_every_sampler(name, energy):
    x = torch.ones(4, 1, 2)
    x[..., 1] = 0  # one-hot, for the discrete ones
    with pytest.raises(ValueError, match=r"^energy: changes its argument x in place.*clone"):
        run_chain(make(name), x, energy, 3, generator())
    assert x.sum() == 4


def test_chains_that_leave_the_finite_energies_raise_both_as_input_and_as_failure():
    kernel = make("langevin", step_size=3.0)
    with pytest.raises(errors.NonFinite, match=r"after 200 steps.*sampler\.step_size"):
        run_chain(kernel, torch.ones(4, 2), lambda x: x.pow(4).sum(1), 200, generator())
    assert issubclass(samplers.NonFiniteEnergy, ValueError)


@pytest.mark.parametrize("name", ["mala", "random_walk", "hmc"])
def test_a_wall_of_infinite_energy_is_never_entered(name):
    def walled(x: Tensor) -> Tensor:
        return bowl(x) + torch.where(x[:, 0] > 0, 0.0, torch.inf)

    chain = run_chain(make(name), torch.ones(500, 2), walled, 30, generator(), 1)
    assert chain.trace is not None
    assert (chain.trace[..., 0] > 0).all()
    # A half-normal in the first coordinate.
    assert chain.position[:, 0].mean().item() == pytest.approx(0.798, abs=0.12)


def test_parameters_need_no_gradient_while_sampling_and_do_again_after_a_failure():
    class Watching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))
            self.fixed = nn.Parameter(torch.ones(()), requires_grad=False)
            self.seen: list[bool] = []
            self.fail_at = 10**9

        def forward(self, x: Tensor) -> Tensor:
            self.seen.append(self.scale.requires_grad)
            if len(self.seen) >= self.fail_at:
                raise KeyError("a fault of the network")
            return self.scale * bowl(x)

        def method(self, x: Tensor) -> Tensor:
            return self(x)

    for precision in ("fp32", "bf16"):
        energy = Watching()
        run_chain(make("langevin"), torch.zeros(2, 2), energy, 3, generator(), precision=precision)
        assert energy.seen == [False] * 4
        assert energy.scale.requires_grad
        assert not energy.fixed.requires_grad
    energy = Watching()
    energy.fail_at = 3
    with pytest.raises(KeyError):
        run_chain(make("langevin"), torch.zeros(2, 2), energy, 5, generator())
    assert energy.scale.requires_grad
    bound = Watching()
    run_chain(make("langevin"), torch.zeros(2, 2), bound.method, 1, generator())
    assert bound.seen == [False] * 2
    assert bound.scale.requires_grad


def test_clipping_and_clamping_bound_what_they_say():
    x = torch.tensor([[0.9, -0.9], [0.1, 0.0]])
    steep = 1e3
    clipped = make("langevin", step_size=1.0, temperature=0.0, grad_clip=0.01)
    moved = run_chain(clipped, x, lambda x: steep * bowl(x), 1, generator())
    torch.testing.assert_close(moved.position, x - 0.01 * x.sign())
    # The norm that is reported is that of the gradient itself.
    torch.testing.assert_close(moved.info["grad_norm"], steep * x.norm(dim=1))
    by_norm = make("langevin", step_size=1.0, temperature=0.0, grad_norm_clip=0.5)
    moved = run_chain(by_norm, x, lambda x: steep * bowl(x), 1, generator())
    torch.testing.assert_close((moved.position - x).norm(dim=1), torch.tensor([0.5, 0.5]))
    small = run_chain(by_norm, 0.1 * x, bowl, 1, generator())
    torch.testing.assert_close(small.position, torch.zeros_like(x))
    clamped = make("langevin", step_size=0.1, temperature=50.0, clamp=(-1, 1))
    chain = run_chain(clamped, x, bowl, 5, generator(), 1)
    assert chain.trace is not None
    assert chain.trace.abs().max() <= 1


def test_bf16_keeps_float32_positions_and_nearly_the_same_moves():
    energy, x = Conv(), torch.rand(16, 3, 8, 8, generator=generator(1)) * 2 - 1
    kernel = make("langevin", step_size=1.0, temperature=1e-6)
    exact = run_chain(kernel, x, energy, 4, generator(2))
    rough = run_chain(kernel, x, energy, 4, generator(2), precision="bf16")
    assert rough.position.dtype == rough.energy.dtype == torch.float32
    assert not torch.equal(exact.position, rough.position)
    moved = (exact.position - x).norm()
    assert (exact.position - rough.position).norm() < 0.03 * moved
    # The moves survive that bf16 positions would have rounded away.
    tiny = make("langevin", step_size=1.0, temperature=1e-12)
    assert (run_chain(tiny, x, energy, 1, generator(), precision="bf16").position != x).any()


def test_channels_last_changes_rounding_alone():
    energy, x = Conv(), torch.rand(16, 3, 8, 8, generator=generator(1)) * 2 - 1
    for name in (*GRADIENT, "random_walk"):
        kernel = make(name)
        plain = run_chain(kernel, x, energy, 3, generator(2), record_every=1)
        last = run_chain(kernel, x, energy, 3, generator(2), record_every=1, channels_last=True)
        assert last.position.is_contiguous()
        torch.testing.assert_close(plain.position, last.position, atol=1e-5, rtol=1e-5)
        assert last.trace is not None
        torch.testing.assert_close(plain.trace, last.trace, atol=1e-5, rtol=1e-5)


class Counting(torch.autograd.Function):
    """The identity, which counts how often it is differentiated."""

    num_gradients = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        Counting.num_gradients += 1
        return grad


def test_langevin_takes_one_gradient_a_step_and_none_where_it_ends():
    Counting.num_gradients = 0
    energies = []

    def counted(x: Tensor) -> Tensor:
        energies.append(bowl(Counting.apply(x)))
        return energies[-1]

    chain = run_chain(make("langevin"), torch.ones(4, 2), counted, 10, generator())
    assert Counting.num_gradients == 10
    # The start and where each step led.
    assert torch.equal(torch.stack(energies[1:]), chain.energies)
    assert len(energies) == 11


@pytest.mark.parametrize("name", ["langevin", "mala"])
def test_energies_keep_the_precision_that_the_energy_gives_them(name):
    def exact(x: Tensor) -> Tensor:
        return 1e6 + bowl(x.double())

    chain = run_chain(make(name), torch.ones(4, 2), exact, 5, generator())
    assert chain.energies.dtype == chain.energy.dtype == torch.float64
    torch.testing.assert_close(chain.energy, exact(chain.position), rtol=1e-12, atol=0)


def test_a_chain_goes_on_from_its_state_as_if_it_had_not_stopped():
    for name in ("sghmc", "annealed_langevin", "flow_langevin", "parallel_tempering"):
        kernel, x, noise = make(name), torch.ones(5, 2), generator(4)
        half = run_chain(kernel, x, bowl, 6, noise).state
        for _ in range(6):
            half, _ = kernel.step(half, bowl, noise)
        whole = run_chain(kernel, x, bowl, 12, generator(4))
        assert torch.equal(half.position, whole.position)


@pytest.mark.parametrize("name", ["annealed_langevin", "flow_langevin"])
def test_a_schedule_goes_on_by_the_age_of_each_chain(name):
    """Twenty steps are four rounds of five, also for chains of different ages in one batch."""
    kernel, x = make(name), torch.ones(4, 2)
    whole = run_chain(kernel, x, bowl, 20, generator(4))
    noise, part = generator(4), x
    for k in range(0, 20, 5):
        part = run_chain(kernel, part, bowl, 5, noise, clock=torch.full((4,), k)).position
    assert torch.equal(part, whole.position)
    mixed = torch.tensor([0, 3, 8, 30])
    info = run_chain(kernel, x, bowl, 1, generator(), clock=mixed).info["move_temperature"]
    torch.testing.assert_close(info, kernel.temperature_at(mixed).float())
    assert len(set(info.tolist())) > 1


def test_tiles_of_chains_move_as_the_batch_does_without_noise():
    energy, x = Conv(), torch.rand(16, 3, 8, 8, generator=generator(1))
    kernel = make("langevin", step_size=1.0, temperature=0.0)
    whole = run_chain(kernel, x, energy, 3, generator()).position
    tiles = [run_chain(kernel, part, energy, 3, generator()).position for part in x.split(4)]
    torch.testing.assert_close(whole, torch.cat(tiles), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("langevin", {"step_size": 0.1}, "exactly one of temperature and noise_std"),
        ("langevin", {"step_size": 0.1, "temperature": 1, "noise_std": 1}, "exactly one"),
        ("langevin", {"temperature": 1}, r"sampler\.step_size: Field required"),
        ("langevin", {"step_size": -1, "temperature": 1}, r"sampler\.step_size: .*greater than 0"),
        ("langevin", {"step_size": 1, "temperature": 1, "clamp": (1, -1)}, "lower end comes first"),
        (
            "langevin",
            {"step_size": 1, "temperature": 1, "grad_clip": 1, "grad_norm_clip": 1},
            "not both",
        ),
        ("mala", {"step_size": 1, "temperature": 0}, r"sampler\.temperature: .*greater than 0"),
        ("mala", {"stepsize": 1}, r"sampler\.stepsize: unknown key; did you mean 'step_size'"),
        ("sghmc", {"step_size": 1, "friction": 2}, r"step_size \* friction must be below 1, got 2"),
        (
            "annealed_langevin",
            {"step_size": 1, "start_temperature": 0.5},
            "start_temperature must be at least temperature",
        ),
        ("parallel_tempering", {"kernel": {"name": "mala", "step_size": 1}}, "temperatures: Field"),
        (
            "parallel_tempering",
            {"kernel": {"name": "mala", "step_size": 1}, "temperatures": (2, 1)},
            "temperatures must rise",
        ),
        (
            "parallel_tempering",
            {"kernel": {"name": "mala"}, "temperatures": (1, 2)},
            r"kernel\.step_size: Field required",
        ),
        (
            "parallel_tempering",
            {"kernel": {"name": "malla"}, "temperatures": (1, 2)},
            r"kernel\.name: unknown 'malla'; did you mean 'mala'",
        ),
        ("parallel_tempering", {"kernel": "mala", "temperatures": (1, 2)}, "got the bare name"),
        ("parallel_tempering", {"kernel": {}, "temperatures": (1, 2)}, "needs a name"),
        ("parallel_tempering", {"kernel": 3, "temperatures": (1, 2)}, "a sampler section, got int"),
        (
            "parallel_tempering",
            {
                "kernel": FAMILY.section(
                    "parallel_tempering", kernel={"name": "gibbs"}, temperatures=(1, 2)
                ),
                "temperatures": (1, 2),
            },
            "cannot hold another",
        ),
        ("malla", {"step_size": 1}, r"sampler\.name: unknown 'malla'; did you mean 'mala'"),
    ],
)
def test_config_faults_say_what_to_change(name, params, message):
    with pytest.raises(ValueError, match=message):
        samplers.make(name, **params)


def test_tempering_takes_a_kernel_or_its_section():
    temperatures = (1.0, 2.0)
    kernel = samplers.make("mala", step_size=0.5)
    section = {"name": "mala", "step_size": 0.5}
    one = samplers.make("parallel_tempering", kernel=kernel, temperatures=temperatures)
    two = samplers.make("parallel_tempering", kernel=section, temperatures=temperatures)
    assert one == two
    assert [k.temperature for k in one.kernels] == [1.0, 2.0]  # type: ignore[attr-defined]


def test_binding_tells_a_discrete_sampler_what_its_events_are():
    from ebm_dist.core.types import EventSpec

    section = FAMILY.section("gibbs")
    bound = section.bind(EventSpec((4, 3), "categorical"))  # type: ignore[attr-defined]
    assert bound.kind == "categorical"
    with pytest.raises(ValueError, match=r"sampler\.kind: binary, but the data is categorical"):
        FAMILY.section("gibbs", kind="binary").bind(EventSpec((4, 3), "categorical"))  # type: ignore[attr-defined]


def test_an_energys_own_events_outrank_what_they_look_like():
    # One-hot rows of spins are still spins; a callable that says nothing gets the guess.
    x = torch.eye(4).reshape(1, 4, 4).expand(3, 4, 4)
    lattice = ising((4, 4), 0.3)
    told = run_chain(make("gibbs"), x, lattice, 5, generator()).position
    assert not (told.sum(-1) == 1).all()
    guessed = run_chain(make("gibbs"), x, lambda x: lattice(x), 5, generator()).position
    assert (guessed.sum(-1) == 1).all()
    forced = run_chain(make("gibbs", kind="binary"), x, lambda x: lattice(x), 5, generator())
    assert not (forced.position.sum(-1) == 1).all()


def test_gibbs_moves_the_librarys_rbm_in_blocks():
    energy = rbm(6, 3, weight_std=0.5)
    calls = []
    original = energy.sample_visible
    energy.sample_visible = lambda *args: calls.append(1) or original(*args)  # type: ignore[method-assign]
    chain = run_chain(make("gibbs"), torch.zeros(8, 6), energy, 4, generator())
    assert len(calls) == 4
    assert set(chain.position.unique().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("name", ["langevin", "sghmc", "gibbs", "parallel_tempering"])
def test_adaptation_refuses_kernels_that_have_nothing_to_aim_at(name):
    with pytest.raises(ValueError, match=r"^kernel: \w+ has no step size with an acceptance"):
        adapt_step_size(make(name), torch.ones(4, 2), bowl, 10, generator())


def test_adaptation_refuses_a_target_that_is_no_rate():
    with pytest.raises(ValueError, match=r"^target_acceptance: "):
        adapt_step_size(make("mala"), torch.ones(4, 2), bowl, 10, generator(), 1.2)


def test_gibbs_reports_the_fraction_of_sites_that_changed():
    from ebm_dist.samplers.discrete.gibbs import GibbsInfo

    x = torch.nn.functional.one_hot(torch.zeros(200, 5, dtype=torch.long), 4).float()
    state = make("gibbs").init(x, lambda x: 0 * x.sum((1, 2)))
    after, info = make("gibbs").step(state, lambda x: 0 * x.sum((1, 2)), generator())
    assert isinstance(info, GibbsInfo)
    changed = (after.position.argmax(-1) != 0).float().mean(1)
    torch.testing.assert_close(info.changed, changed)
