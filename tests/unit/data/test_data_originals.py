"""Originals -> shards: what goes in comes out, and foreign bytes are never executed."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import multiprocessing
import os
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from data_shards import npy, png
from PIL import Image

from ebm_dist.core.errors import UserError
from ebm_dist.data import DataConfig, DataStream, describe, load_split, prepare
from ebm_dist.data.dataset import open_dataset
from ebm_dist.data.format.manifest import read_manifest
from ebm_dist.data.sources.mnist import DIRECTORY
from ebm_dist.data.sources.prepare import materialise
from ebm_dist.data.sources.restricted_pickle import read_plain_pickle


def stored(directory: Path, split: str = "train") -> tuple[np.ndarray, np.ndarray]:
    """Bytes (N, C, H, W) and labels of prepared shards."""
    batch = load_split(DataConfig(source=str(directory), batch_size=1), split)  # type: ignore[arg-type]
    assert batch.label is not None
    return ((batch.x + 1) * 127.5).round().to(torch.uint8).numpy(), batch.label.numpy()


def as_set(x: np.ndarray, label: np.ndarray) -> set[tuple[bytes, int]]:
    return {(image.tobytes(), int(k)) for image, k in zip(x, label)}


# -- digits


def test_digits_shards_hold_every_image_with_its_label_once(tmp_path: Path):
    from sklearn.datasets import load_digits

    prepare("digits", tmp_path / "digits", shard_size=300)
    x, label = (
        np.concatenate(part)
        for part in zip(*(stored(tmp_path / "digits", s) for s in ("train", "test")))
    )
    pixels, target = load_digits(return_X_y=True)
    expected = np.rint(pixels * 255 / 16).astype(np.uint8).reshape(-1, 1, 8, 8)
    assert len(x) == 1797
    assert sorted((i.tobytes(), int(k)) for i, k in zip(x, label)) == sorted(
        (i.tobytes(), int(k)) for i, k in zip(expected, target)
    )


def test_digits_splits_are_fixed_and_hold_all_classes_alike(tmp_path: Path):
    config = DataConfig(cache_dir=str(tmp_path))
    train, test = load_split(config, "train").label, load_split(config, "test").label
    assert train is not None
    assert test is not None
    assert (len(train), len(test)) == (1442, 355)
    share = torch.bincount(test, minlength=10) / torch.bincount(torch.cat([train, test]))
    assert bool(((share - 0.2).abs() < 0.01).all())


def test_preparing_twice_writes_the_same_bytes(tmp_path: Path):
    first, second = prepare("digits", tmp_path / "a"), prepare("digits", tmp_path / "b")
    assert first == second


def test_samples_are_mixed_on_disk(tmp_path: Path):
    prepare("digits", tmp_path / "digits")
    _, label = stored(tmp_path / "digits")
    # The original runs 0, 1, 2, …; mixed, neighbours agree with chance 1/10.
    agree = float(np.mean(label[1:] == label[:-1]))
    assert abs(agree - 0.1) < 4 * (0.09 / len(label)) ** 0.5
    ahead = float(np.mean((label[:-1] + 1) % 10 == label[1:]))
    assert abs(ahead - 0.1) < 4 * (0.09 / len(label)) ** 0.5


# -- Fashion-MNIST


def idx(array: np.ndarray) -> bytes:
    return (
        bytes([0, 0, 8, array.ndim])
        + struct.pack(f">{array.ndim}I", *array.shape)
        + array.tobytes()
    )


def write_fashion(
    directory: Path, num: int = 40, *, gz: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (num, 28, 28), dtype=np.uint8)
    label = rng.integers(0, 10, num, dtype=np.uint8)
    directory.mkdir(parents=True, exist_ok=True)
    for stem in ("train", "t10k"):
        for name, array in ((f"{stem}-images-idx3-ubyte", x), (f"{stem}-labels-idx1-ubyte", label)):
            data = gzip.compress(idx(array)) if gz else idx(array)
            (directory / (name + (".gz" if gz else ""))).write_bytes(data)
    return x, label


@pytest.mark.parametrize("gz", [True, False])
def test_fashion_mnist_is_read_from_idx_files(tmp_path: Path, gz: bool):
    x, label = write_fashion(tmp_path / "idx", gz=gz)
    prepare("fashion-mnist", tmp_path / "out", source=tmp_path / "idx")
    assert as_set(*stored(tmp_path / "out")) == as_set(x[:, None], label)


@pytest.mark.parametrize("gz", [True, False])
def test_idx_files_named_with_a_dot_are_read(tmp_path: Path, gz: bool):
    x, label = write_fashion(tmp_path / "idx", gz=gz)
    for path in (tmp_path / "idx").iterdir():
        path.rename(path.with_name(path.name.replace("-idx", ".idx")))
    prepare("fashion-mnist", tmp_path / "out", source=tmp_path / "idx")
    assert as_set(*stored(tmp_path / "out")) == as_set(x[:, None], label)


@pytest.mark.parametrize("whole", ["plain", "gzipped"])
def test_a_cut_idx_file_beside_the_whole_one_is_passed_over(tmp_path: Path, whole: str):
    x, label = write_fashion(tmp_path / "idx", gz=whole == "gzipped")
    suffix = ".gz" if whole == "plain" else ""
    (tmp_path / "idx" / f"train-images-idx3-ubyte{suffix}").write_bytes(b"\x1f\x8b\x08\0")
    prepare("fashion-mnist", tmp_path / "out", source=tmp_path / "idx")
    assert as_set(*stored(tmp_path / "out")) == as_set(x[:, None], label)


def test_mnist_is_a_set_of_its_own_with_digits_for_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    x, label = write_fashion(tmp_path / "idx")
    manifest = prepare("mnist", tmp_path / "out", source=tmp_path / "idx")
    assert (manifest.name, manifest.classes[9]) == ("mnist", "9")
    assert as_set(*stored(tmp_path / "out")) == as_set(x[:, None], label)
    with pytest.raises(UserError, match="mnist: needs --source"):
        prepare("mnist", tmp_path / "other")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="data prepare mnist OUT --source SOURCE"):
        describe(DataConfig(source="mnist"))


@pytest.mark.skipif(not DIRECTORY.is_dir(), reason="Debian package dataset-fashion-mnist is absent")
def test_the_debian_package_is_fashion_mnist():
    from ebm_dist.data.sources.originals import load_original

    original = load_original("fashion-mnist", None)
    assert {name: split.num for name, split in original.splits.items()} == {
        "train": 60000,
        "test": 10000,
    }
    x, label = original.splits["train"].get(0)
    assert (x.shape, label) == ((1, 28, 28), 9)  # the first image is an ankle boot
    assert int(x.astype(int).sum()) == 76247


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing", "apt-get install dataset-fashion-mnist"),
        ("truncated", "not a whole IDX file"),
        ("not gzip", "not a whole IDX file"),
        ("labels for images", "header"),
        ("short", "claims"),
        ("long", "claims"),
        ("huge claim", "claims"),
        ("fewer labels", "images"),
    ],
)
def test_damaged_idx_files_are_one_clear_line(tmp_path: Path, damage: str, message: str):
    x, label = write_fashion(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(
            {
                "truncated": whole[: len(whole) // 2],
                "not gzip": b"<html>not found</html>",
                "labels for images": gzip.compress(idx(label)),
                "short": gzip.compress(idx(x)[:-5]),
                "long": gzip.compress(idx(x) + b"12345"),
                "huge claim": gzip.compress(bytes([0, 0, 8, 3]) + struct.pack(">3I", *[2**31] * 3)),
                "fewer labels": gzip.compress(idx(x[:7])),
            }[damage]
        )
    with pytest.raises(UserError, match=message) as error:
        prepare("fashion-mnist", tmp_path / "out", source=tmp_path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


# -- CIFAR-10

RECORDS = 12


def cifar_arrays(part: int) -> tuple[np.ndarray, list[int]]:
    rng = np.random.default_rng(part)
    x = rng.integers(0, 256, (RECORDS, 3072), dtype=np.uint8)
    return x, rng.integers(0, 10, RECORDS).tolist()


def python2_pickle(x: np.ndarray, label: list[int]) -> bytes:
    """Protocol 2 as Python 2's cPickle wrote the batches: byte strings, and its array spelling."""

    def short(text: bytes) -> bytes:
        return b"U" + bytes([len(text)]) + text

    data = x.tobytes()
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\nq\x07cnumpy\nndarray\nq\x08K\x00\x85U\x01b\x87Rq\t"
        b"(K\x01M" + struct.pack("<H", len(x)) + b"M\x00\x0c\x86cnumpy\ndtype\nq\nU\x02u1K\x00K\x01"
        b"\x87Rq\x0b(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T"
        + struct.pack("<i", len(data))
        + data
        + b"tb"
    )
    return (
        b"\x80\x02}q\x01("
        + short(b"batch_label") + b"q\x02" + short(b"training batch 1 of 5")
        + short(b"labels") + b"q\x04]q\x05(" + b"".join(b"K" + bytes([k]) for k in label) + b"e"
        + short(b"data") + b"q\x06" + array
        + short(b"filenames") + b"]q\x0c(" + short(b"leptodactylus_s_000004.png") + b"eu."
    )  # fmt: skip


