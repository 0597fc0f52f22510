"""Energies made of energies: sum, mixture, tempered, conditional."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self, cast

import torch
from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    SerializeAsAny,
    WithJsonSchema,
    model_validator,
)
from torch import Tensor, nn

from ebm_dist.core.types import EnergyFn, EventSpec
from ebm_dist.energies.context import trait
from ebm_dist.energies.family import FAMILY, AnalyticEnergy, Energy, EnergySection
from ebm_dist.energies.module import FunctionEnergy


def _modules(members: Sequence[EnergyFn]) -> list[nn.Module]:
    if not members:
        raise ValueError("energy.members: empty, give at least one energy")
    return [m if isinstance(m, nn.Module) else FunctionEnergy(m) for m in members]


_ALIKE = {
    "event_shape": "event shapes",
    "num_labels": "numbers of labels",
    "noise_stds": "noise levels",
    "condition_shape": "condition shapes",
}
"""Attributes that all members which have them share."""


def _common(members: Sequence[nn.Module], attribute: str) -> Any:
    """The value of `attribute` that members agree on; None if none has one, or they differ."""
    values = {v for m in members if (v := getattr(m, attribute, None)) is not None}
    if len(values) > 1 and attribute in _ALIKE:
        raise ValueError(
            f"energy.members: {_ALIKE[attribute]} differ: {', '.join(map(str, sorted(values)))}"
        )
    return values.pop() if len(values) == 1 else None


def _log_z(member: nn.Module, temperature: float) -> float:
    log_z = getattr(member, "log_z", None)
    if not callable(log_z):
        raise ValueError(
            f"{type(member).__name__}: its log Z is not known exactly; "
            "estimate it with ebm_dist.evaluation.log_partition (AIS)"
        )
    return cast(float, log_z(temperature))


def _sampler(member: nn.Module) -> Callable[..., Tensor]:
    """The exact sampler of `member`, as in `AnalyticEnergy.sample`."""
    sample = getattr(member, "sample", None)
    if not callable(sample):
        raise ValueError(
            f"{type(member).__name__}: no exact sampler is known here; draw with a Markov chain "
            "(ebm_dist.samplers.run_chain)"
        )
    return cast("Callable[..., Tensor]", sample)


def _value(member: nn.Module, x: Tensor, context: Mapping[str, Tensor]) -> Tensor:
    """The member's energies (B,), with as much of the context as it takes."""
    return member(x, **{name: context[name] for name in trait(member, "context") & context.keys()})


class _Composite(AnalyticEnergy):
    """The base of compositions. Each member decides on its own precision under autocast.

    A composition takes the context of all its members, and gives each its own part.
    """

    def __init__(self, members: Sequence[EnergyFn]) -> None:
        modules = _modules(members)
        super().__init__(_common(modules, "event_shape"))
        self.event = _common(modules, "event")
        self.members = nn.ModuleList(modules)
        self.context = frozenset().union(*(trait(m, "context") for m in modules))
        self.needs_context = frozenset().union(*(trait(m, "needs_context") for m in modules))
        self.num_labels = _common(modules, "num_labels")
        self.noise_stds = _common(modules, "noise_stds")
        self.condition_shape = _common(modules, "condition_shape")

    def forward(self, x: Tensor, **context: Tensor) -> Tensor:
        return Energy.forward(self, x, **context)


class Sum(_Composite):
    """E(x) = sum_i weight_i E_i(x): a product of experts."""

    def __init__(self, members: Sequence[EnergyFn], weights: Sequence[float] | None = None) -> None:
        super().__init__(members)
        self.weights = _weights(weights, len(members), 1.0)

    def energy(self, x: Tensor, **context: Tensor) -> Tensor:
        parts = [w * _value(member, x, context) for w, member in zip(self.weights, self.members)]
        return torch.stack(parts).sum(0)


