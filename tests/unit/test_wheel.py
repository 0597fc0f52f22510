"""The wheel holds all that the package is: who installs it has what a clone has."""

from __future__ import annotations

import zipfile
from pathlib import Path

from wheel_build import build_wheel


def test_the_wheel_holds_every_file_of_the_package(tmp_path: Path) -> None:
    wheel, files = build_wheel(tmp_path)
    names = zipfile.ZipFile(wheel).namelist()
    package = [name for name in files if name.startswith("ebm_dist/")]
    assert {"ebm_dist/report/templates/base.html", "ebm_dist/samplers/compile/toom.h"} <= {*package}
    assert sorted(name for name in names if ".dist-info/" not in name) == sorted(package)
