"""Models and data of a run as W&B artifacts, sent by the real client to a stand-in server."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_wandb import until
from wandb_server import WandbServer

from ebm_dist._version import __version__
from ebm_dist.checkpoint.files import open_checkpoint
from ebm_dist.config.run_config import RunConfig, load
from ebm_dist.controller.clients import HubClient
from ebm_dist.data import describe
from ebm_dist.metrics.config import TrackingConfig
from ebm_dist.metrics.hub import MetricHub
from ebm_dist.metrics.jsonl import read_rows
from ebm_dist.run import artifacts as artifacts_module
from ebm_dist.run.artifacts import Artifacts
from ebm_dist.run.train import RunResult

sys.path.append(str(Path(__file__).parents[1] / "actors"))
from small_runs import curve, run

pytest.importorskip("wandb")

SMALL = ("run.steps=6", "checkpoint.every=2", "checkpoint.keep=9", "evaluation.every=2")
SCORE = "likelihood/log_prob_test"


@pytest.fixture(scope="module")
def untracked(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """A run without W&B."""
    result, _ = run(tmp_path_factory.mktemp("untracked") / "run", *SMALL)
    return result


def test_a_resumed_hub_logs_no_second_version_of_a_model(
    server: WandbServer, tmp_path: Path
) -> None:
    (tmp_path / "data-toy-0badcafe").mkdir()
    (tmp_path / "data-toy-0badcafe" / "data.json").write_text("{}")
    model = tmp_path / "step_00000005-12345678"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"weights")
    run_id = None
    for resume_step in (None, 5, 4):  # 4: the server has the version, the new attempt logs it again
        with MetricHub(
            TrackingConfig(init_timeout=60), tmp_path, {}, "t", run_id, resume_step=resume_step
        ) as hub:
            hub.log(1, 0, {"energy/gap": 0.0})
            data = str(tmp_path / "data-toy-0badcafe")
            hub.artifact(resume_step or 0, "dataset", data, ["latest"], {"source": "toy"})
            hub.artifact(5, "model", str(model), ["latest", "best"], {"update": 5})
        assert hub.notices() == []
        run_id = hub.info()["id"]
    assert run_id is not None
    (version,) = server.versions(f"model-{run_id}")
    assert (version.type, version.made_by, version.used_by) == ("model", run_id, [])
    assert (set(version.aliases), version.metadata) == ({"latest", "best"}, {"update": 5})
    assert version.files == {"model.safetensors": b"weights"}
    (data,) = server.versions("data-toy")
    assert (data.type, data.made_by, data.used_by) == ("dataset", None, [run_id])
    assert all(row["step"] is not None for row in server.runs[run_id].history)


def test_after_the_start_no_artifact_asks_the_server_who_the_user_is(
    server: WandbServer, tmp_path: Path
) -> None:
    # It is not asked again when it may be away: the client would give the artifact up.
    model = tmp_path / "step_00000005-12345678"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"weights")
    with MetricHub(TrackingConfig(init_timeout=60), tmp_path, {}, "t") as hub:
        until(lambda: hub.info()["url"])
        asked = server.operations["Viewer"]
        assert asked > 0
        hub.artifact(5, "model", str(model), ["latest"], {})
        hub.table("evaluation", 5, {"fidelity/distance": 1.5})
    assert server.operations["Viewer"] == asked
    run_id = hub.info()["id"]
    assert [version.aliases for version in server.versions(f"model-{run_id}")] == [["latest"]]
    assert any("evaluation" in row for row in server.runs[str(run_id)].history)


def test_an_offline_run_holds_data_and_models_and_best_is_what_its_evaluation_says(
    server: WandbServer, tmp_path: Path, untracked: RunResult
) -> None:
    result, _ = run(tmp_path / "run", "tracking.wandb=offline", *SMALL)
    (folder,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    command = [sys.executable, "-m", "wandb", "sync", str(folder)]
    subprocess.run(command, check=True, capture_output=True, timeout=240)

    ((run_id, _),) = server.runs.items()
    evaluated = curve(tmp_path / "run", SCORE)
    assert len(evaluated) == 3
    versions = server.versions(f"model-{run_id}")
    assert {v.metadata["update"]: v.metadata[SCORE] for v in versions}.items() <= evaluated.items()
    best = server.aliased(f"model-{run_id}", "best")
    assert best.metadata["update"] == max(evaluated, key=evaluated.__getitem__)
    latest = server.aliased(f"model-{run_id}", "latest")
    assert latest.metadata["update"] == 6
    export = {file.name: file.read_bytes() for file in (tmp_path / "run/export").iterdir()}
    assert latest.files == export

    assert server.runs[run_id].rows() == list(read_rows(tmp_path / "run" / "metrics.jsonl"))
    about = server.runs[run_id].config
    assert about["code"]["value"]["ebm_dist"] == __version__
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    head = subprocess.run(git, check=False, capture_output=True, text=True).stdout.strip()
    assert (about["code"]["value"]["git_commit"] or "").removesuffix("+dirty") == head
    assert about["nodes"]["value"][0]["CPU"] >= 1
    tables = [name for name in server.runs[run_id].files if "table/evaluation" in name]
    assert len(tables) == 3
    table = json.loads(server.runs[run_id].files[sorted(tables)[0]])
    assert table["columns"] == ["metric", "value", "unit", "meaning"]
    values = {name: value for name, value, *_ in table["data"]}
    assert values[SCORE] in evaluated.values()

    (data,) = server.versions("data-toy-unit_gaussian_1d")
    assert data.used_by == [run_id]
    (text,) = data.files.values()
    about = json.loads(text)
    assert about["train"] == data.metadata["train"] == 4096
    assert all(len(shard["sha256"]) == 64 for shard in about["shards"])

    def law(metrics: dict[str, float]) -> dict[str, float]:
        return {k: v for k, v in metrics.items() if not k.startswith(("throughput/", "wait/"))}

    assert law(result.metrics) == law(untracked.metrics), "tracking changed the run"
    assert not (untracked.run_dir / "artifacts").exists()


class Hub:
    """Keeps what it is sent."""

    def __init__(self) -> None:
        self.known = {"mode": "online"}
        self.sent: list[tuple[int, str, list[str]]] = []

    def send(
        self, method: Any, step: int, kind: str, folder: str, aliases: list[str], _: object
    ) -> None:
        assert method is HubClient.artifact
        assert Path(folder).is_dir()
        self.sent.append((step, kind, aliases))


def logged(
    run_dir: Path, config: RunConfig, scores: dict[int, float], by: str = SCORE
) -> list[Any]:
    """What a run at `run_dir` with the checkpoints and these scores of its evaluations sends."""
    hub = Hub()
    artifacts = Artifacts(config, describe(config.data), run_dir, hub)  # type: ignore[arg-type]
    artifacts.log_data(0)
    for step, score in scores.items():
        artifacts.on_checkpoint(run_dir / "checkpoints" / f"step_{step:08d}")
        artifacts.on_evaluation(step, {SCORE: -score, by: score})
    artifacts.finish(run_dir / "export")
    return hub.sent


DATA = (0, "dataset", ["latest"])
FINAL, FINAL_AND_BEST = (6, "model", ["latest"]), (6, "model", ["latest", "best"])


def test_the_config_and_the_evaluations_say_which_models_are_sent(
    untracked: RunResult, tmp_path: Path
) -> None:
    assert untracked.config is not None
    plain = untracked.config.model_dump(mode="json")
    scores = {2: -1.0, 4: -2.0, 6: -1.5}

    def sent(name: str, scores: dict[int, float], *overrides: str, by: str = SCORE) -> list[Any]:
        shutil.copytree(untracked.run_dir, tmp_path / name, dirs_exist_ok=True)
        return logged(tmp_path / name, load(plain, overrides), scores, by)

    assert sent("off", scores, "tracking.artifacts=off") == []
    assert sent("final", scores, "tracking.artifacts=final") == [DATA, FINAL_AND_BEST]
    assert sent("best", scores) == [DATA, (2, "model", ["latest", "best"]), FINAL]
    # Resumed after update 4: the best of before is remembered.
    assert sent("best", {6: -1.2}) == [DATA, FINAL]
    assert sent("best", {6: -0.5}) == [DATA, FINAL_AND_BEST]
    assert sent("nothing evaluated", {}) == [DATA, FINAL_AND_BEST]
    # The distance comes before the likelihood, and the smallest is the best.
    distances = {2: 2.0, 4: 1.0, 6: 1.5}
    by_distance = sent("distance", distances, by="fidelity/distance")
    assert by_distance == [
        DATA,
        (2, "model", ["latest", "best"]),
        (4, "model", ["latest", "best"]),
        FINAL,
    ]


def test_checkpoints_are_sent_once_each_and_the_best_is_that_of_the_best_evaluation(
    untracked: RunResult, tmp_path: Path
) -> None:
    assert untracked.config is not None
    plain = untracked.config.model_dump(mode="json")
    shutil.copytree(untracked.run_dir, tmp_path / "run")
    config = load(plain, ("tracking.checkpoints=true", "tracking.artifacts=off"))
    latest, best = ["latest"], ["latest", "best"]
    sent = logged(tmp_path / "run", config, {2: -1.0, 4: -2.0, 6: -0.5})
    assert sent == [DATA, *((k, "checkpoint", a) for k, a in ((2, best), (4, latest), (6, best)))]
    # A checkpoint that no evaluation follows goes when it is written, or when the run ends.
    unevaluated = load(config.model_dump(mode="json"), ("evaluation.every=5",))
    shutil.copytree(untracked.run_dir, tmp_path / "again")
    hub = Hub()
    spec = describe(config.data)
    artifacts = Artifacts(unevaluated, spec, tmp_path / "again", hub)  # type: ignore[arg-type]
    for step in (2, 4):
        artifacts.on_checkpoint(tmp_path / f"again/checkpoints/step_{step:08d}")
    artifacts.finish(tmp_path / "again/export")
    assert hub.sent == [(step, "checkpoint", latest) for step in (2, 4, 6)]


def test_a_checkpoint_from_wandb_begins_a_run_elsewhere_with_its_chains_and_optimiser(
    server: WandbServer, tmp_path: Path
) -> None:
    run(tmp_path / "run", "tracking.wandb=offline", "tracking.checkpoints=true", *SMALL)
    (folder,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    command = [sys.executable, "-m", "wandb", "sync", str(folder)]
    subprocess.run(command, check=True, capture_output=True, timeout=240)
    shutil.rmtree(tmp_path / "run")

    ((run_id, _),) = server.runs.items()
    versions = server.versions(f"checkpoint-{run_id}")
    assert [version.metadata["update"] for version in versions] == [2, 4, 6]
    assert {version.made_by for version in versions} == {run_id}
    latest = server.aliased(f"checkpoint-{run_id}", "latest")
    assert latest.metadata["update"] == 6
    downloaded = tmp_path / "downloaded"
    downloaded.mkdir()
    for name, content in latest.files.items():
        (downloaded / name).write_bytes(content)
    overrides = [f"run.init_from={downloaded}", "run.init_chains=true", "run.init_optimizer=true"]
    result, _ = run(tmp_path / "next", *overrides, *SMALL)
    meta = open_checkpoint(result.run_dir / "checkpoints" / "step_00000006").meta
    assert (meta["init_from"]["kind"], meta["init_from"]["step"]) == ("checkpoint", 6)


def test_models_are_bounded_and_a_failure_of_theirs_ends_no_run(
    untracked: RunResult,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert untracked.config is not None
    shutil.copytree(untracked.run_dir, tmp_path / "run")
    caplog.set_level("INFO", logger="ebm_dist.run")
    monkeypatch.setattr(logging.getLogger("ebm_dist"), "propagate", True)
    with monkeypatch.context() as patch:
        patch.setattr(artifacts_module, "_MIB", 0.1)
        assert logged(tmp_path / "run", untracked.config, {2: -1.0, 4: -0.5}) == [DATA]
    bounded, last = {line for line in caplog.messages if "tracking.artifacts_mib" in line}
    assert {bounded[:18], last[:18]} == {"W&B: 0 MiB of mode", "W&B: the model has"}

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(artifacts_module, "export_run", refuse)
    assert logged(tmp_path / "run", untracked.config, {2: -1.0}) == [DATA, FINAL_AND_BEST]
    assert "an artifact was left out (the disk is full); the run goes on" in caplog.text
    # A checkpoint that cannot be copied does not keep the model back.
    monkeypatch.setattr(artifacts_module.checkpoint, "write_whole", refuse)
    plain = untracked.config.model_dump(mode="json")
    both = load(plain, ("tracking.checkpoints=true",))
    shutil.rmtree(tmp_path / "run" / "artifacts")
    assert logged(tmp_path / "run", both, {2: -1.0}) == [DATA, FINAL_AND_BEST]