class Mixture(_Composite):
    """E(x) = -log sum_i weight_i exp(-E_i(x)), or the minimum of E_i - log weight_i.

    Args:
        weights: positive; equal and summing to 1 when left out.
        hard: take the minimum. The law is then piecewise that of one member, and at
            temperature T a separated well has the mass of its member at T.
        normalised: divide each exp(-E_i) by its own Z first, so that the weights are the
            members' masses; needs members with a known log Z.
    """

    def __init__(
        self,
        members: Sequence[EnergyFn],
        weights: Sequence[float] | None = None,
        *,
        hard: bool = False,
        normalised: bool = False,
    ) -> None:
        super().__init__(members)
        self.weights = _weights(weights, len(members), 1 / len(members))
        if min(self.weights) <= 0:
            raise ValueError("energy.weights: every weight of a mixture must be positive")
        self.hard = hard
        shift = [math.log(w) for w in self.weights]
        if normalised:
            shift = [s - _log_z(m, 1.0) for s, m in zip(shift, self.members)]
        self.shift = shift

    def energy(self, x: Tensor, **context: Tensor) -> Tensor:
        parts = torch.stack([_value(m, x, context) - s for s, m in zip(self.shift, self.members)])
        return parts.amin(0) if self.hard else -(-parts).logsumexp(0)

    def log_z(self, temperature: float = 1.0) -> float:
        """log sum_i weight_i Z_i, for the smooth mixture at temperature 1."""
        if self.hard or temperature != 1.0:
            return super().log_z(temperature)
        parts = [s + _log_z(m, 1.0) for s, m in zip(self.shift, self.members)]
        return torch.tensor(parts, dtype=torch.float64).logsumexp(0).item()

    def sample(self, num: int, generator: torch.Generator, temperature: float = 1.0) -> Tensor:
        """Exact for the smooth mixture at temperature 1, of members with exact samplers."""
        if self.hard or temperature != 1.0:
            return super().sample(num, generator, temperature)
        mass = torch.tensor([s + _log_z(m, 1.0) for s, m in zip(self.shift, self.members)])
        which = torch.multinomial(
            mass.softmax(0).to(generator.device), num, replacement=True, generator=generator
        )
        draws = [_sampler(m)(num, generator) for m in self.members]
        return torch.stack(draws)[which, torch.arange(num, device=which.device)]


class Tempered(_Composite):
    """E(x) / temperature: at T = 1 the law that the member has at `temperature`."""

    def __init__(self, member: EnergyFn, temperature: float) -> None:
        super().__init__([member])
        self.temperature = temperature

    def energy(self, x: Tensor, **context: Tensor) -> Tensor:
        return _value(self.members[0], x, context) / self.temperature

    def log_z(self, temperature: float = 1.0) -> float:
        return _log_z(self.members[0], temperature * self.temperature)

    def sample(self, num: int, generator: torch.Generator, temperature: float = 1.0) -> Tensor:
        return _sampler(self.members[0])(num, generator, temperature * self.temperature)


class Conditional(_Composite):
    """A classifier as an energy: f_y(x) are its logits (Grathwohl et al. 2020, eq. 4-6).

        E(x)    = -logsumexp_y f_y(x)                        label None
        E(x, y) = E(x) - guidance * log softmax(f(x))_y      which is -f_y(x) at guidance 1

    With label None it takes a label for each chain: `given(label=...)`.

    Args:
        classifier: maps (B, *event) to logits (B, num_classes), or has a method `logits` that does.
        label: the class to condition on.
        guidance: weight of log p(y|x); above 1 it sharpens towards the class.
    """

    def __init__(
        self, classifier: nn.Module, label: int | None = None, guidance: float = 1.0
    ) -> None:
        super().__init__([classifier])
        self.label = label
        self.guidance = guidance
        # A label that is fixed here is no longer one for each chain.
        rest = self.context - {"label"}
        self.context = rest if label is not None else rest | {"label"}

    def logits(self, x: Tensor, **context: Tensor) -> Tensor:
        """Logits (B, num_classes), float32."""
        classifier = self.members[0]
        logits = getattr(classifier, "logits", classifier)(x, **context)
        if logits.ndim != 2:
            raise ValueError(
                f"energy.member: gives logits of shape {tuple(logits.shape)}, expected "
                "(B, num_classes); give it num_classes"
            )
        return logits if logits.dtype == torch.float64 else logits.float()

    def energy(self, x: Tensor, label: Tensor | None = None, **context: Tensor) -> Tensor:
        logits = self.logits(x, **context)
        if self.label is not None:
            label = torch.full((len(x),), self.label, device=x.device)
        return -logits.logsumexp(1) if label is None else self._given(logits, label)

    def _given(self, logits: Tensor, label: Tensor) -> Tensor:
        if self.label is not None and not 0 <= self.label < logits.shape[1]:
            raise ValueError(
                f"energy.label: {self.label}, but the member has {logits.shape[1]} classes"
            )
        log_prob = logits.log_softmax(1).gather(1, label[:, None]).squeeze(1)
        return -logits.logsumexp(1) - self.guidance * log_prob


def _weights(weights: Sequence[float] | None, num: int, default: float) -> list[float]:
    if weights is None:
        return [default] * num
    if len(weights) != num:
        raise ValueError(f"energy.weights: {len(weights)} of them, but {num} members")
    return [float(w) for w in weights]


