"""The command that runs this installation, and the pip command for missing packages."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shlex
import shutil
import sys
from pathlib import Path

from ebm_dist.core.errors import UserError

NO_FCNTL = (
    "this system has no fcntl, and training needs the file locks and shared memory of Linux or "
    "macOS; use one of them (on Windows: WSL)"
)


def command(name: str = "ebm-dist", module: str = "ebm_dist") -> str:
    """The start of a command line that runs this installation from the working directory.

    It is `name` if the shell finds this installation under it, otherwise the path of the script
    beside the interpreter, or `python -m module`.
    """
    script = Path(sys.executable).parent / name
    found = shutil.which(name)
    if found and script.exists() and Path(found).samefile(script):
        return name
    if script.exists():
        return shlex.quote(_near(script))
    return f"{shlex.quote(_near(Path(sys.executable)))} -m {module}"


def _near(path: Path) -> str:
    if not path.is_relative_to(Path.cwd()):
        return str(path)
    near = str(path.relative_to(Path.cwd()))
    return near if "/" in near else f"./{near}"


def how_to_install(extra: str) -> str:
    """The pip command for the packages of `extra`, by name, since no registry has ebm_dist."""
    try:
        requirements = importlib.metadata.requires("ebm_dist") or []
    except importlib.metadata.PackageNotFoundError:
        requirements = []
    wanted = []
    for requirement in requirements:
        name, _, marker = requirement.partition(";")
        if f'extra == "{extra}"' in marker.replace("'", '"'):
            wanted.append(shlex.quote(name.strip()))
    return (
        f"pip install {' '.join(wanted)}" if wanted else f"pip install '.[{extra}]' in a checkout"
    )


def require(*packages: str) -> None:
    """Raise UserError in one line if one of `packages`, which training needs, is missing."""
    for name in packages:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"{name} is not installed, and training needs it: {how_to_install('train')}"
            )
