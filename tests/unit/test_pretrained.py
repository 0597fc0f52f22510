"""The models that come with the package: by name, whole, and as good as their cards say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml

import ebm_dist
from ebm_dist.cli import main
from ebm_dist.config.run_config import load
from ebm_dist.core.errors import UserError
from ebm_dist.export.pretrained import FOLDER, list_pretrained, named
from ebm_dist.export.reader import open_export
from ebm_dist.export.sample import usual_steps
from ebm_dist.files.safe_open import sha256

CONFIGS = Path(__file__).parents[2] / "configs"
MAX_BYTES = 10 << 20


def test_every_model_is_whole_small_and_without_a_path_of_the_machine_that_made_it() -> None:
    assert set(list_pretrained()) >= {
        "digits",
        "digits-joint",
        "digits-rbm",
        "fashion-mnist",
        "fashion-mnist-classes",
    }
    total = 0
    for name in list_pretrained():
        folder = FOLDER / name
        config = json.loads((folder / "config.json").read_text())
        assert config["weights"]["sha256"] == sha256(folder / "model.safetensors")
        assert config["lineage"]["run"] == name.replace("-", "_")
        for path in folder.iterdir():
            total += path.stat().st_size
            if path.suffix in (".json", ".md"):
                text = path.read_text()
                assert not any(place in text for place in ("/tmp", "/work", "/home", "/root"))
    assert total <= MAX_BYTES


@pytest.mark.parametrize("name", list_pretrained())
def test_a_card_has_licence_figures_and_picture_and_the_recipe_is_that_of_the_config(
    name: str,
) -> None:
    folder = FOLDER / name
    _, head, text = (folder / "README.md").read_text().split("---\n", 2)
    about = yaml.safe_load(head)
    assert about["license"] == "apache-2.0"
    assert about["metrics"]
    assert all(f"| `{metric}` | " in text for metric in about["metrics"])
    if "classifier/accuracy" in about["metrics"]:
        # Of the classifier that judges the samples, as the table says; not a result of the model.
        assert "fidelity/accuracy" not in about["metrics"]
    assert "](samples.png)" in text
    assert (folder / "samples.png").read_bytes().startswith(b"\x89PNG")

    export = open_export(name)
    run = load(CONFIGS / f"{name.replace('-', '_')}.yaml")
    lineage = export.config["lineage"]
    assert (lineage["seed"], lineage["updates"]) == (run.run.seed, run.run.steps)
    bound = {
        "energy": run.energy.bind(export.spec),
        "sampler": run.sampler.bind(export.spec),
        "objective": run.objective.at_temperature(run.sampler.law_temperature),
    }
    stored = {key: export.config[key] for key in ("energy", "sampler", "data")}
    stored |= export.config["recipe"]
    for key, section in stored.items():
        now = (bound.get(key) or getattr(run, key)).model_dump(mode="json")
        # A key that a later release added is in the config alone.
        differs = {k: (v, now.get(k)) for k, v in section.items() if now.get(k) != v}
        assert differs == {}, key


@pytest.mark.parametrize("name", ["digits", "fashion-mnist-classes"])
def test_the_commands_of_a_card_draw_samples(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    commands = re.findall(
        r"^ebm-dist (sample .*)$", (FOLDER / name / "README.md").read_text(), re.M
    )
    options = [word for line in commands for word in line.split() if word.startswith("--l")]
    assert options == (["--label"] if name == "digits" else ["--label", "--level"])
    for line in commands:
        few = line.replace("PATH", name).replace("--num 64", "--num 2")
        assert main(few.split()) == 0
        Path("samples.png").unlink()


def test_a_name_stands_for_the_path_of_an_export_in_python_and_in_every_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    energy = ebm_dist.load_energy("digits")
    x, e = ebm_dist.sample("digits", 4, label=3, num_steps=2)
    assert x.shape == (4, 1, 8, 8)
    torch.testing.assert_close(-energy.logits(x)[:, 3], e)
    assert main(["sample", "digits-rbm", "--num", "4", "--steps", "2", "--out", "few.npz"]) == 0
    assert (tmp_path / "few.npz").is_file()
    assert main(["pretrained", "list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in list_pretrained())

    config = {
        "run": {"steps": 1, "init_from": "digits"},
        "runtime": {"backend": "inline"},
        "data": {"source": "digits", "batch_size": 4},
        "energy": {"name": "resnet", "width": 24, "num_classes": "data"},
        "sampler": {"name": "langevin", "step_size": 1.0, "noise_std": 0.01, "num_steps": 1},
        "objective": {"name": "contrastive"},
        "buffer": {"capacity": 8, "num_shards": 1},
        "workers": {"num_workers": 1, "num_chains": 4},
        "tracking": {"wandb": "off"},
        "evaluation": {"every": None},
    }
    begun = ebm_dist.train(config, run_dir=tmp_path / "r").open_export().config["lineage"]
    assert begun["init_from"]["path"].endswith("pretrained/digits")


def test_a_path_that_exists_is_no_name_and_an_unknown_name_lists_those_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert named("digits") == FOLDER / "digits"
    assert named("./digits/export") == Path("digits/export")
    (tmp_path / "digits").mkdir()
    assert named("digits") == Path("digits")
    with pytest.raises(UserError, match=r"not an export.* hides the pretrained model: rename it"):
        open_export("digits")
    with pytest.raises(UserError, match="pretrained model: digits, digits-joint, digits-rbm"):
        open_export("digit")


def test_new_digits_of_a_class_are_what_was_asked_by_a_classifier_of_another_kind() -> None:
    """Its card says 99%, by the network of the run's own evaluations."""
    from sklearn.svm import SVC

    digits = ebm_dist.data.DataConfig(source="digits")
    train, test = (ebm_dist.data.load_split(digits, split) for split in ("train", "test"))
    assert train.label is not None
    assert test.label is not None
    judge = SVC(gamma="scale").fit(train.x.flatten(1), train.label)
    assert judge.score(test.x.flatten(1), test.label) > 0.95
    asked = torch.arange(200) % 10
    x, _ = ebm_dist.sample("digits", 200, label=asked)
    called = torch.from_numpy(judge.predict(x.flatten(1)))
    assert (called == asked).double().mean() > 0.9
    # Of each class, so that no class makes up for another.
    of_class = (called == asked).double().reshape(20, 10).mean(0)
    assert of_class.min() > 0.6, of_class


