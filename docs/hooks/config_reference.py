"""Writes the config reference: every section and key, from the schema and the docstrings.

`page` needs no mkdocs, so that a test can look at it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ebm_dist.config import run_config

Schema = Mapping[str, Any]

HEAD = """\
# Config reference

Every section and key of a config, written by the build of these pages from the schema
(`ebm-dist config schema`) and the docstrings. [Writing a config](../config.md) says how a file
and the command line are put together. A key with neither a default nor *required* is filled in by
the run or left out, as its text says.
"""


def page() -> str:
    """The reference as Markdown."""
    schema = run_config.schema()
    lines = [HEAD]
    for name, section in schema["properties"].items():
        lines += [f"## {name} {{ #{name} }}", ""]
        lines += list(_section(name, section, schema["$defs"]))
    return "\n".join(lines) + "\n"


def _section(name: str, section: Schema, defs: Schema) -> Iterator[str]:
    """What one top-level key holds: one of a family, one section, a list of them, or a value."""
    members = section.get("discriminator", {}).get("mapping")
    if members:
        several = ", ".join(f"[`{member}`](#{name}-{member})" for member in members)
        yield from (f"One of: {several}.", "")
        for member, reference in members.items():
            yield from (f"### {name}.name: {member} {{ #{name}-{member} }}", "")
            yield from _keys(_named(reference, defs), defs)
        return
    reference = section.get("$ref") or section.get("items", {}).get("$ref")
    if reference is None:
        yield from (f"{_kind(section, defs).capitalize()}. {_prose(section['description'])}", "")
        return
    if "items" in section:
        yield from ("A list; each element has these keys.", "")
    yield from _keys(_named(reference, defs), defs)


def _keys(model: Schema, defs: Schema) -> Iterator[str]:
    yield from (_prose(model.get("description", "")), "")
    required = model.get("required", ())
    # What must be given first: sections begin with the keys that they share with others.
    for key, value in sorted(
        model.get("properties", {}).items(), key=lambda i: i[0] not in required
    ):
        if key == "name" and "const" in value:
            continue  # said by the heading
        if "$ref" in value and "properties" in (inner := _named(value["$ref"], defs)):
            yield f"- **`{key}`** (a section): {_prose(inner.get('description', ''))}"
            yield ""
            for name, part in inner["properties"].items():
                yield f"    - {_key(name, part, inner, defs)}"
        else:
            yield f"- {_key(key, value, model, defs)}"
    yield ""


def _key(name: str, value: Schema, model: Schema, defs: Schema) -> str:
    about = [_kind(value, defs)]
    if name in model.get("required", ()):
        about.append("required")
    elif value.get("default") is not None:
        about.append(f"default `{_shown(value['default'])}`")
    text = _prose(value.get("description", ""))
    return f"**`{name}`** ({', '.join(about)})" + (f": {text}" if text else "")


def _named(reference: str, defs: Schema) -> Schema:
    return defs[reference.rpartition("/")[2]]


LIMITS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
WORDS = {"boolean": "true or false", "object": "a mapping", "string": "text", "null": "null"}


def _kind(value: Schema, defs: Schema) -> str:
    """The type of a value, in words."""
    if "$ref" in value:
        return _kind(_named(value["$ref"], defs), defs)
    if "anyOf" in value:
        return " or ".join(dict.fromkeys(_kind(option, defs) for option in value["anyOf"]))
    if "const" in value:
        return f"`{_shown(value['const'])}`"
    if "enum" in value:
        return " or ".join(f"`{_shown(option)}`" for option in value["enum"])
    if "oneOf" in value:
        return "a section with a `name`"
    kind = value.get("type")
    if kind == "array":
        if "prefixItems" in value:
            parts = ", ".join(_kind(part, defs) for part in value["prefixItems"])
            return f"[{parts}]"
        return f"a list of {_kind(value.get('items', {}), defs)}"
    if kind in ("integer", "number"):
        limits = {sign: value[key] for key, sign in LIMITS.items() if key in value}
        shown = [
            f"{sign} {limit:,}".removesuffix(".0")
            for sign, limit in limits.items()
            if limit < 2**62
        ]
        return " ".join([kind, " and ".join(shown)]).strip()
    return WORDS.get(str(kind), "a value")


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


_CODE = re.compile(r"(`[^`]*`)")


def _prose(text: str) -> str:
    """A docstring on one line, with what Markdown would read as markup escaped."""
    parts = _CODE.split(" ".join(text.split()))
    return "".join(
        part if part.startswith("`") else re.sub(r"([*<\[\]|])", r"\\\1", part) for part in parts
    )
