"""The run's config: one route in, complete on the way out, contradictions refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import yaml

from ebm_dist import energies, objectives, samplers
from ebm_dist.config import run_config as config
from ebm_dist.config.checks import check_event
from ebm_dist.config.run_config import RunConfig, dump, load, schema
from ebm_dist.core.errors import UserError
from ebm_dist.core.section import Section
from ebm_dist.core.types import EventSpec
from ebm_dist.run.train import bind

PROMISED = """
run:        {name: digits, seed: 0, steps: 3000, dir: runs}
runtime:    {backend: ray, address: local}
data:       {source: digits, batch_size: 128}
energy:     {name: resnet, width: 32}
sampler:    {name: langevin, step_size: 1.0, noise_std: 0.005, num_steps: 40}
objective:  {name: contrastive, energy_l2: 0.1, gradient_penalty: 0.0}
buffer:     {capacity: 10000, num_shards: 2, init: noise, reinit_prob: 0.05}
workers:    {num_workers: 2, num_chains: 128}
learner:    {num_ranks: 1, lr: 1.0e-4, zero_stage: 1, precision: fp32, ema_decay: 0.999}
flow:       {mode: async, max_lag: 8, stale: repair}
checkpoint: {every: 500, keep: 3}
tracking:   {wandb: auto, project: ebm_dist}
"""
IMAGE = EventSpec((1, 8, 8), "image", 10)
GIBBS = {"name": "gibbs"}
BINARY = EventSpec((16,), "binary")


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(PROMISED)
    return file


def refused(path, *overrides) -> str:
    with pytest.raises(UserError) as caught:
        load(path, overrides)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{path}: ")
    return line.removeprefix(f"{path}: ")


def test_the_promised_example_loads_with_the_values_it_states(path):
    loaded = load(path)
    assert loaded.run.steps == 3000
    assert loaded.learner.lr == 1e-4
    assert loaded.sampler.build().temperature == pytest.approx(0.005**2 / 2)
    assert loaded.buffer.num_shards == 2
    assert loaded.tracking.wandb == "auto"


def test_three_sections_are_enough():
    loaded = load({"energy": {"name": "mlp"}, "sampler": {"name": "mala", "step_size": 0.1}})
    assert loaded.objective.build().needs_negatives
    assert loaded.data.location == "digits"


def test_a_config_is_frozen(path):
    loaded = load(path)
    with pytest.raises(ValueError, match="frozen"):
        loaded.run.steps = 5


def test_overrides_win_over_the_file_and_the_last_one_wins(path):
    loaded = load(path, ["learner.lr=2e-3", "run.steps=10", "run.steps=20", "tracking.wandb=off"])
    assert (loaded.learner.lr, loaded.run.steps, loaded.tracking.wandb) == (2e-3, 20, "off")


@pytest.mark.parametrize("override", ["run.steps=1", "learner.precision=bf16", "flow.mode=sync"])
def test_a_complete_dump_loads_back_equal(path, override):
    loaded = load(path, [override])
    text = dump(loaded)
    path.write_text(text)
    assert load(path) == loaded
    assert dump(load(path)) == text


FAMILIES = [
    (key, name)
    for key, family in (
        ("energy", energies.FAMILY),
        ("sampler", samplers.FAMILY),
        ("objective", objectives.FAMILY),
    )
    for name in sorted(family.members)
]


BESIDE: dict[str, dict] = {
    "flow_langevin": {"buffer": {"reinit_prob": 1.0}},
    "simulated_tempering": {"objective": {"name": "score_matching"}},
    "predictor_corrector": {
        "energy": {"name": "mlp", "widths": [8], "num_levels": 4, "noise_stds": [0.1, 2.0]},
        "objective": {"name": "denoising_score_matching", "conditioning": "level"},
    },
    "contrastive_levels": {"buffer": {"context": {"level": "stratified"}}},
}
"""What some members need in other sections."""


@pytest.mark.parametrize(("key", "name"), FAMILIES, ids=lambda value: value)
def test_every_member_of_every_family_survives_the_round_trip(tmp_path, key, name):
    family = {
        "energy": energies.FAMILY,
        "sampler": samplers.FAMILY,
        "objective": objectives.FAMILY,
    }[key]
    example = json.loads(json.dumps(family.members[name].example))  # type: ignore[attr-defined]
    data = {
        "energy": {"name": "mlp"},
        "sampler": {"name": "mala", "step_size": 0.1},
        key: {"name": name, **example},
        **BESIDE.get(name, {}),
    }
    loaded = load(data)
    (tmp_path / "a.yaml").write_text(dump(loaded))
    assert load(tmp_path / "a.yaml") == loaded


def test_a_dump_holds_every_key_of_every_section(path):
    loaded = load(path)
    data = yaml.safe_load(dump(loaded))
    for name in RunConfig.model_fields:
        section = getattr(loaded, name)
        if isinstance(section, Section):
            assert set(data[name]) == set(type(section).model_fields), name


def test_the_schema_knows_every_section_and_member():
    text = json.dumps(schema())
    properties = schema()["properties"]
    assert set(properties) == set(RunConfig.model_fields)
    for _, name in FAMILIES:
        assert f'"const": "{name}"' in text, name


@pytest.mark.parametrize(
    ("overrides", "start", "says"),
    [
        (["learner.num_ranks=3"], "data.batch_size: ", "try 126 or 129"),
        (["learner.accumulation=256"], "data.batch_size: ", "1 * 256"),
        (["workers.num_chains=100"], "data.batch_size: ", "workers.num_chains to 4"),
        (["workers.num_chains=256"], "data.batch_size: ", "workers.num_chains to 128"),
        (["buffer.capacity=255"], "buffer.capacity: ", "256 or more"),
        (["buffer.num_shards=100"], "buffer.capacity: ", "100 * 128"),
        (
            ["buffer.capacity=300", "workers.num_chains=32", "data.batch_size=512"],
            "buffer.capacity: ",
            "512 negatives at once",
        ),
        (["runtime.backend=inline", "learner.num_ranks=2"], "learner.num_ranks: ", "one process"),
        (["objective.temperature=1"], "objective.temperature: ", "T = 1.25e-05, got 1"),
        (
            ["objective={name: score_matching, temperature: 1.0}"],
            "objective.temperature: ",
            "T = 1.25e-05, got 1",
        ),
        (
            ["objective={name: score_matching}", "sampler.noise_std=0"],
            "sampler.noise_std: ",
            "score_matching fits exp(-E/T)/Z",
        ),
    ],
)
def test_sections_that_contradict_each_other_are_refused_in_one_line(path, overrides, start, says):
    line = refused(path, *overrides)
    assert line.startswith(start)
    assert says in line


def test_what_a_refusal_advises_is_accepted(path):
    assert load(path, ["learner.num_ranks=3", "data.batch_size=129", "workers.num_chains=43"])
    assert load(path, ["workers.num_chains=100", "data.batch_size=200"])
    assert load(path, ["buffer.capacity=256"])
    assert load(path, ["objective.temperature=1", "objective.temperature=null"])
    assert load(path, ["objective.temperature=1.25e-05"])


@pytest.mark.parametrize("name", sorted(objectives.FAMILY.members.keys() - {"module", "joint"}))
def test_every_objective_fits_the_temperature_of_the_chains(name):
    section = objectives.FAMILY.members[name]
    stated = {"name": name, **section.example}
    data = {
        "energy": {"name": "mlp", "num_classes": 3},
        "objective": stated,
        "sampler": {"name": "langevin", "step_size": 0.1, "noise_std": 0.1},
    }
    spec = EventSpec((2,), "real", num_classes=3)
    if "real" not in section.kinds:
        data["sampler"] = {"name": "gibbs", "temperature": 0.05}
        spec = EventSpec((4,), "binary", num_classes=3)
    if name == "contrastive_levels":
        levels = {"num_levels": 2, "noise_stds": [0.1, 1.0]}
        data |= {"energy": {"name": "mlp", **levels}, **BESIDE[name]}
    bound = bind(load(data), spec)
    assert bound.objective.fitted_temperature == pytest.approx(0.05)
    assert load(json.loads(json.dumps(bound.model_dump(mode="json")))) == bound
    with pytest.raises(UserError, match=r"objective\.temperature: expected the model's.*0\.05"):
        load({**data, "objective": {**stated, "temperature": 1.0}})


@pytest.mark.parametrize(
    ("change", "spec", "start"),
    [
        ({"energy": {"name": "resnet"}, "sampler": GIBBS}, BINARY, "energy.name: resnet"),
        ({}, BINARY, "sampler.name: langevin"),
        ({"sampler": GIBBS}, EventSpec((2,), "real"), "sampler.name: gibbs"),
        ({"objective": {"name": "joint"}}, EventSpec((2,), "real"), "objective.name: joint"),
        ({"objective": {"name": "joint"}}, IMAGE, "energy.num_classes: "),
        (
            {"energy": {"name": "resnet", "num_levels": 2, "noise_stds": [0.1, 1.0]}},
            IMAGE,
            "energy.num_levels and energy.noise_stds: the energy needs the level of each event",
        ),
        ({"objective": {"name": "score_matching"}, "sampler": GIBBS}, BINARY,
         "objective.name: score_matching"),
        ({"energy": {"name": "quadratic", "precision": 1.0}}, EventSpec((2,), "real"),
         "energy.name: quadratic has no parameters"),
        ({"energy": {"name": "mlp", "event_shape": [3]}}, EventSpec((2,), "real"),
         "energy.event_shape: "),
    ],
)  # fmt: skip
def test_sections_that_cannot_work_with_the_data_are_refused(change, spec, start):
    data = {
        "energy": {"name": "mlp"},
        "sampler": {"name": "langevin", "step_size": 0.1, "temperature": 1.0},
    }
    loaded = load({**data, **change})
    with pytest.raises(UserError) as caught:
        check_event(loaded, spec)
    assert str(caught.value).startswith(start)
    assert "\n" not in str(caught.value)


def test_sections_that_fit_the_data_pass(path):
    check_event(load(path), IMAGE)
    joint = ["objective={name: joint}", "energy={name: mlp, num_classes: data}"]
    check_event(load(path, joint), IMAGE)
    discrete = ["energy={name: mlp}", "sampler={name: gibbs_with_gradients}"]
    check_event(load(path, discrete), BINARY)


def test_chains_are_stored_in_fewer_bits_only_where_those_can_hold_them(path):
    for storage in ("bfloat16", "uint8"):
        stored = [f"buffer.storage={storage}"]
        real = load(path, [*stored, "energy={name: mlp}"])
        with pytest.raises(UserError, match=r"^buffer\.storage: .*no bounds.*float32"):
            check_event(real, EventSpec((2,), "real"))
        discrete = ["energy={name: mlp}", "sampler={name: gibbs_with_gradients}"]
        check_event(load(path, [*stored, *discrete]), BINARY)
    check_event(load(path, ["buffer.storage=bfloat16"]), IMAGE)
    uint8 = "buffer.storage=uint8"
    for clamp in ([], ["sampler.clamp=[-1.5, 1]"]):
        with pytest.raises(UserError, match=r"^buffer\.storage: uint8.*sampler\.clamp"):
            check_event(load(path, [uint8, *clamp]), IMAGE)
    check_event(load(path, [uint8, "sampler.clamp=[-1, 1]"]), IMAGE)
    with pytest.raises(UserError, match=r"buffer\.storage: uint8.*Jarzynski"):
        load(path, [uint8, "buffer.jarzynski=true", "buffer.reinit_prob=0"])


def test_rounded_weights_are_refused_where_energies_are_compared_with_the_learners_own(path):
    wire = "learner.wire=bfloat16"
    assert load(path, [wire]).learner.wire == "bfloat16"
    with pytest.raises(UserError, match=r"learner\.wire: bfloat16.*Jarzynski"):
        load(path, [wire, "buffer.jarzynski=true", "buffer.reinit_prob=0"])
    reweight = ["flow.stale=reweight"]
    with pytest.raises(UserError, match=r"learner\.wire: bfloat16.*reweight"):
        load(path, [wire, *reweight])


@pytest.mark.parametrize("name", ["contrastive", "joint", "energy_matching", "reverse_kl"])
def test_weights_of_stale_negatives_can_go_without_a_limit(path, name):
    for written in ("inf", ".inf"):
        loaded = load(path, [f"objective={{name: {name}, truncation: {written}}}"])
        assert loaded.objective.truncation == "inf"
        assert load(yaml.safe_load(dump(loaded))) == loaded
        json.dumps(loaded.model_dump(mode="json"), allow_nan=False)
    assert load(path, [f"objective={{name: {name}, truncation: 5}}"]).objective.truncation == 5.0
    for wrong in ("0.5", "-inf", ".nan", "much"):
        refused(path, f"objective={{name: {name}, truncation: {wrong}}}")


def test_a_missing_file_names_the_one_beside_it(path):
    with pytest.raises(UserError, match=r"did you mean .*run\.yaml"):
        load(path.with_name("rum.yaml"))


def test_a_file_that_cannot_be_a_config_is_refused_by_its_size(path, monkeypatch):
    monkeypatch.setattr(config, "MAX_FILE_BYTES", 10)
    assert "larger" in refused(path)


def test_numpy_and_torch_scalars_stand_where_numbers_are_expected() -> None:
    written = {
        "run": {"steps": np.int64(7), "seed": torch.tensor(3)},
        "energy": {"name": np.str_("mlp"), "widths": torch.tensor([8, 4])},
        "sampler": {
            "name": "langevin",
            "step_size": np.float32(0.5),
            "temperature": torch.tensor(2.0, dtype=torch.bfloat16, requires_grad=True),
            "clamp": np.array([-1.0, 1.0]),
        },
        "data": {
            "flip": np.bool_(True),
            "flatten": torch.tensor(False),
            "batch_size": np.float64(64),
        },
        "learner": {"lr": torch.tensor(0.25)},
    }
    found = load(written)
    assert (found.run.steps, found.run.seed) == (7, 3)
    assert found.energy.widths == (8, 4)
    assert (found.sampler.step_size, found.sampler.temperature) == (0.5, 2.0)
    assert found.sampler.clamp == (-1.0, 1.0)
    assert (found.data.flip, found.data.flatten, found.data.batch_size) == (True, False, 64)
    assert found.learner.lr == 0.25
    with pytest.raises(UserError, match=r"run.steps: expected a whole number, got \[7\]"):
        load({**written, "run": {"steps": torch.tensor([7])}})


@pytest.mark.parametrize("name", sorted(objectives.FAMILY.members.keys() - {"module", "joint"}))
def test_an_objective_without_chains_takes_batches_of_any_size(name):
    data = {
        "energy": {"name": "mlp"},
        "data": {"batch_size": 24},
        "sampler": {"name": "mala", "step_size": 0.1},
        **BESIDE.get(name, {}),
        "objective": {"name": name, **objectives.FAMILY.members[name].example},
    }
    # A section that left nothing to the data can be built, and its module tells.
    section = objectives.FAMILY.members[name]
    shape = section.example.get("event_shape", (3,))
    spec = EventSpec(shape, "real" if "real" in section.kinds else "binary")
    if load({**data, "data": {"batch_size": 64}}).objective.bind(spec).build().needs_negatives:
        with pytest.raises(UserError, match=r"data\.batch_size: expected a multiple of workers"):
            load(data)
    else:
        assert load(data).data.batch_size == 24
