"""Histories are sequences that survive a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowrank.train import History, Record


def record(step: int, **evaluation: float) -> Record:
    return Record(step, 1, 1 / step, 1e-3, 0.1 + step, 1234.5, 0.3 * step, evaluation)


HISTORY = History([record(1), record(2, accuracy=0.5), record(3)])


def test_it_is_a_sequence() -> None:
    assert len(HISTORY) == 3 and HISTORY[1].step == 2 and [one.step for one in HISTORY] == [1, 2, 3]
    assert HISTORY[1:] == History([record(2, accuracy=0.5), record(3)]) and HISTORY[1:] != HISTORY
    assert HISTORY.losses == [1, 1 / 2, 1 / 3]
    assert HISTORY.evaluations == {2: {"accuracy": 0.5}}
    assert (
        repr(HISTORY) == "History(3 steps, loss 1 → 0.3333, 0.9 s)" and repr(History()) == "History(no steps)"
    )


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    HISTORY.save(tmp_path / "run.jsonl")
    assert History.load(tmp_path / "run.jsonl") == HISTORY
    History().save(tmp_path / "run.jsonl")
    assert History.load(tmp_path / "run.jsonl") == History()


def test_a_run_that_was_cut_short_loads_up_to_there(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    HISTORY.save(path)
    path.write_text(path.read_text()[:-9])
    assert History.load(path) == HISTORY[:2]


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"step": 1, "spet": 2}'])
def test_another_file_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text(HISTORY[0].to_json() + "\n" + line + "\n")
    with pytest.raises(ValueError, match=r"run.jsonl, line 2, is not a record"):
        History.load(path)
