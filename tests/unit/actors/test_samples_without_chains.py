"""What a run without chains draws to be looked at: by its own seed, from where chains start."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import SMALL, curve, run

from ebm_dist import load_energy, train
from ebm_dist.actors.worker import Worker
from ebm_dist.cluster.backend import PartDied
from ebm_dist.cluster.inline import InlineBackend
from ebm_dist.controller.clients import WorkerClient
from ebm_dist.core.types import ChainSample, EventSpec
from ebm_dist.core.weights import FlatLayout
from ebm_dist.data import DataConfig, load_split
from ebm_dist.energies import FAMILY as ENERGIES
from ebm_dist.export.writer import export_run
from ebm_dist.report.html import render
from ebm_dist.samplers import FAMILY as SAMPLERS

FLAT = {
    **SMALL,
    "objective": {"name": "score_matching"},
    "learner": {**SMALL["learner"], "lr": 1e-9},
    "buffer": {**SMALL["buffer"], "init_std": 5.0},
}


def samples(folder: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> list[ChainSample]:
    """What the run drew at its evaluations."""
    sample, drawn = Worker.sample, []

    def watched(self: Worker, *args):
        drawn.append(sample(self, *args))
        return drawn[-1]

    with monkeypatch.context() as patch:
        patch.setattr(Worker, "sample", watched)
        run(folder, "run.steps=2", "evaluation.every=1", *overrides, base=FLAT)
    return drawn


class Slow:
    """The samples that a run asks for arrive `late` looks later, or never with the first worker."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, late: int, *, lost: bool = False) -> None:
        self.looks = 0
        ask, wait, get = WorkerClient.sample, InlineBackend.wait, InlineBackend.get
        asked: list[object] = []

        def ask_(client: WorkerClient, *args):
            asked.append(ask(client, *args))
            return asked[-1]

        def wait_(backend: InlineBackend, refs, timeout: float):
            if len(asked) == 1 and asked[0] in refs and self.looks < late:
                self.looks += 1
                assert timeout == 0.0, "no update waits for samples"
                return [ref for ref in wait(backend, refs, timeout) if ref is not asked[0]]
            return wait(backend, refs, timeout)

        def get_(backend: InlineBackend, ref, timeout: float):
            if lost and ref in asked[:1]:
                raise PartDied("worker-0 was killed")
            return get(backend, ref, timeout)

        monkeypatch.setattr(WorkerClient, "sample", ask_)
        monkeypatch.setattr(InlineBackend, "wait", wait_)
        monkeypatch.setattr(InlineBackend, "get", get_)


