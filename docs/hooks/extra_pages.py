"""What the build adds to docs/: the generated references, and each file that a page links to.

A page links to `../configs/digits.yaml` as on a disk or in a repository. A site that is read
offline has no repository beside it, so such a file becomes a page of its own below `source/`.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

import command_reference
import config_reference
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
REFERENCES = {"reference/config.md": config_reference, "reference/commands.md": command_reference}
LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)#\s]+)")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".sh": "sh", ".toml": "toml", ".json": "json"}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages, and those that the pages below `source/` link to in turn."""
    for path, module in REFERENCES.items():
        files.append(File.generated(config, path, content=module.page()))
    seen = set()
    waiting = [(file.src_uri, file.content_string) for file in files.documentation_pages()]
    while waiting:
        page, text = waiting.pop()
        for link in LINK.findall(text):
            target = _in_repository(page, link)
            if target in seen or not _is_outside(target):
                continue
            seen.add(target)
            added = _page_of(target)
            files.append(File.generated(config, added, content=_content(target)))
            waiting.append((added, _content(target)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead each link to a file outside docs/ to the page that holds it."""
    here = page.file.src_uri

    def led(match: re.Match[str]) -> str:
        target = _in_repository(here, match[1])
        if _is_outside(target):
            to = _page_of(target)
        elif here.startswith("source/") and (ROOT / target).exists():
            to = target.removeprefix("docs/")
        else:
            return match[1]
        return posixpath.relpath(to, posixpath.dirname(here) or ".")

    return LINK.sub(led, markdown)


def _in_repository(page: str, link: str) -> str:
    """The path, from the repository's root, of what `page` of the site links to."""
    of_source = page.startswith("source/")
    base = posixpath.dirname(page.removeprefix("source/") if of_source else f"docs/{page}")
    return posixpath.normpath(posixpath.join(base, link))


def _is_outside(target: str) -> bool:
    return not target.startswith(("docs/", "../")) and (ROOT / target).exists()


def _page_of(target: str) -> str:
    if (ROOT / target).is_dir():
        return f"source/{target}/index.md"
    return f"source/{target}" if target.endswith(".md") else f"source/{target}.md"


def _content(target: str) -> str:
    path = ROOT / target
    if path.is_dir():
        names = sorted(item.name for item in path.iterdir() if item.is_file())
        return "\n".join([f"# {target}/", "", *(f"- [`{name}`]({name})" for name in names), ""])
    text = path.read_text(encoding="utf-8")
    if target.endswith(".md"):
        return text
    return f"# {target}\n\n````{LANGUAGES.get(path.suffix, 'text')}\n{text}````\n"
