"""Config text: overrides, plain values, strict validation, and errors by the key's path."""

from __future__ import annotations

import json
import os
import re
import types
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from ebm_dist.core.errors import UserError
from ebm_dist.core.plugins import plugin_hint
from ebm_dist.core.section import OneOf, nearest
from ebm_dist.files.strict_yaml import MAX_DEPTH, read_yaml, short

MAX_FAULTS = 50


def apply_override(
    data: dict[str, Any], override: str, model: type[BaseModel] | None = None
) -> dict[str, Any]:
    """`data` with `a.b=value` set, where `value` is YAML; the input is not changed.

    A number in the path names an element of a list, counted from 0. Where `data` leaves the list
    out, it is the default of `model`.

    If `model` accepts only text at that key, a number stays text as written: the name of a run may
    be a date, a job id or a commit, and `007` and `1e5` must not become 7 and 100000.
    """
    key, equals, text = override.partition("=")
    path = key.strip().split(".")
    if len(path) > MAX_DEPTH:
        raise UserError(f"override {short(key)}: deeper than {MAX_DEPTH} sections")
    if not equals or not all(path):
        raise UserError(
            f"override {short(override)}: expected KEY.SUB=VALUE, such as run.steps=100 "
            "(no spaces around the sign, or the whole of it in quotes)"
        )
    try:
        value = read_yaml(text)
    except UserError as error:
        raise UserError(f"override {key}: {error}") from None
    if model:
        data = _with_default_lists(data, path, model, key)
        if isinstance(value, bool | int | float) and _takes_text(model, path, data):
            value = text.strip()
    return _with(data, path, value, key)


def _takes_text(model: type[BaseModel], path: list[str], data: Any) -> bool:
    kinds = [kind for field in _fields_at(model, path, data) for kind in _kinds(field.annotation)]
    if not kinds and len(path) > 1 and path[-1].isdecimal():
        lists = (
            k for field in _fields_at(model, path[:-1], data) for k in _kinds(field.annotation)
        )
        kinds = [kind for arg in lists for item in get_args(arg) for kind in _kinds(item)]
    return str in kinds and not {bool, int, float}.intersection(kinds)


def _fields_at(model: type[BaseModel], path: list[str], data: Any) -> list[FieldInfo]:
    owners = models_at(model, path[:-1], data)
    return [owner.model_fields[path[-1]] for owner in owners if path[-1] in owner.model_fields]


def _with_default_lists(
    data: dict[str, Any], path: list[str], model: type[BaseModel], key: str
) -> dict[str, Any]:
    """`data` with the default of a list, an element of which `path` names."""
    here: Any = data
    for depth, part in enumerate(path[:-1], 1):
        here = here.get(part) if isinstance(here, dict) else None
        if here is None and path[depth].isdecimal():
            for field in _fields_at(model, path[:depth], data):
                if isinstance(field.default, tuple):
                    return _with(data, path[:depth], list(field.default), key)
    return data


