"""Sends metrics to a W&B run. Only this module and `wandb_items.py` import wandb."""

from __future__ import annotations

import atexit
import contextlib
import math
import os
import shlex
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from ebm_dist.core import installed
from ebm_dist.metrics.config import TrackingConfig
from ebm_dist.metrics.credentials import scrub, scrub_config
from ebm_dist.metrics.names import FRAME
from ebm_dist.metrics.spool import Continuity, Spool
from ebm_dist.metrics.wandb_items import send

FIRST_RETRY = 1.0
LAST_RETRY = 60.0
"""Pauses in seconds between attempts to reach W&B: they double from the first to the last."""


def new_run_id() -> str:
    """A unique W&B run id."""
    return uuid.uuid4().hex[:10]


def first_run_id(resume_id: str | None) -> str:
    """The initial run id: an agent's, else the checkpoint's, else WANDB_RUN_ID, else a new one."""
    said = os.environ.get("WANDB_RUN_ID")
    if said and _under_an_agent():
        return said  # under a sweep agent the client accepts no other id
    return resume_id or said or new_run_id()


def _under_an_agent() -> bool:
    return any(os.environ.get(name) for name in ("WANDB_SWEEP_ID", "WANDB_LAUNCH"))


def default_entity() -> str | None:
    """The default team or user of the configured key, from the server."""
    import wandb

    return wandb.Api().default_entity


