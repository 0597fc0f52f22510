"""A run that begins with the weights, the chains or the optimiser of another."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file, save_file

from ebm_dist import load_energy
from ebm_dist.actors.worker import Worker
from ebm_dist.checkpoint import files as checkpoint
from ebm_dist.config.run_config import load
from ebm_dist.core.errors import UserError
from ebm_dist.data import describe
from ebm_dist.files.safe_open import sha256
from ebm_dist.learner.config import LearnerConfig
from ebm_dist.learner.engine import LearnerEngine
from ebm_dist.learner.partition import first_state
from ebm_dist.learner.step import LearningStep
from ebm_dist.metrics.hub import MetricHub
from ebm_dist.run.train import RunResult, bind, train

SOURCE: dict[str, Any] = {
    "run": {"name": "source", "seed": 5, "steps": 6},
    "runtime": {"backend": "inline", "device": "cpu"},
    "data": {"source": "toy:two_moons", "batch_size": 32, "toy_samples": 256, "prefetch": 0},
    "energy": {"name": "mlp", "widths": [16], "spectral_norm": True},
    # Its baseline is a parameter of its own.
    "objective": {"name": "noise_contrastive"},
    "sampler": {"name": "langevin", "step_size": 0.01, "temperature": 1.0, "num_steps": 2},
    "buffer": {"capacity": 64, "num_shards": 2, "reinit_prob": 0.0},
    "workers": {"num_chains": 16, "num_threads": 1},
    "learner": {"lr": 0.01, "ema_decay": 0.9, "num_threads": 1},
    "flow": {"mode": "sync"},
    "tracking": {"wandb": "off", "log_every": 1},
    "evaluation": {"every": None},
    "checkpoint": {"every": 3, "keep": 3},
}
CONTRASTIVE = {**SOURCE, "objective": {"name": "contrastive"}}


def run(
    run_dir: Path, *overrides: str, base: dict[str, Any] = CONTRASTIVE, **options: Any
) -> tuple[RunResult, str]:
    console = Console(file=(run_dir.parent / "screen.txt").open("w"), width=2000)
    result = train(load(base, overrides), run_dir=run_dir, console=console, **options)
    console.file.close()
    return result, (run_dir.parent / "screen.txt").read_text()


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A finished run with chains."""
    path = tmp_path_factory.mktemp("contrastive") / "source"
    run(path)
    return path


@pytest.fixture(scope="module")
def with_critic(tmp_path_factory) -> Path:
    """A finished run whose objective has a parameter."""
    path = tmp_path_factory.mktemp("noise") / "source"
    run(path, base=SOURCE)
    return path


def first(run_dir: Path) -> checkpoint.CheckpointDir:
    return checkpoint.open_checkpoint(run_dir / "checkpoints" / "step_00000000")


def learner(found: checkpoint.CheckpointDir) -> dict[str, torch.Tensor]:
    return found.tensors("learner")


X = torch.randn(50, 2, generator=torch.Generator().manual_seed(1))


# --- weights ------------------------------------------------------------------------------------


def test_energies_at_update_0_are_those_of_the_export_bit_for_bit(source, tmp_path, monkeypatch):
    seen: list[tuple[int, torch.Tensor]] = []
    run_round = Worker.run_round

    def watched(self, lease, weights, version, num_steps):
        moved = run_round(self, lease, weights, version, num_steps)
        seen.append((version, self._energy(X)))
        return moved

    monkeypatch.setattr(Worker, "run_round", watched)
    export = f"run.init_from={source / 'export'}"
    result, screen = run(tmp_path / "new", export, "run.seed=9", "run.steps=2")
    assert result.step == 2
    assert "begins with the averaged weights of" in screen
    assert "resumed" not in screen
    expected = load_energy(source / "export")(X)
    assert seen[0][0] == 0
    assert torch.equal(seen[0][1], expected)
    assert seen[-1][0] == 1
    assert not torch.equal(seen[-1][1], expected)


