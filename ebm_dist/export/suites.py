"""The suites of `ebm-dist evaluate`: measurements of an exported model."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ebm_dist.core.errors import UserError
from ebm_dist.core.paths import user_path
from ebm_dist.core.seeds import derive_seed
from ebm_dist.core.types import Batch, EventKind
from ebm_dist.data import DataConfig, load_split
from ebm_dist.energies.context import bind, trait
from ebm_dist.evaluation import (
    Fidelity,
    base_law,
    bits_per_dim,
    exact_log_partition,
    is_exact,
    log_partition,
    log_probs,
    long_run_audit,
    ood_report,
    robust_accuracy,
)
from ebm_dist.evaluation.connectivity import CONNECTED, connectivity
from ebm_dist.evaluation.fidelity import NEIGHBOURS, PER_ROW
from ebm_dist.evaluation.regime import SHORT_RUN_REINIT
from ebm_dist.export.one_law import of_one_law
from ebm_dist.export.reader import Export
from ebm_dist.export.sample import draw_samples, is_conditional, usual_steps
from ebm_dist.samplers import law

Suite = Literal["density", "ood", "robustness", "fidelity", "landscape"]
Say = Callable[[str], None]
OnStep = Callable[[int, int], None]

NUM_TRAIN, NUM_TEST = 10_000, 2_000
NUM_DRAWN = 500
NUM_AIS_CHAINS = 128
NUM_AUDITED, AUDIT_FACTOR = 128, 20
EPSILONS = {"linf": (1 / 255, 2 / 255, 4 / 255, 8 / 255), "l2": (0.25, 0.5, 1.0)}
"""Radii for pixels in [0, 1], as in papers; here images are in [-1, 1], so radii are doubled."""


@dataclass(frozen=True, slots=True)
class Found:
    """The result of a suite."""

    metrics: dict[str, float]
    notes: list[str]
    examples: dict[str, list[float]] = field(default_factory=dict)
    neighbours: Tensor | None = None
    """Samples and their nearest training images, as `Fidelity.neighbours` makes them."""


def evaluate(
    export: Export,
    suite: Suite,
    *,
    seed: int = 0,
    device: str = "cpu",
    data: str | None = None,
    out: Path | None = None,
    say: Say = lambda text: None,
    on_step: OnStep = lambda done, total: None,
) -> dict[str, Any]:
    """Measure `export` on one suite.

    Args:
        data: the current path of the model's data, if it has moved.
        out: the file of the result, beside which `fidelity` puts NAME-neighbours.png.
        seed: seed of all noise; the same seed gives the same result on the same device.
        say: receives a line for each stage.
        on_step: called with the number of steps of the stage that are done and of all.

    Returns:
        `suite`, `temperature`, `seed`, `metrics` (name -> number), `notes` (one line each) and
        `examples` (name -> a number for each event, in the order of the split).

    Raises:
        UserError: the model's data is missing, or the suite does not apply to the model.
    """
    measure = {
        "density": _density,
        "ood": _ood,
        "robustness": _robustness,
        "fidelity": _fidelity,
        "landscape": _landscape,
    }[suite]
    export.energy.to(device)
    if data is not None:
        export = _with_data(export, data)
    export, notes = of_one_law(export, suite)
    try:
        found = measure(export, seed, torch.device(device), say, on_step)
    except ValueError as error:
        raise UserError(f"--suite {suite}: {' '.join(str(error).split())}") from None
    found.notes.extend(notes)
    if out is not None and found.neighbours is not None:
        found.notes.append(_show_neighbours(found.neighbours, out, export))
    return {
        "suite": suite,
        "model": str(export.path),
        "temperature": temperature_of(export),
        "seed": seed,
        "metrics": found.metrics,
        "notes": found.notes,
        "examples": found.examples,
    }


def _show_neighbours(x: Tensor, out: Path, export: Export) -> str:
    """Draw the picture beside `out`; the note about it."""
    from ebm_dist.report.grid import save_grid

    path = out.with_name(f"{out.stem}-neighbours.png")
    try:
        save_grid(x, path, export.spec, num_columns=PER_ROW)
    except OSError as error:
        raise UserError(f"--out: cannot write {path} ({error.strerror or error})") from None
    return f"{path}: {len(x) // (1 + NEIGHBOURS)} samples, each before its nearest training images"


def temperature_of(export: Export) -> float:
    """T of the model exp(-E/T)/Z, the temperature of its sampler."""
    return export.sampler.law_temperature


def _load(export: Export, split: Literal["train", "test"], limit: int) -> Batch:
    section = export.config.get("data")
    if not isinstance(section, dict):
        raise UserError(f"{export.path}: config.json records no data; export the run again")
    export.require_named("data")
    try:
        return load_split(DataConfig.model_validate(section), split, limit)
    except UserError as error:
        raise UserError(
            f"the model's own data is needed: {error}; say where it is now with --data"
        ) from None


def _with_data(export: Export, data: str) -> Export:
    section = {**(export.config.get("data") or {}), "source": os.path.abspath(user_path(data))}
    for key in ("shards", "target", "params", "test_params", "fingerprint"):
        section.pop(key, None)
    return replace(export, config={**export.config, "data": section})


def _generator(seed: int, device: torch.device, *path: str) -> torch.Generator:
    return torch.Generator(device).manual_seed(derive_seed(seed, "evaluate", *path))


def _density(export: Export, seed: int, device: torch.device, say: Say, on_step: OnStep) -> Found:
    train, test = _load(export, "train", NUM_TRAIN), _load(export, "test", NUM_TEST)
    temperature = temperature_of(export)
    metrics: dict[str, float] = {}
    notes = []
    # The model is the law of its sampler: clamped chains have no density outside the box.
    box = law.box(export.kernel())
    if not export.spec.discrete:
        where = "all of space, as the sampler has no clamp"
        notes.append(f"log Z is over {where if box is None else f'[{box[0]:g}, {box[1]:g}]^d'}")
    if box is not None and (train.x.min() < box[0] or train.x.max() > box[1]):
        notes.append("some data lie outside, where clamped chains have no density at all")
    if is_exact(export.energy, export.spec):
        say("log Z exactly")
        log_z = exact_log_partition(export.energy, export.spec, temperature=temperature, box=box)
        metrics["likelihood/log_z"] = log_z
        notes.append("log Z is exact")
    else:
        base = base_law(export.spec, train.x, box=box).to(device)
        found = log_partition(
            export.energy,
            export.spec,
            generator=_generator(seed, device, "density"),
            temperature=temperature,
            num_chains=NUM_AIS_CHAINS,
            base=base,
            box=box,
            say=say,
            on_step=on_step,
        )
        log_z = found.combined
        metrics |= {
            "likelihood/log_z": log_z,
            "likelihood/log_z_se": found.combined_se,
            "likelihood/log_z_forward": found.forward,
            "likelihood/log_z_forward_se": found.forward_se,
            "likelihood/log_z_reverse": found.reverse,
            "likelihood/log_z_reverse_se": found.reverse_se,
            "likelihood/forward_ess": found.forward_ess,
            "likelihood/reverse_ess": found.reverse_ess,
        }
        if found.forward_ess < 0.05 or found.reverse_ess < 0.05:
            notes.append(
                f"effective share of the chains is {found.forward_ess:.3f} forward and "
                f"{found.reverse_ess:.3f} reverse: the estimates are not to be trusted"
            )
        if not found.exact_start:
            notes.append("log_z_reverse is a bound only as far as the reverse chains had mixed")
    examples = {}
    for name, batch in (("train", train), ("test", test)):
        found = log_probs(export.energy, batch.x.to(device), log_z, temperature=temperature)
        mean = float(found.mean())
        metrics[f"likelihood/log_prob_{name}"] = mean
        metrics[f"likelihood/log_prob_{name}_se"] = float(found.std() / math.sqrt(len(found)))
        metrics[f"likelihood/bits_per_dim_{name}"] = bits_per_dim(mean, export.spec)
        examples[f"log_prob_{name}"] = found.tolist()
    if export.spec.kind == "image" and not (export.config.get("data") or {}).get("dequantize"):
        notes.append("bits_per_dim: the data have no data.dequantize, so not to be compared")
    return Found(metrics, notes, examples)


def _ood(export: Export, seed: int, device: torch.device, say: Say, on_step: OnStep) -> Found:
    train, test = _load(export, "train", NUM_TRAIN).x, _load(export, "test", NUM_TEST).x
    generator = _generator(seed, torch.device("cpu"), "ood")
    others = {
        "noise": export.spec.noise(len(test), generator, std=export.start_std),
        "shuffled": _shuffled(test, export.spec.kind, generator),
    }
    if not export.spec.discrete:
        order = torch.randperm(len(test), generator=generator)
        others["interpolated"] = 0.5 * (test + test[order])
    say(f"scores against {', '.join(others)}")
    moved = {name: x.to(device) for name, x in others.items()}
    metrics = ood_report(
        export.energy, test.to(device), moved, x_reference=train.to(device), on_step=on_step
    )
    finite = {f"ood/{name}": value for name, value in metrics.items() if math.isfinite(value)}
    notes = [
        "shuffled: every coordinate drawn from another event, so only its marginals are right",
        "AUROC above 1/2: foreign events score higher than held-out ones",
        "threshold: calibrated on half of the held-out events to keep 95% of them; kept: its share "
        "of the other half; detected: foreign events above it; low and high: 95% intervals",
    ]
    return Found(finite, notes)


def _shuffled(x: Tensor, kind: EventKind, generator: torch.Generator) -> Tensor:
    """Each site, with all its one-hot classes, from another event: the product of the marginals."""
    flat = x.flatten(1, -2) if kind == "categorical" else x.flatten(1).unsqueeze(-1)
    order = torch.rand(flat.shape[:2], generator=generator).argsort(0)
    return flat.gather(0, order.unsqueeze(-1).expand_as(flat)).reshape(x.shape)


def _robustness(
    export: Export, seed: int, device: torch.device, say: Say, on_step: OnStep
) -> Found:
    test = _load(export, "test", NUM_TEST)
    if test.label is None:
        raise ValueError("the model's data has no labels; robustness is that of a classifier")
    image = export.spec.kind == "image"
    x, label = test.x.to(device), test.label.to(device)
    metrics: dict[str, float] = {}
    say("attacks of rising radius")
    total = 1 + sum(map(len, EPSILONS.values()))
    for norm, radii in EPSILONS.items():
        for radius in (0.0, *radii) if norm == "linf" else radii:
            on_step(len(metrics), total)
            accuracy = robust_accuracy(
                export.energy,
                x,
                label,
                epsilon=2 * radius if image else radius,
                norm=norm,  # type: ignore[arg-type]
                generator=_generator(seed, device, "robustness", norm, f"{radius:g}"),
                clamp=(-1.0, 1.0) if image else None,
            )
            name = "accuracy" if radius == 0 else f"{norm}_{radius:.4g}"
            metrics[f"robustness/{name}"] = accuracy
    unit = "of pixels in [0, 1]" if image else "in data units"
    return Found(metrics, [f"radii are {unit}; each accuracy is an upper bound of the true one"])


def _fidelity(export: Export, seed: int, device: torch.device, say: Say, on_step: OnStep) -> Found:
    train, test = _load(export, "train", NUM_TRAIN), _load(export, "test", NUM_TEST)
    say("training the feature classifier")
    fidelity = Fidelity.fit(
        train, test, export.spec, seed, num_reference=NUM_DRAWN, on_step=on_step
    )
    metrics = {f"fidelity/{name}": value for name, value in fidelity.reference().items()}
    metrics["fidelity/accuracy"] = fidelity.accuracy
    num = fidelity.num
    steps = usual_steps(export)
    say(f"drawing {num} samples from noise, {steps} steps")
    label = None
    if is_conditional(export):
        label = torch.arange(num) % trait(export.energy, "num_labels")
    drawn, _ = draw_samples(
        export,
        num,
        steps,
        label=label,
        seed=seed,
        device=device,
        on_step=lambda done, _: on_step(done, num * steps),
    )
    # As in a run: unclamped chains leave the data's range by their noise.
    drawn = drawn.clamp(-1.0, 1.0)
    metrics |= {f"fidelity/{name}": v for name, v in fidelity.measure(drawn, label).items()}
    notes = [
        f"distance: {num} chains from noise after {steps} steps, and every reference of as "
        "many images; features of a small classifier trained on the same data, so compare with "
        "these references only"
    ]
    stored = export.chains()
    if stored is not None and len(stored) >= num:
        metrics["fidelity/distance_of_chains"] = fidelity.distance(stored[:num].clamp(-1.0, 1.0))
    elif stored is not None:
        notes.append(f"distance_of_chains: left out, the export holds {len(stored)} chains alone")
    return Found(metrics, notes, neighbours=fidelity.neighbours(drawn))


def _persists(export: Export) -> bool:
    """Whether the run's chains persisted from update to update."""
    try:
        return float(export.config["recipe"]["buffer"]["reinit_prob"]) < SHORT_RUN_REINIT
    except (KeyError, TypeError, ValueError):
        return False


