"""Run n steps of any kernel: the loop that a training run spends most of its time in."""

from __future__ import annotations

import operator
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

from ebm_dist.core.types import EnergyFn
from ebm_dist.samplers.compile.block import weights_of
from ebm_dist.samplers.compile.engine import Engine
from ebm_dist.samplers.frozen import Autocast, standing
from ebm_dist.samplers.kernel import Kernel, KernelState, require_finite, start
from ebm_dist.samplers.stepper import walk


@dataclass(frozen=True, slots=True)
class Chain:
    """Where the chains went."""

    position: Tensor  # (B, *event), after the last step
    energy: Tensor  # (B,), E(position)
    trace: Tensor | None  # (R, B, *event), every record_every-th position; time first
    info: dict[str, Tensor]  # each field of the kernel's info, (B,), mean over the steps
    energies: Tensor  # (num_steps, B), the energy after each step
    state: KernelState | None
    """The kernel's last state, for a kernel that should go on as if it had not stopped. None of a
    `DepartingKernel`, which goes on from the position: its `init` there makes the state."""


@contextmanager
def _outside_inference_mode() -> Iterator[None]:
    """Within, gradients can be taken also where the caller holds `torch.inference_mode`, as a test
    loop of Lightning does."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    # Leaving it turns gradients on for everything; within it they were off.
    with torch.inference_mode(False), torch.no_grad():
        yield


@_outside_inference_mode()
def run_chain(
    kernel: Kernel[Any],
    x: Tensor,
    energy: EnergyFn,
    num_steps: int,
    generator: torch.Generator,
    record_every: int = 0,
    *,
    precision: Literal["fp32", "bf16"] = "fp32",
    channels_last: bool = False,
    engine: Engine | None = None,
) -> Chain:
    """Move the chains `x` (B, *event) `num_steps` times.

    The same numbers, bit for bit, as `kernel.init` followed by `num_steps` calls of
    `kernel.step`; faster, since nothing is copied and an energy that is an `nn.Module`
    keeps no graph for its parameters meanwhile. `x` and every parameter's `.grad` stay as
    they were. The device is waited for twice: when the first and the last energies are
    checked.

    Args:
        generator: on the device of `x`; advanced by the noise that was drawn.
        record_every: keep each such position in `Chain.trace`; 0 keeps none.
        precision: bf16 evaluates the energy under autocast. Positions, energies and noise
            stay float32, but gradients move by about 1%, so the law of the chains does too.
        channels_last: hold images (B, C, H, W) channels-last, which changes the rounding of
            convolutions and nothing else. The energy must not call `.view` on them.
        engine: may run the steps in compiled blocks, and hold images channels-last: the same
            seeds give the same chains to rounding, and no longer bit for bit. One engine is
            kept over many calls, since it keeps what it compiled. Rounds with a trace are
            run step by step.

    Raises:
        ValueError: an argument is not what the kernel can move; the message says which.
        NonFiniteEnergy: chains start or end where the energy is not finite.
    """
    num_steps = _count("num_steps", num_steps, "a whole number of at least 1", at_least=1)
    record_every = _count("record_every", record_every, "a whole number, 0 for no trace")
    _check_arguments(x, generator, precision)
    if precision == "bf16":
        energy = Autocast(energy)
    # The one copy of the round: the kernel may then work in place. In float32 at least,
    # as `start` would make it, so that there is no second copy.
    position = start(x, energy).clone(memory_format=torch.contiguous_format)
    if engine is not None and not channels_last:
        channels_last = engine.channels_last(energy, position)
    if channels_last and position.ndim == 4:
        position = position.contiguous(memory_format=torch.channels_last)
    num_records = num_steps // record_every if record_every else 0
    trace = position.new_empty((num_records, *position.shape)) if record_every else None
    totals: dict[str, Tensor] = {}
    with standing(energy, bf16=precision == "bf16", channels_last=channels_last):
        chains = walk(kernel, position, energy)
        energies: Tensor | None = None  # (lag + num_steps, B), once their dtype is known
        shape = (chains.lag + num_steps, position.shape[0])
        block = None
        if engine is not None and trace is None:
            block = engine.block(chains.kernel, energy, chains.state, num_steps)
        started = time.perf_counter()
        num_compiled, weights = 0, []
        if block is not None:
            weights, size = weights_of(energy), block.num_steps
            prepared = block.prepared(weights)
            num_compiled = num_steps // size * size
            for k in range(0, num_compiled, size):
                chains.state, came, info = block(chains.state, prepared, generator)
                energies = came.new_empty(shape) if energies is None else energies
                energies[k : k + size] = came
                _add(totals, info)
        for k in range(num_compiled, num_steps):
            _add(totals, chains.step(generator))
            came: Tensor = chains.state.energy
            energies = came.new_empty(shape) if energies is None else energies
            energies[k] = came
            if trace is not None and (k + 1) % record_every == 0:
                trace[(k + 1) // record_every - 1] = chains.state.position
        assert energies is not None
        last = None if block is None else block.energy_at(chains.state.position, weights)
        state = chains.arrive(energies, last)
        # Waits for the device, so that the time is that of the steps and not of their dispatch.
        require_finite(energies[-1], f"after {num_steps} steps")
        if engine is not None and trace is None:
            seconds, in_blocks = time.perf_counter() - started, block is not None
            engine.took(
                seconds, chains.kernel, energy, chains.state, num_steps, in_blocks=in_blocks
            )
    energies = energies[chains.lag :]
    return Chain(
        position=chains.state.position.contiguous(),
        energy=energies[-1],
        trace=trace,
        info={name: total.div_(num_steps) for name, total in totals.items()},
        energies=energies,
        state=state,
    )


def _add(totals: dict[str, Tensor], info: Any) -> None:
    for f in fields(info):
        value = getattr(info, f.name)
        if f.name in totals:
            totals[f.name].add_(value)
        else:
            totals[f.name] = value.clone()


def _count(name: str, value: Any, expected: str, at_least: int = 0) -> int:
    """`value` as an int; numpy's and torch's whole numbers count as well."""
    try:
        count = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        count = -1
    if count < at_least:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")
    return count


def _check_arguments(x: Tensor, generator: torch.Generator, precision: str) -> None:
    if precision not in ("fp32", "bf16"):
        raise ValueError(f"precision: expected 'fp32' or 'bf16', got {precision!r}")
    if not isinstance(generator, torch.Generator):
        raise ValueError(
            f"generator: expected a torch.Generator, got {type(generator).__name__}; pass "
            "torch.Generator(device).manual_seed(seed)"
        )
    if isinstance(x, Tensor) and generator.device.type != x.device.type:
        raise ValueError(
            f"generator: on {generator.device}, but x is on {x.device}; make it with "
            f"torch.Generator({str(x.device)!r})"
        )
