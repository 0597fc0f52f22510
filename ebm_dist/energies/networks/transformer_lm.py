"""A transformer on token sequences, as a free energy or as a normalised language model."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import PositiveInt, model_validator
from torch import Tensor, nn

from ebm_dist.core.types import EventKind, EventSpec
from ebm_dist.energies.family import FAMILY, Activation, AnalyticEnergy, Energy
from ebm_dist.energies.networks.layers import Head, TransformerBlock, TransformerBlocks
from ebm_dist.energies.networks.network import NetworkSection


class TokenBody(nn.Module):
    """One-hot tokens (B, L, V) -> hidden tokens (B, L, width).

    The embedding is linear in x, so the energy has a gradient in the one-hot events, which
    gradient-informed discrete samplers use.
    """

    def __init__(self, section: TransformerLmSection, shape: tuple[int, ...]) -> None:
        super().__init__()
        length, num_values = shape
        self.causal = section.causal
        self.embed = nn.Linear(num_values, section.width, bias=False)
        self.position = nn.Parameter(torch.randn(length, section.width) * 0.02)
        self.start = nn.Parameter(torch.randn(1, 1, section.width) * 0.02)
        self.blocks = TransformerBlocks(
            *(
                TransformerBlock(
                    section.width,
                    section.num_heads,
                    expansion=section.expansion,
                    activation_name=section.activation,
                    causal=section.causal,
                )
                for _ in range(section.depth)
            )
        )
        self.norm = nn.LayerNorm(section.width)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x)
        if self.causal:
            # Token t is predicted from the tokens before it, the first one from a start token.
            start = self.start.to(tokens.dtype).expand(len(x), 1, -1)
            tokens = torch.cat([start, tokens[:, :-1]], 1)
        return self.norm(self.blocks(tokens + self.position))


class MeanToken(nn.Module):
    """Hidden tokens of `body`, averaged over the sequence: (B, L, V) -> (B, width)."""

    def __init__(self, body: TokenBody) -> None:
        super().__init__()
        self.tokens = body

    def forward(self, x: Tensor) -> Tensor:
        return self.tokens(x).mean(1)


class LanguageModel(AnalyticEnergy):
    """E(x) = -sum_t log p(x_t | x_<t), x one-hot of shape (B, L, V): log Z = 0.

    A normalised energy with an exact sampler, and a base for energies that reweight it (`sum`
    of this one and another).
    """

    def __init__(self, body: TokenBody, width: int, shape: tuple[int, ...]) -> None:
        super().__init__(shape)
        self.event = EventSpec(shape, "categorical")
        self.body = body
        self.head = Head(width, shape[1])

    def forward(self, x: Tensor, **context: Tensor) -> Tensor:
        # Autocast stays on, as for every network; the head and the energies are float32 anyway.
        return Energy.forward(self, x, **context)

    def energy(self, x: Tensor) -> Tensor:
        log_prob = self.next_logits(x).log_softmax(-1)
        return -(x.to(log_prob.dtype) * log_prob).flatten(1).sum(1)

    def next_logits(self, x: Tensor) -> Tensor:
        """Logits (B, L, V) of every token given the ones before it."""
        return self.head(self.body(x.to(self.head.weight.dtype)))

    def log_z(self, temperature: float = 1.0) -> float:
        """0 at temperature 1; not known at others."""
        return 0.0 if temperature == 1.0 else super().log_z(temperature)

    @torch.no_grad()
    def sample(self, num: int, generator: torch.Generator, temperature: float = 1.0) -> Tensor:
        """Token by token; exact at temperature 1."""
        if temperature != 1.0:
            return super().sample(num, generator, temperature)
        assert self.event_shape is not None
        length, num_values = self.event_shape
        weight = self.head.weight
        x = torch.zeros(num, length, num_values, device=weight.device)
        for t in range(length):
            law = self.next_logits(x)[:, t].softmax(-1)
            token = torch.multinomial(law, 1, generator=generator)
            x[:, t].scatter_(1, token, 1.0)
        return x


@FAMILY.register
class TransformerLmSection(NetworkSection):
    """A transformer on one-hot sequences (length, vocabulary)."""

    name: Literal["transformer_lm"] = "transformer_lm"
    recomputes_activations: ClassVar[bool] = True
    kinds: ClassVar[tuple[EventKind, ...]] = ("categorical",)
    example: ClassVar[dict[str, Any]] = {
        "event_shape": (5, 3),
        "width": 16,
        "depth": 1,
        "num_heads": 2,
    }

    causal: bool = False
    """True: a normalised language model, whose energy is minus the log-likelihood. False: every
    token attends to every other, and the mean token gives the energy."""

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

    @model_validator(mode="after")
    def _causal_has_no_classes(self) -> Self:
        if self.causal and (self.num_classes is not None or self.confinement):
            raise ValueError(
                "causal: a normalised language model has neither num_classes nor confinement; "
                "leave them out, or set causal=false"
            )
        return self

    def module(self) -> Energy:
        if len(self.shape) != 2:
            raise ValueError(
                f"energy.name: transformer_lm takes one-hot sequences (length, vocabulary), the "
                f"events have shape {self.shape}"
            )
        body = TokenBody(self, self.shape)
        if self.causal:
            return LanguageModel(body, self.width, self.shape)
        return self.wrap(MeanToken(body), self.width)
