"""A folder of images: every image is read or counted as left out, in its colours and its class."""

from __future__ import annotations

import io
import os
import shlex
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import typer.main
from data_shards import png
from PIL import Image

from ebm_dist.cli import app, main
from ebm_dist.config.run_config import load
from ebm_dist.core.errors import UserError
from ebm_dist.data import DataConfig, describe, load_split, prepare
from ebm_dist.data.format.manifest import Manifest

APPLE_DOUBLE = b"\0\5\x16\7" + bytes(80)


def picture(path: Path, shape: tuple[int, ...] = (4, 4, 3), seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    form = {".jpg": "JPEG", ".bmp": "BMP", ".webp": "WEBP", ".gif": "GIF"}.get(path.suffix, "PNG")
    path.write_bytes(png(pixels, form))
    return path


def pets(root: Path, num: int = 10) -> Path:
    for name in ("cat", "dog"):
        for index in range(num):
            picture(root / name / f"{index:02d}.png", seed=index)
    return root


def prepared(tmp_path: Path, **options: object) -> tuple[Manifest, str]:
    lines: list[str] = []
    out = tmp_path / "out"
    manifest = prepare("imagefolder", out, tmp_path / "in", say=lines.append, **options)  # type: ignore[arg-type]
    return manifest, "\n".join(lines)


def refused(tmp_path: Path) -> str:
    with pytest.raises(UserError) as error:
        prepared(tmp_path)
    assert not (tmp_path / "out").exists()
    assert "\n" not in str(error.value)
    return str(error.value)


def num(manifest: Manifest) -> tuple[int, int]:
    return manifest.num_samples("train"), manifest.num_samples("test")


def hide(root: Path, form: str) -> None:
    if form == "notebook":
        picture(root / "cat" / ".ipynb_checkpoints" / "00-checkpoint.png")
    elif form == "resource forks":
        (root / "._cat.png").write_bytes(APPLE_DOUBLE)
        (root / "dog" / "._00.png").write_bytes(APPLE_DOUBLE)
    else:
        picture(root / form / "cat" / "00.png")


@pytest.mark.parametrize("form", ["notebook", "resource forks", "__MACOSX", ".thumbs", "@eaDir"])
def test_hidden_copies_are_no_data(tmp_path: Path, form: str):
    hide(pets(tmp_path / "in"), form)
    manifest, _ = prepared(tmp_path)
    assert (manifest.classes, num(manifest)) == (("cat", "dog"), (18, 2))


def test_a_folder_without_images_is_no_class_and_is_named(tmp_path: Path):
    (pets(tmp_path / "in") / "shards").mkdir()
    manifest, said = prepared(tmp_path)
    assert manifest.classes == ("cat", "dog")
    assert str(tmp_path / "in" / "shards") in said


def test_files_of_other_kinds_are_counted_by_kind(tmp_path: Path):
    pets(tmp_path / "in")
    for index in range(3):
        picture(tmp_path / "in" / "cat" / f"{index}.gif")
    (tmp_path / "in" / "names.txt").write_text("cat dog")
    (tmp_path / "in" / "dog" / "gone.png").symlink_to("nowhere")
    _, said = prepared(tmp_path)
    assert "left out: 3 of .gif, " in said
    assert "1 of .txt" in said
    assert "1 of dead link" in said


def test_links_in_a_circle_and_fifos_are_named_for_what_they_are(tmp_path: Path):
    pets(tmp_path / "in")
    (tmp_path / "in" / "cat" / "all").symlink_to(tmp_path / "in")
    os.mkfifo(tmp_path / "in" / "dog" / "pipe.png")
    (tmp_path / "in" / "dog" / "a.png").symlink_to("b.png")
    (tmp_path / "in" / "dog" / "b.png").symlink_to("a.png")
    _, said = prepared(tmp_path)
    for line in ("1 of link to a folder above it", "1 of FIFO, socket or device", "2 of dead link"):
        assert line in said
    assert "empty folder" not in said


def test_shards_are_not_written_among_the_images(tmp_path: Path):
    with pytest.raises(UserError, match="name a directory beside it"):
        prepare("imagefolder", pets(tmp_path / "in") / "out", tmp_path / "in")
    assert not (tmp_path / "in" / "out").exists()


def test_a_folder_of_images_in_place_of_a_name_is_told_how_to_prepare_it(tmp_path: Path):
    photos, out = pets(tmp_path / "photos"), tmp_path / "out"
    with pytest.raises(UserError, match=f"imagefolder OUT --source {photos}`"):
        prepare(str(photos), out)
    prepare("imagefolder", out, photos)


def test_an_unknown_toy_is_not_blamed_on_a_config(tmp_path: Path):
    with pytest.raises(UserError, match="unknown data set 'toy:rinng'; did you mean") as caught:
        prepare("toy:rinng", tmp_path / "out")
    assert "data.source" not in str(caught.value)


def test_bmp_and_webp_are_read_as_png_is(tmp_path: Path):
    for suffix in ("png", "bmp", "webp"):
        picture(tmp_path / "in" / f"x.{suffix}", shape=(4, 4))
    manifest, said = prepared(tmp_path)
    assert num(manifest) == (3, 0)
    assert "left out" not in said


def test_links_to_folders_are_read_once(tmp_path: Path):
    pets(tmp_path / "elsewhere")
    (tmp_path / "in").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "in" / name).symlink_to(tmp_path / "elsewhere" / name)
    (tmp_path / "elsewhere" / "cat" / "again").symlink_to(tmp_path / "elsewhere" / "cat")
    manifest, said = prepared(tmp_path)
    assert num(manifest) == (18, 2)
    assert "again" in said


