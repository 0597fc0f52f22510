"""Exceptions that a caller recovers from, or that the command line turns into one line."""

from __future__ import annotations


class UserError(ValueError):
    """The user's input is wrong: one clear line, exit code 2, no traceback."""


class RunFailed(RuntimeError):
    """The run could not go on though its input was right: exit code 1."""


class NonFinite(RunFailed):
    """A loss, gradient or energy was not finite, or left its bounds."""
