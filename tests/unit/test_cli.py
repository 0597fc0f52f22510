"""The command line: what each command does, its exit code, and how fast it answers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import yaml

import ebm_dist
from ebm_dist import energies
from ebm_dist.cli import main
from ebm_dist.core.errors import RunFailed, UserError
from ebm_dist.core.weights import FlatLayout

SMALL = {
    "run": {"name": "small", "steps": 4},
    "runtime": {"backend": "inline", "device": "cpu"},
    "data": {"source": "toy:two_moons", "batch_size": 16, "toy_samples": 256},
    "energy": {"name": "mlp", "widths": [8]},
    "sampler": {"name": "langevin", "step_size": 0.01, "temperature": 1.0, "num_steps": 3},
    "buffer": {"capacity": 64, "num_shards": 2, "init_std": 2.0},
    "workers": {"num_chains": 8},
    "tracking": {"wandb": "off", "log_every": 1},
    "evaluation": {"every": None},
    "checkpoint": {"every": 2},
}
COMMANDS = [
    [],
    ["train"],
    ["sample"],
    ["evaluate"],
    ["export"],
    ["report"],
    ["doctor"],
    ["data"],
    ["data", "prepare"],
    ["data", "check"],
    ["push"],
    ["import-weights"],
    ["dashboard"],
    ["dashboard", "write"],
    ["dashboard", "publish"],
    ["config"],
    ["config", "show"],
    ["config", "schema"],
]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run of four updates, trained through the command line."""
    root = tmp_path_factory.mktemp("cli")
    (root / "small.yaml").write_text(yaml.safe_dump(SMALL))
    data = ["data.cache_dir=" + str(root / "cache")]
    code = main(["train", str(root / "small.yaml"), *data, "--run-dir", str(root / "run")])
    assert code == 0
    return root / "run"


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help(command, capsys):
    assert main([*command, "--help"]) == 0
    out = capsys.readouterr().out
    assert "Usage" in out
    if command and command not in (["data"], ["dashboard"], ["config"]):
        assert "Example: ebm-dist " + " ".join(command) in out


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"ebm_dist {ebm_dist.__version__}\n"