def test_the_handmade_pickle_is_one():
    # Guards the tests below: Python's own unpickler reads it to the same content.
    x, label = cifar_arrays(1)
    batch = pickle.loads(python2_pickle(x, label), encoding="latin-1")
    assert np.array_equal(batch["data"], x)
    assert batch["labels"] == label


def write_cifar(directory: Path, form: str) -> tuple[np.ndarray, np.ndarray]:
    directory.mkdir(parents=True, exist_ok=True)
    xs, labels = [], []
    for part, stem in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]):
        x, label = cifar_arrays(part)
        if form == "binary":
            records = np.concatenate([np.array(label, np.uint8)[:, None], x], axis=1)
            (directory / f"{stem}.bin").write_bytes(records.tobytes())
        else:
            batch = {"data": x, "labels": label, "batch_label": stem}
            protocol = {"python3": 2, "protocol4": 4}.get(form)
            data = python2_pickle(x, label) if protocol is None else pickle.dumps(batch, protocol)
            (directory / stem).write_bytes(data)
        if stem != "test_batch":
            xs.append(x.reshape(-1, 3, 32, 32))
            labels.append(label)
    return np.concatenate(xs), np.concatenate(labels)


@pytest.mark.parametrize("form", ["python2", "python3", "protocol4", "binary"])
@pytest.mark.parametrize("packed", [False, True])
def test_cifar10_is_read_from_either_archive(tmp_path: Path, form: str, packed: bool):
    x, label = write_cifar(tmp_path / "cifar-10", form)
    source = tmp_path / "cifar-10"
    if packed:
        source = tmp_path / "cifar-10.tar.gz"
        with tarfile.open(source, "w:gz") as tar:
            tar.add(tmp_path / "cifar-10", "cifar-10-batches")
    manifest = prepare("cifar10", tmp_path / "out", source=source)
    assert manifest.event.shape == (3, 32, 32)
    assert manifest.classes[6] == "frog"
    assert as_set(*stored(tmp_path / "out")) == as_set(x, label)
    assert len(stored(tmp_path / "out", "test")[0]) == RECORDS


