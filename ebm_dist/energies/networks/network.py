"""A network as an energy: body -> features -> one energy, or one logit a class."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Literal, Self

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from ebm_dist.core.types import EventSpec
from ebm_dist.energies.family import Activation, BoundSection, NumClasses
from ebm_dist.energies.networks.conditioning import Conditioning, ContextEnergy
from ebm_dist.energies.networks.layers import Head


class NetworkEnergy(ContextEnergy):
    """E(x) = -head(body(x)) + confinement/2 ||x||^2.

    With `num_classes` the head gives logits f_y(x): E(x) = -logsumexp_y f_y(x) without a label,
    E(x, y) = -f_y(x) with one, the joint energy-classifier of Grathwohl et al. (2020),
    arXiv:1912.03263. Under `classes: embedding` the label enters the body in place of the head.
    """

    def __init__(
        self,
        body: nn.Module,
        num_features: int,
        *,
        event_shape: tuple[int, ...],
        by: Conditioning,
        confinement: float = 0.0,
    ) -> None:
        super().__init__(event_shape, by)
        # Every weight lies in a submodule that is called as a module: ZeRO-3 gathers weights in
        # hooks of such calls, and `logits` does not go through `forward`.
        self.body = body
        self.num_classes = None if by.embeds_labels else by.num_labels
        self.head = Head(num_features, self.num_classes or 1)
        self.confinement = confinement

    def energy(self, x: Tensor, label: Tensor | None = None, **context: Tensor) -> Tensor:
        if not self.num_classes:
            return -self._head(x, label, **context).squeeze(1)
        out = self._head(x, None, **context)
        return -out.logsumexp(1) if label is None else -out.gather(1, label[:, None]).squeeze(1)

    def logits(self, x: Tensor, **context: Tensor) -> Tensor:
        """Logits (B, num_classes) of events (B, *event); -logits[:, y] is E(x, y).

        Raises:
            ValueError: the energy has no classes, or x is no batch of its events.
        """
        if not self.num_classes:
            raise ValueError(
                "energy.num_classes: not set, so the energy has no class logits; set it to the "
                "number of labels, or to 'data'"
                if self.num_labels is None
                else "energy.classes: embedding, so the energy has no class logits; set "
                "energy.classes: logits"
            )
        self.check(x)
        return self._head(x, None, **context)

    def _head(
        self,
        x: Tensor,
        label: Tensor | None,
        level: Tensor | None = None,
        condition: Tensor | None = None,
    ) -> Tensor:
        noise = self.noise(level, x)
        # Inputs take the dtype of the weights, so a module that was cast to bf16 works as well.
        read = self.network_input(x, noise, condition, self.head.weight.dtype)
        out = self.head(self.body(read, *self.embedded(label, noise)))
        if self.confinement:
            wide = x if x.dtype == torch.float64 else x.float()
            norm = wide.flatten(1).square().sum(1, keepdim=True)
            out = out - 0.5 * self.confinement * norm
        return out


class NetworkSection(BoundSection):
    """The config fields that all energy networks share."""

    num_classes: NumClasses = None
    """Number of labels. The network gets class logits f, E(x) = -logsumexp(f), and E(x, y) = -f_y
    where a label is given, as a joint energy-classifier needs; 'data' takes it from the data."""

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

    def conditioning(self) -> Conditioning:
        """What the energy is conditioned on."""
        if self.num_classes == "data":
            raise ValueError(
                "energy.num_classes: 'data' is known only once the section is bound to the data; "
                "give a number"
            )
        return Conditioning(num_labels=self.num_classes)

    def wrap(self, body: nn.Module, num_features: int) -> NetworkEnergy:
        """The energy whose features are `body(x)` (B, num_features)."""
        return NetworkEnergy(
            body,
            num_features,
            event_shape=self.shape,
            by=self.conditioning(),
            confinement=self.confinement,
        )


class ConditionedSection(NetworkSection):
    """A network that may also be conditioned on labels, noise levels and conditions."""

    classes: Literal["logits", "embedding"] = "logits"
    """How num_classes is read. logits: see there; embedding: the label enters the network's blocks,
    and every call needs one, E(x, y)."""

    num_levels: PositiveInt | None = None
    """Number of noise levels: E(x, level) is one energy for each, and every call needs a level."""

    noise_stds: tuple[PositiveFloat, ...] | None = None
    """Standard deviation of each level's noise in data units, rising from level 0; or the first and
    the last alone, with equal ratios between."""

    condition_shape: tuple[PositiveInt, ...] | Literal["data"] | None = None
    """Shape of a condition c, for E(x | c): an image with the sides of x, whose channels the
    network reads beside those of x; for mlp any shape; 'data' takes it from the data."""

    embedding_width: PositiveInt = 128
    """Dimension of the vector by which labels and levels enter the blocks."""

    data_std: PositiveFloat | None = None
    """Standard deviation of the data's numbers, where it is known: the network then reads
    (x - data_mean) / sqrt(data_std^2 + noise_std^2), which is of order 1 at every level."""

    data_mean: float = 0.0
    """Mean of the data's numbers, for `data_std`."""

    @model_validator(mode="after")
    def _levels_have_noise(self) -> Self:
        num, stds = self.num_levels, self.noise_stds
        if (num is None) != (stds is None):
            raise ValueError(
                f"{'num_levels' if num is None else 'noise_stds'}: missing; levels need both, for "
                "example num_levels: 16 and noise_stds: [0.03, 3.0]"
            )
        if stds is not None and len(stds) != num and (num == 1 or len(stds) != 2):
            ends = "" if num == 1 else ", or 2: the first and the last"
            raise ValueError(f"noise_stds: {len(stds)} of them, expected {num} (num_levels){ends}")
        if stds is not None and any(low >= high for low, high in pairwise(stds)):
            raise ValueError(f"noise_stds: {list(stds)}, expected rising from the cleanest level 0")
        if self.classes == "embedding" and self.num_classes is None:
            raise ValueError("classes: embedding, but num_classes is not set; set it, or 'data'")
        return self

    @property
    def levels(self) -> tuple[float, ...] | None:
        """The noise of every level."""
        num, stds = self.num_levels, self.noise_stds
        if num is None or stds is None or len(stds) == num:
            return stds
        ratio = math.log(stds[1] / stds[0])
        return tuple(stds[0] * math.exp(ratio * k / (num - 1)) for k in range(num))

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of what the body reads: the event, with the condition as further channels."""
        shape = self.shape_of_condition
        if shape is None:
            return self.shape
        if shape[1:] != self.shape[1:]:
            raise ValueError(
                f"energy.condition_shape: {shape}, expected the sides of {self.shape}; only the "
                "first number, the channels, may differ (mlp takes any shape)"
            )
        return (self.shape[0] + shape[0], *self.shape[1:])

    @property
    def shape_of_condition(self) -> tuple[int, ...] | None:
        """`condition_shape`, once it is known."""
        if self.condition_shape == "data":
            raise ValueError(
                "energy.condition_shape: 'data' is known only once the section is bound to the "
                "data; give the shape"
            )
        return self.condition_shape

    def bind(self, spec: EventSpec) -> Self:
        bound, shape, of_data = super().bind(spec), self.condition_shape, spec.condition_shape
        if shape == "data":
            if of_data is None:
                raise ValueError(
                    "energy.condition_shape: 'data', but the data has no conditions; set "
                    "data.condition_size, or leave this out"
                )
            return bound.model_copy(update={"condition_shape": of_data})
        if None not in (shape, of_data) and shape != of_data:
            raise ValueError(
                f"energy.condition_shape: {shape}, but the data's conditions have shape "
                f"{of_data}; set it to data"
            )
        return bound

    def conditioning(self) -> Conditioning:
        return replace(
            super().conditioning(),
            embeds_labels=self.classes == "embedding",
            noise_stds=self.levels,
            condition_shape=self.shape_of_condition,
            embedding_width=self.embedding_width,
            data_std=self.data_std,
            data_mean=self.data_mean,
        )
