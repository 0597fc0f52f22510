"""The spool keeps all that W&B is told, and says from where on to tell it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ebm_dist.metrics.spool import Continuity, Spool


def row(step: int, **values: float) -> dict[str, Any]:
    return {"kind": "row", "step": step, "values": values or {"a": 0.0}}


def waiting(spool: Spool) -> list[int | None]:
    return [item.get("step") for item, _ in spool.take()]


def test_items_are_taken_from_where_the_last_delivery_ended(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool.jsonl", resume_step=None)
    for step in (1, 2, 3):
        spool.put(row(step))
    spool.advance(spool.take(2)[-1][1])
    assert waiting(spool) == [3]
    assert not spool.empty()
    spool.advance(spool.take()[-1][1])
    assert spool.empty()


def test_a_torn_item_is_gone_and_repeated_updates_are_taken_in_once(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool.jsonl", resume_step=None)
    for step in (1, 2, 3):
        spool.put(row(step))
    spool.put({"kind": "image", "step": 3, "name": "samples", "path": "x.png"})
    with open(tmp_path / "spool.jsonl", "ab") as file:
        file.write(b'{"kind": "ro')  # the crash
    again = Spool(tmp_path / "spool.jsonl", resume_step=2)
    again.put(row(3))
    again.put({"kind": "image", "step": 3, "name": "samples", "path": "x.png"})
    again.put(row(3, other=1.0))  # measurements of an update come in a row of their own
    again.put(row(4))
    assert waiting(again) == [1, 2, 3, 3, 3, 4]
    again.put(row(3))  # the live run went back to a checkpoint
    assert waiting(again)[-1] == 3


def test_sending_goes_on_after_the_lines_that_the_server_has(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool.jsonl", resume_step=None)
    spool.put(row(1))
    spool.put(row(2))
    spool.put(row(3))
    spool = Spool(tmp_path / "spool.jsonl", resume_step=3)
    spool.start_at(2)
    assert waiting(spool) == [3]
    spool.put(row(4))
    spool.start_at(4)  # the service died, and another was started
    assert waiting(spool) == []
    spool.start_at(0)
    assert waiting(spool) == [1, 2, 3, 4]


def test_lines_that_only_the_server_has_are_counted_before_new_items(tmp_path: Path) -> None:
    path = tmp_path / "spool.jsonl"
    Spool(path, resume_step=None).put(row(1))
    spool = Spool(path, resume_step=1)
    spool.put(row(2))  # logged before W&B answered
    spool.start_at(5)
    assert waiting(spool) == [2]
    Spool(path, resume_step=2).start_at(6)
    assert waiting(Spool(path, resume_step=2)) == [1, None, None, None, None, 2]


def test_what_is_known_of_a_run_outlives_the_attempt_and_a_torn_file_says_nothing(
    tmp_path: Path,
) -> None:
    path = tmp_path / "continuity.json"
    kept = Continuity(path, "a")
    kept.rename("b")
    kept.rename("c")
    kept.num_passed_on = 7
    kept.save()
    assert (Continuity(path, "a").run_id, Continuity(path, "a").num_passed_on) == ("c", 7)
    assert (Continuity(path, "z").run_id, Continuity(path, "z").num_passed_on) == ("z", 0)
    for text in ('{"replaced": {"a": "a"}, "run_id": "a", "num_passed_on": 1}', "{", "[]"):
        path.write_text(text)
        assert Continuity(path, "a").run_id == "a"
