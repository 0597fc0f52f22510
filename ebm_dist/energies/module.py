"""A user's own network or function as the energy, by a target in the config or from Python."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any, ClassVar, Literal, Self, cast

import torch
from pydantic import Field, PositiveInt, PrivateAttr
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ebm_dist.core.errors import one_line
from ebm_dist.core.events import energy_at
from ebm_dist.core.plugins import Target, load_target, target_of
from ebm_dist.core.types import EnergyFn, EventSpec
from ebm_dist.core.weights import check_trainable, flat_tensors
from ebm_dist.energies.context import ContextTraits, stand_in, trait
from ebm_dist.energies.context import bind as bind_context
from ebm_dist.energies.family import FAMILY, BoundSection, EnergySection

NUM_TRIED = 4
"""Number of events with which a network is tested before a run."""


class FunctionEnergy(nn.Module):
    """A callable (B, *event) -> (B,) that is not a module, as a module without parameters.

    Its attributes of `ContextTraits` name the context that it takes as keywords.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function
        for name in ContextTraits.__annotations__:
            setattr(self, name, trait(function, name))

    def forward(self, x: Tensor, **context: Tensor) -> Tensor:
        return self.function(x, **context)


@FAMILY.register
class ModuleEnergySection(BoundSection):
    """A network of your own: a class, or a function that makes one."""

    name: Literal["module"] = "module"
    example: ClassVar[dict[str, Any]] = {
        "target": "ebm_dist.energies.closed_form.planar:Ring",
        "params": {"radius": 2.0, "width": 0.5},
        "event_shape": (2,),
    }
    # Not known before the module is made, which reading a config does not do. `check_event` looks.
    recomputes_activations: ClassVar[bool] = True

    target: Target
    """MODULE:NAME of an nn.Module class, of a function that makes one, or of a class with a
    `__call__`: (B, *event) -> (B,), lower is likelier. Training imports the module."""

    params: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the class or function."""

    num_classes: PositiveInt | None = None
    """Classes of a network with a method `logits(x)` (B, num_classes); for the joint objective."""

    _given: Any = PrivateAttr(default=None)

    def build(self, seed: int = 0) -> Any:
        """The user's own module itself, so that its weights keep their names."""
        if self._given is None:
            # Imported before the seed is set, because an import may use random numbers.
            load_target(self.target, "energy.target")
        return super().build(seed)

    def module(self) -> Any:
        made = self._made()
        if not isinstance(made, nn.Module):
            if not callable(made):
                raise ValueError(
                    f"energy.target: {self.target} gave a {type(made).__name__}, expected an "
                    "nn.Module or a callable (B, *event) -> (B,)"
                )
            made = FunctionEnergy(cast(EnergyFn, made))
        self._check_weights(made)
        return made

    def _made(self) -> Any:
        if isinstance(self._given, nn.Module):
            return copy.deepcopy(self._given).cpu()
        factory = self._given
        if factory is None:
            factory = load_target(self.target, "energy.target")
        elif not _takes_nothing(factory):
            return factory
        try:
            return factory(**self.params)
        except Exception as error:
            params = ", ".join(f"{key}={value!r:.40}" for key, value in self.params.items())
            raise ValueError(
                f"energy.params: {self.target} called with ({params}) raises "
                f"{type(error).__name__}: {error}"
            ) from error

    def _check_weights(self, module: nn.Module) -> None:
        for name, part in module.named_modules():
            if isinstance(part, _BatchNorm):
                raise ValueError(
                    f"energy.target: {self.target} has batch norm ({name}: {type(part).__name__}), "
                    "by which the energy of a chain would depend on the other chains of its batch; "
                    "use GroupNorm or LayerNorm"
                )
        check_trainable(module, f"energy.target: {self.target}")
        flat_tensors(module)  # raises where a buffer cannot travel
        if self.num_classes is not None and not hasattr(module, "logits"):
            raise ValueError(
                f"energy.num_classes: {self.num_classes}, but {self.target} has no method "
                "logits(x); leave it out, or add the method"
            )

    def bind(self, spec: EventSpec) -> Self:
        bound = super().bind(spec)
        x = spec.noise(NUM_TRIED, torch.Generator().manual_seed(0))
        energy = bound.build()
        try:
            with torch.no_grad():
                out = energy_at(bind_context(energy, **stand_in(energy, NUM_TRIED)), x)
        except Exception as error:
            raise ValueError(
                f"energy.target: {self.target} raises on events of shape {spec.shape} "
                f"({NUM_TRIED} at once): {type(error).__name__}: {error}"
            ) from error
        if not isinstance(out, Tensor):
            raise ValueError(
                f"energy.target: {self.target} returns a {type(out).__name__}, expected a tensor "
                "(B,): one energy for each event"
            )
        if tuple(out.shape) != (NUM_TRIED,):
            hint = "sum over the event's own dimensions, and not over the batch"
            if tuple(out.shape) == (NUM_TRIED, 1):
                hint = "end it with .squeeze(-1)"
            raise ValueError(
                f"energy.target: {self.target} returns {tuple(out.shape)} for events of shape "
                f"{tuple(x.shape)}, expected ({NUM_TRIED},): {hint}"
            )
        if not out.is_floating_point():
            raise ValueError(
                f"energy.target: {self.target} returns {out.dtype}, expected floats: end it with "
                ".float()"
            )
        return bound


def given(energy: nn.Module | Callable[..., Any]) -> EnergySection:
    """The section of an energy that is given from Python.

    The energy is copied, and pickled for Ray's actors: by value if its class is defined in
    `__main__` or a notebook, else by the name of its module, which every node must have.

    Args:
        energy: a module with the initial weights; a class or function that makes one without
            arguments; or a callable (B, *event) -> (B,).
    """
    if not callable(energy):
        raise ValueError(
            f"energy: expected an nn.Module, a function that makes one, or a callable "
            f"(B, *event) -> (B,), got a {type(energy).__name__}"
        )
    section = ModuleEnergySection(target=target_of(energy))
    section._given = _copy(energy).cpu() if isinstance(energy, nn.Module) else energy
    return section


def _copy(module: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(module)
    except Exception as error:  # it holds a lock, a file, a tensor with a history
        what = one_line(f"{type(error).__name__}: {error}")
        raise ValueError(
            f"energy: the {type(module).__name__} cannot be copied ({what}); "
            "pass the class, or a function without arguments that makes the module"
        ) from error


def _takes_nothing(function: Callable[..., Any]) -> bool:
    """Whether `function` takes no arguments, so that it makes an energy and is none itself."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # a builtin without a signature
        return False
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return all(p.kind in kinds or p.default is not p.empty for p in parameters)
