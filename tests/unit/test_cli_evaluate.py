"""`ebm-dist evaluate`: each suite measures what its name says, on the model's own data."""

from __future__ import annotations

import json
import math

import pytest
import torch
from PIL import Image

from ebm_dist import energies, samplers
from ebm_dist.cli import main
from ebm_dist.core.types import EventSpec
from ebm_dist.data import DataConfig, describe, load_split
from ebm_dist.data.sources.prepare import prepare
from ebm_dist.evaluation import bits_per_dim
from ebm_dist.export.reader import load_energy
from ebm_dist.export.suites import _shuffled
from ebm_dist.export.writer import write_export

MOONS = {"source": "toy:two_moons", "toy_samples": 512}
SAMPLER = {"name": "langevin", "step_size": 0.05, "temperature": 1.0, "num_steps": 10}


@pytest.fixture
def export(tmp_path):
    def write(energy: dict, data: dict, spec: EventSpec | None = None, **sampler):
        config = DataConfig(**data, cache_dir=str(tmp_path / "cache"))
        spec = spec or describe(config)
        section = energies.FAMILY.section(**energy).bind(spec)
        module = section.build(seed=1)
        write_export(
            tmp_path / "model",
            energy=module,
            section=section,
            spec=spec,
            sampler=samplers.FAMILY.section(**SAMPLER, **sampler),
            about={"data": config.model_dump(mode="json")},
        )
        return tmp_path / "model", config

    return write


