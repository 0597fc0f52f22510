"""A dataset of the user's own: by target or from Python, read as any other source is."""

from __future__ import annotations

import itertools
import json
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_shards import take
from PIL import Image
from pydantic import ValidationError

from ebm_dist.cli import main
from ebm_dist.core.errors import UserError
from ebm_dist.data import DataConfig, DataStream, describe, given, load_split, prepare
from ebm_dist.data.dataset import located, open_dataset

MINE = '''
import threading
import numpy as np
import torch
from PIL import Image

class Numbers:
    """Sample i is the vector (i, i), of class i % 3."""
    classes = ["a", "b", "c"]
    def __init__(self, num=24, start=0):
        self.num, self.start = num, start
    def __len__(self):
        return self.num
    def __getitem__(self, index):
        return torch.full((2,), float(index + self.start)), index % 3

class Pictures:
    def __init__(self, mode="L", num=24):
        self.mode, self.num = mode, num
    def __len__(self):
        return self.num
    def __getitem__(self, index):
        pixels = np.random.default_rng(index).integers(0, 256, (6, 5, 3), dtype=np.uint8)
        return Image.fromarray(pixels).convert(self.mode)

class Broken(Numbers):
    def __init__(self, fault):
        super().__init__(12)
        self.fault = fault
    def __getitem__(self, index):
        x, label = super().__getitem__(index)
        if index != 7:
            return x, label
        return {
            "nan": (x * torch.nan, label),
            "shape": (x[:1], label),
            "range": (x, 3),
            "negative": (x, -1),
            "float": (x, 0.5),
            "unlabelled": x,
            "three": (x, label, index),
            "dict": {"x": x},
            "complex": (x + 1j, label),
        }[self.fault]

class Raising(Numbers):
    def __getitem__(self, index):
        if index == 7:
            raise KeyError("no row\\n7")
        return super().__getitem__(index)

class Moody(Numbers):
    def __getitem__(self, index):
        return torch.randn(2), 0

class Exclusive(Numbers):
    busy = threading.Lock()
    def __getitem__(self, index):
        assert self.busy.acquire(blocking=False), "two threads at once"
        threading.Event().wait(0.001)
        self.busy.release()
        return super().__getitem__(index)

def dataset(size=24):
    return Numbers(size)

def needs(path):
    raise FileNotFoundError(path)

def stream():
    return iter([1, 2])

numbers = Numbers(9)
plain = [1, 2]
'''


@pytest.fixture(autouse=True)
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    folder = tmp_path / "path" / "own_pkg"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "data.py").write_text(MINE)
    monkeypatch.syspath_prepend(str(folder.parent))
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "own_pkg"]:
        del sys.modules[name]


def own(name: str = "Numbers", **changes: Any) -> DataConfig:
    values = {"source": "module", "target": f"own_pkg.data:{name}", "batch_size": 4, "prefetch": 0}
    return DataConfig.model_validate({**values, **changes})


def streams(config: DataConfig, world_size: int) -> list[DataStream]:
    return [DataStream(config, rank=r, world_size=world_size) for r in range(world_size)]


# -- who sees what


def test_two_ranks_have_between_them_the_batches_of_one_bit_for_bit():
    config = own("Pictures", flip=True, crop_padding=1, dequantize=True, noise_std=0.05)
    (alone,), pair = streams(config, 1), streams(config, 2)
    for _ in range(20):  # over the ends of three epochs
        x = alone.next_batch(4).x
        assert torch.equal(x[0::2], pair[0].next_batch(2).x)
        x_of_1 = pair[1].next_batch(2).x
        assert torch.equal(x[1::2], x_of_1)


@pytest.mark.parametrize("world_size", [2, 5])
def test_ranks_cover_each_epoch_exactly_once_in_a_new_order(world_size: int):
    ranks = streams(own(), world_size)
    steps = [[take(stream, 1, 1) for stream in ranks] for _ in range(24)]
    order = [value for step in steps for row in zip(*step) for value in row]
    epochs = [order[24 * k : 24 * k + 24] for k in range(world_size)]
    assert all(sorted(epoch) == list(range(24)) for epoch in epochs)
    assert epochs[0] != epochs[1] != list(range(24))
    assert take(DataStream(own(shuffle=0)), 1, 24) == list(range(24))


