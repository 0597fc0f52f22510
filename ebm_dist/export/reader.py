"""Reads an export: weights without pickle, and the config of their energy.

It needs torch, safetensors and this package's energies and samplers, but no Ray, DeepSpeed or W&B.
A damaged or hostile export, or one of another version, is refused in one line.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ebm_dist import energies, samplers
from ebm_dist._version import __version__
from ebm_dist.core.errors import UserError
from ebm_dist.core.plugins import import_plugins, plugin_hint, require_named
from ebm_dist.core.types import MAX_EVENT_NUMBERS, EventKind, EventSpec
from ebm_dist.energies import EnergySection
from ebm_dist.energies.context import CONTEXT
from ebm_dist.energies.limits import limited
from ebm_dist.export.layout import CHAINS, CONFIG, MAX_CONFIG_BYTES, WEIGHTS
from ebm_dist.export.pretrained import list_pretrained, named
from ebm_dist.files.safe_open import sha256
from ebm_dist.files.tensor_file import tensors_or_refuse
from ebm_dist.samplers import Kernel, KernelSection

FORMAT = "ebm_dist"
FORMAT_VERSION = 1
MAX_DEPTH = 32
MAX_SECTIONS = 1000


@dataclass(frozen=True, slots=True)
class Export:
    """A checked export."""

    path: Path
    energy: nn.Module
    """In eval mode on the CPU, float32, its parameters without gradients."""
    spec: EventSpec
    sampler: KernelSection
    """The sampler of the run, at the temperature of the model."""
    start_std: float
    """Standard deviation of the initial noise of chains over real events."""
    config: dict[str, Any]
    """The content of config.json."""
    plugins: tuple[str, ...] = ()
    """The user's modules whose code may run."""

    def kernel(self) -> Kernel[Any]:
        """The run's sampler; raises UserError if its module is not in `plugins`."""
        self.require_named("sampler")
        return self.sampler.build()

    def require_named(self, key: str) -> None:
        """Raise UserError if a section of config.json needs a module that is not in `plugins`."""
        require_named(self.config.get(key), self.plugins, f"{self.path / CONFIG}: {key}")

    def chains(self) -> Tensor | None:
        """The run's last chains (N, *event); None if the export has none."""
        stored = self.stored()
        return None if stored is None else stored.x

    def stored(self) -> StoredChains | None:
        """The run's last chains, with their contexts; None if the export has none."""
        return read_chains(self.path, self.spec)


def load_energy(
    path: str | Path,
    *,
    plugins: Sequence[str] = (),
    energy: nn.Module | Callable[..., Any] | None = None,
) -> nn.Module:
    """The exported energy at `path`: (B, *event) -> (B,), eval mode, CPU, float32.

    Args:
        path: an export directory, a file in it, a run directory with `export/` inside, the name of
            a model that comes with the package (`ebm-dist pretrained list`), or an address of the
            Hugging Face Hub, `hf://USER/NAME[@REVISION]`, which is downloaded.
        plugins: modules to import first, because they define the exported network or a section. No
            other module of a user is imported.
        energy: for a network that no module defines: a network like it, or a function that makes
            one. It is copied, and the copy gets the exported weights.

    Raises:
        UserError: `path` is not an export, or of another format version, or truncated; its weights
            do not fit its config; or it needs a module that is not in `plugins`.
    """
    return open_export(path, plugins=plugins, energy=energy).energy


def open_export(
    path: str | Path,
    *,
    plugins: Sequence[str] = (),
    energy: nn.Module | Callable[..., Any] | None = None,
) -> Export:
    """Read and check the export at `path`; arguments and errors as in `load_energy`."""
    plugins = (plugins,) if isinstance(plugins, str) else tuple(plugins)
    if plugins:
        import_plugins(plugins)
    path = find_export(path)
    config = _read_config(path / CONFIG)
    spec = read_spec(config, path / CONFIG)
    if energy is None:
        section = _section(config, "energy", energies.FAMILY, path / CONFIG)
        require_named(config["energy"], plugins, f"{path / CONFIG}: energy")
    else:
        section = energies.given(energy)
    sampler = _section(config, "sampler", samplers.FAMILY, path / CONFIG)
    assert isinstance(section, EnergySection)
    assert isinstance(sampler, KernelSection)
    start_std = config.get("start_std", 1.0)
    if not isinstance(start_std, int | float) or not 0 < start_std < 1e30:
        raise UserError(
            f"{path / CONFIG}: start_std: expected a positive number, got {start_std!r:.80}"
        )
    module = _read_energy(path / WEIGHTS, section, config)
    shape = getattr(module, "event_shape", None)
    if shape is not None and tuple(shape) != spec.shape:
        raise UserError(
            f"{path / CONFIG}: the energy takes events of shape {tuple(shape)}, event.shape is "
            f"{spec.shape}; the file was edited or mixed up: export the run again"
        )
    return Export(path, module, spec, sampler, float(start_std), config, plugins)


@dataclass(frozen=True, slots=True)
class StoredChains:
    """The last chains of the run of an export."""

    x: Tensor  # (N, *event) float32
    context: dict[str, Tensor]  # (N, ...) each, by `CONTEXT`, the contexts that an energy takes


