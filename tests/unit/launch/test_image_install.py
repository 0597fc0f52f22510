"""What an image's Dockerfile installs works in a clean environment: no Docker, pip alone."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
DOCKERFILE = ROOT / "docker" / "Dockerfile.cpu"

pytestmark = pytest.mark.slow


def stages(dockerfile: Path) -> list[list[tuple[str, str]]]:
    """(instruction, arguments) of each stage; what precedes the first FROM belongs to none."""
    text = re.sub(r"^\s*#.*\n", "", dockerfile.read_text(), flags=re.MULTILINE)
    found: list[list[tuple[str, str]]] = []
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip():
            name, _, rest = line.strip().partition(" ")
            if name == "FROM":
                found.append([])
            elif found:
                found[-1].append((name, rest))
    return found


class Image:
    """The Dockerfile's steps on this machine, below a directory in place of `/`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        # pip's own settings stay: where packages come from is the machine's matter.
        ours = ("PYTHON", "RAY_", "WANDB_", "VIRTUAL_ENV", "OMP_")
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
        self.at = root

    def inside(self, path: str) -> Path:
        return self.root / path.lstrip("/") if path.startswith("/") else self.at / path

    def do(self, stage: list[tuple[str, str]]) -> None:
        for name, rest in stage:
            if name == "ARG":
                key, _, default = rest.partition("=")
                # As with `docker build --build-arg`.
                self.environment.setdefault(key, default)
            elif name == "ENV":
                for pair in shlex.split(rest):
                    key, _, value = pair.partition("=")
                    value = value.replace("${PATH}", self.environment["PATH"])
                    self.environment[key] = value.replace("/opt/", f"{self.root}/opt/")
            elif name == "WORKDIR":
                self.at = self.inside(rest)
                self.at.mkdir(parents=True, exist_ok=True)
            elif name == "COPY" and not rest.startswith("--from"):
                *sources, to = rest.split()
                for source in sources:
                    self.copy(ROOT / source, self.inside(to), into=to.endswith("/"))
            elif name == "RUN" and "install.sh" in rest:
                self.run(["sh", "-c", rest.replace("/opt/", f"{shlex.quote(str(self.root))}/opt/")])

    def copy(self, source: Path, to: Path, *, into: bool) -> None:
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, to, symlinks=True, dirs_exist_ok=True, ignore=ignored)
        else:
            to = to / source.name if into else to
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, to)

    def run(self, command: list[str]) -> str:
        done = subprocess.run(
            command,
            cwd=self.at,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout


def pins() -> dict[str, str]:
    lines = []
    for path in (ROOT / "constraints.txt", ROOT / "docker" / "constraints.txt"):
        lines += [line.split("==") for line in path.read_text().splitlines() if "==" in line]
    return {normal(name): version for name, version in lines}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.timeout(1800)
def test_the_cpu_image_installs_pinned_and_trains_in_a_clean_environment(tmp_path: Path) -> None:
    build, final = stages(DOCKERFILE)
    default = dict(rest.split("=", 1) for name, rest in build if name == "ARG")["TORCH_INDEX_URL"]
    index = os.environ.get("TORCH_INDEX_URL", default)
    if index and not answers(index):
        pytest.skip(f"{index} does not answer; TORCH_INDEX_URL= in front takes pip's own index")
    image = Image(tmp_path / "image")
    image.environment["PYTHON"] = sys.executable
    began = time.monotonic()
    image.do(build)
    took = time.monotonic() - began
    size = sum(f.stat().st_size for f in image.inside("/opt").rglob("*") if f.is_file())
    print(f"installed in {took:.0f} s, {size / 1e9:.2f} GB")
    image.environment["HOME"] = str(tmp_path)
    image.do(final)
    assert image.at == image.inside("/opt/ebm_dist")

    freeze = image.run(["python", "-m", "pip", "list", "--format=freeze"]).split()
    installed = {normal(line.split("==")[0]): line.split("==")[1] for line in freeze}
    assert {"ebm-dist", "torch", "ray", "deepspeed", "aiohttp"} <= set(installed)
    for name, version in installed.items():
        if name not in ("ebm-dist", "pip", "setuptools"):
            # torch's CPU build is 2.13.0+cpu.
            assert version.split("+")[0] == pins().get(name), f"{name} {version}"

    # The code is the environment's, not the checkout's.
    where = image.run(["python", "-c", "import ebm_dist; print(ebm_dist.__file__)"])
    assert where.startswith(str(image.inside("/opt/ebm_dist/env")))
    report = image.run(["ebm-dist", "doctor"])
    print(report)
    assert "FAIL" not in report
    overrides = ["runtime.backend=inline", "run.steps=2", "tracking.wandb=off"]
    image.run(["ebm-dist", "train", "configs/digits.yaml", *overrides, "--run-dir", "run"])
    assert (image.at / "run" / "export" / "model.safetensors").exists()


def answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=20).close()
    except OSError:
        return False
    return True
