"""Expands `~` and, in a config, `${NAME}` in paths that no shell expands."""

from __future__ import annotations

import os
import re

_VARIABLE = re.compile(r"\$\{(\w+)\}")
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL|AUTH", re.IGNORECASE)
"""Matches names of variables whose value must not be in a path: a run records its paths and sends
them to W&B, and another person may have written the config."""


def config_path(path: str) -> str:
    """A path of a config: `${NAME}` is the variable's value, `~` the home directory.

    Raises:
        ValueError: a variable is not set, is a secret or not text, or is written without braces;
            and as `user_path`.
    """

    def value(found: re.Match[str]) -> str:
        name = found[1]
        if _SECRET.search(name):
            raise ValueError(
                f"expected a path, got {path!r}, but a run records its paths and {name} sounds "
                "like a secret; use a variable of another name"
            )
        held = os.environ.get(name)
        if not held:
            raise ValueError(
                f"expected a path, got {path!r}, but the variable {name} is "
                f"{'not set' if held is None else 'empty'}; set it, or write the path itself"
            )
        if not held.isprintable():
            raise ValueError(f"expected a path, got {path!r}, but {name} holds no printable text")
        return held

    whole = _VARIABLE.sub(value, path)
    if re.search(r"\$\w", whole):
        raise ValueError(f"expected a path, got {path!r}; write a variable as ${{NAME}}")
    return user_path(whole)


def user_path(path: str | os.PathLike[str]) -> str:
    """`path` with a leading `~` replaced by the home directory.

    Raises:
        ValueError: it is empty, or names variables or an unknown user.
    """
    text = os.fspath(path)
    if not text:
        raise ValueError("expected a path, got an empty text; write . for this directory")
    if re.search(r"\$(\w|\{\w+\})", text):
        raise ValueError(
            f"expected a path, got {text!r}, and variables are not filled in; write the path "
            "itself, with ~ for the home directory"
        )
    if not text.startswith("~"):
        return text
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise ValueError(
            f"expected a path, got {text!r}, which begins with the home of an unknown user; "
            "write ~/ for your own, or ./~ for a folder of that name"
        )
    return expanded
