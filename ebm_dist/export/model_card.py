"""Writes the model card of an export: data, recipe, temperature, measured quality, lineage."""

from __future__ import annotations

import math
import subprocess
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import nn

import ebm_dist
from ebm_dist._version import __version__
from ebm_dist.core.plugins import IN_SESSION, modules_of
from ebm_dist.energies.context import trait
from ebm_dist.export.front_matter import front_matter
from ebm_dist.metrics.jsonl import read_rows
from ebm_dist.metrics.names import describe, family
from ebm_dist.samplers import KernelSection
from ebm_dist.samplers.law import effective_temperature, unadjusted
from ebm_dist.samplers.module import OwnKernel

QUALITY = ("likelihood/", "fidelity/", "ood/", "robustness/", "audit/", "classifier/")
"""Prefixes of metrics that measure the model; the others measure the run."""
REFERENCES = frozenset(
    f"fidelity/{name}" for name in ("accuracy", "confident_real", "gaussian", "noise", "train")
)
"""Those that are no results of the model: what its figures are compared with, and the accuracy of
the classifier that judges its samples."""
CHAIN_HEALTH = (
    "energy/positive",
    "energy/negative",
    "energy/gap",
    "sampler/acceptance",
    "sampler/curvature",
    "sampler/effective_temperature",
    "chain/autocorrelation",
    "chain/ess",
    "chain/rhat",
    "chain/self_transition",
)
PACKAGES = ("torch", "ray", "deepspeed", "numpy", "safetensors")


def temperature_source(sampler: Mapping[str, Any]) -> str:
    """The origin of a sampler's temperature T, in words.

    Langevin with `noise_std` sigma has T = sigma^2 / (2 step_size). In practice the two are chosen
    independently, and the model is exp(-E/T) at this implied T.
    """
    std, step = sampler.get("noise_std"), sampler.get("step_size")
    if std is not None and step is not None:
        return f"implied: noise_std² / (2 step_size) = {std:g}² / (2 · {step:g})"
    if sampler.get("temperature") is not None:
        return "stated: sampler.temperature"
    if sampler.get("temperatures"):
        return "the coldest of sampler.temperatures"
    return "the sampler's own"


def sampler_law(sampler: KernelSection, curvature: float | None) -> list[str]:
    """A sentence for each difference between the law of the sampler's chains and exp(-E/T).

    Args:
        curvature: mean curvature of E along the chains (`samplers.law.curvature`); None if it was
            not measured.
    """
    kernel, found = sampler.build(), []
    if isinstance(kernel, OwnKernel):
        found.append(
            f"Moves by `{kernel.target}`, code of the user: how close its law is to exp(-E/T) is "
            "not known here."
        )
    moves = unadjusted(kernel)
    if moves is not None:
        step = (
            f"Step size h = {moves.step_size:g} without an accept step: where E has curvature a, "
            f"the temperature of the chains is T_eff = T / ({moves.temperature_ratio_formula})."
        )
        if curvature is not None:
            hot = effective_temperature(moves, curvature)
            step += f" The mean curvature along the chains is {curvature:.4g}: " + (
                f"T_eff = {hot:.6g}; stiffer directions are hotter, softer ones colder."
                if math.isfinite(hot)
                else "h is too long for it, and only clipping and clamping hold the chains."
            )
        found.append(step)
        for key in ("grad_clip", "grad_norm_clip"):
            if (limit := getattr(moves, key, None)) is not None:
                found.append(
                    f"{key} = {limit:g}: steeper slopes of E are followed as if they were no "
                    "steeper, so the chains spread further there; T_eff does not count that."
                )
        if (clamp := getattr(moves, "clamp", None)) is not None:
            found.append(
                f"clamp = [{clamp[0]:g}, {clamp[1]:g}]: each move ends in this range, and what "
                "would leave it piles up on its border."
            )
        cooling = ("start_temperature", "num_annealing_steps")
        start, length = (getattr(moves, key, None) for key in cooling)
        if start is not None:
            found.append(
                f"Cooling: each round of {sampler.num_steps} steps begins at T = {start:g} and "
                f"reaches T after {length}."
            )
    if sampler.precision == "bf16":
        found.append("precision = bf16: gradients are rounded, by about 1%.")
    return found


