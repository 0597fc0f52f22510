"""Writes an export, which holds what others need to use the model of a run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ebm_dist.buffer.chains import CONTEXT as OF
from ebm_dist.buffer.codec import as_float32
from ebm_dist.checkpoint import files as checkpoint
from ebm_dist.config.run_config import RunConfig, dump, load
from ebm_dist.core.errors import UserError
from ebm_dist.core.plugins import IN_SESSION, modules_of, require_named
from ebm_dist.core.types import EventSpec
from ebm_dist.core.weights import FlatLayout
from ebm_dist.data import describe
from ebm_dist.energies import EnergySection
from ebm_dist.energies.context import CONTEXT, bind, chain_unit, trait
from ebm_dist.export import model_card
from ebm_dist.export.front_matter import with_license
from ebm_dist.export.layout import CARD, CHAINS, CONFIG, GRID, WEIGHTS
from ebm_dist.export.reader import FORMAT, FORMAT_VERSION, StoredChains, read_spec
from ebm_dist.files.durable import new_directory
from ebm_dist.files.safe_open import read_bytes, sha256
from ebm_dist.files.tensor_file import save_tensors
from ebm_dist.samplers import KernelSection
from ebm_dist.samplers.law import curvature, unadjusted

MAX_CHAINS = 512
"""Most chains of an export: enough for a warm start, and small compared with the weights."""

NUM_SOME = 64
"""Number of these chains in the grid, and for the card's curvature of the energy."""


def export_run(
    run_dir: str | Path,
    out_dir: str | Path,
    *,
    license: str | None = None,
    plugins: Sequence[str] | None = (),
    energy: EnergySection | None = None,
    found: checkpoint.CheckpointDir | None = None,
) -> Path:
    """Export a checkpoint of the run at `run_dir` to `out_dir`.

    The export has the averaged (EMA) weights, the last chains of the run, the recipe, the last
    measurements of metrics.jsonl, and the lineage. A run without chains gives the picture of its
    last evaluation.

    Args:
        license: identifier of the model's licence, such as apache-2.0, written into the card.
        plugins: the user's modules whose code may run; None for all, as in a training.
        energy: the run's energy, if it was given from Python.
        found: the checkpoint; the newest valid one when left out.

    Raises:
        UserError: `run_dir` is not a run or has no valid checkpoint, or `out_dir` cannot be
            written.
    """
    run_dir = Path(run_dir)
    if not (run_dir / "config.yaml").is_file():
        raise UserError(f"{run_dir}: not a run directory, it has no config.yaml")
    # Uses the config of the checkpoint, since config.yaml may have changed after it.
    found = found or checkpoint.latest(run_dir)
    if found is None:
        raise UserError(
            f"{run_dir}: has no checkpoint yet; the run writes one every checkpoint.every updates "
            "and when it ends or is stopped"
        )
    run = load(found.meta.get("config") or run_dir / "config.yaml")
    with found.of_a_run():
        spec, weights = _recorded_spec(found, run), found.tensors("ema")["flat"]
    energy_section = energy or run.energy
    sections = {key: getattr(run, key).model_dump(mode="json") for key in ("energy", "sampler")}
    if plugins is not None:
        for key, plain in sections.items():
            require_named(plain, plugins, f"{run_dir}: {key}")
    section = energy_section.bind(spec)
    module = section.build().eval()
    try:
        FlatLayout.of(module).load_(module, weights)
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"{found.path}: its averaged weights do not fit its config "
            f"({' '.join(str(error).split())}); the checkpoint mixes two runs"
        ) from None
    sampler = sections["sampler"]
    began = found.meta.get("init_from")
    # An objective without negatives has no chains, so these sections have no effect.
    moved = ("buffer", "workers", "flow") if run.objective.takes_negatives else ()
    about = {
        "plugins": plugins_of(run),
        "temperature": run.sampler.law_temperature,
        "temperature_source": model_card.temperature_source(sampler),
        "data": _set_keys(run.data.model_dump(mode="json")),
        "recipe": {
            key: getattr(run, key).model_dump(mode="json")
            for key in ("objective", *moved, "learner")
        },
        "lineage": model_card.lineage(
            hashlib.sha256(dump(run).encode()).hexdigest(),
            {
                "run": run.run.name,
                "seed": run.run.seed,
                "checkpoint": found.path.name,
                "updates": found.step,
                **({"init_from": began} if isinstance(began, dict) else {}),
            },
        ),
    }
    with found.of_a_run():
        stored = _last_chains(found, spec)
    metrics = model_card.last_metrics(run_dir / "metrics.jsonl")
    objective = run.objective.at_temperature(run.sampler.law_temperature)
    chain_energy = objective.chain_energy(module)
    measured = None if stored is None else _curvature(chain_energy, run.sampler, stored)
    if measured is None and "sampler/curvature" in metrics:
        measured = metrics["sampler/curvature"][0]
    picture, shows = None, "The run's last chains"
    if stored is None:
        picture, shows = _last_picture(run_dir, found.step)
    # As `sample` does where no label is given.
    needs_label = "label" in trait(module, "needs_context")
    labelled = run.buffer.context.label is not None if moved else needs_label
    card = model_card.render(
        name=run.run.name,
        about=about,
        energy=_set_keys(section.model_dump(mode="json")),
        sampler=_set_keys(sampler),
        event=asdict(spec),
        num_parameters=sum(p.numel() for p in module.parameters()),
        metrics=metrics,
        grid=shows,
        options=model_card.context_options(module, labelled=labelled),
        law=model_card.sampler_law(run.sampler, measured),
        far_modes=run.objective.far_modes,
    )
    if license is not None:
        card = with_license(card, license)
    return write_export(
        out_dir,
        energy=module,
        section=section,
        spec=spec,
        sampler=run.sampler,
        start_std=run.buffer.init_std,
        chains=stored,
        picture=picture,
        about=about,
        card=card,
    )


