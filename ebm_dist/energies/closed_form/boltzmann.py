"""The restricted Boltzmann machine, through its free energy and its block conditionals."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, PositiveInt, model_validator
from torch import Tensor, nn

from ebm_dist.core.types import EventKind, EventSpec
from ebm_dist.energies.closed_form.finite import MAX_STATES, FiniteEnergy
from ebm_dist.energies.family import FAMILY, BoundSection, Energy

Side = Literal["auto", "visible", "hidden"]


class Rbm(FiniteEnergy):
    """E(v) = -b.v - sum_j softplus(c_j + W_j.v), v in {0,1} of shape (B, *event).

    The free energy of exp(b.v + c.h + h^T W v) with the hidden h summed out, so that
    exp(-E(v)) is the visible marginal up to Z (Smolensky 1986; Hinton 2002).

    Args:
        event_shape: shape of one v; flattened inside.
        num_hidden: hidden units.
        weight_std: standard deviation of the initial W.
    """

    def __init__(
        self, event_shape: tuple[int, ...], num_hidden: int, weight_std: float = 0.01
    ) -> None:
        super().__init__(event_shape)
        self.event = EventSpec(event_shape, "binary")
        num_visible = math.prod(event_shape)
        self.weight = nn.Parameter(torch.randn(num_hidden, num_visible) * weight_std)
        self.visible_bias = nn.Parameter(torch.zeros(num_visible))
        self.hidden_bias = nn.Parameter(torch.zeros(num_hidden))

    def energy(self, x: Tensor) -> Tensor:
        return self.energy_given(x, self.latent_input(x))

    def latent_input(self, v: Tensor) -> Tensor:
        """c + W v, (B, num_hidden), of v (B, *event): the log-odds of the hidden units."""
        v = v.flatten(1)
        return F.linear(v, self.weight.to(v.dtype), self.hidden_bias.to(v.dtype))

    def energy_given(self, v: Tensor, latent_input: Tensor) -> Tensor:
        """E(v), (B,), from v (B, *event) and its `latent_input` (B, num_hidden)."""
        v = v.flatten(1)
        return -(v @ self.visible_bias.to(v.dtype)) - F.softplus(latent_input).sum(1)

    @torch.no_grad()
    def sample_hidden(self, v: Tensor, generator: torch.Generator) -> Tensor:
        """h (B, num_hidden) in {0,1} given v (B, *event), all units at once."""
        return self.draw_latent(self.latent_input(v), generator)

    @torch.no_grad()
    def draw_latent(self, latent_input: Tensor, generator: torch.Generator) -> Tensor:
        """As `sample_hidden`, from `latent_input` (B, num_hidden)."""
        return _bernoulli(latent_input, generator)

    @torch.no_grad()
    def sample_visible(self, h: Tensor, generator: torch.Generator) -> Tensor:
        """v (B, *event) in {0,1} given h (B, num_hidden), all units at once."""
        assert self.event_shape is not None
        return _bernoulli(self._visible_input(h), generator).reshape(len(h), *self.event_shape)

    def log_z(self, temperature: float = 1.0, side: Side = "auto") -> float:
        """Exact, by a sum over all states of one side.

        At temperature 1 either side can be summed, and `auto` takes the smaller. At other
        temperatures only the visible side can: the free energy divided by T does not factor.

        Raises:
            ValueError: the side has more than 2**22 states, or cannot be summed.
        """
        num_hidden, num_visible = self.weight.shape
        if side == "auto":
            side = "hidden" if temperature == 1.0 and num_hidden < num_visible else "visible"
        if side == "visible":
            return super().log_z(temperature)
        if temperature != 1.0:
            raise ValueError(
                f"side: 'hidden' needs temperature 1, got {temperature}; the free energy divided "
                "by another temperature does not factor; use side='visible'"
            )
        return self._hidden_log_mass().logsumexp(0).item()

    @torch.no_grad()
    def sample(self, num: int, generator: torch.Generator, temperature: float = 1.0) -> Tensor:
        """Exact, by enumeration of the smaller side."""
        num_hidden, num_visible = self.weight.shape
        if temperature != 1.0 or num_visible <= num_hidden:
            return super().sample(num, generator, temperature)
        cdf = self._hidden_log_mass().softmax(0).cumsum(0).to(generator.device)
        u = torch.rand(num, generator=generator, device=generator.device, dtype=torch.float64)
        which = torch.searchsorted(cdf, u).clamp_(max=len(cdf) - 1)
        h = _bits(which, num_hidden).to(self.weight)
        return self.sample_visible(h, generator)

    def _visible_input(self, h: Tensor) -> Tensor:
        return torch.addmm(self.visible_bias.to(h.dtype), h, self.weight.to(h.dtype))

    @torch.no_grad()
    def _hidden_log_mass(self) -> Tensor:
        """log sum_v exp(-E(v, h)) for every h, (2^num_hidden,) float64."""
        num_hidden = len(self.weight)
        if 2**num_hidden > MAX_STATES:
            raise ValueError(
                f"Rbm: 2^{num_hidden} hidden states are too many to enumerate; "
                "estimate log Z with ebm_dist.evaluation.log_partition (AIS)"
            )
        parts = []
        for index in torch.arange(2**num_hidden, device=self.weight.device).split(2**14):
            h = _bits(index, num_hidden).double()
            own = h @ self.hidden_bias.double()
            parts.append(own + F.softplus(self._visible_input(h)).sum(1))
        return torch.cat(parts)


def _bits(index: Tensor, num: int) -> Tensor:
    return index[:, None] >> torch.arange(num, device=index.device) & 1


def _bernoulli(logit: Tensor, generator: torch.Generator) -> Tensor:
    """Zeros and ones in the dtype of `logit`, a one with probability sigmoid(logit)."""
    # Raw bits, two 32-bit numbers per draw: uniform floats take 1.7 times as long, as much as
    # both matrix products of a sweep.
    num = logit.numel()
    bits = torch.empty((num + 1) // 2, dtype=torch.int64, device=logit.device)
    bits.random_(-(2**63), None, generator=generator)
    # u is uniform on [-2**31, 2**31], and sigmoid(l) = (1 + tanh(l / 2)) / 2, so u must lie below
    # 2**31 tanh(l / 2). The factor exceeds 2**31 by the last bit of a float, so that a saturated
    # unit is never drawn the other way. That is 6e-8 in probability, the grid of uniform floats.
    u = bits.view(torch.int32)[:num].view(logit.shape).to(logit.dtype)
    # In place: zeros and ones without a pass through booleans.
    return u.lt_(logit.mul(0.5).tanh_().mul_(2.0**31 + 2.0**8))


@FAMILY.register
class RbmSection(BoundSection):
    """A restricted Boltzmann machine on binary events, trained through its free energy."""

    name: Literal["rbm"] = "rbm"
    kinds: ClassVar[tuple[EventKind, ...]] = ("binary",)
    example: ClassVar[dict[str, Any]] = {"num_visible": 6, "num_hidden": 3, "weight_std": 0.5}

    num_hidden: PositiveInt = 10
    """Hidden units."""

    num_visible: PositiveInt | None = None
    """Visible units; taken from the data when left out."""

    weight_std: NonNegativeFloat = 0.01
    """Standard deviation of the initial weights."""

    @model_validator(mode="after")
    def _visible_units_fit(self) -> Self:
        if self.num_visible and self.event_shape and self.size != self.num_visible:
            raise ValueError(
                f"num_visible: {self.num_visible}, but event_shape {self.event_shape} has "
                f"{self.size} numbers; leave one of them out"
            )
        return self

    def bind(self, spec: EventSpec) -> Self:
        num = math.prod(spec.shape)
        if self.num_visible not in (None, num):
            raise ValueError(
                f"energy.num_visible: {self.num_visible}, but the data's events {spec.shape} have "
                f"{num} numbers; leave energy.num_visible out to take it from the data"
            )
        return super().bind(spec).model_copy(update={"num_visible": num})

    def module(self) -> Energy:
        if self.event_shape is None and self.num_visible is not None:
            return Rbm((self.num_visible,), self.num_hidden, self.weight_std)
        return Rbm(self.shape, self.num_hidden, self.weight_std)


def rbm(num_visible: int, num_hidden: int, **params: Any) -> Energy:
    """A restricted Boltzmann machine on events (num_visible,); see `Rbm`."""
    return FAMILY.make("rbm", num_visible=num_visible, num_hidden=num_hidden, **params)