def read_chains(directory: Path, spec: EventSpec) -> StoredChains | None:
    """The last chains of the run in the export at `directory`; None if it has none."""
    path = directory / CHAINS
    if not path.is_file():
        return None
    tensors = tensors_or_refuse(path)
    x = tensors.get("x")
    if x is None or x.dtype != torch.float32 or tuple(x.shape[1:]) != spec.shape:
        raise UserError(f"{path}: expected float32 chains x of shape (N, *{spec.shape})")
    if len(x) == 0 or not torch.isfinite(x).all():
        raise UserError(f"{path}: holds no finite chains; draw with --start noise")
    context = {name: tensors[name] for name in CONTEXT if name in tensors}
    for name, value in context.items():
        dtype = torch.float32 if name == "condition" else torch.int64
        if value.dtype != dtype or value.shape[:1] != x.shape[:1]:
            raise UserError(f"{path}: expected one {name} of {dtype} for each of {len(x)} chains")
        if name == "condition":
            shape = spec.condition_shape or spec.shape  # of noisy pairs: that of the data
            if tuple(value.shape[1:]) != shape or not value.isfinite().all():
                raise UserError(f"{path}: expected finite conditions of shape (N, *{shape})")
            continue
        size = spec.num_classes if name == "label" else None
        if value.ndim != 1 or value.min() < 0 or (size is not None and value.max() >= size):
            known = "" if size is None else f" below {size}"
            raise UserError(f"{path}: expected a {name} of 0 or more{known} for each chain")
    return StoredChains(x, context)


def find_export(path: str | Path) -> Path:
    """The export directory of `path`; raises UserError, which says what `path` is, if none."""
    path = named(path)
    if not path.exists():
        raise UserError(
            f"{path}: no such file or directory; expected an export of `ebm-dist export`, an "
            f"address hf://USER/NAME, or a pretrained model: {', '.join(list_pretrained())}"
        )
    if path.is_file():
        if path.name not in (WEIGHTS, CONFIG):
            raise UserError(
                f"{path}: expected an export directory with {CONFIG} and {WEIGHTS}; only these "
                "are read, never a pickle"
            )
        path = path.parent
    if (path / CONFIG).is_file():
        return path
    if (path / "export" / CONFIG).is_file():
        return path / "export"
    if (path / "config.yaml").is_file() or (path / "manifest.json").is_file():
        raise UserError(
            f"{path}: is a run directory, not an export; make one with "
            f"`ebm-dist export {path} OUT_DIR`"
        )
    hides = ", and hides the pretrained model: rename it" if str(path) in list_pretrained() else ""
    raise UserError(
        f"{path}: not an export, it has no {CONFIG}{hides}; make one with `ebm-dist export`"
    )


def _read_config(path: Path) -> dict[str, Any]:
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise UserError(f"{path}: larger than {MAX_CONFIG_BYTES >> 20} MiB, so not of an export")
    try:
        config = json.loads(path.read_bytes().decode())
    except (ValueError, RecursionError):
        raise UserError(
            f"{path}: not valid JSON, cut short or damaged; copy the export again"
        ) from None
    _refuse_nesting(config, path)
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise UserError(f"{path}: format is not {FORMAT!r}: this file is of something else")
    version = config.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path}: format_version is {version!r:.80}, and ebm_dist {__version__} reads "
            f"{FORMAT_VERSION}; load it with {_writer(config) or 'the release that wrote it'}, or "
            "export the run again with this one"
        )
    return config


def _writer(config: Mapping[str, Any]) -> str | None:
    """The release that wrote an export, as `ebm_dist VERSION`; None if it does not say so."""
    try:
        release = config["lineage"]["packages"]["ebm_dist"]
    except (KeyError, TypeError):
        return None
    plain = isinstance(release, str) and re.fullmatch(r"[\w.+-]{1,40}", release, re.ASCII)
    return f"ebm_dist {release}" if plain else None


def read_spec(config: Mapping[str, Any], path: Path) -> EventSpec:
    """The events of `config["event"]`; raises UserError, which names `path`, if it is invalid."""
    event = config.get("event")
    if not isinstance(event, dict):
        raise UserError(f"{path}: event: expected shape, kind and num_classes, got {event!r:.80}")
    kind, classes = event.get("kind"), event.get("num_classes")
    kinds, shape = get_args(EventKind), _shape(event.get("shape"), "shape", path)
    if kind not in kinds:
        raise UserError(f"{path}: event.kind: expected one of {', '.join(kinds)}, got {kind!r:.80}")
    if classes is not None and not _is_size(classes):
        raise UserError(f"{path}: event.num_classes: expected a count or null, got {classes!r:.80}")
    given = event.get("condition_shape")
    given = None if given is None else _shape(given, "condition_shape", path)
    return EventSpec(shape, cast(EventKind, kind), classes, given)


