"""What an energy is conditioned on: a label, a noise level and a condition for each chain.

An energy declares what it takes by the traits below. `bind` fixes those tensors for one batch of
chains and returns an ordinary energy, so that every sampler stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ebm_dist.core.events import per_chain

CONTEXT = ("label", "level", "condition")
"""The names of the tensors that an energy may be given, in the order of messages."""

KEYS = {
    "label": "energy.num_classes",
    "level": "energy.num_levels and energy.noise_stds",
    "condition": "energy.condition_shape",
}
"""The keys of a config that make an energy take each."""

_ATTRIBUTES = {"label": "num_labels", "level": "noise_stds", "condition": "condition_shape"}
"""The attributes by which a network of the user's says how many, or of what shape."""


class ContextTraits:
    """The defaults, of an energy that takes no context; a module from outside may leave them out.

    An energy that sets `context` takes those names as keyword arguments of its call:
    `energy(x, label=..., level=...)`.
    """

    context: ClassVar[frozenset[str]] | frozenset[str] = frozenset()
    """Names among `CONTEXT` that the energy takes."""

    needs_context: ClassVar[frozenset[str]] | frozenset[str] = frozenset()
    """Those of them without which it cannot be called. A joint energy-classifier takes a label, but
    without one it gives the marginal over all labels."""

    num_labels: int | None = None
    """Labels are 0 to num_labels - 1."""

    noise_stds: tuple[float, ...] | None = None
    """Standard deviation of the noise at each level in data units, rising from level 0; levels are
    0 to len(noise_stds) - 1."""

    condition_shape: tuple[int, ...] | None = None
    """Shape of one condition."""


def how_to_take(name: str, *, own: bool) -> str:
    """What makes an energy take `name`, as advice in a message; `own`: a network of the user's."""
    if not own:
        return f"set {KEYS.get(name, name)} where the energy has such keys"
    return (
        f"let the network's call take {name} and give it the attributes context = {{'{name}'}} "
        f"and {_ATTRIBUTES.get(name, name)} (docs/energies.md)"
    )


def trait(energy: object, name: str) -> Any:
    """The trait `name` of any energy, or its default."""
    return getattr(energy, name, getattr(ContextTraits, name))


