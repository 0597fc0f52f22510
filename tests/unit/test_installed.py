"""The commands that the program prints are commands that work."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from ebm_dist import cli
from ebm_dist.core import installed
from ebm_dist.core.errors import UserError
from ebm_dist.run import doctor


def test_the_command_is_the_path_that_works_from_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripts = tmp_path / "my project" / ".venv" / "bin"
    scripts.mkdir(parents=True)
    (scripts / "python").symlink_to(sys.executable)
    monkeypatch.setattr(sys, "executable", str(scripts / "python"))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.chdir(tmp_path / "my project")
    assert installed.command() == ".venv/bin/python -m ebm_dist"
    (scripts / "ebm-dist").write_text("#!/bin/sh\necho here\n")
    (scripts / "ebm-dist").chmod(0o755)
    assert installed.command() == ".venv/bin/ebm-dist"
    assert subprocess.check_output(installed.command(), shell=True) == b"here\n"
    monkeypatch.chdir(scripts)
    assert installed.command() == "./ebm-dist"
    monkeypatch.chdir(Path(__file__).parent)
    assert shlex.split(installed.command()) == [str(scripts / "ebm-dist")]
    monkeypatch.setenv("PATH", f"{scripts}:/usr/bin")
    assert installed.command() == "ebm-dist"
    other = tmp_path / "other"
    other.mkdir()
    (other / "ebm-dist").write_text("#!/bin/sh\n")
    (other / "ebm-dist").chmod(0o755)
    monkeypatch.setenv("PATH", str(other))
    assert installed.command() != "ebm-dist", "another installation's"


def test_what_to_install_names_packages_that_registries_have() -> None:
    command = installed.how_to_install("train")
    assert command.startswith("pip install ")
    assert {word.split(">")[0] for word in shlex.split(command)[2:]} == {
        "ray",
        "deepspeed",
        "wandb",
    }
    assert installed.how_to_install("no-such-extra").startswith("pip install '.[no-such-extra]'")


@pytest.mark.parametrize("missing", ["ray", "deepspeed"])
def test_training_without_its_packages_is_one_line_and_leaves_nothing(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    real = installed.importlib.util.find_spec
    monkeypatch.setattr(
        installed.importlib.util,
        "find_spec",
        lambda name, *rest: None if name == missing else real(name, *rest),
    )
    config = str(Path(__file__).parents[2] / "configs" / "toy" / "score_matching.yaml")
    code = cli.main(["train", config, "runtime.backend=ray", "--run-dir", str(tmp_path / "run")])
    (line,) = capsys.readouterr().err.splitlines()
    assert code == 2
    assert f"{missing} is not installed" in line
    assert installed.how_to_install("train") in line
    assert not (tmp_path / "run").exists()


def test_where_fcntl_is_missing_training_says_so_in_one_line_and_a_config_is_still_read() -> None:
    program = """
import sys
sys.modules["fcntl"] = None
from ebm_dist.run import doctor
from ebm_dist.cli import main
print(doctor.check_system().todo)
config = "configs/toy/score_matching.yaml"
print(main(["train", config]), flush=True)
print(main(["config", "show", config]), flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )
    lines = done.stdout.splitlines()
    assert (lines[:2], lines[-1]) == ([installed.NO_FCNTL, "2"], "0"), done
    assert "run:" in lines
    assert done.stderr.splitlines() == [f"error: {installed.NO_FCNTL}"]


def test_a_system_with_fcntl_is_whole() -> None:
    assert doctor.check_system().ok
    with pytest.raises(UserError, match="no_such_package is not installed"):
        installed.require("no_such_package")
