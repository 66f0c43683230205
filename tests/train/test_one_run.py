"""A signal at a bad moment, a second run in the same folder, a full disk for the log."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from lowrank.train import CheckpointError, Stopped, checkpoints
from lowrank.train.checkpoints import Checkpoints
from lowrank.train.lock import NAME
from tests.train.test_checkpoints import bare, run, same

HOLD = (
    "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
)


class Evaluate:
    """Sends a signal to this process in one of its calls."""

    def __init__(self, call: int, number: int) -> None:
        self.calls, self.call, self.number = 0, call, number

    def __call__(self, model: nn.Module) -> dict[str, float]:
        self.calls += 1
        if self.calls == self.call:
            signal.raise_signal(self.number)
        return {"score": float(self.calls)}


def test_a_signal_while_evaluating_stops_after_that_step(tmp_path: Path) -> None:
    with pytest.raises(Stopped, match="after step 4 of 8") as stopped:
        run(tmp_path, evaluate=Evaluate(2, signal.SIGTERM), evaluate_every=2)
    assert stopped.value.history.evaluations[4] == {"score": 2.0}
    assert Checkpoints(tmp_path).steps == [2, 4]


def test_a_signal_while_saving_leaves_that_checkpoint_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, history = run(tmp_path / "whole")
    sync, calls = checkpoints.sync, [0]

    def signalled(path: Path) -> None:
        calls[0] += 1
        if calls[0] == 2:
            signal.raise_signal(signal.SIGTERM)
        sync(path)

    with monkeypatch.context() as patch, pytest.raises(Stopped, match="after step 3 of 8"):
        patch.setattr(checkpoints, "sync", signalled)
        run(tmp_path / "run")
    assert Checkpoints(tmp_path / "run").steps == [2, 3]
    model, again = run(tmp_path / "run")
    assert same(whole, model) and bare(again) == bare(history)


def test_a_signal_in_the_last_step_is_not_lost(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """All is saved, and then it does what it does elsewhere."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    with pytest.raises(KeyboardInterrupt) as interrupted:
        run(tmp_path, evaluate=Evaluate(1, signal.SIGINT), evaluate_every=8)
    assert len(interrupted.value.history) == 8  # type: ignore[attr-defined]
    assert Checkpoints(tmp_path).steps[-1] == 8


@pytest.mark.parametrize("options", [{}, {"resume": False}])
def test_a_second_run_in_the_folder_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    run(tmp_path, steps=2)
    held = [sys.executable, "-c", HOLD, str(tmp_path / NAME)]
    with subprocess.Popen(held, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdin is not None and other.stdout is not None
        other.stdout.readline()
        with pytest.raises(CheckpointError, match="another run is using the checkpoints in"):
            run(tmp_path, steps=2, **options)
        assert Checkpoints(tmp_path).steps == [2]
        other.kill()
    run(tmp_path, steps=2, **options)  # a lock ends with its process
    assert not (tmp_path / NAME).exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_a_full_disk_for_the_log_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="the log /dev/full cannot be written after step 1: No space") as full:
        run(tmp_path, log="/dev/full")
    assert len(full.value.history) == 1  # type: ignore[attr-defined]


def test_a_log_that_cannot_be_written_anew_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log.jsonl"
    run(tmp_path / "run", log=log)
    before = log.read_text()

    def full(*given: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lowrank.files.sync", full)
    with pytest.raises(OSError, match="No space left"):
        run(tmp_path / "run", log=log)
    assert log.read_text() == before
