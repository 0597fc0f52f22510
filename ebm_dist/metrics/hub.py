"""The metric hub: the only writer of a run's metrics."""

from __future__ import annotations

import logging
import math
import os
import queue
import shlex
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec, TypedDict

import numpy as np

from ebm_dist.core.errors import UserError
from ebm_dist.metrics.config import TrackingConfig
from ebm_dist.metrics.credentials import resolve_mode, scrub, with_environment
from ebm_dist.metrics.jsonl import METRICS_FILE, JsonlSink, read_rows
from ebm_dist.metrics.names import FRAME, explained
from ebm_dist.metrics.protocol import Sink
from ebm_dist.metrics.sink import WandbSink, first_run_id
from ebm_dist.metrics.tensorboard import TensorBoardSink

MAX_WAITING = 10_000
"""Capacity of the queue to the disk; when it is full, rows are dropped and counted."""

NUM_BINS = 64
HISTOGRAMS_FILE = "histograms.jsonl"

_log = logging.getLogger(__name__)


class HubInfo(TypedDict):
    """Where the metrics of a run go; stands as it is in a checkpoint."""

    id: str | None
    """Of the W&B run."""
    mode: Literal["online", "offline", "off"]
    dir: str | None
    """The run's W&B directory."""
    url: str | None
    """Of the run's page, None until it is known."""
    notice: str
    """One line for people."""
    sync: str | None
    """The command that sends an offline run."""
    metrics: str
    """The path of metrics.jsonl."""
    notices: list[str]
    """Trouble so far, a line each."""


def unknown_hub(run_id: str | None) -> HubInfo:
    """What is known before a hub has answered."""
    return {
        "id": run_id,
        "mode": "off",
        "dir": None,
        "url": None,
        "notice": "",
        "sync": None,
        "metrics": "",
        "notices": [],
    }


_Given = ParamSpec("_Given")


def _never_raises(
    method: Callable[Concatenate[MetricHub, _Given], None],
) -> Callable[Concatenate[MetricHub, _Given], None]:
    """`method`, whose failures become a notice."""

    @wraps(method)
    def told(self: MetricHub, /, *args: _Given.args, **kwargs: _Given.kwargs) -> None:
        try:
            method(self, *args, **kwargs)
        except Exception as error:
            self._trouble(method.__name__, error)

    return told


