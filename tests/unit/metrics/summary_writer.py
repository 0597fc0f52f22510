"""A stand-in for TensorBoard's SummaryWriter, whose package the tests do not install.

It takes the arguments that torch's own takes, which it reads from torch's source: importing that
needs the package. It checks the values that TensorBoard would refuse, and keeps the calls.
"""

from __future__ import annotations

import ast
import importlib.util
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np


@cache
def methods() -> dict[str, ast.arguments]:
    """The arguments of each method of torch's class."""
    found = importlib.util.find_spec("torch")
    assert found is not None
    assert found.origin is not None
    path = Path(found.origin).parent / "utils" / "tensorboard" / "writer.py"
    classes = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)]
    (writer,) = [node for node in classes if node.name == "SummaryWriter"]
    return {node.name: node.args for node in writer.body if isinstance(node, ast.FunctionDef)}


def bound(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The call's arguments by name; fails where torch's method would raise a TypeError."""
    names = [argument.arg for argument in methods()[name].args][1:]  # without self
    assert len(args) <= len(names), (name, args)
    given = dict(zip(names, args))
    assert not given.keys() & kwargs.keys(), (name, kwargs)
    assert kwargs.keys() <= set(names), (name, kwargs)
    given |= kwargs
    required = names[: len(names) - len(methods()[name].defaults)]
    assert set(required) <= given.keys(), (name, given)
    return given


class SummaryWriter:
    """Keeps (step, value) by tag in `made`, one dictionary for each writer."""

    made: list[SummaryWriter] = []  # noqa: RUF012

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.given = bound("__init__", args, kwargs)
        self.scalars: dict[str, list[tuple[int, float]]] = {}
        self.images: dict[str, np.ndarray] = {}
        self.histograms: dict[str, dict[str, Any]] = {}
        self.texts: dict[str, str] = {}
        self.is_closed = False
        self.made.append(self)

    def add_scalar(self, *args: Any, **kwargs: Any) -> None:
        given = bound("add_scalar", args, kwargs)
        value = given["scalar_value"]
        assert isinstance(value, int | float)
        self.scalars.setdefault(given["tag"], []).append((given["global_step"], value))

    def add_image(self, *args: Any, **kwargs: Any) -> None:
        given = bound("add_image", args, kwargs)
        picture = given["img_tensor"]
        assert given["dataformats"] == "HWC"
        assert picture.ndim == 3
        assert picture.shape[2] == 3
        assert picture.dtype == np.uint8
        self.images[given["tag"]] = picture

    def add_histogram_raw(self, *args: Any, **kwargs: Any) -> None:
        given = bound("add_histogram_raw", args, kwargs)
        assert len(given["bucket_limits"]) == len(given["bucket_counts"])
        assert math.isclose(sum(given["bucket_counts"]), given["num"])
        self.histograms[given["tag"]] = given

    def add_text(self, *args: Any, **kwargs: Any) -> None:
        given = bound("add_text", args, kwargs)
        self.texts[given["tag"]] = given["text_string"]

    def close(self) -> None:
        self.is_closed = True
