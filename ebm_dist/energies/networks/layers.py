"""Layers that the energy networks share: activations, convolutions, attention, the head.

All of them can be differentiated twice, since penalties on the input gradient and score
matching train through that gradient. None works in place or mixes the events of a batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from ebm_dist.energies.family import Activation
from ebm_dist.energies.networks.embedding import Modulation

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
    "leaky_relu": lambda: nn.LeakyReLU(0.2),
    "relu": nn.ReLU,
}


def activation(name: Activation) -> nn.Module:
    """The activation `name`; leaky_relu has slope .2, as in the image EBMs."""
    return _ACTIVATIONS[name]()


def normed(layer: nn.Module, spectral_norm: bool) -> nn.Module:
    """`layer`, its weight divided by its largest singular value if `spectral_norm`.

    Miyato et al. (2018), arXiv:1802.05957. Every call in training mode runs a power iteration
    and so changes the energy; put a module in eval mode for sampling.
    """
    return parametrizations.spectral_norm(layer) if spectral_norm else layer


def image_channels(name: str, shape: tuple[int, ...]) -> int:
    """Channels of an image event (C, H, W); ValueError for any other event."""
    if len(shape) != 3:
        raise ValueError(
            f"energy.name: {name} takes images (C, H, W), the events have shape {shape}; "
            "use energy.name=mlp, or image data"
        )
    return shape[0]


class Head(nn.Linear):
    """The last linear layer, always in float32 or wider.

    bf16 has 8 significant bits: energies near 100 would be 0.5 apart, and the gap
    between data and negatives is smaller than that.
    """

    def forward(self, input: Tensor) -> Tensor:
        dtype = torch.promote_types(input.dtype, torch.float32)
        with torch.autocast(input.device.type, enabled=False):
            return F.linear(input.to(dtype), self.weight.to(dtype), self.bias.to(dtype))


_FUSED_TOKENS = 48
"""Fewest tokens for which the fused backward is used. Measured at 64 events, 4 heads of 32, one
core: ordinary operations take .7 of its time at 16 tokens, 1.2 at 64, and 2.6 at 196."""


class _FusedAttention(torch.autograd.Function):
    """softmax(q k^T / sqrt(d)) v by the fused kernel, differentiable twice.

    The backward of the fused kernel cannot be differentiated. So a gradient that may be
    differentiated again is computed by ordinary operations. Otherwise, as in every step of a
    sampler, long sequences use the fused backward, although it repeats the forward.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        q, k, v, ctx.causal = inputs
        ctx.save_for_backward(q, k, v)

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor):
        q, k, v = ctx.saved_tensors
        (grad,) = grad_outputs
        # A backward that is itself differentiated (create_graph) runs with grad mode enabled.
        if not torch.is_grad_enabled() and q.shape[-2] >= _FUSED_TOKENS:
            with torch.enable_grad():
                inputs = [t.detach().requires_grad_(True) for t in (q, k, v)]
                out = F.scaled_dot_product_attention(*inputs, is_causal=ctx.causal)
                return (*torch.autograd.grad(out, inputs, grad), None)
        scale = q.shape[-1] ** -0.5
        weight = _attention_weight(q, k, scale, ctx.causal)
        grad_v = weight.transpose(-2, -1) @ grad
        grad_weight = grad @ v.transpose(-2, -1)
        centred = grad_weight - (grad_weight * weight).sum(-1, keepdim=True)
        grad_score = weight * centred * scale
        return grad_score @ k, grad_score.transpose(-2, -1) @ q, grad_v, None


def _attention_weight(q: Tensor, k: Tensor, scale: float, causal: bool) -> Tensor:
    score = q @ k.transpose(-2, -1) * scale
    if causal:
        num = score.shape[-1]
        future = torch.ones(num, num, dtype=torch.bool, device=score.device).triu(1)
        score = score.masked_fill(future, float("-inf"))
    # float32 softmax: in bf16 the weights of a row would not sum to 1.
    dtype = torch.promote_types(score.dtype, torch.float32)
    return score.softmax(-1, dtype=dtype).to(q.dtype)


class Attention(nn.Module):
    """Multi-head self-attention, (B, N, D) -> (B, N, D)."""

    def __init__(self, width: int, num_heads: int, *, causal: bool = False) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"energy.width: {width} is not a multiple of num_heads={num_heads}")
        self.num_heads = num_heads
        self.causal = causal
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(
            self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.num_heads
        ).unbind(0)
        mixed = _FusedAttention.apply(q, k, v, self.causal)
        return self.out(rearrange(mixed, "b h n d -> b n (h d)"))


class TransformerBlock(nn.Module):
    """Attention and a two-layer perceptron, each behind a layer norm and in a residual branch.

    An embedding (B, E) modulates what the norms return, as in DiT (Peebles & Xie 2023,
    arXiv:2212.09748).
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        expansion: int = 4,
        activation_name: Activation = "gelu",
        causal: bool = False,
        embedding: int | None = None,
    ) -> None:
        super().__init__()
        self.attention = nn.Sequential(
            nn.LayerNorm(width), Attention(width, num_heads, causal=causal)
        )
        self.mlp = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, expansion * width),
            activation(activation_name),
            nn.Linear(expansion * width, width),
        )
        self.modulations = nn.ModuleList(
            [] if embedding is None else [Modulation(embedding, width) for _ in range(2)]
        )

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        if embedding is None:
            x = x + self.attention(x)
            return x + self.mlp(x)
        for (norm, *layers), modulate in zip((self.attention, self.mlp), self.modulations):
            hidden = modulate(norm(x), embedding)
            for layer in layers:
                hidden = layer(hidden)
            x = x + hidden
        return x


class TransformerBlocks(nn.Sequential):
    """Blocks in sequence; the learner may switch on activation checkpointing."""

    recompute: bool = False
    """Store only each block's input where parameters need a gradient, and run the block again in
    the backward (Chen et al. 2016, arXiv:1604.06174): memory of one block in place of all, for a
    third more time. Samplers freeze the parameters, so they are not slowed down."""

    def forward(self, input: Tensor, embedding: Tensor | None = None) -> Tensor:
        x = input
        for block in self:
            if self.recompute and any(p.requires_grad for p in block.parameters()):
                # The reentrant form has no second derivative, which penalties on dE/dx need.
                # Blocks draw no random numbers, so no generator state has to be restored.
                x = checkpoint(block, x, embedding, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, embedding)
        return x