def _kinds(annotation: Any) -> list[Any]:
    """The member types of a union, without their `Annotated` metadata."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _kinds(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [kind for arg in get_args(annotation) for kind in _kinds(arg)]
    return [annotation]


def _with(data: Any, path: list[str], value: Any, key: str) -> Any:
    """`data`, a section or a list, with `value` at `path`."""
    part = path[0]
    if isinstance(data, list):
        if not part.isdecimal() or int(part) >= len(data):
            raise UserError(
                f"override {key}: expected the number of an element in place of {short(part)}, "
                f"from 0, of a list of {len(data)}; or set the list whole, as KEY=[1, 2]"
            )
        index = int(part)
        return [*data[:index], _within(data[index], path, value, key), *data[index + 1 :]]
    return {**data, part: _within(data.get(part), path, value, key)}


def _within(inner: Any, path: list[str], value: Any, key: str) -> Any:
    part, *rest = path
    if not rest:
        return value
    if inner is None:
        inner = {}
    if not isinstance(inner, dict | list):
        raise UserError(
            f"override {key}: {part!r} is the value {short(inner)}, not a section; "
            "set it whole or leave out what follows the dot"
        )
    return _with(inner, rest, value, key)


def without_empty(data: Any, models: Iterable[type[BaseModel]]) -> Any:
    """`data` without its empty sections: YAML reads null where all keys are commented out.

    Args:
        models: the section types that `data` may be of.
    """
    if isinstance(data, list):
        return [without_empty(item, models) for item in data]
    if not isinstance(data, dict):
        return data
    models = _named(models, data)
    kept = {}
    for key, value in data.items():
        fields = [model.model_fields[key] for model in models if key in model.model_fields]
        if value is not None:
            inner = [found for field in fields for found in _models(field.annotation)]
            kept[key] = without_empty(value, inner)
        elif not fields or not all(_is_section(field.annotation) for field in fields):
            kept[key] = None
    return kept


def _is_section(annotation: Any) -> bool:
    """Whether a field holds a section, a list of sections or free keys, and may not be null."""
    return types.NoneType not in _kinds(annotation) and (
        bool(_models(annotation)) or get_origin(annotation) is dict
    )


def validate(model: type[BaseModel], data: dict[str, Any]) -> Any:
    """`model` built from plain `data`, with strict types.

    Types are strict, so `steps: true` is not 1 and text is not parsed as a number. The rules of
    JSON apply, so a list may fill a tuple and 1 may fill a float. A whole float may fill an
    integer, since people write `capacity: 1e6`.

    Raises:
        UserError: one line for every fault, each beginning with the key's path.
    """
    data = plain(data)
    text = json.dumps(data)
    try:
        return model.model_validate_json(text, strict=True)
    except ValidationError as error:
        if not all(_is_forgiven(fault) for fault in error.errors(include_url=False)):
            raise UserError(*faults(error, model, data)) from None
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        raise UserError(*faults(error, model, data)) from None


def plain(value: Any, path: tuple[str, ...] = ()) -> Any:
    """Convert `value` to JSON types: paths become text, numpy values become numbers and lists.

    Raises:
        UserError: a value cannot be converted or a key is not text; the line names its path.
    """
    where = ".".join(path) or "(file)"
    if len(path) > MAX_DEPTH:
        raise UserError(f"{where}: deeper than {MAX_DEPTH} sections")
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise UserError(f"{where}: the key {short(key)} must be text, such as 'steps'")
        return {key: plain(item, (*path, key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, (*path, str(index))) for index, item in enumerate(value)]
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if hasattr(value, "tolist"):
        return plain(value.tolist(), path)
    if isinstance(value, str):
        # No path, name or address can hold them, and the system's own error would not name the key.
        if "\0" in value or any("\ud800" <= c <= "\udfff" for c in value):
            raise UserError(f"{where}: {short(value)} holds a NUL or a surrogate; take it out")
        return value
    if value is None or isinstance(value, bool | int | float):
        return value
    raise UserError(
        f"{where}: expected a plain value (text, number, true, false, null, list or section), got "
        f"a {type(value).__name__}"
    )


def _is_forgiven(fault: Any) -> bool:
    """Whether the strict rules refuse a value that the lax second pass converts correctly."""
    value = fault["input"]
    if fault["type"] == "tuple_type":
        # After a `before` validator pydantic has lost the fact that the list came from JSON.
        return isinstance(value, list)
    return fault["type"] == "int_type" and isinstance(value, float) and value.is_integer()


def faults(error: ValidationError, model: type[BaseModel], data: Any) -> list[str]:
    """Each fault as `path: what was expected, what came`, with the path in the user's file."""
    by_path: dict[tuple[str, ...], list[str]] = {}
    across: list[str] = []
    found = [fault for fault in error.errors(include_url=False) if not _is_forgiven(fault)]
    # Limited because each suggestion searches all keys, and nobody reads 100,000 lines.
    for fault in found[:MAX_FAULTS]:
        path = _user_path(fault["loc"], data)
        if fault["type"] == "value_error" and not path:
            # A check across sections; each of its lines includes its path.
            across += fault["msg"].removeprefix("Value error, ").splitlines()
            continue
        if fault["type"].startswith("union_tag"):
            path += ("name",)
        text = " ".join(_text(fault, path, model, data).split())
        texts = by_path.setdefault(path, [])
        if text not in texts:
            texts.append(text)
    lines = [f"{'.'.join(path) or '(file)'}: {_join(texts)}" for path, texts in by_path.items()]
    if len(found) > MAX_FAULTS:
        across.append(f"(file): {len(found) - MAX_FAULTS} more faults; mend these first")
    return lines + across


def _join(texts: list[str]) -> str:
    # Each branch of a union reports a fault; they become one line, as the user wrote one value.
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
            # pydantic puts the tag of a union after the key that holds the union.
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
        hint = plugin_hint(data.get("plugins"))
        return f"{short(tag)} is unknown{nearest(tag, known)}; known: {', '.join(known)}{hint}"
    if kind in ("model_type", "model_attributes_type", "dict_type", "dataclass_type"):
        return f"expected a section of keys and values, got {short(value)}"
    message = str(fault["msg"])
    if kind in ("value_error", "assertion_error"):
        return message.removeprefix("Value error, ").removeprefix("Assertion failed, ")
    for theirs, ours in _WORDS:
        message = message.replace(theirs, ours)
    hint = "; put it in quotes" if kind == "string_type" and isinstance(value, int | float) else ""
    return f"{message}, got {short(value)}{hint}"


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
    """The section types allowed at `path` of `model`, narrowed by `name` where `data` has one."""
    here = [model]
    for part in path:
        if isinstance(data, list):  # `here` are the types of its elements
            data = data[int(part)] if part.isdecimal() and int(part) < len(data) else None
        else:
            data = data.get(part) if isinstance(data, dict) else None
            fields = (owner.model_fields.get(part) for owner in here)
            here = [model for field in fields if field for model in _models(field.annotation)]
        here = _named(here, data)
    return here


def _named(models: Iterable[type[BaseModel]], data: Any) -> list[type[BaseModel]]:
    """Those of `models` that the `name` in `data` names; all of them where it names none."""
    name = data.get("name") if isinstance(data, dict) else None
    models = list(models)
    return [model for model in models if name in _names(model)] or models


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if isinstance(annotation, type) and issubclass(annotation, OneOf):
        return list(annotation.family.members.values())
    origin = get_origin(annotation)
    if origin is Annotated:
        return _models(get_args(annotation)[0])
    if origin in (Union, types.UnionType, list, tuple):
        return [model for arg in get_args(annotation) for model in _models(arg)]
    return []


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=[.;])\s", " ".join(text.split()))[0].rstrip(".;")
