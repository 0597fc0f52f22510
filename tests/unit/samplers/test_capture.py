"""Captured blocks: what is copied, what is not, and what happens without a recording.

A stand-in for a CUDA graph repeats a function on the memory that it was recorded with, which is
all that a graph does; the graph itself is tested where there is a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from ebm_dist import energies, samplers
from ebm_dist.samplers import Engine, run_chain
from ebm_dist.samplers.compile import capture
from ebm_dist.samplers.compile import engine as engine_module


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often each recording was replayed."""
    counts: list[int] = []

    def record(run: Callable[[], Sequence[Tensor]], device: torch.device) -> Any:
        results, number = run(), len(counts)
        counts.append(0)

        def replay() -> None:
            counts[number] += 1
            for result, new in zip(results, run()):
                result.copy_(new)

        return replay, results

    monkeypatch.setattr(capture, "record", record)
    monkeypatch.setattr(
        engine_module, "compile_graph", lambda graph, inputs: lambda tensors: graph(*tensors)
    )
    return counts


def refuse(line: str) -> None:
    raise AssertionError(line)


def test_a_recording_reads_new_inputs_and_its_results_outlive_the_next_call(recordings):
    held = torch.zeros(2)
    twice = capture.Captured(lambda t: [t[0] + t[1] + t[2], t[0]], 1, refuse)
    a, b = torch.ones(2), torch.full((2,), 10.0)
    first = twice([a, b, held])
    held.fill_(100)
    second = twice([2 * a, b, held])
    assert [t.tolist() for t in first] == [[11, 11], [1, 1]]
    assert [t.tolist() for t in second] == [[112, 112], [2, 2]]
    assert a.tolist() == [1, 1]
    assert recordings == [2]


@pytest.mark.parametrize("name", ["langevin", "mala"])
def test_captured_blocks_give_the_chains_of_blocks_bit_for_bit(recordings, name):
    energy = energies.make("mlp", event_shape=(2,), widths=(16, 16)).eval()
    x = torch.randn(8, 2, generator=generator(1))
    kernel = samplers.make(name, step_size=0.05, temperature=1.0)
    captured = Engine("compiled", background=False, captured=True)
    plain = Engine("compiled", background=False)
    chains = []
    for seed in range(3):
        for p in energy.parameters():  # new weights, at new addresses
            p.data = p.data * 1.1
        a = run_chain(kernel, x, energy, 40, generator(seed), engine=captured)
        b = run_chain(kernel, x, energy, 40, generator(seed), engine=plain)
        assert torch.equal(a.position, b.position)
        assert torch.equal(a.energies, b.energies)
        assert all(torch.equal(a.info[name], b.info[name]) for name in a.info)
        chains.append((a.position, a.position.clone()))
    # Of a block that does not know where it ends, that energy as well; recorded when first run.
    assert len(recordings) == (2 if name == "langevin" else 1)
    assert recordings[0] >= 6
    assert all(torch.equal(now, then) for now, then in chains)


def test_without_a_recording_blocks_go_on_and_say_so_once(monkeypatch):
    def fails(run: Any, device: torch.device) -> Any:
        run()
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(capture, "record", fails)
    said: list[str] = []
    run = capture.Captured(lambda t: [t[0] * 2], 0, said.append)
    assert [run([torch.full((1,), v)])[0].item() for v in (1.0, 2.0, 3.0)] == [2, 4, 6]
    assert said == [
        "sampler.engine: blocks are launched kernel by kernel, because operation not permitted "
        "when stream is capturing"
    ]
