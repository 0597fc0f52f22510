"""A checkpoint of IGEBM's PyTorch port: the same energies and gradients in other units."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_doc_blocks import blocks_run_by, run_block
from torch import Tensor

from ebm_dist.cli import main
from ebm_dist.core.errors import UserError
from ebm_dist.export.foreign.igebm import import_igebm
from ebm_dist.export.reader import open_export
from ebm_dist.export.sample import sample

State = dict[str, Tensor]

WIDTHS = (4, 4, 8, 8, 8, 8)
"""The program's (128, 128, 256, 256, 256, 256) in the small; its other shapes follow."""


def igebm_state(num_classes: int | None) -> State:
    """Random weights with the names and shapes of the program's module."""
    generator = torch.Generator().manual_seed(0)
    state: State = {}

    def normal(name: str, *shape: int, std: float = 1.0, mean: float = 0.0) -> None:
        state[name] = mean + std * torch.empty(shape).normal_(generator=generator)

    def conv(name: str, *shape: int, bias: bool, std: float = 1.0) -> None:
        normal(f"{name}.weight_orig", *shape, std=std)
        normal(f"{name}.weight_u", shape[0])
        normal(f"{name}.weight", *shape)  # of an earlier call: nothing reads it
        if bias:
            normal(f"{name}.bias", shape[0], std=0.1)

    width = WIDTHS[0]
    conv("conv1", width, 3, 3, 3, bias=True)
    for index, out in enumerate(WIDTHS):
        name = f"blocks.{index}"
        conv(f"{name}.conv1", out, width, 3, 3, bias=num_classes is None)
        # The largest singular value is above 1 in some blocks, and below in the others.
        std = 1.0 if index % 3 else 0.05
        conv(f"{name}.conv2", out, out, 3, 3, bias=num_classes is None, std=std)
        if num_classes is not None:
            normal(f"{name}.class_embed.weight", num_classes, 4 * out, std=0.3, mean=0.5)
        if index % 2 == 0:
            conv(f"{name}.skip.0", out, width, 1, 1, bias=False)
        width = out
    # Spectral norms leave small gradients; these are on both sides of the sampler's clamp.
    normal("linear.weight", 1, width, std=50)
    normal("linear.bias", 1)
    return state