class Given(nn.Module):
    """`energy` with the context of B chains: x (B, *event) -> (B,). `bind` makes it.

    Row i of x is chain i. Another number of rows is refused, since nothing says which chains they
    are; `rows` makes the energy of other rows. The context is held as buffers, which compiled steps
    take as inputs: a new context needs no compilation.
    """

    def __init__(self, energy: Callable[..., Tensor], context: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.energy = energy
        for name, tensor in context.items():
            self.register_buffer(name, tensor, persistent=False)
        self.names = tuple(context)
        self.num_chains = len(next(iter(context.values())))
        # Nothing else of the energy shows: its exact conditionals or its log Z know no context.
        self.event = getattr(energy, "event", None)
        self.event_shape = getattr(energy, "event_shape", None)
        self.training = bool(getattr(energy, "training", False))

    def forward(self, x: Tensor) -> Tensor:
        if len(x) != self.num_chains:
            raise ValueError(
                f"energy: given the {', '.join(self.names)} of {self.num_chains} chains, called "
                f"with {len(x)}; call it with all chains in their order, or give the context of "
                "these (energies.context.Given.rows)"
            )
        return self.energy(x, **self.tensors)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The context by name, each (B, ...)."""
        return {name: getattr(self, name) for name in self.names}

    def rows(self, choose: Callable[[Tensor], Tensor]) -> Given:
        """The energy of other rows; `choose` maps a tensor (B, ...) to those rows of it."""
        return Given(self.energy, {name: choose(t) for name, t in self.tensors.items()})


def chain_unit(energy: object, x: Tensor) -> Tensor | None:
    """The length (B, 1, ...) in units of which each chain of x moves; None for data units.

    An energy with a method `chain_unit`, of the context of B chains, is called with u = x / unit.
    """
    of = getattr(energy.energy, "chain_unit", None) if isinstance(energy, Given) else None
    if of is None:
        return None
    return per_chain(of(**energy.tensors), x)  # type: ignore[attr-defined]


def bind(
    energy: Any,
    *,
    label: Tensor | None = None,
    level: Tensor | None = None,
    condition: Tensor | None = None,
) -> Any:
    """The energy of B chains with their context, an EnergyFn: x (B, *event) -> (B,).

    Waits for the device once, to check the ranges: an index out of range would end a CUDA process.

    Args:
        energy: an `Energy`, or any callable or module with the traits of `ContextTraits`.
        label: (B,) int64.
        level: (B,) int64.
        condition: (B, *condition_shape), floating point.

    Raises:
        ValueError: the energy takes no such context or needs more, or a tensor does not fit.
    """
    context = {"label": label, "level": level, "condition": condition}
    given = {name: tensor for name, tensor in context.items() if tensor is not None}
    check_names(energy, given)
    if not given:
        return energy
    sizes = {name: len(tensor) if tensor.ndim else 0 for name, tensor in given.items()}
    if len(set(sizes.values())) > 1 or 0 in sizes.values():
        raise ValueError(f"context: expected one row for each chain, got {sizes} rows")
    stds = trait(energy, "noise_stds")
    _check_index("label", label, trait(energy, "num_labels"))
    _check_index("level", level, None if stds is None else len(stds))
    if condition is not None:
        shape = trait(energy, "condition_shape")
        if shape is not None and tuple(condition.shape[1:]) != tuple(shape):
            raise ValueError(
                f"condition: shape {tuple(condition.shape)}, expected (B, "
                f"{', '.join(map(str, shape))}), as energy.condition_shape says"
            )
        if not condition.is_floating_point():
            raise ValueError(f"condition: {condition.dtype}, expected floats: pass x.float()")
    return Given(energy, {name: tensor.detach() for name, tensor in given.items()})


def check_names(energy: object, given: Mapping[str, object]) -> None:
    """Refuse context that `energy` does not take, and the lack of context that it needs."""
    takes, name = trait(energy, "context"), type(energy).__name__
    own = not isinstance(energy, ContextTraits)
    unknown = [key for key in given if key not in takes]
    if unknown:
        what = " and ".join(key for key in CONTEXT if key in takes)
        raise ValueError(
            f"energy: {name} takes {f'{what} alone' if what else 'no context'}, got "
            f"{' and '.join(unknown)}; leave {'it' if len(unknown) == 1 else 'them'} out, or "
            + ", and ".join(how_to_take(key, own=own) for key in unknown)
        )
    missing = [key for key in CONTEXT if key in trait(energy, "needs_context") - given.keys()]
    if missing:
        keywords = ", ".join(f"{key}=..." for key in missing)
        raise ValueError(
            f"energy: {name} needs the {' and '.join(missing)} of each chain; call "
            f"energy.given({keywords})(x)"
        )


def stand_in(energy: object, num: int) -> dict[str, Tensor]:
    """Some context that `energy` can be tried with on `num` events: zeros of what it needs."""
    shapes = {"label": (), "level": (), "condition": trait(energy, "condition_shape") or ()}
    return {
        name: torch.zeros(num, *shapes[name], dtype=None if name == "condition" else torch.int64)
        for name in CONTEXT
        if name in trait(energy, "needs_context")
    }


def _check_index(name: str, index: Tensor | None, num: int | None) -> None:
    if index is None:
        return
    if index.ndim != 1 or index.dtype != torch.int64:
        raise ValueError(
            f"{name}: expected (B,) int64, got {tuple(index.shape)} {index.dtype}; pass "
            f"{name}.long(), one number for each chain"
        )
    if num is None:
        return
    low, high = torch.stack(index.aminmax()).tolist()
    if low < 0 or high >= num:
        raise ValueError(
            f"{name}: {low if low < 0 else high}, but the energy has {num} of them, 0 to {num - 1}"
        )
