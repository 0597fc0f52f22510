"""Sweeps of the stand-in for the W&B server: it takes a sweep, and tells its agents what to try."""

from __future__ import annotations

import json
from typing import Any

import yaml


class SweepService:
    """The part of the server for sweeps. An agent gets one trial at a time, then is told to end."""

    def __init__(self) -> None:
        self.sweeps: dict[str, dict[str, Any]] = {}
        """Configs by id."""
        self.trials: list[tuple[str, dict[str, Any]]] = []
        """Run id and parameters of each trial that no agent has yet."""
        self.agents: dict[str, str] = {}
        """The sweep of each agent."""

    def _on_UpsertSweep(self, variables: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        name = f"sweep{len(self.sweeps)}"
        self.sweeps[name] = yaml.safe_load(variables["config"])
        entity = {"id": "1", "name": variables["entityName"] or "tester"}
        project = {"id": "1", "name": variables["projectName"], "entity": entity}
        return {"upsertSweep": {"sweep": {"name": name, "project": project}}}

    def _on_SweepWithRuns(self, variables: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        name = variables["sweep"]
        config = yaml.safe_dump(self.sweeps[name])
        sweep = {"id": name, "name": name, "config": config, "runs": {"edges": []}}
        return {"project": {"sweep": sweep}}

    def _on_CreateAgent(self, variables: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        name = f"agent{len(self.agents)}"
        self.agents[name] = variables["sweep"]
        return {"createAgent": {"agent": {"id": name}}}

    def _on_Heartbeat(self, variables: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        commands: list[dict[str, Any]] = []
        if not json.loads(variables["runState"]):  # the agent has no trial under way
            commands = [{"type": "exit"}]
            if self.trials:
                run_id, values = self.trials.pop(0)
                program = self.sweeps[self.agents[variables["id"]]]["program"]
                given = {key: {"value": value} for key, value in values.items()}
                commands = [{"type": "run", "run_id": run_id, "program": program, "args": given}]
        agent = {"id": variables["id"]}
        return {"agentHeartbeat": {"agent": agent, "commands": json.dumps(commands)}}
