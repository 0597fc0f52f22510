"""Plain shards: every sample and label is read, or the cause why not is one line."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
from data_shards import npy, numbered_config, numbered_shards, png, write_tar
from rich.console import Console

from ebm_dist.cli import main
from ebm_dist.config.run_config import dump, load
from ebm_dist.core.errors import UserError
from ebm_dist.data import DataConfig, describe, load_split, prepare
from ebm_dist.data.dataset import open_dataset
from ebm_dist.run.preflight import preflight
from ebm_dist.run.train import bind, train

GREY = np.arange(16, dtype=np.uint8).reshape(4, 4)


def images(start: int, stop: int) -> list[tuple[str, bytes]]:
    return [(f"{i:02d}.png", png(GREY + np.uint8(i))) for i in range(start, stop)]


def labels(start: int, stop: int) -> list[tuple[str, bytes]]:
    return [(f"{i:02d}.cls", str(i % 3).encode()) for i in range(start, stop)]


def num_read(path: Path) -> int:
    return len(load_split(DataConfig(source=str(path), batch_size=1), "train").x)


def refused(path: Path, **changes: object) -> str:
    config = DataConfig.model_validate({"source": str(path), "batch_size": 1, **changes})
    with pytest.raises(UserError) as error:
        load_split(config, "train")
    with pytest.raises(UserError):  # before a run as well
        open_dataset(config).survey()
    text = str(error.value)
    assert str(path) in text
    assert "\n" not in text
    return text


# -- the tar


def test_a_second_archive_behind_the_first_is_named(tmp_path: Path):
    first = write_tar(tmp_path / "a.tar", images(0, 6)).read_bytes()
    second = write_tar(tmp_path / "b.tar", images(6, 12)).read_bytes()
    (tmp_path / "ab.tar").write_bytes(first + second)
    assert "another tar" in refused(tmp_path / "ab.tar")
    (tmp_path / "ab.tar.gz").write_bytes(gzip.compress(first) + gzip.compress(second))
    assert "another tar" in refused(tmp_path / "ab.tar.gz")
    (tmp_path / "a.tar").write_bytes(first + bytes(2**20))
    assert num_read(tmp_path / "a.tar") == 6


def packed_as(form: str, directory: Path) -> bytes:
    """Six images packed by tar."""
    for name, data in images(0, 6):
        (directory / name).write_bytes(data)
    names = [name for name, _ in images(0, 6)]
    command = ["tar", f"--format={form}", "-cf", "-", "-C", directory, *names]
    return subprocess.run(command, check=True, capture_output=True).stdout


@pytest.mark.parametrize("form", ["v7", "ustar", "gnu", "pax"])
def test_a_cut_or_damaged_header_loses_no_sample_in_any_form_of_tar(tmp_path: Path, form: str):
    whole = packed_as(form, tmp_path)
    path = tmp_path / "cut.tar"
    path.write_bytes(whole)
    assert num_read(path) == 6
    with tarfile.open(path) as tar:
        offset = tar.getmembers()[3].offset
    path.write_bytes(whole[:offset])
    assert "end-of-archive" in refused(path)
    path.write_bytes(whole[: offset + 148] + b"9" + whole[offset + 149 :])
    assert "not a whole tar file" in refused(path)
    path.write_bytes(whole[:offset] + b"text" + whole[offset:])
    assert "not a whole tar file" in refused(path)


@pytest.mark.parametrize("module", [gzip, bz2, lzma])
def test_damage_in_compressed_shards_is_one_line(tmp_path: Path, module):
    suffix = {gzip: "gz", bz2: "bz2", lzma: "xz"}[module]
    path = tmp_path / f"s.tar.{suffix}"
    noise = os.urandom(60_000)
    whole = module.compress(
        write_tar(tmp_path / "s.tar", [*images(0, 6), ("x.bin", noise)]).read_bytes()
    )
    (tmp_path / "s.tar").unlink()
    path.write_bytes(whole)
    damaged = bytearray(whole)
    damaged[len(damaged) // 2] ^= 255
    path.write_bytes(bytes(damaged))
    assert "not a whole tar file" in refused(path)


def test_links_in_the_place_of_samples_are_refused_and_the_advice_reads_them(tmp_path: Path):
    folder = tmp_path / "in"
    folder.mkdir()
    for index in range(12):
        path = folder / f"{index:02d}.png"
        if index < 3:
            path.write_bytes(png(GREY + np.uint8(index)))
        elif index < 11:
            os.link(folder / f"{index % 3:02d}.png", path)
        else:
            path.symlink_to("00.png")
    path = tmp_path / "s.tar"
    pack = ["tar", "--sort=name", "-cf", path, "-C", folder]
    subprocess.run([*pack, "."], check=True)
    text = refused(path)
    assert "'./03.png' is a link" in text
    advice = text.split("(tar ")[1].split(")")[0].split()
    subprocess.run([*pack, *advice, "."], check=True)
    assert num_read(path) == 12


def test_members_that_no_sample_uses_are_counted_before_the_start(tmp_path: Path):
    path = write_tar(
        tmp_path / "s.tar",
        [("README", b"hello"), ("00.png", png(GREY)), ("00.json", b"{}"), ("01.png", png(GREY))],
    )
    config = DataConfig(source=str(path), batch_size=1)
    (line,) = open_dataset(config).survey()
    assert line == (
        f"{path}: not read: 1 members 'json', 1 members not named KEY.EXTENSION, the first 'README'"
    )


def test_folders_in_a_shard_are_said_to_be_no_labels(tmp_path: Path):
    path = write_tar(tmp_path / "s.tar", [("cat/0.png", png(GREY)), ("dog/0.png", png(GREY))])
    (line,) = open_dataset(DataConfig(source=str(path), batch_size=1)).survey()
    assert line == f"{path}: not read: the names of 2 folders (labels are .cls members)"


# -- samples and labels


def test_labels_that_begin_with_the_second_sample_are_refused(tmp_path: Path):
    members = [*images(0, 1), *images(1, 2), *labels(1, 2)]
    assert "sample '01': has a .cls label" in refused(write_tar(tmp_path / "s.tar", members))


@pytest.mark.parametrize("changes", [{}, {"num_classes": 3}])
@pytest.mark.parametrize("labels_first", [False, True])
def test_scattered_members_are_told_to_follow_each_other(
    tmp_path: Path, changes: dict[str, object], labels_first: bool
):
    first, second = images(0, 6), labels(0, 6)
    members = [*second, *first] if labels_first else [*first, *second]
    path = write_tar(tmp_path / "s.tar", members)
    config = DataConfig.model_validate({"source": str(path), "batch_size": 1, **changes})
    with pytest.raises(UserError, match=r"must follow each other.*tar --sort=name"):
        load_split(config, "train")
    (tmp_path / "in").mkdir()
    for name, data in members:
        (tmp_path / "in" / name).write_bytes(data)
    subprocess.run(["tar", "--sort=name", "-cf", path, "-C", tmp_path / "in", "."], check=True)
    label = load_split(config, "train").label
    assert label is not None
    assert label.tolist() == [0, 1, 2] * 2


def test_a_label_behind_a_second_dot_is_refused(tmp_path: Path):
    members = [("x0.5.png", png(GREY)), ("x0.5.cls", b"1")]
    with pytest.raises(UserError, match=r"a key ends at the first dot"):
        num_read(write_tar(tmp_path / "s.tar", members))
    # Without labels such names lose nothing.
    assert num_read(write_tar(tmp_path / "s.tar", [("x0.5.png", png(GREY))])) == 1


def test_bytes_behind_the_end_of_a_png_are_passed_over(tmp_path: Path):
    members = [(name, data + bytes(100)) for name, data in images(0, 3)]
    assert num_read(write_tar(tmp_path / "s.tar", members)) == 3


def test_16_bit_images_are_read_as_the_refusal_advises(tmp_path: Path):
    deep = np.linspace(0, 65535, 16).reshape(4, 4).astype(np.uint16)
    path = write_tar(tmp_path / "s.tar", [("0.png", png(deep))])
    assert "float .npy in [-1, 1] with data.kind: image" in refused(path)
    write_tar(path, [("0.npy", npy(deep.astype(np.float32) / 32767.5 - 1))])
    config = DataConfig(source=str(path), batch_size=1, kind="image")
    x = load_split(config, "train").x
    assert (tuple(x.shape), len(x.unique())) == ((1, 1, 4, 4), 16)


@pytest.mark.parametrize("value", [1e39, -1e300])
def test_float64_that_float32_cannot_hold_is_refused(tmp_path: Path, value: float):
    members = [("0.npy", npy(np.zeros(2))), ("1.npy", npy(np.array([0.0, value])))]
    assert "too large for float32" in refused(write_tar(tmp_path / "s.tar", members))


def test_every_tar_of_a_folder_is_read_or_named(tmp_path: Path):
    for index, (suffix, module) in enumerate(
        [(".tar.xz", lzma), (".tar.bz2", bz2), (".tgz", gzip)]
    ):
        plain = write_tar(tmp_path / "x", images(index, index + 1))
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{index}{suffix}").write_bytes(module.compress(plain.read_bytes()))
    (tmp_path / "in" / "._0.tar").write_bytes(b"\0\5\x16\7")
    assert num_read(tmp_path / "in") == 3
    (tmp_path / "in" / "4.tar.zst").write_bytes(b"zstd")
    with pytest.raises(UserError, match=r"holds 4\.tar\.zst beside 0\.tar\.xz"):
        num_read(tmp_path / "in")


def test_held_out_shards_among_training_shards_are_not_trained_on(tmp_path: Path):
    for name in ("train-00", "val-00"):
        write_tar(tmp_path / "in" / f"{name}.tar", images(0, 2))
    with pytest.raises(UserError, match=r"holds val-00\.tar.*data\.test_source"):
        num_read(tmp_path / "in")
    (tmp_path / "held-out").mkdir()
    (tmp_path / "in" / "val-00.tar").rename(tmp_path / "held-out" / "val-00.tar")
    config = DataConfig(
        source=str(tmp_path / "in"), test_source=str(tmp_path / "held-out"), batch_size=1
    )
    assert [len(load_split(config, split).x) for split in ("train", "test")] == [2, 2]


# -- what the run needs of them

RUN = {
    "run": {"name": "t", "steps": 2},
    "runtime": {"backend": "inline"},
    "energy": {"name": "mlp", "widths": [8], "confinement": 1.0},
    "sampler": {"name": "langevin", "step_size": 0.1, "temperature": 1.0, "num_steps": 2},
    "buffer": {"capacity": 64, "num_shards": 1},
    "workers": {"num_workers": 1, "num_chains": 16},
    "flow": {"mode": "sync"},
    "tracking": {"wandb": "off"},
    "evaluation": {"every": 1},
}


def test_a_run_without_a_test_split_is_refused_and_each_advice_works(tmp_path: Path):
    source = numbered_shards(tmp_path, [40])
    held_out = numbered_shards(tmp_path / "test", [10])
    base = {**RUN, "data": {"source": source, "batch_size": 16}}
    with pytest.raises(UserError, match=r"evaluation\.every: is 1, but .*no test split") as error:
        preflight(load(base, []))
    assert "data.holdout=0.1" in str(error.value)
    for advice in ("data.holdout=0.1", f"data.test_source={held_out}", "evaluation.every=null"):
        preflight(load(base, [advice]))


def test_a_weighted_run_on_plain_shards_with_a_holdout_logs_its_log_z(tmp_path: Path):
    base = {
        **RUN,
        "data": {"source": numbered_shards(tmp_path, [64]), "batch_size": 16, "holdout": 0.2},
        "energy": {"name": "quadratic", "precision": [2.0], "learnable": True},
        "buffer": {"capacity": 64, "num_shards": 1, "reinit_prob": 0.0, "jarzynski": True},
    }
    train(load(base, []), run_dir=tmp_path / "run", console=Console(file=io.StringIO()))
    rows = [
        json.loads(row) for row in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    for name in ("likelihood/log_z", "likelihood/log_prob_test", "energy/test"):
        assert any(name in row for row in rows), name


def test_prepared_shards_without_a_test_split_can_hold_a_part_out(tmp_path: Path):
    folder = tmp_path / "in"
    folder.mkdir()
    for index in range(9):
        (folder / f"{index}.png").write_bytes(png(GREY + np.uint8(index)))
    prepare("imagefolder", tmp_path / "more", folder, shard_size=4)
    config = DataConfig(source=str(tmp_path / "more"), batch_size=1, holdout=0.5)
    train, test = (load_split(config, split).x for split in ("train", "test"))
    assert len(train) + len(test) == 9
    assert not {tuple(x.flatten().tolist()) for x in train} & {
        tuple(x.flatten().tolist()) for x in test
    }


def test_a_holdout_that_leaves_no_test_sample_is_refused_before_the_start(tmp_path: Path):
    data = {"source": numbered_shards(tmp_path, [16]), "batch_size": 16, "holdout": 1e-6}
    with pytest.raises(UserError, match=r"data\.holdout: 1e-06 leaves no test samples"):
        preflight(load({**RUN, "data": data}, []))


@pytest.mark.parametrize(
    ("objective", "energy"), [("joint", 3), ("contrastive", "data")], ids=["joint", "from the data"]
)
def test_labels_without_a_count_lead_to_data_num_classes(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    objective: str,
    energy: object,
):
    monkeypatch.chdir(tmp_path)
    base = {
        **RUN,
        "data": {"source": numbered_shards(tmp_path, [32]), "batch_size": 16},
        "energy": {**RUN["energy"], "num_classes": energy},
        "objective": {"name": objective},
        "evaluation": {"every": None},
    }
    (tmp_path / "c.yaml").write_text(dump(load(base, [])))
    assert main(["train", "c.yaml", "--run-dir", "run"]) == 2
    error = capsys.readouterr().err
    assert "set data.num_classes where plain shards hold .cls labels" in error
    assert len(error.splitlines()) == 1
    followed = load("c.yaml", ["data.num_classes=3"])
    bind(followed, describe(followed.data))


def test_images_too_few_for_fidelity_are_refused_before_the_start(tmp_path: Path):
    members = [member for i in range(20) for member in (*images(i, i + 1), *labels(i, i + 1))]
    held_out = write_tar(tmp_path / "test.tar", members[:6])
    source = write_tar(tmp_path / "train.tar", members)
    data = {"source": str(source), "test_source": str(held_out), "batch_size": 16, "num_classes": 3}
    with pytest.raises(ValueError, match=r"^evaluation.fidelity: .* is \(3, 1, 4, 4\); set ev"):
        preflight(load({**RUN, "data": data}, []))
    preflight(load({**RUN, "data": data}, ["evaluation.fidelity=false"]))


def test_numbered_shards_survive_the_survey(tmp_path: Path):
    config = numbered_config(numbered_shards(tmp_path, [5, 4]))
    assert open_dataset(config).survey() == []
