"""The notebooks are those that the examples make, and their code runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from examples.notebooks import NOTEBOOKS, written

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_they_are_up_to_date(name: str) -> None:
    path, text = written(name)
    assert path.read_text(encoding="utf-8") == text, "run `make notebooks`"


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_cells_run_in_order(name: str, tmp_path: Path) -> None:
    path, _ = written(name)
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    sources[0] = sources[0].replace("'..'", repr(str(ROOT / "examples")))
    sources[-1] = sources[-1].replace("'--tiny'", "'--tiny', '--steps', '2'")
    code = f"for source in {sources!r}:\n    exec(source, globals())\n"
    (tmp_path / "notebook.py").write_text(code, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LOWRANK_PROGRESS": "0"}
    command = [sys.executable, str(tmp_path / "notebook.py")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "→" in done.stdout or "accuracy" in done.stdout
