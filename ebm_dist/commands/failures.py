"""Exceptions of a command -> lines on stderr and an exit code."""

from __future__ import annotations

import errno
import sys
import tempfile
import traceback

import typer

from ebm_dist.core import installed
from ebm_dist.core.errors import RunFailed, UserError, one_line

CommandLineError = typer.BadParameter.__mro__[2]
"""ClickException: typer bundles a copy of click, at a path that varies by version."""

_OF_THE_PATH = {
    errno.ENOENT,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.EROFS,
}
"""Errors of a path that the user gave, as opposed to errors of the disk."""


def explain(error: Exception) -> int:
    """Say on stderr what `error` means for the user; the exit code."""
    if isinstance(error, typer.Abort):
        return say("interrupted", 130)
    if isinstance(error, CommandLineError):
        # A command group without a command has already shown its help; the message is empty.
        text = error.format_message().replace("Value error, ", "")  # type: ignore[attr-defined]
        message = " ".join(text.split())
        return say(f"{message} (see ebm-dist --help)", 2) if message else 2
    if isinstance(error, RunFailed):
        return say(" ".join(str(error).split()), 1)
    if isinstance(error, UserError):
        return say(error, 2)
    if isinstance(error, OSError) and error.errno in _OF_THE_PATH:
        name = error.filename or type(error).__name__
        return say(f"{name}: {(error.strerror or 'cannot be used').lower()}", 2)
    if isinstance(error, IsADirectoryError):
        return say(f"{error.filename}: is a directory, expected a file", 2)
    if isinstance(error, ModuleNotFoundError) and error.name in ("ray", "deepspeed", "wandb"):
        return say(f"{error.name} is not installed: {installed.how_to_install('train')}", 2)
    if isinstance(error, ModuleNotFoundError) and error.name == "fcntl":
        return say(installed.NO_FCNTL, 2)
    if type(error) is ValueError:
        return say(" ".join(str(error).split()), 2)
    with tempfile.NamedTemporaryFile(
        "w", prefix="ebm-dist-", suffix=".log", delete=False, encoding="utf-8"
    ) as file:
        traceback.print_exception(error, file=file)
    what = " ".join(str(error).split())[:300]
    return say(f"{type(error).__name__}: {what}; the traceback is in {file.name}", 1)


def say(message: str | UserError, code: int) -> int:
    """Print `message` as errors, one line for each argument of a UserError; returns `code`."""
    # Splitting text at newlines instead would let a name forge a line.
    for line in message.args if isinstance(message, UserError) else [message]:
        print(f"error: {one_line(line)}", file=sys.stderr)
    return code
