"""The residual network of IGEBM, with activations after the sums and pooling inside the blocks."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from ebm_dist.energies.family import FAMILY, Activation, Energy
from ebm_dist.energies.networks.embedding import modulated, modulation
from ebm_dist.energies.networks.layers import activation, image_channels, normed
from ebm_dist.energies.networks.network import ConditionedSection


class IgebmBlock(nn.Module):
    """act(pool(shortcut(x) + conv(act(conv(x))))), (B, C, H, W) -> (B, C', H', W').

    An embedding (B, E) modulates what both convolutions return, and replaces their biases.
    """

    def __init__(self, num_in: int, num_out: int, *, halve: bool, section: IgebmSection) -> None:
        super().__init__()
        width = section.conditioning().width
        bias, norm = width is None, section.spectral_norm
        self.act = activation(section.activation)
        self.conv1 = normed(nn.Conv2d(num_in, num_out, 3, padding=1, bias=bias), norm)
        self.conv2 = normed(nn.Conv2d(num_out, num_out, 3, padding=1, bias=bias), norm)
        self.shortcut = (
            normed(nn.Conv2d(num_in, num_out, 1, bias=False), norm)
            if halve or num_in != num_out
            else nn.Identity()
        )
        self.modulation1, self.modulation2 = modulation(width, num_out), modulation(width, num_out)
        self.halve = halve

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        hidden = self.act(modulated(self.modulation1, self.conv1(x), embedding))
        hidden = modulated(self.modulation2, self.conv2(hidden), embedding) + self.shortcut(x)
        if self.halve and min(hidden.shape[2:]) > 1:
            # ceil_mode: at odd sizes the last row would get no gradient without it.
            hidden = F.avg_pool2d(hidden, 2, ceil_mode=True, count_include_pad=False)
        return self.act(hidden)


class IgebmBody(nn.Module):
    """(B, C, H, W) -> (B, F): a stem, stages that halve the resolution, rectified sums."""

    def __init__(self, section: IgebmSection, num_channels: int) -> None:
        super().__init__()
        num_in = section.width
        self.stem = normed(nn.Conv2d(num_channels, num_in, 3, padding=1), section.spectral_norm)
        self.act = activation(section.activation)
        self.blocks = nn.ModuleList()
        for multiplier in section.multipliers:
            for index in range(section.num_blocks):
                num_out = section.width * multiplier
                self.blocks.append(IgebmBlock(num_in, num_out, halve=index == 0, section=section))
                num_in = num_out
        self.num_features = num_in

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        x = self.act(self.stem(x)).contiguous(memory_format=torch.channels_last)
        for block in self.blocks:
            x = block(x, embedding)
        x = F.relu(x).flatten(2)
        # A sum over positions in bf16 would round small terms away.
        return (x if x.dtype == torch.float64 else x.float()).sum(2)


@FAMILY.register
class IgebmSection(ConditionedSection):
    """The network of IGEBM (Du & Mordatch 2019, arXiv:1903.08689), by default that of CIFAR-10.

    As in github.com/rosinality/igebm-pytorch at 3c4f104. `resnet` is cheaper to train: its
    activations come before the convolutions, and its stages halve the resolution at their start.
    """

    name: Literal["igebm"] = "igebm"
    example: ClassVar[dict[str, Any]] = {
        "event_shape": (1, 8, 8),
        "width": 8,
        "multipliers": (1, 2),
    }

    width: PositiveInt = 128
    """Channels of the stem."""

    multipliers: tuple[PositiveInt, ...] = Field(default=(1, 2, 2), min_length=1)
    """Channels of each stage, in units of `width`; the first block of every stage halves the
    resolution."""

    num_blocks: PositiveInt = 2
    """Residual blocks in each stage."""

    activation: Activation = "leaky_relu"
    """Activation; IGEBM uses leaky_relu with slope .2."""

    spectral_norm: bool = False
    """Bound each layer's gain by 1. IGEBM divides second convolutions only where theirs is more."""

    def module(self) -> Energy:
        body = IgebmBody(self, image_channels("igebm", self.input_shape))
        return self.wrap(body, body.num_features)
