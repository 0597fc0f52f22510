"""The W&B run: the only place that imports wandb."""

from __future__ import annotations

import atexit
import contextlib
import os
import shlex
import shutil
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from ebm_dist.metrics.config import TrackingConfig as TrackingConfig
from ebm_dist.metrics.credentials import scrub, scrub_config
from ebm_dist.metrics.jsonl import JsonlSink as JsonlSink
from ebm_dist.metrics.jsonl import decode, encode, read_rows, repair, replace_rows
from ebm_dist.metrics.names import FRAME

FIRST_RETRY = 1.0
LAST_RETRY = 60.0
"""Seconds between attempts to reach W&B: doubled from the first to the last."""
IN_FLIGHT_S = 60.0
"""Longer than W&B's service holds a row before it sends it."""


def new_run_id() -> str:
    """A W&B run id nobody else has."""
    return uuid.uuid4().hex[:10]


def default_entity() -> str | None:
    """The team or user that the configured key logs to; asks the server."""
    import wandb

    return wandb.Api().default_entity


class Spool:
    """Items on their way to W&B, in a file: a dead server or a dead hub loses none.

    An item is taken by reading on, and the file is emptied when all has been taken. After a
    crash what was in the file is sent again: rows carry their step, so that twice is harmless.
    """

    def __init__(self, path: Path, *, resume_step: int | None) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._taken = 0
        path.parent.mkdir(parents=True, exist_ok=True)
        repair(path)
        if resume_step is not None and path.exists():
            rows = [row for row in read_rows(path) if row.get("step", 0) <= resume_step]
            replace_rows(path, rows)

    def put(self, item: Mapping[str, Any]) -> None:
        with self._lock, open(self._path, "ab", buffering=0) as file:
            file.write(encode(item))

    def take(self, most: int = 500) -> list[tuple[dict[str, Any] | None, int]]:
        """Up to `most` items, each with the mark to hand to `advance` when it is delivered.

        An item is None where its line is no JSON object.
        """
        items, mark = [], self._taken
        with self._lock, contextlib.suppress(FileNotFoundError), open(self._path, "rb") as file:
            file.seek(self._taken)
            for line in file:
                if len(items) >= most or not line.endswith(b"\n"):
                    break
                mark += len(line)
                items.append((decode(line), mark))
        return items

    def advance(self, mark: int) -> None:
        """All up to `mark` is delivered."""
        self._taken = mark

    def done(self) -> None:
        """Empty the file if all of it is delivered."""
        with self._lock, contextlib.suppress(FileNotFoundError):
            if os.path.getsize(self._path) <= self._taken:
                os.truncate(self._path, 0)
                self._taken = 0

    def empty(self) -> bool:
        with self._lock:
            try:
                return os.path.getsize(self._path) <= self._taken
            except FileNotFoundError:
                return True


