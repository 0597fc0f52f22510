"""What can be said about launch/ and docker/ without a cluster: every file parses, is valid, agrees
with the others, and names only what exists."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from ebm_dist.config import run_config

ROOT = Path(__file__).parents[3]
LAUNCH, DOCKER, PAGES = ROOT / "launch", ROOT / "docker", ROOT / "docs" / "clusters"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("slurm/*"), *DOCKER.glob("*.sh")])
DOCKERFILES = sorted(f for f in DOCKER.glob("Dockerfile.*") if f.suffix != ".dockerignore")
MANIFESTS = sorted(LAUNCH.glob("kuberay/*.yaml"))
PAGE_FILES = sorted(PAGES.glob("*.md"))

RAY_SETTINGS = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "18",
    "RAY_grpc_keepalive_timeout_ms": "60000",
    "RAY_worker_niceness": "0",
}


def tool(name: str) -> str:
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed (pip install 'ebm_dist[dev]')")
    return found


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def cluster_spec(path: Path) -> dict[str, Any]:
    resource = documents(path)[-1]
    return resource["spec"].get("rayClusterSpec", resource["spec"])


def pod_templates(path: Path) -> dict[str, dict[str, Any]]:
    spec = cluster_spec(path)
    templates = {"head": spec["headGroupSpec"]["template"]}
    templates |= {group["groupName"]: group["template"] for group in spec["workerGroupSpecs"]}
    submitter = documents(path)[-1]["spec"].get("submitterPodTemplate")
    return templates | ({"submitter": submitter} if submitter else {})


def pinned_ports() -> dict[str, str]:
    """The ports of common.sh, by the name of their `ray start` option."""
    text = (LAUNCH / "common.sh").read_text()
    ports = dict(re.findall(r"^  --([a-z-]+)=(\d+)$", text, re.MULTILINE))
    assert len(ports) == 8
    return ports


def named_ports() -> dict[str, str]:
    text = (LAUNCH / "common.sh").read_text()
    return dict(re.findall(r"^EBM_PORT_([A-Z]+)=(\d+)$", text, re.MULTILINE))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_shellcheck_finds_nothing(script: Path) -> None:
    done = subprocess.run(
        [tool("shellcheck"), "-x", str(script.relative_to(ROOT))],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda p: p.name)
def test_hadolint_finds_nothing(dockerfile: Path) -> None:
    done = subprocess.run([tool("hadolint"), str(dockerfile)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def kubernetes_errors(path: Path, resource: dict[str, Any]) -> str:
    path.write_text(yaml.safe_dump(resource))
    done = subprocess.run(
        [tool("kubernetes-validate"), "--strict", str(path)], capture_output=True, text=True
    )
    return "" if done.returncode == 0 else done.stdout + done.stderr


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda p: p.name)
def test_pod_templates_and_core_kinds_satisfy_the_kubernetes_schema(
    manifest: Path, tmp_path: Path
) -> None:
    # KubeRay's own kinds have no schema here; what they hold of Kubernetes' is checked as such.
    resources = {doc["kind"]: doc for doc in documents(manifest)[:-1]}
    for name, template in pod_templates(manifest).items():
        pod = {"apiVersion": "v1", "kind": "Pod", **copy.deepcopy(template)}
        pod["metadata"]["name"] = name
        resources[name] = pod
    for name, resource in resources.items():
        errors = kubernetes_errors(tmp_path / f"{name}.yaml", resource)
        assert not errors, f"{name}: {errors}"
    broken = copy.deepcopy(resources["head"])
    broken["spec"]["containers"][0]["volumeMount"] = []
    assert kubernetes_errors(tmp_path / "broken.yaml", broken)


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda p: p.name)
def test_manifests_hold_only_keys_that_kuberay_knows(manifest: Path) -> None:
    # From ray-operator/apis/ray/v1 of KubeRay 1.5.
    cluster = {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"}
    job = {
        *("entrypoint", "backoffLimit", "submissionMode", "shutdownAfterJobFinishes"),
        *("ttlSecondsAfterFinished", "submitterPodTemplate", "rayClusterSpec"),
    }
    group = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
    resource = documents(manifest)[-1]
    assert resource["apiVersion"] == "ray.io/v1"
    assert set(resource["spec"]) <= (job if resource["kind"] == "RayJob" else cluster)
    spec = cluster_spec(manifest)
    assert set(spec) == cluster
    assert set(spec["headGroupSpec"]) <= group
    for workers in spec["workerGroupSpecs"]:
        assert set(workers) <= group


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda p: p.name)
def test_pods_run_without_privileges_and_with_a_token(manifest: Path) -> None:
    assert cluster_spec(manifest)["authOptions"] == {"mode": "token"}
    for name, template in pod_templates(manifest).items():
        pod = template["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        assert pod["automountServiceAccountToken"] is False, name
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda p: p.name)
def test_head_pod_may_stay_longer_than_its_checkpoint_may_take(manifest: Path) -> None:
    pod = pod_templates(manifest)["head"]["spec"]
    command = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    assert command[0] == "/opt/ebm_dist/launch/drain.sh"
    assert pod["terminationGracePeriodSeconds"] > int(command[1])


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda p: p.name)
def test_kuberay_nodes_use_the_pinned_ports_and_settings_of_ray(manifest: Path) -> None:
    spec = cluster_spec(manifest)
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        assert pinned_ports().items() <= group["rayStartParams"].items()
        (container,) = group["template"]["spec"]["containers"]
        env = {entry["name"]: entry.get("value") for entry in container["env"]}
        assert RAY_SETTINGS.items() <= env.items()
    policy = next(doc for doc in documents(manifest) if doc["kind"] == "NetworkPolicy")
    opened = {
        rule["from"][0]["podSelector"]["matchLabels"]["app.kubernetes.io/name"]: [
            str(port["port"]) for port in rule.get("ports", ())
        ]
        for rule in policy["spec"]["ingress"]
    }
    assert opened == {
        "ebm-dist": [],  # every port
        "kuberay-operator": [named_ports()["DASHBOARD"]],
        "prometheus": [pinned_ports()["metrics-export-port"]],
    }


GIB = {"Gi": 2**30, "gb": 2**30}  # Docker's gb are powers of two


def num_bytes(text: str) -> int:
    return int(text[:-2]) * GIB[text[-2:]]


def default_of(text: str) -> str:
    """What Compose takes where the variable is not set."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda p: p.name)
