"""Imports a checkpoint of IGEBM's PyTorch port as an export."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ebm_dist.core.errors import UserError
from ebm_dist.energies.networks.igebm import IgebmSection
from ebm_dist.export.foreign.checkpoint import read, weights_in, write_imported
from ebm_dist.samplers.continuous.langevin import LangevinSection

_BLOCK = re.compile(r"blocks\.(\d+)\.")


def import_igebm(file: str | Path, out_dir: str | Path) -> Path:
    """Write a checkpoint of IGEBM (Du & Mordatch 2019, arXiv:1903.08689) as an export.

    It is the module `IGEBM` as in github.com/rosinality/igebm-pytorch at 3c4f104, with classes or
    without, of any width and of any number of blocks in pairs. That program has images in [0, 1];
    an export has images in [-1, 1] like all of the package, and its network reads (x + 1) / 2.

    The program runs a power iteration of its spectral norms before every call, also in eval mode.
    The export has the weights of the first call after the checkpoint is loaded.

    Args:
        file: the module's state as torch.save wrote it, bare or in `model_state_dict`,
            `state_dict` or `model`. It is read without running code of it.

    Raises:
        UserError: it is something else, or `out_dir` cannot be written.
    """
    file = Path(file)
    state = weights_in(file, read(file), "model_state_dict", "state_dict", "model")
    # A module in DataParallel has this prefix before all names.
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    try:
        section, weights = _translated(state)
    except (KeyError, IndexError, ValueError, RuntimeError, ZeroDivisionError) as error:
        missing = isinstance(error, KeyError)
        what = f"it has no {error.args[0]}" if missing else " ".join(str(error).split())
        raise UserError(f"{file}: no network of IGEBM's PyTorch port; {what:.200}") from None
    return write_imported(
        file,
        out_dir,
        name="igebm",
        network=f"an IGEBM of width {section.width}",
        section=section,
        weights=weights,
        # The program has step 10, noise .005 and gradients within .01 for images in [0, 1].
        # At twice the scale, noise doubles, gradients halve, and the step is four times as long.
        sampler=LangevinSection(
            step_size=40.0, noise_std=0.01, grad_clip=0.005, clamp=(-1.0, 1.0), num_steps=60
        ),
        data={"source": "data/cifar10"},
        card=_CARD.format(file=file.name, given=", y" if section.num_classes else ""),
    )


_CARD = """# IGEBM

The energy E(x{given}) of an IGEBM, imported by ebm_dist from `{file}`, a checkpoint of the PyTorch
port (github.com/rosinality/igebm-pytorch) of Du & Mordatch (2019), arXiv:1903.08689. The port has
images in [0, 1]; here they lie in [-1, 1], and the network reads (x + 1) / 2.

The sampler is the port's, in these units: x' = x - 40 dE/dx + .01 noise, gradients clamped to .005
and images to [-1, 1], 60 steps. So T = 1.25e-06, and the chains do not follow exp(-E).
"""


def _translated(state: Mapping[str, Tensor]) -> tuple[IgebmSection, dict[str, Tensor]]:
    """The section of the network, and its weights by our names."""
    left = dict(state)
    num = 1 + max((int(found[1]) for name in state if (found := _BLOCK.match(name))), default=-1)
    stem = _normed(left, "conv1")
    num_classes = None
    # E = linear(features), and ours is minus the head.
    ours = {
        "body.stem.weight": stem,
        "body.stem.bias": left.pop("conv1.bias"),
        "head.weight": -left.pop("linear.weight"),
        "head.bias": -left.pop("linear.bias"),
    }
    outs = []
    for index in range(num):
        theirs, here = f"blocks.{index}", f"body.blocks.{index}"
        ours[f"{here}.conv1.weight"] = _normed(left, f"{theirs}.conv1")
        ours[f"{here}.conv2.weight"] = _normed(left, f"{theirs}.conv2", bound=True)
        outs.append(len(ours[f"{here}.conv1.weight"]))
        if f"{theirs}.skip.0.weight_orig" in left:
            ours[f"{here}.shortcut.weight"] = _normed(left, f"{theirs}.skip.0")
        if f"{theirs}.class_embed.weight" not in left:
            for conv in ("conv1", "conv2"):
                ours[f"{here}.{conv}.bias"] = left.pop(f"{theirs}.{conv}.bias")
            continue
        table = left.pop(f"{theirs}.class_embed.weight")
        num_classes = len(table)
        # The columns are the scales after conv1 and conv2, then the shifts.
        scale1, scale2, shift1, shift2 = table.double().chunk(4, 1)
        for place, scale, shift in (("1", scale1, shift1), ("2", scale2, shift2)):
            linear = f"{here}.modulation{place}.linear"
            ours[f"{linear}.weight"], ours[f"{linear}.bias"] = _of_one_hot(scale, shift)
    if left:
        raise ValueError(f"{min(left)!r:.80} has no place in it")
    if num_classes is not None:
        ours["embedding.label.weight"] = torch.eye(num_classes)
    if num == 0 or num % 2 or any(out % len(stem) for out in outs) or outs[::2] != outs[1::2]:
        raise ValueError(f"blocks of {outs} channels, expected pairs, in multiples of {len(stem)}")
    section = IgebmSection(
        event_shape=(stem.shape[1], 32, 32),
        width=len(stem),
        multipliers=tuple(out // len(stem) for out in outs[::2]),
        num_classes=num_classes,
        classes="logits" if num_classes is None else "embedding",
        embedding_width=num_classes or 128,
        data_mean=-1.0,
        data_std=2.0,
    )
    return section, ours


def _normed(left: dict[str, Tensor], name: str, *, bound: bool = False) -> Tensor:
    """The weight of convolution `name` at the next call; takes the layer's tensors from `left`.

    It is divided by an estimate s of its largest singular value, after one power iteration; with
    `bound` only where s > 1.
    """
    weight, u = (left.pop(f"{name}.{part}").double() for part in ("weight_orig", "weight_u"))
    left.pop(f"{name}.weight", None)  # that of the last call before the checkpoint
    matrix = weight.flatten(1)
    v = matrix.T @ u
    s = (matrix @ (v / v.norm())).norm()
    return weight / (s + 1e-6) * s.clamp(max=1) if bound else weight / s


def _of_one_hot(scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of the layer of a `Modulation` with these rows for one-hot embeddings."""
    silu_of_1 = F.silu(torch.ones((), dtype=torch.float64))
    weight = torch.cat([scale - 1, shift], 1).T / silu_of_1
    return weight, torch.zeros(len(weight))
