"""Draws samples of an exported model with its recorded sampler."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ebm_dist.core.errors import NonFinite, UserError
from ebm_dist.core.seeds import derive_seed
from ebm_dist.energies.context import ContextTraits, bind, how_to_take, trait
from ebm_dist.export.reader import Export, open_export
from ebm_dist.files.durable import replacing
from ebm_dist.samplers.kernel import Kernel
from ebm_dist.samplers.law import at_temperature
from ebm_dist.samplers.tempering.levels import highest_level, noise_of
from ebm_dist.samplers.traits import trait as kernel_trait

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
    condition: Tensor | np.ndarray | None = None,
    temperature: float | None = None,
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
        condition: for a conditional energy E(y | x), the given parts (K, *condition_shape), which
            the samples take in turn; those of the run's last chains when left out.
        temperature: T > 0 of the law exp(-E/T); the run's own when left out. A short-run recipe has
            no such law (docs/choosing.md); chains that go down noise levels are corrected towards
            it at each level.
        num_steps: sampler steps of each chain; when left out, `usual_steps`.
        plugins: modules to import first, as `load_energy` takes them.

    Returns:
        Samples (num, *event) and their energies (num,), float32 on the CPU.
    """
    if num < 1:
        raise UserError(f"num: expected at least 1, got {num}")
    opened = export if isinstance(export, Export) else open_export(export, plugins=plugins)
    steps = usual_steps(opened, level) if num_steps is None else num_steps
    return draw_samples(
        opened,
        num,
        steps,
        label=label,
        level=level,
        condition=condition,
        temperature=temperature,
        seed=seed,
    )


@dataclass(frozen=True, slots=True)
class Samples:
    """Samples on the CPU."""

    x: Tensor  # (N, *event), float32
    energy: Tensor  # (N,), float32
    context: dict[str, Tensor]  # (N, ...) each, by `CONTEXT`, what the energy was given


def draw_samples(export: Export, num: int, steps: int, **how: Any) -> tuple[Tensor, Tensor]:
    """The positions and energies of `draw`."""
    drawn = draw(export, num, steps, **how)
    return drawn.x, drawn.energy


