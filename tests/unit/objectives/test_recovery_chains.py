"""The energy of recovery likelihood's chains: how samplers move them, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ebm_dist import energies, objectives
from ebm_dist.core.types import Batch, Negatives
from ebm_dist.energies.context import bind, chain_unit
from ebm_dist.samplers import FAMILY, Engine, run_chain
from ebm_dist.samplers.compile import engine as engine_module

STDS = (0.3, 0.6, 0.9)
LEVELS = {"num_levels": 3, "noise_stds": STDS}


def section(**params: Any) -> objectives.ObjectiveSection:
    params = {"noise_std": STDS, "conditioning": "level", "chains": "pool", **params}
    found = objectives.FAMILY.section("recovery_likelihood", **params)
    assert isinstance(found, objectives.ObjectiveSection)
    return found


def context(seed: int = 0, num: int = 6) -> dict[str, Tensor]:
    noise = torch.randn(num, 2, generator=torch.Generator().manual_seed(seed))
    return {"level": torch.arange(num) % 3, "condition": noise}


@pytest.mark.parametrize("energy", [LEVELS, {"num_classes": 3}], ids=["levels", "logits"])
def test_the_tied_energy_is_that_of_the_level_and_of_the_way_to_the_noisy_pair(
    energy: dict[str, Any],
) -> None:
    net = energies.make("mlp", event_shape=(2,), widths=(8,), **energy)
    given = bind(section(temperature=0.5).chain_energy(net), **context())
    x, level = torch.randn(6, 2), context()["level"]
    unit = chain_unit(given, x)
    assert unit is not None
    # s sqrt(1 - s^2) of a level over that of the first.
    width = torch.tensor([s * (1 - s**2) ** 0.5 for s in STDS])
    torch.testing.assert_close(unit.flatten(), (width / width[0])[level])
    own = net(x, level=level) if "num_levels" in energy else -net.logits(x)[range(6), level]
    way = (context()["condition"] - x).square().sum(1) / torch.tensor(STDS)[level].square()
    torch.testing.assert_close(given(x / unit), own + 0.5 * 0.5 * way)


@pytest.mark.parametrize("name", ["langevin", "mala"])
def test_compiled_blocks_move_tied_chains_as_single_steps_do(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(
        engine_module, "compile_graph", lambda g, _: seen.append(g) or (lambda t: g(*t))
    )
    net = energies.make("mlp", event_shape=(2,), widths=(8,), **LEVELS).eval()
    tied = section().chain_energy(net).eval()
    kernel = FAMILY.make(name, step_size=0.02, temperature=1.0)
    engine, x = Engine("compiled", background=False), torch.randn(6, 2)
    for seed in range(2):
        both = [
            run_chain(kernel, x, bind(tied, **context(seed)), 4, torch.Generator(), engine=e)
            for e in (None, engine)
        ]
        torch.testing.assert_close(both[0].position, both[1].position, rtol=1e-4, atol=1e-4)
    assert seen
    num = len(seen)
    run_chain(kernel, x, bind(tied, **context(2)), 4, torch.Generator(), engine=engine)
    assert len(seen) == num


def test_chains_without_pairs_are_refused_in_one_line() -> None:
    net = energies.make("mlp", event_shape=(2,), widths=(8,), **LEVELS)
    x = torch.randn(4, 2)
    bare = (x, torch.zeros(4), torch.zeros(4, dtype=torch.int64), torch.zeros(4))
    for carried in ({}, {"level": torch.arange(4) % 3}):
        with pytest.raises(ValueError, match=r"no (level and no )?pair, .* buffer\.context") as e:
            section().build()(net, Batch(x), Negatives(*bare, carried))
        assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("energy", "words"),
    [
        ({"num_levels": 2, "noise_stds": (0.1, 0.2)}, r"energy\.num_levels: 2, .* 3 levels"),
        ({"num_classes": 4}, r"energy\.num_classes: 4, .* 3 levels"),
        (
            {**LEVELS, "num_classes": 4, "classes": "embedding"},
            r"energy\.num_classes: the energy needs the label .* leave the key out$",
        ),
    ],
)
def test_an_energy_of_other_levels_is_refused_before_the_run(
    energy: dict[str, Any], words: str
) -> None:
    net = energies.make("mlp", event_shape=(2,), widths=(8,), **energy)
    for chains in ("pool", "loss"):
        with pytest.raises(ValueError, match=words):
            section(chains=chains).chain_energy(net)
