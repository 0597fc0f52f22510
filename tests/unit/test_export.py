"""Exports: what is written loads equal, and what is damaged is refused in one line."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import ebm_dist
from ebm_dist import energies, samplers
from ebm_dist.checkpoint import files as checkpoint
from ebm_dist.core.errors import UserError
from ebm_dist.core.types import EventSpec
from ebm_dist.export.reader import StoredChains, open_export
from ebm_dist.export.sample import draw_samples, is_conditional, usual_steps
from ebm_dist.export.writer import write_export
from ebm_dist.files.safe_open import sha256

IMAGE = EventSpec((1, 8, 8), "image", 10)
LANGEVIN = {"name": "langevin", "step_size": 1.0, "noise_std": 0.005, "clamp": (-1.0, 1.0)}
ENERGIES = [
    ({"name": "mlp", "widths": [16]}, EventSpec((5,), "real")),
    ({"name": "resnet", "width": 4, "spectral_norm": True}, IMAGE),
    ({"name": "vit", "width": 8, "depth": 1, "num_heads": 2}, IMAGE),
    ({"name": "quadratic", "precision": [1.0, 4.0], "learnable": True}, EventSpec((2,), "real")),
    (
        {"name": "sum", "members": [{"name": "ring"}, {"name": "mlp", "widths": [8]}]},
        EventSpec((2,), "real"),
    ),
    ({"name": "rbm", "num_visible": 6, "num_hidden": 3}, EventSpec((6,), "binary")),
]


UNET = {
    "name": "unet",
    "width": 8,
    "parameterisation": "denoiser",
    "num_classes": 3,
    "classes": "embedding",
    "num_levels": 3,
    "noise_stds": (0.1, 1.0),
    "data_std": 0.5,
}


def test_a_reloaded_energy_takes_the_context_that_the_exported_one_took(tmp_path):
    module, x = write(tmp_path / "model", UNET, IMAGE), IMAGE.noise(6, torch.Generator())
    given = {"label": torch.arange(6) % 3, "level": torch.arange(6) % 3}
    loaded = ebm_dist.load_energy(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(loaded.given(**given)(x), module.given(**given)(x))  # type: ignore[operator]


def write(out: Path, energy: dict, spec: EventSpec, *, chains=None, sampler=LANGEVIN):
    section = energies.FAMILY.section(**energy).bind(spec)
    module = section.build(seed=3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.01)
    write_export(
        out,
        energy=module,
        section=section,
        spec=spec,
        sampler=samplers.FAMILY.section(**sampler),
        chains=None if chains is None else StoredChains(chains, {}),
        about={"lineage": {"run": "test"}},
        card="# test\n",
    )
    return module.eval()


@pytest.fixture
def image_export(tmp_path) -> Path:
    generator = torch.Generator().manual_seed(0)
    write(
        tmp_path / "model",
        {"name": "resnet", "width": 4},
        IMAGE,
        chains=IMAGE.noise(20, generator),
    )
    return tmp_path / "model"


@pytest.mark.parametrize(("energy", "spec"), ENERGIES, ids=[e["name"] for e, _ in ENERGIES])
def test_a_reloaded_energy_equals_the_exported_one_bit_for_bit(tmp_path, energy, spec):
    module = write(tmp_path / "model", energy, spec)
    loaded = ebm_dist.load_energy(tmp_path / "model")
    assert not loaded.training
    x = spec.noise(32, torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert (loaded(x) - module(x)).abs().max().item() == 0.0
    fresh = energies.FAMILY.section(**energy).bind(spec).build(seed=3).eval()
    assert (loaded(x) - fresh(x).detach()).abs().max().item() > 0.0, "weights were not loaded"


def test_all_files_of_an_export_and_of_a_checkpoint_have_the_mode_that_the_umask_says(tmp_path):
    before = os.umask(0o027)
    try:
        write(tmp_path / "export", {"name": "mlp", "widths": [4]}, EventSpec((2,), "real"))
        checkpoint.save(tmp_path, 1, {"ema": {"flat": torch.zeros(3)}}, {}, keep=1)
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 5
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o640}


def test_an_export_has_the_promised_files_and_can_be_written_over(image_export):
    names = {path.name for path in image_export.iterdir()}
    assert names == {
        "model.safetensors",
        "config.json",
        "README.md",
        "samples.png",
        "chains.safetensors",
    }
    write(image_export, {"name": "mlp", "widths": [4]}, EventSpec((3,), "real"))
    assert open_export(image_export).spec == EventSpec((3,), "real")
    assert [path.name for path in image_export.parent.iterdir()] == ["model"]


def test_another_directory_is_never_written_over(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    with pytest.raises(UserError, match="not an export"):
        write(tmp_path / "thesis", {"name": "mlp"}, EventSpec((3,), "real"))
    assert (tmp_path / "thesis" / "chapter1.tex").read_text() == "years of work"


def test_a_failed_export_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ebm_dist.files.durable.sync", full)
    with pytest.raises(UserError, match="No space left"):
        write(tmp_path / "model", {"name": "mlp"}, EventSpec((3,), "real"))
    assert list(tmp_path.iterdir()) == []


def test_an_export_loads_and_samples_where_ray_deepspeed_and_wandb_are_not_installed(image_export):
    script = f"""
