"""A config as the user wrote it: strict YAML, overrides, faults in the path of the user's file."""

from __future__ import annotations

import json
import math
import re
import reprlib
import types
from collections.abc import Iterable
from typing import Annotated, Any, Union, cast, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from ebm_dist.errors import UserError
from ebm_dist.section import nearest

MAX_DEPTH = 32
"""Sections nest six deep; a file deeper than this is not a config."""
MAX_NODES = 100_000


class ConfigLoader(yaml.SafeLoader):
    """YAML with the scalars of version 1.2, in which a key may come once.

    PyYAML reads version 1.1: `1e-4` is a string, `off` and `no` are booleans, `1:30` is 90
    and `012` is 10. Each of these has a config value that means something else.
    """


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


ConfigLoader.add_constructor("tag:yaml.org,2002:int", _construct_int)
ConfigLoader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)
# None stands for every tag that has no constructor.
ConfigLoader.add_constructor(cast(str, None), _construct_foreign)


class _ConfigDumper(yaml.SafeDumper):
    """Quotes what either version of YAML would read as something other than text."""


for _tag, _pattern, _first in _SCALARS:
    _ConfigDumper.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), list(_first))


def read_yaml(text: str) -> Any:
    """The value that `text` holds; raises UserError in one line with the place."""
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
    """`value` of plain types as YAML that `read_yaml` reads back equal."""
    return yaml.dump(value, Dumper=_ConfigDumper, sort_keys=False, width=100)


def apply_override(data: dict[str, Any], override: str) -> dict[str, Any]:
    """`data` with `a.b=value` set, `value` read as YAML; the input is left alone."""
    key, equals, text = override.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise UserError(
            f"override {_short(override)}: expected KEY.SUB=VALUE, such as run.steps=100 "
            "(no spaces around the sign, or the whole of it in quotes)"
        )
    try:
        value = read_yaml(text)
    except UserError as error:
        raise UserError(f"override {key}: {error}") from None
    return _with(data, path, value, key)


def _with(data: dict[str, Any], path: list[str], value: Any, key: str) -> dict[str, Any]:
    if len(path) == 1:
        return {**data, path[0]: value}
    inner = data.get(path[0])
    if inner is None:
        inner = {}
    if not isinstance(inner, dict):
        raise UserError(
            f"override {key}: {path[0]!r} is the value {_short(inner)}, not a section; "
            "set it whole or leave out what follows the dot"
        )
    return {**data, path[0]: _with(inner, path[1:], value, key)}


def validate(model: type[BaseModel], data: dict[str, Any]) -> Any:
    """`model` built from plain `data`, types taken strictly.

    Strict, so that `steps: true` is not 1 and `lr: "fast"` not parsed; JSON's rules, so
    that a list may fill a tuple and 1 a float. A float without a fraction may fill an
    integer: `capacity: 1e6` is how people write it.

    Raises:
        UserError: one line for every fault, each beginning with the key's path.
    """
    try:
        text = json.dumps(data)
    except (TypeError, ValueError) as error:
        raise UserError(f"not a config of plain values: {error}") from None
    try:
        return model.model_validate_json(text, strict=True)
    except ValidationError as error:
        if not all(_is_forgiven(fault) for fault in error.errors(include_url=False)):
            raise UserError("\n".join(faults(error, model, data))) from None
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        raise UserError("\n".join(faults(error, model, data))) from None


def _is_forgiven(fault: Any) -> bool:
    """Strict rules refuse it, and the looser ones of the second pass read it rightly."""
    value = fault["input"]
    if fault["type"] == "tuple_type":
        # Behind a `before` validator pydantic no longer knows that the list came from JSON.
        return isinstance(value, list)
    return fault["type"] == "int_type" and isinstance(value, float) and value.is_integer()


def faults(error: ValidationError, model: type[BaseModel], data: Any) -> list[str]:
    """Each fault as `path: what was expected, what came`, in the path of the user's file."""
    by_path: dict[tuple[str, ...], list[str]] = {}
    across: list[str] = []
    for fault in error.errors(include_url=False):
        if _is_forgiven(fault):
            continue
        path = _user_path(fault["loc"], data)
        if fault["type"] == "value_error" and not path:
            # A check across sections: each of its lines brings its own path.
            across += fault["msg"].removeprefix("Value error, ").splitlines()
            continue
        if fault["type"].startswith("union_tag"):
            path += ("name",)
        text = " ".join(_text(fault, path, model, data).split())
        texts = by_path.setdefault(path, [])
        if text not in texts:
            texts.append(text)
    lines = [f"{'.'.join(path) or '(file)'}: {_join(texts)}" for path, texts in by_path.items()]
    return lines + across