def test_garments_of_a_class_are_drawn_from_noise_in_as_many_steps_as_levels() -> None:
    export = open_export("fashion-mnist-classes")
    stds = export.energy.noise_stds
    assert usual_steps(export) == len(stds) - 1 == 17
    x, energy = ebm_dist.sample(export, 12, label=1)
    assert x.shape == (12, 1, 28, 28)
    # Trousers: dark at both sides, light in two stripes between, whatever the noise.
    mean = x.clamp(-1, 1).mean((0, 1))
    assert mean[:, :5].mean() < -0.9
    assert mean[:, 23:].mean() < -0.9
    assert mean[10:24, 9:19].mean() > -0.2
    # The energy of what was asked for is lower than that of another class.
    level = torch.zeros(12, dtype=torch.int64)
    for other in (0, 7, 8):
        of_other = export.energy(x, label=torch.full((12,), other), level=level)
        assert (of_other > energy).float().mean() > 0.7


def test_the_joint_model_has_the_accuracy_and_the_machine_the_likelihood_of_its_card() -> None:
    """Held-out digits; the figures are those of the cards."""
    data = ebm_dist.data.load_split(ebm_dist.data.DataConfig(source="digits"), "test")
    assert data.label is not None
    with torch.no_grad():
        guess = ebm_dist.load_energy("digits-joint").logits(data.x).argmax(1)
    accuracy = float((guess == data.label).double().mean())
    assert accuracy > 0.9
    assert accuracy == pytest.approx(of_card("digits-joint", "classifier/accuracy"), abs=1e-6)
    rbm = ebm_dist.load_energy("digits-rbm")
    binary = ebm_dist.data.DataConfig(source="digits", binarize="threshold")
    x = ebm_dist.data.load_split(binary, "test").x
    with torch.no_grad():
        log_prob = float(-rbm(x).double().mean()) - rbm.log_z()
    assert log_prob == pytest.approx(of_card("digits-rbm", "likelihood/log_prob_test"), abs=1e-3)


def of_card(name: str, metric: str) -> float:
    """The figure of a metric on the card of a model."""
    card = (FOLDER / name / "README.md").read_text()
    (line,) = [line for line in card.splitlines() if line.startswith(f"| `{metric}`")]
    return float(line.split("|")[2])