def draw(
    export: Export,
    num: int,
    steps: int,
    *,
    label: int | Sequence[int] | Tensor | None = None,
    level: int | None = None,
    condition: Tensor | np.ndarray | None = None,
    temperature: float | None = None,
    seed: int = 0,
    start: Start = "noise",
    device: str | torch.device = "cpu",
    batch_size: int = 256,
    on_step: Callable[[int, float], None] | None = None,
) -> Samples:
    """Run `num` chains for `steps` steps of the export's sampler.

    Args:
        label: as in `sample`, as are `level`, `condition` and `temperature`.
        start: `noise` starts from the reference law of the events, `chains` from the run's last
            chains, each of which is used once before any is used again.
        batch_size: number of chains that move together; the noise depends on it.
        on_step: called after every step with the number of chain steps so far and the mean energy.

    Raises:
        UserError: the export has no chains for `start="chains"`, or for conditions.
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
    if temperature is not None:
        kernel = _at_temperature(kernel, temperature)
    if condition is not None and start == "chains":
        raise UserError(
            "condition: given, but each of the run's chains has its own; leave it out, or draw "
            "with --start noise"
        )
    own = condition is None and "condition" in trait(energy, "needs_context")
    if label is not None:  # refuses what cannot be asked for
        index_of("label", label, num, trait(energy, "num_labels"), energy)
    begin, of_chains = starting_points(export, num, start, seed, label, conditions=own)
    if label is None and is_conditional(export):
        label = of_chains.get("label", torch.arange(num) % trait(energy, "num_labels"))
    condition = of_chains.get("condition") if own else condition
    asked = asked_context(energy, num, label, level, condition)
    from_there = dict(asked)
    if start == "noise" and (highest := highest_level(kernel, energy)) is not None:
        from_there["level"] = torch.full((num,), highest)
    positions, energies, levels, done = [], [], [], 0
    for index, first in enumerate(range(0, num, batch_size)):
        x = begin[first : first + batch_size].to(device)
        rows = slice(first, first + batch_size)
        given = bind(energy, **{name: value[rows].to(device) for name, value in from_there.items()})
        generator = torch.Generator(device).manual_seed(derive_seed(seed, "draw", index))
        state = kernel.init(x, given)
        for _ in range(steps):
            state, _ = kernel.step(state, given, generator)
            done += len(x)
            if on_step is not None:
                on_step(done, float(state.energy.mean()))
        if not torch.isfinite(state.position).all() or not torch.isfinite(state.energy).all():
            remedy = "--start chains or fewer --steps"
            if temperature is not None:
                remedy = f"a --temperature nearer to the run's, {remedy}"
            raise NonFinite(
                "a chain left the finite numbers; the recorded sampler is unstable from this "
                f"start, draw with {remedy}"
            )
        positions.append(state.position.cpu())
        energies.append(state.energy.cpu())
        if kernel_trait(kernel, "moves_level") and "level" in asked:
            levels.append(state.level.cpu())
    if levels:
        asked["level"] = torch.cat(levels)
    return Samples(torch.cat(positions), torch.cat(energies), asked)


def _at_temperature(kernel: Kernel[Any], temperature: float) -> Kernel[Any]:
    if not 0 < temperature < math.inf:
        raise UserError(f"temperature: expected a finite number above 0, got {temperature}")
    try:
        return at_temperature(kernel, temperature)
    except ValueError as error:
        raise UserError(
            f"{error}; leave the temperature out, or make the run's sampler a dataclass with a "
            "field `temperature`"
        ) from error


def usual_steps(export: Export, level: int | None = None) -> int:
    """Steps of a chain from noise: the median age of the run's chains, at most `NUM_STEPS`; of a
    run without chains those of the sampler's schedule; or one for each level, where the sampler
    goes down to `level`.

    A recipe of low temperature trains the energy where its chains come in their lives; longer
    chains leave that, and settle in a few minima. Chains that never restart have no such age.
    """
    if (highest := highest_level(export.kernel(), export.energy)) is not None:
        return highest - (level or 0)
    try:
        restart = float(export.config["recipe"]["buffer"]["reinit_prob"])
    except (KeyError, TypeError, ValueError):
        return export.sampler.num_scheduled_steps or NUM_STEPS
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
    condition: Tensor | np.ndarray | None = None,
) -> dict[str, Tensor]:
    """The labels and levels of `num` samples, (num,) int64 each, and their conditions.

    If the energy needs one that is left out, each label occurs equally often, and the level is the
    cleanest. The rows of `condition` are given in turn.

    Raises:
        UserError: the energy takes no such context, or needs a condition; or a number is out of
            range, or there is not one per sample.
    """
    needs, context = trait(energy, "needs_context"), {}
    if label is not None or "label" in needs:
        num_labels = trait(energy, "num_labels")
        every = torch.arange(num) % (num_labels or 1)
        context["label"] = index_of(
            "label", every if label is None else label, num, num_labels, energy
        )
    if level is not None or "level" in needs:
        stds = trait(energy, "noise_stds") or ()
        context["level"] = index_of("level", level or 0, num, len(stds), energy)
    if condition is not None:
        rows = _given_conditions(condition, energy)
        context["condition"] = rows[torch.arange(num) % len(rows)]
    elif "condition" in needs:
        raise UserError("condition: the energy needs one for each sample; give it")
    return context


def index_of(name: str, asked: Any, num: int, size: int | None, energy: nn.Module) -> Tensor:
    """The labels or levels `asked` for as (num,) int64; `size` is their number."""
    if name not in trait(energy, "context"):
        own = not isinstance(energy, ContextTraits)
        how = how_to_take(name, own=True) if own else f"train one with {name}s"
        raise UserError(f"{name}: the energy takes none; leave it out, or {how}")
    asked = torch.as_tensor(asked).reshape(-1)
    if len(asked) not in (1, num):
        raise UserError(f"{name}: expected one {name} or {num}, got {len(asked)}")
    size = size or 0
    if asked.is_floating_point() or bool(((asked < 0) | (asked >= size)).any()):
        got = asked.item() if len(asked) == 1 else asked.tolist()
        raise UserError(f"{name}: expected whole numbers from 0 to {size - 1}, got {got}")
    return asked.long().expand(num)


def _given_conditions(condition: Tensor | np.ndarray, energy: nn.Module) -> Tensor:
    """`condition` (K, *condition_shape) as float32."""
    if "condition" not in trait(energy, "context"):
        keys = "data.condition_size and buffer.context.condition: data"
        how = f"train one with {keys}"
        if not isinstance(energy, ContextTraits):
            how = f"{how_to_take('condition', own=True)}, and train it with {keys}"
        raise UserError(f"condition: the energy takes none; leave it out, or {how}")
    if isinstance(condition, np.ndarray):
        condition = torch.from_numpy(np.array(condition, np.float32))
    rows, shape = condition.detach().float().cpu(), trait(energy, "condition_shape")
    if len(rows) == 0 or (shape is not None and tuple(rows.shape[1:]) != tuple(shape)):
        sizes = ", ".join(map(str, ("K", *(shape or ("...",)))))
        raise UserError(f"condition: expected an array ({sizes}), got {tuple(rows.shape)}")
    if not rows.isfinite().all():
        raise UserError("condition: holds numbers that are not finite; leave those rows out")
    return rows


def starting_points(
    export: Export,
    num: int,
    start: Start,
    seed: int,
    label: int | Sequence[int] | Tensor | None = None,
    *,
    conditions: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The initial positions of `num` chains, (num, *event), and the contexts of the run's chains.

    If the run's chains had labels and `label` asks for some, the chains are of these.

    Args:
        conditions: chains from noise take the conditions and labels of the run's chains.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "draw", "start"))
    noise = None
    if start == "noise":
        highest = highest_level(export.kernel(), export.energy)
        if highest is None:
            noise = export.spec.noise(num, generator, std=export.start_std)
        else:
            noise = noise_of(export.energy, highest, (num, *export.spec.shape), generator)
        if not conditions:
            return noise, {}
    stored = export.stored()
    if stored is None and noise is not None:
        raise UserError(f"{export.path}: holds no chains with conditions; give some by --condition")
    if stored is None:
        raise UserError(f"{export.path}: holds no chains; draw with --start noise")
    labels = stored.context.get("label")
    if labels is None and is_conditional(export):
        raise UserError(f"{export.path}: its chains lost their labels; draw with --start noise")
    if conditions and "condition" not in stored.context:
        raise UserError(
            f"{export.path}: its chains lost their conditions; draw with --start noise and give "
            "some by --condition"
        )

    def chosen(among: Tensor, count: int) -> Tensor:
        times = range(-(-count // len(among)))
        order = [torch.randperm(len(among), generator=generator) for _ in times]
        return among[torch.cat(order)[:count]]

    every = torch.arange(len(stored.x))
    if labels is None or label is None:
        index = chosen(every, num)
    else:
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
    context = {name: value[index] for name, value in stored.context.items()}
    return stored.x[index] if noise is None else noise, context


def save_samples(out: Path, drawn: Samples, export: Export) -> None:
    """Write samples as a picture (.png), or as the arrays `x`, `energy` and those of their context
    (.npz).

    Raises:
        UserError: another suffix, or `out` cannot be written.
    """
    check_suffix(out)
    try:
        if out.suffix == ".png":
            from ebm_dist.report.grid import save_grid

            condition = drawn.context.get("condition")
            save_grid(drawn.x, out, export.spec, condition=condition)
            return
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as file:
            arrays: dict[str, Any] = {"x": drawn.x, "energy": drawn.energy, **drawn.context}
            np.savez_compressed(file, **arrays)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written: {error.strerror or error}") from None


def check_suffix(out: Path) -> None:
    if out.suffix not in (".png", ".npz"):
        raise UserError(f"--out {out}: expected a name that ends in .png or .npz")
