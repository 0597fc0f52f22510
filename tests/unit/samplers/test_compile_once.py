"""The processes of a node compile the same steps once: each finds what another has compiled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ebm_dist.samplers.compile import compiler

COMPILES = """
import json
import torch
from torch._inductor import cpp_builder

from ebm_dist import energies
from ebm_dist.samplers import FAMILY, Engine, run_chain

run, commands = cpp_builder.run_compile_cmd, []

def noted(command, cwd):
    commands.append(command)
    run(command, cwd)

cpp_builder.run_compile_cmd = noted
kernel = FAMILY.make("langevin", **FAMILY.members["langevin"].example)
energy = energies.make("mlp", event_shape=(2,), widths=(16, 16)).eval()
with torch.no_grad():
    for parameter in energy.parameters():
        parameter.fill_(0.1)
engine = Engine("compiled", steady=True)  # where the compiler fails it raises
chain = run_chain(
    kernel, torch.ones(6, 2), energy, 10, torch.Generator().manual_seed(0), engine=engine
)
sources = [word for line in commands for word in line.split() if word.endswith(".cpp")]
print(json.dumps([sources, chain.position.tolist()]))
"""


pytestmark = pytest.mark.skipif(
    compiler.missing() is not None, reason=f"cannot compile: {compiler.missing()}"
)


def begin(cache: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    command = [sys.executable, "-c", COMPILES]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def test_two_processes_that_begin_together_compile_nothing_twice(tmp_path: Path) -> None:
    processes = [begin(tmp_path / "cache") for _ in range(2)]
    said = [process.communicate(timeout=500)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    (first, position), (second, same) = map(json.loads, said)
    # Either may compile a graph of the block; both preprocess torch's header, for the cache's key.
    compiled = [Path(source).name for source in first + second]
    assert compiled
    assert sorted(set(compiled)) == sorted(compiled)
    assert position == same


@pytest.mark.slow
def test_a_library_that_a_killed_process_left_empty_is_made_again(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    (_, position) = json.loads(begin(cache).communicate(timeout=500)[0])
    libraries = list(cache.glob("*/*.main.so"))
    sizes = {path: path.stat().st_size for path in libraries}
    assert sizes
    for path in libraries:
        os.truncate(path, 0)
    again = begin(cache)
    (_, same) = json.loads(again.communicate(timeout=500)[0])
    assert again.returncode == 0
    assert same == position
    assert {path: path.stat().st_size for path in libraries} == sizes