def test_shared_memory_of_a_pod_holds_rays_objects_and_as_much_of_chains(manifest: Path) -> None:
    spec = cluster_spec(manifest)
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (memory,) = [v["emptyDir"] for v in pod["volumes"] if "emptyDir" in v]
        shared = num_bytes(memory["sizeLimit"])
        assert 2 * int(group["rayStartParams"]["object-store-memory"]) <= shared
        (container,) = pod["containers"]
        assert shared < num_bytes(container["resources"]["limits"]["memory"])
        assert {"name": "shared-memory", "mountPath": "/dev/shm"} in container["volumeMounts"]


def test_shared_memory_of_a_container_holds_rays_objects_and_as_much_of_chains() -> None:
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    for name, service in compose["services"].items():
        options = dict(o[2:].split("=", 1) for o in service["command"] if "=" in o)
        store = int(default_of(options["object-store-memory"]))
        assert 2 * store <= num_bytes(default_of(service["shm_size"])), name


def test_compose_nodes_use_the_pinned_ports_and_settings_of_ray() -> None:
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    assert set(compose["services"]) == {"head", "node-1", "node-2"}
    for name, service in compose["services"].items():
        options = dict(o[2:].split("=", 1) for o in service["command"] if "=" in o)
        assert pinned_ports().items() <= options.items(), name
        assert RAY_SETTINGS.items() <= service["environment"].items()
        assert service["environment"]["RAY_AUTH_MODE"] == "token"
        assert service["secrets"] == ["ray_token"]
        assert service["shm_size"]
        assert service["cap_drop"] == ["ALL"]
    head = compose["services"]["head"]
    assert f"--port={named_ports()['GCS']}" in head["command"]
    assert f"--address=head:{named_ports()['GCS']}" in compose["services"]["node-1"]["command"]
    port = named_ports()["DASHBOARD"]
    assert head["ports"] == [f"127.0.0.1:{port}:{port}"]


