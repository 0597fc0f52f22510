"""Exports on the Hugging Face Hub, by its own client against a server on loopback."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hub_server import TOKEN, HubServer
from test_doc_blocks import ROOT, blocks_run_by, run_block

import ebm_dist
from ebm_dist.cli import main
from ebm_dist.config.sections import RunSection
from ebm_dist.core.errors import RunFailed, UserError
from ebm_dist.export.front_matter import front_matter, with_license
from ebm_dist.export.pretrained import FOLDER
from ebm_dist.export.reader import open_export
from ebm_dist.run.init_from.beginning import located

NOT_INSTALLED = "the extra [hub] is not installed"
READ = ("config.json", "model.safetensors", "chains.safetensors")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    constants = pytest.importorskip("huggingface_hub.constants", reason=NOT_INSTALLED)
    server = HubServer()
    server.start()
    # The client reads the environment when it is imported.
    for name, value in {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_DISABLE_XET": True,  # xet's servers speak a protocol of their own
        "HF_HUB_DISABLE_PROGRESS_BARS": True,
        "HF_TOKEN_PATH": str(tmp_path / "token"),
    }.items():
        monkeypatch.setattr(constants, name, value, raising=False)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield server
    server.stop()


@pytest.fixture
def logged_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)


def upload(server: HubServer, **changed: bytes) -> str:
    """A commit of the smallest pretrained model, with some files changed."""
    files = {name: (FOLDER / "digits-rbm" / name).read_bytes() for name in READ}
    return server.commit("me/machine", {**files, **changed})


def test_a_pushed_export_is_loaded_sampled_and_evaluated_by_its_address(
    server: HubServer, logged_in: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = ebm_dist.push_to_hub("digits-rbm", "me/machine", license="mit", private=True)
    _, commit = server.models["me/machine"]
    assert url == f"{server.url}/me/machine/commit/{commit}"
    assert server.private["me/machine"] in (True, "private")
    assert server.messages == ["Export of digits_rbm"]
    sent = server.models["me/machine"][commit]
    assert set(sent) == {*READ, "README.md", "samples.png", ".gitattributes"}
    card = sent["README.md"].decode()
    assert "\nlicense: mit\n" in card
    assert 'load_energy("hf://me/machine")' in card
    assert "PATH" not in card

    whole = open_export("digits-rbm").energy
    x = torch.randint(0, 2, (5, 1, 8, 8), generator=torch.Generator().manual_seed(0)).float()
    for address in ("hf://me/machine", f"hf://me/machine@{commit}", Path("hf://me/machine@main")):
        torch.testing.assert_close(ebm_dist.load_energy(address)(x), whole(x), rtol=0, atol=0)
    samples, _ = ebm_dist.sample("hf://me/machine", 3, num_steps=1)
    assert samples.shape == (3, 1, 8, 8)
    out = ["--out", str(tmp_path / "few.npz")]
    assert main(["sample", "hf://me/machine", "--num", "2", "--steps", "1", *out]) == 0
    assert main(["evaluate", "hf://me/machine", "--suite", "ood"]) == 0
    assert TOKEN not in "".join(capsys.readouterr())
    folder = open_export("hf://me/machine").path
    assert located(RunSection(init_from="hf://me/machine")).init_from == str(folder)
    assert folder == tmp_path / "cache/ebm_dist/hub/me/machine" / commit
    assert {path.name for path in folder.iterdir() if path.is_file()} == {*READ}
    assert not any(path.is_symlink() for path in folder.rglob("*"))


def test_the_command_pushes_again_and_a_newer_commit_is_what_an_address_means(
    server: HubServer, logged_in: None, capsys: pytest.CaptureFixture[str]
) -> None:
    first = upload(server)
    assert open_export("hf://me/machine").path.name == first
    assert main(["push", "digits", "me/machine", "--message", "resnet"]) == 0
    assert server.messages == ["resnet"]
    printed, _ = capsys.readouterr()
    newest = list(server.models["me/machine"])[-1]
    assert printed == f"{server.url}/me/machine/commit/{newest}\n"
    assert open_export("hf://me/machine").config["energy"]["name"] == "resnet"
    assert open_export(f"hf://me/machine@{first}").config["energy"]["name"] == "rbm"


def test_the_code_of_the_page_on_the_hub_runs(
    server: HubServer, logged_in: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(FOLDER / "digits", tmp_path / "runs/digits/export")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    server.tags["v1.0"] = "main"
    names: dict[str, Any] = {}
    for block in blocks_run_by(__file__, "docs/hub.md"):
        run_block(block, names)
    assert (tmp_path / "threes.png").is_file()
    assert list(server.models) == ["USER/digits"]
    assert server.private["USER/digits"] in (True, "private")
    assert server.messages == ["Export of digits"] * 2
    x = torch.zeros(3, 1, 8, 8)
    torch.testing.assert_close(names["energy"](x), open_export("digits").energy(x))


def test_a_commit_that_was_downloaded_needs_no_network(server: HubServer) -> None:
    commit = upload(server)
    ebm_dist.load_energy("hf://me/machine")
    num_requests = len(server.requests)
    ebm_dist.load_energy(f"hf://me/machine@{commit}")
    assert len(server.requests) == num_requests
    ebm_dist.load_energy("hf://me/machine")
    assert len(server.requests) == num_requests + 1, "asks for the newest commit alone"


def test_what_is_downloaded_lies_where_no_other_user_may_enter(
    server: HubServer, tmp_path: Path
) -> None:
    commit = upload(server)
    before = os.umask(0o022)
    try:
        folder = open_export(f"hf://me/machine@{commit}").path
    finally:
        os.umask(before)
    private = tmp_path / "cache/ebm_dist/hub"
    assert private in folder.parents
    assert private.stat().st_mode & 0o777 == 0o700
    assert private.parent.stat().st_mode & 0o777 == 0o755, "the data beside it may be shared"


def test_a_download_that_broke_off_is_taken_up_again(
    server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = upload(server)
    lost = server.models["me/machine"][commit].pop("config.json")
    with pytest.raises(UserError, match=r"not an export of ebm_dist, it has no config\.json"):
        ebm_dist.load_energy("hf://me/machine")
    server.models["me/machine"][commit]["config.json"] = lost
    ebm_dist.load_energy("hf://me/machine")


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"model.safetensors": b"\x80\x04 a pickle"}, "cut short or mixed up"),
        ({"config.json": b"{}"}, "this file is of something else"),
        ({"chains.safetensors": b"\x00" * 64}, "chains.safetensors"),
    ],
)
def test_a_hostile_model_is_refused_like_any_damaged_export(
    server: HubServer, changed: dict[str, bytes], expected: str
) -> None:
    upload(server, **changed)
    with pytest.raises(UserError, match=expected):
        open_export("hf://me/machine").stored()


def test_a_file_beyond_its_limit_is_not_even_asked_for(server: HubServer) -> None:
    upload(server)
    server.claimed["model.safetensors"] = 2**40
    with pytest.raises(UserError, match=r"model\.safetensors has 1099511627776 bytes; at most"):
        ebm_dist.load_energy("hf://me/machine")
    assert not any("resolve" in request for request in server.requests)


def test_what_the_hub_does_not_show_or_allow_is_one_line(
    server: HubServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    upload(server)
    monkeypatch.setenv("HF_TOKEN", TOKEN.swapcase())
    for command, expected in (
        (["sample", "hf://me/nothing"], "hf://me/nothing: the hub shows you no such model"),
        (
            ["sample", "hf://me/machine@v9"],
            "hf://me/machine@v9: the hub shows you no such revision",
        ),
        (["sample", "hf://machine"], "hf://machine: expected hf://USER/NAME"),
        (["sample", "hf://me/../../x"], "expected hf://USER/NAME"),
        (["push", "digits-rbm", "machine"], "machine: expected USER/NAME"),
        (["push", "digits-rbm", "me/machine"], "hf://me/machine: the hub refuses this (HTTP 401)"),
    ):
        assert main(command) == 2, command
        (line,) = capsys.readouterr().err.splitlines()
        assert expected in line
        assert TOKEN.swapcase() not in line


def test_a_hub_that_does_not_answer_is_a_failure_without_the_token(
    server: HubServer, logged_in: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def broken(*_: Any, **__: Any) -> None:
        raise ConnectionError(f"GET with Authorization: Bearer {TOKEN}")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", broken)
    with pytest.raises(RunFailed, match=r"Bearer \*\*\*; the same command tries again"):
        ebm_dist.load_energy("hf://me/machine")


def test_a_link_in_an_export_is_not_published(
    server: HubServer, logged_in: None, tmp_path: Path
) -> None:
    shutil.copytree(FOLDER / "digits-rbm", tmp_path / "export")
    secret = tmp_path / "secret"
    secret.write_text("mine")
    (tmp_path / "export" / "samples.png").unlink()
    (tmp_path / "export" / "samples.png").symlink_to(secret)
    with pytest.raises(UserError, match="is a link"):
        ebm_dist.push_to_hub(tmp_path / "export", "me/machine")
    assert server.models == {}


def test_without_the_client_one_line_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for command in (["sample", "hf://me/machine"], ["push", "digits-rbm", "me/machine"]):
        assert main(command) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "hf://me/machine: needs huggingface_hub, the extra [hub]: pip install" in line


CONFIG = {
    "data": {"source": "/home/somebody/data/fashion-mnist"},
    "energy": {"name": "resnet"},
    "event": {"kind": "image"},
    "sampler": {"name": "langevin"},
}


def test_the_front_matter_is_in_the_form_of_the_hubs_model_index() -> None:
    quality = {"fidelity/distance": 2.5, "audit/energy_gap": float("nan")}
    card = with_license(front_matter("clothes", CONFIG, quality) + "# clothes\n", "apache-2.0")
    assert "/home" not in card
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["library_name"] == "ebm_dist"
    assert head["license"] == "apache-2.0"
    assert {"energy-based-model", "resnet", "langevin"} <= {*head["tags"]}
    assert head["datasets"] == ["zalando-datasets/fashion_mnist"]
    assert head["metrics"] == ["fidelity/distance"]
    hub = pytest.importorskip("huggingface_hub", reason=NOT_INSTALLED)
    (result,) = hub.ModelCard(card).data.eval_results
    assert (result.metric_type, result.metric_value) == ("fidelity/distance", 2.5)
    assert result.dataset_name == "fashion-mnist"
