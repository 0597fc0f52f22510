"""Energies with constant weights: no gradients for them, cast and laid out once per round."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ebm_dist.core.types import EnergyFn
from ebm_dist.energies.context import Given
from ebm_dist.samplers.kernel import as_float

# Not subclasses: those may compute in float32, as an energy's head does.
_CASTABLE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


class Autocast:
    """An energy under bf16 autocast; float32 in and out."""

    def __init__(self, energy: EnergyFn) -> None:
        self.energy = energy

    def __call__(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            out = self.energy(x)
        return as_float(out)

    def __getattr__(self, name: str) -> Any:
        # Kernels read other attributes of an energy too: its event and its conditionals.
        return getattr(self.energy, name)


def for_rows(energy: EnergyFn, choose: Callable[[Tensor], Tensor]) -> EnergyFn:
    """`energy` for other rows than the B chains in their order.

    A kernel that evaluates some chains only, or copies of them, calls this: an energy that is given
    a context for each chain refuses another number of rows.

    Args:
        choose: maps a tensor (B, ...) to the rows of x that the energy will be called with.
    """
    if isinstance(energy, Autocast):
        return Autocast(for_rows(energy.energy, choose))
    return energy.rows(choose) if isinstance(energy, Given) else energy


def lasting(energy: EnergyFn) -> EnergyFn:
    """What is the same object in every round: the energy without the context of a round."""
    if isinstance(energy, Autocast):
        return lasting(energy.energy)
    return energy.energy if isinstance(energy, Given) else energy


def module_of(energy: EnergyFn) -> nn.Module | None:
    """The module that holds the weights of `energy`: itself, or the owner of a bound method."""
    if isinstance(energy, Autocast):
        return module_of(energy.energy)
    owner = energy if isinstance(energy, nn.Module) else getattr(energy, "__self__", None)
    return owner if isinstance(owner, nn.Module) else None


@contextmanager
def frozen(energy: EnergyFn) -> Iterator[None]:
    """Inside the context the parameters of a module energy require no gradient.

    Otherwise every step would build a graph for the parameters that nobody uses.
    """
    module = module_of(energy)
    parameters = [p for p in module.parameters() if p.requires_grad] if module else []
    try:
        for p in parameters:
            p.requires_grad_(False)
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)


class _Constant(nn.Module):
    """Takes the place of a parametrization and returns the weight that it computed."""

    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value, persistent=False)

    def forward(self) -> Tensor:
        return self.value


@contextmanager
def prepared_weights(energy: EnergyFn, *, bf16: bool, channels_last: bool) -> Iterator[None]:
    """Inside the context weights are frozen, and computed, cast and laid out only once.

    Spectral norm divides a weight by its largest singular value at every use: the quotient is
    kept. A convolution on channels-last images reorders its weights at every use, and autocast
    casts them at every use: they get that layout and dtype now. On exit the parameters are the
    same tensors as before, so views of them into a flat array stay valid.
    """
    module = module_of(energy)
    undo: list[Callable[[], object]] = []
    with frozen(energy):
        try:
            if module is not None:
                for layer in list(module.modules()):
                    # In training mode spectral norm changes its vectors, and so the quotient,
                    # at every use.
                    if parametrize.is_parametrized(layer) and not layer.training:
                        undo += _evaluate_parametrized(layer, bf16, channels_last)
                    elif type(layer) in _CASTABLE:
                        undo += _convert(layer, bf16, channels_last)
            yield
        finally:
            for restore in undo:
                restore()


def _evaluate_parametrized(
    layer: nn.Module, bf16: bool, channels_last: bool
) -> Iterator[Callable[[], object]]:
    """Replace the parametrizations of `layer` by their weights; yields functions that undo it."""
    parametrizations = layer.parametrizations
    assert isinstance(parametrizations, nn.ModuleDict)
    # torch gives a parametrized layer a class of its own, derived from the original one.
    castable = type(layer).__bases__[0] in _CASTABLE
    for name, original in list(parametrizations.items()):
        weight = getattr(layer, name).detach()
        parametrizations[name] = _Constant(
            _converted(weight, bf16, channels_last) if castable else weight
        )
        yield partial(parametrizations.__setitem__, name, original)
    if castable:
        yield from _convert(layer, bf16, channels_last)


def _convert(layer: nn.Module, bf16: bool, channels_last: bool) -> Iterator[Callable[[], object]]:
    """Cast and lay out the weights of `layer`; yields functions that undo it."""
    for p in layer.parameters(recurse=False):
        original = p.data
        p.data = _converted(original, bf16, channels_last)
        yield partial(setattr, p, "data", original)


def _converted(weight: Tensor, bf16: bool, channels_last: bool) -> Tensor:
    layout = torch.channels_last if channels_last and weight.ndim == 4 else torch.preserve_format
    if weight.dtype != torch.float32:
        return weight
    return weight.to(dtype=torch.bfloat16 if bf16 else weight.dtype, memory_format=layout)


def has_convolutions(energy: EnergyFn) -> bool:
    """Whether the energy has 2-D convolutions, which are faster on channels-last images."""
    module = module_of(energy)
    return module is not None and any(isinstance(m, nn.Conv2d) for m in module.modules())
