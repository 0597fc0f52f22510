"""Traits: what a kernel says of itself beside `init` and `step`, so that nobody asks for its class.

Each is an attribute of the class with a safe default, so a kernel from outside may leave all of
them out. Besides those below, `run_chain` makes use of the methods of `InPlaceKernel` and
`DepartingKernel`, warm-up of `tunable` and `target_acceptance`, ladders of `temperatures`.
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol, runtime_checkable

from ebm_dist.samplers.kernel import FAMILY, Kernel


class KernelTraits:
    """The defaults. A kernel may inherit from this class, and need not."""

    __slots__ = ()

    reversible: ClassVar[bool] = False
    """At stationarity (x, x') has the law of (x', x). Tempered transitions need it of the kernel
    inside: a Gibbs sweep would have to run backwards on the way down."""

    leaves_invariant: ClassVar[bool] = False
    """A round, `init` and any number of steps, leaves exp(-E/T) exactly as it is, so that its
    moves change no Jarzynski weight."""


@runtime_checkable
class UnadjustedKernel(Protocol):
    """A kernel without an accept step: its chains are hotter than T, the more so the longer the
    step and the steeper the energy."""

    @property
    def temperature(self) -> float: ...

    @property
    def step_size(self) -> float: ...

    temperature_ratio_formula: ClassVar[str]
    """`temperature_ratio` in words, of the curvature a and the step size h."""

    def temperature_ratio(self, curvature: float) -> float:
        """T / T_eff of the chains on a quadratic of that curvature; 0 or less if they diverge."""
        ...


class EulerMaruyama:
    """The bias that all kernels with a Langevin step of fixed length have."""

    __slots__ = ()

    step_size: float
    temperature_ratio_formula: ClassVar[str] = "1 - a h / 2"

    def temperature_ratio(self, curvature: float) -> float:
        """T / T_eff of the chains on a quadratic of that curvature."""
        return 1 - curvature * self.step_size / 2


def trait(kernel: Kernel[Any], name: str) -> bool:
    """The trait `name` of any kernel, the default where it has none."""
    return getattr(kernel, name, getattr(KernelTraits, name))


def names_with(name: str) -> str:
    """The samplers whose kernels have `name` (true), for messages: "mala, hmc or nuts"."""
    found = []
    for member, section in FAMILY.members.items():
        example: Any = section(**section.example)  # type: ignore[attr-defined]
        if getattr(example.build(), name, False):
            found.append(member)
    return " or ".join(filter(None, [", ".join(found[:-1]), *found[-1:]]))
