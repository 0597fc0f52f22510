"""Blocks that are run again in the backward in place of being kept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ebm_dist import energies
from ebm_dist.config.run_config import load
from ebm_dist.core.errors import UserError
from ebm_dist.energies.networks.layers import TransformerBlocks


def transformer(depth: int) -> nn.Module:
    return energies.make("vit", event_shape=(1, 8, 8), width=16, depth=depth, num_heads=2)


def images() -> Tensor:
    return torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def kept_numbers(energy: nn.Module) -> int:
    """Numbers that the graph of one forward holds for its backward."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        energy(images()).sum()
    return sum(kept.values())


def ask(energy: nn.Module) -> nn.Module:
    for module in energy.modules():
        if isinstance(module, TransformerBlocks):
            module.recompute = True
    return energy


def test_each_further_block_keeps_its_input_alone():
    tokens = 4 * 4 * 16
    grown = kept_numbers(ask(transformer(6))) - kept_numbers(ask(transformer(2)))
    plain = kept_numbers(transformer(6)) - kept_numbers(transformer(2))
    assert grown <= 4 * tokens
    assert plain > 5 * grown


def test_second_derivatives_are_those_of_kept_activations():
    gradients = []
    for energy in (transformer(2), ask(transformer(2))):
        x = images().requires_grad_(True)
        (slope,) = torch.autograd.grad(energy(x).sum(), x, create_graph=True)
        slope.square().sum().backward()
        gradients.append([p.grad for p in energy.parameters() if p.grad is not None])
    for kept, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, kept, rtol=1e-5, atol=1e-7)


def test_a_sampler_runs_each_block_once_a_step():
    energy = ask(transformer(1)).requires_grad_(False)
    calls = []
    blocks = next(m for m in energy.modules() if isinstance(m, TransformerBlocks))
    blocks[0].register_forward_hook(lambda *_: calls.append(1))
    x = images().requires_grad_(True)
    torch.autograd.grad(energy(x).sum(), x)
    assert len(calls) == 1


def test_a_config_that_has_no_block_to_recompute_is_refused():
    with pytest.raises(UserError, match=r"recompute_activations: true, but energy\.name mlp"):
        load(
            {
                "run": {"name": "x"},
                "data": {"source": "digits"},
                "energy": {"name": "mlp"},
                "sampler": {"name": "langevin", "step_size": 1.0, "noise_std": 0.1},
                "learner": {"recompute_activations": True},
            }
        )
