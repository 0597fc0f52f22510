"""Three machines made of one: nodes in namespaces of their own, on a switch with cables to cut.

A node has its own network, processes, host name, `/dev/shm`, `/tmp/ray`, `/tmp/ebm_dist-UID` and
`/etc/hosts`; only the disk is shared, as a cluster's run directory is. The switch is a network
namespace as well, so that nothing of it is seen outside and all of it is gone with its process.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import secrets
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
HEAD = "10.77.0.1"
PORT = 6379
NAMESPACES = ("--net", "--mount", "--pid", "--uts", "--fork", "--kill-child")

# A process that reaps what is left to it, as the first process of a machine must.
INIT = """
mount -t proc proc /proc
mount -t tmpfs -o size=2g tmpfs /dev/shm
mkdir -p /tmp/ray && mount --bind "$BED/$NAME/ray" /tmp/ray
mkdir -p -m 700 "/tmp/ebm_dist-$UID" && mount --bind "$BED/$NAME/own" "/tmp/ebm_dist-$UID"
mount --bind "$BED/hosts" /etc/hosts
hostname "$NAME"
ip link set lo up
touch "$BED/$NAME/up"
while :; do sleep 3600 & wait; done
"""


@functools.cache
def not_permitted() -> str | None:
    """Why nodes cannot be made here; None where they can."""
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    attempt = "mount -t proc proc /proc && ip link add br0 type bridge && "
    attempt += "ip link add veth0 type veth peer name veth1"
    tried = subprocess.run(
        ["unshare", *NAMESPACES, "sh", "-c", attempt],
        capture_output=True,
        text=True,
        check=False,
    )
    return f"no network namespaces here: {tried.stderr.strip()}" if tried.returncode else None


def launch_settings() -> dict[str, str]:
    """What launch/common.sh exports for Ray, so that the bed tests what is shipped."""
    script = f"source {shlex.quote(str(ROOT / 'launch' / 'common.sh'))} && env"
    # What a local Ray has set in this process would be taken for a setting of launch/.
    clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    done = subprocess.run(
        ["bash", "-c", script], env=clean, capture_output=True, text=True, check=True
    )
    return dict(re.findall(r"^(RAY_\w+)=(.*)$", done.stdout, re.MULTILINE))


def ray_ports() -> list[str]:
    """The pinned ports of launch/common.sh as options of `ray start`."""
    script = f"source {shlex.quote(str(ROOT / 'launch' / 'common.sh'))} && "
    script += 'printf "%s\\n" "${EBM_RAY_PORTS[@]}"'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    return done.stdout.split()


@dataclass
class Node:
    """One machine; `pid` is its first process, seen from outside."""

    name: str
    address: str
    unshare: subprocess.Popen[bytes]
    pid: int
    alive: bool = True


class Bed:
    """A switch and its nodes. The first node is the head."""

    def __init__(self, directory: Path, num_nodes: int = 3) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.token = secrets.token_hex(32)
        token = directory / "token"
        token.touch(0o600)
        token.write_text(self.token)
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "WANDB_"))},
            **launch_settings(),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "GLOO_SOCKET_IFNAME": "eth0",
            "PYTHONPATH": os.pathsep.join(
                [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
            ),
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
        }
        names = ["head", *(f"node-{i}" for i in range(1, num_nodes))]
        addresses = [f"10.77.0.{i + 1}" for i in range(num_nodes)]
        hosts = [f"{address} {name}" for address, name in zip(addresses, names)]
        (directory / "hosts").write_text("\n".join(["127.0.0.1 localhost", *hosts, ""]))
        self._processes: list[subprocess.Popen[bytes]] = []
        self._switch = self._run(["unshare", "--net", "sleep", "infinity"])
        _await(lambda: _net_of(self._switch.pid) != _net_of(os.getpid()), "the switch")
        self._on_switch("ip link add br0 type bridge && ip link set br0 up && ip link set lo up")
        self.nodes = [self._boot(name, at) for name, at in zip(names, addresses)]

    def _boot(self, name: str, address: str) -> Node:
        home = self.directory / name
        (home / "ray").mkdir(parents=True)
        (home / "own").mkdir(mode=0o700)
        unshare = self._run(
            ["unshare", *NAMESPACES, "bash", "-c", INIT],
            env={**os.environ, "BED": str(self.directory), "NAME": name},
        )
        _await((home / "up").exists, name)
        children = Path(f"/proc/{unshare.pid}/task/{unshare.pid}/children").read_text()
        node = Node(name, address, unshare, int(children.split()[0]))
        # `netns` of a peer is looked up where the command runs, so the pid is the outer one.
        self._on_switch(
            f"ip link add {name} type veth peer name eth0 netns {node.pid} && "
            f"ip link set {name} master br0 && ip link set {name} up"
        )
        inside = f"ip addr add {address}/24 dev eth0 && ip link set eth0 up"
        subprocess.run(["nsenter", "-t", str(node.pid), "-n", "sh", "-c", inside], check=True)
        return node

    # --- what can be done to it -----------------------------------------------------------------

    def cut(self, node: Node) -> None:
        """Pull the node's cable."""
        self._on_switch(f"ip link set {node.name} down")

    def mend(self, node: Node) -> None:
        self._on_switch(f"ip link set {node.name} up")

    def power_loss(self, node: Node) -> None:
        """Nothing says goodbye: the kernel of a machine without power closes no connection."""
        self.cut(node)
        os.kill(node.pid, signal.SIGKILL)
        node.alive = False

    def slow_down(self, node: Node, *, rate: str, delay_ms: int = 0) -> None:
        """Limit both directions of the node's cable; `rate` as tc has it, such as 4mbit."""
        kind = f"netem delay {delay_ms}ms rate {rate}"
        if not delay_ms:
            kind = f"tbf rate {rate} burst 32kb latency 400ms"
        self._on_switch(f"tc qdisc replace dev {node.name} root {kind}")
        inside = f"tc qdisc replace dev eth0 root {kind}"
        subprocess.run(["nsenter", "-t", str(node.pid), "-n", "sh", "-c", inside], check=True)

    def full_speed(self, node: Node) -> None:
        self._on_switch(f"tc qdisc del dev {node.name} root")
        inside = "tc qdisc del dev eth0 root"
        subprocess.run(["nsenter", "-t", str(node.pid), "-n", "sh", "-c", inside], check=True)

    # --- what runs on it ------------------------------------------------------------------------

    def start_ray(
        self, node: Node, num_cpus: int, *options: str, head: Node | None = None
    ) -> subprocess.Popen[bytes]:
        """`ray start`, with the ports and settings of launch/; returns once Ray is up.

        Args:
            head: the first node if left out.
        """
        head = head or self.nodes[0]
        where = ["--head", f"--port={PORT}", "--dashboard-host=127.0.0.1"]
        command = [
            *("ray", "start", "--block", "--disable-usage-stats"),
            *(where if node is head else [f"--address={head.address}:{PORT}"]),
            f"--node-ip-address={node.address}",
            f"--num-cpus={num_cpus}",
            "--object-store-memory=200000000",
            *ray_ports(),
            *options,
        ]
        log = self.directory / node.name / "ray.out"
        log.unlink(missing_ok=True)  # of a Ray that ran there before
        process = self.start(node, command, log)
        _await(
            lambda: process.poll() is not None or "Ray runtime started" in log.read_text(),
            f"Ray on {node.name}",
            120.0,
        )
        if process.poll() is not None:
            raise AssertionError(f"Ray did not start on {node.name}:\n{log.read_text()}")
        return process

    def start(
        self, node: Node, command: list[str], log: Path, **extra: str
    ) -> subprocess.Popen[bytes]:
        """Run `command` on the node; its output goes to `log`."""
        with log.open("ab") as out:
            return self._run(
                [*_enter(node), *command],
                env={**self.environment, **extra},
                stdout=out,
                stderr=out,
                start_new_session=True,
                cwd=ROOT,
            )

    def run(
        self, node: Node, command: list[str], timeout: float = 60.0, **extra: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*_enter(node), *command],
            env={**self.environment, **extra},
            capture_output=True,
            text=True,
            timeout=timeout,
            cwd=ROOT,
            check=False,
        )

    def signal(self, process: subprocess.Popen[bytes], number: int) -> None:
        """Send a signal to the command that `start` began, through its `nsenter`."""
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        os.kill(int(children.split()[0]), number)

    def processes(self, node: Node) -> dict[int, str]:
        """Command line of whatever runs on the node, besides what makes it a machine."""
        space = os.readlink(f"/proc/{node.pid}/ns/pid")
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                if int(process.name) != node.pid and os.readlink(process / "ns/pid") == space:
                    line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    if line and line.strip() != "sleep 3600":
                        found[int(process.name)] = line.strip()
        return found

    def end_all(self, node: Node) -> None:
        """Kill whatever runs on the node, as a batch system does after a job."""
        for pid in self.processes(node):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _run(self, command: list[str], env: Mapping[str, str] | None = None, **options):
        # Whatever ends the tests, SIGKILL included, ends the nodes.
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *command],
            env=env,
            stdin=subprocess.DEVNULL,
            **options,
        )
        self._processes.append(process)
        return process

    def _on_switch(self, script: str) -> None:
        enter = ["nsenter", "-t", str(self._switch.pid), "-n", "sh", "-c", script]
        done = subprocess.run(enter, capture_output=True, text=True, check=False)
        if done.returncode:
            raise AssertionError(f"{script}: {done.stderr}")

    def close(self) -> None:
        """Every process of every node ends with the node's first one."""
        for node in getattr(self, "nodes", []):
            with contextlib.suppress(ProcessLookupError):
                os.kill(node.pid, signal.SIGKILL)
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()


def _enter(node: Node) -> list[str]:
    return ["nsenter", "-t", str(node.pid), "--net", "--mount", "--pid", "--uts", f"--wd={ROOT}"]


def _net_of(pid: int) -> str:
    return os.readlink(f"/proc/{pid}/ns/net")


def _await(condition, what: str, timeout: float = 20.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout:.0f} s for {what}"
        time.sleep(0.02)


@contextlib.contextmanager
def bed(directory: Path, num_nodes: int = 3) -> Iterator[Bed]:
    made = Bed(directory, num_nodes)
    try:
        yield made
    finally:
        made.close()
