"""`ebm_dist.train` with a network and a tensor: scripts, coroutines, threads, Ray, and again."""

from __future__ import annotations

import asyncio
import builtins
import io
import json
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console
from torch import nn

import ebm_dist
from ebm_dist import cli
from ebm_dist.config.run_config import load
from ebm_dist.core.errors import UserError
from ebm_dist.run.given import config_of

SMALL = {
    "run": {"steps": 4},
    "runtime": {"backend": "inline"},
    "data": {"batch_size": 16, "prefetch": 0},
    "sampler": {"name": "langevin", "step_size": 0.01, "temperature": 1.0, "num_steps": 2},
    "buffer": {"capacity": 64},
    "workers": {"num_chains": 16},
    "tracking": {"wandb": "off"},
    "evaluation": {"every": None},
    "flow": {"mode": "sync"},
}
SCRIPT = """
import torch
from torch import nn
import ebm_dist

class Net(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, width), nn.SiLU(), nn.Linear(width, 1))
    def forward(self, x):
        return self.body(x).squeeze(1)

class Count:
    seen = 0
    def on_update(self, step, metrics):
        self.seen += 1

def main():
    torch.manual_seed(0)
    count = Count()
    result = ebm_dist.train(
        CONFIG, energy=Net, data=torch.randn(200, 2), callbacks=[count], run_dir="run"
    )
    x, energy = ebm_dist.sample(result.open_export(), 5, num_steps=3)
    assert x.shape == (5, 2) and energy.shape == (5,)
    assert torch.allclose(result.open_export().energy(x), energy, atol=1e-5)
    print("updates", result.step, "seen", count.seen)

if __name__ == "__main__":
    main()
"""


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 8), nn.SiLU(), nn.Linear(8, 1), nn.Flatten(0))


def points(num: int = 200) -> torch.Tensor:
    return torch.randn(num, 2, generator=torch.Generator().manual_seed(0))


def train(run_dir: Path, config=SMALL, **given):
    console = Console(file=io.StringIO(), width=300)
    given = {"energy": net(), "data": points()} | given
    return ebm_dist.train(config, run_dir=run_dir, console=console, **given)


def script(config: dict) -> str:
    return SCRIPT.replace("CONFIG", repr(config))