@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 2), (1, 2), (2, 1), (3, 2)])
def test_a_cursor_goes_on_at_the_same_sample_at_any_number_of_ranks(before: int, after: int):
    first = streams(own(batch_size=6), before)
    seen = [value for stream in first for value in take(stream, 5, 6 // before)]
    state = json.loads(json.dumps(first[0].state()))
    (alone,) = streams(own(batch_size=6), 1)
    assert sorted(seen) == sorted(take(alone, 5, 6))
    ranks = streams(own(batch_size=6), after)
    for stream in ranks:
        stream.load_state(state)
    rows = [take(stream, 3, 6 // after) for stream in ranks]
    assert [value for row in zip(*rows) for value in row] == take(alone, 3, 6)


def test_prefetching_changes_nothing_and_no_two_threads_are_in_the_dataset_at_once():
    ahead = streams(own("Exclusive", prefetch=4), 3)
    plain = streams(own("Numbers"), 3)
    try:
        for _, (left, right) in itertools.product(range(10), zip(ahead, plain)):
            assert take(left, 1, 3) == take(right, 1, 3)
    finally:
        for stream in ahead:
            stream.close()


# -- kinds of events


def test_pictures_are_scaled_as_ours_are_and_floats_are_taken_as_they_are():
    assert describe(own("Pictures")).shape == (1, 6, 5)
    assert describe(own("Pictures", params={"mode": "RGBA"})).shape == (3, 6, 5)
    x = load_split(own("Pictures", params={"mode": "RGB", "num": 4}), "train").x
    assert (x.min() >= -1, x.max() <= 1, x.min() < -0.9, x.max() > 0.9) == (True,) * 4
    floats = torch.rand(8, 3, 4, 4) * 5
    config = given(floats)
    assert (describe(config).kind, describe(config).num_classes) == ("real", None)
    assert torch.equal(load_split(config, "train").x.sort(0).values, floats.sort(0).values)
    assert describe(given(floats > 1)).kind == "binary"
    assert describe(given(torch.eye(3).repeat(4, 2, 1), own(kind="categorical"))).shape == (6, 3)
    image = given(floats / 5, DataConfig(kind="image"))
    assert (describe(image).kind, load_split(image, "train").x.min() >= 0) == ("image", True)
    uint8 = given(np.zeros((5, 6, 7, 3), np.uint8))
    assert (describe(uint8).kind, describe(uint8).shape) == ("image", (3, 6, 7))
    assert (load_split(uint8, "train").x == -1).all()


def test_labels_and_classes_come_from_the_dataset_the_array_or_the_config():
    assert describe(own("Numbers")).num_classes == 3
    assert load_split(own(), "train").label.bincount().tolist() == [8, 8, 8]  # type: ignore[union-attr]
    pairs = torch.utils.data.TensorDataset(torch.zeros(4, 2), torch.tensor([0, 2, 1, 1]))
    assert describe(given(pairs, DataConfig(num_classes=3))).num_classes == 3
    assert sorted(load_split(given(pairs), "train").label.tolist()) == [0, 1, 1, 2]  # type: ignore[union-attr]
    labels = np.array([0, 4, 1, 1])
    assert describe(given((np.zeros((4, 2)), labels))).num_classes == 5
    assert describe(given((np.zeros((4, 2)), labels), DataConfig(num_classes=7))).num_classes == 7


def test_the_test_split_is_made_by_other_parameters_or_held_out():
    config = own(params={"num": 6}, test_params={"num": 4, "start": 100})
    assert sorted(load_split(config, "train").x[:, 0].tolist()) == [0, 1, 2, 3, 4, 5]
    assert sorted(load_split(config, "test").x[:, 0].tolist()) == [100, 101, 102, 103]
    parts = [load_split(own(holdout=0.3), split).x[:, 0] for split in ("train", "test")]
    assert sorted(torch.cat(parts).tolist()) == list(range(24))
    assert 0 < len(parts[1]) < 24
    held = set(parts[1].int().tolist())
    assert not held & set(take(DataStream(own(holdout=0.3)), 1, len(parts[0])))
    both = given({"train": torch.zeros(4, 2), "test": torch.ones(3, 2)})
    assert load_split(both, "test").x.sum() == 6
    for config in (own(), given(torch.zeros(4, 2))):
        with pytest.raises(UserError, match=r"has no test split; set data\.holdout"):
            load_split(config, "test")


# -- what is refused


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("nan", "holds NaN or infinity"),
        ("shape", r"shape \(1,\), but the data set has \(2,\)"),
        ("range", "label 3, but there are 3 classes"),
        ("negative", "label must be an integer from 0, got -1"),
        ("float", "label must be an integer from 0, got 0.5"),
        ("unlabelled", "has no label, but the first sample has one; label all or none"),
        ("three", r"expected an event or \(event, label\), got a tuple of 3"),
        ("dict", "must be a tensor, a numpy array or a PIL image, got dict"),
        ("complex", "is of dtype complex64"),
    ],
)
def test_a_sample_that_will_not_do_is_one_line_with_its_index(fault: str, message: str):
    config = own("Broken", params={"fault": fault})
    line = f"^data.target: own_pkg.data:Broken: sample 7: .*{message}"
    with pytest.raises(UserError, match=line) as error:
        take(DataStream(config), 6, 2)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=line):
        open_dataset(config).survey()
    with pytest.raises(UserError, match=line):
        load_split(config, "train")


def test_a_picture_that_is_read_late_and_is_damaged_is_one_line_with_its_index(tmp_path: Path):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "0.png")
    whole = (tmp_path / "0.png").read_bytes()
    (tmp_path / "1.png").write_bytes(whole[: len(whole) // 2])

    class Lazy:
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> Image.Image:
            return Image.open(tmp_path / f"{index}.png")

    with pytest.raises(UserError, match="Lazy: sample 1: __getitem__ raises OSError"):
        load_split(given(Lazy()), "train")


def test_what_getitem_raises_is_one_line_with_the_index():
    with pytest.raises(UserError) as error:
        take(DataStream(own("Raising", prefetch=2)), 12, 2)
    assert str(error.value) == (
        r"data.target: own_pkg.data:Raising: sample 7: __getitem__ raises KeyError: 'no row\n7'"
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"params": {"num": 3}}, "data.batch_size: is 4, but own_pkg.data:Numbers holds 3"),
        ({"params": {"num": 0}}, "data.target: own_pkg.data:Numbers: holds no samples"),
        ({"params": {"size": 1}}, r"data.params: own_pkg.data:Numbers\(size=1\) raises TypeError"),
        (
            {"target": "own_pkg.data:needs", "params": {"path": "/a"}},
            r"data.params: own_pkg.data:needs\(path='/a'\) raises FileNotFoundError: /a",
        ),
        ({"target": "own_pkg.data:stream"}, "expected a map-style dataset, which has __len__"),
        ({"target": "own_pkg.data:plain"}, "own_pkg.data:plain is a .*list"),
        ({"target": "own_pkg.data:numbers", "params": {"a": 1}}, "is an instance, which takes no"),
        ({"target": "own_pkg.data:Numberz"}, "did you mean 'Numbers'"),
        ({"target": "no_such_pkg:x"}, "data.target: the module no_such_pkg cannot be imported"),
        (
            {"test_params": {"start": "x"}},
            r"data.test_params: .*: sample 0: __getitem__ raises",
        ),
        ({"num_classes": 2}, "sample 2: label 2, but there are 2 classes"),
        ({"target": "own_pkg.data:Pictures", "num_classes": 2}, "sample 0 has no label"),
        ({"flip": True}, "data.flip: is for images"),
    ],
)
def test_a_dataset_that_will_not_do_is_one_line(config: dict[str, Any], message: str):
    def start() -> None:
        open_dataset(own(**config)).survey()
        DataStream(own(**config))

    with pytest.raises(UserError, match=message) as error:
        start()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"source": "module"}, "set target to MODULE:NAME"),
        ({"target": "my_pkg:x"}, "set source: module or leave them out"),
        ({"source": "digits", "test_params": {}}, "set source: module or leave them out"),
        ({"source": "module", "target": "os:environ"}, "standard library"),
        ({"source": "module", "target": "a:b", "member": "jpg"}, "member: jpg is for shards"),
        ({"source": "module", "target": "a:b", "rank_split": "shard"}, "use sample"),
        (
            {"source": "module", "target": "a:b", "test_params": {}, "holdout": 0.1},
            "one of the two",
        ),
        ({"source": "module", "target": "a:b", "params": {"x": object()}}, "params"),
    ],
)
def test_keys_that_do_not_go_with_a_dataset_are_refused(values: dict[str, Any], message: str):
    with pytest.raises(ValidationError, match=message):
        DataConfig.model_validate(values)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.zeros(0, 2), "holds no samples"),
        (torch.zeros(4), r"holds no numbers but is one; give it the shape \(1,\)"),
        ((torch.zeros(4, 2), torch.zeros(3).long()), r"labels of shape \(3,\)"),
        ((torch.zeros(4, 2), torch.zeros(4)), "labels must be integers from 0, got float32"),
        ((torch.zeros(4, 2), -torch.ones(4).int()), "labels must be integers from 0, got -1"),
        ((torch.zeros(4, 2),), "got a tuple of 1"),
        ((), "got a tuple of 0"),
        (iter([1]), "expected a map-style dataset"),
        (torch.utils.data.TensorDataset, "got the class TensorDataset"),
        ({"val": torch.zeros(4, 2)}, "expected the keys train and test, got val"),
    ],
)
def test_data_that_cannot_be_given_is_refused_at_once(data: Any, message: str):
    with pytest.raises(UserError, match=message) as error:
        given(data)
    assert str(error.value).startswith("data")


