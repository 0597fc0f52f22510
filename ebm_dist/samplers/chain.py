"""Runs n steps of any kernel. A training run spends most of its time in this loop."""

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
from ebm_dist.samplers.frozen import Autocast, prepared_weights
from ebm_dist.samplers.kernel import Kernel, KernelState, require_finite, start
from ebm_dist.samplers.stepper import make_stepper


@dataclass(frozen=True, slots=True)
class Chain:
    """The result of `run_chain`."""

    position: Tensor  # (B, *event), after the last step
    energy: Tensor  # (B,), E(position)
    trace: Tensor | None  # (R, B, *event), every record_every-th position; time first
    info: dict[str, Tensor]  # each field of the kernel's info (B,), averaged over the steps
    energies: Tensor  # (num_steps, B), the energy after each step
    state: KernelState | None
    """The kernel's last state, from which it continues as if it had not stopped. None for a
    `DepartingKernel`: its `init` at the last position gives the same state."""


@contextmanager
def _outside_inference_mode() -> Iterator[None]:
    """Leave `torch.inference_mode` inside the context, so that gradients can be computed although
    the caller is in that mode, as a test loop of Lightning is."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    # Leaving inference mode enables gradients for all operations; no_grad keeps them disabled.
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
    clock: Tensor | None = None,
) -> Chain:
    """Move the chains `x` (B, *event) `num_steps` times.

    Gives the same numbers, bit for bit, as `kernel.init` followed by `num_steps` calls of
    `kernel.step`. It is faster: states are not copied, and no graph is built for the
    parameters of an energy that is an `nn.Module`. `x` and every parameter's `.grad` stay
    unchanged. The host waits for the device twice, to check the first and the last energies.

    Args:
        generator: on the device of `x`; advanced by the noise that is drawn.
        record_every: store every `record_every`-th position in `Chain.trace`; 0 stores none.
        precision: bf16 evaluates the energy under autocast. Positions, energies and noise
            stay float32, but gradients change by about 1%, which changes the law of the chains.
        channels_last: store images (B, C, H, W) channels-last, which only changes the rounding
            of convolutions. The energy must not call `.view` on them.
        engine: may run the steps in compiled blocks and store images channels-last. The same
            seeds then give the same chains to rounding, not bit for bit. Pass one engine to
            many calls: it caches what it compiled. Calls with a trace run step by step.
        clock: (B,) int64, the moves that each chain has made, for a kernel that `reads_clock`; 0
            where left out.

    Raises:
        ValueError: an argument does not fit the kernel; the message says which.
        NonFiniteEnergy: the energy is not finite where chains start or end.
    """
    num_steps = _count("num_steps", num_steps, "a whole number of at least 1", at_least=1)
    record_every = _count("record_every", record_every, "a whole number, 0 for no trace")
    _check_arguments(x, generator, precision)
    if precision == "bf16":
        energy = Autocast(energy)
    # The only copy of the round; the kernel may then work in place. `start` makes it float32
    # at least, so `kernel.init` does not convert, and copy, it again.
    position = start(x, energy).clone(memory_format=torch.contiguous_format)
    if engine is not None and not channels_last:
        channels_last = engine.channels_last(energy, position)
    if channels_last and position.ndim == 4:
        position = position.contiguous(memory_format=torch.channels_last)
    num_records = num_steps // record_every if record_every else 0
    trace = position.new_empty((num_records, *position.shape)) if record_every else None
    totals: dict[str, Tensor] = {}
    with prepared_weights(energy, bf16=precision == "bf16", channels_last=channels_last):
        stepper = make_stepper(kernel, position, energy, clock)
        energies: Tensor | None = None  # (lag + num_steps, B), once their dtype is known
        shape = (stepper.lag + num_steps, position.shape[0])
        block = None
        if engine is not None and trace is None:
            block = engine.block(stepper.kernel, energy, stepper.state, num_steps)
        started = time.perf_counter()
        num_compiled, weights = 0, []
        if block is not None:
            weights, size = weights_of(energy), block.num_steps
            prepared = block.prepared(weights)
            num_compiled = num_steps // size * size
            for k in range(0, num_compiled, size):
                stepper.state, new, info = block(stepper.state, prepared, generator)
                energies = new.new_empty(shape) if energies is None else energies
                energies[k : k + size] = new
                _add(totals, info)
        for k in range(num_compiled, num_steps):
            _add(totals, stepper.step(generator))
            new: Tensor = stepper.state.energy
            energies = new.new_empty(shape) if energies is None else energies
            energies[k] = new
            if trace is not None and (k + 1) % record_every == 0:
                trace[(k + 1) // record_every - 1] = stepper.state.position
        assert energies is not None
        last = None if block is None else block.energy_at(stepper.state.position, weights)
        state = stepper.finish(energies, last)
        # Waits for the device, so the time below is that of the steps, not of their dispatch.
        require_finite(energies[-1], f"after {num_steps} steps")
        if engine is not None and trace is None:
            seconds, in_blocks = time.perf_counter() - started, block is not None
            engine.took(
                seconds, stepper.kernel, energy, stepper.state, num_steps, in_blocks=in_blocks
            )
    energies = energies[stepper.lag :]
    return Chain(
        position=stepper.state.position.contiguous(),
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
    """`value` as an int; accepts integers of numpy and torch too."""
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
