"""What every Markov kernel shares: family, protocol, evaluation of energies, checks of input."""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass
from typing import Any, ClassVar, Literal, Protocol, Self, TypeVar, runtime_checkable

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from ebm_dist.core.errors import NonFinite
from ebm_dist.core.events import energy_at, per_chain
from ebm_dist.core.section import Family, Section
from ebm_dist.core.types import EnergyFn, EventSpec


class KernelState(Protocol):
    """What the next step needs. A state belongs to the weights inside the energy that made
    it: call `init` again after every weight update."""

    @property
    def position(self) -> Tensor:
        """(B, *event), float32, or float64 where x was."""
        ...

    @property
    def energy(self) -> Tensor:
        """(B,), E(position), not divided by the temperature."""
        ...


S = TypeVar("S", bound=KernelState)


@runtime_checkable
class Kernel(Protocol[S]):
    """A Markov kernel whose law is exp(-E(x)/temperature), or close to it.

    Every chain of the batch moves by itself: chain i depends on no other chain.
    """

    @property
    def temperature(self) -> float: ...

    def init(self, x: Tensor, energy: EnergyFn) -> S:
        """Start chains at `x` (B, *event).

        Raises:
            ValueError: x or the energy does not fit the kernel.
            NonFiniteEnergy: an energy is NaN or infinite at x.
        """
        ...

    def step(self, state: S, energy: EnergyFn, generator: torch.Generator) -> tuple[S, Any]:
        """Move every chain once; the given state stays valid.

        Returns:
            The new state, and a frozen dataclass of (B,) tensors about the step.
        """
        ...


@runtime_checkable
class InPlaceKernel(Protocol[S]):
    """A kernel that can also overwrite its state, which saves `run_chain` the copies."""

    def step_(
        self, state: S, energy: EnergyFn, generator: torch.Generator, noise: Tensor
    ) -> tuple[S, Any]:
        """As `step`, bit for bit, but overwrites `state` and `noise` (B, *event)."""
        ...


@runtime_checkable
class DepartingKernel(Protocol):
    """A kernel whose move needs the current position only, and no state.

    So `run_chain` evaluates the final energy without computing a gradient that nobody uses.
    """

    @property
    def temperature(self) -> float: ...

    def depart_(
        self,
        position: Tensor,
        energy: EnergyFn,
        generator: torch.Generator,
        noise: Tensor,
        *,
        first: bool = False,
    ) -> tuple[Tensor, Any]:
        """Move the chains at `position` (B, *event) in place; overwrites `noise` (B, *event).

        The same move, bit for bit, as `init` at `position` and then `step`.

        Args:
            first: check the energy as `init` does, and raise what it raises.

        Returns:
            E (B,) before the move, and the info that `step` returns.
        """
        ...


