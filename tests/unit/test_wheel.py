"""The wheel holds all that the package is: who installs it has what a clone has."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from ebm_dist._version import __version__

ROOT = Path(__file__).parents[2]


def test_the_wheel_holds_every_file_of_the_package(tmp_path: Path) -> None:
    # Of a copy: the build leaves folders beside the sources, and what lies there goes in.
    listed = ["git", "ls-files", "-z", "ebm_dist", "pyproject.toml", "README.md", "LICENSE"]
    done = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True)
    files = done.stdout.split("\0")[:-1]
    for name in files:
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "copy" / name)
    command = [sys.executable, "-m", "pip", "wheel", "./copy", "--wheel-dir", "built", "--no-deps"]
    # The build's own needs are of the environment, so nothing is looked up in a registry.
    command += ["--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (tmp_path / "built").glob(f"ebm_dist-{__version__}-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    package = [name for name in files if name.startswith("ebm_dist/")]
    assert {"ebm_dist/report/templates/base.html", "ebm_dist/samplers/compile/toom.h"} <= {*package}
    assert sorted(name for name in names if ".dist-info/" not in name) == sorted(package)
