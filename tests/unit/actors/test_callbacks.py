"""Callbacks see a run in order, stop it when they say so, and never cost it its checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import small_runs
import yaml

from ebm_dist import cli
from ebm_dist.checkpoint import files as checkpoint
from ebm_dist.controller.learners import LearnerGroup
from ebm_dist.core.errors import NonFinite, RunFailed, UserError

HOOKS = """
class Stop:
    def __init__(self, at=3, raises=False):
        self.at, self.raises = at, raises

    def on_update(self, step, metrics):
        if step == self.at and self.raises:
            raise KeyError("no such metric")
        return step == self.at


class Deaf:
    def on_updates(self, step, metrics):
        pass
"""


class Seen:
    """Keeps every call; returns True from `on_update` at update `stop`."""

    def __init__(self, stop: int | None = None) -> None:
        self.calls: list[tuple] = []
        self._stop = stop

    def on_update(self, step, metrics):
        self.calls.append(("update", step))
        assert metrics["energy/gap"] == metrics.pop("energy/gap")  # a copy of its own
        return step == self._stop

    def on_evaluation(self, step, metrics):
        self.calls.append(("evaluation", step))
        assert "likelihood/log_z" in metrics

    def on_checkpoint(self, path):
        self.calls.append(("checkpoint", int(path.name[5:])))
        assert path.is_dir()

    def on_end(self, result):
        self.calls.append(("end", result.step, result.finished))

    def of(self, what: str) -> list[int]:
        return [call[1] for call in self.calls if call[0] == what]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run of 20 updates with a callback that kept its calls."""
    seen, second = Seen(), Seen()
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    small_runs.run(run_dir, "checkpoint.every=8", "evaluation.every=10", callbacks=[seen, second])
    return run_dir, seen, second


def test_a_callback_sees_each_update_evaluation_and_checkpoint_once_and_in_order(whole):
    _, seen, second = whole
    assert seen.of("update") == list(range(1, 21))
    assert seen.of("evaluation") == [10, 20]
    assert seen.of("checkpoint") == [0, 8, 16, 20]
    assert seen.calls.index(("update", 10)) < seen.calls.index(("evaluation", 10))
    assert seen.calls[-1] == ("end", 20, True)
    assert second.calls == seen.calls


def test_a_callback_that_returns_true_stops_the_run_and_the_same_call_goes_on(tmp_path):
    seen = Seen(stop=5)
    result, screen = small_runs.run(tmp_path / "run", callbacks=[seen])
    assert (result.step, result.finished, result.stopped_by) == (5, False, "Seen")
    assert "stopped by callback Seen at update 5" in screen
    found = checkpoint.latest(tmp_path / "run")
    assert found is not None
    assert found.step == 5
    assert result.export_dir is None
    assert seen.calls[-1] == ("end", 5, False)
    result, _ = small_runs.run(tmp_path / "run", callbacks=[seen])
    assert result.finished
    assert result.stopped_by is None
    assert seen.of("update") == list(range(1, 21))


def test_a_request_to_stop_at_the_last_update_leaves_the_run_finished(tmp_path):
    result, _ = small_runs.run(tmp_path / "run", "run.steps=2", callbacks=[Seen(stop=2)])
    assert result.finished
    assert result.export_dir is not None


class Asks(Seen):
    """Returns True from `on_evaluation` or `on_checkpoint`, at one update."""

    def __init__(self, hook: str, at: int) -> None:
        super().__init__()
        self._asks = (hook.removeprefix("on_"), at)

    def on_evaluation(self, step, metrics):
        super().on_evaluation(step, metrics)
        return self.calls[-1] == self._asks

    def on_checkpoint(self, path):
        super().on_checkpoint(path)
        return self.calls[-1] == self._asks


@pytest.mark.parametrize(("hook", "at"), [("on_evaluation", 10), ("on_checkpoint", 8)])
def test_an_evaluation_or_a_checkpoint_may_stop_the_run_and_the_same_call_goes_on(
    tmp_path, hook, at
):
    seen = Asks(hook, at)
    options = ("checkpoint.every=8", "evaluation.every=10")
    result, screen = small_runs.run(tmp_path / "run", *options, callbacks=[seen])
    assert (result.finished, result.stopped_by) == (False, "Asks")
    assert at <= result.step < 20  # both come back some updates later
    assert f"stopped by callback Asks at update {result.step}" in screen
    found = checkpoint.latest(tmp_path / "run")
    assert found is not None
    assert found.step == result.step
    result, _ = small_runs.run(tmp_path / "run", *options, callbacks=[seen])
    assert result.finished
    assert seen.of("update") == list(range(1, 21))