@pytest.mark.parametrize("kind", ["ema", "last"])
def test_a_run_and_its_checkpoint_give_the_same_weights_of_either_kind(kind, source, tmp_path):
    weights = f"run.init_weights={kind}"
    run(tmp_path / "a", f"run.init_from={source}", weights, "run.steps=1")
    newest = source / "checkpoints" / "step_00000006"
    run(tmp_path / "b", f"run.init_from={newest}", weights, "run.steps=1")
    a, b = learner(first(tmp_path / "a")), learner(first(tmp_path / "b"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    there = checkpoint.open_checkpoint(newest).tensors("learner")
    same = [torch.equal(a[key], there[key]) for key in there if key.startswith("param/energy")]
    assert all(same) if kind == "last" else not all(same)
    if kind == "ema":
        exported = load_file(source / "export" / "model.safetensors")
        for name, tensor in exported.items():
            key = next(k for k in a if k.endswith(f"energy.{name}") and not k.startswith("optim"))
            assert torch.equal(a[key], tensor)


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_the_first_state_is_what_a_new_engine_holds(name):
    config = LearnerConfig(optimizer=name, num_threads=1)
    section = load(SOURCE)
    section = bind(section, describe(section.data))

    def modules():
        return section.energy.build(seed=1), section.objective.build(seed=2)

    with LearnerEngine(config, *modules()) as engine:
        expected = engine.state()
    came = first_state(config, LearningStep(*modules()))
    assert expected is not None
    assert came.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(came[key], tensor), key
        assert came[key].dtype == tensor.dtype, key


def test_the_optimiser_and_the_objectives_own_weights_go_on_when_asked_for(with_critic, tmp_path):
    last = "run.init_weights=last"
    begin = [f"run.init_from={with_critic}", last, "run.steps=1", "run.seed=9"]
    run(tmp_path / "on", *begin, "run.init_optimizer=true", base=SOURCE)
    run(tmp_path / "afresh", *begin, base=SOURCE)
    there = checkpoint.latest(with_critic)
    assert there is not None
    there = there.tensors("learner")
    on, afresh = learner(first(tmp_path / "on")), learner(first(tmp_path / "afresh"))
    assert all(torch.equal(on[key], there[key]) for key in there if key != "step")
    assert on["step"] == 0
    assert on["optim/step"] == 6
    own = [key for key in there if key.startswith("param/objective")]
    assert own
    assert not any(torch.equal(afresh[key], there[key]) for key in own)
    assert all(not afresh[key].any() for key in afresh if key.startswith("optim/"))


# --- what does not fit --------------------------------------------------------------------------


def test_another_shape_is_one_line_with_the_parameter_and_both_shapes(source, tmp_path):
    with pytest.raises(UserError) as error:
        run(tmp_path / "new", f"run.init_from={source}", "energy.widths=[24]")
    text = str(error.value)
    assert text.startswith("run.init_from: ")
    assert "\n" not in text
    assert "energy.body.1.bias has shape (16,) there and (24,) here" in text
    assert "run.init_strict: false" in text
    assert not list((tmp_path / "new").glob("checkpoints/*"))


@pytest.mark.parametrize("where", ["", "export"])
def test_without_strict_what_fits_is_taken_and_the_rest_is_named(where, source, tmp_path):
    # One more layer: the first fits, the last does not.
    _, screen = run(
        tmp_path / "new",
        f"run.init_from={source / where}",
        "run.init_strict=false",
        "energy.widths=[16, 16]",
        "run.steps=1",
    )
    exported = load_file(source / "export" / "model.safetensors")
    came = learner(first(tmp_path / "new"))
    fitting = [
        name
        for name, tensor in exported.items()
        if any(
            key.endswith(f"energy.{name}") and torch.equal(came[key], tensor)
            for key in came
            if not key.startswith("optim")
        )
    ]
    assert 0 < len(fitting) < len([k for k in came if "energy." in k and k[0] in "pb"])
    assert "run.init_strict: false left out" in screen
    assert "energy.widths [16] -> [16, 16]" in screen


def test_nothing_that_fits_is_an_error_without_strict_too(source, tmp_path):
    with pytest.raises(UserError, match=r"^run.init_from: no weight of .* fits this run"):
        run(
            tmp_path / "new",
            f"run.init_from={source}",
            "run.init_strict=false",
            "energy={name: gaussian_mixture, means: [[0.0, 0.0]], learnable: true}",
        )


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["run.init_weights=last"], "run.init_weights: last, but .* is an export"),
        (["run.init_optimizer=true"], "run.init_optimizer: True, but .* is an export"),
    ],
)
def test_what_an_export_cannot_give_is_one_line(overrides, said, source, tmp_path):
    with pytest.raises(UserError, match=said):
        run(tmp_path / "new", f"run.init_from={source / 'export'}", *overrides)


