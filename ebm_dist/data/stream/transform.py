"""Converts stored samples into events: augments, scales, binarises and flattens them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from ebm_dist.core.errors import UserError
from ebm_dist.core.types import EventSpec
from ebm_dist.data.config import DataConfig
from ebm_dist.data.format.decode import Layout


def event_spec(config: DataConfig, layout: Layout) -> EventSpec:
    """The events of `Transform`; raises UserError if a key does not apply to the data."""
    spec = layout.spec
    image = spec.kind == "image"
    for key, value in (
        ("flip", config.flip),
        ("crop_padding", config.crop_padding),
        ("dequantize", config.dequantize),
        ("binarize", config.binarize != "none"),
    ):
        if value and not image:
            raise UserError(
                f"data.{key}: is for images, but {config.location} holds {spec.kind} events of "
                f"shape {spec.shape}; leave it out"
            )
    if config.dequantize and layout.levels is None:
        raise UserError(
            f"data.dequantize: needs 8-bit images, but {config.location} holds float images; set "
            "it to false"
        )
    if config.noise_std > 0 and spec.discrete:
        raise UserError(
            f"data.noise_std: is {config.noise_std}, but {config.location} holds {spec.kind} "
            "events; set it to 0"
        )
    if config.crop_padding and config.crop_padding >= min(spec.shape[-2:]):
        raise UserError(
            f"data.crop_padding: {config.crop_padding} pixels cannot be reflected in images of "
            f"{spec.shape[-2]} x {spec.shape[-1]}; use at most {min(spec.shape[-2:]) - 1}"
        )
    kind = "binary" if config.binarize != "none" else spec.kind
    shape = spec.shape
    if config.flatten:
        if kind == "categorical":
            raise UserError(
                "data.flatten: categorical events are one-hot in their last axis, which "
                "flattening would lose; set it to false"
            )
        shape = (math.prod(shape),)
        # An `image` is (C, H, W) by contract; as a vector it is real numbers.
        kind = "real" if kind == "image" else kind
    given, condition_shape = config.condition_size, None
    if given is not None:
        if kind == "categorical":
            raise UserError(
                "data.condition_size: categorical events are one-hot in their last axis, which "
                "cannot be divided; leave it out"
            )
        if given >= shape[-1]:
            raise UserError(
                f"data.condition_size: {given}, but the last axis of {config.location}'s events of "
                f"shape {shape} has {shape[-1]} entries, of which one at least remains to be "
                f"sampled; set it to at most {shape[-1] - 1}, or leave it out"
            )
        shape, condition_shape = (*shape[:-1], shape[-1] - given), (*shape[:-1], given)
    return EventSpec(shape, kind, spec.num_classes, condition_shape)


@dataclass(frozen=True, slots=True)
class Part:
    """Rows `index, index + of, …` of the global batch.

    Each rank draws the random numbers of the whole global batch and keeps those of its rows. So the
    ranks' batches together are the batch of a single rank.
    """

    index: int = 0
    of: int = 1

    def uniform(self, x: Tensor, *shape: int, generator: torch.Generator) -> Tensor:
        return torch.rand(len(x) * self.of, *shape, generator=generator)[self.index :: self.of]

    def normal(self, x: Tensor, generator: torch.Generator) -> Tensor:
        shape = (len(x) * self.of, *x.shape[1:])
        return torch.randn(shape, generator=generator)[self.index :: self.of]


class Transform:
    """Scales samples, and augments them randomly in training."""

    def __init__(self, config: DataConfig, layout: Layout) -> None:
        self.spec = event_spec(config, layout)
        self._config = config
        self._layout = layout
        self.draws = bool(
            config.crop_padding
            or config.flip
            or config.binarize == "bernoulli"
            or (config.dequantize and config.binarize == "none")
            or config.noise_std > 0
        )
        """Whether training batches use random numbers."""

    def __call__(
        self,
        x: Tensor,
        generator: torch.Generator,
        *,
        augment: bool = True,
        part: Part | None = None,
    ) -> Tensor:
        """Data (B, ...), float32, from stored x (B, *stored shape), uint8 or float32; `divided`
        makes events of them.

        Bernoulli binarisation uses `generator` even without `augment`.
        """
        part = part or Part()
        config, levels = self._config, self._layout.levels
        # float() does not copy float32, and the stored array must not be changed.
        y = x.float() if levels is not None or self._layout.spec.discrete else x.clone()
        if augment and config.crop_padding:
            y = _crop(y, config.crop_padding, part, generator)
        if augment and config.flip:
            mirrored = part.uniform(y, 1, 1, 1, generator=generator) < 0.5
            y = torch.where(mirrored, y.flip(-1), y)
        if config.binarize != "none":
            intensity = y / 255 if levels is not None else (y + 1) / 2
            if config.binarize == "threshold":
                y = (intensity > 0.5).float()
            else:
                coin = part.uniform(y, *y.shape[1:], generator=generator)
                y = (coin < intensity).float()
        elif levels is not None:
            if augment and config.dequantize:
                level = torch.round(y * ((levels - 1) / 255))
                shade = part.uniform(y, *y.shape[1:], generator=generator)
                y = 2 * (level + shade) / levels - 1
            else:
                y = y.div_(127.5).sub_(1)
        if augment and config.noise_std > 0:
            y = y + config.noise_std * part.normal(y, generator)
        if config.flatten:
            y = y.reshape(len(y), -1)
        return y.contiguous()

    def divided(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Events (B, *spec.shape) and their conditions, None for data without, of data x."""
        given = self._config.condition_size
        if given is None:
            return x, None
        return x[..., given:].contiguous(), x[..., :given].contiguous()


def _crop(x: Tensor, padding: int, part: Part, generator: torch.Generator) -> Tensor:
    """A random window (H, W) of each image x (B, C, H, W), padded by reflection."""
    num, _, height, width = x.shape
    corner = (part.uniform(x, 2, generator=generator) * (2 * padding + 1)).long()
    padded = F.pad(x, (padding,) * 4, mode="reflect")
    row = rearrange(corner[:, 0:1] + torch.arange(height), "b h -> b h 1")
    column = rearrange(corner[:, 1:2] + torch.arange(width), "b w -> b 1 w")
    window = padded[rearrange(torch.arange(num), "b -> b 1 1"), :, row, column]
    return rearrange(window, "b h w c -> b c h w")
