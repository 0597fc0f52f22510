"""Data as people have it: sets in MNIST's format, CIFAR-100, arrays, labels in a file, TIFF."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from data_shards import npy, png
from PIL import Image

from ebm_dist.cli import main
from ebm_dist.core.errors import UserError
from ebm_dist.data import DataConfig, load_split, prepare
from ebm_dist.data.format import npy as npy_format
from ebm_dist.data.format import picture
from ebm_dist.data.format.manifest import Manifest

RNG = np.random.default_rng(0)


def stored(out: Path, split: str = "train") -> set[tuple[bytes, int]]:
    batch = load_split(DataConfig(source=str(out), batch_size=1), split)  # type: ignore[arg-type]
    x = ((batch.x + 1) * 127.5).round().byte().numpy()
    label = batch.label.tolist() if batch.label is not None else [-1] * len(x)
    return {(image.tobytes(), k) for image, k in zip(x, label)}


def pairs(x: np.ndarray, label: np.ndarray | list[int]) -> set[tuple[bytes, int]]:
    return {(image.tobytes(), int(k)) for image, k in zip(x, label)}


def images(num: int, *shape: int) -> np.ndarray:
    return RNG.integers(0, 256, (num, *shape), dtype=np.uint8)


def refused(tmp_path: Path, name: str, source: Path | None, says: str, **options: object) -> None:
    with pytest.raises(UserError, match=says) as error:
        prepare(name, tmp_path / "out", source, **options)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


# -- sets in MNIST's format


def write_idx(path: Path, x: np.ndarray) -> None:
    path.parent.mkdir(exist_ok=True)
    head = bytes([0, 0, 8, x.ndim]) + struct.pack(f">{x.ndim}I", *x.shape)
    path.write_bytes(
        gzip.compress(head + x.tobytes()) if path.suffix == ".gz" else head + x.tobytes()
    )


def write_set(directory: Path, prefix: str = "", *, first: int = 0, suffix: str = ".gz"):
    parts = {}
    for part, num in (("train", 12), ("test", 4)):
        x, y = images(num, 5, 6), (np.arange(num) % 3 + first).astype(np.uint8)
        write_idx(directory / f"{prefix}{part}-images-idx3-ubyte{suffix}", x)
        write_idx(directory / f"{prefix}{part}-labels-idx1-ubyte{suffix}", y)
        parts[part] = x, y
    return parts


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_any_set_in_mnists_format_is_read_with_its_own_size_and_classes(tmp_path: Path, suffix):
    parts = write_set(tmp_path / "in", suffix=suffix)
    manifest = prepare("idx", tmp_path / "out", tmp_path / "in")
    assert (manifest.event.shape, manifest.classes) == ((1, 5, 6), ("0", "1", "2"))
    for part, (x, y) in parts.items():
        assert stored(tmp_path / "out", part) == pairs(x, y)


def test_emnist_stands_upright_and_its_letters_have_their_names(tmp_path: Path):
    x, y = write_set(tmp_path / "in", "emnist-letters-", first=1)["train"]
    write_set(tmp_path / "in", "emnist-digits-")
    mapping = "1 65 97\n2 66 98\n3 67 99\n"
    (tmp_path / "in" / "emnist-letters-mapping.txt").write_text(mapping)
    refused(tmp_path, "idx", tmp_path / "in", "several sets .*--source .*/in/emnist-letters")
    said: list[str] = []
    source = tmp_path / "in" / "emnist-letters"
    manifest = prepare("idx", tmp_path / "out", source, say=said.append)
    assert (manifest.event.shape, manifest.classes) == ((1, 6, 5), ("A", "B", "C"))
    assert stored(tmp_path / "out") == pairs(x.swapaxes(1, 2), y - 1)
    assert "turned upright" in said[0]
    assert "4 A, 4 B, 4 C" in said[1]


def test_images_without_labels_or_test_part_are_a_set_too(tmp_path: Path):
    write_idx(tmp_path / "in" / "train-images-idx3-ubyte", x := images(6, 4, 4))
    manifest = prepare("idx", tmp_path / "out", tmp_path / "in")
    assert (manifest.event.num_classes, "test" in manifest.splits) == (None, False)
    assert stored(tmp_path / "out") == pairs(x, [-1] * 6)


def test_sets_that_will_not_do_are_one_line(tmp_path: Path):
    parts = write_set(tmp_path / "in")
    refused(tmp_path, "idx", None, "needs --source")
    refused(tmp_path, "idx", tmp_path / "none" / "x", "is missing")
    refused(tmp_path, "idx", tmp_path / "in" / "kmnist", "has no kmnist-train-images-idx3-ubyte")
    write_idx(tmp_path / "in" / "test-images-idx3-ubyte.gz", images(4, 7, 6))
    refused(tmp_path, "idx", tmp_path / "in", "not of the size")
    write_idx(tmp_path / "in" / "train-labels-idx1-ubyte.gz", parts["train"][1][:5])
    refused(tmp_path, "idx", tmp_path / "in", "12 images and 5 labels")


# -- CIFAR-100


@pytest.mark.parametrize("form", ["python", "binary", "binary without names"])
def test_cifar100_is_read_with_its_fine_labels_and_their_names(tmp_path: Path, form: str):
    names = [f"class {k}".replace(" ", "_") for k in range(100)]
    (tmp_path / "in").mkdir()
    x, fine = images(8, 3072), [99, 0, 5, 5, 7, 8, 9, 10]
    for part in ("train", "test"):
        if form == "python":
            batch = {"data": x, "fine_labels": fine, "coarse_labels": [1] * 8}
            (tmp_path / "in" / part).write_bytes(pickle.dumps(batch, 2))
        else:
            labels = np.stack([np.ones(8), fine], axis=1).astype(np.uint8)
            records = np.concatenate([labels, x], axis=1)
            (tmp_path / "in" / f"{part}.bin").write_bytes(records.tobytes())
    if form == "python":
        (tmp_path / "in" / "meta").write_bytes(pickle.dumps({"fine_label_names": names}, 2))
    elif form == "binary":
        (tmp_path / "in" / "fine_label_names.txt").write_text("\n".join(names))
    manifest = prepare("cifar100", tmp_path / "out", tmp_path / "in")
    assert manifest.classes[99] == ("99" if "without" in form else "class_99")
    assert stored(tmp_path / "out") == pairs(x, fine)


# -- arrays


@pytest.mark.parametrize(
    "names",
    [
        ("x_train", "y_train", "x_test", "y_test"),
        ("train_images", "train_labels", "test_images", "test_labels"),
        ("X", "y", "Xval", "yval"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_the_arrays_of_an_npz_are_told_by_their_names(tmp_path: Path, names, packed):
    x, y = images(20, 4, 4, 3), np.arange(20)[:, None] % 4
    names = [name.replace("val", "_val") for name in names]
    arrays = dict(zip(names, (x[:15], y[:15], x[15:], y[15:])))
    (np.savez_compressed if packed else np.savez)(tmp_path / "a.npz", **arrays)  # pyright: ignore[reportArgumentType]
    manifest = prepare("arrays", tmp_path / "out", tmp_path / "a.npz")
    assert (manifest.event.shape, manifest.classes) == ((3, 4, 4), ("0", "1", "2", "3"))
    chw = x.transpose(0, 3, 1, 2)
    assert stored(tmp_path / "out") == pairs(chw[:15], y[:15, 0])
    assert stored(tmp_path / "out", "test") == pairs(chw[15:], y[15:, 0])


def test_a_single_array_is_mapped_and_a_tenth_of_it_held_out(tmp_path: Path):
    x = RNG.normal(size=(200, 3)).astype(np.float32)
    np.save(tmp_path / "a.npy", np.asfortranarray(x))
    said: list[str] = []
    manifest = prepare("arrays", tmp_path / "out", tmp_path / "a.npy", say=said.append)
    splits = [load_split(DataConfig(source=str(tmp_path / "out")), s).x for s in ("train", "test")]
    assert sorted(map(tuple, np.concatenate(splits).tolist())) == sorted(map(tuple, x.tolist()))
    assert 5 < manifest.num_samples("test") < 40
    assert manifest.event.kind == "real"
    assert "a sample in 10" in said[0]


@pytest.mark.parametrize("form", ["csv", "json", "npy"])
def test_labels_of_an_array_come_in_its_order(tmp_path: Path, form: str):
    x = images(60, 4, 4)
    np.save(tmp_path / "a.npy", x)
    labels: list = ["ant", "bee"] * 30 if form != "npy" else [3, 7] * 30
    path = tmp_path / f"labels.{form}"
    if form == "npy":
        np.save(path, np.array(labels))
    else:
        path.write_text("label\n" + "\n".join(labels) if form == "csv" else json.dumps(labels))
    manifest = prepare("arrays", tmp_path / "out", tmp_path / "a.npy", labels=path)
    assert manifest.classes == (("3", "7") if form == "npy" else ("ant", "bee"))
    found = stored(tmp_path / "out") | stored(tmp_path / "out", "test")
    assert found == pairs(x, [0, 1] * 30)


def claiming(shape: str) -> bytes:
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}}}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + bytes(64)


def zipped(path: Path, **members: bytes) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)


HOSTILE = {
    "object.npy": (npy(np.array([{}], object)), "never read"),
    "huge.npy": (claiming("(1099511627776,)"), "header claims"),
    "cut.npy": (npy(images(3, 4))[:-2], "header claims"),
    "text.npy": (b"hello", "not a readable .npy"),
    "empty.npy": (npy(np.zeros((0, 4))), "holds no samples"),
    "page.npz": (b"<html>not found</html>", "not a whole .npz"),
    "object.npz": ({"x": npy(np.array([{}], object))}, "never read"),
    "huge.npz": ({"x": claiming("(1099511627776,)")}, "header claims"),
    "two.npz": ({"a": npy(images(3, 4)), "b": npy(images(3, 4))}, "holds a .*, b .*; expected one"),
    "labels.npz": ({"y": npy(images(3))}, "expected one array of events"),
    "many.npz": ({f"x{k}": b"" for k in range(65)}, "at most 64"),
    "unequal.npz": ({"x": npy(images(3, 4)), "y": npy(images(2))}, "N labels"),
}


@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_arrays_that_will_not_do_are_one_line(tmp_path: Path, name: str):
    content, says = HOSTILE[name]
    if isinstance(content, dict):
        zipped(tmp_path / name, **content)
    else:
        (tmp_path / name).write_bytes(content)
    refused(tmp_path, "arrays", tmp_path / name, says)


def test_an_npz_that_is_cut_or_altered_is_one_line(tmp_path: Path):
    np.savez(tmp_path / "a.npz", x=images(9, 8, 8))
    whole = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(whole[: len(whole) // 2])
    refused(tmp_path, "arrays", tmp_path / "a.npz", "not a whole .npz")
    altered = bytearray(whole)
    altered[400] ^= 1
    (tmp_path / "a.npz").write_bytes(altered)
    refused(tmp_path, "arrays", tmp_path / "a.npz", "not a whole .npz .*CRC")


def test_an_npz_that_unfolds_into_gigabytes_takes_no_memory(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(npy_format, "MAX_NPZ_BYTES", 2**20)
    zipped(tmp_path / "bomb.npz", x=npy(np.zeros(2**22, np.uint8)))
    tracemalloc.start()
    try:
        refused(tmp_path, "arrays", tmp_path / "bomb.npz", "at most 64 of 1048576 are read")
        assert tracemalloc.get_traced_memory()[1] < 2**21
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["a.npy", "a.npz"])
def test_a_fifo_or_directory_in_place_of_arrays_is_one_line(tmp_path: Path, name: str):
    os.mkfifo(tmp_path / name)
    refused(tmp_path, "arrays", tmp_path / name, "is a FIFO or device, expected a file")
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    refused(tmp_path, "arrays", tmp_path / name, "is a directory, expected a file")
    assert main(["data", "prepare", "arrays", str(tmp_path / "out"), "--source", "none.npy"]) == 2


# -- images


def photos(
    root: Path, num: int = 12, suffix: str = ".png", shape=(6, 8, 3)
) -> dict[str, np.ndarray]:
    root.mkdir(parents=True, exist_ok=True)
    made = {}
    for index in range(num):
        pixels = made[f"{index:02d}{suffix}"] = images(1, *shape)[0]
        Image.fromarray(pixels).save(root / f"{index:02d}{suffix}")
    return made


@pytest.mark.parametrize("suffix", [".tif", ".tiff"])
@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_tiff_is_read_as_png_is(tmp_path: Path, suffix: str, compression: str | None):
    pixels = images(1, 6, 8, 3)[0]
    (tmp_path / "in").mkdir()
    Image.fromarray(pixels).save(tmp_path / "in" / f"a{suffix}", compression=compression)
    prepare("imagefolder", tmp_path / "out", tmp_path / "in")
    assert stored(tmp_path / "out") == pairs(pixels.transpose(2, 0, 1)[None], [-1])


def tiff(pixels: np.ndarray, **options: object) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "TIFF", **options)
    return stream.getvalue()


def deep_tiff() -> bytes:
    """16 bits a channel: the entry of tag 258 of an 8-bit colour TIFF points at (8, 8, 8)."""
    return tiff(images(1, 4, 4, 3)[0]).replace(
        struct.pack("<3H", 8, 8, 8), struct.pack("<3H", 16, 16, 16)
    )


def wide_tiff() -> bytes:
    """An image of 60,000 pixels a side, in its header."""
    data = bytearray(tiff(images(1, 4, 4)[0]))
    (start,) = struct.unpack("<I", data[4:8])
    for entry in range(start + 2, len(data) - 12, 12):
        if struct.unpack("<H", data[entry : entry + 2])[0] in (256, 257):
            data[entry + 2 : entry + 12] = struct.pack("<HII", 4, 1, 60_000)
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (lambda: tiff(images(1, 4, 4)[0])[:60], "not a readable PNG, JPEG, BMP, WebP or TIFF"),
        (lambda: tiff(images(1, 64, 64)[0], compression="tiff_lzw")[:400], "not a readable"),
        (deep_tiff, "more than 8 bits a channel"),
        (lambda: tiff(images(1, 4, 4)[0].astype(np.uint16)), "more than 8 bits a channel"),
        (wide_tiff, "against decompression bombs"),
        (
            lambda: tiff(images(1, 4, 4)[0], save_all=True, append_images=[Image.new("L", (4, 4))]),
            "TIFF of several pages",
        ),
    ],
)
def test_a_tiff_that_will_not_do_is_one_line(tmp_path: Path, data, says: str, capfd):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.tif").write_bytes(data())
    refused(tmp_path, "imagefolder", tmp_path / "in", says)
    assert capfd.readouterr().err == ""


def test_an_image_file_of_gigabytes_is_not_read_whole(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(picture, "MAX_FILE_BYTES", 1000)
    photos(tmp_path / "in", num=1, shape=(64, 64, 3))
    refused(tmp_path, "imagefolder", tmp_path / "in", "more than 1000 bytes")


def test_crop_takes_the_middle_and_resize_scales_it(tmp_path: Path):
    made = photos(tmp_path / "in", num=1, shape=(6, 9, 3))["00.png"]
    prepare("imagefolder", tmp_path / "out", tmp_path / "in", crop=4)
    assert stored(tmp_path / "out") == pairs(made[1:5, 2:6].transpose(2, 0, 1)[None], [-1])
    manifest = prepare("imagefolder", tmp_path / "small", tmp_path / "in", crop=4, resize=2)
    assert manifest.event.shape == (3, 2, 2)
    refused(tmp_path / "x", "imagefolder", tmp_path / "in", "lower --crop to 6", crop=7)
    refused(tmp_path / "x", "imagefolder", tmp_path / "in", "--crop: expected 1 to 8192", crop=0)


def test_sets_and_arrays_are_cropped_and_resized_as_folders_are(tmp_path: Path):
    x, y = write_set(tmp_path / "in")["train"]
    prepare("idx", tmp_path / "out", tmp_path / "in", crop=3)
    assert stored(tmp_path / "out") == pairs(x[:, 1:4, 1:4], y)
    np.save(tmp_path / "a.npy", images(30, 8, 8, 3))
    manifest = prepare("arrays", tmp_path / "a", tmp_path / "a.npy", resize=4)
    assert manifest.event.shape == (3, 4, 4)
    np.save(tmp_path / "a.npy", np.zeros((30, 2)))
    refused(tmp_path / "x", "arrays", tmp_path / "a.npy", "are for 8-bit images", resize=4)


# -- labels in a file


def labelled(tmp_path: Path, name: str, text: str) -> tuple[Manifest, list[str]]:
    (tmp_path / name).write_text(text)
    said: list[str] = []
    out = tmp_path / f"out-{name}"
    options = {"labels": tmp_path / name, "say": said.append}
    return prepare("imagefolder", out, tmp_path / "in", **options), said  # type: ignore[arg-type]


FORMS = {
    "object.json": lambda rows: json.dumps(dict(rows)),
    "pairs.json": lambda rows: json.dumps({"labels": rows}),
    "entries.json": lambda rows: json.dumps([{"file_name": n, "label": y} for n, y in rows]),
    "head.csv": lambda rows: "id,split,Label\n" + "".join(f"{n[:-4]},?,{y}\n" for n, y in rows),
    "plain.csv": lambda rows: "".join(f"{n}, {y}\n" for n, y in rows),
    "tabs.tsv": lambda rows: "\ufefffile\tclass\n" + "".join(f"{n}\t{y}\n" for n, y in rows),
}


@pytest.mark.parametrize("form", sorted(FORMS))
def test_a_file_of_labels_tells_the_classes_by_name(tmp_path: Path, form: str):
    names = list(photos(tmp_path / "in", num=24))
    rows = [(name, "bird" if index % 2 else "ant") for index, name in enumerate(names)]
    manifest, said = labelled(tmp_path, form, FORMS[form](rows))
    assert manifest.classes == ("ant", "bird")
    assert "train: 22 samples: 11 ant, 11 bird" in said
    x = np.asarray(Image.open(tmp_path / "in" / names[1])).transpose(2, 0, 1)
    assert (x.tobytes(), 1) in stored(tmp_path / f"out-{form}")


def test_numbers_are_sorted_as_numbers_and_images_without_label_are_named(tmp_path: Path):
    names = list(photos(tmp_path / "in" / "sub"))
    rows = {f"sub/{name}": 10 if index % 2 else 9 for index, name in enumerate(names[:-1])}
    manifest, said = labelled(tmp_path, "l.json", json.dumps(rows | {"gone.png": 9}))
    assert manifest.classes == ("9", "10")
    assert f"left out: 1 images that {tmp_path / 'l.json'} does not name" in said[0]
    assert "1 of its names are no image of" in said[1]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("l.json", "[[[", "holds no labels that can be read"),
        ("l.json", "[" * 100_000, "holds no labels that can be read"),
        ("l.json", '{"a.png": 1.5}', "neither text nor a whole number"),
        ("l.json", '["cat"]', "without the names of their images"),
        ("l.json", "{}", "holds no labels"),
        ("l.json", '{"a.png": "cat"}', "names no image of .*a.png"),
        ("l.json", '[["00.png", 1], ["00.png", 2]]', "'00.png' both '1' and '2'"),
        ("l.csv", "a,b,c\n1,2,3\n", "no column of a, b, c is named label"),
        ("l.csv", "file,label\n00.png\n", "row 1 has 1 cells for 2"),
        ("l.csv", "file,label\n00.png,\n", "or no label"),
        ("l.csv", "\udcff", "holds no labels that can be read"),
    ],
)
def test_a_file_of_labels_that_will_not_do_is_one_line(tmp_path: Path, name, text, says):
    photos(tmp_path / "in", num=2)
    (tmp_path / name).write_bytes(text.encode(errors="surrogateescape"))
    refused(tmp_path, "imagefolder", tmp_path / "in", says, labels=tmp_path / name)


# -- the command


@pytest.mark.parametrize("num_classes", [2, 17])
def test_prepare_counts_classes_and_draws_a_row_of_each(tmp_path: Path, num_classes, capsys):
    num = 20 * num_classes
    np.savez(tmp_path / "a.npz", x=images(num, 4, 4), y=np.arange(num) % num_classes)
    out = tmp_path / "out"
    assert main(["data", "prepare", "arrays", str(out), "--source", str(tmp_path / "a.npz")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("train: ")
    assert lines[-1] == str(out / "samples.png")
    with Image.open(out / "samples.png") as picture:
        assert (picture.height < picture.width / 2) == (num_classes == 2)
    assert png(np.zeros((2, 2), np.uint8))[:4] == (out / "samples.png").read_bytes()[:4]
