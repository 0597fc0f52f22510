"""The code of docs/tracking.md that needs W&B, run by the real client against a stand-in server."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from wandb_server import WandbServer

from ebm_dist.export.pretrained import FOLDER
from ebm_dist.export.reader import open_export
from ebm_dist.metrics.config import TrackingConfig
from ebm_dist.metrics.hub import MetricHub

sys.path.append(str(Path(__file__).parents[1]))
from test_doc_blocks import ROOT, SHORT_IMAGES, SHORT_RUN, Block, blocks_run_by, commands, run_block

pytest.importorskip("wandb")


def block_of(language: str) -> Block:
    (found,) = [b for b in blocks_run_by(__file__, "docs/tracking.md") if b.language == language]
    return found


def test_a_model_is_downloaded_as_the_page_shows_and_is_the_one_that_was_sent(
    server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with MetricHub(TrackingConfig(init_timeout=60), tmp_path / "run", {}, "t", "RUN_ID") as hub:
        hub.log(1, 0, {"energy/gap": 0.0})
        hub.artifact(1, "model", str(FOLDER / "digits"), ["latest", "best"], {})
    assert hub.info()["id"] == "RUN_ID"
    names: dict[str, Any] = {}
    run_block(block_of("python"), names)
    x = torch.zeros(3, 1, 8, 8)
    torch.testing.assert_close(names["energy"](x), open_export("digits").energy(x), rtol=0, atol=0)
    sent = {path.name: path.read_bytes() for path in (FOLDER / "digits").iterdir()}
    assert {path.name: path.read_bytes() for path in Path(names["folder"]).iterdir()} == sent


@pytest.mark.slow
def test_an_agent_of_the_shipped_sweep_trains_each_trial_in_a_directory_of_its_own(
    server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trials are shortened by the `ebm-dist` that the agent finds."""
    monkeypatch.chdir(tmp_path)
    for name in ("configs", "launch"):
        (tmp_path / name).symlink_to(ROOT / name)
    shorter = [text for text in (*SHORT_RUN, *SHORT_IMAGES) if "tracking" not in text]
    program = tmp_path / "bin" / "ebm-dist"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m ebm_dist "$@" {" ".join(shorter)}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    server.trials = [(f"trial{k}", {"learner.lr": lr}) for k, lr in enumerate((1e-3, 2e-3))]

    path = "ENTITY/PROJECT/ID"
    for words in commands(block_of("sh").code):
        assert words[0] == "wandb"
        command = [sys.executable, "-m", *(path if w == "ENTITY/PROJECT/ID" else w for w in words)]
        done = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=500
        )
        if found := re.search(r"wandb agent ([\w/]+)", done.stdout.decode()):
            path = found[1]
    assert path == "tester/ebm_dist/sweep0"
    assert server.trials == []
    for name, lr in (("trial0", 1e-3), ("trial1", 2e-3)):
        config = yaml.safe_load((tmp_path / f"runs/digits-{name}/config.yaml").read_text())
        assert config["learner"]["lr"] == lr
        assert [row["step"] for row in server.runs[name].history if "step" in row][-1] == 3
        assert server.runs[name].exit_code == 0
