"""The section of the docs that a verdict refers to, as HTML that needs no other file."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from markdown_it import MarkdownIt
from markdown_it.token import Token


@cache
def explanation(page: str) -> str:
    """The text from the heading of `page`, "docs/NAME.md#Heading", to the next; empty if missing.

    Links and pictures lead to other files; of links the words are kept.
    """
    name, _, heading = page.partition("#")
    try:
        text = files("ebm_dist.report").joinpath(name).read_text(encoding="utf-8")
    except OSError:
        return ""
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = markdown.parse(text)
    return markdown.renderer.render(_below(tokens, heading), markdown.options, {})


def _below(tokens: list[Token], heading: str) -> list[Token]:
    """The tokens between `heading` and the next one of any level."""
    starts = [index for index, token in enumerate(tokens) if token.type == "heading_open"]
    for start, end in zip(starts, [*starts[1:], len(tokens)]):
        if tokens[start + 1].content == heading:
            found = tokens[start + 3 : end]  # without the heading: its opening, words and end
            break
    else:
        return []
    for token in found:
        token.children = [
            child
            for child in token.children or ()
            if child.type not in ("link_open", "link_close", "image")
        ]
    return found