def test_counts_are_printed_by_class_and_names_escaped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    picture(pets(tmp_path / "in") / "\x1b[31m" / "x.png")
    (tmp_path / "in" / "\x1b[2J.txt").write_text("")
    command = ["data", "prepare", "imagefolder", str(tmp_path / "out")]
    assert main([*command, "--source", str(tmp_path / "in")]) == 0
    said = capsys.readouterr().out
    assert "train: 19 samples: 1 \\x1b[31m, 9 cat, 9 dog\n" in said
    assert "test: 2 samples: 0 \\x1b[31m, 1 cat, 1 dog\n" in said
    assert "\x1b" not in said


def test_one_colour_image_makes_all_colour_wherever_it_stands(tmp_path: Path):
    for index in range(60):
        picture(tmp_path / "in" / f"{index:02d}.png", shape=(4, 4))
    picture(tmp_path / "in" / "z.png")
    manifest, _ = prepared(tmp_path)
    assert manifest.event.shape == (3, 4, 4)


@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 3)])
def test_16_bit_images_are_refused_and_not_clipped(tmp_path: Path, shape: tuple[int, ...]):
    path = tmp_path / "in" / "0.png"
    picture(path, shape)
    if len(shape) == 2:
        Image.fromarray(np.linspace(0, 65535, 16).reshape(4, 4).astype(np.uint16)).save(path)
    else:
        path.write_bytes(png_of_depth_16(path.read_bytes()))
    assert "more than 8 bits a channel" in refused(tmp_path)


