"""Config sections, and registries of them for `make(name, **params)` and for YAML."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Annotated, Any, Generic, TypeVar, Union

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from ebm_dist.core.paths import user_path

UserPath = Annotated[str, AfterValidator(user_path)]
"""A path in a config: `~` is the home directory."""


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
        """The type of a config field that holds any member, discriminated by `name`."""
        members = tuple(self.members.values())
        if len(members) == 1:
            return members[0]
        return Annotated[Union[members], Field(discriminator="name")]  # noqa: UP007


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
