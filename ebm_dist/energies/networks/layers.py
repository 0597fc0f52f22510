"""Layers that the energy networks share: activations, convolutions, attention, the head.

All of them can be differentiated twice, since penalties on the input gradient and score
matching train through it, and none of them works in place or looks across the batch.
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

    Miyato et al. (2018), arXiv:1802.05957. The power iteration runs in training mode
    only, so a module that samples must be in eval mode for its energy to stand still.
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
"""Measured at 64 events, 4 heads of 32, one core: the ordinary operations take .7 of the fused
kernel's time at 16 tokens, 1.2 times it at 64, and 2.6 times at 196."""


class _FusedAttention(torch.autograd.Function):
    """softmax(q k^T / sqrt(d)) v by the fused kernel, differentiable twice.

    The fused kernels' own backward has no derivative. So where this gradient may be
    differentiated again, it is made of ordinary operations; else, as in every step of a
    sampler, long sequences take the fused kernel's, though it repeats its forward for that.
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
        # A backward runs under grad mode if it is itself recorded.
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
    """Attention and a two-layer perceptron, each after a layer norm and added back."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        expansion: int = 4,
        activation_name: Activation = "gelu",
        causal: bool = False,
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

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.mlp(x)


class TransformerBlocks(nn.Sequential):
    """Blocks one after the other, which a learner may ask to keep less for the backward."""

    recompute: bool = False
    """Keep each block's input alone where parameters need a gradient, and run the block again in
    the backward (Chen et al. 2016, arXiv:1604.06174): memory of one block in place of all, for a
    third more time. A sampler, whose parameters need none, is not slowed down."""

    def forward(self, input: Tensor) -> Tensor:
        x = input
        for block in self:
            if self.recompute and any(p.requires_grad for p in block.parameters()):
                # Not the reentrant kind: it has no second derivative, which penalties on dE/dx
                # take. Blocks draw no random numbers, so there is no generator to put back.
                x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x)
        return x
