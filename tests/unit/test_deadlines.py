"""No wait without a deadline: a call that can wait for ever names how long, or stands below."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "ebm_dist"

# Without an argument these wait until somebody else has done something.
BARE = {"wait", "join", "get", "acquire", "result", "communicate"}
# These do whatever their arguments are, unless one of them is a time.
NEED_TIMEOUT = {"ray.get", "ray.wait", "subprocess.run", "urlopen", "create_connection"}

# File and call of those that may wait, with what ends it.
ENDED_BY_OTHERS = {
    ("metrics/hub.py", "self._waiting.get"): "the next row: nobody waits for the hub's own thread",
    (
        "data/stream/prefetch.py",
        "self._queue.get",
    ): "the controller's wait for the update, which names it",
    (
        "data/stream/prefetch.py",
        "self._has_few.wait",
    ): "the next batch taken, or `stop`: nobody waits for a thread that has made all it may",
}


def waits(path: Path) -> list[tuple[str, int]]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func).replace("self._ray.", "ray.")
        timed = any(keyword.arg == "timeout" for keyword in node.keywords)
        bare = isinstance(node.func, ast.Attribute) and not node.args and not node.keywords
        if bare and name.rpartition(".")[2] in BARE:
            found.append((name, node.lineno))
        needs = name in NEED_TIMEOUT or name.rpartition(".")[2] in NEED_TIMEOUT
        if needs and not timed:
            found.append((name, node.lineno))
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.name)
def test_every_wait_has_a_deadline(path: Path) -> None:
    file = path.relative_to(PACKAGE).as_posix()
    endless = [(name, line) for name, line in waits(path) if (file, name) not in ENDED_BY_OTHERS]
    assert not endless, f"{file} waits without a timeout: {endless}"


def test_a_wait_without_one_is_found(tmp_path: Path) -> None:
    path = tmp_path / "waits.py"
    path.write_text("q.get()\nt.join()\nray.get(x)\nd.get(1)\nt.join(2)\nray.get(x, timeout=1)\n")
    assert waits(path) == [("q.get", 1), ("t.join", 2), ("ray.get", 3)]
