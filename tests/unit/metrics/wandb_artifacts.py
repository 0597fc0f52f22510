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

    def artifact_file(self, place: str) -> bytes:
        """What was PUT there."""
        id, _, name = place.partition("/")
        artifact = self.artifacts[id]
        if name == "manifest":
            return json.dumps(artifact.manifest).encode()
        return artifact.files[name.removeprefix("file/")]

    def _on_ArtifactMembershipByName(self, variables: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        collection, _, alias = variables["name"].partition(":")
        found = self.aliased(collection, alias)
        entity = {"name": variables["entity"]}
        project = {"id": "1", "internalId": "1", "name": variables["project"], "entity": entity}
        made = {"versionIndex": found.version, "createdAt": "2026-01-01T00:00:00Z"}
        sequence = {"__typename": "ArtifactSequence", "name": collection, "project": project}
        artifact = {
            **made,
            "__typename": "Artifact",
            "id": found.id,
            "artifactSequence": sequence,
            "artifactType": {"name": found.type},
            "description": None,
            "metadata": json.dumps(found.metadata),
            "ttlDurationSeconds": -1,
            "ttlIsInherited": True,
            "tags": [],
            "historyStep": None,
            "state": "COMMITTED",
            "size": sum(map(len, found.files.values())),
            "digest": found.digest,
            "commitHash": None,
            "fileCount": len(found.files),
            "updatedAt": None,
            "aliases": [],
        }
        aliases = [
            {"__typename": "ArtifactAlias", "id": name, "alias": name} for name in found.aliases
        ]
        membership = {
            **made,
            "__typename": "ArtifactCollectionMembership",
            "id": found.id,
            "aliases": aliases,
            "artifactCollection": sequence,
            "artifact": artifact,
        }
        return {"project": {"artifactCollectionMembership": membership}}

    def _on_FetchArtifactManifest(self, variables: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        url = f"{self.url}/artifact/{variables['id']}/manifest"
        return {"artifact": {"currentManifest": {"file": {"directUrl": url}}}}

    def _on_GetArtifactMembershipFileUrls(self, variables: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        version = int(variables["alias"].removeprefix("v"))
        found = self.versions(variables["collection"])[version]
        edges = [
            {
                "node": {
                    "__typename": "File",
                    "name": name,
                    "directUrl": f"{self.url}/artifact/{found.id}/file/{name}",
                }
            }
            for name in found.files
        ]
        page = {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}
        membership = {"files": {"pageInfo": page, "edges": edges}}
        collection = {"__typename": "ArtifactSequence", "artifactMembership": membership}
        return {"project": {"artifactCollection": collection}}

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
