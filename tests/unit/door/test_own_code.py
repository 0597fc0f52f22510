"""A user's own energy, sampler and objective in a run: trained, resumed, exported, read again."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import own_package
import pytest
import torch
from own_package import ENERGY, SAMPLER, config
from rich.console import Console
from torch import nn

import ebm_dist
from ebm_dist import energies
from ebm_dist.cli import main
from ebm_dist.config.run_config import load
from ebm_dist.core.errors import UserError
from ebm_dist.core.plugins import import_plugins
from ebm_dist.core.types import EventSpec
from ebm_dist.export.reader import open_export
from ebm_dist.export.sample import draw_samples
from ebm_dist.export.suites import evaluate
from ebm_dist.files.strict_yaml import write_yaml
from ebm_dist.metrics.names import unknown
from ebm_dist.samplers.traits import trait

PLANE = EventSpec((2,), "real")
MODULES = ["own_pkg.nets", "own_pkg.moves", "own_pkg.losses"]


def forget() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "own_pkg"]:
        del sys.modules[name]
    energies.FAMILY.members.pop("tall", None)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, which holds the package `own_pkg`; nothing has imported it."""
    own_package.write(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    forget()
    yield tmp_path
    forget()


def train(run_dir: Path, *overrides: str, **sections: Any) -> Any:
    loaded = load(config(**sections), overrides, trusted=True)
    return ebm_dist.train(loaded, run_dir=run_dir, console=Console(file=io.StringIO()))


def rows(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def said(capsys: pytest.CaptureFixture, *argv: str, code: int = 2) -> str:
    """The one line that the command line says of what is wrong."""
    assert main(list(argv)) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_own_energy_sampler_and_objective_train_resume_and_are_read_again(
    here: Path, capsys: pytest.CaptureFixture
):
    through = train(here / "through")
    assert train(here / "run", "run.steps=2").finished
    again = train(here / "run")
    assert again.finished
    own = {"plugins": MODULES}
    energy = ebm_dist.load_energy(again.export_dir, **own)
    assert type(energy).__module__ == "own_pkg.nets"
    expected = ebm_dist.load_energy(through.export_dir, **own).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in energy.state_dict().items())
    last = rows(here / "run")
    assert {"user/margin", "user/length", "energy/gap"} <= {key for row in last for key in row}
    assert not unknown(key for row in last for key in row)

    export = open_export(again.export_dir, **own)
    x, values = draw_samples(export, 8, 3)
    assert torch.equal(values, energy(x))
    assert evaluate(export, "ood")["metrics"]
    card = (again.export_dir / "README.md").read_text()
    assert 'load_energy("PATH", plugins=["own_pkg.moves", "own_pkg.nets"])' in card
    assert "--plugin own_pkg.moves --plugin own_pkg.nets" in card
    assert "Moves by `own_pkg.moves:Walk`" in card

    flags = ["--plugin", "own_pkg.nets", "--plugin", "own_pkg.moves"]
    path, out = str(again.export_dir), str(here / "x.npz")
    assert main(["sample", path, "--num", "4", "--steps", "2", "--out", out, *flags]) == 0
    assert main(["evaluate", path, "--suite", "ood", *flags]) == 0
    assert main(["export", str(here / "run"), str(here / "other"), *flags]) == 0
    assert main(["report", str(here / "run")]) == 0
    forget()
    assert main(["report", str(here / "run"), *flags]) == 0  # as on the other commands
    assert "own_pkg.nets" in sys.modules


def test_an_export_holds_weights_under_the_users_own_names(here: Path):
    from safetensors.torch import load_file

    export = train(here / "run").export_dir
    sys.path.append(str(here))
    from own_pkg.nets import Net  # pyright: ignore[reportMissingImports]

    net = Net(width=6)
    net.load_state_dict(load_file(export / "model.safetensors"))
    x = torch.randn(4, 2)
    assert torch.equal(net(x), ebm_dist.load_energy(export, plugins=["own_pkg.nets"])(x))
    assert torch.equal(net(x), ebm_dist.load_energy(export, plugins="own_pkg.nets")(x))
    forget()
    drawn, _ = ebm_dist.sample(export, 3, plugins=["own_pkg.nets", "own_pkg.moves"])
    assert drawn.shape == (3, 2)


def test_reading_imports_nothing_and_says_which_module_to_name(
    here: Path, capsys: pytest.CaptureFixture
):
    export = train(here / "run").export_dir
    forget()
    (here / "own.yaml").write_text(write_yaml(config()))
    assert main(["train", str(here / "own.yaml"), "--run-dir", str(here / "own")]) == 0
    shown = capsys.readouterr().out
    assert "--plugin own_pkg.moves --plugin own_pkg.nets" in shown
    forget()
    assert main(["config", "show", str(here / "own.yaml")]) == 0
    assert main(["report", str(here / "run")]) == 0
    capsys.readouterr()
    for argv in (
        ["sample", str(export)],
        ["evaluate", str(export), "--suite", "ood"],
        ["export", str(here / "run"), str(here / "other")],
    ):
        assert "add --plugin own_pkg.nets" in said(capsys, *argv)
    with pytest.raises(UserError, match=r"plugins=\['own_pkg.nets'\]"):
        ebm_dist.load_energy(export)
    assert not [name for name in sys.modules if name.startswith("own_pkg")]
    energy = ["--plugin", "own_pkg.nets"]
    assert "sampler: is code of the module own_pkg.moves" in said(
        capsys, "sample", str(export), *energy
    )
    assert "own_pkg.moves" not in sys.modules


@pytest.mark.parametrize("target", ["os:system", "subprocess:run", "own_pkg.nets:run"])
def test_a_hostile_export_runs_nothing_it_was_not_told_to(here: Path, target: str):
    export = train(here / "run").export_dir
    (here / "own_pkg" / "nets.py").open("a").write("\nfrom subprocess import run\n")
    forget()
    recorded = json.loads((export / "config.json").read_text())
    recorded["energy"] |= {"target": target, "params": {"args": "touch owned", "shell": True}}
    (export / "config.json").write_text(json.dumps(recorded))
    for plugins in ([], ["own_pkg.nets"]):
        with pytest.raises(UserError) as caught:
            ebm_dist.load_energy(export, plugins=plugins)
        assert "\n" not in str(caught.value)
    assert not (here / "owned").exists()


def test_an_export_that_asks_for_giant_sizes_is_refused_before_the_memory_is_taken(here: Path):
    export = train(here / "run").export_dir
    recorded = json.loads((export / "config.json").read_text())
    for width in (2**40, 60_000_000):
        recorded["energy"]["params"]["width"] = width
        (export / "config.json").write_text(json.dumps(recorded))
        with pytest.raises(UserError):
            ebm_dist.load_energy(export, plugins=["own_pkg.nets"])


def test_a_plugin_registers_a_section_that_is_a_member_like_any_other(
    here: Path, capsys: pytest.CaptureFixture
):
    own = config(plugins=["own_pkg.ebm"], energy={"name": "tall", "height": 5})
    (here / "own.yaml").write_text(write_yaml(own))
    path, flag = str(here / "own.yaml"), ["--plugin", "own_pkg.ebm"]
    line = said(capsys, "config", "show", path)
    assert "energy.name: 'tall' is unknown" in line
    assert line.endswith("add --plugin own_pkg.ebm, which imports the module")
    assert main(["config", "schema"]) == 0
    assert '"TallSection"' not in capsys.readouterr().out

    assert main(["config", "show", path, *flag]) == 0
    assert "height: 5" in capsys.readouterr().out
    assert main(["config", "schema", *flag]) == 0
    assert '"TallSection"' in capsys.readouterr().out
    assert "energy.heigth: unknown key; did you mean 'height'?" in said(
        capsys, "config", "show", path, "energy.heigth=3", *flag
    )
    assert "energy.height: expected a whole number, got 'low'" in said(
        capsys, "config", "show", path, "energy.height=low", *flag
    )
    assert "'tal' is unknown; did you mean 'tall'?" in said(
        capsys, "config", "show", path, "energy.name=tal", *flag
    )
    composed = {"name": "sum", "members": [{"name": "tall", "height": 4}, {"name": "ring"}]}
    assert load({**own, "energy": composed}, trusted=True).energy.members[0].height == 4
    forget()
    export = train(here / "run", **own).export_dir
    forget()
    assert "add --plugin own_pkg.ebm" in said(capsys, "sample", str(export))
    assert ebm_dist.load_energy(export, plugins=["own_pkg.ebm"])(torch.zeros(2, 2)).shape == (2,)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"energy": {"target": "own_pkg.nets:Column"}}, "returns (4, 1) for events"),
        ({"energy": {"target": "own_pkg.nets:Column"}}, "end it with .squeeze(-1)"),
        ({"energy": {"target": "own_pkg.nets:Pooled"}}, "returns () for events"),
        ({"energy": {"target": "own_pkg.nets:Normed"}}, "has batch norm (layers.1: BatchNorm1d)"),
        ({"energy": {"target": "own_pkg.nets:Double"}}, "weights of torch.float64"),
        ({"energy": {"target": "own_pkg.nets:Scaled"}}, "a weight without a dimension (scale)"),
        ({"energy": {"target": "own_pkg.nets:Bowl"}}, "has no parameters to train"),
        ({"energy": {"target": "own_pkg.nets:nothing"}}, "gave a int, expected an nn.Module"),
        ({"energy": {"target": "own_pkg.nets:Nett"}}, "has no 'Nett'; did you mean 'Net'?"),
        ({"energy": {"target": "own_pkg.mets:Net"}}, "energy.target: the module own_pkg.mets"),
        ({"energy": {**ENERGY, "params": {"depth": 3}}}, "unexpected keyword argument 'depth'"),
        ({"energy": {"target": "os:system"}}, "energy.target: os is of Python's standard library"),
        ({"energy": {"target": "__main__:Net"}}, "energy.target: Net was given from Python"),
        ({"energy": {**ENERGY, "num_classes": 3}}, "energy.num_classes: 3, but own_pkg.nets:Net"),
        ({"sampler": {"target": "own_pkg.moves:Stuck"}}, "without step"),
        ({"sampler": {**SAMPLER, "params": {"s": 1}}}, "sampler.params: own_pkg.moves:Walk called"),
        ({"sampler": {**SAMPLER, "engine": "compiled"}}, "sampler.engine: expected 'eager'"),
        ({"sampler": {**SAMPLER, "adapt_steps": 5}}, "sampler.adapt_steps: expected 0"),
        (
            {"objective": {"target": "own_pkg.losses:Weighted", "params": {"shape": []}}},
            "objective.target: own_pkg.losses:Weighted has a weight without a dimension (scale)",
        ),
        (
            {
                "energy": {"target": "own_pkg.nets:Bowl"},
                "objective": {"target": "own_pkg.losses:Weighted", "params": {"shape": [1]}},
            },
            "energy.target: own_pkg.nets:Bowl has no parameters to train; make it an nn.Module",
        ),
        (
            {
                "data": {"source": "toy:unit_gaussian_1d", "batch_size": 32, "toy_samples": 256},
                "energy": {"name": "mlp", "num_classes": 3},
                "buffer": {"context": {"label": "uniform"}},
            },
            "buffer.context.label: the data names no classes; set data.num_classes if it has",
        ),
        ({"objective": {"target": "own_pkg.losses:Slopes"}}, "objective.needs_negatives: true"),
        ({"flow": {"mode": "async", "stale": "reweight"}}, "flow.stale: reweight"),
        ({"plugins": ["own_pkg.emb"]}, "plugins: the module own_pkg.emb cannot be imported on"),
        ({"plugins": ["os"]}, "plugins: os is of Python's standard library"),
        ({"plugins": "own_pkg.ebm"}, "plugins: expected a list, got 'own_pkg.ebm'"),
    ],
)
def test_what_cannot_be_used_is_one_line_before_anything_starts(
    here: Path, capsys: pytest.CaptureFixture, sections: dict[str, Any], message: str
):
    for section in sections.values():
        if isinstance(section, dict) and "target" in section:
            section.setdefault("name", "module")
    (here / "own.yaml").write_text(write_yaml(config(**sections)))
    assert message in said(capsys, "train", str(here / "own.yaml"))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"sampler": {**SAMPLER, "target": "own_pkg.moves:Careless"}}, "with a gradient"),
        ({"objective": {"name": "module", "target": "own_pkg.losses:bare"}}, "returned a Tensor"),
        (
            {"objective": {"name": "module", "target": "own_pkg.losses:each"}},
            "objective.target: own_pkg.losses:each returned a loss of shape (32,), expected a scal",
        ),
    ],
)
def test_what_a_sampler_or_objective_returns_wrongly_is_said_in_one_line(
    here: Path, capsys: pytest.CaptureFixture, sections: dict[str, Any], message: str
):
    (here / "own.yaml").write_text(write_yaml(config(**sections)))
    assert main(["train", str(here / "own.yaml")]) in (1, 2)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(errors) == 1
    assert message in errors[0]


