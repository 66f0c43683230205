"""A run as TensorBoard's scalars and as a table."""

from __future__ import annotations

import csv
import math
import sys
from pathlib import Path

import pytest

import lowrank
from lowrank.train import History, Record, TensorBoard
from tests import zoo
from tests.helpers import wrapped


class Writer:
    def __init__(self) -> None:
        self.scalars: list[tuple[str, float, int]] = []
        self.closed = False

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars.append((tag, value, step))

    def close(self) -> None:
        self.closed = True


def test_each_step_becomes_scalars(tmp_path: Path) -> None:
    writer = Writer()
    history = lowrank.train.fit(
        wrapped("llama"),
        [zoo.batch("llama")],
        steps=3,
        evaluate=lambda model: {"accuracy": 0.5},
        evaluate_every=2,
        callbacks=[TensorBoard(tmp_path, writer)],
        progress=False,
    )
    losses = [(value, step) for tag, value, step in writer.scalars if tag == "train/loss"]
    assert losses == [(record.loss, record.step) for record in history]
    assert [(t, s) for t, _, s in writer.scalars if t.startswith("evaluate/")] == [
        ("evaluate/accuracy", 2),
        ("evaluate/accuracy", 3),
    ]
    assert writer.closed


def test_without_the_package_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"pip install 'lowrank-torch\[tensorboard\]'"):
        TensorBoard(tmp_path)


def test_a_history_as_csv(tmp_path: Path) -> None:
    records = [
        Record(1, 1, 0.5, 1e-3, 2.0, 10.0, 0.1),
        Record(2, 1, math.nan, 1e-4, 2.0, 10.0, 0.2, {"accuracy": 0.25}, "no labels"),
    ]
    History(records).to_csv(tmp_path / "run.csv")
    first, second = csv.DictReader((tmp_path / "run.csv").read_text().splitlines())
    assert float(first["loss"]) == 0.5 and first["evaluation.accuracy"] == ""
    assert second["evaluation.accuracy"] == "0.25" and second["skipped"] == "no labels"
    assert math.isnan(float(second["loss"])) and "evaluation" not in first