def test_options_without_a_place_to_begin_from_are_refused():
    with pytest.raises(UserError, match="run: init_chains: true takes effect with init_from"):
        load(CONTRASTIVE, ["run.init_chains=true"])


# --- chains -------------------------------------------------------------------------------------


def shard_arrays(found: checkpoint.CheckpointDir) -> dict[str, np.ndarray]:
    parts = [found.arrays(name) for name in found.names if name.startswith("shard_")]
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def rows(x: np.ndarray) -> set[bytes]:
    return {row.tobytes() for row in x}


@pytest.mark.parametrize(("capacity", "num_shards"), [(64, 2), (100, 3), (32, 1)])
def test_chains_of_a_run_are_dealt_to_other_shards_and_capacities(
    capacity, num_shards, source, tmp_path
):
    _, screen = run(
        tmp_path / "new",
        f"run.init_from={source}",
        "run.init_chains=true",
        "run.steps=1",
        f"buffer.capacity={capacity}",
        f"buffer.num_shards={num_shards}",
    )
    there = checkpoint.latest(source)
    assert there is not None
    theirs, ours = shard_arrays(there), shard_arrays(first(tmp_path / "new"))
    common = rows(theirs["position"]) & rows(ours["position"])
    assert len(ours["position"]) == capacity
    assert len(common) == min(capacity, 64)
    assert sorted(ours["chain_id"]) == list(range(capacity))
    moved = rows(theirs["position"][theirs["version"] >= 0])
    for row, version in zip(ours["position"], ours["version"]):
        assert version == (0 if row.tobytes() in moved else -1)
    said = {
        64: "begins with the 64 chains there",
        100: "the other 36 start as buffer.init: noise says",
        32: "begins with 32 of the 64 chains there",
    }
    assert said[capacity] in screen


def test_chains_of_an_export_serve_as_well(source, tmp_path):
    begin = [f"run.init_from={source / 'export'}", "run.init_chains=true", "run.steps=1"]
    run(tmp_path / "new", *begin, "buffer.capacity=128", "buffer.init=data")
    theirs = load_file(source / "export" / "chains.safetensors")["x"].numpy()
    ours = shard_arrays(first(tmp_path / "new"))
    assert rows(theirs) <= rows(ours["position"])
    assert (ours["version"] == -1).all()
    assert len(ours["position"]) == 128


def test_chains_that_are_not_there_are_one_line(with_critic, source, tmp_path):
    with pytest.raises(UserError, match=r"run.init_chains: true, but the export at .* no chains"):
        run(tmp_path / "a", f"run.init_from={with_critic / 'export'}", "run.init_chains=true")
    with pytest.raises(
        UserError, match=r"run.init_chains: true, but the checkpoint at .* no chain"
    ):
        run(tmp_path / "b", f"run.init_from={with_critic}", "run.init_chains=true")
    with pytest.raises(
        UserError, match=r"run.init_chains: true, but this run's objective needs no"
    ):
        run(tmp_path / "c", f"run.init_from={source}", "run.init_chains=true", base=SOURCE)
    weighted = ["buffer.jarzynski=true", "sampler.name=mala", "sampler.step_size=0.01"]
    with pytest.raises(UserError, match="carry no Jarzynski weights"):
        run(tmp_path / "d", f"run.init_from={source}", "run.init_chains=true", *weighted)