class KernelSection(Section):
    """The config of one kernel; `build` constructs the kernel."""

    discrete: ClassVar[bool] = False
    """Whether the kernel moves binary and categorical events, or else real ones and images."""

    example: ClassVar[dict[str, Any]] = {}
    """Small parameters that work on a target of unit scale; the protocol tests use them."""

    num_steps: PositiveInt = Field(default=60, le=1_000_000)
    """Steps that a chain makes in one round; the weights change between rounds only."""

    adapt_steps: NonNegativeInt = Field(default=0, le=1_000_000)
    """Warm-up steps before a new run that adapt the step size to a target acceptance rate, starting
    from the given one; it is then fixed. Only for samplers with an accept step."""

    engine: Literal["auto", "eager", "compiled"] = "auto"
    """How steps run. eager: one by one. compiled: in compiled blocks of up to 20 steps; compilation
    runs in the background (in flow.mode sync before the first round). auto: eager; where one minute
    of steps or more is left (four if a step takes over 3 ms) an asynchronous run compiles blocks,
    times both and keeps the faster. auto and compiled store images channels-last if the energy
    convolves them."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 evaluates the energy under autocast; positions stay float32."""

    channels_last: bool = False
    """Store image chains in channels-last layout, in which convolutions run faster."""

    def build(self) -> Kernel[Any]:
        """The kernel with these parameters."""
        raise NotImplementedError

    @property
    def num_scheduled_steps(self) -> int:
        """Steps from the start of a chain that are on the way to the law and no samples of it."""
        return 0

    @property
    def law_temperature(self) -> float:
        """T of the law exp(-E/T) that the kernel draws from; told without importing anything."""
        return self.build().temperature

    def bind(self, spec: EventSpec) -> Self:
        """This section, once the data's events are known.

        Raises:
            ValueError: the kernel cannot move such events.
        """
        name = type(self).model_fields["name"].default
        if spec.discrete and not self.discrete:
            raise ValueError(
                f"sampler.name: {name} moves real events and images, the data is {spec.kind}; "
                "use gibbs, gibbs_with_gradients or discrete_langevin"
            )
        if self.discrete and not spec.discrete:
            raise ValueError(
                f"sampler.name: {name} moves binary and categorical events, the data is "
                f"{spec.kind}; use langevin, mala, hmc or sghmc"
            )
        return self


FAMILY: Family[Kernel[Any]] = Family("sampler")


class NonFiniteEnergy(NonFinite, ValueError):
    """Chains stand where the energy is NaN or infinite."""


def start(x: Tensor, energy: EnergyFn) -> Tensor:
    """`x` (B, *event) as positions that chains can start from, detached, not copied.

    Half-precision positions become float32: bf16 numbers near 1 are 2**-7 apart, so most
    Langevin moves would round to no move at all.

    Raises:
        ValueError: x is no floating-point tensor with a batch dimension, or its events do not
            have the shape that the energy states.
    """
    if not isinstance(x, Tensor):
        raise ValueError(f"x: expected a tensor (B, *event), got {type(x).__name__}")
    if not x.is_floating_point():
        raise ValueError(
            f"x: expected floating-point positions, got {x.dtype}; pass x.float() (binary events "
            "are {0, 1} floats, categorical ones one-hot floats in the last axis)"
        )
    if x.ndim < 2 or x.shape[0] == 0:
        raise ValueError(
            f"x: expected (B, *event) with at least one chain and one event dimension, got "
            f"{tuple(x.shape)}; one chain is x[None], one number a chain is x[:, None]"
        )
    event = getattr(energy, "event", None)
    shape = event.shape if isinstance(event, EventSpec) else getattr(energy, "event_shape", None)
    if shape is not None and tuple(x.shape[1:]) != tuple(shape):
        raise ValueError(
            f"x: chains have event shape {tuple(x.shape[1:])}, the energy takes {tuple(shape)}; "
            "reshape x, or build the energy for these events"
        )
    x = x.detach()
    return x if x.dtype == torch.float64 else x.float()


# What torch says when an event does not fit a layer: matmul, broadcasting, view, conv.
_SHAPE_FAULT = re.compile(r"shape|size|dimension|channels|numel", re.IGNORECASE)


def first_energy(energy: EnergyFn, position: Tensor) -> Tensor:
    """`energy(position)`, with the checks that only the first evaluation of a round needs.

    Raises:
        ValueError: the energy cannot take such events, changes them in place, or does not return
            (B,) floats.
        NonFiniteEnergy: an energy is NaN or infinite.
    """
    try:
        value = energy_at(energy, position)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if not _SHAPE_FAULT.search(str(error)):
            raise
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"x: the energy cannot take events of shape {tuple(position.shape[1:])}: {reason}; "
            "reshape x to the events that the energy was built for"
        ) from error
    batch = position.shape[0]
    if not isinstance(value, Tensor) or tuple(value.shape) != (batch,):
        came = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"energy: expected one number a chain, shape ({batch},), got {came}; "
            "end it with .squeeze(-1), or sum over the event dimensions alone"
        )
    if not value.is_floating_point():
        raise ValueError(f"energy: expected floats, got {value.dtype}; return energy.float()")
    require_finite(value, "at the start of the chains (x)")
    return value


