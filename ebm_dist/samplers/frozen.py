"""An energy whose weights stand still for a round: no gradients, laid out and cast once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ebm_dist.core.types import EnergyFn
from ebm_dist.samplers.kernel import as_float

# Exactly these types: a subclass may compute in float32, as an energy's head does.
_CASTABLE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


class Autocast:
    """An energy evaluated in bf16 where torch deems it safe; float32 in and out."""

    def __init__(self, energy: EnergyFn) -> None:
        self.energy = energy

    def __call__(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            out = self.energy(x)
        return as_float(out)

    def __getattr__(self, name: str) -> Any:
        # Kernels ask an energy for its event and its conditionals.
        return getattr(self.energy, name)


def module_of(energy: EnergyFn) -> nn.Module | None:
    """The module whose weights `energy` reads: itself, or that of a bound method."""
    if isinstance(energy, Autocast):
        return module_of(energy.energy)
    owner = energy if isinstance(energy, nn.Module) else getattr(energy, "__self__", None)
    return owner if isinstance(owner, nn.Module) else None


@contextmanager
def frozen(energy: EnergyFn) -> Iterator[None]:
    """Within, the parameters of a module energy need no gradient; after it, as before.

    A graph for the parameters would be built at every step and never used.
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


class _Held(nn.Module):
    """A parametrized weight as it came out, in place of what computes it."""

    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value, persistent=False)

    def forward(self) -> Tensor:
        return self.value


@contextmanager
def standing(energy: EnergyFn, *, bf16: bool, channels_last: bool) -> Iterator[None]:
    """Within, weights are frozen, and made once what each step would make of them anew.

    Spectral norm divides each weight by its gain at every use; that quotient is kept. A
    convolution on channels-last images reorders its weights at every use, and one under
    autocast casts them; both get weights that are so already. After it, the parameters are
    the very tensors that they were, so views of them into a flat array still hold.
    """
    module = module_of(energy)
    put_back: list[Callable[[], object]] = []
    with frozen(energy):
        try:
            if module is not None:
                for layer in list(module.modules()):
                    # In training mode a spectral norm improves its vectors at every use.
                    if parametrize.is_parametrized(layer) and not layer.training:
                        put_back += _hold(layer, bf16, channels_last)
                    elif type(layer) in _CASTABLE:
                        put_back += _lay_out(layer, bf16, channels_last)
            yield
        finally:
            for put in put_back:
                put()


def _hold(layer: nn.Module, bf16: bool, channels_last: bool) -> Iterator[Callable[[], object]]:
    """Hold the parametrized weights of `layer`; what undoes each."""
    made_by = layer.parametrizations
    assert isinstance(made_by, nn.ModuleDict)
    # Its class is made for it alone, and has the layer's own as its base.
    castable = type(layer).__bases__[0] in _CASTABLE
    for name, maker in list(made_by.items()):
        weight = getattr(layer, name).detach()
        made_by[name] = _Held(_as_used(weight, bf16, channels_last) if castable else weight)
        yield partial(made_by.__setitem__, name, maker)
    if castable:
        yield from _lay_out(layer, bf16, channels_last)


def _lay_out(layer: nn.Module, bf16: bool, channels_last: bool) -> Iterator[Callable[[], object]]:
    for p in layer.parameters(recurse=False):
        original = p.data
        p.data = _as_used(original, bf16, channels_last)
        yield partial(setattr, p, "data", original)


def _as_used(weight: Tensor, bf16: bool, channels_last: bool) -> Tensor:
    layout = torch.channels_last if channels_last and weight.ndim == 4 else torch.preserve_format
    if weight.dtype != torch.float32:
        return weight
    return weight.to(dtype=torch.bfloat16 if bf16 else weight.dtype, memory_format=layout)


def has_convolutions(energy: EnergyFn) -> bool:
    """Whether images go through convolutions, which are faster on channels-last ones."""
    module = module_of(energy)
    return module is not None and any(isinstance(m, nn.Conv2d) for m in module.modules())
