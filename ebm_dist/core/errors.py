"""Exceptions that callers recover from, or that the command line reports in one line."""

from __future__ import annotations

MAX_LINE = 2000


class UserError(ValueError):
    """The user's input is wrong: exit code 2, no traceback, one line per exception argument."""

    def __str__(self) -> str:
        return "\n".join(map(str, self.args))


class RunFailed(RuntimeError):
    """The run failed although its input was right: exit code 1."""


class NonFinite(RunFailed):
    """A loss, gradient or energy is not finite, or beyond its limit."""


def named(error: BaseException) -> str:
    """`TYPE: MESSAGE` of `error`, in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def one_line(text: object) -> str:
    """`text` as one printable line, shortened in the middle, with control characters escaped.

    Names and values come from files. A newline in one could forge a line of our output, an escape
    sequence could control the terminal, and a name can be megabytes long.
    """
    line = str(text)
    if len(line) > MAX_LINE:  # the end is kept, since it says what to do
        line = f"{line[: MAX_LINE - 500]} ... {line[-490:]}"
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in line
    )