def test_scripts_and_images_use_the_same_settings_of_ray() -> None:
    common = (LAUNCH / "common.sh").read_text()
    for key, value in RAY_SETTINGS.items():
        assert f"export {key}={value}\n" in common
        for dockerfile in DOCKERFILES:
            assert f"{key}={value}" in dockerfile.read_text(), dockerfile.name


def test_ray_accepts_the_cluster_config_and_its_start_options() -> None:
    util = pytest.importorskip("ray.autoscaler._private.util", reason="ray is not installed")
    from ray.scripts.scripts import start

    spec = yaml.safe_load((LAUNCH / "ray-cluster.yaml").read_text())
    util.validate_config(util.prepare_config(copy.deepcopy(spec)))
    known = {option for parameter in start.params for option in parameter.opts}
    used = {f"--{name}" for name in pinned_ports()}
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        command = spec[key][-1]
        assert "require_token &&" in command
        assert '"${EBM_RAY_PORTS[@]}"' in command
        used |= set(re.findall(r"(--[a-z-]+)", command))
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    for service in compose["services"].values():
        used |= {o.split("=")[0] for o in service["command"] if o.startswith("--")}
    for path in (*LAUNCH.glob("local.sh"), *LAUNCH.glob("slurm/*")):
        for command in re.findall(
            r"(?:launch_ray|symmetric-run)((?:.|\\\n)*?[^\\])\n", path.read_text()
        ):
            used |= set(re.findall(r"(--[a-z-]+)[= ]", command.split(" -- ")[0]))
    assert used - known <= {"--min-nodes"}
    for path, ours in spec["file_mounts"].items():
        assert ours == "~/.ray/auth_token" or (ROOT / ours).exists(), path


def test_every_file_that_an_image_copies_exists_and_is_not_ignored() -> None:
    for dockerfile in DOCKERFILES:
        ignore = dockerfile.with_name(f"{dockerfile.name}.dockerignore").read_text().split()
        kept = {line[1:] for line in ignore if line.startswith("!")}
        copied = set()
        for line in re.findall(r"^COPY (?!--from)(.+)$", dockerfile.read_text(), re.MULTILINE):
            copied |= set(line.split()[:-1])
        assert copied == kept, dockerfile.name
        for name in copied:
            assert (ROOT / name).exists(), name
        assert re.search(r"^USER \$\{USER_ID\}$", dockerfile.read_text(), re.MULTILINE)
        assert re.search(r"^ARG PYTHON_IMAGE=python:3\.\d+\.\d+-", dockerfile.read_text(), re.M)


def test_images_can_compile_the_samplers_steps() -> None:
    for dockerfile in DOCKERFILES:
        final = dockerfile.read_text().rsplit("\nFROM ", 1)[1]
        (installed,) = re.findall(r"apt-get install --yes --no-install-recommends (.+) \\", final)
        assert "g++" in installed.split(), dockerfile.name


def test_images_differ_only_in_where_torch_comes_from() -> None:
    def steps(name: str) -> list[str]:
        text = (DOCKER / name).read_text()
        varies = ("#", "ARG TORCH_INDEX_URL", "    NVIDIA_", "    DS_ACCELERATOR")
        return [line for line in text.splitlines() if not line.startswith(varies)]

    assert steps("Dockerfile.cpu") == steps("Dockerfile.cuda")