def test_a_bad_row_of_an_array_is_named_before_a_run_and_by_the_stream():
    x = torch.zeros(9000, 2)
    x[8123, 1] = float("inf")
    config = given(x, DataConfig(prefetch=0))
    line = "^data: torch:Tensor: sample 8123: holds NaN or infinity"
    with pytest.raises(UserError, match=line):
        open_dataset(config).survey()
    with pytest.raises(UserError, match=line):
        take(DataStream(config), 9, 1000)


def test_a_dataset_that_is_another_at_every_call_is_warned_of():
    (line,) = open_dataset(own("Moody")).survey()
    assert "no run with it can be repeated" in line
    assert located(own("Moody")).fingerprint == "24 samples, not repeatable"
    assert open_dataset(own()).survey() == []


# -- a config stays data


def test_reading_and_showing_a_config_imports_nothing(capsys: pytest.CaptureFixture[str]):
    keys = ["data.source=module", "data.target=own_pkg.data:Numbers", "data.params={num: 5}"]
    config = Path(__file__).parents[3] / "configs" / "digits.yaml"
    assert main(["config", "show", str(config), *keys]) == 0
    assert "target: own_pkg.data:Numbers" in capsys.readouterr().out
    assert "own_pkg.data" not in sys.modules


def test_given_data_stays_out_of_dumps_and_goes_along_with_copies_and_pickles():
    x = torch.arange(40.0).reshape(20, 2)
    config = given(x, DataConfig(batch_size=4))
    assert config.num_given_bytes == 160
    assert "_given" not in config.model_dump()
    assert len(json.dumps(config.model_dump(mode="json"))) < 1000
    for copy in (config.model_copy(update={"prefetch": 0}), pickle.loads(pickle.dumps(config))):
        assert torch.equal(load_split(copy, "train").x, load_split(config, "train").x)
    read = DataConfig.model_validate(config.model_dump(mode="json"))
    with pytest.raises(UserError, match=r"call ebm_dist.train\(..., data=...\) again") as error:
        describe(read)
    assert "torch:Tensor" in str(error.value)


