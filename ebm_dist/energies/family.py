"""What every energy shares: the family, the base module and the base section."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, ClassVar, Literal, Self, cast, get_args

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from ebm_dist.core.section import Family, Section
from ebm_dist.core.types import MAX_EVENT_NUMBERS, EnergyFn, EventKind, EventSpec
from ebm_dist.energies.context import ContextTraits, bind, check_names


class Energy(ContextTraits, nn.Module):
    """E(x): (B, *event) -> (B,), float32, lower is likelier.

    Chains do not interact: nothing here may use batch statistics, since samplers take
    the gradient of the sum over the batch and read it as each chain's own.

    A float64 event gives a float64 energy, which quadrature and gradient checks need;
    every other dtype gives float32.
    """

    event: EventSpec | None = None
    """What one x looks like, where the energy itself decides that."""

    def __init__(self, event_shape: tuple[int, ...] | None) -> None:
        super().__init__()
        if event_shape is not None and math.prod(event_shape) > MAX_EVENT_NUMBERS:
            raise ValueError(
                f"energy: events of shape {event_shape} have more than {MAX_EVENT_NUMBERS} numbers"
            )
        self.event_shape = event_shape

    def forward(self, x: Tensor, **context: Tensor) -> Tensor:
        """Energies (B,) of events (B, *event), each with its own row of the `context`.

        Raises:
            ValueError: x is not floating point, or its event shape is not the energy's; the
                energy takes no such context, or needs one that is missing.
        """
        self.check(x)
        check_names(self, context)
        energy = cast(Any, self).energy(x, **context)
        return energy if energy.dtype == torch.float64 else energy.float()

    def energy(self, x: Tensor) -> Tensor:
        """The energy itself, (B,), on events that `forward` has checked.

        An energy with the trait `context` takes those names as keywords here.
        """
        raise NotImplementedError

    def given(
        self,
        *,
        label: Tensor | None = None,
        level: Tensor | None = None,
        condition: Tensor | None = None,
    ) -> EnergyFn:
        """This energy with the context of B chains: an EnergyFn of x (B, *event), in their order.

        Args:
            label: (B,) int64.
            level: (B,) int64, places in `noise_stds`.
            condition: (B, *condition_shape), floating point.

        Raises:
            ValueError: the energy takes no such context or needs more, or a tensor does not fit.
        """
        return bind(self, label=label, level=level, condition=condition)

    def check(self, x: Tensor) -> None:
        """Refuse what is no batch of this energy's events."""
        name = type(self).__name__
        if not x.is_floating_point():
            raise ValueError(
                f"{name}: x is {x.dtype}, expected floating-point events: pass x.float()"
            )
        if self.event_shape is not None and tuple(x.shape[1:]) != self.event_shape:
            wanted = ", ".join(["B", *map(str, self.event_shape)])
            raise ValueError(
                f"{name}: x has shape {tuple(x.shape)}, expected ({wanted}); the event shape comes "
                "from the data: reshape x, or build the energy for these events"
            )


class AnalyticEnergy(Energy):
    """An energy written as a formula, with as much of its law as is known exactly.

    It never runs in reduced precision: under autocast a spin model's matrix product
    would be rounded to 8 bits, and its energies are what a test compares.
    """

    def forward(self, x: Tensor, **context: Tensor) -> Tensor:
        self.check(x)
        check_names(self, context)
        if x.dtype not in (torch.float32, torch.float64):
            x = x.float()
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return cast(Any, self).energy(x, **context)
        return cast(Any, self).energy(x, **context)

    def log_z(self, temperature: float = 1.0) -> float:
        """log of the integral (or sum) of exp(-E(x)/T) over events, in nats.

        Raises:
            ValueError: it is not known exactly for these parameters.
        """
        raise ValueError(
            f"{type(self).__name__}: log Z is not known exactly here; "
            "estimate it with ebm_dist.evaluation.log_partition (AIS)"
        )

    def sample(self, num: int, generator: torch.Generator, temperature: float = 1.0) -> Tensor:
        """`num` independent events (num, *event) from exp(-E/T)/Z, exactly.

        Raises:
            ValueError: no exact sampler is known for these parameters.
        """
        raise ValueError(
            f"{type(self).__name__}: no exact sampler is known here; draw with a Markov chain "
            "(ebm_dist.samplers.run_chain)"
        )


class EnergySection(Section):
    """The config of one energy: `build` makes the module, `bind` fits it to the data."""

    kinds: ClassVar[tuple[EventKind, ...]] = get_args(EventKind)
    """Events that the energy is defined for."""

    example: ClassVar[dict[str, Any]] = {}
    """Small parameters that build without data; the protocol tests use them."""

    recomputes_activations: ClassVar[bool] = False
    """Whether modules of the energy have an attribute `recompute`, which the learner sets to true
    where activations are to be computed again in the backward."""

    def parts(self) -> Iterator[EnergySection]:
        """This section, and every section inside it."""
        yield self

    def build(self, seed: int = 0) -> Energy:
        """The module on the CPU; the same seed gives the same weights anywhere.

        torch's global generator is left as it was.
        """
        # Not torch.manual_seed: that would also reseed every accelerator's generator.
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(seed)
            return self.module()

    def module(self) -> Energy:
        """Construct the module under a seeded generator; `build` calls it."""
        raise NotImplementedError

    def bind(self, spec: EventSpec) -> Self:
        """This section with what was left to the data filled in.

        Raises:
            ValueError: the energy cannot take the data's events.
        """
        self._check_kind(spec)
        energy = self.build()
        if energy.event_shape is not None and energy.event_shape != spec.shape:
            raise ValueError(
                f"energy.name: {self._name} has events of shape {energy.event_shape}, the data has "
                f"{spec.shape}; change the energy's parameters or data.source"
            )
        return self

    @property
    def _name(self) -> str:
        return type(self).model_fields["name"].default

    def _check_kind(self, spec: EventSpec) -> None:
        if spec.kind not in self.kinds:
            raise ValueError(
                f"energy.name: {self._name} takes {' or '.join(self.kinds)} events, the data is "
                f"{spec.kind}; choose an energy for {spec.kind} data, or convert the data"
            )


class BoundSection(EnergySection):
    """An energy whose event shape comes from the data."""

    event_shape: tuple[PositiveInt, ...] | None = None
    """Shape of one x; taken from the data when left out."""

    def bind(self, spec: EventSpec) -> Self:
        self._check_kind(spec)
        shape = self.event_shape
        if shape is None:
            return self.model_copy(update={"event_shape": spec.shape})
        if shape != spec.shape:
            raise ValueError(
                f"energy.event_shape: {shape}, but the data has events of shape {spec.shape}; "
                "leave energy.event_shape out to take it from the data"
            )
        return self

    @property
    def shape(self) -> tuple[int, ...]:
        """`event_shape`, once it is known."""
        if self.event_shape is None:
            raise ValueError(
                f"energy.event_shape: {self._name} does not know its events yet; "
                "give event_shape=(...), or bind the section to the data"
            )
        return self.event_shape

    @property
    def size(self) -> int:
        """Numbers in one event."""
        return math.prod(self.shape)


Activation = Literal["silu", "gelu", "softplus", "tanh", "leaky_relu", "relu"]
NumClasses = PositiveInt | Literal["data"] | None

FAMILY: Family[Energy] = Family("energy")