def plugins_of(run: RunConfig) -> list[str]:
    """The user's modules that define the energy, the sampler or the data of a run."""
    found = set(run.plugins)
    for section in (run.energy, run.sampler, run.data):
        found.update(modules_of(section.model_dump(mode="json")))
        found.add(type(section).__module__)
    return sorted(name for name in found if name.partition(".")[0] not in (IN_SESSION, "ebm_dist"))


def _recorded_spec(found: checkpoint.CheckpointDir, run: RunConfig) -> EventSpec:
    """The recorded events of the run, since its data may no longer be available."""
    event = found.meta.get("event")
    if event is not None:
        return read_spec(found.meta, found.path / "meta.json")
    return describe(run.data)


def _last_chains(found: checkpoint.CheckpointDir, spec: EventSpec) -> StoredChains | None:
    """Chains of the checkpoint that have moved, from all shards."""
    parts, contexts = [], []
    for name in found.names:
        if not name.startswith("shard"):
            continue
        shard = found.tensors(name)
        moved = shard["version"] >= 0 if "version" in shard else slice(None)
        part = torch.from_numpy(as_float32(shard["position"][moved].numpy(), spec))
        if part.shape[1:] != spec.shape:
            raise ValueError(f"{name} holds chains of shape {tuple(part.shape[1:])}")
        parts.append(part)
        contexts.append({key: shard[OF + key][moved] for key in CONTEXT if OF + key in shard})
    if not parts or not any(len(part) for part in parts):
        return None
    x = torch.cat(parts)
    context = {key: torch.cat([part[key] for part in contexts]) for key in contexts[0]}
    # Evenly spaced slots, since neighbouring slots may have been leased together.
    index = torch.linspace(0, len(x) - 1, min(len(x), MAX_CHAINS)).round().long()
    return StoredChains(x[index].contiguous(), {key: v[index] for key, v in context.items()})


def _last_picture(run_dir: Path, step: int) -> tuple[bytes | None, str | None]:
    """The samples of the last evaluation up to update `step`, as PNG, and what they are."""
    for path in sorted((run_dir / "samples").glob("step_*.png"), reverse=True):
        number = path.stem.removeprefix("step_")
        if number.isdecimal() and int(number) <= step:
            try:
                return read_bytes(path), f"Samples drawn at update {int(number)}"
            except OSError:  # a link, or unreadable: an export can do without its picture
                continue
    return None, None