def run_script(arguments: list[str], cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_a_script_run_as_python_c_trains_its_own_class_and_goes_on_with_it(tmp_path, capsys):
    assert run_script(["-c", script(SMALL)], tmp_path) == "updates 4 seen 4"
    further = {**SMALL, "run": {"steps": 6}}
    assert run_script(["-c", script(further)], tmp_path) == "updates 6 seen 2"
    # The command line has no class to go on with.
    assert cli.main(["train", str(tmp_path / "run/config.yaml"), "run.steps=8"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "ebm_dist.train(" in line


def test_train_works_inside_a_running_event_loop(tmp_path):
    async def main():
        return train(tmp_path / "run")

    assert asyncio.run(main()).finished


class ZMQInteractiveShell:
    """What a notebook's `get_ipython()` returns, by the name that libraries look for."""


class OutStream(io.TextIOBase):
    """Standard output of a notebook's kernel: not a terminal, and no file."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text
        return len(text)


def test_train_in_a_notebook_redraws_a_panel_in_the_cell_or_draws_the_view(tmp_path, monkeypatch):
    cells: list[str] = []

    def show(data, display_id=None):
        cells.append(data._repr_mimebundle_((), ())["text/plain"])
        return SimpleNamespace(update=show) if display_id else None

    display = SimpleNamespace(display=show)
    ipython = SimpleNamespace(display=display, version_info=(9, 0))
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.setattr(builtins, "get_ipython", ZMQInteractiveShell, raising=False)
    stream = OutStream()
    monkeypatch.setattr(sys, "stdout", stream)
    given = {"energy": net(), "data": points()}

    async def kernel():  # which runs each cell in its loop
        line = ebm_dist.train(SMALL, run_dir=tmp_path / "lines", **given)
        terminal = Console(force_terminal=True, force_jupyter=False, width=100)
        live = ebm_dist.train(SMALL, run_dir=tmp_path / "live", console=terminal, **given)
        return line.finished, live.finished

    assert asyncio.run(kernel()) == (True, True)
    shown = "".join(cells)
    assert "time left" in shown
    assert "done at update 4" in shown
    assert "time left" in stream.text
    assert stream.text.rstrip().endswith(f"report {tmp_path / 'live'}\x1b[0m")


def test_train_works_in_a_thread_and_twice_in_one_process(tmp_path):
    results = []
    for name in ("first", "second"):
        thread = threading.Thread(target=lambda run=name: results.append(train(tmp_path / run)))
        thread.start()
        thread.join()
    assert [result.finished for result in results] == [True, True]


def test_a_given_network_is_the_start_and_is_itself_left_as_it_was(tmp_path):
    given = net()
    before = {name: weight.clone() for name, weight in given.state_dict().items()}
    lr = {"learner": {"lr": 1e-30, "ema_decay": 0.0}}
    trained = train(tmp_path / "run", SMALL | lr, energy=given).open_export().energy
    x = points(5)
    assert torch.equal(trained(x), given(x))
    train(tmp_path / "moved", SMALL | {"learner": {"lr": 0.1}}, energy=given)
    assert all(torch.equal(before[name], weight) for name, weight in given.state_dict().items())


def test_a_function_a_factory_and_numpy_data_are_taken(tmp_path):
    assert train(tmp_path / "a", energy=net, data=points().numpy()).finished

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return self.scale * x.square().sum(1)

    steps = {"run": {"steps": np.int64(2)}}
    assert train(tmp_path / "b", SMALL | steps, energy=lambda: Scaled()).step == 2


def test_a_call_with_another_network_or_other_data_says_to_take_another_run_dir(tmp_path):
    train(tmp_path / "run", SMALL | {"run": {"steps": 1}})
    wider = nn.Sequential(nn.Linear(2, 9), nn.SiLU(), nn.Linear(9, 1), nn.Flatten(0))
    for given, said in (
        ({"energy": wider}, "energy: the network has 37 weights, that of the checkpoint at .* 33;"),
        ({"data": points() + 1}, "data.fingerprint: the checkpoint at "),
    ):
        with pytest.raises(UserError, match=f"^{said}.* or start anew with another run_dir$"):
            train(tmp_path / "run", **given)


def test_the_same_call_says_that_the_run_is_finished_and_what_goes_on(tmp_path):
    screens = [Console(file=io.StringIO()) for _ in range(2)]
    for screen in screens:
        result = ebm_dist.train(
            SMALL, energy=net(), data=points(), run_dir=tmp_path / "run", console=screen
        )
        assert result.step == 4
    first, again = (screen.file.getvalue() for screen in screens)
    assert "finished" not in first
    assert "the run is finished: a run.steps above 4 trains on, another run.name begins" in again


def test_without_a_finished_run_there_is_no_export_to_open(tmp_path):
    class Stop:
        def on_update(self, step, metrics):
            return True

    result = train(tmp_path / "run", callbacks=[Stop()])
    with pytest.raises(ValueError, match="not finished"):
        result.open_export()


class Locked(nn.Module):
    """Holds what can be neither copied nor pickled."""

    def __init__(self):
        super().__init__()
        self.lock, self.body = threading.Lock(), net()

    def forward(self, x):
        return self.body(x)


def test_a_network_that_cannot_be_copied_is_one_line_and_its_class_is_taken():
    with pytest.raises(UserError) as caught:
        config_of({}, Locked(), points(1000))
    (line,) = str(caught.value).splitlines()
    assert line.startswith("energy: the Locked cannot be copied (TypeError: cannot pickle")
    assert "pass the class" in line
    assert isinstance(config_of({}, Locked, points(1000))[0].energy.build(), Locked)


# --- what is left out -----------------------------------------------------------------------------


def test_a_tensor_and_a_network_get_an_exact_sampler_at_the_scale_of_the_data():
    small, said = config_of(None, net(), points(1000))
    large, _ = config_of({}, net(), 100 * points(1000) + 500)
    assert said is not None
    assert said.startswith("sampler left out: mala (step_size ")
    assert small.runtime.backend == "inline"
    assert small.data.holdout == 0.1
    ratio = large.sampler.step_size / small.sampler.step_size  # type: ignore[attr-defined]
    assert ratio == pytest.approx(1e4, rel=0.1)
    assert large.buffer.init_std > 500


def test_images_and_bits_get_the_recipe_of_their_kind():
    images = torch.randint(0, 256, (200, 1, 8, 8), dtype=torch.uint8)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(64, 1), nn.Flatten(0))
    config, said = config_of({}, linear, images)
    assert said is not None
    assert "langevin" in said
    assert config.sampler.clamp == (-1.0, 1.0)  # type: ignore[attr-defined]
    assert config.data.noise_std == 0.03
    config, _ = config_of({"objective": {"name": "score_matching"}}, linear, images)
    assert config.objective.name == "score_matching"  # type: ignore[attr-defined]
    bits = torch.rand(200, 9) < 0.5
    config, said = config_of({"data": {"holdout": 0.2}}, nn.Linear(9, 1), bits)
    assert said is not None
    assert "gibbs_with_gradients" in said
    assert config.data.holdout == 0.2


def test_images_and_a_network_alone_train_to_a_grid_and_chains_that_stay_in_the_box(tmp_path):
    torch.manual_seed(0)
    images = torch.randint(0, 256, (200, 1, 6, 6), dtype=torch.uint8)
    conv = nn.Sequential(nn.Conv2d(1, 4, 3), nn.SiLU(), nn.Flatten(), nn.Linear(64, 1))
    told = {"run": {"steps": 2}, "tracking": {"wandb": "off"}}
    result = train(tmp_path / "run", told, energy=nn.Sequential(conv, nn.Flatten(0)), data=images)
    assert result.finished
    assert list((tmp_path / "run" / "samples").glob("*.png"))
    export = result.open_export()
    chains = export.chains()
    assert chains is not None
    x, _ = ebm_dist.sample(export, 4, num_steps=3)
    for drawn in (chains, x):
        assert drawn.shape[1:] == (1, 6, 6)
        assert drawn.abs().max() <= 1.0
        assert len(drawn.unique()) > 2  # not all at its walls


def test_what_the_caller_says_stays_beside_what_is_filled_in():
    told = {"buffer": {"capacity": 999}, "learner": {"lr": 0.5}, "data": {"batch_size": 48}}
    config, _ = config_of(told, net(), points(1000))
    assert (config.buffer.capacity, config.learner.lr) == (999, 0.5)
    assert config.workers.num_chains == 16
    given, said = config_of(SMALL, net(), points())
    assert said is None
    assert given.sampler.name == "langevin"  # type: ignore[attr-defined]
    assert given.buffer.reinit_prob == load(SMALL | {"energy": {"name": "mlp"}}).buffer.reinit_prob


def test_a_file_that_leaves_the_energy_out_is_completed_by_the_one_given(tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(SMALL))
    config, said = config_of(tmp_path / "run.yaml", net(), points())
    assert said is None
    assert config.energy.name == "module"  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="energy: missing"):
        config_of(tmp_path / "run.yaml", None, points())


@pytest.mark.parametrize(
    ("config", "energy", "data", "said"),
    [
        ({"data": {"batch_sise": 4}}, net(), points(), "data.batch_sise: unknown key"),
        ({"buffer": "large"}, net(), points(), "buffer: expected a section of keys"),
        ({"run": {"steps": "many"}}, net(), points(), "run.steps: expected a whole number"),
        ({}, None, points(), "energy: missing"),
        ({}, net(), torch.ones(200, 2), "all events looked at are the same"),
        ({}, 3.0, points(), "energy: expected"),
    ],
)
def test_a_mistake_is_one_line_that_names_its_key(config, energy, data, said):
    with pytest.raises(UserError) as caught:
        config_of(config, energy, data)
    (line,) = str(caught.value).splitlines()
    assert said in line


@pytest.mark.ray
def test_a_class_of_main_trains_on_ray_with_two_workers(tmp_path):
    ray = {**SMALL, "runtime": {"backend": "ray"}, "workers": {"num_workers": 2, "num_chains": 8}}
    (tmp_path / "program.py").write_text(script(ray))
    assert run_script(["program.py"], tmp_path) == "updates 4 seen 4"
    assert json.loads((tmp_path / "run/export/config.json").read_text())["energy"]["target"] == (
        "__main__:Net"
    )