class WandbSink:
    """Sends items to one W&B run from a thread of its own; no call of it waits for a server.

    Where the server cannot be reached the items stay in the spool and the thread tries again,
    with pauses that double up to a minute. If it is still away at the end, the spool becomes an
    offline run of the same id. `notice` is called once for each kind of trouble, in one line.

    Resume is by `run_id` with resume="allow". Rows hold `step`, and every metric is drawn
    against it: W&B's own counter would refuse the rows of a run that went back to a
    checkpoint.
    """

    def __init__(
        self,
        config: TrackingConfig,
        mode: Literal["online", "offline"],
        *,
        run_dir: Path,
        run_config: Mapping[str, Any],
        run_name: str,
        run_id: str,
        resume_step: int | None,
        notice: Callable[[str], None],
    ) -> None:
        self.mode: Literal["online", "offline"] = mode
        self.run_id = run_id
        self.url: str | None = None
        self.dir = run_dir / "wandb"
        self._config = config
        self._run_dir = run_dir
        self._run_config = scrub_config(dict(run_config))
        self._run_name = run_name
        self._notice = notice
        self._told: set[str] = set()
        self._run: Any = None
        self._recent: deque[tuple[float, Mapping[str, Any]]] = deque(maxlen=2000)  # when, what
        self._lost_at = 0.0
        self._spool = Spool(self.dir / "spool.jsonl", resume_step=resume_step)
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._give_up_at = float("inf")
        self._thread = threading.Thread(target=self._work, name="wandb-sink", daemon=True)
        self._thread.start()

    @property
    def sync_command(self) -> str:
        """The command that sends what is kept on this disk."""
        kind = "offline-run" if self.mode == "offline" else "run"
        # A pattern, since every attempt of a resumed run leaves a directory.
        return f"wandb sync {shlex.quote(str(self.dir))}/{kind}-*{self.run_id}"

    def put(self, item: Mapping[str, Any]) -> None:
        """Hand over one item: {"kind": "row" | "image" | "histogram" | "summary", ...}.

        Raises:
            OSError: the spool cannot be written.
        """
        self._spool.put(item)
        self._wake.set()

    def close(self) -> None:
        """Send what is left and end the run, within the timeouts of the config."""
        if self._closing.is_set():
            self._thread.join(1.0)
            return
        limit = self._config.finish_timeout
        self._give_up_at = time.monotonic() + limit
        self._closing.set()
        self._wake.set()
        # An attempt to connect that is under way cannot be called off, and the fallback to
        # an offline run takes seconds.
        self._thread.join(limit + self._config.init_timeout + 15.0)
        if self._thread.is_alive():
            self._tell("finish", f"W&B: not done in time; send the rest by `{self.sync_command}`")

    # The thread's own part, below.

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
                # Woken by `close` alone: new items do not make the server come back sooner.
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
            # The service goes on holding the id of a run it could not start.
            self._stop_service()
            for path in self._directories() - before:  # an attempt leaves an empty run behind
                shutil.rmtree(path, ignore_errors=True)
            wrong_key = type(error).__name__ in (
                "AuthenticationError",
                "UsageError",
            ) or "returned error 401" in str(error)
            if mode == "online" and wrong_key:
                # Asking again would not mend it.
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
        if "away" in self._told or "lost" in self._told:
            if mode == self.mode:
                self._notice("W&B: connected; what was kept is being sent")
                if "lost" in self._told:
                    self._send_again()
            self._told -= {"away", "lost"}
        return True

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
            # The remote's address and a notebook's code may hold what is nobody's business.
            disable_git=True,
            disable_code=True,
            x_disable_viewer=True,
        )
        run = wandb.init(
            project=self._config.project,
            entity=self._config.entity,
            group=self._config.group,
            tags=list(self._config.tags) or None,
            name=self._run_name,
            id=self.run_id,
            resume="allow",
            dir=str(self._run_dir),
            mode=mode,
            config=self._run_config,
            settings=settings,
            # A run of the user's own in this process goes on undisturbed.
            reinit="create_new",
        )
        for name in FRAME:
            run.define_metric(name, hidden=True)
        run.define_metric("*", step_metric="step")
        atexit.register(self.close)  # after wandb's own hook, so run before it
        self.url = None if mode != "online" else run.url
        self.dir = Path(run.settings.sync_dir).parent
        return run

    def _deliver(self) -> bool:
        """Send all of the spool; False where the run was lost on the way."""
        while items := self._spool.take():
            for item, mark in items:
                try:
                    if item is not None:
                        self._send(item)
                        self._recent.append((time.monotonic(), item))
                except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
                    # This item's own fault: it must not stand in the way of all others.
                    self._tell("item", f"W&B: an item was left out ({_first_line(error)})")
                except Exception as error:
                    self._lost(error)
                    return False
                self._spool.advance(mark)
            self._spool.done()
        return True

    def _lost(self, error: Exception) -> None:
        self._tell(
            "lost", f"W&B: connection lost ({_first_line(error)}); metrics are kept and sent later"
        )
        self._lost_at = time.monotonic()
        run, self._run = self._run, None
        with contextlib.suppress(Exception):
            run.finish()
        self._stop_service()  # it may be dead; the next attempt starts another

    def _send_again(self) -> None:
        """Repeat what the service took and may have died with.

        That is rows beyond the server's last step, and the last minute's: its summary, which is
        all that W&B tells of a run, is sent by itself and may be ahead of the rows. A row that
        comes twice is one point of a curve.
        """
        with contextlib.suppress(Exception):
            known = self._run.summary.get("step")
            for at, item in list(self._recent):
                if known is None or item.get("step", 0) > known or at > self._lost_at - IN_FLIGHT_S:
                    self._send(item)

    @staticmethod
    def _stop_service() -> None:
        import wandb

        # The service is the process's: a run that the user opened in it must not end with ours.
        if wandb.run is None:
            with contextlib.suppress(Exception):
                wandb.teardown()

    def _send(self, item: Mapping[str, Any]) -> None:
        import wandb

        frame = {name: item[name] for name in FRAME if item.get(name) is not None}
        kind = item["kind"]
        if kind == "row":
            values = {
                name: float("nan") if value is None else value
                for name, value in item["values"].items()
            }
            self._run.log({**frame, **values})
        elif kind == "image":
            self._run.log({**frame, item["name"]: wandb.Image(item["path"])})
        elif kind == "histogram":
            pair = (item["counts"], item["edges"])
            self._run.log({**frame, item["name"]: wandb.Histogram(np_histogram=pair)})
        elif kind == "summary":
            self._run.summary.update(item["values"])
        else:
            raise ValueError(f"unknown kind {kind!r}")

    def _end(self) -> None:
        if self._run is None and self.mode == "online" and not self._spool.empty():
            # Never connected, or lost for good: an offline run of the same id holds the rest.
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
            run.finish()
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


def _first_line(error: BaseException) -> str:
    lines = scrub(str(error)).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__