def test_training_goes_on_while_a_worker_draws_and_the_samples_are_those_of_their_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("run.steps=8", "evaluation.every=2")
    run(tmp_path / "prompt", *options, base=FLAT)
    with monkeypatch.context() as patch:
        slow = Slow(patch, late=8)
        _, screen = run(tmp_path / "slow", *options, base=FLAT)
    assert slow.looks == 8
    assert screen.count("is still under way at update 4") == 1
    prompt, late = (curve(tmp_path / name, "energy/noise") for name in ("prompt", "slow"))
    assert list(prompt) == [2, 4, 6, 8]
    assert (min(late), max(late)) == (2, 8)
    assert len(late) < len(prompt)
    assert all(late[step] == prompt[step] for step in set(late) & set(prompt))
    weights = [load_energy(tmp_path / name / "export") for name in ("prompt", "slow")]
    for a, b in zip(*(energy.state_dict().values() for energy in weights), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("late", [1, 10**6], ids=["between updates", "at the end of the run"])
def test_a_drawing_that_a_worker_died_under_is_made_again(
    late: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Slow(monkeypatch, late, lost=True)
    options = ("run.steps=8", "evaluation.every=4", "flow.mode=async")
    result, _ = run(tmp_path / "r", *options, base=FLAT)
    assert result.finished
    measured = list(curve(tmp_path / "r", "energy/noise"))
    assert measured == ([6, 8] if late == 1 else [8])


def test_samples_depend_on_the_seed_of_the_run_and_on_the_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = samples(tmp_path / "a", monkeypatch)[:2]
    other = samples(tmp_path / "b", monkeypatch, "run.seed=4")[0]
    assert not np.isin(first.x, other.x).any()
    assert not np.isin(first.x, second.x).any()
    # Noise of buffer.init_std = 5 under E = x^2: the mean of 256 energies is 25.
    noise = curve(tmp_path / "a", "energy/noise")[1]
    assert noise != curve(tmp_path / "b", "energy/noise")[1]
    assert abs(noise - 25) < 4 * 25 * (2 / 256) ** 0.5


class Noises:
    """The worker's noise, by moves that are nothing else: E = 0 and 2 T h = 1."""

    def __init__(self) -> None:
        energy = ENERGIES.section("quadratic", precision=[1e-9])
        sampler = SAMPLERS.section("langevin", step_size=0.5, temperature=1.0)
        spec = EventSpec((1,), "real")
        self._worker = Worker(energy, sampler, spec)  # type: ignore[arg-type]
        self._flat = FlatLayout.of(energy.build()).pack(energy.build()).numpy()  # type: ignore

    def __call__(self, seed: int, num_steps: int, start_std: float) -> torch.Tensor:
        x = self._worker.sample(4000, num_steps, self._flat, seed, start_std).x
        return torch.from_numpy(np.array(x)).flatten()


def test_samples_start_at_the_width_of_the_buffer_and_move_by_other_noise() -> None:
    noises = Noises()
    error = (2 / 4000) ** 0.5
    for start_std in (0.5, 3.0):
        x = noises(7, 1, start_std)
        assert abs(float(x.var()) / (start_std**2 + 1) - 1) < 4 * error
    starts = noises(7, 1, 1e6) / 1e6
    moves = noises(7, 1, 1e-6)
    # Neither of one occasion, nor of an occasion and the one after it.
    for other in (moves, noises(8, 1, 1e-6), noises(6, 1, 1e-6), noises(8, 1, 1e6) / 1e6):
        correlation = float(torch.corrcoef(torch.stack([starts, other]))[0, 1])
        assert abs(correlation) < 4 / 4000**0.5


def test_card_and_report_of_a_run_without_chains_name_nothing_that_did_not_run(
    tmp_path: Path,
) -> None:
    run(tmp_path / "run", "run.steps=5", "evaluation.every=5", base=FLAT)
    card = (tmp_path / "run" / "export" / "README.md").read_text()
    recipe = [line.split("**")[1] for line in card.splitlines() if line.startswith("- **")]
    assert recipe == ["energy", "sampler", "objective", "learner"]
    assert "![Samples drawn at update 5](samples.png)" in card
    drawn = (tmp_path / "run" / "samples" / "step_00000005.png").read_bytes()
    assert (tmp_path / "run" / "export" / "samples.png").read_bytes() == drawn
    secret = (tmp_path / "run" / "samples" / "step_00000005.png").rename(tmp_path / "secret")
    (tmp_path / "run" / "samples" / "step_00000005.png").symlink_to(secret)
    again = export_run(tmp_path / "run", tmp_path / "again")
    assert not (again / "samples.png").exists()
    assert "samples.png)" not in (again / "README.md").read_text()
    page = render(tmp_path / "run")
    assert "accounted for" not in page
    assert "buffer/" not in page
    run(tmp_path / "chains", "run.steps=5")
    card = (tmp_path / "chains" / "export" / "README.md").read_text()
    assert "- **buffer**" in card
    assert "all 256 chains are accounted for" in render(tmp_path / "chains")


class Portraits(torch.nn.Module):
    """E(x, label, level): each class is one picture, with the noise of the level."""

    context = needs_context = frozenset({"label", "level"})
    num_labels = 10
    noise_stds = (0.05, 0.3, 1.0)

    def __init__(self) -> None:
        super().__init__()
        train = load_split(DataConfig(source="digits"), "train")
        assert train.label is not None
        first = [int((train.label == label).nonzero()[0]) for label in range(10)]
        self.pictures = torch.nn.Parameter(train.x[first].clone())

    def forward(self, x: torch.Tensor, label: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        std = torch.tensor(self.noise_stds, dtype=x.dtype)[level]
        return (x - self.pictures[label]).flatten(1).square().sum(1) / (2 * std.square())


def test_what_is_drawn_is_measured_beside_the_class_that_was_asked_for(tmp_path: Path) -> None:
    config = {
        **FLAT,
        "run": {"name": "portraits", "seed": 3, "steps": 1},
        "data": {"source": "digits", "batch_size": 32, "prefetch": 0},
        "energy": {"name": "mlp"},
        "sampler": {"name": "predictor_corrector", "num_corrections": 3, "num_steps": 4},
        "objective": {"name": "denoising_score_matching", "conditioning": "level"},
        "learner": {"num_threads": 1, "lr": 1e-12},
        "buffer": {},
        "evaluation": {"every": 1, "num_samples": 200},
    }
    result = train(config, energy=Portraits(), run_dir=tmp_path / "r")
    metrics = {
        name.removeprefix("fidelity/"): value
        for name, value in result.metrics.items()
        if name.startswith("fidelity/")
    }
    assert metrics["accuracy"] > 0.95
    assert metrics["label_accuracy"] > 0.95
    assert 0.08 < metrics["class_share_min"] <= 0.1 <= metrics["class_share_max"] < 0.12
    # One picture a class: every sample is near a real image, and few real images near a sample.
    assert metrics["precision"] > 0.7
    assert metrics["recall"] < 0.3
    assert metrics["train"] < metrics["distance"]
