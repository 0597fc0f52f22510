"""Reads the tensors of a foreign checkpoint without running its code, and writes its export."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ebm_dist.core.errors import UserError
from ebm_dist.core.types import EventSpec
from ebm_dist.energies import NetworkEnergy
from ebm_dist.energies.networks.network import NetworkSection
from ebm_dist.export.front_matter import front_matter
from ebm_dist.export.model_card import lineage, temperature_source
from ebm_dist.export.reader import StoredChains
from ebm_dist.export.writer import write_export
from ebm_dist.files.safe_open import open_to_read, sha256
from ebm_dist.samplers import KernelSection

MAX_BYTES = 4 * 2**30
"""Of a checkpoint, unpacked: JEM's has 270 MB, of which the replay buffer is half."""


def read(file: Path) -> Mapping[str, Any]:
    """The content of `file`, as torch.save wrote it.

    Raises:
        UserError: it holds anything other than tensors and plain values by name.
    """
    with open_to_read(file, follow=True) as opened:
        size = file.stat().st_size
        if zipfile.is_zipfile(opened):  # a small archive can unpack to any size
            size = max(size, sum(part.file_size for part in zipfile.ZipFile(opened).infolist()))
        if size > MAX_BYTES:
            raise UserError(
                f"{file}: {size} bytes, more than the {MAX_BYTES >> 20} MiB of any that is known"
            )
        opened.seek(0)
        try:
            content = torch.load(opened, map_location="cpu", weights_only=True)
        except Exception as error:  # of the unpickler, of zip files or of storages
            raise UserError(
                f"{file}: not a checkpoint of tensors alone, and nothing else is read "
                f"({type(error).__name__})"
            ) from None
    if not isinstance(content, Mapping):
        raise UserError(f"{file}: holds a {type(content).__name__}, expected tensors by name")
    return content


def weights_in(file: Path, content: Mapping[str, Any], *places: str) -> Mapping[str, Tensor]:
    """The tensors by name under the first of `places` that `content` has, or `content` itself."""
    state = next((content[place] for place in places if place in content), content)
    if not isinstance(state, Mapping) or not all(isinstance(t, Tensor) for t in state.values()):
        raise UserError(f"{file}: expected tensors by name, in {' or '.join(places)} or bare")
    return state


def write_imported(
    file: Path,
    out_dir: str | Path,
    *,
    name: str,
    network: str,
    section: NetworkSection,
    weights: Mapping[str, Tensor],
    sampler: KernelSection,
    data: Mapping[str, Any],
    card: str,
    chains: StoredChains | None = None,
) -> Path:
    """Write the export of `section` with `weights`, which have the names of our modules.

    Args:
        name: of the program, as the command has it.
        network: what the program's network is called, for errors.
        card: the text below the front matter.

    Raises:
        UserError: the weights are not those of the section's network, or not finite.
    """
    energy = section.build()
    assert isinstance(energy, NetworkEnergy)
    wanted = {key: tuple(tensor.shape) for key, tensor in energy.state_dict().items()}
    for key in sorted(wanted.keys() | weights.keys()):
        came = tuple(weights[key].shape) if key in weights else None
        if came != wanted.get(key):
            raise UserError(
                f"{file}: {key} has shape {came}, {network} has {wanted.get(key)}; this is no "
                f"network of the program {name}"
            )
    if not all(bool(tensor.isfinite().all()) for tensor in weights.values()):
        raise UserError(f"{file}: a weight is not finite")
    energy.load_state_dict({key: tensor.float() for key, tensor in weights.items()})
    about = {
        "plugins": [],
        "temperature": sampler.law_temperature,
        "temperature_source": temperature_source(sampler.model_dump(mode="json")),
        "data": dict(data),
        "lineage": lineage(
            "", {"run": name, "imported_from": file.name, "sha256": sha256(file, follow=True)}
        ),
    }
    parts = {"energy": section, "sampler": sampler}
    plain = {key: part.model_dump(mode="json") for key, part in parts.items()}
    head = front_matter(name, {**plain, **about, "event": {"kind": "image"}}, {})
    return write_export(
        out_dir,
        energy=energy.eval(),
        section=section,
        spec=EventSpec(section.shape, "image", energy.num_labels),
        sampler=sampler,
        chains=chains,
        about=about,
        card=head + card,
    )
