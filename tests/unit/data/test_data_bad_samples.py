"""Shards by list and glob; `data check`; bad samples that are left out and counted."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import numpy as np
import pytest
from data_shards import npy, numbered_config, numbered_shards, png, take, write_tar

from ebm_dist.cli import main
from ebm_dist.core.errors import UserError
from ebm_dist.data import DataConfig, DataStream, describe, load_split, prepare
from ebm_dist.data.dataset import located, open_dataset

sys.path.append(str(Path(__file__).parents[1]))
from test_doc_blocks import blocks_run_by, run_block

# -- lists and globs


def numbers(config: DataConfig) -> list[int]:
    return sorted(load_split(config, "train").x[:, 0].int().tolist())


def renamed(tmp_path: Path) -> Path:
    """Shards a, b and c of 5, 6 and 7 samples, in a folder each."""
    numbered_shards(tmp_path / "all", [5, 6, 7])
    for index, name in enumerate("abc"):
        (tmp_path / name).mkdir()
        (tmp_path / "all" / f"{index:02d}.tar").rename(tmp_path / name / "x.tar")
    return tmp_path


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["*/x.tar"], 18),
        (["a/*.tar", "c"], 12),
        (["{a,b}/?.tar", "a/x.tar"], 11),  # a shard that is named twice is read once
        (["**/x.tar"], 18),
        (["[ab]/x.tar"], 11),
    ],
)
def test_shards_are_named_by_lists_and_globs(tmp_path: Path, patterns: list[str], expected: int):
    root = renamed(tmp_path)
    names = [str(root / name) for name in patterns]
    config = DataConfig.model_validate({"shards": names, "batch_size": 4})
    assert len(numbers(config)) == expected
    assert located(config) == config
    if len(patterns) == 1:
        assert len(numbers(numbered_config(str(root / patterns[0])))) == expected


def test_a_list_in_a_yaml_is_made_absolute_and_read_back(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(renamed(tmp_path))
    text = "data: {shards: [a/x.tar, 'b/*.tar'], batch_size: 4}\nenergy: {name: mlp}\n"
    Path("c.yaml").write_text(text + "sampler: {name: mala, step_size: 1, temperature: 1}\n")
    overrides = ["data.shards.0=c/x.tar", "workers.num_chains=4"]
    assert main(["config", "show", "c.yaml", *overrides]) == 0
    assert "- c/x.tar\n" in capsys.readouterr().out
    config = located(DataConfig(shards=("a/x.tar", "b/*.tar"), batch_size=4))
    assert config.patterns == (str(tmp_path / "a/x.tar"), str(tmp_path / "b/*.tar"))
    assert len(numbers(config)) == 11


@pytest.mark.parametrize(
    ("patterns", "says"),
    [
        (["d/*.tar"], r"data.shards: .* matches no file"),
        (["a/x.tar", "d/x.tar"], r"data.shards: .*d/x.tar.* does not exist"),
        (["a/x.tar", "prepared"], "names prepared shards, of .*prepared, and plain ones"),
        (["prepared", "other"], "name shards of one layout"),
        ([], "shards"),
        (["held/*.tar"], "holds test-0.tar beside other shards"),
    ],
)
def test_lists_and_globs_that_will_not_do_are_one_line(tmp_path: Path, patterns, says):
    renamed(tmp_path)
    for name, toy in (("prepared", "toy:ring"), ("other", "toy:ising")):
        prepare(toy, tmp_path / name, toy_samples=40)
    for name in ("test-0.tar", "train-0.tar"):
        write_tar(tmp_path / "held" / name, [("a.npy", npy(np.zeros(1)))])
    with pytest.raises(ValueError, match=says) as error:
        describe(DataConfig(shards=tuple(str(tmp_path / name) for name in patterns)))
    if patterns:
        assert "\n" not in str(error.value)


def test_a_glob_of_a_prepared_directory_takes_its_training_part(tmp_path: Path):
    prepare("digits", tmp_path / "d", shard_size=500)
    whole = open_dataset(DataConfig(source=str(tmp_path / "d")))
    for pattern in ("d/*.tar", "d/t*", "d/train-*.tar"):
        assert open_dataset(DataConfig(source=str(tmp_path / pattern))) == whole
    prepare("digits", tmp_path / "e")
    both = open_dataset(DataConfig(shards=(str(tmp_path / "d"), str(tmp_path / "e"))))
    assert (both.num_samples("train"), both.num_samples("test")) == (2 * 1442, 2 * 355)


# -- bad samples


def spoilt(tmp_path: Path, num: int = 30, bad: tuple[int, ...] = (0, 7, 8, 29)) -> Path:
    """A shard of which some samples are no arrays."""
    members = []
    for index in range(num):
        data = b"damaged" if index in bad else npy(np.full(1, index, np.float32))
        members += [(f"{index:02d}.npy", data), (f"{index:02d}.cls", b"%d" % (index % 3))]
    return write_tar(tmp_path / "s.tar", members)


GOOD = [index for index in range(30) if index not in (0, 7, 8, 29)]


@pytest.mark.parametrize("cache", ["never", "always"])
@pytest.mark.parametrize("prefetch", [0, 2])
def test_every_other_sample_comes_once_an_epoch(tmp_path: Path, cache: str, prefetch: int):
    path = str(spoilt(tmp_path))
    changes = {"cache": cache, "prefetch": prefetch, "on_bad_sample": "skip", "batch_size": 13}
    stream = DataStream(numbered_config(path, **changes))
    for _ in range(3):
        assert sorted(take(stream, 2, 13)) == GOOD
    again = DataStream(numbered_config(path, **changes))
    batches = [take(again, 1, 13) for _ in range(5)]
    state = again.state()
    after = take(again, 2, 13)
    other = DataStream(numbered_config(path, **changes))
    other.load_state(state)
    assert take(other, 2, 13) == after
    assert sorted(batches[0] + batches[1]) == GOOD
    for each in (stream, again, other):
        each.close()
    assert stream.num_skipped >= 8
    with pytest.raises(UserError, match=r"sample '00'"):
        DataStream(numbered_config(path, cache=cache))


def test_ranks_leave_out_their_own_and_share_the_rest(tmp_path: Path):
    config = numbered_config(str(spoilt(tmp_path)), on_bad_sample="skip", shuffle=0)
    streams = [DataStream(config, rank=rank, world_size=2) for rank in range(2)]
    seen = [value for stream in streams for value in take(stream, 13, 1)]
    assert sorted(seen) == GOOD
    assert sum(stream.num_skipped for stream in streams) == 3  # the last was not needed


def test_the_first_few_are_named_in_the_log_and_a_survey_passes_them(tmp_path: Path, caplog):
    path = spoilt(tmp_path, num=40, bad=tuple(range(1, 20)))
    config = numbered_config(str(path), on_bad_sample="skip")
    with caplog.at_level(logging.WARNING, "ebm_dist"):
        assert open_dataset(config).survey() == []
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 10
    assert lines[0].startswith(f"data: left out: {path}: sample '01': not a readable .npy")
    assert "further ones are only counted" in lines[-1]
    with pytest.raises(UserError, match="sample '01'"):
        open_dataset(numbered_config(str(path))).survey()


def test_shards_without_a_good_sample_end_the_run(tmp_path: Path):
    path = spoilt(tmp_path)
    stream = DataStream(numbered_config(str(path), on_bad_sample="skip", batch_size=1))
    spoilt(tmp_path, bad=tuple(range(30)))
    with pytest.raises(UserError, match=r"data\.on_bad_sample: skip, but .* holds no sample"):
        stream.next_batch(1)
    with pytest.raises(UserError, match="sample '00'"):
        describe(numbered_config(str(path), on_bad_sample="skip"))


def test_a_cut_shard_ends_the_run_also_where_samples_are_left_out(tmp_path: Path):
    path = spoilt(tmp_path)
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(UserError, match="tar without its end-of-archive mark"):
        take(DataStream(numbered_config(str(path), on_bad_sample="skip")), 20, 4)


def test_leaving_out_is_for_shards():
    with pytest.raises(ValueError, match="on_bad_sample: skip is for shards"):
        DataConfig(source="module", target="a:b", on_bad_sample="skip")


def test_a_run_counts_what_it_left_out(tmp_path: Path):
    import json

    import ebm_dist

    config = {
        "run": {"name": "r", "dir": str(tmp_path), "steps": 4},
        "runtime": {"backend": "inline", "device": "cpu"},
        "data": {"source": str(spoilt(tmp_path)), "batch_size": 13},
        "energy": {"name": "mlp", "widths": [8]},
        "sampler": {"name": "langevin", "step_size": 0.01, "temperature": 1.0, "num_steps": 2},
        "buffer": {"capacity": 26, "num_shards": 1},
        "workers": {"num_chains": 13},
        "tracking": {"wandb": "off", "log_every": 2},
        "evaluation": {"every": None},
    }
    config["data"] |= {"on_bad_sample": "skip", "prefetch": 0}
    ebm_dist.train(config)
    rows = map(json.loads, (tmp_path / "r" / "metrics.jsonl").read_text().splitlines())
    counts = [row["fault/skipped_samples"] for row in rows if "fault/skipped_samples" in row]
    assert counts == sorted(counts)
    assert counts[-1] in (4.0, 5.0, 6.0, 7.0, 8.0)
    assert "left out: " in (tmp_path / "r" / "run.log").read_text()


# -- data check


def test_check_reads_all_counts_by_class_and_names_the_bad(tmp_path: Path, capsys):
    path = spoilt(tmp_path)
    assert main(["data", "check", str(path)]) == 2
    said = capsys.readouterr()
    lines = said.out.splitlines()
    bad = [line.split("sample ")[1][:4] for line in lines[:-1]]
    assert bad == ["'00'", "'07'", "'08'", "'29'"]
    assert lines[-1] == ("1 shards: 26 samples: 9 of class 0, 9 of class 1, 8 of class 2")
    (error,) = said.err.splitlines()
    assert "4 bad samples and 0 bad shards of 1" in error


def test_check_goes_on_after_a_bad_shard(tmp_path: Path, capsys):
    prepare("digits", tmp_path / "d", shard_size=500)
    assert main(["data", "check", str(tmp_path / "d")]) == 0
    assert capsys.readouterr().out.startswith("4 shards: 1797 samples: 178 of class 0, 182 ")
    first, second, third = sorted((tmp_path / "d").glob("train-*.tar"))
    data = bytearray(first.read_bytes())
    data[600] ^= 255  # within a picture
    first.write_bytes(data)
    second.write_bytes(second.read_bytes()[:5000])
    third.unlink()
    assert main(["data", "check", str(tmp_path / "d")]) == 2
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert all(any(str(path) in line for line in lines) for path in (first, second, third))
    assert f"{first}: SHA-256 differs" in lines[0]
    assert "3 bad shards of 4" in said.err
    assert lines[-1].startswith("4 shards: ")


def test_check_takes_several_shards_and_the_keys_of_plain_ones(tmp_path: Path, capsys):
    image = np.zeros((4, 4), np.uint8)
    for name in ("a", "b"):
        members = [("k.png", png(image)), ("k.seg.png", png(image)), ("k.cls", b"3")]
        write_tar(tmp_path / f"{name}.tar", members)
    names = [str(tmp_path / f"{name}.tar") for name in ("a", "b")]
    assert main(["data", "check", *names, "--member", "seg.png", "--num-classes", "4"]) == 0
    assert "2 shards: 2 samples" in capsys.readouterr().out
    assert main(["data", "check", *names, "--member", "png", "--num-classes", "3"]) == 2
    assert "label 3, but there are 3 classes" in capsys.readouterr().out
    assert main(["data", "check", str(tmp_path / "none")]) == 2
    assert main(["data", "check", *names, "--kind", "sound"]) == 2
    assert "kind: expected 'image'" in capsys.readouterr().err.splitlines()[-1]


def test_the_command_of_the_page_reads_shards_that_something_else_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    picture = png(np.zeros((4, 4), np.uint8), "JPEG")
    for name in ("a", "b"):
        write_tar(tmp_path / f"shards/{name}.tar", [("k.jpg", picture), ("k.txt", b"a caption")])
    for block in blocks_run_by(__file__, "docs/data.md"):
        run_block(block, {})
    assert "2 shards: 2 samples" in capsys.readouterr().out


def test_many_faults_are_counted_and_not_listed(tmp_path: Path, capsys):
    assert main(["data", "check", str(spoilt(tmp_path, 150, tuple(range(1, 150))))]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert (len(lines), lines[-2]) == (102, "bad: 49 more")


@pytest.mark.parametrize(
    ("old", "fixed"),
    [
        (["/data/a.tar", "/data/b.tar"], False),  # as they are now
        (["/data/a.tar"], False),  # gone from there: they have moved
        (["/dev", "/data/b.tar"], True),
        (["/data/*.tar"], True),  # what it matched is not known any more
        ("/data/a.tar", False),
    ],
)
def test_a_resume_takes_a_list_of_shards_that_moved_and_refuses_others(old: object, fixed: bool):
    from ebm_dist.config.run_config import load
    from ebm_dist.run.resume import _is_fixed

    config = load(
        {
            "data": {"shards": ["/data/a.tar", "/data/b.tar"]},
            "energy": {"name": "mlp"},
            "sampler": {"name": "mala", "step_size": 1, "temperature": 1},
        }
    )
    assert _is_fixed("data.shards", old, config) == fixed
    assert not _is_fixed("data.on_bad_sample", "stop", config)
