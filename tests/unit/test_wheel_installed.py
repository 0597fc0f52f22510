"""The wheel works in a clean environment of its own, without the extra [train]."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from pythons import PYTHONS, ROOT, interpreter
from wheel_build import build_wheel

pytestmark = pytest.mark.slow

CONSTRAINTS = ROOT / "constraints.txt"
(TORCH,) = (line for line in CONSTRAINTS.read_text().splitlines() if line.startswith("torch=="))

LOADS = """
import importlib.util
import torch
import ebm_dist
energy = ebm_dist.load_energy("digits")
assert energy(torch.zeros(2, 1, 8, 8)).shape == (2,)
assert not any(map(importlib.util.find_spec, ("ray", "deepspeed", "wandb")))
print(ebm_dist.__file__)
"""


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("version", "pins"),
    [(PYTHONS[0], ()), (PYTHONS[-1], ("-c", str(CONSTRAINTS)))],
    ids=["as a user's pip resolves it", "pinned"],
)
def test_the_wheel_loads_samples_and_evaluates_where_it_alone_is_installed(
    version: str, pins: tuple[str, ...], tmp_path: Path
) -> None:
    python = interpreter(version)
    if python is None:
        pytest.skip(f"there is no Python {version} here")
    wheel, _ = build_wheel(tmp_path)
    # pip's own settings stay: they say where packages come from.
    ours = ("PYTHON", "VIRTUAL_ENV")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(ours)}

    def run(*command: str | Path, code: int = 0) -> str:
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == code, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    run(python, "-m", "venv", "env")
    scripts = tmp_path / "env" / "bin"
    pip = [scripts / "python", "-m", "pip", "--disable-pip-version-check"]
    try:
        run(*pip, "--retries", "0", "download", "--no-deps", *pins, "--dest", "tried", "einops")
    except AssertionError as error:
        pytest.skip(f"pip has no index here: {str(error).splitlines()[-1]}")
    # First and alone, as in the Makefile. Another version's CUDA build would be gigabytes.
    run(*pip, "install", TORCH)
    run(*pip, "install", *pins, wheel)
    run(*pip, "check")

    assert run(scripts / "python", "-c", LOADS).startswith(str(tmp_path / "env"))
    ebm_dist = scripts / "ebm-dist"
    assert "digits-rbm" in run(ebm_dist, "pretrained", "list")
    run(ebm_dist, "sample", "digits", "--num", "4", "--label", "3", "--out", "threes.png")
    assert (tmp_path / "threes.png").read_bytes().startswith(b"\x89PNG")
    # The data of `digits` are in scikit-learn, which the wheel requires.
    run(ebm_dist, "evaluate", "digits", "--suite", "ood", "--out", "ood.json")
    assert json.loads((tmp_path / "ood.json").read_text())["metrics"]
    refused = run(ebm_dist, "train", ROOT / "configs" / "digits.yaml", code=2)
    assert "is not installed" in refused