def test_help_loads_none_of_the_heavy_packages():
    script = (
        "import sys; from ebm_dist.cli import main; main(['train', '--help']); "
        "heavy = {'torch', 'ray', 'deepspeed', 'wandb', 'numpy', 'matplotlib'} & set(sys.modules);"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_train_leaves_what_a_run_directory_promises(run_dir):
    assert {"config.yaml", "metrics.jsonl", "checkpoints", "manifest.json", "export"} <= set(
        os.listdir(run_dir)
    )
    complete = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert complete["learner"]["betas"] == [0.9, 0.999]
    assert complete["energy"]["event_shape"] == [2]


def test_train_resumes_and_goes_on_to_more_steps(run_dir, capsys):
    args = ["train", str(run_dir / "config.yaml"), "--run-dir", str(run_dir)]
    assert main([*args, "--resume", "never"]) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert main([*args, "--resume", "must", "run.steps=6"]) == 0
    manifest = json.loads((run_dir / "manifest.json").read_text())
    assert manifest["step"] == 6


def test_the_exported_energy_is_the_average_in_the_checkpoint_exactly(run_dir, tmp_path, capsys):
    from ebm_dist.checkpoint import files as checkpoint
    from ebm_dist.config.run_config import load

    assert main(["export", str(run_dir), str(tmp_path / "model")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "model")
    found = checkpoint.latest(run_dir)
    assert found is not None
    section = load(run_dir / "config.yaml").energy
    energy = section.build().eval()
    FlatLayout.of(energy).load_(energy, found.tensors("ema")["flat"])
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    loaded = ebm_dist.load_energy(tmp_path / "model")
    assert (loaded(x) - energy(x)).abs().max().item() == 0.0
    assert (loaded(x) - section.build(seed=1)(x)).abs().max().item() > 0.0


def test_an_export_carries_its_recipe_temperature_and_lineage(run_dir, tmp_path):
    assert main(["export", str(run_dir), str(tmp_path / "model")]) == 0
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["temperature"] == 1.0
    assert config["start_std"] == 2.0
    assert config["lineage"]["run"] == "small"
    assert len(config["lineage"]["config_sha256"]) == 64
    assert config["lineage"]["packages"]["torch"] == torch.__version__.split("+")[0] or config[
        "lineage"
    ]["packages"]["torch"] == str(torch.__version__)
    card = (tmp_path / "model" / "README.md").read_text()
    for text in (
        "toy:two_moons",
        "T = 1",
        "langevin",
        "T_eff = 1",
        "far apart: seen",
        "config_sha256",
    ):
        assert text in card, text
    assert (tmp_path / "model" / "samples.png").read_bytes().startswith(b"\x89PNG")


def test_sample_writes_arrays_whose_energies_are_the_models(run_dir, tmp_path):
    out = tmp_path / "deep" / "x.npz"
    args = ["sample", str(run_dir), "--num", "10", "--steps", "5", "--out", str(out)]
    assert main(args) == 0
    with np.load(out, allow_pickle=False) as file:
        x, energy = torch.from_numpy(file["x"]), torch.from_numpy(file["energy"])
    assert x.shape == (10, 2)
    assert torch.equal(ebm_dist.load_energy(run_dir)(x), energy)
    assert main([*args, "--start", "chains"]) == 0
    with np.load(out) as file:
        assert not np.array_equal(file["x"], x.numpy())
    assert main([*args, "--temperature", "1e-6"]) == 0
    with np.load(out) as file:
        assert not np.array_equal(file["x"], x.numpy())
    assert main([*args, "--temperature", "0"]) == 2


def test_config_show_is_complete_and_schema_is_json(run_dir, capsys, tmp_path):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(SMALL))
    assert main(["config", "show", str(tmp_path / "c.yaml"), "learner.lr=3e-4"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["learner"]["lr"] == 3e-4
    assert shown["checkpoint"] == {"every": 2, "keep": 3}
    assert main(["config", "schema"]) == 0
    assert set(json.loads(capsys.readouterr().out)["properties"]) == set(shown)


def test_report_and_dashboard_write_their_files(run_dir, tmp_path, capsys):
    page, board = tmp_path / "page.html", tmp_path / "board.json"
    assert main(["report", str(run_dir), "--out", str(page)]) == 0
    assert "<html" in page.read_text()
    assert main(["dashboard", "write", "--out", str(board)]) == 0
    assert "energy/gap" in board.read_text()
    assert capsys.readouterr().out.splitlines() == [str(page), str(board)]
    assert main(["report", str(tmp_path / "none")]) == 2


def test_data_prepare_writes_shards(tmp_path, capsys):
    assert main(["data", "prepare", "toy:two_moons", str(tmp_path / "d")]) == 0
    assert (tmp_path / "d" / "dataset.json").is_file()
    assert main(["data", "prepare", "toy:two_moons", str(tmp_path / "d")]) == 2
    assert "already holds" in capsys.readouterr().err


@pytest.mark.parametrize("healthy", [True, False])
def test_doctor_reports_line_by_line_and_fails_if_something_is_wrong(monkeypatch, capsys, healthy):
    from ebm_dist.run import doctor

    findings = [doctor.Finding("a", True, "fine"), doctor.Finding("b", healthy, "text", "do it")]
    monkeypatch.setattr(doctor, "examine", lambda directory: iter(findings))
    assert main(["doctor"]) == (0 if healthy else 1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "ok   a: fine"
    assert lines[1].startswith("ok  " if healthy else "FAIL")
    assert "do it" in lines[2]


def raises(error):
    def train(*args, **kwargs):
        raise error

    return train


def test_a_failed_run_says_what_where_and_how_to_resume(monkeypatch, tmp_path, capsys):
    import ebm_dist.run.train

    (tmp_path / "c.yaml").write_text(yaml.safe_dump(SMALL))
    monkeypatch.setattr(ebm_dist.run.train, "train", raises(RunFailed("learner rank 1 died")))
    directory = tmp_path / "my run"
    args = ["train", str(tmp_path / "c.yaml"), "--run-dir", str(directory)]
    assert main(args) == 1
    # Nothing is there that could be read or resumed.
    assert capsys.readouterr().err == "error: learner rank 1 died\n"
    (directory / "checkpoints" / "step_00000001").mkdir(parents=True)
    (directory / "run.log").touch()
    assert main(args) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "learner rank 1 died" in line
    assert str(directory / "run.log") in line
    assert f"ebm-dist train '{directory}/config.yaml' --run-dir '{directory}' --resume must" in line


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (UserError("run.steps: too few"), 2, "run.steps: too few"),
        (ValueError("sampler: no"), 2, "sampler: no"),
        (
            PermissionError(13, "Permission denied", "/some/file"),
            2,
            "/some/file: permission denied",
        ),
        (FileNotFoundError(2, "No such file or directory", "/gone"), 2, "/gone: no such file"),
        (OSError(36, "File name too long", "/" + 300 * "n"), 2, "n: file name too long"),
        (UserError("/data/a\nerror: forged"), 2, "error: /data/a\\nerror: forged"),
        (UserError("\x1b[2J\x07\u202e\udcff.tar"), 2, "\\x1b[2J\\x07\\u202e\\udcff.tar"),
        (RunFailed("/data/a\x1b[A"), 1, "/data/a\\x1b[A"),
        (RuntimeError("\x1b]0;title\x07"), 1, "\\x1b]0;title\\x07"),
        (KeyError("inner"), 1, "KeyError: 'inner'"),
        (RuntimeError("line one\nline two"), 1, "RuntimeError: line one line two"),
    ],
)
def test_every_failure_is_one_line_and_its_exit_code(
    monkeypatch, tmp_path, capsys, error, code, says
):
    import ebm_dist.run.train

    (tmp_path / "c.yaml").write_text(yaml.safe_dump(SMALL))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr(ebm_dist.run.train, "train", raises(error))
    assert main(["train", str(tmp_path / "c.yaml")]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
    assert "Traceback" not in line


def test_a_line_of_megabytes_is_cut_and_keeps_what_to_do(monkeypatch, tmp_path, capsys):
    import ebm_dist.run.train

    (tmp_path / "c.yaml").write_text(yaml.safe_dump(SMALL))
    long = UserError("/data/" + 2**21 * "a" + ": is too long; rename it", "second: line")
    monkeypatch.setattr(ebm_dist.run.train, "train", raises(long))
    assert main(["train", str(tmp_path / "c.yaml")]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert len(first) < 2500
    assert first.startswith("error: /data/aaa")
    assert first.endswith("aaa: is too long; rename it")
    assert second == "error: second: line"


def test_findings_and_notes_from_files_do_not_reach_the_terminal_raw(monkeypatch, capsys):
    from ebm_dist.run import doctor

    findings = [doctor.Finding("a", True, "x\x1b[2Jy\nok   b: forged")]
    monkeypatch.setattr(doctor, "examine", lambda directory: iter(findings))
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out == "ok   a: x\\x1b[2Jy\\nok   b: forged\n"


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (KeyError("inner"), 1, "the traceback is in"),
        (ModuleNotFoundError("no ray", name="ray"), 2, "pip install 'ray>="),
    ],
)
def test_a_failure_outside_of_a_run_is_one_line(monkeypatch, tmp_path, capsys, error, code, says):
    import ebm_dist.report.dashboard

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(ebm_dist.report.dashboard, "write", raises(error))
    assert main(["dashboard", "write"]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line


def test_an_interrupt_that_no_command_handles_ends_quietly(monkeypatch, tmp_path, capsys):
    import ebm_dist.run.train

    (tmp_path / "c.yaml").write_text(yaml.safe_dump(SMALL))
    monkeypatch.setattr(ebm_dist.run.train, "train", raises(KeyboardInterrupt()))
    assert main(["train", str(tmp_path / "c.yaml")]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_a_run_that_a_signal_stopped_exits_with_75_once_its_checkpoint_is_written(tmp_path):
    from ebm_dist.checkpoint import files as checkpoint

    (tmp_path / "c.yaml").write_text(yaml.safe_dump(SMALL))
    command = [sys.executable, "-m", "ebm_dist", "train", str(tmp_path / "c.yaml")]
    run_dir = tmp_path / "run"
    process = subprocess.Popen(
        [*command, "run.steps=1000000", "--run-dir", str(run_dir)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    rows = run_dir / "metrics.jsonl"
    while process.poll() is None and not (rows.exists() and rows.stat().st_size):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert errors == ""
    found = checkpoint.latest(run_dir)
    assert found is not None
    assert found.step > 0


def test_debug_mode_lets_the_exception_through(monkeypatch, tmp_path):
    monkeypatch.setenv("EBM_DIST_DEBUG", "1")
    with pytest.raises(UserError):
        main(["train", str(tmp_path / "none.yaml")])


def test_the_installed_command_exits_with_the_code(tmp_path):
    command = [sys.executable, "-m", "ebm_dist", "train", str(tmp_path / "none.yaml")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_the_families_are_known_to_the_schema():
    from ebm_dist.config.run_config import schema

    assert all(f'"{name}"' in json.dumps(schema()) for name in energies.FAMILY.members)