import sys
for name in ("ray", "deepspeed", "wandb", "webdataset"):
    sys.modules[name] = None
import ebm_dist
from ebm_dist.cli import main
energy = ebm_dist.load_energy({str(image_export)!r})
import torch
assert energy(torch.zeros(2, 1, 8, 8)).shape == (2,)
assert main(["sample", {str(image_export)!r}, "--num", "4", "--steps", "3",
             "--out", {str(image_export.parent / "out.npz")!r}]) == 0
assert main(["sample", {str(image_export)!r}, "--num", "4", "--steps", "3",
             "--out", {str(image_export.parent / "out.png")!r}]) == 0
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (image_export.parent / "out.npz").stat().st_size > 0
    assert (image_export.parent / "out.png").read_bytes().startswith(b"\x89PNG")


def test_drawn_samples_follow_the_exported_law(tmp_path):
    # With step h the chain on E = 2 x^2 has variance T / (4 (1 - 2 h)) in each coordinate.
    spec = EventSpec((2,), "real")
    h, num = 0.1, 20_000
    sampler = {"name": "langevin", "step_size": h, "temperature": 1.0}
    write(tmp_path / "m", {"name": "quadratic", "precision": 4.0, "event_shape": [2]}, spec,
          sampler=sampler)  # fmt: skip
    export = open_export(tmp_path / "m")
    for temperature in (None, 0.25):
        how = {"temperature": temperature, "batch_size": 5000, "seed": 4}
        x, energy = draw_samples(export, num, 60, **how)
        expected = (temperature or 1.0) / (4 * (1 - 2 * h))
        standard_error = expected * math.sqrt(2 / num)
        for variance in x.var(0).tolist():
            assert abs(variance - expected) < 4 * standard_error
    for wrong in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(UserError, match="temperature: expected a finite number above 0"):
            draw_samples(export, 2, 1, temperature=wrong)
    x, energy = draw_samples(export, num, 60, seed=4, batch_size=5000)
    assert torch.equal(energy, export.energy(x))
    again, _ = draw_samples(export, num, 60, seed=4, batch_size=5000)
    assert torch.equal(x, again)
    assert not torch.equal(x[:5000], x[5000:10_000])


def test_chains_go_on_from_where_the_run_left_them(image_export):
    export = open_export(image_export)
    stored = export.chains()
    assert stored is not None
    x, _ = draw_samples(export, 20, 0, start="chains")
    order = [(stored == row).flatten(1).all(1).nonzero().item() for row in x]
    assert sorted(order) == list(range(20))


def edit(export: Path, **changes) -> None:
    config = json.loads((export / "config.json").read_text())
    for key, value in changes.items():
        *sections, last = key.split("__")
        here = config
        for section in sections:
            here = here[section]
        here[last] = value
    (export / "config.json").write_text(json.dumps(config))


def rewrite_weights(export: Path, change) -> None:
    from safetensors.torch import load_file

    path = export / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    edit(export, weights__bytes=path.stat().st_size, weights__sha256=sha256(path))


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def rehash(export: Path) -> None:
    path = export / "model.safetensors"
    edit(export, weights__bytes=path.stat().st_size, weights__sha256=sha256(path))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 0x40
    path.write_bytes(data)


def tempered(depth: int) -> dict:
    energy: dict = {"name": "ring"}
    for _ in range(depth):
        energy = {"name": "tempered", "temperature": 1.0, "member": energy}
    return energy