def require_finite(energy: Tensor, where: str) -> None:
    """Raise unless every energy (B,) is finite. Waits for the device: once a round."""
    finite = torch.isfinite(energy)
    if bool(finite.all()):
        return
    bad = (~finite).nonzero().flatten()
    chains = ", ".join(str(i) for i in bad[:5].tolist()) + (", ..." if len(bad) > 5 else "")
    raise NonFiniteEnergy(
        f"energy: {len(bad)} of {energy.numel()} chains have a non-finite energy {where} (chains "
        f"{chains}); lower sampler.step_size, clamp or clip the moves, or restart those chains"
    )


def value(energy: EnergyFn, position: Tensor, *, first: bool = False) -> Tensor:
    """Energies (B,) without a gradient."""
    with torch.no_grad():
        out = first_energy(energy, position) if first else energy(position)
        return as_float(out)


def value_and_grad(
    energy: EnergyFn, position: Tensor, *, first: bool = False
) -> tuple[Tensor, Tensor]:
    """Energies (B,) and their gradients (B, *event) in the position.

    Parameters' `.grad` stays untouched: only the gradient in the position is asked for.

    Raises:
        ValueError: with `first`, where the energy has no gradient in the position.
    """
    if first and torch.is_inference_mode_enabled():
        raise ValueError(
            "energy: no gradient can be taken inside torch.inference_mode(); use torch.no_grad(), "
            "or samplers.run_chain, which leaves it for the round"
        )
    # An alias, not a copy: the caller may move `position` in place once the graph is gone.
    x = position.detach().requires_grad_(True)
    with torch.enable_grad():
        out = first_energy(energy, x) if first else energy(x)
        if first and not out.requires_grad:
            raise ValueError(
                "energy: has no gradient in x (detached, under no_grad, or constant), which this "
                "sampler needs; remove the detach, or use random_walk or gibbs"
            )
        # Chains do not interact, so the gradient of the sum holds each chain's own
        # gradient. Batch statistics inside the energy would break this. Ones in place of
        # .sum() save two small operations, which a small energy is bound by.
        (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
    return as_float(out.detach()), grad


def as_float(energy: Tensor) -> Tensor:
    """Energies in float32 at least: bf16 energies near 100 are 0.5 apart."""
    return energy if energy.dtype in (torch.float32, torch.float64) else energy.float()


def noise_buffer(like: Tensor) -> Tensor:
    """Unfilled memory of the shape of `like`, row-major whatever the layout of `like`.

    The chains of a channels-last run then get the numbers they would get without it, and
    torch fills contiguous memory several times faster.
    """
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)


def normal(like: Tensor, generator: torch.Generator) -> Tensor:
    """N(0, 1) of the shape of `like`."""
    return noise_buffer(like).normal_(generator=generator)


def uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    """U[0, 1) of the shape of `like`."""
    return noise_buffer(like).uniform_(generator=generator)


def norm_event(x: Tensor) -> Tensor:
    """(B, *event) -> (B,): the Euclidean norm of each chain's own numbers."""
    return torch.linalg.vector_norm(x, dim=tuple(range(1, x.ndim)))


def select(accepted: Tensor, new: S, old: S) -> S:
    """`old` with every tensor field taken from `new` where the chain was accepted (B,)."""
    assert is_dataclass(new)
    chosen = {}
    for name in (f.name for f in fields(new)):
        a, b = getattr(new, name), getattr(old, name)
        # Other fields say what kind of event it is, which is the same for every chain.
        chosen[name] = torch.where(per_chain(accepted, a), a, b) if isinstance(a, Tensor) else b
    return type(old)(**chosen)
