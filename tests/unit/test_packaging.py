"""What pyproject.toml promises to pip: which Pythons, which versions, and no pin."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PINS = {
    re.sub(r"[-_.]+", "-", name).lower(): version
    for name, _, version in (
        line.partition("==") for line in (ROOT / "constraints.txt").read_text().splitlines()
    )
}
PYTHONS = [
    entry.rpartition(" ")[2] for entry in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", entry)
]
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
    found = sys.executable
    if version != f"{sys.version_info[0]}.{sys.version_info[1]}":
        found = shutil.which(f"python{version}") or ""
    command = [found, "-c", COMPILE, str(ROOT / "ebm_dist"), ",".join(sys.stdlib_module_names)]
    done = None
    if found:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done is None or "command not found" in done.stderr:  # pyenv's shim of one not chosen
        pytest.skip(f"no Python {version} here")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
