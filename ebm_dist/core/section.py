"""Config sections, and registries of them for `make(name, **params)` and for YAML."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Generic, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationError,
    ValidationInfo,
)
from pydantic_core import CoreSchema, PydanticKnownError, core_schema, to_json

from ebm_dist.core.paths import config_path

UserPath = Annotated[str, AfterValidator(config_path)]
"""A path in a config: `~` is the home directory, `${NAME}` a variable's value."""


class Section(BaseModel):
    """A frozen part of the run's config, which refuses unknown keys."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        arbitrary_types_allowed=True,
        allow_inf_nan=False,
    )


T = TypeVar("T")
S = TypeVar("S", bound=Section)


class Family(Generic[T]):
    """A registry of named constructors of one kind: energies, samplers or objectives.

    A member is a `Section` with a `name: Literal["..."] = "..."` field and a `build`
    method that returns the object. Once registered, it is part of the Python API, the YAML config,
    the JSON schema and the protocol tests.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.members: dict[str, type[Section]] = {}

    def register(self, section: type[S]) -> type[S]:
        """Class decorator: add `section` under the default of its `name` field."""
        name = section.model_fields["name"].default
        if not isinstance(name, str) or name in self.members:
            raise ValueError(
                f"{self.kind}: {section.__name__} needs a name of its own, got {name!r}"
            )
        self.members[name] = section
        return section

    def section(self, name: str, **params: Any) -> Section:
        """The validated config of `name`; raises ValueError in one line."""
        if name not in self.members:
            raise ValueError(
                f"{self.kind}.name: unknown {name!r}{nearest(name, self.members)}; "
                f"known: {', '.join(sorted(self.members))}"
            )
        section = self.members[name]
        try:
            return section(**{"name": name, **params})
        except ValidationError as error:
            raise ValueError(
                "; ".join(f"{self.kind}.{line}" for line in one_line_each(error, section))
            ) from None

    def make(self, name: str, **params: Any) -> T:
        """Build `name` from its parameters; raises ValueError in one line."""
        section: Any = self.section(name, **params)
        return section.build()

    def union(self) -> Any:
        """The type of a config field that holds any member, told apart by `name`.

        Open: a section that is registered later, by a plugin, is a member as well.
        """
        return type(f"{self.kind}_section", (OneOf,), {"family": self})


class OneOf:
    """A field's type: one section of `family`, among those registered when a value is checked.

    A pydantic union is closed once its model is built. This looks `name` up for each value, and
    reports faults as a union that is told apart by `name` does.
    """

    family: ClassVar[Family[Any]]

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        def checked(strict: bool) -> CoreSchema:
            def check(value: Any, info: ValidationInfo) -> Section:
                return cls._checked(value, strict=strict, json=info.mode == "json")

            return core_schema.with_info_plain_validator_function(check)

        return core_schema.lax_or_strict_schema(checked(strict=False), checked(strict=True))

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        members = cls.family.members
        choices = {name: section.__pydantic_core_schema__ for name, section in members.items()}
        return handler(core_schema.tagged_union_schema(choices, discriminator="name"))

    @classmethod
    def _checked(cls, value: Any, *, strict: bool, json: bool) -> Section:
        if isinstance(value, Section):
            name = getattr(value, "name", None)
        elif not isinstance(value, dict):
            raise PydanticKnownError("model_attributes_type")
        elif "name" not in value:
            raise PydanticKnownError("union_tag_not_found", {"discriminator": "'name'"})
        else:
            name = value["name"]
        member = cls.family.members.get(name) if isinstance(name, str) else None
        if member is None:
            known = ", ".join(repr(name) for name in cls.family.members)
            context = {"discriminator": "'name'", "tag": str(name), "expected_tags": known}
            raise PydanticKnownError("union_tag_invalid", context)
        # In JSON's rules a list may fill a tuple, and JSON is what they are applied to.
        if json:
            return member.model_validate_json(to_json(value), strict=strict)
        return member.model_validate(value, strict=strict)


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the closest of `known`, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def one_line_each(error: ValidationError, section: type[BaseModel]) -> list[str]:
    """Each fault of `error` as `path: what was expected, what came`."""
    lines = []
    for fault in error.errors(include_url=False):
        path = ".".join(str(part) for part in fault["loc"]) or "(section)"
        if fault["type"] == "extra_forbidden":
            close = nearest(str(fault["loc"][-1]), section.model_fields)
            lines.append(f"{path}: unknown key{close}")
        else:
            came = "" if fault["type"] == "missing" else f", got {_short(fault['input'])}"
            lines.append(f"{path}: {fault['msg']}{came}")
    return lines


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
