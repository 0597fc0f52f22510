"""Checkpoints of other programs: the same energies and gradients, and no code of theirs is run."""

from __future__ import annotations

import math
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_doc_blocks import blocks_run_by, run_block
from torch import Tensor

from ebm_dist.cli import main
from ebm_dist.core.errors import UserError
from ebm_dist.export.foreign import checkpoint, jem
from ebm_dist.export.reader import open_export

State = dict[str, Tensor]


def jem_state(depth: int = 16, widen: int = 1, num_classes: int = 10) -> State:
    """Random weights with the names and shapes of JEM's program."""
    generator = torch.Generator().manual_seed(0)
    state: State = {}

    def layer(name: str, *shape: int) -> None:
        weight = torch.empty(shape).normal_(generator=generator)
        weight *= (2 / math.prod(shape[1:])) ** 0.5
        state[f"{name}.weight"] = weight
        state[f"{name}.bias"] = 0.1 * torch.empty(shape[0]).normal_(generator=generator)

    layer("f.conv1", 16, 3, 3, 3)
    width = 16
    for group, out in enumerate((16 * widen, 32 * widen, 64 * widen), 1):
        for block in range((depth - 4) // 6):
            name = f"f.layer{group}.{block}"
            layer(f"{name}.conv1", out, width, 3, 3)
            layer(f"{name}.conv2", out, out, 3, 3)
            if width != out or (group > 1 and block == 0):
                layer(f"{name}.shortcut.0", out, width, 1, 1)
            width = out
    layer("f.linear", num_classes, width)
    layer("energy_output", 1, width)
    layer("class_output", num_classes, width)
    return state


def jem_logits(state: State, x: Tensor) -> Tensor:
    """The network in plain operations."""

    def conv(x: Tensor, name: str, stride: int = 1, padding: int = 1) -> Tensor:
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], stride, padding)

    x = conv(x, "f.conv1")
    for group in (1, 2, 3):
        block = 0
        while f"f.layer{group}.{block}.conv1.weight" in state:
            name, stride = f"f.layer{group}.{block}", 2 if group > 1 and block == 0 else 1
            hidden = conv(F.leaky_relu(x, 0.2), f"{name}.conv1")
            hidden = conv(F.leaky_relu(hidden, 0.2), f"{name}.conv2", stride)
            if f"{name}.shortcut.0.weight" in state:
                x = conv(x, f"{name}.shortcut.0", stride, 0)
            x, block = x + hidden, block + 1
    features = F.avg_pool2d(F.leaky_relu(x, 0.2), 8).flatten(1)
    return F.linear(features, state["class_output.weight"], state["class_output.bias"])


def grad_of(energy: Any, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_(True)
    return torch.autograd.grad(energy(x).sum(), x)[0]


def test_an_imported_jem_has_the_energies_and_gradients_of_the_published_network(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = torch.Generator().manual_seed(1)
    buffer = torch.empty(520, 3, 32, 32).uniform_(-1, 1, generator=generator)
    state = jem_state()
    torch.save({"model_state_dict": state, "replay_buffer": buffer}, tmp_path / "jem.pt")
    assert main(["import-weights", "jem", str(tmp_path / "jem.pt"), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out'}\n"
    export = open_export(tmp_path / "out")
    assert export.config["energy"]["depth"] == 16
    assert export.spec.num_classes == 10
    # In float64: where a unit is near 0, float32 may round it to either slope of its activation.
    x, label, energy = buffer[:3].double(), torch.tensor([0, 4, 9]), export.energy.double()
    state = {name: tensor.double() for name, tensor in state.items()}

    def plain(x: Tensor) -> Tensor:
        return -jem_logits(state, x).logsumexp(1)

    def plain_of_label(x: Tensor) -> Tensor:
        return -jem_logits(state, x).gather(1, label[:, None]).squeeze(1)

    pairs = ((energy, plain), (energy.given(label=label), plain_of_label))  # type: ignore[operator]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(grad_of(ours, x), grad_of(theirs, x), rtol=1e-5, atol=1e-5)
    chains = export.chains()
    assert chains is not None
    assert torch.equal(chains[0], buffer[0])
    assert len(chains) == 512
    assert export.kernel().temperature == pytest.approx(0.01**2 / 2)


def test_the_commands_of_the_page_import_and_draw_from_the_replay_buffer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    buffer = torch.zeros(8, 3, 32, 32)
    torch.save({"model_state_dict": jem_state(), "replay_buffer": buffer}, "CIFAR10_MODEL.pt")
    for block in blocks_run_by(__file__, "docs/hub.md"):
        run_block(block, {})
    assert Path("jem.png").is_file()


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def batch_norm(state: State) -> State:
    return {**state, "f.layer1.0.bn1.running_mean": torch.zeros(16)}


def without(name: str) -> Any:
    return lambda state: {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (batch_norm, "not of a network without norms"),
        (without("f.layer2.1.conv2.bias"), "residual.5.bias has shape None"),
        (without("class_output.weight"), "no network of JEM's program"),
        (lambda state: {"f.conv1.weight": 3}, "expected tensors by name"),
        (lambda state: {**state, "f.conv1.bias": torch.zeros(7)}, "stem.bias has shape"),
        (lambda state: {**state, "f.conv1.bias": torch.full((16,), torch.nan)}, "not finite"),
    ],
)
def test_another_network_is_one_line(tmp_path: Path, change: Any, expected: str) -> None:
    torch.save({"model_state_dict": change(jem_state())}, tmp_path / "jem.pt")
    with pytest.raises(UserError, match=expected) as caught:
        jem.import_jem(tmp_path / "jem.pt", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_code_in_a_checkpoint_is_not_run_and_its_size_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, made = tmp_path / "jem.pt", tmp_path / "made"
    torch.save({"model_state_dict": jem_state(), "extra": Evil(made)}, path)
    with pytest.raises(UserError, match="nothing else is read"):
        jem.import_jem(path, tmp_path / "out")
    assert not made.exists()
    path.write_bytes(b"\x80\x02not a checkpoint")
    with pytest.raises(UserError, match="nothing else is read"):
        jem.import_jem(path, tmp_path / "out")
    monkeypatch.setattr(checkpoint, "MAX_BYTES", 2**20)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("archive/data/0", bytes(2**21))
    assert path.stat().st_size < 2**14
    with pytest.raises(UserError, match="2097152 bytes, more than"):
        jem.import_jem(path, tmp_path / "out")
