"""A user's own object with `init` and `step` as the sampler, by a target in the config."""

from __future__ import annotations

from dataclasses import dataclass, is_dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor

from ebm_dist.core.plugins import Target, load_target
from ebm_dist.core.types import EnergyFn, EventSpec
from ebm_dist.samplers.kernel import FAMILY, Kernel, KernelSection
from ebm_dist.samplers.traits import trait


@dataclass(frozen=True, slots=True)
class NoInfo:
    """The info of a step that reports nothing."""


@dataclass(frozen=True)
class OwnKernel:
    """Calls a user's `init` and `step`, and checks what they return."""

    own: Any
    temperature: float
    target: str

    @property
    def reversible(self) -> bool:
        """The trait of the user's sampler; see `traits.KernelTraits`."""
        return trait(self.own, "reversible")

    @property
    def leaves_invariant(self) -> bool:
        """The trait of the user's sampler; see `traits.KernelTraits`."""
        return trait(self.own, "leaves_invariant")

    def init(self, x: Tensor, energy: EnergyFn) -> Any:
        """The user's state of chains at `x` (B, *event)."""
        return self._checked(self.own.init(x, energy), x.shape, "init")

    def _checked(self, state: Any, shape: torch.Size, method: str) -> Any:
        for name, wanted in (("position", shape), ("energy", shape[:1])):
            value = getattr(state, name, None)
            if not isinstance(value, Tensor) or value.shape != wanted or value.requires_grad:
                came = "missing"
                if isinstance(value, Tensor):
                    came = f"of shape {tuple(value.shape)}"
                    came += ", with a gradient" if value.requires_grad else ""
                raise ValueError(
                    f"sampler.target: {method} of {self.target} returned a state whose {name} is "
                    f"{came}, expected a detached tensor of shape {tuple(wanted)}"
                )
        return state

    def step(self, state: Any, energy: EnergyFn, generator: torch.Generator) -> tuple[Any, Any]:
        """The user's step; see `Kernel.step`."""
        shape = state.position.shape
        state, info = self.own.step(state, energy, generator)
        self._checked(state, shape, "step")
        if info is None:
            info = NoInfo()
        if not is_dataclass(info):
            raise ValueError(
                f"sampler.target: step of {self.target} returned (state, {type(info).__name__}), "
                "expected None or a dataclass of (B,) tensors beside the state"
            )
        return state, info


@FAMILY.register
class ModuleKernelSection(KernelSection):
    """A sampler of your own: a class with `init` and `step`, or a function that makes one."""

    name: Literal["module"] = "module"
    example: ClassVar[dict[str, Any]] = {
        "target": "ebm_dist.samplers.continuous.mala:Mala",
        "params": {"step_size": 0.5, "temperature": 1.0},
    }

    target: Target
    """MODULE:NAME of a class, or of a function that makes an object, with `init(x, energy)` ->
    state and `step(state, energy, generator)` -> (state, info). A state has position and energy;
    info is None or a dataclass of (B,) tensors. Training imports the module."""

    params: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the class or function."""

    temperature: PositiveFloat = 1.0
    """T of the law exp(-E/T) of the sampler, for the objective and the model card. The sampler does
    not receive it; if it takes a temperature, set that in params."""

    engine: Literal["eager"] = "eager"  # pyright: ignore[reportIncompatibleVariableOverride]
    """Steps of your own sampler are not compiled, since compiled steps cannot change later."""

    adapt_steps: Literal[0] = 0  # pyright: ignore[reportIncompatibleVariableOverride]
    """No warm-up of the step size; a sampler that is registered as a section can have one."""

    @property
    def law_temperature(self) -> float:
        return self.temperature

    def build(self) -> Kernel[Any]:
        try:
            own = load_target(self.target, "sampler.target")(**self.params)
        except TypeError as error:
            params = ", ".join(f"{key}={value!r:.40}" for key, value in self.params.items())
            raise ValueError(
                f"sampler.params: {self.target} called with ({params}) raises TypeError: {error}"
            ) from error
        for method in ("init", "step"):
            if not callable(getattr(own, method, None)):
                raise ValueError(
                    f"sampler.target: {self.target} made a {type(own).__name__} without {method}; "
                    "expected init(x, energy) and step(state, energy, generator)"
                )
        stated = getattr(own, "temperature", self.temperature)
        if stated != self.temperature:
            raise ValueError(
                f"sampler.temperature: {self.temperature:g}, but {self.target} has the temperature "
                f"{stated}; set both alike"
            )
        return OwnKernel(own, self.temperature, self.target)

    def bind(self, spec: EventSpec) -> Self:
        self.build()
        return self