def _landscape(export: Export, seed: int, device: torch.device, say: Say, on_step: OnStep) -> Found:
    batch = _load(export, "train", NUM_TEST)
    data, energy, energy_of_data = batch.x.to(device), export.energy, None
    short = export.sampler.num_steps
    generator = _generator(seed, torch.device("cpu"), "landscape")
    start = export.spec.noise(NUM_AUDITED, generator, std=export.start_std)
    stored, label = export.stored(), None
    if stored is not None:
        # The run's own chains, since training uses them.
        chosen = torch.randperm(len(stored.x), generator=generator)[:NUM_AUDITED]
        start = stored.x[chosen]
        label = stored.context.get("label")
        if label is None and is_conditional(export):
            raise UserError("--suite landscape: the chains of this export lost their labels")
        if label is not None:
            label = label[chosen]
            energy = bind(export.energy, label=label.to(device))
    elif is_conditional(export):
        label = torch.arange(NUM_AUDITED) % trait(export.energy, "num_labels")
        energy = bind(export.energy, label=label.to(device))
    if energy is not export.energy:
        if batch.label is None:
            raise UserError("--suite landscape: the chains have labels, the data have none")
        with torch.no_grad():
            energy_of_data = bind(export.energy, label=batch.label.to(device))(data)
    say(f"{len(start)} chains, {AUDIT_FACTOR * short} steps each")
    audit = long_run_audit(
        energy,
        export.kernel(),
        start.to(device),
        data,
        short_steps=short,
        num_steps=AUDIT_FACTOR * short,
        generator=_generator(seed, device, "landscape", "chains"),
        persistent=stored is not None and _persists(export),
        energy_of_data=energy_of_data,
        chunk=100,
        on_step=on_step,
    )
    metrics = {**audit.metrics(), "audit/energy_data": audit.energy_data}
    if not export.spec.discrete:
        say("energy barriers between these chains")
        metrics |= connectivity(
            export.energy,
            start.to(device),
            label,
            temperature=temperature_of(export),
            box=law.box(export.kernel()),
            on_step=on_step,
        )
    healthy = (
        "no alarm: no chain diverged, none found energies below the data's far from them, few lie "
        "far above the data's, and long and short chains agree"
    )
    notes = [audit.alarm or healthy]
    if not export.spec.discrete:
        notes.append(
            "barrier: median height of the relaxed path between two chains (of one class) above "
            f"its ends, in units of T; connected: share of paths up to {CONNECTED:g} T, which a "
            "chain climbs about once in 150 attempts; low and high: its 95% interval"
        )
    return Found({k: v for k, v in metrics.items() if math.isfinite(v)}, notes)