def context_options(energy: nn.Module, *, labelled: bool) -> dict[str, str]:
    """Options of `sample` that say what `energy` is conditioned on, each with its meaning.

    Args:
        labelled: whether each class is drawn equally often when no label is given.
    """
    found, takes = {}, trait(energy, "context")
    if "label" in takes and (num := trait(energy, "num_labels")):
        without = "each class is drawn equally often" if labelled else "the law is that of E(x)"
        found[f"--label {min(3, num - 1)}"] = (
            f"draws one class alone, of the classes 0 to {num - 1}; without it {without}."
        )
    if "level" in takes and (stds := trait(energy, "noise_stds")):
        last = len(stds) - 1
        found[f"--level {min(5, last)}"] = (
            f"draws samples with the noise of that level. Levels are 0 (standard deviation "
            f"{stds[0]:g}) to {last} ({stds[-1]:g}); without it the level is 0."
        )
    return found


def last_metrics(path: Path) -> dict[str, tuple[float, int]]:
    """The last value and its step of each metric in a metrics.jsonl. Skips truncated lines."""
    last: dict[str, tuple[float, int]] = {}
    for row in read_rows(path):
        if not isinstance(row.get("step"), int):
            continue
        for name, value in row.items():
            if "/" in name and isinstance(value, int | float):
                last[name] = (float(value), row["step"])
    return last


