"""Expands `~` in the paths of a config or an option, which no shell expands."""

from __future__ import annotations

import os
import re


def user_path(path: str | os.PathLike[str]) -> str:
    """`path` with a leading `~` replaced by the home directory.

    Raises:
        ValueError: it is empty, or names variables or an unknown user. Variables are not expanded:
            a stranger's config could put a secret of the environment into a path, and the run
            records its paths.
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
