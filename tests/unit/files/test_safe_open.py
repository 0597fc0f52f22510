"""Files of a run directory are regular files, whoever made it; what is written appears whole."""

from __future__ import annotations

import ast
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ebm_dist.core.errors import UserError
from ebm_dist.files import durable, safe_open
from ebm_dist.files.durable import lock, new_directory, replace_text, write_output
from ebm_dist.files.safe_open import NotRegular

PACKAGE = Path(__file__).parents[3] / "ebm_dist"

TRAPS = {
    "a link": lambda path, target: path.symlink_to(target),
    "a dangling link": lambda path, target: path.symlink_to(target.with_name("none")),
    "a FIFO": lambda path, target: os.mkfifo(path),
    "a directory": lambda path, target: path.mkdir(),
}
OPENERS = [safe_open.open_to_read, safe_open.open_to_append, safe_open.open_to_repair]


@pytest.mark.parametrize("trap", TRAPS)
@pytest.mark.parametrize("opener", OPENERS)
def test_what_is_no_regular_file_is_refused_at_once_and_nothing_is_written(opener, trap, tmp_path):
    target = tmp_path / "target"
    target.write_text("years of work")
    TRAPS[trap](tmp_path / "file", target)
    with pytest.raises(OSError, match="file"):
        opener(tmp_path / "file")
    assert target.read_text() == "years of work"
    assert not (tmp_path / "none").exists()


def test_a_second_name_of_a_file_is_read_and_not_written(tmp_path):
    (tmp_path / "target").write_text("years of work")
    os.link(tmp_path / "target", tmp_path / "file")
    assert safe_open.read_bytes(tmp_path / "file") == b"years of work"
    with pytest.raises(NotRegular, match="second name"):
        safe_open.open_to_append(tmp_path / "file")


def test_a_link_that_the_user_named_is_followed_and_a_fifo_is_not(tmp_path):
    (tmp_path / "target").write_text("x")
    (tmp_path / "link").symlink_to("target")
    os.mkfifo(tmp_path / "fifo")
    with safe_open.open_to_read(tmp_path / "link", follow=True) as file:
        assert file.read() == b"x"
    with pytest.raises(UserError, match="expected a file"):
        safe_open.open_to_read(tmp_path / "fifo", follow=True)


def test_a_replaced_file_is_the_old_one_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "file"
    replace_text(path, "σ²\n")
    assert path.read_bytes() == "σ²\n".encode()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        replace_text(path, "other")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == "σ²\n".encode()


def test_a_replaced_link_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "target").write_text("years of work")
    (tmp_path / "file").symlink_to("target")
    replace_text(tmp_path / "file", "x")
    assert (tmp_path / "target").read_text() == "years of work"
    assert not (tmp_path / "file").is_symlink()


@pytest.mark.parametrize("files", [(), (".lock",), (".lock", "a"), ("a",)])
def test_what_a_killed_writer_left_is_removed_and_what_a_living_one_fills_is_not(files, tmp_path):
    final = tmp_path / "export"
    dead = tmp_path / ".export.0123abcd.part"
    dead.mkdir()
    for name in files:
        (dead / name).touch()
    with new_directory(final, replace=True) as living:
        (living / "a").write_text("1")
        with new_directory(final, replace=True) as other:
            (other / "a").write_text("2")
        assert living.exists()
    assert not dead.exists()
    assert (final / "a").read_text() == "1"
    assert [p.name for p in tmp_path.iterdir()] == ["export"]


@pytest.mark.parametrize("call", ["mkdir", "open", "sync", "_install", "unlink"])
def test_a_writer_killed_at_any_call_leaves_nothing_that_the_next_does_not_remove(call, tmp_path):
    """It ends without its `finally`, right after the first such call."""
    final = tmp_path / "checkpoints" / "step_1"
    final.parent.mkdir()
    child = os.fork()
    if child == 0:
        where = durable if hasattr(durable, call) else Path
        real = getattr(where, call)

        def then_killed(*args, **kwargs):
            real(*args, **kwargs)
            os._exit(9)

        setattr(where, call, then_killed)
        with new_directory(final, replace=True, family=r"step_\d+") as part:
            (part / "a").write_bytes(b"1")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    with new_directory(final.with_name("step_2"), replace=True, family=r"step_\d+") as part:
        (part / "a").write_bytes(b"2")
    assert not list(final.parent.glob(".*"))
    assert [p.name for p in final.with_name("step_2").iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("number", "answer"), [(errno.ENOSYS, None), (errno.ENOLCK, None), (errno.EAGAIN, False)]
)
def test_a_lock_that_there_is_not_is_not_a_lock_that_another_has(
    number, answer, tmp_path, monkeypatch
):
    def flock(file, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    with (tmp_path / "lock").open("xb") as file:
        assert lock(file) is answer


def test_every_text_that_is_written_or_read_states_its_encoding():
    faults = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and _is_text_in_the_locales_encoding(node):
                faults.append(f"{path.relative_to(PACKAGE)}:{node.lineno}")
    # The first two are ASCII by what writes them.
    known = ("samplers/compile/onednn.py", "buffer/storage.py", "cluster/access.py")
    assert [fault for fault in faults if not fault.startswith(known)] == []


def _is_text_in_the_locales_encoding(call: ast.Call) -> bool:
    name = getattr(call.func, "attr", None) or getattr(call.func, "id", "")
    if any(keyword.arg == "encoding" for keyword in call.keywords):
        return False
    if name in ("write_text", "read_text", "FileHandler"):
        return True
    modes = [a.value for a in call.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
    return name in ("open", "NamedTemporaryFile") and any(m in ("w", "a", "x", "r") for m in modes)


def test_an_export_is_written_in_utf8_where_the_locale_is_not(tmp_path):
    script = (
        "import sys; from pathlib import Path; from ebm_dist.files.durable import replace_text; "
        f"replace_text(Path({str(tmp_path / 'README.md')!r}), 'noise_std\\u00b2')"
    )
    env = os.environ | {"LC_ALL": "POSIX", "PYTHONUTF8": "0"}
    subprocess.run([sys.executable, "-c", script], env=env, check=True)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == "noise_std²"


def test_what_a_command_writes_takes_no_file_of_a_run_and_no_place_of_a_link(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("{}\n")
    with pytest.raises(UserError, match="a run or an export needs; name another"):
        write_output(metrics, "page")
    assert metrics.read_text() == "{}\n"
    (tmp_path / "real").mkdir()
    (tmp_path / "latest").symlink_to("real")
    with (
        pytest.raises(UserError, match="is a link; name the directory"),
        new_directory(tmp_path / "latest", replace=True),
    ):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "metrics.jsonl", "real"]