def png_of_depth_16(data: bytes) -> bytes:
    """An RGB PNG of 4 x 4 pixels with 16 bits a channel, which pillow cannot write."""
    import struct
    import zlib

    def chunk(name: bytes, content: bytes) -> bytes:
        check = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)
    rows = zlib.compress((b"\0" + bytes(range(24))) * 4)
    return data[:8] + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_resize_is_an_option_and_its_advice_works(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for index in range(12):
        picture(tmp_path / "in" / f"{index}.png", shape=(4 + index % 2, 4, 3))
    command = ["data", "prepare", "imagefolder", str(tmp_path / "out")]
    command += ["--source", str(tmp_path / "in")]
    assert main(command) == 2
    advice = capsys.readouterr().err.split("pass ")[1].split(" to ")[0]
    assert advice == "--resize 4"
    assert main([*command, *advice.split()]) == 0
    assert "train: 11 samples without labels" in capsys.readouterr().out
    for side in ("0", "-4", "100000"):
        assert main([*command[:3], str(tmp_path / "other"), *command[4:], "--resize", side]) == 2
        assert "--resize: expected 1 to 8192 pixels" in capsys.readouterr().err


# -- splits and classes


@pytest.mark.parametrize("name", ["train", "Train", "training"])
def test_a_training_folder_alone_is_no_class(tmp_path: Path, name: str):
    pets(tmp_path / "in" / name)
    manifest, _ = prepared(tmp_path)
    assert (manifest.classes, num(manifest)) == (("cat", "dog"), (18, 2))


def test_train_is_a_class_among_other_vehicles(tmp_path: Path):
    for name in ("bus", "train"):
        picture(tmp_path / "in" / name / "0.png")
    assert prepared(tmp_path)[0].classes == ("bus", "train")


def test_a_test_folder_without_a_training_folder_is_refused(tmp_path: Path):
    pets(tmp_path / "in" / "val")
    assert "no train folder" in refused(tmp_path)


def test_a_second_held_out_folder_is_named_as_left_out(tmp_path: Path):
    for name in ("train", "val", "test"):
        pets(tmp_path / "in" / name, num=3)
    manifest, said = prepared(tmp_path)
    assert num(manifest) == (6, 6)
    assert f"left out: 6 images of {tmp_path / 'in' / 'val'}" in said


def test_a_class_that_only_the_test_part_has_is_refused_by_name(tmp_path: Path):
    picture(tmp_path / "in" / "train" / "cat" / "0.png")
    for name in ("cat", "dog"):
        picture(tmp_path / "in" / "test" / name / "0.png")
    assert str(tmp_path / "in" / "test" / "dog") in refused(tmp_path)


def test_a_test_part_in_another_form_is_refused_by_name(tmp_path: Path):
    pets(tmp_path / "in" / "train")
    for index in range(3):
        picture(tmp_path / "in" / "val" / "images" / f"{index}.jpg")
    assert f"{tmp_path / 'in' / 'val' / 'images'}: 3 images" in refused(tmp_path)
    (tmp_path / "in" / "val" / "images").rename(tmp_path / "elsewhere")
    picture(tmp_path / "in" / "val" / "0.jpg")
    assert "beside the class folders cat, dog" in refused(tmp_path)


def test_a_single_class_is_written_without_labels_and_said(tmp_path: Path):
    for index in range(10):
        picture(tmp_path / "in" / "img" / f"{index}.png")
    manifest, said = prepared(tmp_path)
    assert (manifest.classes, manifest.event.num_classes, num(manifest)) == ((), None, (9, 1))
    assert "img is the only class" in said


# -- alike in folders and shards


def turned(path: Path) -> bytes:
    image = Image.fromarray(np.arange(54, dtype=np.uint8).reshape(3, 6, 3))
    exif = image.getexif()
    exif[0x0112] = 6
    stream = io.BytesIO()
    image.save(stream, "JPEG" if path.suffix == ".jpg" else "PNG", exif=exif)
    return stream.getvalue()


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_a_turned_photograph_is_the_same_in_a_folder_and_in_a_shard(tmp_path: Path, suffix: str):
    from data_shards import write_tar

    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / f"a{suffix}"
    path.write_bytes(turned(path))
    shard = write_tar(tmp_path / "s.tar", [(path.name, path.read_bytes())])
    prepared(tmp_path)
    configs = [DataConfig(source=str(p), batch_size=1) for p in (tmp_path / "out", shard)]
    assert [describe(config).shape for config in configs] == [(3, 6, 3)] * 2
    first, second = (load_split(config, "train").x for config in configs)
    assert first.equal(second)


# -- the command


def test_the_example_of_data_prepare_works_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    group = typer.main.get_command(app)
    command = group.commands["data"].commands["prepare"]  # type: ignore[attr-defined]
    examples = [
        shlex.split(line.partition("ebm-dist ")[2]) for line in command.epilog.split("\n\n")
    ]
    configs = Path(__file__).parents[3] / "configs"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(configs)
    assert main(examples[0]) == 0
    said = capsys.readouterr().out
    assert Counter(said.split())["samples:"] == 2
    assert "train: 1442 samples: " in said
    _, config, *overrides = examples[-1]
    assert describe(load(config, overrides).data).shape == (1, 8, 8)
    assert load(config, overrides).data.source == examples[0][-1]