WIDE = {"name": "mlp", "event_shape": [2], "widths": [60_000, 60_000]}
HEADER_BOMB = (2**62).to_bytes(8, "little") + b"{}"
NESTED = b'{"format": ' + b"[" * 100_000
FAULTS = {
    "no such path": (lambda e: e.rename(e.with_name("gone")), "no such file"),
    "no config": (lambda e: (e / "config.json").unlink(), "not an export"),
    "no weights": (lambda e: (e / "model.safetensors").unlink(), "missing"),
    "config cut short": (lambda e: cut(e / "config.json", 200), "not valid JSON"),
    "config is empty": (lambda e: cut(e / "config.json", 0), "not valid JSON"),
    "config is a list": (lambda e: (e / "config.json").write_text("[1]"), "something else"),
    "config nests": (lambda e: (e / "config.json").write_bytes(NESTED), "not valid JSON"),
    "config is binary": (lambda e: (e / "config.json").write_bytes(b"\x80\x04"), "not valid JSON"),
    "other format": (lambda e: edit(e, format="diffusers"), "something else"),
    "newer version": (lambda e: edit(e, format_version=2), "format_version is 2"),
    "version is text": (lambda e: edit(e, format_version="1"), "format_version is '1'"),
    "weights cut short": (lambda e: cut(e / "model.safetensors", 500), "cut short"),
    "one bit flipped": (lambda e: flip(e / "model.safetensors"), "checksum"),
    "weights are a pickle": (
        lambda e: (torch.save({"a": torch.zeros(1)}, e / "model.safetensors"), rehash(e)),
        "safetensors",
    ),
    "header bomb": (
        lambda e: ((e / "model.safetensors").write_bytes(HEADER_BOMB), rehash(e)),
        "safetensors",
    ),
    "unknown energy": (lambda e: edit(e, energy__name="resnett"), "did you mean 'resnet'"),
    "energy has no name": (lambda e: edit(e, energy={}), "energy: expected a section"),
    "unknown key": (lambda e: edit(e, energy__widht=3), "did you mean 'width'"),
    "negative width": (lambda e: edit(e, energy__width=-3), "energy.width"),
    "giant width": (lambda e: edit(e, energy__width=10**9), "size 1000000000"),
    "wide": (lambda e: edit(e, energy__width=60_000), "needs more than"),
    "other width": (lambda e: edit(e, energy__width=8), "has shape"),
    "unknown sampler": (lambda e: edit(e, sampler__name="slice"), "sampler.name"),
    "bad sampler": (lambda e: edit(e, sampler__step_size=0), "sampler.step_size"),
    "bad kind": (lambda e: edit(e, event__kind="audio"), "event.kind"),
    "bad shape": (lambda e: edit(e, event__shape=[1, -8, 8]), "event.shape"),
    "vast shape": (lambda e: edit(e, event__shape=[2**30, 2**30]), "event.shape"),
    "other shape": (lambda e: edit(e, event__shape=[1, 4, 4]), "event"),
    "no event": (lambda e: edit(e, event=None), "event: expected"),
    "bad start_std": (lambda e: edit(e, start_std="wide"), "start_std"),
    "65,536 blocks": (lambda e: edit(e, energy__num_blocks=2**16), "modules and weights"),
    "100,000 stages": (lambda e: edit(e, energy__multipliers=[1] * 10**5), "modules and weights"),
    "5,000 members": (
        lambda e: edit(e, energy={"name": "sum", "members": 5000 * [{"name": "ring"}]}),
        "more than 1000 sections",
    ),
    "257 members": (
        lambda e: edit(e, energy={"name": "sum", "members": 257 * [{"name": "ring"}]}),
        "energy.members",
    ),
    "giant members": (
        lambda e: edit(e, energy={"name": "sum", "members": [WIDE, {"name": "ring"}]}),
        "needs more than",
    ),
    "nested to no end": (lambda e: edit(e, energy=tempered(200)), "deeper than 32 sections"),
    "giant hopfield": (
        lambda e: edit(e, energy={"name": "hopfield", "num_units": 10**4, "num_patterns": 10**4}),
        "energy.num_units",
    ),
    "giant patterns": (
        lambda e: edit(e, energy={"name": "hopfield", "patterns": [[1] * 10**4]}),
        "energy.patterns: 10000 units",
    ),
    "giant lattice": (
        lambda e: edit(e, energy={"name": "ising", "shape": [2**14, 2**14]}),
        "more than 16777216 numbers",
    ),
    "giant board": (
        lambda e: edit(e, energy={"name": "checkerboard", "num_squares": 2**16}),
        "energy.num_squares",
    ),
    "giant event": (lambda e: edit(e, event__shape=[1, 2**13, 2**12]), "event.shape"),
    "leapfrog to no end": (
        lambda e: edit(
            e, sampler={"name": "hmc", "step_size": 0.1, "num_leapfrog_steps": 2**31 - 1}
        ),
        "sampler.num_leapfrog_steps",
    ),
    "steps to no end": (lambda e: edit(e, sampler__num_steps=2**31), "sampler.num_steps"),
    "start_std of 400 digits": (lambda e: edit(e, start_std=10**400), "start_std"),
    "step_size of 400 digits": (lambda e: edit(e, sampler__step_size=10**400), "step_size"),
    "confinement of 400 digits": (lambda e: edit(e, energy__confinement=10**400), "energy"),
    "size of 400 digits": (lambda e: edit(e, weights__bytes=10**400), "cut short"),
    "missing weight": (lambda e: rewrite_weights(e, lambda t: t.popitem()), "is missing"),
    "extra weight": (
        lambda e: rewrite_weights(e, lambda t: t.update(extra=torch.zeros(3))),
        "is unknown",
    ),
    "wrong shape": (
        lambda e: rewrite_weights(e, lambda t: t.update({"head.bias": torch.zeros(7)})),
        "has shape (7,)",
    ),
    "wrong dtype": (
        lambda e: rewrite_weights(e, lambda t: t.update({"head.bias": torch.zeros(1).half()})),
        "float16",
    ),
    "not finite": (
        lambda e: rewrite_weights(e, lambda t: t.update({"head.bias": torch.tensor([math.nan])})),
        "not finite",
    ),
}