def lineage(config_hash: str, meta: Mapping[str, Any]) -> dict[str, Any]:
    """The lineage of an export: hash of the config, versions of code and packages, and `meta`."""
    packages = {"ebm_dist": __version__}
    for name in PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        **meta,
        "config_sha256": config_hash,
        "git_commit": git_commit(Path(ebm_dist.__file__).parent),
        "packages": packages,
        "exported_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def git_commit(directory: Path) -> str | None:
    """The commit of the checkout at `directory`, with `+dirty` if it was edited; None if none."""

    def git(*args: str) -> str:
        command = ["git", "-C", str(directory), *args]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        return commit + ("+dirty" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def render(
    *,
    name: str,
    about: Mapping[str, Any],
    energy: Mapping[str, Any],
    sampler: Mapping[str, Any],
    event: Mapping[str, Any],
    num_parameters: int,
    metrics: Mapping[str, tuple[float, int]],
    grid: str | None,
    options: Mapping[str, str],
    law: list[str],
    far_modes: str,
) -> str:
    """README.md of an export.

    Args:
        about: the data, objective, temperature and lineage.
        grid: what the picture shows; None if there is none.
        options: the result of `context_options`.
        law: the result of `sampler_law`.
        far_modes: whether the loss depends on the weights of far modes, in words.
    """
    lines = about["lineage"]
    picture = [f"![{grid}](samples.png)", ""] if grid is not None else []
    load, command = _how_to_load(about.get("plugins", []), energy, options)
    quality = [key for key in metrics if key.startswith(QUALITY)]
    health = [key for key in CHAIN_HEALTH if key in metrics]
    head = front_matter(
        name,
        {"data": about["data"], "energy": energy, "event": event, "sampler": sampler},
        # Neither references nor each class by itself.
        {key: metrics[key][0] for key in quality if key not in REFERENCES and family(key) == key},
    )
    return head + "\n".join(
        [
            f"# {name}",
            "",
            f"An energy-based model, p(x) = exp(-E(x)/T)/Z, trained with ebm_dist "
            f"{lines['packages']['ebm_dist']}. E is a `{energy['name']}` of {num_parameters:,} "
            f"parameters over {event['kind']} events of shape {tuple(event['shape'])}; lower is "
            "likelier. The weights are the moving average (EMA) of training where one was kept.",
            "",
            *picture,
            "## Use",
            "",
            "```python",
            "import ebm_dist",
            "",
            f"energy = ebm_dist.load_energy({load})  # (B, *event) -> (B,), eval mode, no pickle",
            "```",
            "",
            *command,
            f"Events: {_events(event)}.",
            "",
            "## Temperature",
            "",
            f"T = {about['temperature']:.6g} ({about['temperature_source']}): the model is "
            "exp(-E/T)/Z at this T. "
            + (
                "The sampler below leaves that law as it is."
                if not law
                else "The sampler below has another law:"
            ),
            "",
            *(f"- {line}" for line in law),
            *([""] if law else []),
            "## Data",
            "",
            *_table(about["data"]),
            "",
            "## Recipe",
            "",
            *(
                f"- **{key}**: {_inline(section)}"
                for key, section in _recipe(about, energy, sampler)
            ),
            "",
            f"Weights of modes that are far apart: {far_modes}.",
            "",
            "## Measured quality",
            "",
            *(_metric_table(quality, metrics) or ["Nothing was measured during the run."]),
            "",
            "Energies and chains at the end of the run:",
            "",
            *(_metric_table(health, metrics) or ["Nothing was logged."]),
            "",
            "## Lineage",
            "",
            *_table({k: v for k, v in lines.items() if k not in ("packages", "init_from")}),
            *_rows({f"init_from.{k}": v for k, v in lines.get("init_from", {}).items()}),
            "",
            "Packages: " + ", ".join(f"{k} {v}" for k, v in lines["packages"].items()) + ".",
            "",
        ]
    )


def _how_to_load(
    plugins: list[str], energy: Mapping[str, Any], options: Mapping[str, str]
) -> tuple[str, list[str]]:
    """The arguments of `load_energy`, and the lines that show how to sample."""
    if IN_SESSION in modules_of(energy):
        name = str(energy["target"]).partition(":")[2]
        text = f"The network, `{name}`, was given from Python: give one like it, or what makes one."
        return '"PATH", energy=NETWORK', [text, ""]
    flags = "".join(f" --plugin {name}" for name in plugins)
    trusted = f", plugins={plugins!r}".replace("'", '"') if plugins else ""
    commands = [
        f"ebm-dist sample PATH --num 64{option} --out samples.png{flags}"
        for option in ("", *(f" {name}" for name in options))
    ]
    meanings = [f"`{name}` {meaning}" for name, meaning in options.items()]
    text = [*meanings, ""] if meanings else []
    return f'"PATH"{trusted}', ["```", *commands, "```", "", *text]


def _events(event: Mapping[str, Any]) -> str:
    return {
        "image": "images (C, H, W), float32 scaled to [-1, 1]",
        "real": "unbounded float32 vectors",
        "binary": "{0, 1} floats",
        "categorical": "one-hot float32 in the last axis",
    }[event["kind"]]


def _recipe(
    about: Mapping[str, Any], energy: Mapping[str, Any], sampler: Mapping[str, Any]
) -> Iterable[tuple[str, Mapping[str, Any]]]:
    yield "energy", energy
    yield "sampler", sampler
    yield from about.get("recipe", {}).items()


def _inline(section: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}: {_cell(value)}" for key, value in section.items())


def _table(rows: Mapping[str, Any]) -> list[str]:
    return ["| | |", "|---|---|", *_rows(rows)]


def _rows(rows: Mapping[str, Any]) -> list[str]:
    return [f"| {_cell(key)} | {_cell(value)} |" for key, value in rows.items()]


def _metric_table(names: list[str], metrics: Mapping[str, tuple[float, int]]) -> list[str]:
    if not names:
        return []
    rows = [
        f"| `{name}` | {metrics[name][0]:.6g} | {metrics[name][1]} | {_meaning(name)} |"
        for name in sorted(names)
    ]
    return ["| metric | last value | at update | says |", "|---|---|---|---|", *rows]


def _meaning(name: str) -> str:
    metric = describe(name)
    return "" if metric is None else metric.meaning


def _cell(value: Any) -> str:
    """`value` as text of a Markdown table: long text is shortened, and `|` is escaped."""
    text = "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    text = text.replace("|", "\\|").replace("\n", " ")
    return text if len(text) <= 120 else text[:117] + "..."
