"""Finds the Pythons of pyproject.toml: on the path, or where pyenv keeps them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PYTHONS = [
    entry.rpartition(" ")[2] for entry in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", entry)
]


def interpreter(version: str) -> str | None:
    """The path of a Python of `version`, such as 3.12; None if there is none."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    kept = sorted(pyenv.glob(f"versions/{version}.*/bin/python"), reverse=True)
    for path in (sys.executable, shutil.which(f"python{version}"), *kept):
        # A shim of pyenv is on the path also where its version was not chosen, and then fails.
        if path is not None and answers(path, version):
            return str(path)
    return None


def answers(path: str | Path, version: str) -> bool:
    program = "import sys; print('%d.%d' % sys.version_info[:2])"
    done = subprocess.run([path, "-c", program], capture_output=True, text=True, timeout=60)
    return (done.returncode, done.stdout.strip()) == (0, version)
