"""A multi-layer perceptron on the flattened event."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from ebm_dist.energies.family import FAMILY, Energy
from ebm_dist.energies.networks.layers import activation, normed
from ebm_dist.energies.networks.network import ConditionedSection


class MlpBody(nn.Sequential):
    """(B, *event), embedding (B, E) or none -> (B, widths[-1]); the embedding joins the event."""

    def forward(self, input: Tensor, embedding: Tensor | None = None) -> Tensor:
        flatten, *layers = self
        x = flatten(input)
        if embedding is not None:
            x = torch.cat([x, embedding.to(x.dtype)], 1)
        for layer in layers:
            x = layer(x)
        return x


@FAMILY.register
class MlpSection(ConditionedSection):
    """A multi-layer perceptron on the flattened event."""

    name: Literal["mlp"] = "mlp"
    example: ClassVar[dict[str, Any]] = {"event_shape": (2,), "widths": (16, 16)}

    widths: tuple[PositiveInt, ...] = Field(default=(256, 256), min_length=1)
    """Units of each hidden layer."""

    spectral_norm: bool = False
    """Bound each layer's gain by 1."""

    def module(self) -> Energy:
        by = self.conditioning()
        layers: list[nn.Module] = [nn.Flatten()]
        fan_in = self.size + math.prod(self.shape_of_condition or (0,)) + (by.width or 0)
        for width in self.widths:
            layers += [
                normed(nn.Linear(fan_in, width), self.spectral_norm),
                activation(self.activation),
            ]
            fan_in = width
        return self.wrap(MlpBody(*layers), fan_in)
