"""Every call that a run makes where runtime.device is cuda, on a card that checks as CUDA does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuda_walk import CONFIGS, QUICK

HERE = Path(__file__).parent

pytestmark = pytest.mark.skipif(
    torch.backends.cuda.is_built(), reason="this torch knows CUDA itself: see the marker gpu"
)


def walked(script: str, *words: str) -> subprocess.CompletedProcess[str]:
    # A process of its own: the card changes torch, and DeepSpeed knows one kind of device.
    env = {**os.environ, "DS_ACCELERATOR": "cpu"}  # runtime.device decides, and not this
    command = [sys.executable, str(HERE / script), *words]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=1200)


def faults(*words: str) -> dict[str, str | None]:
    done = walked("cuda_walk.py", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    return {row["part"]: row["error"] for row in map(json.loads, done.stdout.splitlines())}


@pytest.fixture(scope="module")
def quick() -> dict[str, str | None]:
    return faults(*QUICK)


@pytest.mark.parametrize("part", QUICK)
def test_a_part_of_a_run_makes_no_call_that_cuda_refuses(quick, part) -> None:
    assert quick[part] is None, quick[part]


@pytest.mark.slow
def test_no_part_of_any_run_makes_a_call_that_cuda_refuses() -> None:
    found = faults()
    assert len(found) > len(CONFIGS) + 20
    assert not {part: error for part, error in found.items() if error is not None}


def test_the_card_refuses_what_cuda_refuses() -> None:
    done = walked("cuda_refusals.py")
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout)
    assert [what for what, error in said.items() if error is None] == []
