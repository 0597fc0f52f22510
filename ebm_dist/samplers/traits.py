"""Traits: class attributes by which a kernel declares its properties, in place of type checks.

Each has a safe default, so a kernel from outside may leave all of them out. Besides those below,
`run_chain` uses the methods of `InPlaceKernel` and `DepartingKernel`, warm-up uses `tunable` and
`target_acceptance`, and tempered samplers have `temperatures`.
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol, runtime_checkable

from ebm_dist.samplers.kernel import FAMILY, Kernel


class KernelTraits:
    """The defaults. A kernel may inherit from this class, but need not."""

    __slots__ = ()

    reversible: ClassVar[bool] = False
    """At stationarity (x, x') has the law of (x', x). Tempered transitions need a reversible inner
    kernel; a Gibbs sweep, which is not one, would have to run backwards on the way down."""

    leaves_invariant: ClassVar[bool] = False
    """A round, `init` and any number of steps, leaves exp(-E/T) exactly invariant, so its moves
    change no Jarzynski weight."""

    moves_level: ClassVar[bool] = False
    """The move changes the level of each chain too, which the state then has: `level` (B,)."""

    descends: ClassVar[bool] = False
    """Chains begin as noise at the highest level of the energy and go down to the lowest; one step
    is one level."""

    reads_clock: ClassVar[bool] = False
    """The move depends on the age of each chain: `init` takes `clock` (B,) int64, the number of
    moves that each chain has made."""


@runtime_checkable
class UnadjustedKernel(Protocol):
    """A kernel without an accept step. Its chains are hotter than T, by an excess that grows with
    the step size and with the curvature of the energy."""

    @property
    def temperature(self) -> float: ...

    @property
    def step_size(self) -> float: ...

    @property
    def temperature_ratio_formula(self) -> str:
        """`temperature_ratio` as a formula in the curvature a and the step size h."""
        ...

    def temperature_ratio(self, curvature: float) -> float:
        """T / T_eff of the chains on a quadratic of that curvature; 0 or less if they diverge."""
        ...


class EulerMaruyama:
    """The bias of all kernels with a Langevin step of fixed size."""

    __slots__ = ()

    step_size: float
    temperature_ratio_formula: ClassVar[str] = "1 - a h / 2"

    def temperature_ratio(self, curvature: float) -> float:
        """T / T_eff of the chains on a quadratic of that curvature."""
        return 1 - curvature * self.step_size / 2


def trait(kernel: Kernel[Any], name: str) -> bool:
    """The trait `name` of any kernel, or its default."""
    return getattr(kernel, name, getattr(KernelTraits, name))


def names_with(name: str) -> str:
    """The samplers whose kernels have the trait `name`, for messages: "mala, hmc or nuts"."""
    found = []
    for member, section in FAMILY.members.items():
        if "target" in section.model_fields:
            continue  # code that is not ours, and a message is no reason to import it
        example: Any = section(**section.example)  # type: ignore[attr-defined]
        if getattr(example.build(), name, False):
            found.append(member)
    return " or ".join(filter(None, [", ".join(found[:-1]), *found[-1:]]))
