"""Builds the wheel of the checkout as pip does, without looking anything up in a registry."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from ebm_dist._version import __version__

ROOT = Path(__file__).parents[2]


def build_wheel(folder: Path) -> tuple[Path, list[str]]:
    """The wheel, built below `folder`, and the files of the checkout that it was built from."""
    # Of a copy: the build leaves folders beside the sources, and what lies there goes in.
    listed = ["git", "ls-files", "-z", "ebm_dist", "pyproject.toml", "README.md", "LICENSE"]
    done = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True)
    files = done.stdout.split("\0")[:-1]
    for name in files:
        (folder / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / "copy" / name)
    command = [sys.executable, "-m", "pip", "wheel", "./copy", "--wheel-dir", "built", "--no-deps"]
    # The build's own needs are of the environment.
    command += ["--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (folder / "built").glob(f"ebm_dist-{__version__}-*.whl")
    return wheel, files