# --- what is recorded, and a resume --------------------------------------------------------------


def test_the_lineage_is_in_checkpoints_export_and_card(source, tmp_path):
    run(tmp_path / "new", f"run.init_from={source}", "run.steps=4", "run.name=child")
    for name in ("step_00000000", "step_00000004"):
        found = checkpoint.open_checkpoint(tmp_path / "new" / "checkpoints" / name)
        lineage = found.meta["init_from"]
        assert lineage == {
            "path": str(source),
            "kind": "checkpoint",
            "run": "source",
            "step": 6,
            "weights": "ema",
            "sha256": checkpoint.checksum(source / "checkpoints" / "step_00000006", "ema"),
        }
    export = tmp_path / "new" / "export"
    assert json.loads((export / "config.json").read_text())["lineage"]["init_from"] == lineage
    card = (export / "README.md").read_text()
    assert f"| init_from.path | {source} |" in card
    assert "| init_from.step | 6 |" in card
    rows = (tmp_path / "new" / "metrics.jsonl").read_text().splitlines()
    assert {json.loads(row)["epoch"] for row in rows} == {0}  # it did not go back


def test_the_lineage_is_in_what_wandb_is_told(source, tmp_path, monkeypatch):
    told: list[dict[str, Any]] = []

    class Watched(MetricHub):
        def __init__(self, **options: Any) -> None:
            told.append(dict(options["run_config"]))
            super().__init__(**options)

    monkeypatch.setattr("ebm_dist.run.assembly.MetricHub", Watched)
    run(tmp_path / "new", f"run.init_from={source / 'export'}", "run.steps=1")
    assert told[0]["lineage"]["run"] == "source"
    assert told[0]["lineage"]["kind"] == "export"


