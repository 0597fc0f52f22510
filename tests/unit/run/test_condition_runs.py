"""Runs of conditional energies E(y | x): the bits, what exports hold and draw, what is refused."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chains_with_context import (
    QUIET,
    assert_same_chains,
    chains,
    changed,
    equal,
    resumed_on_ray,
)
from safetensors.torch import save_file
from typer.testing import CliRunner

import ebm_dist
from ebm_dist.cli import app
from ebm_dist.core.errors import UserError
from ebm_dist.data import DataConfig, load_split
from ebm_dist.export import suites
from ebm_dist.export.sample import draw

CONFIG: dict[str, Any] = {
    **QUIET,
    "run": {"seed": 3, "steps": 4},
    "data": {"source": "digits", "batch_size": 16, "condition_size": 3},
    "energy": {"name": "mlp", "widths": [8], "condition_shape": "data"},
    "sampler": {"name": "langevin", "step_size": 1.0, "noise_std": 0.01, "num_steps": 3},
    "buffer": {
        "capacity": 32,
        "num_shards": 2,
        "reinit_prob": 0.3,
        "context": {"condition": "data"},
    },
    "workers": {"num_workers": 1, "num_chains": 8, "num_threads": 1},
}


config = partial(changed, CONFIG)


def test_sync_is_bitwise_with_conditions_whoever_moves_the_chains_and_after_a_resume(
    tmp_path: Path,
) -> None:
    base = config(tmp_path)
    ebm_dist.train(base, run_dir=tmp_path / "a")
    four = {**base, "workers": {**base["workers"], "num_workers": 4}}
    ebm_dist.train({**four, "run": {**base["run"], "steps": 2}}, run_dir=tmp_path / "b")
    ebm_dist.train(four, run_dir=tmp_path / "b", resume="must")
    assert equal(tmp_path / "a", tmp_path / "b")

    # A chain keeps its condition, that of a datum, until it restarts.
    before, after = chains(tmp_path / "a", 2), chains(tmp_path / "a", 4)
    moves, aged = (after[key] - before[key] for key in ("generation", "age"))
    old = before["age"] > 0
    kept, begun = old & (aged == moves), old & (aged < moves)
    held = (before["context/condition"] == after["context/condition"]).all((1, 2, 3))
    assert kept.any()
    assert held[kept].all()
    assert begun.any()
    assert not held[begun].any()
    data = load_split(DataConfig(source="digits"), "train").x[..., :3]
    known = {row.numpy().tobytes() for row in data}
    assert all(row.tobytes() in known for row in after["context/condition"])


@pytest.mark.ray
def test_conditions_and_labels_killed_and_resumed_on_ray_train_bit_for_bit_as_in_one_process(
    tmp_path: Path,
) -> None:
    """On one node workers read the conditions from rows of shared memory, labels with the lease."""
    base = config(
        tmp_path,
        energy={"num_classes": "data", "classes": "embedding"},
        buffer={"context": {"condition": "data", "label": "data"}},
    )
    four = {**base["workers"], "num_workers": 4}
    inline, resumed = resumed_on_ray({**base, "workers": four}, tmp_path, 2)
    assert equal(inline, resumed)
    assert_same_chains(inline, resumed, 4)


def test_an_export_keeps_the_condition_of_each_chain_and_draws_given_them_or_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = config(tmp_path, evaluation={"every": 4, "num_samples": 32, "fidelity": False})
    export = ebm_dist.train(base, run_dir=tmp_path / "r").open_export()
    assert (export.spec.shape, export.spec.condition_shape) == ((1, 8, 5), (1, 8, 3))
    stored = export.stored()
    assert stored is not None
    last = chains(tmp_path / "r", 4)
    of_chain = dict(zip(map(bytes, last["position"]), map(bytes, last["context/condition"])))
    x, given = stored.x.numpy(), stored.context["condition"].numpy()
    assert [of_chain[bytes(row)] for row in x] == [bytes(row) for row in given]

    def is_given_its_own(drawn: Any) -> None:
        condition = drawn.context["condition"]
        expected = export.energy.given(condition=condition)(drawn.x)
        torch.testing.assert_close(drawn.energy, expected)

    drawn = draw(export, 80, 2)
    is_given_its_own(drawn)
    assert {bytes(row) for row in drawn.context["condition"].numpy()} == {bytes(r) for r in given}
    drawn = draw(export, 20, 0, start="chains")
    is_given_its_own(drawn)
    assert all(of_chain[bytes(a.numpy())] == bytes(b.numpy()) for a, b in
               zip(drawn.x, drawn.context["condition"]))  # fmt: skip

    asked = np.random.default_rng(0).uniform(-1, 1, (3, 1, 8, 3))
    drawn = draw(export, 7, 2, condition=asked)
    is_given_its_own(drawn)
    turns = np.arange(7) % 3
    assert np.array_equal(drawn.context["condition"].numpy(), asked[turns].astype(np.float32))
    again, energy = ebm_dist.sample(export, 7, condition=asked, num_steps=2)
    assert torch.equal(again, drawn.x)
    assert torch.equal(energy, drawn.energy)

    monkeypatch.chdir(tmp_path)
    np.save("asked.npy", asked)
    command = ["sample", "r", "--num", "7", "--steps", "2", "--condition", "asked.npy"]
    for out in ("out.npz", "out.png"):
        done = CliRunner().invoke(app, [*command, "--out", out], catch_exceptions=False)
        assert done.exit_code == 0
    with np.load("out.npz") as arrays:
        assert np.array_equal(arrays["x"], drawn.x.numpy())
        assert np.array_equal(arrays["condition"], drawn.context["condition"].numpy())
    wrong = {
        "expected an array": asked[:, :, :, :2],
        "not finite": np.full((1, 1, 8, 3), np.nan),
    }
    for line, condition in wrong.items():
        with pytest.raises(UserError, match=f"condition: .*{line}"):
            ebm_dist.sample(export, 7, condition=condition)
    with pytest.raises(UserError, match="each of the run's chains has its own"):
        draw(export, 7, 0, start="chains", condition=asked)
    with pytest.raises(UserError, match=r"--suite density: .* conditional energy.* --suite fid"):
        suites.evaluate(export, "density")

    begun = {**base["run"], "init_from": str(export.path), "init_chains": True, "steps": 1}
    ebm_dist.train({**base, "run": begun}, run_dir=tmp_path / "more")
    save_file({"x": stored.x}, export.path / "chains.safetensors")
    for start in ("noise", "chains"):
        with pytest.raises(UserError, match=r"its chains lost their conditions; .* --condition"):
            draw(export, 5, 0, start=start)  # type: ignore[arg-type]
    save_file(
        {"x": stored.x, "condition": stored.context["condition"][..., :2].contiguous()},
        export.path / "chains.safetensors",
    )
    with pytest.raises(UserError, match="expected finite conditions of shape"):
        draw(export, 5, 0)


REFUSED: dict[str, dict[str, Any]] = {
    r"data\.condition_size: 8, but the last axis .* to at most 7": {"data": {"condition_size": 8}},
    r"data\.condition_size: 3, but energy\.name mlp takes no condition; set "
    r"energy\.condition_shape: data": {"energy": {"name": "mlp"}},
    r"energy\.condition_shape: 'data', but the data has no conditions; set data\.condition_size": {
        "data": {"condition_size": None},
    },
    r"energy\.condition_shape: \(1, 8, 4\), but the data's .* \(1, 8, 3\); set it to data": {
        "energy": {"name": "mlp", "condition_shape": [1, 8, 4]},
    },
    r"energy\.condition_shape: \(1, 8, 3\), expected the sides of \(1, 8, 5\)": {
        "energy": {"name": "resnet", "condition_shape": "data"},
    },
    r"buffer\.context\.condition: missing, but .* set it to data": {"buffer": {"context": {}}},
    r"sampler\.adapt_steps: 9, but the warm-up has no condition, .* set it to 0": {
        "sampler": {"name": "mala", "step_size": 0.1, "adapt_steps": 9},
    },
    r"data\.condition_size: categorical events are one-hot": {
        "data": {"source": "toy:potts_chain", "toy_samples": 64},
    },
    r"energy\.condition_shape: the energy needs the condition .* objective\.name score_matching": {
        "objective": {"name": "score_matching"},
        "buffer": {"context": {}},
    },
}


@pytest.mark.parametrize("line", REFUSED)
def test_a_condition_that_fits_nothing_is_one_line(line: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=line) as caught:
        ebm_dist.train(config(tmp_path, **REFUSED[line]), run_dir=tmp_path / "r")
    assert len(caught.value.args) == 1
    assert not (tmp_path / "r").exists()


def test_a_resume_with_another_part_given_is_refused(tmp_path: Path) -> None:
    ebm_dist.train(config(tmp_path, run={"seed": 3, "steps": 2}), run_dir=tmp_path / "r")
    other = config(tmp_path, data={"condition_size": 4})
    with pytest.raises(UserError, match=r"data\.condition_size: the checkpoint .* restore it"):
        ebm_dist.train(other, run_dir=tmp_path / "r", resume="must")