def _join(texts: list[str]) -> str:
    # Branches of a union fail one by one; the user wrote one value.
    if len(texts) > 1 and all(text.startswith("expected ") for text in texts):
        wanted = [text.removeprefix("expected ").rpartition(", got ")[0] for text in texts]
        return f"expected {' or '.join(wanted)}, got {texts[0].rpartition(', got ')[2]}"
    return "; ".join(texts)


def _user_path(loc: tuple[str | int, ...], data: Any) -> tuple[str, ...]:
    """`loc` without the union tags and branch names that pydantic puts between the keys."""
    path: list[str] = []
    here = data
    for index, part in enumerate(loc):
        last = index == len(loc) - 1
        if isinstance(here, dict) and part in here:
            # The tag of a union follows the key that holds it.
            path.append(str(part))
            here = here[part]
        elif isinstance(part, int) and isinstance(here, list):
            path.append(str(part))
            here = here[part] if part < len(here) else None
        elif last and isinstance(here, dict) and here.get("name") != part and _is_key(part):
            path.append(str(part))
    return tuple(path)


def _is_key(part: str | int) -> bool:
    return isinstance(part, str) and part.isidentifier()


_WORDS = [
    ("Input should be ", "expected "),
    ("a valid integer, got a number with a fractional part", "a whole number"),
    ("a valid integer", "a whole number"),
    ("a valid number", "a number"),
    ("a finite number", "a finite number"),
    ("a valid string", "text"),
    ("a valid boolean", "true or false"),
    ("a valid array", "a list"),
    ("a valid tuple", "a list"),
    ("a valid list", "a list"),
    ("a valid dictionary", "a section of keys"),
    ("an object", "a section of keys"),
]


def _text(fault: Any, path: tuple[str, ...], model: type[BaseModel], data: Any) -> str:
    kind, value = fault["type"], fault["input"]
    if kind == "extra_forbidden":
        return f"unknown key{_suggestion(path, model, data)}"
    if kind == "missing":
        fields = [m.model_fields.get(path[-1]) for m in models_at(model, path[:-1], data)]
        about = next((field.description for field in fields if field), None)
        return "missing; add it" + (f": {_first_sentence(about)}" if about else "")
    if kind.startswith("union_tag"):
        known = sorted(name for m in models_at(model, path[:-1], {}) for name in _names(m))
        if kind == "union_tag_not_found":
            return f"missing; add one of {', '.join(known)}"
        tag = str(fault["ctx"]["tag"])
        return f"{_short(tag)} is unknown{nearest(tag, known)}; known: {', '.join(known)}"
    if kind in ("model_type", "model_attributes_type", "dict_type", "dataclass_type"):
        return f"expected a section of keys and values, got {_short(value)}"
    message = str(fault["msg"])
    if kind in ("value_error", "assertion_error"):
        return message.removeprefix("Value error, ").removeprefix("Assertion failed, ")
    for theirs, ours in _WORDS:
        message = message.replace(theirs, ours)
    return f"{message}, got {_short(value)}"


def _names(model: type[BaseModel]) -> list[str]:
    field = model.model_fields.get("name")
    return [str(arg) for arg in get_args(field.annotation)] if field else []


def _suggestion(path: tuple[str, ...], model: type[BaseModel], data: Any) -> str:
    word = path[-1]
    known = sorted({key for m in models_at(model, path[:-1], data) for key in m.model_fields})
    if close := nearest(word, known):
        return close
    for section, field in model.model_fields.items():
        for inner in _models(field.annotation):
            if word in inner.model_fields and section != path[0]:
                return f"; did you mean {section}.{word}?"
    return f"; known: {', '.join(known)}" if known else ""


def models_at(model: type[BaseModel], path: Iterable[str], data: Any) -> list[type[BaseModel]]:
    """The sections that may stand at `path` of a `model`, chosen by `name` where data has one."""
    here = [model]
    for part in path:
        data = data.get(part) if isinstance(data, dict) else None
        found: list[type[BaseModel]] = []
        for owner in here:
            field = owner.model_fields.get(part)
            found += _models(field.annotation) if field else []
        name = data.get("name") if isinstance(data, dict) else None
        named = [m for m in found if name in _names(m)]
        here = named or found
    return here


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    origin = get_origin(annotation)
    if origin is Annotated:
        return _models(get_args(annotation)[0])
    if origin in (Union, types.UnionType, list, tuple):
        return [model for arg in get_args(annotation) for model in _models(arg)]
    return []


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=[.;])\s", " ".join(text.split()))[0].rstrip(".;")


_REPR = reprlib.Repr()
_REPR.maxstring = 60
_REPR.maxlevel = 2
_REPR.maxlong = 40
_REPR.maxother = 60


def _short(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return _REPR.repr(value)


def _is_reasonable(value: Any) -> bool:
    """False where aliases make a cycle, or a small file that unfolds into a giant one."""
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