def test_an_objective_that_says_it_needs_no_chains_is_run_without_any(here: Path):
    own = {"name": "module", "target": "own_pkg.losses:Slopes", "needs_negatives": False}
    assert train(here / "run", objective=own).finished  # it asserts that its negatives are None


def test_an_own_sampler_cannot_be_tempered_from_outside(here: Path):
    with pytest.raises(UserError, match="cannot be moved to other temperatures"):
        load(
            config(
                sampler={
                    "name": "parallel_tempering",
                    "kernel": SAMPLER,
                    "temperatures": [1.0, 2.0],
                }
            )
        )


def test_an_own_sampler_says_its_traits_and_reading_its_config_imports_nothing(here: Path):
    exact = {**SAMPLER, "target": "own_pkg.moves:Exact"}
    weighted = {"jarzynski": True, "reinit_prob": 0.0, "init": "noise", "capacity": 64}
    contrast = {"name": "contrastive"}
    read = load(config(sampler=exact, buffer=weighted, objective=contrast))
    assert not any(name.startswith("own_pkg") for name in sys.modules)
    import_plugins(["own_pkg.moves"])
    assert trait(read.sampler.build(), "leaves_invariant")
    assert not trait(read.sampler.build(), "reversible")
    with pytest.raises(UserError, match="module has no Jarzynski correction"):
        train(here / "run", sampler=SAMPLER, buffer=weighted, objective=contrast)


