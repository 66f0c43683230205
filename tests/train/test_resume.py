"""A run that was killed and started again ends with the same bits as one that was never killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.train import killed

ROOT = Path(__file__).parents[2]


class Server:
    """Runs jobs, each in a process of its own, and says how it ended: 0, or the signal."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.train.killed"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment,
        )

    def __call__(self, folder: Path, **options: Any) -> int:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"folder": str(folder), **options}) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.process.stdin.close()
    made.process.stdout.close()
    made.process.wait(30)


@pytest.fixture(scope="module")
def whole(server: Server, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, int]]:
    """A run that nobody killed: what it ends with, and how many events it had."""
    folder = tmp_path_factory.mktemp("whole")
    assert server(folder) == 0
    return killed.parts(folder), json.loads((folder / "events.json").read_text())


def test_the_run_is_one_where_everything_matters(whole: tuple[dict[str, Any], dict[str, int]]) -> None:
    parts, events = whole
    assert [record["step"] for record in parts["history"]] == list(range(1, 13))
    assert sum(bool(record["evaluation"]) for record in parts["history"]) == 3
    assert events["loss"] == 21 and events["evaluate"] == 3 and events["rename"] > 4 and events["sync"] > 12


@pytest.mark.parametrize(
    ("kind", "at"), [("loss", 12), ("update", 9), ("evaluate", 2), ("sync", 7), ("rename", 3), ("remove", 1)]
)
def test_killed_once(
    kind: str, at: int, server: Server, whole: tuple[dict[str, Any], dict[str, int]], tmp_path: Path
) -> None:
    assert server(tmp_path, kill=at, kind=kind) == signal.SIGKILL
    assert server(tmp_path) == 0
    assert killed.parts(tmp_path) == whole[0]
    assert not list(tmp_path.glob(".step-*"))


@pytest.mark.soak
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("seed", range(6))
def test_killed_again_and_again(
    seed: int,
    workers: int,
    server: Server,
    whole: tuple[dict[str, Any], dict[str, int]],
    tmp_path: Path,
) -> None:
    """Five kills a run, at random events: sixty in all, as far as the run lasts."""
    draw, kills = random.Random(seed), 0
    reference = tmp_path / "reference"
    assert server(reference, workers=workers) == 0
    expected = killed.parts(reference)
    for _ in range(40):
        kill = draw.randint(1, whole[1]["all"] // 3) if kills < 5 else 0
        status = server(tmp_path / "run", kill=kill, workers=workers)
        kills += status == signal.SIGKILL
        if status == 0 and kills:
            break
    print(f"{kills} kills")
    assert kills >= 3 and killed.parts(tmp_path / "run") == expected


@pytest.mark.parametrize("piece", ["optimizer", "generators", "trained", "place", "order"])
def test_a_piece_of_state_that_is_left_out_is_seen(
    piece: str, server: Server, whole: tuple[dict[str, Any], dict[str, int]], tmp_path: Path
) -> None:
    assert server(tmp_path, kill=12, kind="loss") == signal.SIGKILL
    status = server(tmp_path, without=piece)
    if piece == "order":  # then the batches are others, which is refused
        assert status != 0 and not (tmp_path / "finished.json").exists()
    else:
        assert status == 0 and killed.parts(tmp_path) != whole[0]
