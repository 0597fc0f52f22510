"""What pyproject.toml promises to pip: which Pythons, which versions, and no pin."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from pythons import PROJECT, PYTHONS, ROOT, interpreter

PINS = {
    re.sub(r"[-_.]+", "-", name).lower(): version
    for name, _, version in (
        line.partition("==") for line in (ROOT / "constraints.txt").read_text().splitlines()
    )
}
COMPILE = """
import ast, sys
from pathlib import Path
for path in Path(sys.argv[1]).rglob("*.py"):
    tree = compile(path.read_bytes(), str(path), "exec", ast.PyCF_ONLY_AST)
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        for name in (name.partition(".")[0] for name in names):
            if name in sys.argv[2].split(",") and name not in sys.stdlib_module_names:
                print(f"{path}: {name}")
"""


def requirements() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"].values()
    return [Requirement(text) for texts in (PROJECT["dependencies"], *extras) for text in texts]


def test_every_requirement_has_a_lower_bound_and_no_other() -> None:
    """A pin of torch would replace the one that the user has."""
    for requirement in requirements():
        operators = [part.operator for part in requirement.specifier]
        # The dashboard's `ray[default]` has that of `ray` itself.
        assert operators == [">="], str(requirement)


def test_the_tested_versions_are_within_the_bounds() -> None:
    for requirement in requirements():
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if name in PINS:
            assert PINS[name] in requirement.specifier, str(requirement)
    assert {"torch", "numpy", "ray", "huggingface-hub"} <= PINS.keys()


def test_the_classifiers_name_the_pythons_that_are_required() -> None:
    assert PYTHONS == ["3.11", "3.12", "3.13"]
    assert PROJECT["requires-python"] == f">={PYTHONS[0]}"


@pytest.mark.parametrize("version", PYTHONS)
def test_every_module_is_valid_and_imports_what_the_standard_library_of_each_python_has(
    version: str,
) -> None:
    found = interpreter(version)
    if found is None:
        pytest.skip(f"no Python {version} on the path or below $PYENV_ROOT")
    command = [found, "-c", COMPILE, str(ROOT / "ebm_dist"), ",".join(sys.stdlib_module_names)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_an_interpreter_is_found_where_pyenv_keeps_it_behind_a_shim_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path, text in (
        ("bin/python3.99", "echo 'pyenv: python3.99: command not found' >&2; exit 127"),
        ("pyenv/versions/3.99.1/bin/python", "echo 3.99"),
    ):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / path).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "nothing"))
    assert interpreter("3.99") is None
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    assert interpreter("3.99") == str(tmp_path / "pyenv/versions/3.99.1/bin/python")