def measured(tmp_path, path, suite) -> dict:
    out = tmp_path / "out" / "result.json"
    assert main(["evaluate", str(path), "--suite", suite, "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["suite"] == suite
    assert all(math.isfinite(value) for value in result["metrics"].values())
    return result


def test_density_of_a_gaussian_model_is_its_closed_form(tmp_path, export):
    precision = 4.0
    path, config = export({"name": "quadratic", "precision": precision, "learnable": True}, MOONS)
    result = measured(tmp_path, path, "density")
    log_z = math.log(2 * math.pi / precision)
    assert result["metrics"]["likelihood/log_z"] == pytest.approx(log_z, abs=1e-5)
    x = load_split(config, "test", 2000).x.double()
    log_probs = -0.5 * precision * x.square().sum(1) - log_z
    log_prob = log_probs.mean().item()
    assert result["metrics"]["likelihood/log_prob_test"] == pytest.approx(log_prob, abs=1e-5)
    # Event by event, in the order of the split; and in bits for each of the two coordinates.
    assert result["examples"]["log_prob_test"] == pytest.approx(log_probs.tolist(), abs=1e-5)
    bits = -log_prob / (2 * math.log(2))
    assert result["metrics"]["likelihood/bits_per_dim_test"] == pytest.approx(bits, abs=1e-5)


def test_bits_per_dim_of_uniform_images_and_fair_coins_are_their_entropy():
    # Uniform in [-1, 1]: 8 bits a pixel of [0, 256). A fair coin: 1 bit. Three classes: log2 3.
    image, coins = EventSpec((3, 4, 4), "image"), EventSpec((5,), "binary")
    classes = EventSpec((5, 3), "categorical")
    assert bits_per_dim(-48 * math.log(2), image) == pytest.approx(8.0)
    assert bits_per_dim(-5 * math.log(2), coins) == pytest.approx(1.0)
    assert bits_per_dim(-5 * math.log(3), classes) == pytest.approx(math.log2(3))


def test_density_of_a_clamped_model_is_over_the_range_of_its_chains(tmp_path, export):
    quadratic = {"name": "quadratic", "precision": 1.0, "learnable": True}
    path, _ = export(quadratic, MOONS, clamp=[-2.0, 2.0])
    result = measured(tmp_path, path, "density")
    log_z = math.log(2 * math.pi) + 2 * math.log(math.erf(2 / math.sqrt(2)))
    assert result["metrics"]["likelihood/log_z"] == pytest.approx(log_z, abs=1e-5)
    assert "log Z is over [-2, 2]^d" in result["notes"]


def test_density_of_an_energy_over_noise_levels_is_that_of_the_cleanest(tmp_path, export, capsys):
    energy = {
        "name": "gaussian_mixture",
        "means": [[0.5, 0.0]],
        "stds": 0.5,
        "noise_stds": [0.1, 2],
    }
    path, config = export(energy, MOONS)
    result = measured(tmp_path, path, "density")
    variance = 0.5**2 + 0.1**2
    x = load_split(config, "test", 2000).x.double() - torch.tensor([0.5, 0.0])
    log_prob = (-x.square().sum(1) / (2 * variance)).mean() - math.log(2 * math.pi * variance)
    assert result["metrics"]["likelihood/log_prob_test"] == pytest.approx(log_prob.item(), abs=0.03)
    assert "E(x) is that of the cleanest level, of data with noise 0.1" in result["notes"]
    assert main(["evaluate", str(path), "--suite", "landscape"]) == 2
    assert "do not stay at one; use --suite fidelity" in capsys.readouterr().err


def test_ood_tells_far_noise_from_data_by_the_energy(tmp_path, export):
    # A steep bowl: the farther out the higher, and unit noise lies farther out than the moons.
    path, config = export({"name": "quadratic", "precision": 4.0, "learnable": True}, MOONS)
    metrics = measured(tmp_path, path, "ood")["metrics"]
    energy = load_energy(path)
    inside = energy(load_split(config, "test", 2000).x)
    middle = metrics["ood/auroc/energy/interpolated"]
    # The mean of two points is never farther out than both: a convex energy ranks it lower.
    assert middle < 0.5 - 4 * metrics["ood/auroc_se/energy/interpolated"]
    assert 0.0 <= metrics["ood/auroc/energy/noise"] <= 1.0
    assert inside.min() >= 0


def test_shuffling_keeps_marginals_and_breaks_the_rest():
    generator = torch.Generator().manual_seed(0)
    real = torch.arange(40.0).reshape(10, 4)
    mixed = _shuffled(real, "real", generator)
    assert torch.equal(mixed.sort(0).values, real)
    assert not torch.equal(mixed, real)
    spec = EventSpec((5, 3), "categorical")
    one_hot = spec.noise(200, generator)
    mixed = _shuffled(one_hot, "categorical", generator)
    assert torch.equal(mixed.sum(-1), torch.ones(200, 5))
    assert torch.equal(mixed.sum(0), one_hot.sum(0))


def test_robustness_starts_at_the_clean_accuracy_and_only_falls(tmp_path, export):
    path, config = export({"name": "mlp", "widths": [16], "num_classes": "data"}, MOONS)
    metrics = measured(tmp_path, path, "robustness")["metrics"]
    test = load_split(config, "test", 2000)
    energy = load_energy(path)
    clean = (energy.logits(test.x).argmax(1) == test.label).double().mean().item()
    assert metrics["robustness/accuracy"] == clean
    curve = [clean, *(v for k, v in metrics.items() if k.startswith("robustness/linf"))]
    assert len(curve) == 5
    assert curve == sorted(curve, reverse=True)


def test_fidelity_puts_an_untrained_model_near_its_noise(tmp_path, export, monkeypatch):
    monkeypatch.setattr("ebm_dist.export.sample.NUM_STEPS", 20)
    path, _ = export({"name": "resnet", "width": 4, "stem_stride": 4}, {"source": "digits"})
    result = measured(tmp_path, path, "fidelity")
    metrics = result["metrics"]
    picture = tmp_path / "out" / "result-neighbours.png"
    assert result["notes"][-1] == f"{picture}: 16 samples, each before its nearest training images"
    with Image.open(picture) as image:
        assert image.size[0] == image.size[1] >= 480, "two samples and their neighbours in a row"
    assert metrics["fidelity/train"] < metrics["fidelity/gaussian"] < metrics["fidelity/noise"]
    assert metrics["fidelity/distance"] > 10 * metrics["fidelity/train"]
    assert metrics["fidelity/precision"] < 0.1
    assert metrics["fidelity/recall"] < 0.1
    assert metrics["fidelity/nearest_train"] > 2
    assert metrics["fidelity/class_share_min"] < 0.1 < metrics["fidelity/class_share_max"]
    assert "fidelity/label_accuracy" not in metrics, "no class was asked for"


def test_fidelity_of_a_conditional_model_says_whether_samples_are_of_the_class_asked(
    tmp_path, monkeypatch
):
    """The model of digits that comes with the package, on fewer samples than its card."""
    monkeypatch.setattr("ebm_dist.export.suites.NUM_DRAWN", 200)
    metrics = measured(tmp_path, "digits", "fidelity")["metrics"]
    assert metrics["fidelity/accuracy"] > 0.95
    assert metrics["fidelity/label_accuracy"] > 0.9
    # As often each, up to those that are called another.
    assert metrics["fidelity/class_share_min"] > 0.05
    assert metrics["fidelity/class_share_max"] < 0.15
    assert metrics["fidelity/precision"] > 0.6
    assert 0.1 < metrics["fidelity/recall"] < 0.9
    assert 0.5 < metrics["fidelity/nearest_train"] < 1.5
    assert metrics["fidelity/distance"] < metrics["fidelity/gaussian"]


def test_landscape_of_a_bowl_far_from_the_data_raises_the_alarm(tmp_path, export):
    mean = [20.0, 20.0]
    steep = {"name": "quadratic", "precision": 4.0, "mean": mean, "learnable": True}
    path, _ = export(steep, MOONS)
    result = measured(tmp_path, path, "landscape")
    assert "spurious" in " ".join(result["notes"])
    assert result["metrics"]["connectivity/barrier_straight"] == 0.0, "a bowl has no barriers"
    assert result["metrics"]["connectivity/connected"] == 1.0


@pytest.mark.parametrize(("suite", "says"), [("robustness", "num_classes"), ("fidelity", "image")])
def test_a_suite_that_does_not_apply_says_so_in_one_line(tmp_path, export, capsys, suite, says):
    path, _ = export({"name": "mlp", "widths": [8]}, MOONS)
    assert main(["evaluate", str(path), "--suite", suite]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"error: --suite {suite}: ")
    assert says in line
    assert "evaluation." not in line  # a key of a config, which this command does not take


def test_data_that_has_moved_away_is_one_line(tmp_path, export, capsys):
    path, _ = export({"name": "mlp", "widths": [8]}, MOONS)
    config = json.loads((path / "config.json").read_text())
    config["data"] = {"source": str(tmp_path / "gone")}
    (path / "config.json").write_text(json.dumps(config))
    assert main(["evaluate", str(path), "--suite", "ood"]) == 2
    assert "the model's own data is needed" in capsys.readouterr().err


def test_data_that_has_moved_is_found_by_the_path_that_is_given(tmp_path, export, capsys):
    shards, moved = tmp_path / "shards", tmp_path / "moved"
    prepare("digits", shards)
    path, _ = export({"name": "quadratic", "precision": 2.0}, {"source": str(shards)})
    before = measured(tmp_path, path, "density")
    shards.rename(moved)
    assert main(["evaluate", str(path), "--suite", "density"]) == 2
    assert "--data" in capsys.readouterr().err
    out = tmp_path / "after.json"
    argv = ["evaluate", str(path), "--suite", "density", "--data", str(moved), "--out", str(out)]
    assert main(argv) == 0
    after = json.loads(out.read_text())
    assert after["metrics"] == before["metrics"]
    assert after["examples"] == before["examples"]