def igebm_energy(state: State, x: Tensor, label: Tensor | None) -> Tensor:
    """The network in plain operations, at its first call."""

    def conv(x: Tensor, name: str, *, padding: int = 1, bound: bool = False) -> Tensor:
        weight, u = state[f"{name}.weight_orig"], state[f"{name}.weight_u"]
        matrix = weight.reshape(len(weight), -1)
        v = F.normalize(u @ matrix, dim=0)
        u = F.normalize(matrix @ v, dim=0)
        gain = u @ matrix @ v
        weight = weight / (gain + 1e-6) * min(float(gain), 1.0) if bound else weight / gain
        return F.conv2d(x, weight, state.get(f"{name}.bias"), padding=padding)

    x = F.leaky_relu(conv(x, "conv1"), 0.2)
    for index in range(len(WIDTHS)):
        name = f"blocks.{index}"
        hidden = conv(x, f"{name}.conv1")
        scale1 = scale2 = x.new_ones(())
        shift1 = shift2 = x.new_zeros(())
        if label is not None:
            row = state[f"{name}.class_embed.weight"][label][:, :, None, None]
            scale1, scale2, shift1, shift2 = row.split(row.shape[1] // 4, 1)
        hidden = F.leaky_relu(scale1 * hidden + shift1, 0.2)
        hidden = scale2 * conv(hidden, f"{name}.conv2", bound=True) + shift2
        x = hidden + (x if index % 2 else conv(x, f"{name}.skip.0", padding=0))
        x = F.leaky_relu(x if index % 2 else F.avg_pool2d(x, 2), 0.2)
    features = x.relu().sum((2, 3))
    return F.linear(features, state["linear.weight"], state["linear.bias"]).squeeze(1)


def with_gradient(energy: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_(True)
    value = energy(x)
    return value.detach(), torch.autograd.grad(value.sum(), x)[0]


@pytest.mark.parametrize("num_classes", [None, 10])
def test_an_imported_igebm_has_the_energies_and_gradients_of_the_published_network(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], num_classes: int | None
) -> None:
    state, file, out = igebm_state(num_classes), tmp_path / "igebm.pt", tmp_path / "out"
    torch.save(state, file)
    assert main(["import-weights", "igebm", str(file), str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    export = open_export(out)
    assert export.spec.num_classes == num_classes
    generator = torch.Generator().manual_seed(1)
    # In float64: where a unit is near 0, float32 may round it to either slope of its activation.
    x = torch.rand(3, 3, 32, 32, generator=generator).double()  # in the program's [0, 1]
    label = None if num_classes is None else torch.tensor([0, 4, 9])
    plain = {name: tensor.double() for name, tensor in state.items()}
    theirs, their_grad = with_gradient(lambda x: igebm_energy(plain, x, label), x)
    energy = export.energy.double()
    given = energy if label is None else energy.given(label=label)  # type: ignore[operator]
    ours, our_grad = with_gradient(given, 2 * x - 1)
    assert theirs.std() > 0.1
    assert their_grad.abs().max() > 0.01
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(2 * our_grad, their_grad, rtol=1e-5, atol=1e-5)


def test_a_move_of_the_imported_sampler_is_the_programs_move_in_other_units(
    tmp_path: Path,
) -> None:
    state = igebm_state(None)
    torch.save({"model": {f"module.{name}": t for name, t in state.items()}}, tmp_path / "igebm.pt")
    export = open_export(import_igebm(tmp_path / "igebm.pt", tmp_path / "out"))
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(2, 3, 32, 32, generator=generator)
    kernel, energy = export.kernel(), export.energy.eval()
    moved, _ = kernel.step(kernel.init(2 * x - 1, energy), energy, generator.manual_seed(2))
    _, grad = with_gradient(lambda x: igebm_energy(state, x, None), x)
    assert 0.1 < (grad.abs() > 0.01).float().mean() < 0.9
    # The program adds the noise before it takes the gradient: its chain, half a move apart.
    noise = 0.005 * torch.empty_like(x).normal_(generator=generator.manual_seed(2))
    theirs = (x + noise - 10 * grad.clamp(-0.01, 0.01)).clamp(0, 1)
    torch.testing.assert_close((moved.position + 1) / 2, theirs, rtol=0, atol=1e-5)


def test_an_imported_igebm_with_classes_draws_every_class(tmp_path: Path) -> None:
    torch.save(igebm_state(10), tmp_path / "igebm.pt")
    import_igebm(tmp_path / "igebm.pt", tmp_path / "out")
    x, energy = sample(tmp_path / "out", 10, num_steps=1)
    assert x.shape == (10, 3, 32, 32)
    assert x.abs().max() <= 1
    assert energy.isfinite().all()


def test_the_commands_of_the_page_import_and_draw_a_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(igebm_state(10), "igebm.pt")
    for block in blocks_run_by(__file__, "docs/hub.md"):
        run_block(block, {})
    assert Path("igebm.png").is_file()


def without(name: str) -> Any:
    return lambda state: {key: value for key, value in state.items() if key != name}


def having(name: str, *shape: int) -> Any:
    return lambda state: {**state, name: torch.ones(shape)}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (without("blocks.3.conv2.weight_u"), "it has no blocks.3.conv2.weight_u$"),
        (without("linear.bias"), "it has no linear.bias$"),
        (without("blocks.2.class_embed.weight"), "it has no blocks.2.conv1.bias$"),
        (lambda state: {}, "it has no conv1.weight_orig$"),
        (having("blocks.0.bn.weight", 4), "'blocks.0.bn.weight' has no place"),
        (having("blocks.6.conv1.bias", 8), "it has no blocks.6.conv1.weight_orig$"),
        (having("blocks.0.conv1.weight_u", 5), "PyTorch port"),
        (having("blocks.0.conv2.weight_orig", 4), "PyTorch port|has shape"),
        (having("blocks.0.class_embed.weight", 7, 16), "has shape"),
        (having("conv1.weight_orig", 0, 3, 3, 3), "PyTorch port"),
        (having("conv1.bias", 5), r"stem.bias has shape \(5,\), an IGEBM of width 4 has \(4,\)"),
        (lambda state: {**state, "conv1.bias": torch.full((4,), torch.nan)}, "not finite"),
        (lambda state: {**state, "conv1.weight_u": torch.zeros(4)}, "not finite"),
        (lambda state: {"conv1.bias": 3}, "expected tensors by name"),
    ],
)
def test_another_network_than_igebm_is_one_line(tmp_path: Path, change: Any, expected: str) -> None:
    torch.save(change(igebm_state(10)), tmp_path / "igebm.pt")
    with pytest.raises(UserError, match=expected) as caught:
        import_igebm(tmp_path / "igebm.pt", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
