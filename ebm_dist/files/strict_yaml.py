"""Strict YAML: scalars of YAML 1.2, no duplicate keys, and limits on depth and size."""

from __future__ import annotations

import math
import re
import reprlib
from typing import Any, cast

import yaml

from ebm_dist.core.errors import UserError

MAX_DEPTH = 32
"""Sections nest six levels deep; a deeper file than this is not a config."""
MAX_NODES = 100_000


class ConfigLoader(yaml.SafeLoader):
    """Loads YAML with the scalars of version 1.2 and without duplicate keys.

    PyYAML reads version 1.1, where `1e-4` is a string, `off` and `no` are booleans, `1:30` is 90
    and `012` is 10. In a config, each of these means something else.
    """

    num_nodes = 0
    num_merged = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        # Counted at the start of a node: parsing a mebibyte of brackets to its end takes a minute.
        self.num_nodes += 1
        if self.num_nodes > MAX_NODES:
            raise yaml.YAMLError(f"more than {MAX_NODES} values, so not a config")
        return super().compose_node(parent, index)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (LookupError, ValueError, TypeError, AttributeError, OverflowError):
            # The text does not fit its tag, such as !!bool.
            raise yaml.constructor.ConstructorError(
                None, None, f"{short(node.value)} is no value of {node.tag!r}", node.start_mark
            ) from None

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """As in PyYAML, with a limit: merges copy keys, so nested merges grow exponentially."""
        for key, value in node.value:
            if key.tag != "tag:yaml.org,2002:merge":
                continue
            for source in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                if isinstance(source, yaml.MappingNode):
                    self.flatten_mapping(source)
                    self.num_merged += len(source.value)
                if self.num_merged > MAX_NODES:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"merges more than {MAX_NODES} values", key.start_mark
                    )
        super().flatten_mapping(node)


_SCALARS = [
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
]
ConfigLoader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in _SCALARS:
    ConfigLoader.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), list(_first))
ConfigLoader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile(r"<<\Z"), ["<"])


def _construct_int(loader: ConfigLoader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    digits = text.lstrip("+-")
    if len(digits) > 100:
        raise yaml.constructor.ConstructorError(
            None, None, f"a number of {len(digits)} digits is too long", node.start_mark
        )
    return int(text, 0) if digits[:2] in ("0x", "0o") else int(text)


def _construct_mapping(loader: ConfigLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[str] = set()
    for key, _ in node.value:
        name = key.value if isinstance(key, yaml.ScalarNode) else None
        if name is None or key.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
            raise yaml.constructor.ConstructorError(
                None, None, f"key {name or '(a list or section)'} must be text", key.start_mark
            )
        if name in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"key {name!r} comes twice; keep one of them", key.start_mark
            )
        seen.add(name)
    loader.flatten_mapping(node)
    return {
        loader.construct_object(key): loader.construct_object(value, deep=True)
        for key, value in node.value
    }


def _construct_foreign(loader: ConfigLoader, node: yaml.Node) -> Any:
    raise yaml.constructor.ConstructorError(
        None, None, f"tag {node.tag!r} is not read from a config", node.start_mark
    )


# Dates, sets and bytes have no place in a config.
ConfigLoader.yaml_constructors = {
    tag: constructor
    for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
    if tag and tag.rpartition(":")[2] in ("null", "bool", "int", "float", "str", "seq", "map")
}
ConfigLoader.add_constructor("tag:yaml.org,2002:int", _construct_int)
ConfigLoader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)
# None stands for every tag that has no constructor.
ConfigLoader.add_constructor(cast(str, None), _construct_foreign)


class _ConfigDumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or 1.2 would read as another type."""


for _tag, _pattern, _first in _SCALARS:
    _ConfigDumper.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), list(_first))


def read_yaml(text: str) -> Any:
    """Parse `text`; raises UserError in one line that names the line and column."""
    try:
        value = yaml.load(text, Loader=ConfigLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        what = " ".join(str(error.problem or error.context or error).split())
        raise UserError(f"{place}not valid YAML here: {what}") from None
    except yaml.YAMLError as error:
        raise UserError(f"not valid YAML: {' '.join(str(error).split())}") from None
    except (RecursionError, ValueError, OverflowError):
        raise UserError("not valid YAML for a config: nested too deep or a bad number") from None
    if not _is_reasonable(value):
        raise UserError(
            f"not a config: deeper than {MAX_DEPTH} sections or more than {MAX_NODES} values"
        )
    return value


def write_yaml(value: Any) -> str:
    """`value`, of plain types, as YAML; `read_yaml` of the result equals `value`."""
    return yaml.dump(value, Dumper=_ConfigDumper, sort_keys=False, width=100)


_REPR = reprlib.Repr()
_REPR.maxstring = 60
_REPR.maxlevel = 2
_REPR.maxlong = 40
_REPR.maxother = 60


def short(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return _REPR.repr(value)


def _is_reasonable(value: Any) -> bool:
    """False if the value is too deep or too large, as a cycle or nested aliases make it."""
    budget = MAX_NODES

    def visit(here: Any, depth: int) -> bool:
        nonlocal budget
        budget -= 1
        if budget < 0 or depth > MAX_DEPTH:
            return False
        if isinstance(here, dict):
            return all(visit(item, depth + 1) for item in here.values())
        if isinstance(here, list):
            return all(visit(item, depth + 1) for item in here)
        return True

    return visit(value, 0)
