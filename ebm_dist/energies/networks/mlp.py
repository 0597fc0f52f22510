"""A multi-layer perceptron on the flattened event."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, PositiveInt
from torch import nn

from ebm_dist.energies.family import FAMILY, Energy
from ebm_dist.energies.networks.layers import activation, normed
from ebm_dist.energies.networks.network import NetworkSection


@FAMILY.register
class MlpSection(NetworkSection):
    """A multi-layer perceptron on the flattened event."""

    name: Literal["mlp"] = "mlp"
    example: ClassVar[dict[str, Any]] = {"event_shape": (2,), "widths": (16, 16)}

    widths: tuple[PositiveInt, ...] = Field(default=(256, 256), min_length=1)
    """Units of each hidden layer."""

    spectral_norm: bool = False
    """Bound each layer's gain by 1."""

    def module(self) -> Energy:
        layers: list[nn.Module] = [nn.Flatten()]
        fan_in = self.size
        for width in self.widths:
            layers += [
                normed(nn.Linear(fan_in, width), self.spectral_norm),
                activation(self.activation),
            ]
            fan_in = width
        return self.wrap(nn.Sequential(*layers), fan_in)