def _as_section(value: Any) -> Any:
    if isinstance(value, EnergySection):
        return value
    if isinstance(value, Mapping) and isinstance(value.get("name"), str):
        return FAMILY.section(**value)
    raise ValueError("expected an energy section, {name: ..., ...}")


Member = Annotated[
    SerializeAsAny[EnergySection],
    BeforeValidator(_as_section),
    # The schema of all energies would contain itself here. Editors see the one key that all of
    # them have, and the validator checks the rest.
    WithJsonSchema(
        {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
    ),
]


class _MembersSection(EnergySection):
    members: tuple[Member, ...] = Field(min_length=1, max_length=256)
    """The members, as energy sections `{name: ..., ...}`."""

    def parts(self) -> Iterator[EnergySection]:
        yield self
        for member in self.members:
            yield from member.parts()

    def bind(self, spec: EventSpec) -> Self:
        bound = tuple(member.bind(spec) for member in self.members)
        return self.model_copy(update={"members": bound})

    def built(self) -> list[Energy]:
        """The members. Each has its own weights: two equal sections give two networks."""
        return [_build(member) for member in self.members]


def _build(member: EnergySection) -> Energy:
    # A seed from the generator that `build` seeded, so that equal sections get different weights.
    return member.build(int(torch.randint(2**62, ()).item()))


@FAMILY.register
class SumSection(_MembersSection):
    """The weighted sum of energies: a product of experts."""

    name: Literal["sum"] = "sum"
    example: ClassVar[dict[str, Any]] = {
        "members": [{"name": "ring"}, {"name": "mlp", "event_shape": (2,), "widths": (8,)}]
    }

    weights: tuple[float, ...] | None = None
    """One weight for each member; 1 when left out."""

    def module(self) -> Energy:
        return Sum(self.built(), self.weights)


@FAMILY.register
class MixtureSection(_MembersSection):
    """A mixture of the members' laws."""

    name: Literal["mixture"] = "mixture"
    example: ClassVar[dict[str, Any]] = {
        "members": [
            {"name": "ring"},
            {"name": "quadratic", "precision": (1.0, 4.0)},
        ]
    }

    weights: tuple[PositiveFloat, ...] | None = None
    """One weight for each member; equal when left out."""

    hard: bool = False
    """Take the lowest member's energy instead of the smooth minimum."""

    normalised: bool = False
    """Weights are the members' masses; needs members with a known log Z."""

    def module(self) -> Energy:
        return Mixture(self.built(), self.weights, hard=self.hard, normalised=self.normalised)


class _MemberSection(EnergySection):
    member: Member
    """An energy section, `{name: ..., ...}`."""

    def parts(self) -> Iterator[EnergySection]:
        yield self
        yield from self.member.parts()

    def bind(self, spec: EventSpec) -> Self:
        return self.model_copy(update={"member": self.member.bind(spec)})


@FAMILY.register
class TemperedSection(_MemberSection):
    """An energy divided by a temperature."""

    name: Literal["tempered"] = "tempered"
    example: ClassVar[dict[str, Any]] = {"member": {"name": "ring"}, "temperature": 2.0}

    temperature: PositiveFloat
    """Above 1 flattens the law, below 1 sharpens it."""

    def module(self) -> Energy:
        return Tempered(_build(self.member), self.temperature)


@FAMILY.register
class ConditionalSection(_MemberSection):
    """The energy of a network with classes, given one of them."""

    name: Literal["conditional"] = "conditional"
    example: ClassVar[dict[str, Any]] = {
        "member": {"name": "mlp", "event_shape": (2,), "widths": (8,), "num_classes": 3},
        "label": 1,
    }

    label: NonNegativeInt | None = None
    """The class to condition on; when left out, E(x) is the marginal over the classes."""

    guidance: float = 1.0
    """Weight of log p(y|x); above 1 it sharpens towards the class."""

    @model_validator(mode="after")
    def _member_has_classes(self) -> Self:
        num = getattr(self.member, "num_classes", None)
        if num is None:
            raise ValueError("member: has no num_classes; give it a number, or 'data'")
        if getattr(self.member, "classes", "logits") != "logits":
            raise ValueError(
                "member: its classes are an embedding, so it has no logits; set classes: logits"
            )
        if isinstance(num, int) and self.label is not None and self.label >= num:
            raise ValueError(f"label: {self.label}, but the member has {num} classes")
        return self

    def bind(self, spec: EventSpec) -> Self:
        bound = super().bind(spec)
        num = getattr(bound.member, "num_classes", None)
        if isinstance(num, int) and self.label is not None and self.label >= num:
            raise ValueError(f"energy.label: {self.label}, but the data has {num} classes")
        return bound

    def module(self) -> Energy:
        return Conditional(_build(self.member), self.label, self.guidance)
