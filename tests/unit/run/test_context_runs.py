"""Runs whose chains carry labels: the bits, the law of what is trained, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chains_with_context import chains, killed
from safetensors.torch import load_file, save_file

import ebm_dist
from ebm_dist.actors.auditor import Auditor
from ebm_dist.config.run_config import load
from ebm_dist.core.errors import UserError
from ebm_dist.core.types import ContextField
from ebm_dist.data import DataConfig, describe, load_split
from ebm_dist.export import suites
from ebm_dist.export.one_law import of_one_law
from ebm_dist.export.sample import draw_samples, usual_steps

CONFIG: dict[str, Any] = {
    "run": {"seed": 3, "steps": 4},
    "runtime": {"backend": "inline"},
    "data": {"source": "digits", "batch_size": 16},
    "energy": {"name": "resnet", "width": 4, "num_classes": "data"},
    "sampler": {"name": "langevin", "step_size": 1.0, "noise_std": 0.01, "num_steps": 3},
    "objective": {"name": "contrastive"},
    "buffer": {"capacity": 64, "num_shards": 2, "context": {"label": "uniform"}},
    "workers": {"num_workers": 2, "num_chains": 8},
    "flow": {"mode": "sync"},
    "tracking": {"wandb": "off"},
    "evaluation": {"every": None},
    "checkpoint": {"every": 2},
}


def config(tmp_path: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """CONFIG with other keys; a section with a name, or a source, is another one altogether."""
    merged = dict(CONFIG)
    for key, value in sections.items():
        other = "name" in value or "source" in value
        merged[key] = value if other else {**CONFIG.get(key, {}), **value}
    merged["run"] = {**merged["run"], "dir": str(tmp_path)}
    return merged


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "export" / "model.safetensors")


def equal(a: Path, b: Path) -> bool:
    one, other = weights(a), weights(b)
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("label", ["uniform", "data"])
def test_sync_is_bitwise_with_labels_whoever_moves_the_chains_and_after_a_resume(
    label: str, tmp_path: Path
) -> None:
    base = config(tmp_path, buffer={"context": {"label": label}, "reinit_prob": 0.3})
    ebm_dist.train(base, run_dir=tmp_path / "a")
    four = {**base, "workers": {"num_workers": 4, "num_chains": 8}}
    ebm_dist.train(four, run_dir=tmp_path / "b")
    assert equal(tmp_path / "a", tmp_path / "b")
    short = {**base, "run": {**base["run"], "steps": 2}}
    ebm_dist.train(short, run_dir=tmp_path / "c")
    ebm_dist.train(base, run_dir=tmp_path / "c", resume="must")
    assert equal(tmp_path / "a", tmp_path / "c")
    without = {**base, "buffer": {**base["buffer"], "context": {}}}
    ebm_dist.train(without, run_dir=tmp_path / "d")
    assert not equal(tmp_path / "a", tmp_path / "d")


@pytest.mark.ray
def test_on_ray_labels_train_bit_for_bit_when_killed_and_resumed_with_fewer_workers(
    tmp_path: Path,
) -> None:
    """On one node chains and labels go by rows of shared memory; here to two ranks."""
    base = config(
        tmp_path,
        runtime={"backend": "ray", "address": "local"},
        # Sums are taken in another order by another number of threads.
        learner={"num_ranks": 2, "num_threads": 1},
        buffer={"context": {"label": "data"}, "reinit_prob": 0.3},
        workers={"num_workers": 2, "num_chains": 8, "num_threads": 1},
    )
    ebm_dist.train(base, run_dir=tmp_path / "a")
    one = {**base, "workers": {**base["workers"], "num_workers": 1}}
    resumed = killed(tmp_path / "a", 2)
    ebm_dist.train(one, run_dir=resumed, resume="must")
    assert equal(tmp_path / "a", resumed)


def test_samples_of_a_label_are_drawn_from_its_own_energy(tmp_path: Path) -> None:
    result = ebm_dist.train(config(tmp_path), run_dir=tmp_path / "r")
    export = result.open_export()
    x, energy = ebm_dist.sample(export, 6, label=[0, 1, 2, 3, 4, 9], num_steps=5)
    logits = export.energy.logits(x)
    torch.testing.assert_close(energy, -logits[range(6), [0, 1, 2, 3, 4, 9]])
    again, _ = ebm_dist.sample(export, 6, label=3, num_steps=5)
    assert not torch.equal(x, again)
    for wrong in (10, -1, [1, 2], 0.5):
        with pytest.raises(UserError, match="label: expected"):
            ebm_dist.sample(export, 6, label=wrong)  # type: ignore[arg-type]


def test_an_export_keeps_the_labels_of_its_chains_and_is_audited_under_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suites, "AUDIT_FACTOR", 10)
    brief = {**CONFIG["sampler"], "num_steps": 1}
    base = config(tmp_path, sampler=brief)
    export = ebm_dist.train(base, run_dir=tmp_path / "r").open_export()
    stored = export.stored()
    assert stored is not None
    x, label = stored.x, stored.context["label"]
    last = tmp_path / "r" / "checkpoints" / "step_00000004"
    shards = [load_file(path) for path in sorted(last.glob("shard*.safetensors"))]
    of_chain = {
        position.numpy().tobytes(): int(y)
        for shard in shards
        for position, y in zip(shard["position"], shard["context/label"])
    }
    assert [of_chain[row.numpy().tobytes()] for row in x] == label.tolist()
    assert len(set(label.tolist())) > 5

    found = suites.evaluate(export, "landscape")["metrics"]
    data = load_split(DataConfig(source="digits"), "train", suites.NUM_TEST)
    with torch.no_grad():
        energy = -export.energy.logits(data.x).gather(1, data.label[:, None]).mean()
    assert found["audit/energy_data"] == pytest.approx(float(energy), rel=1e-4)

    together, temperature = of_one_law(export, "ood")[0], suites.temperature_of(export)
    with torch.no_grad():
        by_class = -export.energy.logits(x).double()
        expected = -temperature * (-by_class / temperature).logsumexp(1)
        torch.testing.assert_close(together.energy(x).double(), expected, rtol=1e-4, atol=1e-6)
        assert (export.energy(x) - expected).abs().min() > 1
    assert "all classes together" in suites.evaluate(export, "ood")["notes"][-1]

    # Left out, the labels are each as often, or those of the chains that go on.
    energy_of = lambda x, y: -export.energy.logits(x).gather(1, y[:, None])[:, 0]  # noqa: E731
    x, e = draw_samples(export, 20, 2)
    torch.testing.assert_close(e, energy_of(x, torch.arange(20) % 10))
    x, e = draw_samples(export, len(label), 0, start="chains")
    label_of = {row.numpy().tobytes(): y for row, y in zip(stored.x, label)}
    again = torch.stack([label_of[row.numpy().tobytes()] for row in x])
    torch.testing.assert_close(e, energy_of(x, again))
    x, _ = draw_samples(export, 5, 0, start="chains", label=3)
    assert all(label_of[row.numpy().tobytes()] == 3 for row in x)
    damaged = {
        "negative": label - 1,
        "too large": label + 1,
        "of two numbers": torch.stack([label, label], 1),
        "lost": None,
    }
    for labels in damaged.values():
        tensors = {"x": stored.x} if labels is None else {"x": stored.x, "label": labels}
        save_file(tensors, export.path / "chains.safetensors")
        with pytest.raises(UserError, match=r"chains\.safetensors: expected a label|lost their"):
            draw_samples(export, 5, 0, start="chains")
        with pytest.raises(UserError, match=r"chains\.safetensors: expected a label|lost their"):
            suites.evaluate(export, "landscape")
    save_file({"x": stored.x, "label": label}, export.path / "chains.safetensors")
    # Half of the chains of a run are younger than ln 2 / 0.05 rounds of one step.
    assert usual_steps(export) == 14

    begun = {**base["run"], "init_from": str(export.path), "init_chains": True, "steps": 1}
    ebm_dist.train({**base, "run": begun}, run_dir=tmp_path / "more")


class Grey(torch.nn.Module):
    """E(x, y) = 50 |x - m_y|^2, where all pixels of m_y are (y - 5) / 5: minima far from data."""

    context = frozenset({"label"})
    needs_context = frozenset({"label"})
    num_labels = 10

    def __init__(self) -> None:
        super().__init__()
        self.grey = torch.nn.Parameter((torch.arange(10.0) - 5) / 5)

    def build(self) -> Grey:
        return Grey()

    def forward(self, x: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return 50 * (x.flatten(1) - self.grey[label, None]).square().sum(1)


def test_an_audit_moves_each_chain_under_its_label_and_feeds_it_back_with_it(
    tmp_path: Path,
) -> None:
    audits = {
        "every": None, "audit_every": 1, "audit_steps": 200, "audit_chains": 16,
        "audit_feedback": True, "num_test": 32,
    }  # fmt: skip
    brief = {**CONFIG["sampler"], "step_size": 0.002, "noise_std": 0.001}
    run = load(config(tmp_path, evaluation=audits, sampler=brief, energy={"name": "mlp"}))
    spec = describe(run.data)
    fields = (ContextField("label", size=10),)
    parts = (run.evaluation, run.data, Grey(), run.sampler, run.buffer, spec)
    found = Auditor(*parts, fields=fields, seed=0).audit(1, np.array(Grey().grey.detach()), None)  # type: ignore[arg-type]
    x, label = found.negatives.x, found.negatives.context["label"]
    assert len(x) == 16
    assert np.bincount(label).max() <= 2
    assert np.abs(x - ((label - 5) / 5)[:, None, None, None]).max() < 0.1
    assert found.energies.shape == (16,)
    assert found.energies.max() < 1 < found.values["audit/energy_gap"]

    result = ebm_dist.train(
        config(tmp_path, evaluation=audits, sampler=brief), energy=Grey(), run_dir=tmp_path / "r"
    )
    assert result.metrics["audit/fed_back"] > 0


def test_each_class_of_a_gaussian_mixture_gets_its_own_mean(tmp_path: Path) -> None:
    """E(x, y) = |x - m_y|^2 / 2: class-conditional PCD has to find every m_y."""
    means = torch.tensor([[-2.0, 0.0], [0.0, 3.0], [1.0, -1.0]])
    g = torch.Generator().manual_seed(0)
    label = torch.arange(3000) % 3
    data = [(x, int(y)) for x, y in zip(means[label] + torch.randn(3000, 2, generator=g), label)]

    result = ebm_dist.train(
        config(
            tmp_path,
            run={"seed": 3, "steps": 300},
            data={"batch_size": 128, "num_classes": 3},
            sampler={"name": "mala", "step_size": 0.5, "num_steps": 5},
            buffer={
                "capacity": 512,
                "num_shards": 2,
                "reinit_prob": 0.01,
                "context": {"label": "uniform"},
            },
            workers={"num_workers": 2, "num_chains": 64},
            learner={"lr": 0.05, "schedule": "cosine"},
        ),
        energy=Means(),
        data=data,
        run_dir=tmp_path / "r",
    )
    found = result.open_export().energy.means.detach()
    truth = torch.stack([torch.stack([x for x, y in data if y == k]).mean(0) for k in range(3)])
    # The optimum is the mean of the data of each class. Over seeds a coordinate strays from it by
    # .01 to .02, the noise of the chains averaged over the last updates.
    assert (found - truth).abs().max() < 4 * 0.02, found


class Means(torch.nn.Module):
    """E(x, y) = |x - m_y|^2 / 2."""

    context = frozenset({"label"})
    needs_context = frozenset({"label"})
    num_labels = 3

    def __init__(self) -> None:
        super().__init__()
        self.means = torch.nn.Parameter(torch.zeros(3, 2))

    def forward(self, x: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return 0.5 * (x - self.means[label]).square().sum(1)


class Plain(torch.nn.Module):
    """E(x) = w |x|^2."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x.square().flatten(1).sum(1)


