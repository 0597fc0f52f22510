"""Modules of the user in Ray's actors: shipped, installed, or missing, which is one line."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import own_package
import pytest
from own_package import ENERGY

import ebm_dist.data
from ebm_dist.files.strict_yaml import write_yaml

pytestmark = pytest.mark.ray

BUILT_IN: dict[str, Any] = {
    "energy": {"name": "mlp", "widths": [8]},
    "sampler": {"name": "langevin", "step_size": 0.01, "temperature": 1.0, "num_steps": 2},
    "objective": {"name": "contrastive"},
}
TRAIN = ("train", "own.yaml", "--run-dir", "run")


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, beside which `package` holds `own_pkg`."""
    (tmp_path / "package").mkdir()
    own_package.write(tmp_path / "package")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "elsewhere"


def write_config(runtime: dict[str, Any], **sections: Any) -> None:
    runtime = {"backend": "ray", "start_timeout_s": 400.0, **runtime}
    two = {"num_workers": 2, "num_chains": 16}
    own = own_package.config(runtime=runtime, workers=two, **sections)
    Path("own.yaml").write_text(write_yaml(own))


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    command = (sys.executable, *command)
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=400)


NOTES_ITS_FILE = """
import os, pathlib
pathlib.Path(os.environ["SEEN"], str(os.getpid())).write_text(__file__)
"""


def test_actors_import_what_working_dir_ships_and_paths_stay_relative_to_the_driver(
    elsewhere: Path, tmp_path: Path
):
    nets = tmp_path / "package" / "own_pkg" / "nets.py"
    nets.write_text(nets.read_text() + NOTES_ITS_FILE)
    (tmp_path / "seen").mkdir()
    ebm_dist.data.prepare("toy:two_moons", "shards", toy_samples=256)
    write_config(
        {"working_dir": "${ABOVE}/package"},
        plugins=["own_pkg.ebm"],
        energy={"name": "tall"},
        data={"source": "shards", "batch_size": 32},
        buffer={"capacity": 64, "num_shards": 1, "init": "data"},
        evaluation={"every": 4},
    )
    done = run("-m", "ebm_dist", *TRAIN, ABOVE="..", SEEN=str(tmp_path / "seen"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert (elsewhere / "run" / "export" / "model.safetensors").is_file()
    files = [Path(note.read_text()) for note in (tmp_path / "seen").iterdir()]
    shipped = [file for file in files if file != nets]
    assert len(shipped) == len(files) - 1, "the driver alone reads the original"
    assert len(shipped) >= 6  # hub, shard, learner, two workers, evaluator
    assert not any(file.is_relative_to(tmp_path) for file in shipped)


KNOWS_A_FOLDER = """
import sys
sys.path.append("../package")
from ebm_dist.cli import main
sys.exit(main(sys.argv[1:]))
"""
GIVES_A_CLASS = """
import sys
sys.path.append("../package")
import ebm_dist
from ebm_dist.commands.failures import explain
from ebm_dist.core.errors import UserError
from own_pkg.nets import Net
try:
    ebm_dist.train("own.yaml", energy=Net, run_dir="run")
except UserError as error:
    sys.exit(explain(error))
"""
NOT_THERE = f"cannot be imported on {socket.gethostname()} (no module named 'own_pkg'); install it"


@pytest.mark.parametrize(
    ("sections", "program", "said"),
    [
        (
            {"plugins": ["own_pkg.ebm"]},
            KNOWS_A_FOLDER,
            f"plugins: the module own_pkg.ebm {NOT_THERE}",
        ),
        ({"energy": ENERGY}, KNOWS_A_FOLDER, f"energy.target: the module own_pkg.nets {NOT_THERE}"),
        (
            {},
            GIVES_A_CLASS,
            "runtime.working_dir: the node 127.0.0.1 cannot read a section or object of yours (No "
            "module named 'own_pkg'); install its module there",
        ),
    ],
    ids=["plugin", "target", "object"],
)
def test_a_module_that_the_driver_has_and_actors_lack_is_one_line_with_the_node_and_what_to_do(
    elsewhere: Path, sections: dict[str, Any], program: str, said: str
):
    write_config({}, **BUILT_IN | sections)
    done = run("-c", program, *TRAIN)
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {said}")
    assert "Ray then ships to every node" in line


SECTIONS = """
from typing import Literal

from torch import nn

from ebm_dist.energies import BoundSection

LAYERS = {}


class Net(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 4), layer, nn.Linear(4, 1))

    def forward(self, x):
        return self.body(x).squeeze(1) + x.square().sum(1)


class BentSection(BoundSection):
    name: Literal["bent"] = "bent"

    def module(self):
        return Net(LAYERS["bent"]())
"""
REGISTERS = """
from torch import nn

from door_site import sections
from ebm_dist import energies

energies.FAMILY.register(sections.BentSection)
sections.LAYERS["bent"] = nn.Softplus
"""


def test_every_actor_imports_the_modules_of_entry_points_with_no_plugins_in_the_config(
    elsewhere: Path, tmp_path: Path
):
    site = tmp_path / "site"
    info, package = site / "door_site-1.0.dist-info", site / "door_site"
    for folder in (info, package):
        folder.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: door-site\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[ebm_dist.plugins]\nbent = door_site.register\n")
    (package / "__init__.py").write_text("")
    # An actor that reads the section imports its module, and not the one that registers it.
    (package / "sections.py").write_text(SECTIONS)
    (package / "register.py").write_text(REGISTERS)
    write_config({}, **BUILT_IN | {"energy": {"name": "bent"}})
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    done = run("-m", "ebm_dist", *TRAIN, PYTHONPATH=path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (elsewhere / "run" / "export" / "model.safetensors").is_file()
