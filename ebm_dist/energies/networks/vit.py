"""A vision transformer: patches to tokens, pre-norm blocks, the mean token to an energy."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from einops import rearrange
from pydantic import PositiveInt
from torch import Tensor, nn

from ebm_dist.energies.family import FAMILY, Activation, Energy
from ebm_dist.energies.networks.layers import TransformerBlock, TransformerBlocks, image_channels
from ebm_dist.energies.networks.network import ConditionedSection


class VitBody(nn.Module):
    """(B, C, H, W) -> (B, width); Dosovitskiy et al. (2021), arXiv:2010.11929."""

    def __init__(self, section: VitSection, shape: tuple[int, ...]) -> None:
        super().__init__()
        num_channels, height, width = shape
        embedding = section.conditioning().width
        self.patch = section.patch_size
        num_tokens = (height // self.patch) * (width // self.patch)
        self.embed = nn.Linear(num_channels * self.patch**2, section.width)
        self.position = nn.Parameter(torch.randn(num_tokens, section.width) * 0.02)
        self.blocks = TransformerBlocks(
            *(
                TransformerBlock(
                    section.width,
                    section.num_heads,
                    expansion=section.expansion,
                    activation_name=section.activation,
                    embedding=embedding,
                )
                for _ in range(section.depth)
            )
        )
        self.norm = nn.LayerNorm(section.width)

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        patches = rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=self.patch, q=self.patch)
        tokens = self.embed(patches) + self.position
        return self.norm(self.blocks(tokens, embedding)).mean(1)


@FAMILY.register
class VitSection(ConditionedSection):
    """A vision transformer on non-overlapping patches."""

    name: Literal["vit"] = "vit"
    recomputes_activations: ClassVar[bool] = True
    example: ClassVar[dict[str, Any]] = {
        "event_shape": (1, 8, 8),
        "width": 16,
        "depth": 1,
        "num_heads": 2,
    }

    patch_size: PositiveInt = 4
    """Side of one patch; must divide the image's sides. Use 2 for small images."""

    width: PositiveInt = 128
    """Dimension of one token."""

    depth: PositiveInt = 4
    """Transformer blocks."""

    num_heads: PositiveInt = 4
    """Attention heads; must divide `width`."""

    expansion: PositiveInt = 4
    """Hidden units of a block's perceptron, in units of `width`."""

    activation: Activation = "gelu"
    """Activation of the perceptrons."""

    def module(self) -> Energy:
        image_channels("vit", self.shape)
        if any(side % self.patch_size for side in self.shape[1:]):
            raise ValueError(
                f"energy.patch_size: {self.patch_size} does not divide the image's sides "
                f"{self.shape[1:]}; choose a common divisor"
            )
        return self.wrap(VitBody(self, self.input_shape), self.width)