class WandbSink:
    """Sends items to one W&B run in a background thread; only `close` waits for the server.

    If the server cannot be reached, the thread retries with pauses that double up to a minute. If
    it is still unreachable at the end, the items that were not sent go into an offline run of the
    same id. `notice` is called with one line, once for each kind of failure.

    A resume uses `run_id` with resume="allow" and continues after the last history line on the
    server, so the server gets every item once. A run that was deleted on the server is replaced by
    a new run with all items. Rows hold `step`, and every metric is plotted against it: W&B's
    own step counter would refuse the rows of a run that returned to a checkpoint.
    """

    def __init__(
        self,
        config: TrackingConfig,
        mode: Literal["online", "offline"],
        *,
        run_dir: Path,
        run_config: Mapping[str, object],
        run_name: str,
        run_id: str,
        resume_step: int | None,
        notice: Callable[[str], None],
    ) -> None:
        self.mode: Literal["online", "offline"] = mode
        self.url: str | None = None
        self.dir = run_dir / "wandb"
        self._config = config
        self._run_dir = run_dir
        self._run_config = scrub_config(dict(run_config))
        self._run_name = run_name
        self._notice = notice
        self._told: set[str] = set()
        self._run: Any = None
        self._exit_code = 0
        self._spool = Spool(self.dir / "spool.jsonl", resume_step=resume_step)
        self._kept = Continuity(self.dir / "continuity.json", run_id)
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="wandb-sink", daemon=True)
        self._thread.start()

    @property
    def run_id(self) -> str:
        """The id of the W&B run."""
        return self._kept.run_id

    @property
    def sync_command(self) -> str:
        """The command that uploads the run from this disk."""
        kind = "offline-run" if self.mode == "offline" else "run"
        # A glob pattern, since every attempt of a resumed run has its own directory.
        wandb = installed.command("wandb", "wandb")
        return f"{wandb} sync {shlex.quote(str(self.dir))}/{kind}-*{self.run_id}"

    def put(self, item: Mapping[str, Any]) -> None:
        """Queue one item: {"kind": ...}, which `wandb_items.send` reads.

        Raises:
            OSError: the spool cannot be written.
        """
        self._spool.put(item)
        self._wake.set()

    def close(self, exit_code: int = 0) -> None:
        """Send the remaining items and end the run, within the timeouts of the config."""
        self._exit_code = exit_code
        if self._closing.is_set():
            self._thread.join(1.0)
            return
        self._closing.set()
        self._wake.set()
        # A running attempt to connect cannot be cancelled, and the fallback to an offline run
        # takes seconds.
        self._thread.join(self._config.finish_timeout + self._config.init_timeout + 15.0)
        if self._thread.is_alive():
            self._tell("finish", f"W&B: not done in time; send the rest by `{self.sync_command}`")

    # The methods below run in the background thread.

    def _work(self) -> None:
        pause, try_at = FIRST_RETRY, 0.0
        while True:
            closing = self._closing.is_set()
            if self._run is None and time.monotonic() >= try_at:
                if self._connect(self.mode):
                    pause = FIRST_RETRY
                else:
                    try_at = time.monotonic() + pause
                    pause = min(2 * pause, LAST_RETRY)
            if self._run is not None and not self._deliver():
                try_at = time.monotonic() + pause
            if closing:
                break
            if self._run is None:
                # Waits for `close` only: new items do not bring the server back sooner.
                self._closing.wait(max(0.0, try_at - time.monotonic()))
            else:
                self._wake.wait(1.0)
                self._wake.clear()
        self._end()

    def _connect(self, mode: Literal["online", "offline"]) -> bool:
        before = self._directories()
        try:
            self._run = self._init(mode)
        except Exception as error:
            self._run = None
            # The service keeps the id of a run that it could not start.
            self._stop_service()
            for path in self._directories() - before:  # a failed attempt leaves an empty run
                shutil.rmtree(path, ignore_errors=True)
            wrong_key = type(error).__name__ in (
                "AuthenticationError",
                "UsageError",
            ) or "returned error 401" in str(error)
            lost_id = mode == "online" and _is_deleted(error) and not _under_an_agent()
            if lost_id and "deleted" not in self._told:
                old = self.run_id
                self._kept.rename(new_run_id())
                self._tell(
                    "deleted",
                    f"W&B: run {old} was deleted on the server, which does not give its id again; "
                    f"run {self.run_id} takes its place and is sent everything",
                )
                return self._connect(mode)
            if mode == "online" and wrong_key:
                # A retry cannot help.
                self.mode = "offline"
                self._tell(
                    "key",
                    f"W&B: offline ({_first_line(error)}); sync later with `{self.sync_command}`",
                )
                return self._connect("offline")
            self._tell(
                "away",
                f"W&B: cannot start a run yet ({_first_line(error)}); training goes on, metrics "
                f"are kept and it is tried again",
            )
            return False
        if self.run_id != self._run.id:
            self._kept.rename(self._run.id)
        self._spool.start_at(self._num_arrived(mode))
        if "away" in self._told or "lost" in self._told:
            if mode == self.mode:
                self._notice("W&B: connected; what was kept is being sent")
            self._told -= {"away", "lost"}
        return True

    def _num_arrived(self, mode: Literal["online", "offline"]) -> int:
        """The number of items that the server already has, as lines of the run's history.

        Offline runs of one id are uploaded one after another, so each holds only the items that the
        earlier ones lack.
        """
        if mode == "online":
            self._kept.num_passed_on = self._num_lines() if self._run.resumed else 0
        return self._kept.num_passed_on

    def _num_lines(self) -> int:
        import wandb

        try:
            where = {"entity": self._run.entity, "project": self._run.project}
            api = wandb.Api(overrides=where, timeout=math.ceil(self._config.init_timeout))
            return int(api.run(self._run.id).historyLineCount)
        except Exception:
            # The client computes it from the last line or from the summary, which may be newer.
            return int(self._run.starting_step)

    def _init(self, mode: Literal["online", "offline"]) -> Any:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        settings = wandb.Settings(
            silent=True,
            quiet=True,
            console="off",
            init_timeout=self._config.init_timeout,
            finish_timeout=self._config.finish_timeout,
            finish_timeout_raises=True,
            # The address of the git remote and a notebook's code may hold private information.
            disable_git=True,
            disable_code=True,
            x_disable_viewer=True,
            # CPU and memory of the process: of all those that Ray runs on this node, if it runs
            # this one, for the hub itself does next to nothing.
            x_stats_pid=int(os.environ.get("RAY_RAYLET_PID") or os.getpid()),
            x_stats_track_process_tree=True,
        )
        run = wandb.init(
            project=self._config.project,
            entity=self._config.entity,
            group=self._config.group,
            tags=list(self._config.tags) or None,
            name=self._config.name or self._run_name,
            job_type=self._config.job_type,
            notes=self._config.notes,
            id=self.run_id,
            resume="allow",
            dir=str(self._run_dir),
            mode=mode,
            config=self._run_config,
            settings=settings,
            # Does not end a run that the user has opened in this process.
            reinit="create_new",
        )
        for name in FRAME:
            run.define_metric(name, hidden=True)
        run.define_metric("*", step_metric="step")
        if mode == "online":
            # Artifacts and tables need the client's API object. It asks the server when it is made,
            # which would fail if the server were away at the first of them.
            with contextlib.suppress(Exception):
                run._public_api()
        atexit.register(self.close)  # registered after wandb's own hook, so it runs before it
        self.url = None if mode != "online" else run.url
        self.dir = Path(run.settings.sync_dir).parent
        return run

    def _deliver(self) -> bool:
        """Send the items of the spool; False if the connection was lost meanwhile."""
        while items := self._spool.take():
            for item, mark in items:
                try:
                    self._send(item)
                except Exception as error:
                    self._lost(error)
                    return False
                self._spool.advance(mark)
                self._kept.num_passed_on += 1
            self._kept.save()
        return True

    def _lost(self, error: Exception) -> None:
        self._tell(
            "lost", f"W&B: connection lost ({_first_line(error)}); metrics are kept and sent later"
        )
        run, self._run = self._run, None
        with contextlib.suppress(Exception):
            run.finish()
        self._stop_service()  # it may be dead; the next attempt starts a new one

    @staticmethod
    def _stop_service() -> None:
        import wandb

        # The process has one service, so it must not stop while the user has a run open.
        if wandb.run is None:
            with contextlib.suppress(Exception):
                wandb.teardown()

    def _send(self, item: Mapping[str, Any]) -> None:
        frame = {name: item[name] for name in FRAME if item.get(name) is not None}
        try:
            values = send(self._run, item)
        except Exception as error:
            # A bad item must not block the others. It still becomes a line of the history, because
            # the number of lines identifies the items that the server has. If the connection was
            # lost, `log` raises as well, and the item is sent again.
            self._tell("item", f"W&B: an item was left out ({_first_line(error)})")
            values = {}
        self._run.log({**frame, **values})

    def _end(self) -> None:
        if self._run is None and self.mode == "online" and not self._spool.empty():
            # Never connected, or the connection was lost: the rest goes into an offline run.
            if self._connect("offline") and self._deliver():
                self._finish()
                self.mode = "offline"
                self._notice(f"W&B: server not reached; sync later with `{self.sync_command}`")
            return
        self._finish()

    def _finish(self) -> None:
        if self._run is None:
            return
        run, self._run = self._run, None
        try:
            run.finish(exit_code=self._exit_code)
        except Exception as error:
            self._tell(
                "finish",
                f"W&B: not all was sent ({_first_line(error)}); send the rest by "
                f"`{self.sync_command}`",
            )

    def _directories(self) -> set[Path]:
        return set((self._run_dir / "wandb").glob(f"*run-*-{self.run_id}"))

    def _tell(self, kind: str, line: str) -> None:
        if kind not in self._told:
            self._told.add(kind)
            self._notice(line)


def _is_deleted(error: BaseException) -> bool:
    """Whether the server says that a run of this id has been deleted."""
    return "HTTP 409" in str(error) or "previously created and deleted" in str(error)


def _first_line(error: BaseException) -> str:
    lines = scrub(str(error)).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__
