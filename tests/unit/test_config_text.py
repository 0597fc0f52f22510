"""The text side of the config: scalars, overrides, and faults in the user's own path."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from ebm_dist.config import text as config_text
from ebm_dist.core.errors import UserError
from ebm_dist.core.section import Section
from ebm_dist.files import strict_yaml


class Fast(Section):
    name: Literal["fast"] = "fast"
    step_size: PositiveFloat
    """In squared data units. The second sentence is not shown."""
    temperature: PositiveFloat | None = None

    @model_validator(mode="after")
    def _cold(self) -> Fast:
        if self.temperature == 13:
            raise ValueError("temperature 13 is unlucky; choose another")
        return self


class Slow(Section):
    name: Literal["slow"] = "slow"
    num_steps: PositiveInt = 3


class Tool(Section):
    width: PositiveInt = 4
    shape: tuple[int, int] | None = None
    threads: PositiveInt | Literal["auto"] = "auto"
    verbose: bool = False
    rate: float = 0.1
    levels: tuple[float, ...] = (1.0,)
    label: str | None = None
    tag: Annotated[str, Field(max_length=9)] | None = None

    @field_validator("levels", mode="before")
    @classmethod
    def _read(cls, value):
        return value


class Root(Section):
    sampler: Annotated[Fast | Slow, Field(discriminator="name")] = Slow()
    tool: Tool = Tool()

    @model_validator(mode="after")
    def _cross(self) -> Root:
        if self.tool.width == 99:
            raise ValueError("tool.width: 99 is refused\ntool.rate: this one too")
        return self


def fails(text: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        config_text.validate(Root, strict_yaml.read_yaml(text))
    return str(caught.value).splitlines()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E3", 1000.0),
        ("-1.5e+2", -150.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("12", 12),
        ("012", 12),
        ("0x10", 16),
        ("1:30", "1:30"),
        ("off", "off"),
        ("no", "no"),
        ("true", True),
        ("null", None),
        ("~", None),
        ("", None),
        ("2020-01-01", "2020-01-01"),
        ("e5", "e5"),
        ("[1, 1e-3]", [1, 1e-3]),
        ("{a: off}", {"a": "off"}),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text, value):
    read = strict_yaml.read_yaml(text)
    assert read == value
    assert type(read) is type(value)


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
    | st.sampled_from(["off", "no", "1e-4", "1:30", "0o7", "~", "<<", "=", "2020-01-01", ".5"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=12,
)


@given(plain)
def test_what_is_written_reads_back_equal(value):
    assert strict_yaml.read_yaml(strict_yaml.write_yaml(value)) == value


@pytest.mark.parametrize(
    "text",
    [
        "a: 1\na: 2",
        "a: {b: 1, b: 2}",
        "a: [",
        "a: b: c",
        "\t- a",
        "1: x",
        "[a]: x",
        "a: !!python/object/apply:os.system [echo]",
        "a: !mine 3",
        "a: &a {b: *a}",
        "a: *nowhere",
        "x: \x00",
        "a: " + "9" * 5000,
        "a: " + "[" * 500 + "]" * 500,
        "a: 1\n---\na: 2",
        "a: !!bool maybe",
        "a: !!int ''",
        "a: !!float ''",
        "a: !!map x",
        "a: !!timestamp x",
        "a: !!set {b}",
        "a: &a {<<: [*a, *a]}",
    ],
)
def test_bad_yaml_is_one_line(text):
    with pytest.raises(UserError) as caught:
        strict_yaml.read_yaml(text)
    assert "\n" not in str(caught.value)


def test_aliases_that_unfold_into_gigabytes_are_refused_at_once():
    rows = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    rows += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    start = time.perf_counter()
    with pytest.raises(UserError, match="more than"):
        strict_yaml.read_yaml("\n".join(rows))
    assert time.perf_counter() - start < 5


def test_merges_that_unfold_into_gigabytes_are_refused_at_once():
    rows = ["a0: &a0 {x: 1, y: 2, z: 3}"]
    rows += [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}" for i in range(1, 12)]
    with pytest.raises(UserError, match=r"line \d+, column 10: .*merges more than"):
        strict_yaml.read_yaml("\n".join(rows))


def test_merges_of_a_sane_size_are_read():
    text = "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: {<<: [*a, {y: 4, z: 5}]}"
    read = strict_yaml.read_yaml(text)
    assert read["b"] == {"x": 1, "y": 3}
    assert read["c"] == {"x": 1, "y": 2, "z": 5}


def test_a_file_of_too_many_values_is_not_read_to_its_end(monkeypatch):
    monkeypatch.setattr(strict_yaml, "MAX_NODES", 100)
    with pytest.raises(UserError, match="more than 100 values"):
        strict_yaml.read_yaml("[" + "x, " * 200 + "[")  # the end would be no YAML


def test_of_ten_thousand_faults_the_first_are_told_and_the_rest_counted():
    with pytest.raises(UserError) as caught:
        config_text.validate(Root, {f"key{i}": 1 for i in range(10_000)})
    lines = str(caught.value).splitlines()
    assert len(lines) == config_text.MAX_FAULTS + 1
    assert lines[-1] == f"(file): {10_000 - config_text.MAX_FAULTS} more faults; mend these first"


def test_a_number_on_the_command_line_is_text_where_only_text_is_taken():
    def read(override: str) -> Any:
        return config_text.apply_override({}, override, Root)

    for text in ("20241128", "1e5", "3e12345", "007", "true"):
        assert read(f"tool.label={text}") == {"tool": {"label": text}}
        assert read(f"tool.tag={text}") == {"tool": {"tag": text}}
    assert read("tool.label=null") == {"tool": {"label": None}}
    assert read("tool.width=007") == {"tool": {"width": 7}}
    assert read("tool.threads=007") == {"tool": {"threads": 7}}


def test_a_number_in_a_file_where_text_belongs_is_told_to_be_quoted():
    (line,) = fails("{tool: {label: 007}}")
    assert line == "tool.label: expected text, got 7; put it in quotes"
    config_text.validate(Root, strict_yaml.read_yaml("{tool: {label: '007'}}"))


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (np.int64(3), 3),
        (np.float32(0.5), 0.5),
        (np.bool_(True), True),
        (np.arange(3), [0, 1, 2]),
        (torch.tensor([0.5]), [0.5]),
        (Path("runs"), "runs"),
        ((1, {"a": np.int8(1)}), [1, {"a": 1}]),
    ],
)
def test_values_of_numpy_and_pathlib_become_plain(value, plain):
    read = config_text.plain({"key": value})
    assert read == {"key": plain}
    assert type(read["key"]) is type(plain)


def nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(depth):
        value = {"a": value}
    return value


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({3: 4}, r"^\(file\): the key 3 must be text"),
        ({"tool": {None: 4}}, r"^tool: the key null must be text"),
        ({"tool": {"width": {1, 2}}}, r"^tool.width: expected a plain value .* got a set"),
        ({"tool": {"label": b"x"}}, r"^tool.label: expected a plain value .* got a bytes"),
        ({"tool": {"label": "a\0b"}}, r"^tool.label: 'a\\x00b' holds a NUL"),
        ({"tool": [{"label": "\ud800"}]}, r"^tool.0.label: .* holds a NUL or a surrogate"),
        (nested(5000), r"^a\.a\.a.*deeper than 32 sections"),
    ],
)
def test_a_value_that_is_not_plain_is_named(value, says):
    with pytest.raises(UserError, match=says):
        config_text.validate(Root, value)


def test_a_duplicate_key_names_its_line():
    with pytest.raises(UserError, match=r"line 2, column 1: .*'a' comes twice"):
        strict_yaml.read_yaml("a: 1\na: 2")


def test_overrides_set_nested_keys_and_leave_the_input_alone():
    data = {"a": {"b": 1, "c": 2}}
    assert config_text.apply_override(data, "a.b=1e-4") == {"a": {"b": 1e-4, "c": 2}}
    assert config_text.apply_override(data, "x.y.z=[1, 2]")["x"] == {"y": {"z": [1, 2]}}
    assert config_text.apply_override(data, "a={b: off}")["a"] == {"b": "off"}
    assert config_text.apply_override(data, "a.b=x=y")["a"]["b"] == "x=y"
    assert data == {"a": {"b": 1, "c": 2}}


@pytest.mark.parametrize(
    "override", ["", "=1", "a", "a.=1", ".a=1", "a..b=1", "a=[", "n.b=1", "a" + ".a" * 5000 + "=1"]
)
def test_a_bad_override_is_named(override):
    with pytest.raises(UserError, match="override") as caught:
        config_text.apply_override({"n": 3}, override)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "{sampler: {name: fast, step_size: -1}}",
            "sampler.step_size: expected greater than 0, got -1",
        ),
        ("{sampler: {name: fast}}", "sampler.step_size: missing; add it: In squared data units"),
        (
            "{sampler: {name: fast, step_size: 1, temperatue: 1}}",
            "sampler.temperatue: unknown key; did you mean 'temperature'?",
        ),
        (
            "{sampler: {name: fats, step_size: 1}}",
            "sampler.name: 'fats' is unknown; did you mean 'fast'?; known: fast, slow",
        ),
        ("{sampler: {step_size: 1}}", "sampler.name: missing; add one of fast, slow"),
        (
            "{sampler: {name: fast, step_size: 1, temperature: 13}}",
            "sampler: temperature 13 is unlucky; choose another",
        ),
        ("{sampler: 5}", "sampler: expected a section of keys and values, got 5"),
        ("{sampler: null}", "sampler: expected a section of keys and values, got null"),
        ("{sampelr: {}}", "sampelr: unknown key; did you mean 'sampler'?"),
        ("{num_steps: 5}", "num_steps: unknown key; did you mean sampler.num_steps?"),
        ("{tool: {width: true}}", "tool.width: expected a whole number, got true"),
        ("{tool: {width: '4'}}", "tool.width: expected a whole number, got '4'"),
        ("{tool: {width: 4.5}}", "tool.width: expected a whole number, got 4.5"),
        ("{tool: {width: null}}", "tool.width: expected a whole number, got null"),
        ("{tool: {verbose: 1}}", "tool.verbose: expected true or false, got 1"),
        ("{tool: {rate: .nan}}", "tool.rate: expected a finite number, got nan"),
        ("{tool: {rate: -.inf}}", "tool.rate: expected a finite number, got -inf"),
        ("{tool: {shape: [1, x]}}", "tool.shape.1: expected a whole number, got 'x'"),
        ("{tool: {shape: [1]}}", "tool.shape.1: missing; add it"),
        ("{tool: {threads: many}}", "tool.threads: expected a whole number or 'auto', got 'many'"),
        ("{tool: 3}", "tool: expected a section of keys and values, got 3"),
    ],
)
def test_a_fault_is_one_line_in_the_path_of_the_file(text, line):
    assert fails(text) == [line]


def test_every_fault_has_its_own_line():
    text = "{sampler: {name: fast}, tool: {width: 0, colour: red}}"
    assert [line.split(":")[0] for line in fails(text)] == [
        "sampler.step_size",
        "tool.width",
        "tool.colour",
    ]
    assert fails("{tool: {width: 99}}") == [
        "tool.width: 99 is refused",
        "tool.rate: this one too",
    ]


def test_a_giant_value_is_shown_short():
    (line,) = fails("{tool: {width: [" + "[1, 2, 3]," * 5000 + "]}}")
    assert len(line) < 200


def test_a_whole_float_fills_an_integer_and_nothing_else_is_coerced():
    root = config_text.validate(
        Root, {"tool": {"width": 1e3, "rate": 1, "shape": [2, 3], "levels": [2.0]}}
    )
    assert root.tool.levels == (2.0,)
    assert root.tool.width == 1000
    assert type(root.tool.width) is int
    assert root.tool.shape == (2, 3)
    assert fails("{tool: {width: 1e3, rate: fast}}") == ["tool.rate: expected a number, got 'fast'"]


def test_values_that_are_not_plain_are_refused():
    with pytest.raises(UserError, match="plain"):
        config_text.validate(Root, {"tool": object()})
