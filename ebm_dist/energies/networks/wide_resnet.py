"""The wide residual network of the joint energy-classifier (JEM)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import PositiveInt, model_validator
from torch import Tensor, nn

from ebm_dist.energies.family import FAMILY, Activation, Energy
from ebm_dist.energies.networks.embedding import modulated, modulation
from ebm_dist.energies.networks.layers import activation, image_channels, normed
from ebm_dist.energies.networks.network import ConditionedSection

Norm = Literal["none", "group", "instance"]


class WideBlock(nn.Module):
    """conv(act(norm(.))) twice and the shortcut, the second convolution strided.

    An embedding (B, E) modulates the second norm's output.
    """

    def __init__(self, num_in: int, num_out: int, stride: int, section: WideResNetSection) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            _norm(section.norm, num_in),
            activation(section.activation),
            normed(nn.Conv2d(num_in, num_out, 3, padding=1), section.spectral_norm),
            _norm(section.norm, num_out),
            activation(section.activation),
            normed(nn.Conv2d(num_out, num_out, 3, stride, padding=1), section.spectral_norm),
        )
        self.shortcut = (
            nn.Identity()
            if num_in == num_out and stride == 1
            else normed(nn.Conv2d(num_in, num_out, 1, stride), section.spectral_norm)
        )
        self.modulation = modulation(section.conditioning().width, num_out)

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        norm1, act1, conv1, norm2, act2, conv2 = self.residual
        hidden = modulated(self.modulation, norm2(conv1(act1(norm1(x)))), embedding)
        return self.shortcut(x) + conv2(act2(hidden))


class WideResNetBody(nn.Module):
    """(B, C, H, W) -> (B, 64 * widen): three groups at strides 1, 2, 2, then the mean."""

    def __init__(self, section: WideResNetSection, num_channels: int) -> None:
        super().__init__()
        self.stem = normed(nn.Conv2d(num_channels, 16, 3, padding=1), section.spectral_norm)
        num_blocks = (section.depth - 4) // 6
        blocks = []
        num_in = 16
        for base, stride in ((16, 1), (32, 2), (64, 2)):
            for index in range(num_blocks):
                num_out = base * section.widen
                blocks.append(WideBlock(num_in, num_out, stride if index == 0 else 1, section))
                num_in = num_out
        self.blocks = nn.Sequential(*blocks)
        self.last = nn.Sequential(_norm(section.norm, num_in), activation(section.activation))
        self.num_features = num_in

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        x = self.stem(x).contiguous(memory_format=torch.channels_last)
        for block in self.blocks:
            x = block(x, embedding)
        x = self.last(x).flatten(2)
        return (x if x.dtype == torch.float64 else x.float()).mean(2)


def _norm(name: Norm, num_channels: int) -> nn.Module:
    # Only norms within one event: with batch statistics the energy and the gradient of a chain
    # would depend on the other chains of its batch.
    if name == "none":
        return nn.Identity()
    return nn.GroupNorm(min(8, num_channels) if name == "group" else num_channels, num_channels)


@FAMILY.register
class WideResNetSection(ConditionedSection):
    """WRN-depth-widen without batch norm, as in JEM (Grathwohl et al. 2020, arXiv:1912.03263)."""

    name: Literal["wide_resnet"] = "wide_resnet"
    example: ClassVar[dict[str, Any]] = {"event_shape": (3, 8, 8), "depth": 10, "widen": 1}

    depth: PositiveInt = 28
    """Number of layers, 6n + 4."""

    widen: PositiveInt = 10
    """Channels in units of (16, 32, 64)."""

    norm: Norm = "none"
    """Normalisation within one event."""

    activation: Activation = "leaky_relu"
    """Activation; JEM uses leaky_relu with slope .2."""

    spectral_norm: bool = False
    """Bound each layer's gain by 1."""

    @model_validator(mode="after")
    def _depth_fits(self) -> Self:
        if self.depth < 10 or (self.depth - 4) % 6:
            raise ValueError(f"depth: {self.depth} is not 6n + 4; give 10, 16, 22, 28, ...")
        return self

    def module(self) -> Energy:
        body = WideResNetBody(self, image_channels("wide_resnet", self.input_shape))
        return self.wrap(body, body.num_features)