class MetricHub:
    """Writes `metrics.jsonl` and `histograms.jsonl`, and to the sinks.

    It is a plain class, hosted by an actor or used directly. After the constructor no method
    raises, and only `flush` and `close` wait: items go through a bounded queue to a thread that
    writes files, and then through a spool file to another thread that sends them to W&B. Each kind
    of failure is reported once, in `notices`.

    **Resume.** With `resume_step` s, rows beyond s move to `metrics.superseded.jsonl`, so
    `metrics.jsonl` always holds one history. W&B cannot delete rows: for updates that a
    resumed run repeats, it keeps the rows that were logged first. In a live run that returns to a
    checkpoint, the first row of a newer epoch moves the rows that it repeats. The old rows
    may not be finite, so W&B then gets the newer rows as well, with the greater `epoch`.

    Args:
        run_config: shown on W&B, with secrets hidden.
        resume_id: the W&B run to continue, from `info().id` of the earlier attempt.
        resume_step: the learner update of the checkpoint from which the run resumes.

    Raises:
        UserError: the run directory cannot be written, or `online` has no key.
    """

    def __init__(
        self,
        config: TrackingConfig,
        run_dir: str | os.PathLike[str],
        run_config: Mapping[str, object],
        run_name: str,
        resume_id: str | None = None,
        *,
        resume_step: int | None = None,
    ) -> None:
        self._run_dir = Path(run_dir).absolute()
        config = with_environment(config)
        mode, self._line = resolve_mode(config)
        self._notices: list[str] = []
        self._told: set[str] = set()
        self._num_dropped = 0
        self._also = ""
        try:
            self._jsonl = JsonlSink(self._run_dir / METRICS_FILE)
            self._histograms = JsonlSink(self._run_dir / HISTOGRAMS_FILE)
            if resume_step is not None:
                self._jsonl.rewind(resume_step)
            self._epoch, self._last_step = _newest(self._run_dir / METRICS_FILE)
            self._wandb = None
            if mode != "off":
                self._wandb = WandbSink(
                    config,
                    mode,
                    run_dir=self._run_dir,
                    run_config=run_config,
                    run_name=run_name,
                    run_id=first_run_id(resume_id),
                    resume_step=resume_step,
                    notice=self._notice,
                )
            self._sinks: list[tuple[str, Sink]] = [("spool", self._wandb)] if self._wandb else []
            if "tensorboard" in config.sinks:
                folder = self._run_dir / "tensorboard"
                self._sinks.append(
                    ("TensorBoard", TensorBoardSink(folder, resume_step=resume_step))
                )
                self._also = f"; TensorBoard: `tensorboard --logdir {shlex.quote(str(folder))}`"
        except OSError as error:
            raise UserError(
                f"run.dir: cannot write metrics below {self._run_dir} ({error.strerror or error}); "
                "name a directory that is writable and has room"
            ) from None
        self._waiting: queue.Queue[tuple[str, Any]] = queue.Queue(MAX_WAITING)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="metric-hub", daemon=True)
        self._thread.start()

    @_never_raises
    def log(self, step: int, epoch: int, values: Mapping[str, object]) -> None:
        """Log scalars of learner update `step`; values that are not numbers are left out."""
        plain = {str(name): _scalar(value) for name, value in values.items()}
        for name in [name for name, value in plain.items() if value is None]:
            del plain[name]
            self._tell(f"scalar {name}", f"metric {name} is not a number; it is left out")
        if plain:
            self._put("row", {"step": int(step), "epoch": int(epoch), "values": plain})

    @_never_raises
    def images(self, name: str, step: int, path: str) -> None:
        """Log the picture in the PNG file `path`."""
        item = {"step": int(step), "name": str(name), "path": str(Path(path).absolute())}
        self._put("image", item)

    @_never_raises
    def histogram(self, name: str, step: int, values: np.ndarray) -> None:
        """Log the histogram of `values` (any shape); non-finite values are left out."""
        flat = np.asarray(values, dtype=np.float64).ravel()
        flat = flat[np.isfinite(flat)]
        if not flat.size:
            return
        counts, edges = np.histogram(flat, bins=NUM_BINS)
        row = {"step": int(step), "name": str(name)}
        self._put("histogram", {**row, "counts": counts.tolist(), "edges": edges.tolist()})

    @_never_raises
    def artifact(
        self,
        step: int,
        kind: Literal["dataset", "model", "checkpoint"],
        folder: str,
        aliases: Sequence[str],
        metadata: Mapping[str, object],
    ) -> None:
        """Log `folder`, which must never change, as W&B artifact: the data that the run uses, or
        what it makes. A folder of the same name is logged once for an update."""
        item = {"step": int(step), "name": f"{kind} {Path(folder).name}", "path": str(folder)}
        self._put(kind, {**item, "aliases": list(aliases), "metadata": dict(metadata)})

    @_never_raises
    def table(self, name: str, step: int, values: Mapping[str, float]) -> None:
        """Log metrics as a W&B table, with what each says."""
        self._put("table", {"step": int(step), "name": str(name), "rows": explained(values)})

    @_never_raises
    def alert(self, step: int, title: str, text: str, level: str) -> None:
        """Send a W&B alert. `level` is INFO, WARN or ERROR."""
        item = {"step": int(step), "name": f"alert {title}", "title": title}
        self._put("alert", {**item, "text": scrub(text), "level": level})

    def info(self) -> HubInfo:
        """Where metrics go. Does not wait for W&B."""
        wandb = self._wandb
        line = self._line
        if wandb is not None:
            if wandb.mode == "offline":
                reason = line if line.startswith("W&B: offline") else "W&B: offline"
                line = f"{reason}; sync later with `{wandb.sync_command}`"
            elif wandb.url:
                line = f"W&B: {wandb.url}"
        return HubInfo(
            id=wandb.run_id if wandb else None,
            mode=wandb.mode if wandb else "off",
            dir=str(wandb.dir) if wandb else None,
            url=wandb.url if wandb else None,
            notice=line + self._also,
            sync=wandb.sync_command if wandb and wandb.mode == "offline" else None,
            metrics=str(self._run_dir / METRICS_FILE),
            notices=list(self._notices),
        )

    def notices(self) -> list[str]:
        """One line for each kind of failure since the start, oldest first."""
        return list(self._notices)

    def flush(self, timeout: float = 10.0) -> bool:
        """Wait until all logged items are in the files; False after `timeout` seconds.

        Items for W&B are then on disk too, but perhaps not yet sent.
        """
        if self._closed.is_set():
            return True
        written = threading.Event()
        try:
            self._waiting.put(("flush", written), timeout=timeout)
        except queue.Full:
            return False
        return written.wait(timeout)

    @_never_raises
    def close(self, exit_code: int = 0) -> None:
        """Write all queued items, end the W&B run, close the files. Later calls do nothing.

        Args:
            exit_code: of the W&B run, which is shown as failed unless it is 0.
        """
        if self._closed.is_set():
            return
        self.flush()
        self._closed.set()
        self._waiting.put(("stop", None), timeout=5.0)
        self._thread.join(10.0)
        for _, sink in self._sinks:
            sink.close(exit_code)
        self._jsonl.close()
        self._histograms.close()

    def __enter__(self) -> MetricHub:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Below, `_work` and its `_write...` methods run in the writer thread.

    def _put(self, kind: str, item: Any) -> None:
        if self._closed.is_set():
            return
        try:
            self._waiting.put_nowait((kind, item))
        except queue.Full:
            # The new item is dropped, since waiting would make training wait for the disk.
            self._num_dropped += 1
            self._tell("full", "metrics come faster than the disk takes them; some are dropped")

    def _work(self) -> None:
        while True:
            kind, item = self._waiting.get()
            if kind == "stop":
                return
            try:
                self._write(kind, item)
            except Exception as error:
                self._trouble(kind, error)

    def _write(self, kind: str, item: Any) -> None:
        if kind == "row":
            self._write_row(item)
        elif kind == "image":
            if not Path(item["path"]).is_file():
                raise FileNotFoundError(f"picture {item['path']} does not exist")
            self._pass_on({**item, "kind": kind})
        elif kind == "histogram":
            self._pass_on({**item, "kind": kind})
            self._histograms.append([item])
        elif kind in ("dataset", "model", "checkpoint", "alert", "table"):
            self._pass_on({**item, "kind": kind})
        elif kind == "flush":
            try:
                self._jsonl.sync()
            finally:
                item.set()

    def _write_row(self, item: dict[str, Any]) -> None:
        step, epoch, values = item["step"], item["epoch"], item["values"]
        if self._num_dropped:
            values["hub/dropped"] = float(self._num_dropped)
        if epoch > self._epoch:
            # A new attempt, which repeats the updates after its first step.
            if self._last_step > step:
                self._jsonl.rewind(step)
                self._last_step = step
            self._epoch = epoch
        self._last_step = max(self._last_step, step)
        # W&B comes first, so that a full disk below `run_dir` does not end its curves.
        self._pass_on({**item, "kind": "row", "values": values})
        self._jsonl.append([{"step": step, "epoch": epoch, **values}])

    def _pass_on(self, item: dict[str, Any]) -> None:
        if not self._sinks:
            return
        if "values" in item:
            # JSON has no NaN; the sink turns the spool's null back into one.
            item["values"] = {
                name: None if isinstance(value, float) and not math.isfinite(value) else value
                for name, value in item["values"].items()
            }
        for name, sink in self._sinks:
            try:
                sink.put(item)
            except Exception as error:
                self._trouble(name, error)

    def _trouble(self, kind: str, error: Exception) -> None:
        text = scrub(f"{error or type(error).__name__}").splitlines()[0][:200]
        self._tell(kind, f"metrics: {kind} failed ({text}); the run goes on")

    def _tell(self, kind: str, line: str) -> None:
        if kind not in self._told and len(self._told) < 100:
            self._told.add(kind)
            self._notice(line)

    def _notice(self, line: str) -> None:
        _log.info("%s", line)
        self._notices.append(line)


def _scalar(value: Any) -> float | int | None:
    """`value` as a plain number, or None; accepts numpy scalars and one-element tensors."""
    if isinstance(value, bool | np.bool_):
        return int(value)
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, str):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        return None


def _newest(path: Path) -> tuple[int, int]:
    """The greatest epoch and step in the file, (-1, -1) if it holds none."""
    epoch = step = -1
    for row in read_rows(path):
        if all(isinstance(row.get(name), int) for name in FRAME):
            epoch, step = max(epoch, row["epoch"]), max(step, row["step"])
    return epoch, step
