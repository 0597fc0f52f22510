"""Samples from an exported model by its own recorded sampler."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from ebm_dist.core.errors import NonFinite, UserError
from ebm_dist.core.seeds import derive_seed
from ebm_dist.energies.context import bind, trait
from ebm_dist.export.reader import Export, open_export
from ebm_dist.files.durable import replacing

Start = Literal["noise", "chains"]

MAX_DRAWN = 2**28
"""Numbers in all samples of one draw: a gibibyte, and a few times that while they are moved."""


NUM_STEPS = 1000


def sample(
    export: Export | str | Path,
    num: int,
    *,
    label: int | Sequence[int] | Tensor | None = None,
    num_steps: int | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Draw from an exported model by the sampler that it was trained with, starting at noise.

    Args:
        export: the path of an export or of a run that holds one, or what `open_export` or
            `RunResult.open_export` returned.
        label: the class to draw, or one for each sample (num,), of an energy that takes labels:
            they are drawn from exp(-E(x, label)/T). When left out the law is that of all classes
            together, or each class is drawn equally often where the energy knows no such law.
        num_steps: sampler steps of each chain; 1000 when left out.

    Returns:
        Samples (num, *event) and their energies (num,), float32 on the CPU.
    """
    if num < 1:
        raise UserError(f"num: expected at least 1, got {num}")
    opened = export if isinstance(export, Export) else open_export(export)
    steps = NUM_STEPS if num_steps is None else num_steps
    return draw_samples(opened, num, steps, label=label, seed=seed)


def draw_samples(
    export: Export,
    num: int,
    steps: int,
    *,
    label: int | Sequence[int] | Tensor | None = None,
    seed: int = 0,
    start: Start = "noise",
    device: str | torch.device = "cpu",
    batch_size: int = 256,
    on_step: Callable[[int, float], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Run `num` chains for `steps` steps of the export's sampler.

    Args:
        label: as in `sample`.
        start: `noise` draws from the reference law of the events; `chains` goes on from the
            run's last chains, each taken at most once until all are in use.
        batch_size: chains moved together; the result does not depend on the device only.
        on_step: called after every step with the chain-steps done and the mean energy.

    Returns:
        Positions (num, *event) and energies (num,), float32 on the CPU.

    Raises:
        UserError: `chains` was asked for and the export holds none.
        NonFinite: a chain left the finite numbers.
    """
    room = MAX_DRAWN // math.prod(export.spec.shape)
    if num > room:
        raise UserError(
            f"--num {num}: samples of shape {export.spec.shape} take gigabytes; draw {room} at "
            "most at a time, with another --seed for each"
        )
    device = torch.device(device)
    energy = export.energy.to(device)
    kernel = export.kernel()
    begin = starting_points(export, num, start, seed)
    labels = asked_labels(energy, num, label)
    positions, energies, done = [], [], 0
    for index, first in enumerate(range(0, num, batch_size)):
        x = begin[first : first + batch_size].to(device)
        context = (
            {"label": labels[first : first + batch_size].to(device)} if labels is not None else {}
        )
        given = bind(energy, **context)
        generator = torch.Generator(device).manual_seed(derive_seed(seed, "draw", index))
        state = kernel.init(x, given)
        for _ in range(steps):
            state, _ = kernel.step(state, given, generator)
            done += len(x)
            if on_step is not None:
                on_step(done, float(state.energy.mean()))
        if not torch.isfinite(state.position).all() or not torch.isfinite(state.energy).all():
            raise NonFinite(
                "a chain left the finite numbers; the recorded sampler is unstable from this "
                "start, draw with --start chains or fewer --steps"
            )
        positions.append(state.position.cpu())
        energies.append(state.energy.cpu())
    return torch.cat(positions), torch.cat(energies)


def asked_labels(
    energy: nn.Module, num: int, label: int | Sequence[int] | Tensor | None
) -> Tensor | None:
    """The classes (num,) int64 of `num` samples; None for the law of all classes together.

    Raises:
        UserError: the energy takes no labels, or there is none or not one for each sample.
    """
    if label is None:
        if "label" not in trait(energy, "needs_context"):
            return None
        return torch.arange(num) % trait(energy, "num_labels")
    if "label" not in trait(energy, "context"):
        raise UserError("label: the energy takes none; leave it out, or train one with labels")
    labels = torch.as_tensor(label).reshape(-1)
    classes = trait(energy, "num_labels")
    if len(labels) not in (1, num):
        raise UserError(f"label: expected one label or {num}, got {len(labels)}")
    if labels.is_floating_point() or bool(((labels < 0) | (labels >= classes)).any()):
        raise UserError(f"label: expected whole numbers from 0 to {classes - 1}, got {label}")
    return labels.long().expand(num)


def starting_points(export: Export, num: int, start: Start, seed: int) -> Tensor:
    """Where `num` chains begin, (num, *event)."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "draw", "start"))
    if start == "noise":
        return export.spec.noise(num, generator, std=export.start_std)
    stored = export.chains()
    if stored is None:
        raise UserError(f"{export.path}: holds no chains; draw with --start noise")
    order = [
        torch.randperm(len(stored), generator=generator)
        for _ in range((num + len(stored) - 1) // len(stored))
    ]
    return stored[torch.cat(order)[:num]]


def save_samples(out: Path, x: Tensor, energy: Tensor, export: Export) -> None:
    """Write samples as a picture (.png) or arrays `x` and `energy` (.npz), all or nothing.

    Raises:
        UserError: another suffix, or `out` cannot be written.
    """
    check_suffix(out)
    try:
        if out.suffix == ".png":
            from ebm_dist.report.grid import save_grid

            save_grid(x, out, export.spec)
            return
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as file:
            np.savez_compressed(file, x=x.numpy(), energy=energy.numpy())
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written: {error.strerror or error}") from None


def check_suffix(out: Path) -> None:
    if out.suffix not in (".png", ".npz"):
        raise UserError(f"--out {out}: expected a name that ends in .png or .npz")
