"""Artifacts and alerts of the stand-in for the W&B server.

As the service does, it takes an artifact whose digest its collection holds already for that
version, moves aliases to the version that was logged last with them, and records which run made or
used a version. Of alerts of one title it keeps one in the pause that they ask for.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class ServedArtifact:
    """One version."""

    id: str
    collection: str
    type: str
    digest: str
    made_by: str | None
    version: int
    metadata: dict[str, Any]
    aliases: list[str] = field(default_factory=list)
    used_by: list[str] = field(default_factory=list)
    manifest: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    is_committed: bool = False


class ArtifactService:
    """The part of the server for artifacts and alerts."""

    url: str
    """Of the server."""

    def __init__(self) -> None:
        self.artifacts: dict[str, ServedArtifact] = {}
        self.alerts: list[dict[str, Any]] = []
        self.now: Callable[[], float] = time.monotonic
        """The service's clock, in seconds."""
        self._alerted: dict[tuple[str, str], float] = {}

    def versions(self, collection: str) -> list[ServedArtifact]:
        """The committed versions of a collection, oldest first."""
        found = [a for a in self.artifacts.values() if a.collection == collection]
        return [artifact for artifact in found if artifact.is_committed]

    def aliased(self, collection: str, alias: str) -> ServedArtifact:
        (found,) = [a for a in self.versions(collection) if alias in a.aliases]
        return found

    def take_artifact_file(self, place: str, body: bytes) -> None:
        """A PUT to artifact/ID/manifest or artifact/ID/file/NAME."""
        id, _, name = place.partition("/")
        if name == "manifest":
            self.artifacts[id].manifest = json.loads(body)
        else:
            self.artifacts[id].files[name.removeprefix("file/")] = body

    def _on_ArtifactType(self, _: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        return {"project": None}

    def _on_CreateArtifact(self, variables: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        given = variables["input"]
        name = given["artifactCollectionName"]
        held = self.versions(name)
        artifact = next((a for a in held if a.digest == given["digest"]), None)
        if artifact is None:
            artifact = ServedArtifact(
                id=f"artifact{len(self.artifacts)}",
                collection=name,
                type=given["artifactTypeName"],
                digest=given["digest"],
                made_by=given["runName"],
                version=len(held),
                metadata=json.loads(given.get("metadata") or "{}"),
            )
            self.artifacts[artifact.id] = artifact
        for alias in [alias["alias"] for alias in given.get("aliases") or []]:
            for other in self.artifacts.values():
                if other.collection == name and alias in other.aliases:
                    other.aliases.remove(alias)
            artifact.aliases.append(alias)
        latest = {"id": held[-1].id} if held else None
        return {
            "createArtifact": {
                "artifact": {
                    "id": artifact.id,
                    "state": "COMMITTED" if artifact.is_committed else "PENDING",
                    "artifactSequence": {"latestArtifact": latest},
                }
            }
        }

    def _on_CreateArtifactManifest(self, variables: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        id = variables["artifactID"]
        url = f"{self.url}/artifact/{id}/manifest"
        file = {"id": f"file-{id}", "uploadUrl": url, "uploadHeaders": []}
        return {"createArtifactManifest": {"artifactManifest": {"id": id, "file": file}}}

    def _on_CreateArtifactFiles(self, variables: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        nodes = [
            {
                "storagePath": f"{spec['artifactID']}/{spec['name']}",
                "uploadUrl": f"{self.url}/artifact/{spec['artifactID']}/file/{spec['name']}",
                "uploadHeaders": [],
                "uploadMultipartUrls": None,
                "artifact": {"id": spec["artifactID"]},
            }
            for spec in variables["input"]["artifactFiles"]
        ]
        edges = [{"node": node} for node in nodes]
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def _on_CommitArtifact(self, variables: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        artifact = self.artifacts[variables["artifactID"]]
        assert artifact.manifest["contents"].keys() == artifact.files.keys()
        artifact.is_committed = True
        answer = {"id": artifact.id, "digest": artifact.digest}
        return {"commitArtifact": {"artifact": answer}}

    def _on_UseArtifact(self, variables: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        given = variables["input"]
        artifact = self.artifacts[given["artifactID"]]
        if given["runName"] not in artifact.used_by:
            artifact.used_by.append(given["runName"])
        return {"useArtifact": {"artifact": {"id": artifact.id}}}

    def _on_NotifyScriptableRunAlert(self, variables: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        alert, now = (variables["runName"], variables["title"]), self.now()
        if now >= self._alerted.get(alert, -math.inf) + variables["waitDuration"] / 1000:
            self._alerted[alert] = now
            self.alerts.append(variables)
        return {"notifyScriptableRunAlert": {"success": True}}
