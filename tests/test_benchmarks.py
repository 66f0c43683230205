"""The benchmark scripts run, and write what they say they write. What they measure is not judged here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "benchmarks").glob("bench_*.py"))
QUICKEST = {"bench_linear": ["--no-compile"]}  # options that a quick run of a script can also do without


def cells(value: object) -> int:
    """How many numbers there are in parsed JSON."""
    if isinstance(value, dict):
        return sum(map(cells, value.values()))
    if isinstance(value, list):
        return sum(map(cells, value))
    return isinstance(value, float)


def test_there_is_something_to_run() -> None:
    assert {"bench_linear", "bench_model"} <= {script.stem for script in SCRIPTS}


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_quick(script: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(script), "--quick", "--device", "cpu", "--threads", "1"]
    subprocess.run(
        [*command, "--out", str(tmp_path), *QUICKEST.get(script.stem, [])],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE"},
        check=True,
        timeout=240,
        capture_output=True,
    )
    (data,), (report,) = tmp_path.glob("*.json"), tmp_path.glob("*.md")
    results = json.loads(data.read_text())
    facts = results.pop("surroundings")
    assert facts["device"] and facts["date"] and facts["torch"] and script.name in facts["command"]
    assert cells(results) > 10
    assert "|---|" in report.read_text()