def _shape(value: Any, key: str, path: Path) -> tuple[int, ...]:
    if (
        not isinstance(value, list)
        or not value
        or not all(_is_size(size) for size in value)
        or math.prod(value) > MAX_EVENT_NUMBERS
    ):
        raise UserError(
            f"{path}: event.{key}: expected positive sizes of at most {MAX_EVENT_NUMBERS} numbers "
            f"in all, got {value!r:.80}"
        )
    return tuple(value)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31


def _section(config: dict[str, Any], key: str, family: Any, path: Path) -> Any:
    params = config.get(key)
    if not isinstance(params, dict) or not isinstance(params.get("name"), str):
        raise UserError(f"{path}: {key}: expected a section with a name")
    try:
        return family.section(**params)
    except (TypeError, ValueError, OverflowError) as error:
        unknown = params["name"] not in family.members
        hint = plugin_hint(config.get("plugins")) if unknown else ""
        if not hint and (writer := _writer(config)) not in (None, f"ebm_dist {__version__}"):
            hint = f" (this is ebm_dist {__version__}; {writer} wrote the export, and can load it)"
        raise UserError(f"{path}: {' '.join(str(error).split())}{hint}") from None


def _refuse_nesting(config: Any, path: Path) -> None:
    """Limit depth and number of sections, since their checks are recursive and take time."""
    level, num_sections = [config], 0
    for _ in range(MAX_DEPTH):
        level = [
            item
            for value in level
            for item in (value.values() if isinstance(value, dict) else value)
            if isinstance(item, dict | list)
        ]
        num_sections += sum(isinstance(value, dict) for value in level)
        if not level:
            return
        if num_sections > MAX_SECTIONS:
            raise UserError(f"{path}: more than {MAX_SECTIONS} sections, so not of an export")
    raise UserError(f"{path}: deeper than {MAX_DEPTH} sections, so not of an export")


def read_weights(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json, and the checked weights by name, of the export at `path`. Builds no energy.

    Raises:
        UserError: as `load_energy`.
    """
    path = find_export(path)
    config = _read_config(path / CONFIG)
    _check_whole(path / WEIGHTS, config)
    return config, _read_finite(path / WEIGHTS)


def _read_energy(path: Path, section: EnergySection, config: dict[str, Any]) -> nn.Module:
    _check_whole(path, config)
    shapes = _read_shapes(path)
    numbers = sum(math.prod(shape) for shape in shapes.values())
    _refuse_giants(section.model_dump(), limit=max(2**16, numbers), path=path.parent / CONFIG)
    try:
        # The config may name any size, so the weights on disk limit it. The margin is for constants
        # that energies compute, of which a Hopfield network's matrix is the largest.
        with limited(max_parts=2**12 + 32 * len(shapes), max_numbers=2**27 + 4 * numbers):
            energy = section.build()
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{path.parent / CONFIG}: {' '.join(str(error).split())}") from None
    wanted = {name: tuple(tensor.shape) for name, tensor in energy.state_dict().items()}
    _compare(shapes, wanted, path)
    energy.load_state_dict(_read_finite(path))
    return energy.eval().requires_grad_(False)


def _check_whole(path: Path, config: dict[str, Any]) -> None:
    if not path.is_file():
        raise UserError(f"{path}: missing; copy the whole export")
    recorded = config.get("weights")
    recorded = recorded if isinstance(recorded, dict) else {}
    size = path.stat().st_size
    if size != recorded.get("bytes"):
        raise UserError(
            f"{path}: has {size} bytes, {CONFIG} recorded {recorded.get('bytes')!r:.40}; cut short "
            "or mixed up: copy the export again"
        )
    if sha256(path, follow=True) != recorded.get("sha256"):
        raise UserError(
            f"{path}: its checksum is not the one in {CONFIG}; damaged or mixed up: copy the "
            "export again"
        )


def _read_finite(path: Path) -> dict[str, Tensor]:
    tensors = tensors_or_refuse(path)
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise UserError(f"{path}: {name} is {tensor.dtype}, an export holds float32")
        if not torch.isfinite(tensor).all():
            raise UserError(f"{path}: {name} is not finite; the run had diverged, export another")
    return tensors


def _read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: not valid safetensors ({error}); copy it again") from None


def _refuse_giants(value: Any, *, limit: int, path: Path) -> None:
    if isinstance(value, Mapping):
        for item in value.values():
            _refuse_giants(item, limit=limit, path=path)
    elif isinstance(value, list | tuple):
        for item in value:
            _refuse_giants(item, limit=limit, path=path)
    elif isinstance(value, int) and abs(value) > limit:
        raise UserError(f"{path}: energy: the size {value} is beyond what its weights can hold")


def _compare(
    came: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]], path: Path
) -> None:
    fault = ""
    if missing := sorted(wanted.keys() - came.keys()):
        fault = f"weight {missing[0]!r} is missing"
    elif extra := sorted(came.keys() - wanted.keys()):
        fault = f"weight {extra[0]!r} is unknown to the energy"
    else:
        for name, shape in wanted.items():
            if came[name] != shape:
                fault = f"weight {name!r} has shape {came[name]}, the energy has {shape}"
                break
    if fault:
        raise UserError(f"{path}: {fault}; {CONFIG} and the weights are not of one export")
