"""Draws samples of an exported model with its recorded sampler."""

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
"""Most numbers in the samples of one draw: 1 GiB, and a few times that while chains move."""


NUM_STEPS = 1000


def sample(
    export: Export | str | Path,
    num: int,
    *,
    label: int | Sequence[int] | Tensor | None = None,
    level: int | None = None,
    num_steps: int | None = None,
    seed: int = 0,
    plugins: Sequence[str] = (),
) -> tuple[Tensor, Tensor]:
    """Draw samples of an exported model with its training sampler, starting from noise.

    Args:
        export: the path of an export or of a run with one, or the result of `open_export` or of
            `RunResult.open_export`.
        label: for an energy that takes labels, the class to draw, or one per sample (num,); the law
            is exp(-E(x, label)/T). When left out, each class is drawn equally often if the run's
            chains had labels, or if the energy needs one; else the law is that of E(x).
        level: for an energy over levels, the noise level; 0, the cleanest, when left out.
        num_steps: sampler steps of each chain; when left out, `usual_steps`.
        plugins: modules to import first, as `load_energy` takes them.

    Returns:
        Samples (num, *event) and their energies (num,), float32 on the CPU.
    """
    if num < 1:
        raise UserError(f"num: expected at least 1, got {num}")
    opened = export if isinstance(export, Export) else open_export(export, plugins=plugins)
    steps = usual_steps(opened) if num_steps is None else num_steps
    return draw_samples(opened, num, steps, label=label, level=level, seed=seed)


def draw_samples(
    export: Export,
    num: int,
    steps: int,
    *,
    label: int | Sequence[int] | Tensor | None = None,
    level: int | None = None,
    seed: int = 0,
    start: Start = "noise",
    device: str | torch.device = "cpu",
    batch_size: int = 256,
    on_step: Callable[[int, float], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Run `num` chains for `steps` steps of the export's sampler.

    Args:
        label: as in `sample`, as is `level`.
        start: `noise` starts from the reference law of the events, `chains` from the run's last
            chains, each of which is used once before any is used again.
        batch_size: number of chains that move together; the noise depends on it.
        on_step: called after every step with the number of chain steps so far and the mean energy.

    Returns:
        Positions (num, *event) and energies (num,), float32 on the CPU.

    Raises:
        UserError: the export has no chains for `start="chains"`.
        NonFinite: a chain is no longer finite.
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
    if label is not None:
        asked_context(energy, num, label, level)  # refuses what cannot be asked for
    begin, labels = starting_points(export, num, start, seed, label)
    if label is None and is_conditional(export):
        label = torch.arange(num) % trait(energy, "num_labels") if labels is None else labels
    asked = asked_context(energy, num, label, level)
    positions, energies, done = [], [], 0
    for index, first in enumerate(range(0, num, batch_size)):
        x = begin[first : first + batch_size].to(device)
        rows = slice(first, first + batch_size)
        given = bind(energy, **{name: value[rows].to(device) for name, value in asked.items()})
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


def usual_steps(export: Export) -> int:
    """Steps of a chain from noise: the median age of the run's chains, at most `NUM_STEPS`.

    A recipe of low temperature trains the energy where its chains come in their lives; longer
    chains leave that, and settle in a few minima. Chains that never restart have no such age.
    """
    try:
        restart = float(export.config["recipe"]["buffer"]["reinit_prob"])
    except (KeyError, TypeError, ValueError):
        return NUM_STEPS
    if not 0 < restart < 1:
        return export.sampler.num_steps if restart == 1 else NUM_STEPS
    rounds = math.log(2) / -math.log1p(-restart)
    if rounds > NUM_STEPS:
        return NUM_STEPS
    return min(NUM_STEPS, export.sampler.num_steps * math.ceil(rounds))


def is_conditional(export: Export) -> bool:
    """Whether the run's chains each had a label."""
    try:
        labelled = bool(export.config["recipe"]["buffer"]["context"]["label"])
    except (KeyError, TypeError):
        labelled = "label" in trait(export.energy, "needs_context")
    return labelled and trait(export.energy, "num_labels") is not None


def asked_context(
    energy: nn.Module,
    num: int,
    label: int | Sequence[int] | Tensor | None = None,
    level: int | None = None,
) -> dict[str, Tensor]:
    """The labels and levels of `num` samples, (num,) int64 each.

    If the energy needs one that is left out, each label occurs equally often, and the level is the
    cleanest.

    Raises:
        UserError: the energy takes no labels or levels, or needs a condition, which cannot be given
            here; or a number is out of range, or there is not one per sample.
    """
    takes, needs = trait(energy, "context"), trait(energy, "needs_context")
    if "condition" in needs:
        raise UserError(
            "energy: needs a condition for each sample; draw in Python with "
            "energy.given(condition=...) and samplers.run_chain"
        )
    context: dict[str, Tensor] = {}
    if label is not None or "label" in needs:
        every = torch.arange(num) % (trait(energy, "num_labels") or 1)
        asked = every if label is None else torch.as_tensor(label)
        context["label"] = _asked("label", asked, num, trait(energy, "num_labels"), takes)
    if level is not None or "level" in needs:
        stds = trait(energy, "noise_stds") or ()
        context["level"] = _asked("level", torch.as_tensor(level or 0), num, len(stds), takes)
    return context


def _asked(name: str, asked: Tensor, num: int, size: int, takes: frozenset[str]) -> Tensor:
    if name not in takes:
        raise UserError(f"{name}: the energy takes none; leave it out, or train one with {name}s")
    asked = asked.reshape(-1)
    if len(asked) not in (1, num):
        raise UserError(f"{name}: expected one {name} or {num}, got {len(asked)}")
    if asked.is_floating_point() or bool(((asked < 0) | (asked >= size)).any()):
        got = asked.item() if len(asked) == 1 else asked.tolist()
        raise UserError(f"{name}: expected whole numbers from 0 to {size - 1}, got {got}")
    return asked.long().expand(num)


def starting_points(
    export: Export,
    num: int,
    start: Start,
    seed: int,
    label: int | Sequence[int] | Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The initial positions of `num` chains, (num, *event), and the labels (num,) of the run's.

    If the run's chains had labels and `label` asks for some, the starts are chains of these.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "draw", "start"))
    if start == "noise":
        return export.spec.noise(num, generator, std=export.start_std), None
    stored = export.stored()
    if stored is None:
        raise UserError(f"{export.path}: holds no chains; draw with --start noise")
    labels = stored.context.get("label")
    if labels is None and is_conditional(export):
        raise UserError(f"{export.path}: its chains lost their labels; draw with --start noise")

    def chosen(among: Tensor, count: int) -> Tensor:
        times = range(-(-count // len(among)))
        order = [torch.randperm(len(among), generator=generator) for _ in times]
        return among[torch.cat(order)[:count]]

    every = torch.arange(len(stored.x))
    if labels is None or label is None:
        index = chosen(every, num)
        return stored.x[index], None if labels is None else labels[index]
    asked = torch.as_tensor(label).expand(num)
    index = torch.empty(num, dtype=torch.int64)
    for one in asked.unique():
        among = every[labels == one]
        if len(among) == 0:
            raise UserError(
                f"{export.path}: holds no chain of label {one}; draw with --start noise"
            )
        rows = (asked == one).nonzero()[:, 0]
        index[rows] = chosen(among, len(rows))
    return stored.x[index], labels[index]


def save_samples(out: Path, x: Tensor, energy: Tensor, export: Export) -> None:
    """Write samples as a picture (.png) or as arrays `x` and `energy` (.npz).

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
