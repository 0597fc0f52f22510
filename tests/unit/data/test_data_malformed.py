"""Data that will not do: one clear line that names the file and what to change, never a crash."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import struct
import sys
import tarfile
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from data_shards import npy, numbered_config, numbered_shards, png, take, write_tar

from ebm_dist.core.errors import RunFailed, UserError
from ebm_dist.data import DataConfig, DataStream, describe, load_split, prepare
from ebm_dist.data.format import decode as decoding
from ebm_dist.data.format import shards
from ebm_dist.data.format.shards import ShardFile, read_shard

GREY = np.arange(16, dtype=np.uint8).reshape(4, 4)
VECTOR = np.zeros(2, np.float32)

Members = list[tuple[str, bytes]]


def one_line(error: pytest.ExceptionInfo[UserError], *, names: str) -> None:
    text = str(error.value)
    assert "\n" not in text
    assert names in text
    assert len(text) < 600


def png_claiming(width: int, height: int) -> bytes:
    """A small PNG whose header claims a large image."""
    data = bytearray(png(GREY))
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data)


def npy_claiming(header: str) -> bytes:
    text = header.encode() + b" " * (117 - len(header)) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(64)


class _Harm:
    def __reduce__(self):
        return (os._exit, (7,))


SECOND_SAMPLES: dict[str, tuple[Members, str]] = {
    # name -> members of the second sample, after a first of a grey 4x4 png with label 3
    "not an image": ([("b.png", b"this is text"), ("b.cls", b"1")], "not a readable PNG or JPEG"),
    "cut image": ([("b.png", png(GREY)[:60]), ("b.cls", b"1")], "not a readable PNG or JPEG"),
    "empty image": ([("b.png", b""), ("b.cls", b"1")], "not a readable PNG or JPEG"),
    "a gif": ([("b.png", b"GIF89a" + bytes(20)), ("b.cls", b"1")], "not a readable PNG or JPEG"),
    "a bomb": ([("b.png", png_claiming(50_000, 50_000)), ("b.cls", b"1")], "decompression bombs"),
    "16 bits": (
        [("b.png", png(GREY.astype(np.uint16) * 256)), ("b.cls", b"1")],
        "more than 8 bits a channel",
    ),
    "other size": ([("b.png", png(GREY[:3])), ("b.cls", b"1")], "shape (1, 3, 4)"),
    "colour among grey": (
        [("b.png", png(np.repeat(GREY[:, :, None], 3, axis=2))), ("b.cls", b"1")],
        "shape (3, 4, 4)",
    ),
    "no data member": ([("b.cls", b"1")], "expected one of .png, .jpg, .npy, got .cls"),
    "two data members": (
        [("b.png", png(GREY)), ("b.jpg", png(GREY, "JPEG")), ("b.cls", b"1")],
        "data.member",
    ),
    "no label": ([("b.png", png(GREY))], "no .cls label"),
    "label of letters": ([("b.png", png(GREY)), ("b.cls", b"cat")], ".cls must hold an integer"),
    "negative label": ([("b.png", png(GREY)), ("b.cls", b"-1")], ".cls must hold an integer"),
    "binary label": ([("b.png", png(GREY)), ("b.cls", b"\x00\xff")], ".cls must hold an integer"),
    "endless label": ([("b.png", png(GREY)), ("b.cls", b"9" * 10**6)], ".cls must hold an integer"),
    "pickled label": (
        [("b.png", png(GREY)), ("b.pyd", pickle.dumps(_Harm()))],
        "member .pyd is a pickle",
    ),
    "pickle member": (
        [("b.png", png(GREY)), ("b.meta.pickle", pickle.dumps(_Harm())), ("b.cls", b"1")],
        "is a pickle",
    ),
    "torch member": ([("b.pth", b"PK"), ("b.cls", b"1")], "is a pickle"),
    "float array among images": (
        [("b.npy", npy(np.zeros((4, 4), np.float32))), ("b.cls", b"1")],
        "float32 image among 8-bit images",
    ),
    "object array": (
        [("b.npy", npy(np.array([_Harm()], dtype=object))), ("b.cls", b"1")],
        "never read",
    ),
    "the same member twice": (
        [("b.png", png(GREY)), ("b.png", png(GREY)), ("b.cls", b"1")],
        "not a webdataset shard",
    ),
}


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("case", sorted(SECOND_SAMPLES))
def test_bad_sample_is_one_line_with_its_shard_and_key(tmp_path: Path, case: str, prefetch: int):
    members, message = SECOND_SAMPLES[case]
    path = write_tar(tmp_path / "s.tar", [("a.png", png(GREY)), ("a.cls", b"3"), *members])
    config = numbered_config(str(path), prefetch=prefetch, shuffle=0, batch_size=2)
    assert describe(config).shape == (1, 4, 4)
    stream = DataStream(config)
    with pytest.raises(UserError) as error:
        stream.next_batch(2)
    one_line(error, names=str(path))
    assert message in str(error.value)
    stream.close()


FIRST_SAMPLES: dict[str, tuple[Members, dict[str, object], str]] = {
    "object array": ([("a.npy", npy(np.array([_Harm()], dtype=object)))], {}, "never read"),
    "text array": ([("a.npy", npy(np.array(["x"])))], {}, "not plain numbers"),
    "complex array": ([("a.npy", npy(np.zeros(2, complex)))], {}, "not plain numbers"),
    "not an array": ([("a.npy", b"hello")], {}, "not a readable .npy"),
    "cut array": ([("a.npy", npy(VECTOR)[:-3])], {}, "header claims"),
    "long array": ([("a.npy", npy(VECTOR) + b"abc")], {}, "header claims"),
    "array claiming terabytes": (
        [
            (
                "a.npy",
                npy_claiming("{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,)}"),
            )
        ],
        {},
        "header claims",
    ),
    "array of negative size": (
        [("a.npy", npy_claiming("{'descr': '<f4', 'fortran_order': False, 'shape': (-4, -4)}"))],
        {},
        "header claims",
    ),
    "array with a long header": (
        [("a.npy", b"\x93NUMPY\x02\x00" + struct.pack("<I", 10**6) + b"(" * 10**6)],
        {},
        "not a readable .npy",
    ),
    "array with code for a header": (
        [("a.npy", npy_claiming("__import__('os').abort()"))],
        {},
        "not a readable .npy",
    ),
    "scalar": ([("a.npy", npy(np.float32(1.0)))], {}, "holds no numbers"),
    "no pixels": ([("a.npy", npy(np.zeros((0, 2), np.float32)))], {}, "holds no numbers"),
    "NaN": ([("a.npy", npy(np.array([0.0, np.nan])))], {}, "NaN or infinity"),
    "five channels": ([("a.npy", npy(np.zeros((5, 4, 4), np.uint8)))], {}, "1 or 3 channels"),
    "image out of range": (
        [("a.npy", npy(np.full((4, 4), 9.0)))],
        {"kind": "image"},
        "must lie in [-1, 1]",
    ),
    "binary of twos": ([("a.npy", npy(np.full(3, 2)))], {"kind": "binary"}, "must be 0 and 1"),
    "not one-hot": (
        [("a.npy", npy(np.ones((3, 2))))],
        {"kind": "categorical"},
        "must be one-hot",
    ),
    "label too large": (
        [("a.npy", npy(VECTOR)), ("a.cls", b"10")],
        {"num_classes": 10},
        "there are 10 classes",
    ),
    "classes without labels": ([("a.npy", npy(VECTOR))], {"num_classes": 3}, "has no .cls label"),
    "other member": ([("a.npy", npy(VECTOR))], {"member": "png"}, "has no member .png"),
    "only text": ([("a.txt", b"hello")], {}, "expected one of .png, .jpg, .npy, got .txt"),
}


@pytest.mark.parametrize("case", sorted(FIRST_SAMPLES))
def test_bad_first_sample_is_one_line_with_its_shard(tmp_path: Path, case: str):
    members, changes, message = FIRST_SAMPLES[case]
    path = write_tar(tmp_path / "s.tar", members)
    config = numbered_config(str(path), batch_size=1, **changes)
    with pytest.raises(UserError) as error:
        DataStream(config).next_batch(1)
    one_line(error, names=str(path))
    assert message in str(error.value)


def prepared(tmp_path: Path) -> Path:
    out = tmp_path / "digits"
    if not out.exists():
        prepare("digits", out, shard_size=300)
    return out


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-700])


def _epoch(config: DataConfig) -> None:
    stream = DataStream(config)
    for _ in range(15):
        stream.next_batch(100)


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, "missing"),
        (lambda path: path.write_bytes(b""), "empty file"),
        (cut, "dataset.json says"),
        (flip_bit, "SHA-256 differs"),
    ],
)
def test_damaged_prepared_shard_is_named(
    tmp_path: Path, damage: Callable[[Path], object], message: str
):
    out = prepared(tmp_path)
    path = out / "train-000002.tar"
    damage(path)
    config = DataConfig(source=str(out), prefetch=0)
    with pytest.raises(UserError) as error:
        _epoch(config)
    one_line(error, names=str(path))
    assert message in str(error.value)
    with pytest.raises(UserError, match=r"train-000002\.tar"):
        load_split(config, "train")


def test_missing_or_cut_prepared_shards_are_refused_before_the_first_batch(tmp_path: Path):
    out = prepared(tmp_path)
    cut(out / "train-000004.tar")
    with pytest.raises(UserError, match=r"train-000004\.tar"):
        DataStream(DataConfig(source=str(out)))


def test_shard_with_other_samples_than_its_manifest_says_is_named(tmp_path: Path):
    out = tmp_path / "ring"
    prepare("toy:ring", out, toy_samples=40)
    path = out / "dataset.json"
    values = json.loads(path.read_text())
    values["splits"]["train"][0]["num_samples"] = 41
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"40 samples, but dataset\.json says 41"):
        take(DataStream(DataConfig(source=str(out), batch_size=8, prefetch=0)), 6, 8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty file"),
        (b"PK\x03\x04" + bytes(3000), "not a whole tar file"),
        (b"short", "not a whole tar file"),
        (bytes(10240), "no samples"),
        (gzip.compress(os.urandom(20_000))[:5000], "not a whole tar file"),
    ],
)
def test_plain_file_that_is_no_tar_is_named(tmp_path: Path, content: bytes, message: str):
    path = tmp_path / "s.tar"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        DataStream(numbered_config(str(path)))
    one_line(error, names=str(path))
    assert message in str(error.value)


@pytest.mark.parametrize("at", ["inside a member", "between members", "inside a header"])
def test_truncated_plain_tar_is_found_wherever_it_was_cut(tmp_path: Path, at: str):
    path = Path(numbered_shards(tmp_path, [20]))
    with tarfile.open(path) as tar:
        member = tar.getmembers()[24]
    keep = {
        "inside a member": member.offset_data + 50,
        "between members": member.offset,
        "inside a header": member.offset + 100,
    }[at]
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError) as error:
        take(DataStream(numbered_config(str(path))), 10, 4)
    one_line(error, names=str(path))


def test_compressed_shards_are_read_and_their_truncation_is_found(tmp_path: Path):
    plain = Path(numbered_shards(tmp_path, [20]))
    path = tmp_path / "s.tar.gz"
    whole = gzip.compress(plain.read_bytes())
    path.write_bytes(whole)
    config = numbered_config(str(path))
    assert sorted(take(DataStream(config), 5, 4)) == list(range(20))
    path.write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(UserError, match=r"s\.tar\.gz.*not a whole tar file"):
        take(DataStream(config), 5, 4)


def test_member_that_unfolds_into_too_much_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from ebm_dist.data.format import shards

    monkeypatch.setattr(shards, "MAX_MEMBER_BYTES", 2**16)
    inner = write_tar(tmp_path / "x.tar", [("a.npy", npy(np.zeros(2**18, np.uint8)))])
    path = tmp_path / "bomb.tar.gz"
    path.write_bytes(gzip.compress(inner.read_bytes()))
    with pytest.raises(UserError, match="at most 65536 are read"):
        describe(numbered_config(str(path)))


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE, **attributes: str) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.pax_headers = size, kind, attributes
    return info.tobuf(tarfile.PAX_FORMAT if attributes else tarfile.USTAR_FORMAT)


@pytest.mark.parametrize(
    "kind", [tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE]
)
def test_a_name_of_a_gibibyte_is_not_read(tmp_path: Path, kind: bytes):
    path = tmp_path / "long.tar"
    with path.open("wb") as file:  # a hole: nothing is written for it
        file.write(header("name", 2**30, kind))
        file.seek(2**30, os.SEEK_CUR)
        file.write(header("a.cls", 1) + b"1" + bytes(511) + bytes(1024))
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="of 1073741824 bytes, at most") as error:
            list(read_shard(ShardFile(path)))
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()
    one_line(error, names="long.tar")


def test_names_of_names_without_end_are_one_line(tmp_path: Path):
    path = tmp_path / "names.tar"
    name = header("././@LongLink", 2, tarfile.GNUTYPE_LONGNAME) + b"a\0" + bytes(510)
    path.write_bytes(name * 5000 + header("a.cls", 1) + b"1" + bytes(511) + bytes(1024))
    with pytest.raises(UserError) as error:
        list(read_shard(ShardFile(path)))
    one_line(error, names="names.tar")


def test_sparse_members_cannot_fill_the_memory_with_one_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(shards, "MAX_MEMBER_BYTES", 2**20)
    path = tmp_path / "sparse.tar"
    size = str(2**20 - 1)
    members = [
        header(f"k.e{i}", 0, **{"GNU.sparse.size": size, "GNU.sparse.map": "0,0"})
        for i in range(1000)
    ]
    path.write_bytes(b"".join(members) + bytes(1024))
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="sample 'k' has more than") as error:
            list(read_shard(ShardFile(path)))
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()
    one_line(error, names="sparse.tar")


def test_a_sample_of_too_many_members_is_refused(tmp_path: Path):
    write_tar(tmp_path / "many.tar", [(f"k.e{i}", b"1") for i in range(1001)])
    with pytest.raises(UserError, match="sample 'k' has more than 1000 members"):
        list(read_shard(ShardFile(tmp_path / "many.tar")))


def test_empty_tar_among_full_ones_is_named(tmp_path: Path):
    source = numbered_shards(tmp_path, [9, 0, 9])
    with pytest.raises(UserError) as error:
        take(DataStream(numbered_config(source)), 10, 4)
    one_line(error, names="01.tar")
    assert "holds no samples" in str(error.value)


def test_folders_and_links_that_are_no_sample_are_passed_over(tmp_path: Path):
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as tar:
        folder = tarfile.TarInfo("d")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        link = tarfile.TarInfo("newest")
        link.type, link.linkname = tarfile.SYMTYPE, "d"
        tar.addfile(link)
        data = npy(VECTOR)
        info = tarfile.TarInfo("d/b.npy")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    batch = DataStream(numbered_config(str(path), batch_size=1)).next_batch(1)
    assert torch.equal(batch.x, torch.zeros(1, 2))


@pytest.mark.parametrize("prefetch", [0, 2])
def test_fewer_samples_than_a_batch_names_the_count(tmp_path: Path, prefetch: int):
    plain = numbered_config(numbered_shards(tmp_path, [3]), prefetch=prefetch)
    with pytest.raises(UserError, match="holds 3 training samples"):
        DataStream(plain).next_batch(4)
    out = tmp_path / "ring"
    prepare("toy:ring", out, toy_samples=40)
    config = DataConfig(source=str(out), batch_size=41, prefetch=prefetch)
    with pytest.raises(UserError, match="at most 40") as error:
        DataStream(config)
    one_line(error, names="data.batch_size")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("digit", "did you mean 'digits'"),
        ("toy:rin", "did you mean 'ring'"),
        ("cifar10", "data prepare cifar10"),
        ("nowhere/{00..03}.tar", "does not exist"),
        ("https://example.org/{00..03}.tar", "not a local path"),
        ("pipe:touch trap", "not a local path"),
        ("s3://bucket/00.tar", "not a local path"),
    ],
)
def test_source_that_is_not_there_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, message: str
):
    monkeypatch.chdir(tmp_path)
    config = DataConfig(source=source, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UserError) as error:
        DataStream(config)
    one_line(error, names="data.source" if "toy" not in source else "toy")
    assert message in str(error.value)
    assert not (tmp_path / "trap").exists()


def test_directory_without_shards_says_what_to_run(tmp_path: Path):
    with pytest.raises(UserError, match="ebm-dist data prepare"):
        describe(DataConfig(source=str(tmp_path)))


def test_missing_shard_of_a_pattern_is_named(tmp_path: Path):
    source = numbered_shards(tmp_path, [9, 9, 9])
    (tmp_path / "01.tar").unlink()
    with pytest.raises(UserError) as error:
        DataStream(numbered_config(source))
    one_line(error, names=str(tmp_path / "01.tar"))


def test_pattern_beside_a_manifest_must_name_its_shards(tmp_path: Path):
    out = prepared(tmp_path)
    write_tar(out / "mine.tar", [("a.npy", npy(VECTOR))])
    with pytest.raises(UserError, match=r"mine\.tar: is not named in"):
        describe(DataConfig(source=str(out / "mine.tar")))


@pytest.mark.parametrize(
    "changes", [{"kind": "real"}, {"num_classes": 3}, {"member": "png"}, {"holdout": 0.1}]
)
def test_keys_for_plain_shards_are_refused_where_the_data_knows_better(
    tmp_path: Path, changes: dict[str, object]
):
    for source in ("digits", str(prepared(tmp_path))):
        with pytest.raises(UserError, match=f"data.{next(iter(changes))}: "):
            describe(DataConfig.model_validate({"source": source, **changes}))


def test_test_split_that_is_not_there_says_how_to_have_one(tmp_path: Path):
    config = numbered_config(numbered_shards(tmp_path, [9]))
    with pytest.raises(UserError, match=r"data\.holdout.*data\.test_source"):
        load_split(config, "test")


def test_split_by_shard_with_too_few_shards_is_refused(tmp_path: Path):
    config = numbered_config(numbered_shards(tmp_path, [9, 9]), rank_split="shard")
    with pytest.raises(UserError, match=r"data\.rank_split"):
        DataStream(config, rank=0, world_size=3)


def test_cache_directory_that_cannot_be_written_is_one_line(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        DataStream(DataConfig(source="digits", cache_dir=str(tmp_path / "file" / "cache")))


def test_failed_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(path: Path) -> str:
        raise OSError(28, "No space left on device")

    # By module: the package's `prepare` is the function.
    monkeypatch.setattr(sys.modules["ebm_dist.data.sources.prepare"], "sha256", full)
    with pytest.raises(RunFailed, match="No space left on device"):
        prepare("toy:ring", tmp_path / "ring", toy_samples=40)
    assert not list(tmp_path.iterdir())


def test_nothing_is_unpickled_from_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("unpickled")

    monkeypatch.setattr(pickle, "loads", refuse)
    monkeypatch.setattr(pickle, "load", refuse)
    config = numbered_config(numbered_shards(tmp_path, [9]))
    assert len(take(DataStream(config), 6, 4)) == 24
    assert "npy" in decoding.DATA_EXTENSIONS


def test_a_png_bomb_costs_no_memory(tmp_path: Path):
    path = write_tar(tmp_path / "s.tar", [("a.png", png_claiming(60_000, 60_000))])
    tracemalloc.start()
    with pytest.raises(UserError, match="decompression bombs"):
        describe(numbered_config(str(path)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * 2**20


@pytest.mark.parametrize(("path", "what"), [("/dev/zero", "device"), ("/dev", "neither")])
def test_what_is_no_shard_is_named_for_what_it_is(path: str, what: str):
    with pytest.raises(UserError, match=what) as error:
        describe(DataConfig(source=path))
    assert "missing" not in str(error.value)