# -- as shards


def test_prepared_shards_hold_the_events_and_labels_of_the_module_in_its_order(tmp_path: Path):
    out = tmp_path / "out"
    assert main(["data", "prepare", "own_pkg.data:dataset", str(out), "params.size=30"]) == 0
    shards, module = DataConfig(source=str(out)), own("dataset", params={"size": 30})
    assert describe(shards) == describe(module)
    for limit in (None, 7):
        a, b = (load_split(config, "train", limit) for config in (shards, module))
        assert torch.equal(a.x, b.x)
        assert torch.equal(a.label, b.label)  # type: ignore[arg-type]
    assert json.loads((out / "dataset.json").read_text())["classes"] == ["a", "b", "c"]


def test_prepared_pictures_and_splits_are_those_of_the_module(tmp_path: Path):
    for number, config in enumerate(
        (own("Pictures", params={"mode": "RGB"}, holdout=0.25), own(test_params={"num": 5}))
    ):
        prepare(config, tmp_path / str(number))
        for split in ("train", "test"):
            a = load_split(DataConfig(source=str(tmp_path / str(number))), split)  # type: ignore[arg-type]
            assert torch.equal(a.x, load_split(config, split).x)  # type: ignore[arg-type]
    given_ = given((torch.rand(9, 3), torch.arange(9) % 2), DataConfig(holdout=0.3))
    assert prepare(given_, tmp_path / "given").classes == ("0", "1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["own_pkg.data:Numberz", "out"], "did you mean 'Numbers'"),
        (["os:environ", "out"], "target: os is of Python's standard library"),
        (["digits", "out", "params.a=1"], "params.a=1: keys are for a dataset of your own"),
        (["own_pkg.data:Numbers", "out", "param.a=1"], "did you mean 'params'"),
        (["own_pkg.data:Numbers", "out", "--resize", "4"], "are for names of originals"),
        (["toy:rinng", "out"], "unknown data set 'toy:rinng'"),
    ],
)
def test_a_bad_prepare_is_one_line_and_writes_nothing(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    assert main(["data", "prepare", *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()