def _curvature(energy: nn.Module, sampler: KernelSection, stored: StoredChains) -> float | None:
    """The curvature of the energy along the chains; None if the sampler's law does not depend on
    it."""
    kernel = unadjusted(sampler.build())
    if kernel is None:
        return None
    takes = trait(energy, "context")
    context = {key: value[:NUM_SOME] for key, value in stored.context.items() if key in takes}
    given, x = bind(energy, **context), stored.x[:NUM_SOME]
    unit = chain_unit(given, x)
    generator = torch.Generator().manual_seed(0)
    return curvature(kernel, given, x if unit is None else x / unit, generator)


def _set_keys(section: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in section.items() if value is not None}


def write_export(
    out_dir: str | Path,
    *,
    energy: nn.Module,
    section: EnergySection,
    spec: EventSpec,
    sampler: KernelSection,
    start_std: float = 1.0,
    chains: StoredChains | None = None,
    picture: bytes | None = None,
    about: Mapping[str, Any] | None = None,
    card: str = "",
) -> Path:
    """Write an export to `out_dir`; after a failure no files remain.

    Args:
        energy: the module whose state is exported, as float32.
        section: its config, bound to `spec`.
        chains: of the run, kept for a warm start; some of them are drawn in the grid.
        picture: the grid, as PNG, where there are no chains.
        about: further JSON entries of config.json (data, objective, temperature, lineage).
        card: text of README.md.

    Raises:
        UserError: `out_dir` holds something other than an export, or cannot be written.
    """
    from ebm_dist.report.grid import save_grid

    out_dir = Path(out_dir).absolute()
    if out_dir.exists() and not _replaceable(out_dir):
        raise UserError(
            f"{out_dir}: exists and is not an export; choose another directory, or empty this one"
        )
    tensors = {
        name: tensor.detach().to("cpu", torch.float32, copy=True)
        for name, tensor in energy.state_dict().items()
    }
    try:
        with new_directory(out_dir, replace=True) as part:
            save_tensors(tensors, part / WEIGHTS, metadata={"format": "pt"})
            config = {
                "format": FORMAT,
                "format_version": FORMAT_VERSION,
                "event": asdict(spec),
                "energy": section.model_dump(mode="json"),
                "sampler": sampler.model_dump(mode="json"),
                "start_std": start_std,
                "weights": {
                    "file": WEIGHTS,
                    "bytes": (part / WEIGHTS).stat().st_size,
                    "sha256": sha256(part / WEIGHTS),
                    "num_parameters": sum(p.numel() for p in energy.parameters()),
                },
                **(about or {}),
            }
            text = json.dumps(config, indent=2, allow_nan=False) + "\n"
            (part / CONFIG).write_text(text, encoding="utf-8")
            if chains is not None:
                save_tensors({"x": chains.x.float(), **chains.context}, part / CHAINS)
                shown = _shown(chains)
                given = chains.context.get("condition") if spec.condition_shape else None
                condition = None if given is None else given[shown]
                save_grid(chains.x[shown], part / GRID, spec, condition=condition)
            elif picture is not None:
                (part / GRID).write_bytes(picture)
            (part / CARD).write_text(card, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{out_dir}: cannot be written: {error.strerror or error}") from None
    return out_dir


def _shown(chains: StoredChains) -> Tensor:
    """Indices of the chains in the grid: the first ones, or as many of each label, in order."""
    num = min(len(chains.x), NUM_SOME)
    if "label" not in chains.context:
        return torch.arange(num)
    by_label = chains.context["label"].argsort(stable=True)
    return by_label[torch.linspace(0, len(by_label) - 1, num).round().long()]


def _replaceable(path: Path) -> bool:
    if not path.is_dir():
        return False
    names = {item.name for item in path.iterdir()}
    return not names or (CONFIG in names and names <= {WEIGHTS, CONFIG, CARD, GRID, CHAINS})