def test_every_pin_of_the_images_is_exact_and_said_once() -> None:
    pins = {}
    for path in (ROOT / "constraints.txt", DOCKER / "constraints.txt"):
        for line in path.read_text().splitlines():
            if line and not line.startswith("#"):
                name, version = line.split("==")
                key = re.sub(r"[-_.]+", "-", name).lower()
                assert pins.setdefault(key, version) == version, name
    assert {"torch", "ray", "deepspeed", "aiohttp", "grpcio"} <= set(pins)


def test_every_manifest_and_page_names_the_pinned_ray() -> None:
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line
    )
    for manifest in MANIFESTS:
        assert cluster_spec(manifest)["rayVersion"] == pins["ray"]


def train_commands() -> list[tuple[str, list[str]]]:
    """Each `ebm-dist train` of the launchers and pages, as (file, arguments)."""
    found = []
    for path in (*SCRIPTS, *MANIFESTS, *PAGE_FILES):
        text = path.read_text().replace("\\\n", " ")
        for line in re.findall(r"ebm-dist train ([^\n`]+)", text):
            found.append((path.name, line.split()))
    return found


def test_flags_given_to_train_exist() -> None:
    from typer.main import get_command

    from ebm_dist.cli import app

    train = get_command(app).commands["train"]  # type: ignore[attr-defined]
    known = {option for parameter in train.params for option in parameter.opts}
    commands = train_commands()
    assert len(commands) >= 4
    for name, words in commands:
        used = {word.split("=")[0] for word in words if re.match(r"--[a-z]", word)}
        assert used <= known, f"{name}: {used - known}"


def test_files_configs_and_keys_that_are_named_exist() -> None:
    texts = {path: path.read_text() for path in (*SCRIPTS, *MANIFESTS, *PAGE_FILES, *DOCKERFILES)}
    texts[DOCKER / "compose.yaml"] = (DOCKER / "compose.yaml").read_text()
    texts[LAUNCH / "ray-cluster.yaml"] = (LAUNCH / "ray-cluster.yaml").read_text()
    named = set()
    for path, text in texts.items():
        for name in re.findall(
            r"(?<![\w./$}=-])(?:/opt/ebm_dist/|~/ebm_dist/)?"
            r"((?:launch|docker|configs|docs)/[\w./-]*\w)",
            text,
        ):
            named.add(name)
            assert (ROOT / name).exists(), f"{path.name} names {name}"
    assert "configs/digits.yaml" in named
    schema = json.dumps(run_config.RunConfig.model_json_schema())
    for path in PAGE_FILES:
        for section, key in re.findall(r"`([a-z]+)\.([a-z_]+)(?:=[^`]*)?`", path.read_text()):
            if section in run_config.RunConfig.model_fields:
                assert f'"{key}"' in schema, f"{path.name}: {section}.{key}"


def test_every_way_to_start_has_a_page_and_every_page_is_listed() -> None:
    ways = {"local", "ray-up", "slurm", "kuberay", "job-submission", "docker"}
    assert {path.stem for path in PAGE_FILES} == ways | {"README"}
    index = (PAGES / "README.md").read_text()
    for way in ways:
        assert f"({way}.md)" in index
        text = (PAGES / f"{way}.md").read_text()
        for heading in ("What it needs", "Start", "Watch", "After a preemption", "Tried"):
            assert f"\n## {heading}\n" in text, f"{way}.md: {heading}"


def test_no_file_holds_a_secret() -> None:
    secret = re.compile(r"(TOKEN|API_KEY|PASSWORD)[\"']?[ \t]*[:=][ \t]*[\"']?[A-Za-z0-9_-]{12,}")
    for path in (*LAUNCH.rglob("*"), *DOCKER.rglob("*"), *PAGES.rglob("*")):
        if path.is_file():
            assert not secret.search(path.read_text()), path
