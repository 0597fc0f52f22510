"""A U-Net: blocks at falling and rising resolution, with skips between equal ones."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal, Self, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from torch import Tensor, nn

from ebm_dist.energies.family import FAMILY, Activation, Energy
from ebm_dist.energies.networks.embedding import modulated, modulation
from ebm_dist.energies.networks.image_energy import ImageEnergy
from ebm_dist.energies.networks.layers import Attention, activation, image_channels
from ebm_dist.energies.networks.network import ConditionedSection


def group_norm(num_channels: int) -> nn.GroupNorm:
    """Group norm within one event, of at least four channels a group where there are as many."""
    # A group of one channel at a resolution of 1x1 would be normalised to zero.
    return nn.GroupNorm(math.gcd(num_channels, min(8, max(1, num_channels // 4))), num_channels)


class UnetBlock(nn.Module):
    """conv(act(norm(.))) twice and the shortcut, (B, C, H, W) -> (B, C', H, W).

    An embedding (B, E) modulates the second norm's output, as in ADM (Dhariwal & Nichol 2021,
    arXiv:2105.05233).
    """

    def __init__(self, num_in: int, num_out: int, name: Activation, embedding: int | None) -> None:
        super().__init__()
        self.act = activation(name)
        self.norm1 = group_norm(num_in)
        self.conv1 = nn.Conv2d(num_in, num_out, 3, padding=1)
        self.norm2 = group_norm(num_out)
        self.modulation = modulation(embedding, num_out)
        self.conv2 = nn.Conv2d(num_out, num_out, 3, padding=1)
        self.shortcut = nn.Identity() if num_in == num_out else nn.Conv2d(num_in, num_out, 1)

    def forward(self, x: Tensor, embedding: Tensor | None) -> Tensor:
        hidden = self.norm2(self.conv1(self.act(self.norm1(x))))
        hidden = self.conv2(self.act(modulated(self.modulation, hidden, embedding)))
        return self.shortcut(x) + hidden


class ImageAttention(nn.Module):
    """Self-attention between the positions of an image, in a residual branch."""

    def __init__(self, num_channels: int, num_heads: int) -> None:
        super().__init__()
        if num_channels % num_heads:
            raise ValueError(
                f"energy.num_heads: {num_heads} does not divide the {num_channels} channels of the "
                "lowest resolution, width times the last multiplier"
            )
        self.norm = group_norm(num_channels)
        self.attention = Attention(num_channels, num_heads)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.attention(rearrange(self.norm(x), "b c h w -> b (h w) c"))
        return x + rearrange(tokens, "b (h w) c -> b c h w", h=x.shape[2])


class UnetBody(nn.Module):
    """(B, C, H, W), embedding (B, E) or none -> an image (B, num_out, H, W).

    With `num_out` None it gives features (B, width): the sum over the last blocks' positions.
    """

    def __init__(self, section: UnetSection, num_in: int, num_out: int | None) -> None:
        super().__init__()
        embedding = section.conditioning().width
        self.patch = section.patch_size
        widths = [section.width * multiplier for multiplier in section.multipliers]

        def blocks(num_first: int, num_channels: int) -> nn.ModuleList:
            firsts = [num_first] + [num_channels] * (section.num_blocks - 1)
            name = section.activation
            return nn.ModuleList(UnetBlock(n, num_channels, name, embedding) for n in firsts)

        self.stem = nn.Conv2d(num_in * self.patch**2, section.width, 3, padding=1)
        befores = [section.width, *widths]
        self.down = nn.ModuleList(blocks(a, b) for a, b in zip(befores, widths))
        self.attention = (
            ImageAttention(widths[-1], section.num_heads) if section.num_heads else nn.Identity()
        )
        # From below, and beside it the skip of the same resolution.
        self.up = nn.ModuleList(blocks(a + b, b) for a, b in zip(widths[:0:-1], widths[-2::-1]))
        self.norm = group_norm(widths[0])
        self.act = activation(section.activation)
        self.num_features = widths[0]
        self.out = None
        if num_out is not None:
            self.out = nn.Conv2d(widths[0], num_out * self.patch**2, 3, padding=1)

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        x = self.stem(F.pixel_unshuffle(x, self.patch))
        x = x.contiguous(memory_format=torch.channels_last)
        skips: list[Tensor] = []
        for stage in self.down:
            if skips:
                # ceil_mode: at odd sizes the last row would be lost without it.
                x = F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)
            for block in cast(nn.ModuleList, stage):
                x = block(x, embedding)
            skips.append(x)
        x = self.attention(skips.pop())
        for stage in self.up:
            skip = skips.pop()
            x = torch.cat([F.interpolate(x, size=skip.shape[2:], mode="nearest"), skip], 1)
            for block in cast(nn.ModuleList, stage):
                x = block(x, embedding)
        x = self.act(self.norm(x))
        if self.out is not None:
            return F.pixel_shuffle(self.out(x), self.patch)
        # A sum over positions in bf16 would round small terms away.
        return (x if x.dtype == torch.float64 else x.float()).flatten(2).sum(2)


@FAMILY.register
class UnetSection(ConditionedSection):
    """A U-Net with group norm within one event (Ronneberger et al. 2015, arXiv:1505.04597)."""

    name: Literal["unet"] = "unet"
    example: ClassVar[dict[str, Any]] = {
        "event_shape": (1, 8, 8),
        "width": 8,
        "multipliers": (1, 2),
    }

    parameterisation: Literal["scalar", "inner_product", "denoiser"] = "scalar"
    """How the network f gives an energy. scalar: minus a linear head on the summed features;
    inner_product: <x, f(x)>; denoiser: |x - f(x)|^2 / (2 noise_std^2), half the squared distance of
    x to what f makes of it. With num_levels and data_std, f of the last two is built as in EDM."""

    width: PositiveInt = 32
    """Channels of the stem."""

    multipliers: tuple[PositiveInt, ...] = Field(default=(1, 2, 2), min_length=1)
    """Channels of each resolution in units of `width`; each halves the sides of the one before."""

    num_blocks: PositiveInt = 1
    """Residual blocks at each resolution, on the way down and on the way up."""

    num_heads: NonNegativeInt = 0
    """Attention heads at the lowest resolution; 0: no attention. They must divide its channels."""

    patch_size: Literal[1, 2, 4] = 1
    """The network reads patches of this side as channels (pixel-unshuffle), without overlap and
    without loss: 2 makes it about four times cheaper. Must divide the image's sides."""

    @model_validator(mode="after")
    def _logits_need_a_head(self) -> Self:
        logits = self.num_classes is not None and self.classes == "logits"
        if logits and self.parameterisation != "scalar":
            raise ValueError(
                f"classes: logits, but parameterisation {self.parameterisation} has none; set "
                "classes: embedding, or parameterisation: scalar"
            )
        return self

    def module(self) -> Energy:
        num_in = image_channels("unet", self.input_shape)
        if any(side % self.patch_size for side in self.shape[1:]):
            raise ValueError(
                f"energy.patch_size: {self.patch_size} does not divide the image's sides "
                f"{self.shape[1:]}; set 1, or resize the images"
            )
        if self.parameterisation == "scalar":
            body = UnetBody(self, num_in, None)
            return self.wrap(body, body.num_features)
        return ImageEnergy(
            UnetBody(self, num_in, self.shape[0]),
            self.parameterisation,
            event_shape=self.shape,
            by=self.conditioning(),
            confinement=self.confinement,
        )
