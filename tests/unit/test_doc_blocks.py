"""Every block of code of README.md and the pages runs, or says in the line above it why not.

A block that needs a server is run beside the server's stand-in, by the test file that it names.
Blocks of a page run one after another in one directory, in this process. Runs are shortened: what
a page claims about their length or quality is in docs/results.md, and no test of this file.
"""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from typer.main import get_command

from ebm_dist.cli import app, main
from ebm_dist.commands.options import plain_overrides
from ebm_dist.config.run_config import load

ROOT = Path(__file__).parents[2]
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    *sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "docs").rglob("*.md")),
]
BLOCK = re.compile(
    r"(?:^<!-- (?:not run: (?P<why>\w[^\n]*\w)|run by (?P<by>tests/[\w/]+\.py)) -->\n)?"
    r'^```(?P<language>\w+)(?: title="(?P<title>[^"]+)")?\n'
    r"(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
SHORTER = {'"steps": 400': '"steps": 3', ", 1000)": ", 20, num_steps=2)"}
FIRST_PROGRAM = (ROOT / "examples/first_program.py").read_text().partition('"""\n')[2].strip()
"""Shown by several pages; `test_examples.py` runs it."""
SHORT_RUN = [
    "run.steps=3",
    "runtime.backend=inline",
    "tracking.wandb=off",
    "evaluation.every=null",
    "checkpoint.every=3",
]
SHORT_IMAGES = ["sampler.num_steps=2", "buffer.capacity=64"]
SHORT_LEVELS = ["energy.num_levels=3", "learner.num_ranks=1"]
OPTIONS = {"sample": ["--num", "4", "--steps", "2"]}
"""Put behind those that the page gives; the last one counts."""
TRAINED = {"docs/extending.md"}
"""Pages whose lines of YAML `test_examples.py` trains with."""


@dataclass(frozen=True)
class Block:
    page: str
    language: str
    title: str
    code: str
    why: str
    """Why it is not run; empty if it is."""
    by: str
    """The test file that runs it; empty if this one does."""


def blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return [
        Block(page, m["language"], m["title"] or "", m["code"], m["why"] or "", m["by"] or "")
        for m in BLOCK.finditer(text)
    ]


def blocks_run_here(page: str) -> list[Block]:
    return [block for block in blocks(page) if not block.why and not block.by]


def blocks_run_by(file: str, page: str) -> list[Block]:
    """The blocks of a page that name the test file at `file`."""
    name = Path(file).resolve().relative_to(ROOT).as_posix()
    return [block for block in blocks(page) if block.by == name]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make train` leaves, after three updates."""
    root = tmp_path_factory.mktemp("trained")
    config = str(ROOT / "configs/digits.yaml")
    command = ["train", config, "--run-dir", str(root / "digits"), *SHORT_RUN, *SHORT_IMAGES]
    assert main(command) == 0
    return root


@pytest.mark.parametrize("page", [page for page in PAGES if blocks_run_here(page)])
def test_the_code_of_a_page_runs(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    for name in ("configs", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    run = blocks_run_here(page)
    if any("runs/digits" in block.code for block in run):
        trained: Path = request.getfixturevalue("digits")
        (tmp_path / "runs").mkdir()
        # A copy, as commands write into it.
        for file in (trained / "digits").rglob("*"):
            if file.is_file():
                copy = tmp_path / "runs" / file.relative_to(trained)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(file.read_bytes())
    names: dict[str, object] = {"__name__": "page"}
    modules = set(sys.modules)
    with torch.random.fork_rng():
        for block in run:
            run_block(block, names)
    for name in set(sys.modules) - modules:  # of a directory that is about to go
        if getattr(sys.modules[name], "__file__", None) == str(tmp_path / f"{name}.py"):
            del sys.modules[name]


def run_block(block: Block, names: dict[str, object]) -> None:
    code = "" if block.code.strip() == FIRST_PROGRAM else block.code
    for long, short in SHORTER.items():
        code = code.replace(long, short)
    if block.title:
        Path(block.title).write_text(code)
        if block.language == "yaml":
            load(Path(block.title))
    elif block.language == "python":
        exec(compile(code, block.page, "exec"), names)
    elif block.language == "sh":
        for words in commands(code):
            run_command(words, block)
    elif block.language == "yaml" and block.page not in TRAINED:
        load(yaml.safe_load((ROOT / "configs/digits.yaml").read_text()) | yaml.safe_load(code))
    else:
        assert block.language in ("yaml", "text"), f"nothing runs {block.language}"


def commands(code: str) -> list[list[str]]:
    """The words of each line, without comments and redirections."""
    lines = code.replace("\\\n", " ").splitlines()
    every = [shlex.split(line, comments=True) for line in lines]
    return [words[: words.index(">")] if ">" in words else words for words in every if words]


def run_command(words: list[str], block: Block) -> None:
    program, *rest = words
    if Path(program).name == "ebm-dist":
        check_options(rest)
        name = rest[0]
        if name == "train":
            config, *overrides = rest[1:]
            if config.startswith("configs/"):  # tests/distributed/test_shipped_configs.py trains it
                load(Path(config), [w for w in plain_overrides(overrides) if re.match(r"\w.*=", w)])
                return
            enough = "run.steps=5" if any("run.steps=" in w for w in overrides) else "run.steps=3"
            descends = load(Path(config)).sampler.name == "predictor_corrector"  # type: ignore[attr-defined]
            shorter = [*SHORT_IMAGES, *SHORT_LEVELS] if descends else SHORT_IMAGES
            rest = [*rest, *shorter, *SHORT_RUN, enough]
        done = main([*rest, *OPTIONS.get(name, [])])
        assert done == 0, f"{' '.join(words)}: exit code {done}"
    elif program == "make":
        assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words
    elif program == "python":
        with contextlib.redirect_stdout(io.StringIO()):
            runpy.run_path(rest[0], run_name="__main__")
    else:
        pytest.fail(f"`{' '.join(words)}` is not run here: say why in a line above the block")


def check_options(words: list[str]) -> None:
    """The command and each of its options exist."""
    command = get_command(app)
    while words and words[0] in getattr(command, "commands", {}):
        command, words = command.commands[words[0]], words[1:]
    known = {option for parameter in command.params for option in parameter.opts}
    used = {w.partition("=")[0] for w in words if re.match(r"--[a-z][a-z-]*(=|$)", w)}
    assert used <= known, f"{words}: no option {used - known}"


@pytest.mark.parametrize("page", [page for page in PAGES if any(b.why for b in blocks(page))])
def test_what_a_page_does_not_run_names_commands_and_configs_that_exist(page: str) -> None:
    for block in blocks(page):
        if not block.why or block.language != "sh":
            continue
        for words in commands(block.code):
            programs = [i for i, word in enumerate(words) if Path(word).name == "ebm-dist"]
            for first in programs:
                check_options(words[first + 1 :])
            for word in words:
                if re.fullmatch(r"(configs|launch|docker)/\S+", word):
                    assert (ROOT / word).exists(), word


def test_a_test_file_that_a_block_names_runs_the_blocks_of_its_page() -> None:
    named = {(block.by, page) for page in PAGES for block in blocks(page) if block.by}
    assert len(named) >= 2
    for file, page in named:
        assert f'blocks_run_by(__file__, "{page}")' in (ROOT / file).read_text(encoding="utf-8")


def test_every_fence_of_a_page_is_a_block_or_a_drawing() -> None:
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        fenced = re.findall(r"^ *```([^\n]*)\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
        named = [language for language, code in fenced if language or not re.search("[│▼]", code)]
        assert len(named) == len(blocks(page)), (page, named)