def test_an_export_of_another_release_loads_or_one_line_says_which_release_reads_it(image_export):
    lineage = {"packages": {"ebm_dist": "0.7.1"}}
    edit(image_export, lineage=lineage)
    ebm_dist.load_energy(image_export)
    edit(image_export, format_version=3)
    with pytest.raises(UserError, match=r"reads 1; load it with ebm_dist 0\.7\.1, or export"):
        ebm_dist.load_energy(image_export)
    edit(image_export, format_version=1, energy__gone_by_now=3)
    with pytest.raises(UserError, match=r"gone_by_now.*ebm_dist 0\.7\.1 wrote the export"):
        ebm_dist.load_energy(image_export)
    edit(image_export, lineage={"packages": {"ebm_dist": "0.7\n1"}})
    with pytest.raises(UserError, match=r"gone_by_now") as caught:
        ebm_dist.load_energy(image_export)
    assert "wrote" not in str(caught.value)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_or_hostile_export_is_refused_in_one_line(image_export, fault):
    damage, expected = FAULTS[fault]
    damage(image_export)
    with pytest.raises(UserError) as caught:
        ebm_dist.load_energy(image_export)
    message = str(caught.value)
    assert expected in message
    assert "\n" not in message
    assert str(image_export) in message


def test_more_samples_than_memory_holds_are_refused_with_what_fits(image_export):
    with pytest.raises(UserError, match=r"--num 4194305: .*draw 4194304 at most"):
        draw_samples(open_export(image_export), 2**22 + 1, 1)


@pytest.mark.parametrize("fault", ["cut", "shape", "empty", "nan"])
def test_damaged_chains_are_refused_only_when_they_are_asked_for(image_export, fault):
    path = image_export / "chains.safetensors"
    if fault == "cut":
        cut(path, 100)
    elif fault == "empty":
        save_file({"x": torch.zeros(0, 1, 8, 8)}, path)
    elif fault == "nan":
        save_file({"x": torch.full((3, 1, 8, 8), math.nan)}, path)
    else:
        save_file({"x": torch.zeros(3, 2)}, path)
    export = open_export(image_export)
    draw_samples(export, 2, 1, start="noise")
    with pytest.raises(UserError, match=r"chains\.safetensors"):
        draw_samples(export, 2, 1, start="chains")


@pytest.mark.parametrize(
    ("reinit_prob", "steps"),
    [(0.05, 280), (1.0, 20), (0.0, 1000), (1e-320, 1000), (float("nan"), 1000), ("x", 1000)],
)
def test_samples_take_as_many_steps_as_half_of_the_runs_chains_lived_for(
    tmp_path, reinit_prob, steps
):
    sampler = {**LANGEVIN, "num_steps": 20}
    write(tmp_path / "e", {"name": "mlp", "widths": [4]}, EventSpec((2,), "real"), sampler=sampler)
    export = open_export(tmp_path / "e")
    recipe = {"buffer": {"reinit_prob": reinit_prob, "context": {"label": "uniform"}}}
    export = dataclasses.replace(export, config={**export.config, "recipe": recipe})
    assert usual_steps(export) == steps
    assert not is_conditional(export)  # an edited file: the energy has no classes


def test_samples_of_a_run_without_chains_take_the_steps_of_the_samplers_schedule(tmp_path):
    flow = {"name": "flow_langevin", "step_size": 0.02, "temperature": 0.1, "num_steps": 10}
    for sampler, steps in ((flow, 50), (LANGEVIN, 1000)):
        path = tmp_path / sampler["name"]
        write(path, {"name": "mlp", "widths": [4]}, EventSpec((2,), "real"), sampler=sampler)
        assert usual_steps(open_export(path)) == steps
