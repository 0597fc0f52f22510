"""`make docs` builds the documentation site without a warning."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from pythons import PROJECT, ROOT


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        python = [sys.executable, "-m", *command]
        return subprocess.run(python, cwd=ROOT, env=environment, capture_output=True, text=True)

    if find_spec("mkdocs") is None:
        # Beside the environment, which `make docs` leaves as it is too.
        target = str(tmp_path / "packages")
        pins = ["-c", "constraints.txt", "--disable-pip-version-check", "--retries", "0"]
        wanted = PROJECT["optional-dependencies"]["docs"]
        done = run("pip", "install", "--quiet", "--target", target, *pins, *wanted)
        if done.returncode != 0:
            pytest.skip(f"mkdocs cannot be installed: {done.stderr.splitlines()[-1]}")
        path = [target, os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    site = tmp_path / "site"
    done = run("mkdocs", "build", "--quiet", "--strict", "--site-dir", str(site))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (site / "index.html").is_file()
    assert "ebm_dist.train" in (site / "reference" / "api.html").read_text(encoding="utf-8")