class WithLabels(Plain):
    """As the line about `Plain` says that it should be."""

    context = {"label"}  # noqa: RUF012 - as a user would write it
    num_labels = 10

    def forward(self, x: torch.Tensor, label: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(x) * (1 if label is None else 1 + label / 10)


def test_a_network_of_ones_own_is_told_the_attributes_by_which_it_takes_labels(
    tmp_path: Path,
) -> None:
    says = r"let the network's call take label and give it .* context = \{'label'\} and num_labels"
    base = config(tmp_path, run={"seed": 3, "steps": 1}, energy={"name": "mlp"})
    with pytest.raises(UserError, match=rf"module takes no label; {says} .*, or leave the key out"):
        ebm_dist.train(base, energy=Plain(), run_dir=tmp_path / "r")
    unlabelled = {**base, "buffer": {**base["buffer"], "context": {}}}
    export = ebm_dist.train(unlabelled, energy=Plain(), run_dir=tmp_path / "a").open_export()
    with pytest.raises(UserError, match=f"label: the energy takes none; leave it out, or {says}"):
        ebm_dist.sample(export, 2, label=3)
    with pytest.raises(ValueError, match=f"Plain takes no context, got label; .* or {says}"):
        ebm_dist.energies.bind(Plain(), label=torch.zeros(2, dtype=torch.int64))

    export = ebm_dist.train(base, energy=WithLabels(), run_dir=tmp_path / "b").open_export()
    x, energy = ebm_dist.sample(export, 2, label=3)
    torch.testing.assert_close(energy, export.energy(x, label=torch.tensor([3, 3])))


REFUSED = {
    "buffer.context.label: set, but energy.name": {
        "energy": {"num_classes": None},
    },
    "buffer.context.label: the data names no classes": {
        "data": {"source": "toy:swiss_roll", "batch_size": 16},
        "energy": {"name": "mlp", "num_classes": 10, "widths": [8]},
    },
    "buffer.context.label: set, but Jarzynski": {
        "buffer": {"jarzynski": True, "reinit_prob": 0.0, "context": {"label": "uniform"}},
    },
    "buffer.context.label: set, but objective.name": {
        "objective": {"name": "denoising_score_matching", "noise_std": 0.1},
    },
    "buffer.context.condition: the data has no conditions": {
        "buffer": {"context": {"condition": "data"}},
    },
    "evaluation.audit_every: 2, but an audit": {
        "energy": {"name": "resnet", "width": 4, "num_levels": 2, "noise_stds": [0.1, 1.0]},
        "buffer": {"context": {"level": "stratified"}},
        "evaluation": {"audit_every": 2},
    },
}


@pytest.mark.parametrize("line", REFUSED)
def test_a_context_that_fits_nothing_is_one_line(line: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=line):
        ebm_dist.train(config(tmp_path, **REFUSED[line]), run_dir=tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_pictures_show_the_classes_in_order_and_chains_are_what_was_asked(tmp_path: Path) -> None:
    run = config(tmp_path, evaluation={"every": 4, "num_samples": 32, "fidelity_epochs": 1})
    result = ebm_dist.train(run, run_dir=tmp_path / "r")
    text = (result.run_dir / "metrics.jsonl").read_text()
    assert "fidelity/label_accuracy" in text
    assert (result.run_dir / "samples" / "neighbours" / "step_00000004.png").is_file()
    assert np.isfinite(result.metrics["fidelity/confident"])


def test_a_run_begins_from_another_with_its_labels_or_with_new_ones(tmp_path: Path) -> None:
    labelled = config(tmp_path, checkpoint={"every": 4, "keep": 5})
    ebm_dist.train(labelled, run_dir=tmp_path / "a")
    plain = config(tmp_path, buffer={"context": {}})
    ebm_dist.train(plain, run_dir=tmp_path / "plain")

    def begun(base: dict[str, Any], source: str, run_dir: str, with_chains: bool) -> None:
        keys = {"init_from": str(tmp_path / source), "init_chains": with_chains}
        ebm_dist.train({**base, "run": {**base["run"], **keys}}, run_dir=tmp_path / run_dir)

    begun(labelled, "a", "b", with_chains=True)
    there, here = chains(tmp_path / "a", 4), chains(tmp_path / "b", 0)
    for name in ("position", "context/label"):
        assert np.array_equal(there[name], here[name])
    begun(labelled, "plain", "c", with_chains=False)
    assert np.bincount(chains(tmp_path / "c", 0)["context/label"]).min() >= 6  # of 64 / 10
    begun(plain, "a", "d", with_chains=True)
    with pytest.raises(UserError, match=r"run\.init_chains: true, but the chains of .* no label"):
        begun(labelled, "plain", "e", with_chains=True)
    further = {**labelled, "run": {**labelled["run"], "steps": 6}}
    with pytest.raises(UserError, match=r"buffer\.context\.label: the chains of the checkpoint"):
        ebm_dist.train(further, run_dir=tmp_path / "plain", resume="must")
