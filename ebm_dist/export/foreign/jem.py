"""Imports a checkpoint of JEM, the joint energy-classifier, as an export."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ebm_dist.core.errors import UserError
from ebm_dist.energies.networks.wide_resnet import WideResNetSection
from ebm_dist.export.foreign.checkpoint import read, weights_in, write_imported
from ebm_dist.export.reader import StoredChains
from ebm_dist.export.writer import MAX_CHAINS
from ebm_dist.samplers.continuous.langevin import LangevinSection

_BLOCK = re.compile(r"f\.layer([123])\.(\d+)\.(conv1|conv2|shortcut\.0)\.(weight|bias)")
_PLACE = {"conv1": "residual.2", "conv2": "residual.5", "shortcut.0": "shortcut"}
_OUTER = {"f.conv1.": "body.stem.", "class_output.": "head."}
_UNUSED = ("f.linear.", "energy_output.")
"""Heads of the program's module that its class-conditional model does not call."""


def import_jem(file: str | Path, out_dir: str | Path) -> Path:
    """Write the checkpoint of a joint energy-classifier (JEM) as an export to `out_dir`.

    It is the program of Grathwohl et al. (2020), arXiv:1912.03263, without norms: a wide residual
    network of 32 x 32 images in [-1, 1], with E(x) = -logsumexp_y f_y(x) and E(x, y) = -f_y(x).

    Args:
        file: as torch.save wrote it, `model_state_dict` and, if there is one, `replay_buffer`. It
            is read without running code of it.

    Raises:
        UserError: it is something else, or `out_dir` cannot be written.
    """
    file = Path(file)
    content = read(file)
    section, weights = _translated(file, weights_in(file, content, "model_state_dict"))
    return write_imported(
        file,
        out_dir,
        name="jem",
        network=f"a WRN-{section.depth}-{section.widen}",
        section=section,
        weights=weights,
        sampler=LangevinSection(step_size=1.0, noise_std=0.01, num_steps=20),
        data={"source": "data/cifar10", "noise_std": 0.03},
        card=_CARD.format(file=file.name, depth=section.depth, widen=section.widen),
        chains=_chains(content.get("replay_buffer"), section.shape),
    )


_CARD = """# JEM

A joint energy-classifier, WRN-{depth}-{widen} without norms, imported by ebm_dist from `{file}`, a
checkpoint of the program of Grathwohl et al. (2020), arXiv:1912.03263. For images in [-1, 1],
E(x) = -logsumexp f(x) and E(x, y) = -f_y(x).

The sampler is that of the paper: x' = x - dE/dx + .01 noise, 20 steps from the replay buffer. So
T = 5e-05, and the chains do not follow exp(-E).
"""


def _translated(
    file: Path, state: Mapping[str, Tensor]
) -> tuple[WideResNetSection, dict[str, Tensor]]:
    """The section of the network, and its weights by our names."""
    groups: list[set[int]] = [set(), set(), set()]
    for name in state:
        if found := _BLOCK.fullmatch(name):
            groups[int(found[1]) - 1].add(int(found[2]))
    num = len(groups[0])
    try:
        stem, head = state["f.conv1.weight"], state["class_output.weight"]
        widen = state["f.layer1.0.conv1.weight"].shape[0] // 16
        section = WideResNetSection(
            event_shape=(stem.shape[1], 32, 32),
            depth=6 * num + 4,
            widen=widen,
            num_classes=head.shape[0],
        )
    except (KeyError, IndexError, ValueError) as error:
        what = " ".join(str(error).split())
        raise UserError(f"{file}: no network of JEM's program ({what})") from None
    if any(group != set(range(num)) for group in groups):
        raise UserError(f"{file}: its three groups have {[len(g) for g in groups]} blocks")
    ours = {}
    for name, tensor in state.items():
        outer = next((o for o in _OUTER if name.startswith(o)), None)
        if outer is not None:
            ours[_OUTER[outer] + name[len(outer) :]] = tensor
        elif found := _BLOCK.fullmatch(name):
            index = (int(found[1]) - 1) * num + int(found[2])
            ours[f"body.blocks.{index}.{_PLACE[found[3]]}.{found[4]}"] = tensor
        elif not name.startswith(_UNUSED):
            raise UserError(
                f"{file}: {name!r:.80} is not of a network without norms; only those are imported, "
                "since batch statistics would tie the chains of a batch together"
            )
    return section, ours


def _chains(buffer: Any, shape: tuple[int, ...]) -> StoredChains | None:
    if not isinstance(buffer, Tensor) or tuple(buffer.shape[1:]) != shape or len(buffer) == 0:
        return None
    index = torch.linspace(0, len(buffer) - 1, min(len(buffer), MAX_CHAINS)).round().long()
    chains = buffer[index].float()
    return StoredChains(chains, {}) if bool(chains.isfinite().all()) else None
