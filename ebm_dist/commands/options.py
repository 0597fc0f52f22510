"""Arguments and options that several commands have."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ebm_dist.core.paths import user_path

_OVERRIDE = re.compile(r"--(\w+(?:\.\w+)+=)")


def plain_overrides(arguments: Iterable[str]) -> list[str]:
    """`arguments` with `--key.sub=value`, as sweep agents write overrides, as `key.sub=value`.

    No option of ours has a dot in its name.
    """
    return [_OVERRIDE.sub(r"\1", text, 1) if _OVERRIDE.match(text) else text for text in arguments]


def path(text: str | Path) -> Path:
    """A path of an argument or option: `~` is the home directory, variables are refused."""
    try:
        return Path(user_path(text))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


Argument = partial(typer.Argument, parser=path, show_default=False)
Option = partial(typer.Option, parser=path, metavar="PATH")

ConfigFile = Annotated[Path, Argument(help="The YAML config.")]
ExportDir = Annotated[
    Path, Argument(help="An export, a run with one, a pretrained name or hf://USER/NAME.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Keys that override the file, e.g. learner.lr=1e-4.")
]
Plugins = Annotated[
    list[str],
    typer.Option(
        "--plugin",
        metavar="MODULE",
        show_default=False,
        help="Import this module of yours first; several times for several. Its code is run.",
    ),
]

License = Annotated[
    str | None, typer.Option("--license", help="The model's licence, e.g. apache-2.0.")
]


def import_named(names: list[str]) -> list[str]:
    """The values of --plugin, once the modules that they name are imported."""
    if names:
        from ebm_dist.core.plugins import import_plugins

        import_plugins(names, "--plugin")
    return names
