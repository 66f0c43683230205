"""Bars: one switch for all of them, and one place where they are made."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import lowrank
from lowrank import presets
from lowrank.progress import bar
from tests import zoo

PACKAGE = Path(__file__).parents[1] / "lowrank"


@pytest.mark.parametrize(
    ("value", "shown", "visible"),
    [
        (None, True, True),
        ("1", True, True),
        ("", True, True),
        ("0", True, False),
        ("false", True, False),
        (" OFF ", True, False),
        (None, False, False),
        ("1", False, False),
    ],
)
def test_the_environment_hides_bars(
    value: str | None,
    shown: bool,
    visible: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("LOWRANK_PROGRESS", raising=False)
    if value is not None:
        monkeypatch.setenv("LOWRANK_PROGRESS", value)
    assert list(bar([1, 2], "counting", shown=shown)) == [1, 2]
    out, err = capsys.readouterr()
    assert out == "" and ("counting: 100%" in err) == visible and (visible or err == "")


def test_tqdms_own_switch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOWRANK_PROGRESS", raising=False)
    # tqdm reads TQDM_DISABLE once, when it is imported, as the default of this argument.
    given: dict[str, object] = {}
    monkeypatch.setattr("lowrank.progress.tqdm", lambda *args, **options: given.update(options))
    bar([1], delay=2)
    assert given == {"delay": 2}


def test_a_whole_run_is_silent_with_the_switch(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def run() -> str:
        model, batches = zoo.build("llama"), [zoo.batch("llama")]
        lowrank.wrap_model(model, presets.tlora(rank=2), batches=batches)
        lowrank.train.fit(model, batches, steps=1)
        out, err = capfd.readouterr()
        assert out == ""
        return err

    monkeypatch.setenv("LOWRANK_PROGRESS", "0")
    assert run() == ""
    monkeypatch.setenv("LOWRANK_PROGRESS", "1")
    assert "1/1" in run()


def test_nothing_else_makes_bars_or_prints() -> None:
    """tqdm only in two files, and print only in the commands."""
    for path in PACKAGE.rglob("*.py"):
        name, nodes = path.relative_to(PACKAGE).as_posix(), list(ast.walk(ast.parse(path.read_text())))
        tqdm = [
            node
            for node in nodes
            if isinstance(node, ast.ImportFrom | ast.Import) and "tqdm" in ast.unparse(node)
        ]
        assert not tqdm or name in ("progress.py", "notices.py"), name
        printed = [node for node in nodes if isinstance(node, ast.Name) and node.id == "print"]
        assert not printed or name.startswith("cli/"), name
