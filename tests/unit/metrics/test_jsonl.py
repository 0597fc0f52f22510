"""metrics.jsonl survives the death of its writer at any byte, and a return to a checkpoint."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ebm_dist.metrics.jsonl import SUPERSEDED_FILE, JsonlSink, decode, encode, read_rows


def rows_of(path: Path) -> list[dict]:
    return list(read_rows(path))


def test_a_file_cut_at_any_byte_is_repaired_to_whole_rows(tmp_path: Path) -> None:
    rows = [{"step": i, "epoch": 0, "energy/gap": i / 3} for i in range(4)]
    whole = b"".join(map(encode, rows))
    ends = [len(b"".join(map(encode, rows[:n]))) for n in range(5)]
    for cut in range(len(whole) + 1):
        path = tmp_path / f"{cut}.jsonl"
        path.write_bytes(whole[:cut])
        sink = JsonlSink(path)
        sink.append([{"step": 99, "epoch": 1}])
        sink.close()
        # A row that lacks only its newline is whole too.
        expected = sum(cut >= end - 1 for end in ends[1:])
        assert rows_of(path) == [*rows[:expected], {"step": 99, "epoch": 1}], cut
        assert all(decode(line) for line in path.read_bytes().splitlines())


def test_a_tail_of_zeros_as_a_power_loss_leaves_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(encode({"step": 1}) + bytes(200_000))
    JsonlSink(path).close()
    assert path.read_bytes() == encode({"step": 1})


def test_lines_are_strict_json_also_when_values_are_not_finite() -> None:
    line = encode({"step": 1, "loss/total": math.nan, "energy/gap": -math.inf})
    refuse = pytest.fail
    row = json.loads(line, parse_constant=lambda name: refuse(f"{name} is not JSON"))
    assert row == {"step": 1, "loss/total": None, "energy/gap": None}


def test_rewind_moves_rows_beyond_the_step_to_the_superseded_file(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.append({"step": step, "epoch": 0} for step in range(0, 60, 10))
    assert sink.rewind(30) == 2
    sink.append([{"step": 40, "epoch": 1}])
    sink.close()
    assert [row["step"] for row in rows_of(sink.path)] == [0, 10, 20, 30, 40]
    assert rows_of(sink.path)[-1]["epoch"] == 1
    assert [row["step"] for row in rows_of(tmp_path / SUPERSEDED_FILE)] == [40, 50]


def test_a_write_that_fails_half_way_leaves_no_half_line(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.append([{"step": 1}])
    real = sink._file

    class FullDisk:
        def write(self, data: bytes) -> int:
            return real.write(data[: len(data) // 2])

        def fileno(self) -> int:
            return real.fileno()

    sink._file = FullDisk()  # type: ignore[assignment]
    with pytest.raises(OSError, match="disk full"):
        sink.append([{"step": 2}])
    sink._file = real
    sink.append([{"step": 3}])
    sink.close()
    assert [row["step"] for row in rows_of(sink.path)] == [1, 3]


def test_rows_written_before_a_sigkill_are_all_there(tmp_path: Path) -> None:
    program = (
        "import sys, itertools\n"
        "from pathlib import Path\n"
        "from ebm_dist.metrics.jsonl import JsonlSink\n"
        "sink = JsonlSink(Path(sys.argv[1]))\n"
        "for step in itertools.count():\n"
        "    sink.append([{'step': step, 'epoch': 0}])\n"
        "    if step == 2000: print('going', flush=True)\n"
    )
    path = tmp_path / "metrics.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "going\n"
    time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    JsonlSink(path).close()
    steps = [row["step"] for row in rows_of(path)]
    assert len(steps) > 2000
    assert steps == list(range(len(steps)))