def test_a_resume_goes_on_bit_for_bit_without_the_place_that_the_run_began_from(source, tmp_path):
    shutil.copytree(source, tmp_path / "source")
    begin = [f"run.init_from={tmp_path / 'source'}", "run.init_chains=true"]
    run(tmp_path / "whole", *begin)
    run(tmp_path / "parts", *begin, "run.steps=3")
    shutil.rmtree(tmp_path / "source")
    result, screen = run(tmp_path / "parts", *begin)
    assert result.step == 6
    assert "resumed from step_00000003" in screen
    a, b = (load_file(tmp_path / n / "export" / "model.safetensors") for n in ("whole", "parts"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_that_is_there_is_not_taken_for_a_new_one(source, tmp_path):
    shutil.copytree(source, tmp_path / "old")
    with pytest.raises(UserError, match=r"run.init_from: .* would not be read.*--run-dir"):
        run(tmp_path / "old", f"run.init_from={source / 'export'}", "run.steps=9")


def test_a_relative_path_is_recorded_whole_and_a_tilde_is_the_home(source, tmp_path, monkeypatch):
    monkeypatch.chdir(source.parent)
    run(tmp_path / "a", "run.init_from=source/export", "run.steps=1")
    recorded = yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())["run"]["init_from"]
    assert recorded == str(source / "export")
    monkeypatch.setenv("HOME", str(source.parent))
    monkeypatch.chdir(tmp_path)
    run(tmp_path / "b", "run.init_from=~/source", "run.steps=1")
    assert first(tmp_path / "b").meta["init_from"]["path"] == str(source)


def test_the_warm_up_moves_under_the_weights_that_the_run_begins_with(
    source, tmp_path, monkeypatch
):
    seen = []

    def watched(kernel, x, energy, *args):
        seen.append(energy(X))
        return kernel

    monkeypatch.setattr("ebm_dist.run.warm_up.adapt_step_size", watched)
    sampler = "sampler={name: mala, step_size: 0.01, adapt_steps: 5}"
    run(tmp_path / "new", f"run.init_from={source}", sampler, "run.steps=1", "run.seed=9")
    assert torch.equal(seen[0], load_energy(source / "export")(X))


def test_a_module_that_only_the_checkpoint_names_is_not_imported(source, tmp_path):
    shutil.copytree(source, tmp_path / "source")
    part = tmp_path / "source" / "checkpoints" / "step_00000006"
    meta = json.loads((part / "meta.json").read_text())
    meta["config"]["energy"] = {"name": "sum", "members": [{"target": "strange.code:Net"}]}
    (part / "meta.json").write_text(json.dumps(meta))
    _sign(part)
    with pytest.raises(UserError, match=r"averaged weights are of strange.code:Net.*weights: last"):
        run(tmp_path / "a", f"run.init_from={part}")
    run(tmp_path / "b", f"run.init_from={part}", "run.init_weights=last", "run.steps=1")


# --- hostile ------------------------------------------------------------------------------------


def _tear(path: Path) -> None:
    with (path / "checkpoints" / "step_00000006" / "ema.safetensors").open("r+b") as file:
        file.truncate(100)


def _forge(path: Path) -> None:
    """Whole by its checksums, and of nobody's writing."""
    part = path / "checkpoints" / "step_00000006"
    save_file({"flat": torch.zeros(3)}, part / "ema.safetensors")
    _sign(part)


def _not_finite(path: Path) -> None:
    part = path / "checkpoints" / "step_00000006"
    tensors = load_file(part / "ema.safetensors")
    tensors["flat"][0] = float("inf")
    save_file(tensors, part / "ema.safetensors")
    _sign(part)


def _link(path: Path) -> None:
    part = path / "checkpoints" / "step_00000006"
    os.rename(part / "ema.safetensors", path / "elsewhere")
    (part / "ema.safetensors").symlink_to(path / "elsewhere")


def _chains_of_another_kind(path: Path) -> None:
    part = path / "checkpoints" / "step_00000006"
    arrays = load_file(part / "shard_0001.safetensors")
    save_file(arrays | {"position": arrays["position"].double()}, part / "shard_0001.safetensors")
    _sign(part)


def _sign(part: Path) -> None:
    sums = {f.name: sha256(f) for f in part.iterdir() if f.name != "checksums.json"}
    (part / "checksums.json").write_text(json.dumps(sums))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_tear, "ema.safetensors does not match its checksum"),
        (_forge, "a run did not write this"),
        (_not_finite, "is not finite"),
        (_link, "is a link|unreadable"),
        (_chains_of_another_kind, "a run did not write this"),
    ],
)
def test_a_damaged_or_hostile_checkpoint_is_refused_in_one_line(damage, said, source, tmp_path):
    shutil.copytree(source, tmp_path / "source")
    damage(tmp_path / "source")
    newest = tmp_path / "source" / "checkpoints" / "step_00000006"
    with pytest.raises(UserError, match=said) as error:
        run(tmp_path / "new", f"run.init_from={newest}", "run.init_chains=true")
    assert str(error.value).startswith("run.init_from: ")
    assert "\n" not in str(error.value)


def test_a_run_with_a_damaged_newest_checkpoint_gives_the_one_before(source, tmp_path):
    shutil.copytree(source, tmp_path / "source")
    _tear(tmp_path / "source")
    run(tmp_path / "new", f"run.init_from={tmp_path / 'source'}", "run.steps=1")
    assert first(tmp_path / "new").meta["init_from"]["step"] == 3


@pytest.mark.parametrize("name", ["nothing", "empty", "run"])
def test_a_place_with_nothing_to_begin_from_is_one_line(name, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match=f"^run.init_from: .*{name}: "):
        run(tmp_path / "new", f"run.init_from={tmp_path / name}")
