"""log Z without sampling: enumeration, quadrature, or the energy's own closed form."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ebm_dist.core.events import energy_at
from ebm_dist.core.types import EnergyFn, EventSpec
from ebm_dist.energies.closed_form.finite import num_states, states
from ebm_dist.energies.closed_form.quadrature import log_integral

MAX_ENUMERATED = 2**20
_NEGLIGIBLE = 45.0
"""exp(-45) = 3e-20 of the largest density, which is negligible in float64."""

Method = Literal["auto", "enumerate", "quadrature", "closed_form"]


def exact_log_partition(
    energy: EnergyFn,
    spec: EventSpec | None = None,
    *,
    temperature: float = 1.0,
    method: Method = "auto",
    bounds: Sequence[tuple[float, float]] | None = None,
    box: tuple[float, float] | None = None,
) -> float:
    """log of the sum or integral of exp(-E(x)/T) over all events, in nats.

    `auto` enumerates discrete events of at most 2**20 states; otherwise it takes the energy's
    own `log_z` where it has one (an RBM sums its smaller side there); otherwise it integrates
    real events of one or two dimensions.

    Args:
        spec: shape and kind of an event; by default the energy's `event`.
        temperature: T > 0.
        bounds: the box of the quadrature, a pair for each dimension; found automatically when
            left out, if the energy rises on all sides.
        box: one pair for every dimension of real events; not read for discrete ones.

    Raises:
        ValueError: no exact method exists for this energy; use `log_partition`.
    """
    if temperature <= 0:
        raise ValueError(f"temperature: expected a number above 0, got {temperature}")
    spec = event_of(energy, spec)
    if box is not None and not spec.discrete:
        bounds = [box] * math.prod(spec.shape)
    if method == "enumerate" or (
        method == "auto" and spec.discrete and num_states(spec) <= MAX_ENUMERATED
    ):
        return _enumerate(energy, spec, temperature)
    log_z = getattr(energy, "log_z", None)
    num_dims = math.prod(spec.shape)
    planar = spec.kind == "real" and num_dims <= 2
    if method in ("auto", "closed_form") and callable(log_z) and bounds is None:
        try:
            return float(log_z(temperature))  # type: ignore[arg-type]
        except ValueError:
            # The closed form does not cover these parameters; two dimensions can be integrated.
            if method == "closed_form" or not planar:
                raise
    if method != "closed_form" and planar:
        return _integrate(energy, spec.shape, temperature, bounds)
    raise ValueError(
        f"exact_log_partition: nothing exact for {spec.kind} events of shape {spec.shape} with "
        f"method {method!r}; discrete events need at most {MAX_ENUMERATED} states, real ones at "
        f"most 2 dimensions. Use log_partition (annealed importance sampling)"
    )


def is_exact(energy: EnergyFn, spec: EventSpec | None = None) -> bool:
    """Whether `exact_log_partition` returns a number at temperature 1 within a second or so."""
    spec = event_of(energy, spec)
    if spec.discrete and num_states(spec) <= MAX_ENUMERATED:
        return True
    weight = getattr(energy, "weight", None)
    if hasattr(energy, "sample_hidden") and isinstance(weight, Tensor):
        return min(weight.shape) <= 20
    # Other closed forms cost nothing or fail at once. A sum over 2**22 states takes seconds, which
    # is too slow for a curve.
    return spec.kind == "real" and math.prod(spec.shape) <= 2


def event_of(energy: EnergyFn, spec: EventSpec | None) -> EventSpec:
    """`spec`, or the energy's own `event`."""
    spec = spec if spec is not None else getattr(energy, "event", None)
    if not isinstance(spec, EventSpec):
        raise ValueError(
            f"spec: {type(energy).__name__} does not say what its events are; pass "
            f"spec=EventSpec(shape, kind)"
        )
    return spec


def _enumerate(energy: EnergyFn, spec: EventSpec, temperature: float) -> float:
    if not spec.discrete or num_states(spec) > MAX_ENUMERATED:
        raise ValueError(
            f"exact_log_partition: cannot enumerate {spec.kind} events of shape {spec.shape}; at "
            f"most {MAX_ENUMERATED} states of a discrete kind. Use log_partition"
        )
    with torch.no_grad():
        parts = [(-_double(energy, x) / temperature).logsumexp(dim=0).cpu() for x in states(spec)]
    return float(torch.stack(parts).logsumexp(dim=0))


def _integrate(
    energy: EnergyFn,
    shape: tuple[int, ...],
    temperature: float,
    bounds: Sequence[tuple[float, float]] | None,
) -> float:
    num_dims = math.prod(shape)

    def flat_energy(x: Tensor) -> Tensor:
        return _double(energy, x.reshape(-1, *shape)).cpu()

    if bounds is None:
        bounds = _box(flat_energy, num_dims, temperature)
    if len(bounds) != num_dims or any(low >= high for low, high in bounds):
        raise ValueError(f"bounds: expected {num_dims} pairs low < high, got {list(bounds)}")
    value = previous = math.nan
    # Panels are doubled until two results agree: a kink or a narrow ridge needs more panels.
    for panels in (16, 32, 64, 128) if num_dims == 2 else (64, 128, 256, 512, 1024, 2048):
        edges = [np.linspace(low, high, panels + 1) for low, high in bounds]
        value = log_integral(flat_energy, edges, temperature, order=8)
        # Results of float32 networks are reproducible to 1e-7 only.
        if abs(value - previous) < 1e-8:
            break
        previous = value
    return value


def _box(
    energy: EnergyFn, num_dims: int, temperature: float, num_points: int = 257
) -> list[tuple[float, float]]:
    """A box outside of which exp(-E/T) is negligible, found on successively wider grids."""
    reach = 4.0
    while reach < 1e5:
        axis = torch.linspace(-reach, reach, num_points, dtype=torch.float64)
        grid = torch.stack(torch.meshgrid(*[axis] * num_dims, indexing="ij"), dim=-1)
        with torch.no_grad():
            value = energy(grid.reshape(-1, num_dims)) / temperature
        inside = (value - value.min() < _NEGLIGIBLE).reshape([num_points] * num_dims)
        box = []
        for dim in range(num_dims):
            others = [other for other in range(num_dims) if other != dim]
            hit = (inside.any(dim=tuple(others)) if others else inside).nonzero().flatten()
            # One cell of margin, since the level set lies between two grid points.
            box.append((int(hit[0]) - 1, int(hit[-1]) + 1))
        if all(low >= 0 and high < num_points for low, high in box):
            return [(float(axis[low]), float(axis[high])) for low, high in box]
        reach *= 2
    raise ValueError(
        "exact_log_partition: exp(-E/T) does not fall off within 1e5 of the origin, so Z may be "
        "infinite; give the energy a confinement, or pass bounds"
    )


def _double(energy: EnergyFn, x: Tensor) -> Tensor:
    """Energies in float64, also computed in float64 if the energy supports it."""
    owner = energy if isinstance(energy, torch.nn.Module) else getattr(energy, "__self__", None)
    device = x.device
    if isinstance(owner, torch.nn.Module):
        tensor = next(itertools.chain(owner.parameters(), owner.buffers()), None)
        device = tensor.device if tensor is not None else device
    try:
        return energy_at(energy, x.double().to(device)).double()
    except (RuntimeError, TypeError):
        # A callable with float32 weights.
        return energy_at(energy, x.float().to(device)).double()
