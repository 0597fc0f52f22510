"""A run whose W&B server is away at first: what is kept, what is sent, and what is not said."""

from __future__ import annotations

import json
import re
import secrets
import signal
import sys
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

import pytest
from graph_runs import children, rows, start, wait_for

sys.path.append(str(Path(__file__).parents[1] / "unit" / "metrics"))
from wandb_server import KEY, WandbServer

pytestmark = pytest.mark.ray


def test_points_reach_wandb_once_it_is_back_and_no_secret_leaves_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, token = WandbServer(), secrets.token_hex(32)
    server.reserve()
    for name, value in {
        "WANDB_BASE_URL": server.url,
        "WANDB_API_KEY": KEY,
        "WANDB_MODE": "online",
        "NETRC": str(tmp_path / "netrc"),
        "WANDB_CONFIG_DIR": str(tmp_path / "config"),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
    }.items():
        monkeypatch.setenv(name, value)
    run_dir = tmp_path / "run"
    process = start(
        run_dir,
        *("runtime.backend=ray", "run.steps=1000000", "flow.mode=async", "checkpoint.every=20"),
        *("tracking.wandb=auto", "tracking.init_timeout=2", "evaluation.every=20"),
        *("evaluation.fidelity=false", "energy.widths=[32]", "sampler.num_steps=40"),
    )
    listening: set[IPv4Address | IPv6Address] = set()
    try:
        wait_for(lambda: len(rows(run_dir)) >= 25 or process.poll() is not None, 240, "rows")
        assert process.poll() is None, (tmp_path / "run.out").read_text()
        listening = listening_addresses({process.pid, *children(process.pid)})
        assert not server.runs
        with server:
            wait_for(lambda: any(run.history for run in server.runs.values()), 60, "W&B")
            process.send_signal(signal.SIGTERM)
            assert process.wait(120) == 75
    finally:
        process.kill()
        process.wait()

    (sent,) = server.runs.values()
    kept = {row["step"] for row in rows(run_dir) if "flow/lag_max" in row}
    arrived = [row["step"] for row in sent.history if "flow/lag_max" in row]
    assert sorted(arrived) == sorted(kept)
    assert kept == set(range(1, max(kept) + 1))
    assert any(name.startswith("media/images/samples") for name in sent.files)

    assert server.keys_seen, "no key was shown, so none could have leaked"
    told = json.dumps([sent.config, sent.history, sent.summary, sent.output])
    logs = re.search(r"Ray's logs: (\S+)", (run_dir / "run.log").read_text())
    assert logs is not None
    places = {
        "W&B": told.encode() + b"".join(sent.files.values()),
        **{
            str(path): path.read_bytes()
            for root in (
                run_dir,
                tmp_path / "run.out",
                tmp_path / "tiny.yaml",
                Path(logs[1]).parent,
            )
            for path in (root.rglob("*") if root.is_dir() else [root])
            if path.is_file() and not path.is_symlink()
        },
    }
    assert len(places) > 30
    for secret in (KEY, token):
        holders = [name for name, content in places.items() if secret.encode() in content]
        assert not holders, f"a secret is in {holders}"

    # The Ray of a local run is for this machine alone.
    assert listening
    assert all(address.is_loopback for address in listening), listening


def listening_addresses(pids: set[int]) -> set[IPv4Address | IPv6Address]:
    """Local addresses of the TCP sockets on which these processes listen."""
    inodes = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                found = re.match(r"socket:\[(\d+)\]", str(link.readlink()))
            except OSError:
                continue
            if found:
                inodes.add(found[1])
    out = set()
    for table, width in (("tcp", 4), ("tcp6", 16)):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            listens = fields[3] == "0A"
            if listens and fields[9] in inodes:
                raw = bytes.fromhex(fields[1].split(":")[0])
                # The kernel prints each 32-bit word in the machine's own order.
                words = [raw[i : i + 4][::-1] for i in range(0, width, 4)]
                address = ip_address(b"".join(words))
                out.add(getattr(address, "ipv4_mapped", None) or address)
    return out
