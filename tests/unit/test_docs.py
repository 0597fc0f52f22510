"""The pages name files that are there, link to what exists, and are all on the site."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from ebm_dist import evaluation
from ebm_dist._version import __version__
from ebm_dist.metrics.names import HISTOGRAMS, IMAGES, METRICS
from ebm_dist.report.figure import healthy_text

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
ON_SITE = sorted(p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*.md"))
PAGES = ["CONTRIBUTING.md", *(f"docs/{name}" for name in ON_SITE)]
OF_A_RUN = {"config.yaml"}
"""Named by pages too, and written by a run."""
NAMED = re.compile(r"`([\w./-]+\.(?:py|yaml|md|sh)|[\w./-]+/)`")
TITLED = re.compile(r'^```\w+ title="([^"]+)"$', re.MULTILINE)
LINK = re.compile(r"\]\((?!https?:|mailto:)([^)#\s]*)(?:#([^)\s]+))?\)")
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
GENERATED = {
    "reference/config.md": "config_reference",
    "reference/commands.md": "command_reference",
}


@pytest.mark.parametrize("page", PAGES)
def test_every_file_and_folder_that_a_page_names_is_there(page: str) -> None:
    text = text_of(page)
    missing = [
        name
        for name in NAMED.findall(text)
        if name not in {*OF_A_RUN, *TITLED.findall(text)}
        and not name.startswith(("RUN/", "runs/", "data/", "site/"))
        and not any(f"/{file}".endswith(f"/{name.strip('/')}") for file in files())
    ]
    assert missing == []


@pytest.mark.parametrize("page", ["README.md", *PAGES])
def test_every_link_of_a_page_leads_to_a_file_and_a_heading_of_it(page: str) -> None:
    lost = []
    for path, anchor in LINK.findall(text_of(page)):
        target = (ROOT / page).parent.joinpath(path).resolve() if path else ROOT / page
        name = target.relative_to(ROOT).as_posix()
        if name.removeprefix("docs/") not in GENERATED and not target.exists():
            lost.append(path)
        elif anchor and anchor not in anchors(text_of(name)):
            lost.append(f"{path}#{anchor}")
    assert lost == []


def test_every_page_is_on_the_site_and_the_site_names_no_other() -> None:
    named = list(leaves(SITE["nav"]))
    assert sorted(named) == sorted([*ON_SITE, *GENERATED])
    assert SITE["strict"] is True


def test_the_site_can_be_read_offline() -> None:
    assert SITE["theme"]["font"] is False
    assert SITE["use_directory_urls"] is False  # links lead to files and not to folders
    for key in ("extra_javascript", "extra_css"):
        for path in SITE.get(key, []):
            assert (DOCS / path).is_file(), path
    styles = "".join(p.read_text(encoding="utf-8") for p in DOCS.rglob("*.css"))
    assert "http" not in styles


def test_the_config_reference_has_every_key_with_its_meaning() -> None:
    from ebm_dist import energies, objectives, samplers
    from ebm_dist.config.run_config import RunConfig

    text = text_of("docs/reference/config.md")
    for name in RunConfig.model_fields:
        assert f"{{ #{name} }}" in text, name
    for family in (energies.FAMILY, samplers.FAMILY, objectives.FAMILY):
        for name in family.members:
            assert f"{{ #{family.kind}-{name} }}" in text, name
    assert "**`step_size`** (number > 0, required): h, in squared data units." in text
    assert "**`capacity`** (integer > 0, default `10000`): Number of chains" in text
    assert "- **`capacity`**\n" not in text
    without = re.findall(r"^ *- \*\*`(\w+)`\*\* \([^)]*\)$", text, re.MULTILINE)
    assert without == []  # each key says what it means


def test_the_python_reference_names_what_can_be_imported() -> None:
    named = re.findall(r"^::: (\S+)$", "\n".join(map(text_of, PAGES)), re.MULTILINE)
    assert "ebm_dist.train" in named
    for name in named:
        assert pkgutil.resolve_name(name) is not None


def test_the_python_reference_has_every_measurement() -> None:
    named = re.findall(r"^::: (\S+)$", text_of("docs/reference/api-evaluation.md"), re.MULTILINE)
    assert {f"ebm_dist.evaluation.{name}" for name in evaluation.__all__} <= {*named}


def test_the_arguments_that_a_docstring_of_the_reference_names_are_those_of_the_signature() -> None:
    """The build of the site warns of others, and fails."""
    named = re.findall(r"^::: (\S+)$", "\n".join(map(text_of, PAGES)), re.MULTILINE)
    wrong = []
    for name in named:
        found = pkgutil.resolve_name(name)
        members = inspect.getmembers(found, lambda m: inspect.isfunction(m) or inspect.isclass(m))
        own = [m for key, m in members if key[0] != "_" and m.__module__.startswith("ebm_dist")]
        for function in (found, *own):
            if not callable(function) or "Args:" not in (function.__doc__ or ""):
                continue
            described = inspect.cleandoc(function.__doc__ or "").split("Args:\n")[1]
            section = described.split("\n\n")[0]
            listed = re.findall(r"^    (\w+)(?: \(.*\))?:", section, re.MULTILINE)
            for argument in {*listed} - {*inspect.signature(function).parameters}:
                wrong.append(f"{name}: {function.__name__}({argument})")
    assert wrong == []


def test_the_command_reference_has_every_command() -> None:
    text = text_of("docs/reference/commands.md")
    for command in ("train", "sample", "data prepare", "config schema", "dashboard publish"):
        assert f"## ebm-dist {command}\n" in text
    assert "- `--resume` (one of `auto`, `never`, `must`; default `auto`)" in text


def test_the_page_on_metrics_has_each_of_them_and_no_other() -> None:
    text = text_of("docs/metrics.md")
    rows = dict(re.findall(r"^\| `([a-z]+/\w+)` (\|.*)$", text, re.MULTILINE))
    assert set(rows) == {*METRICS, *HISTOGRAMS, *IMAGES}
    families = {name.partition("/")[0] for name in rows}
    named = {n for n in re.findall(r"`([a-z]+/\w+)`", text) if n.partition("/")[0] in families}
    assert named <= set(rows)
    for name, metric in METRICS.items():
        if metric.healthy is not None:
            assert f"| {healthy_text(metric.healthy)} |" in rows[name], name


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == __version__
    for path in (ROOT / "docker", ROOT / "launch", DOCS):
        for file in (p for p in path.rglob("*") if p.is_file() and p.suffix != ".png"):
            tags = re.findall(r"ebm-dist:([\d.]+)-", file.read_text(encoding="utf-8"))
            assert set(tags) <= {__version__}, file
    assert {"cff-version", "message", "title", "authors", "license"} <= citation.keys()


@cache
def files() -> frozenset[str]:
    """The repository's files and folders, tools' environments apart."""
    found = (p.relative_to(ROOT) for p in ROOT.rglob("*"))
    return frozenset(p.as_posix() for p in found if not p.parts[0].startswith(".venv"))


@cache
def text_of(page: str) -> str:
    """A page of the repository; those that the build writes, as it writes them."""
    module = GENERATED.get(page.removeprefix("docs/"))
    if module is None:
        return (ROOT / page).read_text(encoding="utf-8")
    sys.path.insert(0, str(DOCS / "hooks"))
    try:
        return importlib.import_module(module).page()
    finally:
        sys.path.remove(str(DOCS / "hooks"))


def anchors(text: str) -> set[str]:
    """The ids of a page's headings: those given, else as Python-Markdown and GitHub make them."""
    found = set()
    for heading in re.findall(
        r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), re.M
    ):
        if given := re.search(r"\{ #([\w-]+) \}", heading):
            found.add(given[1])
        else:
            words = re.sub(r"[^\w\s-]", "", heading.replace("`", "")).strip().lower()
            found.add(re.sub(r"[-\s]+", "-", words))
    return found


def leaves(nav: Any) -> Iterator[str]:
    """The files that a navigation names."""
    if isinstance(nav, str):
        yield nav
    else:
        for part in nav if isinstance(nav, list) else nav.values():
            yield from leaves(part)