class Raising(Seen):
    def on_evaluation(self, step, metrics):
        raise ValueError("two\nlines")


def test_a_callback_that_raises_ends_the_run_in_one_line_with_a_checkpoint(tmp_path):
    raising, after = Raising(), Seen()
    message = "^callback Raising raised in on_evaluation at update 4: ValueError: two.nlines$"
    with pytest.raises(RunFailed, match=message.replace(".", r"\\")):
        small_runs.run(tmp_path / "run", "evaluation.every=4", callbacks=[raising, after])
    found = checkpoint.latest(tmp_path / "run")
    assert found is not None
    assert found.step == 4
    assert after.of("update") == [1, 2, 3, 4]
    assert after.of("evaluation") == []
    assert "Traceback" in (tmp_path / "run" / "run.log").read_text()


class Exiting(Seen):
    def on_update(self, step, metrics):
        if step == 3:
            sys.exit(3)


def test_a_callback_that_exits_costs_no_update(tmp_path):
    with pytest.raises(RunFailed, match="callback Exiting raised in on_update at update 3: System"):
        small_runs.run(tmp_path / "run", callbacks=[Exiting()])
    found = checkpoint.latest(tmp_path / "run")
    assert found is not None
    assert found.step == 3


def test_updates_that_are_made_again_after_a_roll_back_are_seen_again(tmp_path, monkeypatch):
    real, failed = LearnerGroup.update, []

    def update(self, step, *args):
        if step == 6 and not failed:
            failed.append(step)
            raise NonFinite("the loss is not finite")
        return real(self, step, *args)

    monkeypatch.setattr(LearnerGroup, "update", update)
    seen = Seen()
    again = ("learner.on_nonfinite=rollback", "checkpoint.every=4", "run.steps=8")
    small_runs.run(tmp_path / "run", *again, callbacks=[seen])
    assert seen.of("update") == [1, 2, 3, 4, 5, 6, 5, 6, 7, 8]


@pytest.fixture
def config(tmp_path, monkeypatch) -> Path:
    """A config file beside a package that the project does not know."""
    (tmp_path / "their_hooks.py").write_text(HOOKS)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "their_hooks", raising=False)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(small_runs.SMALL))
    return path


def train(config: Path, callbacks: str, *overrides: str) -> int:
    run_dir = str(config.parent / "run")
    return cli.main(
        ["train", str(config), f"callbacks={callbacks}", *overrides, "--run-dir", run_dir]
    )


def test_a_config_names_callbacks_and_being_stopped_by_one_is_success(config, capsys):
    assert train(config, "[{target: 'their_hooks:Stop', params: {at: 2}}]") == 0
    assert "stopped by callback their_hooks:Stop at update 2" in capsys.readouterr().out
    # Callbacks may change when the run goes on, and afterwards.
    assert train(config, "[]") == 0
    assert train(config, "[{target: 'their_hooks:Stop'}]") == 0


def test_a_callback_of_a_config_that_raises_is_one_line_and_exit_code_1(config, capsys):
    stop = "[{target: 'their_hooks:Stop', params: {raises: true}}]"
    assert train(config, stop) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert "callback their_hooks:Stop raised in on_update at update 3: KeyError" in line
    assert "--resume must" in line


@pytest.mark.parametrize(
    ("callbacks", "said"),
    [
        (
            "[{target: 'their_hooks:Stop', params: {att: 2}}]",
            "callbacks.0.params: their_hooks:Stop",
        ),
        ("[{target: 'their_hooks:Deaf'}]", "did you mean 'on_update'"),
        ("[{target: 'their_hooks:Stops'}]", "has no 'Stops'"),
        ("[{target: 'os:system'}]", "standard library"),
        ("[{params: {}}]", "callbacks.0.target: missing"),
    ],
)
def test_a_callback_that_cannot_be_made_is_one_line_and_exit_code_2(
    callbacks, said, config, capsys
):
    assert train(config, callbacks) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line
    assert not (config.parent / "run").exists()


def test_a_class_in_place_of_an_object_is_refused_with_what_to_pass(tmp_path):
    with pytest.raises(UserError, match=r"^callbacks\[0\]: .* pass Seen\(...\)$"):
        small_runs.run(tmp_path / "run", callbacks=[Seen])
    with pytest.raises(UserError, match=r"^callbacks: expected a list .* pass \[Seen\(...\)\]$"):
        small_runs.run(tmp_path / "run", callbacks=Seen())