class _Harm:
    """Makes a file where it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (self.path,))


@pytest.mark.parametrize("protocol", range(6))
def test_a_harmful_pickle_is_refused_and_not_run(tmp_path: Path, protocol: int):
    write_cifar(tmp_path / "cifar", "python2")
    trap = tmp_path / "trap"
    data = pickle.dumps({"data": _Harm(str(trap)), "labels": []}, protocol)
    (tmp_path / "cifar" / "data_batch_3").write_bytes(data)
    with pytest.raises(UserError, match="data_batch_3") as error:
        prepare("cifar10", tmp_path / "out", source=tmp_path / "cifar")
    assert "could run code" in str(error.value)
    assert not trap.exists()
    # The trap is a real one.
    pickle.loads(data)
    assert trap.is_dir()


@pytest.mark.parametrize(
    "opcodes",
    [
        b"cbuiltins\neval\n(X\x01\x00\x00\x001tR.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",
        b"(ios\nsystem\n.",  # INST
        b"(cos\nsystem\nX\x04\x00\x00\x00trueo.",  # OBJ
        b"\x82\x01.",  # EXT1
        b"P1\n.",  # PERSID
        b"cnumpy\nload\n.",
        b"cnumpy.core.multiarray\nfromfile\n.",
        b"\x80\x04\x8c\x08builtins\x8c\x04exec\x93.",
        b"cnumpy\nndarray\n)\x81.",  # NEWOBJ
    ],
)
def test_opcodes_and_names_beyond_plain_data_are_refused(opcodes: bytes):
    with pytest.raises(UserError, match=r"^batch: .*could run code"):
        read_plain_pickle(opcodes, where="batch")


# Lists of ten of the list before: a hundred bytes that are 10**40 for whoever walks them.
SHARED = b"]q\x00" + b"".join(
    b"](" + b"h%c" % (level - 1) * 10 + b"eq%c" % level for level in range(1, 40)
)
SHARED += b"."
# The product of a hundred thousand sizes.
SHAPE_BOMB = (
    b"cnumpy.core.multiarray\n_reconstruct\n)R(K\x01("
    + b"J\xff\xff\xff\x7f" * 100_000
    + b"tcnumpy\ndtype\nU\x02u1\x85RI00\nU\x01xtb."
)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x02",
        b"\x80\x02}q\x01(",
        b"}u.",  # SETITEMS without a mark
        b"K\x01a.",
        b"h\x05.",  # a memo that is not there
        b"\x85.",
        b"R.",
        b"b.",
        b"T\xff\xff\xff\x7fabc.",  # claims 2 GiB
        b"L" + b"9" * 10_000 + b"L\n.",
        b"\xff\xff",
        SHARED,
        b"}" + b")" + b"\x85" * 200_000 + b"K\x01s.",  # a key of tuples that takes all of C's stack
        SHAPE_BOMB,
        python2_pickle(*cifar_arrays(1))[:-2000],
        python2_pickle(*cifar_arrays(1)).replace(b"u1", b"O8"),
        python2_pickle(*cifar_arrays(1)).replace(b"M\x00\x0c\x86", b"M\x01\x0c\x86"),
    ],
)
def test_broken_pickles_are_one_clear_line(data: bytes):
    with pytest.raises(UserError, match=r"^batch: not a readable CIFAR batch") as error:
        read_plain_pickle(data, where="batch")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data_batch_2", pickle.dumps([1, 2], 2), "expected 'data'"),
        ("data_batch_2", pickle.dumps({"data": 3, "labels": [1]}, 2), "expected 'data'"),
        (
            "data_batch_2",
            pickle.dumps({"data": cifar_arrays(0)[0], "labels": [300] * RECORDS}, 2),
            "expected 'data'",
        ),
        (
            "data_batch_2",
            pickle.dumps({"data": cifar_arrays(0)[0], "labels": [11] * RECORDS}, 2),
            "not 0 to 9",
        ),
        (
            "data_batch_2",
            pickle.dumps({"data": cifar_arrays(0)[0], "labels": [1]}, 2),
            "expected 'data'",
        ),
        ("data_batch_2", None, "has no data_batch_2"),
    ],
)
def test_batches_that_are_not_cifar10_are_refused(
    tmp_path: Path, name: str, content: bytes | None, message: str
):
    write_cifar(tmp_path / "cifar", "python2")
    if content is None:
        (tmp_path / "cifar" / name).unlink()
    else:
        (tmp_path / "cifar" / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        prepare("cifar10", tmp_path / "out", source=tmp_path / "cifar")


def test_a_cut_binary_batch_or_archive_is_refused(tmp_path: Path):
    write_cifar(tmp_path / "cifar", "binary")
    path = tmp_path / "cifar" / "data_batch_1.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="3073"):
        prepare("cifar10", tmp_path / "out", source=tmp_path / "cifar")
    write_cifar(tmp_path / "cifar", "binary")
    with tarfile.open(tmp_path / "c.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "cifar", "cifar-10-batches-bin")
    data = (tmp_path / "c.tar.gz").read_bytes()
    (tmp_path / "cut.tar.gz").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"cut\.tar\.gz"):
        prepare("cifar10", tmp_path / "out", source=tmp_path / "cut.tar.gz")
    with pytest.raises(UserError, match="--source"):
        prepare("cifar10", tmp_path / "out")


@pytest.mark.parametrize("name", ["cifar-10-python.tar.gz", "cifar-10-python.tar.xz"])
def test_what_a_failed_download_of_cifar10_leaves_is_one_line(tmp_path: Path, name: str):
    page = b"<!DOCTYPE html><html><body>404</body></html>"
    damaged = bytearray(lzma.compress(bytes(10_000)))
    damaged[40] ^= 255
    (tmp_path / name).write_bytes(page if name.endswith("gz") else bytes(damaged))
    with pytest.raises(UserError, match=f"{name}: not a whole archive") as error:
        prepare("cifar10", tmp_path / "out", source=tmp_path / name)
    assert "\n" not in str(error.value)


# -- a folder of images


def write_folder(root: Path, *, size: int = 6, num: int = 20, colour: bool = True) -> None:
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for index in range(num):
            shape = (size, size, 3) if colour else (size, size)
            (root / name / f"{index:03d}.png").write_bytes(
                png(rng.integers(0, 256, shape, dtype=np.uint8))
            )


@pytest.mark.parametrize("colour", [True, False])
def test_subfolders_are_labels_and_every_tenth_image_is_test(tmp_path: Path, colour: bool):
    write_folder(tmp_path / "in", colour=colour)
    manifest = prepare("imagefolder", tmp_path / "out", source=tmp_path / "in")
    assert manifest.classes == ("cat", "dog")
    assert manifest.event.shape == ((3 if colour else 1), 6, 6)
    assert manifest.num_samples("train") == 36
    x, label = stored(tmp_path / "out", "test")
    expected = set()
    for k, name in enumerate(("cat", "dog")):
        for index in (9, 19):
            image = np.asarray(Image.open(tmp_path / "in" / name / f"{index:03d}.png"))
            image = image.transpose(2, 0, 1) if colour else image[None]
            expected.add((image.tobytes(), k))
    assert as_set(x, label) == expected


def test_train_and_test_folders_are_the_splits(tmp_path: Path):
    write_folder(tmp_path / "in" / "train", num=5)
    write_folder(tmp_path / "in" / "test", num=3)
    manifest = prepare("imagefolder", tmp_path / "out", source=tmp_path / "in")
    assert (manifest.num_samples("train"), manifest.num_samples("test")) == (10, 6)


def test_images_without_subfolders_have_no_labels(tmp_path: Path):
    write_folder(tmp_path / "in")
    prepare("imagefolder", tmp_path / "out", source=tmp_path / "in" / "cat")
    config = DataConfig(source=str(tmp_path / "out"), batch_size=1)
    assert describe(config).num_classes is None
    assert load_split(config, "train").label is None


def test_resize_cuts_the_middle_square(tmp_path: Path):
    root = tmp_path / "in"
    root.mkdir()
    wide = np.zeros((8, 16), np.uint8)
    wide[:, 4:12] = 200  # the middle square
    (root / "a.png").write_bytes(png(wide))
    (root / "b.jpg").write_bytes(png(np.full((4, 4), 200, np.uint8), "JPEG"))
    prepare("imagefolder", tmp_path / "out", source=root, resize=4)
    x = load_split(DataConfig(source=str(tmp_path / "out"), batch_size=1), "train").x
    assert x.shape == (2, 1, 4, 4)
    assert torch.allclose(x, torch.full_like(x, 200 / 127.5 - 1), atol=2 / 127.5)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("sizes", "--resize 6"),
        ("no image", "not a readable PNG, JPEG, BMP, WebP or TIFF"),
        ("empty", "no training images"),
        ("stray", "lies beside the class folders"),
        ("missing", "needs --source"),
    ],
)
def test_folders_that_will_not_do_are_one_clear_line(tmp_path: Path, damage: str, message: str):
    root = tmp_path / "in"
    if damage != "missing":
        write_folder(root, num=0 if damage == "empty" else 12)
    if damage == "sizes":
        (root / "dog" / "005.png").write_bytes(png(np.zeros((7, 6, 3), np.uint8)))
    if damage == "no image":
        (root / "dog" / "005.png").write_bytes(b"GIF89a")
    if damage == "stray":
        (root / "x.png").write_bytes(png(np.zeros((6, 6, 3), np.uint8)))
    with pytest.raises(UserError, match=message) as error:
        prepare("imagefolder", tmp_path / "out", source=root)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


# -- writing


def test_prepare_refuses_a_directory_in_use(tmp_path: Path):
    prepare("toy:ring", tmp_path / "a", toy_samples=40)
    with pytest.raises(UserError, match="already holds toy:ring"):
        prepare("digits", tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        prepare("digits", tmp_path / "b")
    assert (tmp_path / "b" / "notes.txt").read_text() == "mine"
    with pytest.raises(UserError, match="is a file"):
        prepare("digits", tmp_path / "b" / "notes.txt")
    (tmp_path / "c").mkdir()
    prepare("toy:ring", tmp_path / "c", toy_samples=40)  # an empty one will do
    assert open_dataset(DataConfig(source=str(tmp_path / "c"))).survey() == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digit", "did you mean 'digits'"),
        ("toy:rnig", "did you mean"),
        ("mnists", "did you mean 'mnist'"),
    ],
)
def test_unknown_names_get_the_nearest(tmp_path: Path, name: str, message: str):
    with pytest.raises(UserError, match=message):
        prepare(name, tmp_path / "out")


def test_source_and_resize_are_refused_where_they_mean_nothing(tmp_path: Path):
    with pytest.raises(UserError, match="--source"):
        prepare("digits", tmp_path / "out", source=tmp_path)
    with pytest.raises(UserError, match="--resize: are for 8-bit images"):
        prepare("toy:ring", tmp_path / "out", resize=4)
    with pytest.raises(UserError, match="--labels: is for imagefolder and arrays"):
        prepare("digits", tmp_path / "out", labels=tmp_path)


def test_many_processes_may_ask_for_a_built_in_source_at_once(tmp_path: Path):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)

    def ask() -> None:
        barrier.wait()
        materialise("digits", str(tmp_path), toy_samples=1)

    running = [context.Process(target=ask) for _ in range(4)]
    for process in running:
        process.start()
    for process in running:
        process.join(60)
    assert [process.exitcode for process in running] == [0] * 4
    assert [path.name for path in tmp_path.iterdir()] == ["digits-v1"]
    assert open_dataset(DataConfig(cache_dir=str(tmp_path))).survey() == []


def test_describing_a_built_in_source_writes_nothing(tmp_path: Path):
    for source in ("digits", "fashion-mnist", "toy:ising"):
        describe(DataConfig(source=source, cache_dir=str(tmp_path)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2"),
        ({"format": "other"}, "not a ebm_dist.dataset"),
        ({"splits": {}}, "no training shards"),
        ({"event": {"shape": [0], "kind": "real"}}, "event.shape"),
        ({"event": {"shape": [2], "kind": "sound"}}, "event.kind"),
        ({"extra": 1}, "extra"),
        ("not json", "cannot be read as JSON"),
        ("[]", "not a ebm_dist.dataset"),
        ("outside", "file"),
    ],
)
def test_damaged_manifests_are_one_clear_line(tmp_path: Path, change: object, message: str):
    out = tmp_path / "ring"
    prepare("toy:ring", out, toy_samples=40)
    path = out / "dataset.json"
    values = json.loads(path.read_text())
    if change == "outside":
        values["splits"]["train"][0]["file"] = "../secret.tar"
        path.write_text(json.dumps(values))
    elif isinstance(change, dict):
        path.write_text(json.dumps({**values, **change}))
    else:
        path.write_text(str(change))
    with pytest.raises(UserError, match=message) as error:
        describe(DataConfig(source=str(out)))
    assert "dataset.json" in str(error.value)
    assert "\n" not in str(error.value)


def test_manifest_counts_and_sizes_are_true(tmp_path: Path):
    out = tmp_path / "digits"
    prepare("digits", out, shard_size=400)
    manifest = read_manifest(out)
    for split in ("train", "test"):
        for shard in manifest.files(split, out):
            with tarfile.open(shard.path) as tar:
                names = tar.getnames()
            assert len({name.split(".")[0] for name in names}) == shard.num_samples
            assert {name.split(".")[1] for name in names} == {"png", "cls"}
            assert shard.path.stat().st_size == shard.num_bytes
    assert [entry.num_samples for entry in manifest.splits["train"]] == [400, 400, 400, 242]


def test_vectors_are_stored_without_pickle(tmp_path: Path):
    prepare("toy:ring", tmp_path / "ring", toy_samples=40)
    with tarfile.open(tmp_path / "ring" / "train-000000.tar") as tar:
        member = tar.extractfile(tar.getmembers()[0])
        assert member is not None
        x = np.load(io.BytesIO(member.read()), allow_pickle=False)
    assert (x.shape, x.dtype) == ((2,), np.float32)
    assert npy(x)[:6] == b"\x93NUMPY"


def test_binarised_fashion_mnist_makes_binary_events(tmp_path: Path):
    write_fashion(tmp_path / "idx")
    prepare("fashion-mnist", tmp_path / "out", source=tmp_path / "idx")
    config = DataConfig(
        source=str(tmp_path / "out"), batch_size=8, binarize="bernoulli", flatten=True
    )
    stream = DataStream(config)
    x = stream.next_batch(8).x
    assert (stream.spec.kind, stream.spec.shape) == ("binary", (784,))
    assert set(x.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(load_split(config, "test").x, load_split(config, "test").x)
