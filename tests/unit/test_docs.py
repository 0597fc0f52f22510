"""The pages for those who come after name files that are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from ebm_dist._version import __version__

ROOT = Path(__file__).parents[2]
PAGES = ["CONTRIBUTING.md", *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md")))]
OF_A_RUN = {"config.yaml"}
"""Named by pages too, and written by a run."""
NAMED = re.compile(r"`([\w./-]+\.(?:py|yaml|md|sh)|[\w./-]+/)`")


@pytest.mark.parametrize("page", PAGES)
def test_every_file_and_folder_that_a_page_names_is_there(page: str) -> None:
    files = {p.relative_to(ROOT).as_posix() for p in ROOT.rglob("*") if ".venv" not in p.parts}
    missing = [
        name
        for name in NAMED.findall((ROOT / page).read_text(encoding="utf-8"))
        if name not in OF_A_RUN
        and not any(f"/{file}".endswith(f"/{name.strip('/')}") for file in files)
    ]
    assert missing == []


@pytest.mark.parametrize("page", ["README.md", *PAGES])
def test_every_link_of_a_page_leads_to_a_file(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == __version__
    assert {"cff-version", "message", "title", "authors", "license"} <= citation.keys()