class Here(nn.Module):
    """A network that lies in no module of its own for all that an export knows."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(2, width), nn.Linear(width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x).tanh()).squeeze(-1)


def test_a_given_module_starts_from_its_weights_and_is_left_alone():
    net = Here()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    section = energies.given(net).bind(PLANE)
    built = section.build(seed=5)
    assert all(torch.equal(built.state_dict()[key], before[key]) for key in before)
    with torch.no_grad():
        built.first.weight.zero_()
        net.first.weight.add_(1.0)
    again = section.model_copy(update={"event_shape": (2,)}).build()
    assert torch.equal(again.first.weight, before["first.weight"])
    assert set(section.model_dump()) == {"name", "target", "params", "num_classes", "event_shape"}


def test_given_tells_a_factory_from_an_energy():
    assert isinstance(energies.given(Here).build(), Here)
    assert isinstance(energies.given(lambda: Here(3)).build(), Here)
    bowl = energies.given(lambda x: x.square().sum(1)).bind(PLANE).build()
    assert bowl(torch.ones(3, 2)).tolist() == [2.0, 2.0, 2.0]
    first, second = (energies.given(Here).build(seed=seed) for seed in (0, 1))
    assert not torch.equal(first.first.weight, second.first.weight)
    with pytest.raises(ValueError, match="got a int"):
        energies.given(3)  # pyright: ignore[reportArgumentType]


def test_a_given_energy_trains_and_its_export_is_read_by_giving_it_again(tmp_path: Path):
    class Inner(Here):
        pass

    loaded = load(
        config(
            energy={"name": "module", "target": "__main__:Inner"},
            sampler={"name": "langevin", "step_size": 0.01, "temperature": 1.0},
            objective={"name": "contrastive"},
        )
    )
    loaded = loaded.model_copy(update={"energy": energies.given(Inner(5))})
    result = ebm_dist.train(loaded, run_dir=tmp_path / "r", console=Console(file=io.StringIO()))
    assert result.finished
    with pytest.raises(UserError, match="was given from Python"):
        ebm_dist.load_energy(result.export_dir)
    energy = ebm_dist.load_energy(result.export_dir, energy=lambda: Inner(5))
    assert torch.equal(
        energy(torch.ones(1, 2)),
        ebm_dist.load_energy(result.export_dir, energy=Inner(5))(torch.ones(1, 2)),
    )
    with pytest.raises(UserError, match="has shape"):
        ebm_dist.load_energy(result.export_dir, energy=Inner(7))
    assert "energy=NETWORK" in (result.export_dir / "README.md").read_text()


@pytest.mark.ray
def test_own_code_in_the_working_directory_trains_on_ray_as_in_one_process(here: Path):
    ray = {"backend": "ray"}
    two = {"num_workers": 2, "num_chains": 16}
    own = config(runtime=ray, workers=two, plugins=["own_pkg.ebm"], energy={"name": "tall"})
    (here / "own.yaml").write_text(write_yaml(own))
    for name, *overrides in (
        ("ray",),
        ("inline", "runtime.backend=inline"),
        ("module", "energy={name: module, target: 'own_pkg.nets:Net'}"),
    ):
        command = [sys.executable, "-m", "ebm_dist", "train", "own.yaml", "--run-dir", name]
        done = subprocess.run([*command, *overrides], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    import_from = {"plugins": ["own_pkg.ebm", "own_pkg.nets"]}
    weights = [
        list(ebm_dist.load_energy(here / name, **import_from).state_dict().values())
        for name in ("ray", "inline", "module")
    ]
    for other in weights[1:]:
        assert all(torch.equal(a, b) for a, b in zip(weights[0], other))


_SCRIPT = """
import sys
import torch
from torch import nn
import ebm_dist
from ebm_dist import energies
from ebm_dist.config.run_config import load

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)
    def forward(self, x):
        return self.layer(x.tanh()).squeeze(-1) + x.square().sum(1)

config = load({config!r}).model_copy(update=dict(energy=energies.given(Net())))
assert ebm_dist.train(config, run_dir="given").finished
"""


@pytest.mark.ray
def test_a_network_of_main_goes_by_value_to_ray(here: Path):
    langevin = {"name": "langevin", "step_size": 0.01, "temperature": 1.0}
    own = config(
        runtime={"backend": "ray"},
        energy={"name": "module", "target": "__main__:Net"},
        sampler=langevin,
        objective={"name": "contrastive"},
    )
    script = _SCRIPT.format(config=own)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
