"""Every call that a run makes where runtime.device is cuda, on a card that checks as CUDA does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuda_walk import CONFIGS, QUICK, faults

HERE = Path(__file__).parent

without = pytest.mark.skipif(torch.backends.cuda.is_built(), reason="this torch knows CUDA itself")


@pytest.fixture(scope="module")
def quick() -> dict[str, str | None]:
    return faults(*QUICK)


@without
@pytest.mark.parametrize("part", QUICK)
def test_a_part_of_a_run_makes_no_call_that_cuda_refuses(quick, part) -> None:
    assert quick[part] is None, quick[part]


@without
@pytest.mark.slow
def test_no_part_of_any_run_makes_a_call_that_cuda_refuses() -> None:
    found = faults()
    assert len(found) > len(CONFIGS) + 20
    assert not {part: error for part, error in found.items() if error is not None}


@without
def test_the_card_refuses_what_cuda_refuses() -> None:
    command = [sys.executable, str(HERE / "cuda_refusals.py")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout)
    assert [what for what, error in said.items() if error is None] == []


@pytest.fixture(scope="module")
def real() -> dict[str, str | None]:
    return faults("--real", *(name for name in QUICK if "ranks" not in name))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
# Two ranks need two GPUs, and each other.
@pytest.mark.parametrize("part", [name for name in QUICK if "ranks" not in name])
def test_a_part_of_a_run_goes_through_on_a_gpu(real, part) -> None:
    assert real[part] is None, real[part]
