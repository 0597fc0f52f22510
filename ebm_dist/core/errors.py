"""Exceptions that a caller recovers from, or that the command line turns into one line."""

from __future__ import annotations

MAX_LINE = 2000


class UserError(ValueError):
    """The user's input is wrong: exit code 2, no traceback, one clear line for each argument."""

    def __str__(self) -> str:
        return "\n".join(map(str, self.args))


class RunFailed(RuntimeError):
    """The run could not go on though its input was right: exit code 1."""


class NonFinite(RunFailed):
    """A loss, gradient or energy was not finite, or left its bounds."""


def one_line(text: object) -> str:
    """`text` as one line that a terminal shows and does not obey.

    Names and values come from files: a newline in one would forge a line of ours, an escape
    sequence would move the cursor, and a name may be megabytes long.
    """
    line = str(text)
    if len(line) > MAX_LINE:  # what to do stands at the end
        line = f"{line[: MAX_LINE - 500]} ... {line[-490:]}"
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in line
    )
