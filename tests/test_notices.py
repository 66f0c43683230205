"""What is said beside the results: by the logger "lowrank", and in warnings of own categories."""

from __future__ import annotations

import ast
import logging
import subprocess
import sys
import warnings
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

import lowrank
from lowrank import LowrankWarning, notices

ROOT = Path(__file__).parents[1]


def warned() -> Iterator[tuple[str, ast.Call]]:
    """Each call of ``warnings.warn`` in the package, with the module that makes it."""
    for path in sorted((ROOT / "lowrank").rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("warnings.warn", "warn"):
                yield module, node


def test_every_warning_has_a_category_of_lowrank() -> None:
    found = list(warned())
    assert len(found) > 5
    for module, call in found:
        given = call.args[1] if len(call.args) > 1 else None
        where = f"{module}, line {call.lineno}"
        assert isinstance(given, ast.Name), f"{where}: no category"
        category = getattr(import_module(module), given.id)
        assert issubclass(category, LowrankWarning) and category is not LowrankWarning, where


@pytest.mark.parametrize(
    "category",
    [
        lowrank.FrozenHeadWarning,
        lowrank.SavePretrainedWarning,
        lowrank.UnsavedParametersWarning,
        lowrank.UnusedLayerWarning,
        lowrank.train.DamagedCheckpointWarning,
        lowrank.train.SkippedStepWarning,
    ],
)
def test_one_filter_is_enough_for_all(category: type[Warning]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", LowrankWarning)
        warnings.warn("ignored", category, stacklevel=1)
    assert issubclass(category, UserWarning)


def fresh(code: str) -> subprocess.CompletedProcess[str]:
    program = f"import logging\nfrom lowrank.notices import logger, show\n{code}"
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True
    )


@pytest.mark.parametrize(
    ("setup", "seen"),
    [
        ("", ("asked\n", "stopped\n")),
        ("logging.basicConfig(level='INFO')", ("INFO:lowrank:asked\n", "WARNING:lowrank:stopped\n")),
        ("logging.basicConfig(level='WARNING')", ("asked\n", "WARNING:lowrank:stopped\n")),
        ("logging.basicConfig(level='INFO'); logger.setLevel('CRITICAL')", ("asked\n", "")),
    ],
)
def test_what_a_user_sees(setup: str, seen: tuple[str, str]) -> None:
    """What was asked for is always shown, a warning as logging is set up, a detail only if it is wanted."""
    done = fresh(f"{setup}\nshow('asked')\nlogger.warning('stopped')")
    assert (done.stdout, done.stderr) == ("", "".join(seen))


def test_details_are_not_shown_by_default() -> None:
    assert fresh("logger.info('calibrating')").stderr == ""
    assert "calibrating" in fresh("logging.basicConfig(level='INFO')\nlogger.info('calibrating')").stderr


def test_no_handler_is_installed() -> None:
    assert notices.logger.name == "lowrank"
    assert notices.logger.handlers == [] and notices.logger.level == logging.NOTSET
