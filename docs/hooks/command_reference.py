"""Writes the reference of the command line from the commands' own help; needs no mkdocs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from typer.main import get_command

from ebm_dist.cli import app

HEAD = """\
# Commands

What `ebm-dist COMMAND --help` says, written by the build of these pages. Exit codes are in
[Writing a config](../config.md#exit-codes).
"""


def page() -> str:
    """The reference as Markdown."""
    lines = [HEAD]
    for path, command in _commands(get_command(app), "ebm-dist"):
        lines += [f"## {path}", "", command.help or "", ""]
        lines += [_parameter(parameter) for parameter in command.params]
        lines += ["", *map(_paragraph, (command.epilog or "").split("\n\n")), ""]
    return "\n".join(lines) + "\n"


def _commands(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    """The commands that do something; groups only lead to them."""
    if children := getattr(command, "commands", None):
        for name, child in children.items():
            yield from _commands(child, f"{path} {name}")
    else:
        yield path, command


def _parameter(parameter: Any) -> str:
    names = [name if name.startswith("-") else name.upper() for name in parameter.opts]
    annotation = parameter.type_descriptor.annotation
    choices = get_args(annotation) if get_origin(annotation) is Literal else ()
    about = [f"one of {', '.join(f'`{choice}`' for choice in choices)}"] if choices else []
    if parameter.default not in (None, [], (), False) and not callable(parameter.default):
        about.append(f"default `{parameter.default}`")
    if parameter.required:
        about.append("required")
    said = f" ({'; '.join(about)})" if about else ""
    help_text = getattr(parameter, "help", None)
    return f"- `{', '.join(names)}`{said}" + (f": {help_text}" if help_text else "")


def _paragraph(text: str) -> str:
    first, said, rest = text.partition("Example: ")
    return f"Example: `{rest}`\n" if said and not first else f"{text}\n"
