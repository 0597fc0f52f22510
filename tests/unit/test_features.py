"""The page of features names tests that exist."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"^\| .+ \| .+ \| `(tests/[\w/]+\.py)::(\w+)` \|$")


def test_every_feature_names_a_test_that_exists() -> None:
    page = (ROOT / "docs" / "features.md").read_text(encoding="utf-8")
    held, absent = page.split("## Not here")
    rows = [line for line in held.splitlines() if line.startswith("|")]
    rows = [line for line in rows if not line.startswith(("| a user expects", "|---"))]
    found = [ROW.match(line) for line in rows]
    assert [row for row, match in zip(rows, found) if match is None] == []
    assert len(rows) > 50
    named = [(match[1], match[2]) for match in found if match]
    assert [f"{file}::{name}" for file, name in named if name not in functions_of(file)] == []
    assert "::" not in absent


@cache
def functions_of(file: str) -> frozenset[str]:
    """The test functions of a file, which is read and not imported."""
    path = ROOT / file
    tree = ast.parse(path.read_text(encoding="utf-8") if path.is_file() else "")
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))
