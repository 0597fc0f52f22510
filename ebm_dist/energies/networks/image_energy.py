"""Energies of a network f whose output is shaped like x: inner product and denoiser."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from ebm_dist.energies.networks.conditioning import Conditioning, ContextEnergy, total_std


class ImageEnergy(ContextEnergy):
    """E(x) from f(x) (B, *event), with confinement/2 ||x||^2 added. Noise s, level by level:

        inner_product   <x, f(x)>
        denoiser        |x - f(x)|^2 / (2 s^2)

    Salimans & Ho (2021, "Should EBMs model the energy or the score?") have the half squared
    distance, Guth et al. (2025, "Learning normalized image densities via dual score matching") an
    inner product. Without levels s is 1.

    With `data_std` = d, y = x - data_mean stands in place of x. Without levels both are in units of
    d: y / d and f(y / d). With levels f is made of the network F as in EDM (Karras et al. 2022,
    arXiv:2206.00364, table 1), so that input and output of F have about unit variance at each s:

        D = d^2 / (s^2 + d^2) y + s d / sqrt(s^2 + d^2) F(y / sqrt(s^2 + d^2), s)
        inner_product   <y, y - D> / (2 s^2)      with F = 0 the energy of Gaussian data of scale d
        denoiser        |y - D|^2 / (2 s^2)

    The gradient of either is (y - D) / s^2, that of a denoiser D, only where D is linear and
    symmetric (inner product) or a projection (denoiser). D is a means, and not the denoiser itself;
    train E by its gradient.
    """

    def __init__(
        self,
        body: nn.Module,
        parameterisation: Literal["inner_product", "denoiser"],
        *,
        event_shape: tuple[int, ...],
        by: Conditioning,
        confinement: float = 0.0,
    ) -> None:
        super().__init__(event_shape, by)
        self.body = body
        self.parameterisation = parameterisation
        self.confinement = confinement

    def energy(
        self,
        x: Tensor,
        label: Tensor | None = None,
        level: Tensor | None = None,
        condition: Tensor | None = None,
    ) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        noise = self.noise(level, wide)
        read = self.network_input(wide, noise, condition, next(self.body.parameters()).dtype)
        out = self.body(read, *self.embedded(label, noise)).to(wide.dtype)
        value = self._value(wide, out, noise)
        if self.confinement:
            value = value + 0.5 * self.confinement * _dot(wide, wide)
        return value

    def _value(self, x: Tensor, out: Tensor, noise: Tensor | None) -> Tensor:
        """E (B,) of x and the network's output (B, *event), both float32 at least."""
        inner, d = self.parameterisation == "inner_product", self.data_std
        if d is not None:
            x = x - self.data_mean
        if d is not None and noise is not None:
            total = total_std(d, noise)
            # (y - D) / s, written without the difference of nearly equal numbers at small s.
            away = noise / total.square() * x - d / total * out
            return 0.5 * _dot(x / noise if inner else away, away)
        if d is not None:
            x = x / d
        if inner:
            return _dot(x, out)
        away = x - out if noise is None else (x - out) / noise
        return 0.5 * _dot(away, away)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """<a, b> of each event, (B,)."""
    return (a * b).flatten(1).sum(1)
