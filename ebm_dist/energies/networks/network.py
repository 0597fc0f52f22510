"""A network as an energy: body -> features -> one energy, or one logit a class."""

from __future__ import annotations

from typing import Self

import torch
from pydantic import NonNegativeFloat
from torch import Tensor, nn

from ebm_dist.core.types import EventSpec
from ebm_dist.energies.family import Activation, BoundSection, Energy, NumClasses
from ebm_dist.energies.networks.layers import Head


class NetworkEnergy(Energy):
    """E(x) = -head(body(x)) + confinement/2 ||x||^2.

    With `num_classes` the head gives logits f_y(x) and E(x) = -logsumexp_y f_y(x), the
    joint energy-classifier of Grathwohl et al. (2020), arXiv:1912.03263.
    """

    def __init__(
        self,
        body: nn.Module,
        num_features: int,
        *,
        event_shape: tuple[int, ...],
        num_classes: int | None = None,
        confinement: float = 0.0,
    ) -> None:
        super().__init__(event_shape)
        # Every weight lies in a submodule that is called as a module: ZeRO-3 gathers weights in
        # hooks of such calls, and `logits` does not go through `forward`.
        self.body = body
        self.head = Head(num_features, num_classes or 1)
        self.num_classes = num_classes
        self.confinement = confinement

    def energy(self, x: Tensor) -> Tensor:
        out = self._head(x)
        return -out.logsumexp(1) if self.num_classes else -out.squeeze(1)

    def logits(self, x: Tensor) -> Tensor:
        """Logits (B, num_classes) of events (B, *event); -logits[:, y] is E(x, y).

        Raises:
            ValueError: the energy has no classes, or x is no batch of its events.
        """
        if not self.num_classes:
            raise ValueError(
                "energy.num_classes: not set, so the energy has no class logits; set it to the "
                "number of labels, or to 'data'"
            )
        self.check(x)
        return self._head(x)

    def _head(self, x: Tensor) -> Tensor:
        # Inputs take the dtype of the weights, so a module that was cast to bf16 works as well.
        out = self.head(self.body(x.to(self.head.weight.dtype)))
        if self.confinement:
            wide = x if x.dtype == torch.float64 else x.float()
            norm = wide.flatten(1).square().sum(1, keepdim=True)
            out = out - 0.5 * self.confinement * norm
        return out


class NetworkSection(BoundSection):
    """The config fields that all energy networks share."""

    num_classes: NumClasses = None
    """Give the network class logits and E(x) = -logsumexp(logits), as a joint
    energy-classifier needs; 'data' takes the number of labels from the data."""

    activation: Activation = "silu"
    """Smooth by default: the sampler and the penalties differentiate the energy in x."""

    confinement: NonNegativeFloat = 0.0
    """Adds confinement/2 * ||x||^2, so that a network on unbounded data has a finite Z."""

    def bind(self, spec: EventSpec) -> Self:
        bound = super().bind(spec)
        if self.num_classes != "data":
            return bound
        if spec.num_classes is None:
            raise ValueError(
                "energy.num_classes: 'data', but the data names no classes; set data.num_classes "
                "where plain shards hold .cls labels, else give a number, or leave it out for an "
                "energy without classes"
            )
        return bound.model_copy(update={"num_classes": spec.num_classes})

    def wrap(self, body: nn.Module, num_features: int) -> NetworkEnergy:
        """The energy whose features are `body(x)` (B, num_features)."""
        if self.num_classes == "data":
            raise ValueError(
                "energy.num_classes: 'data' is known only once the section is bound to the data; "
                "give a number"
            )
        return NetworkEnergy(
            body,
            num_features,
            event_shape=self.shape,
            num_classes=self.num_classes,
            confinement=self.confinement,
        )
