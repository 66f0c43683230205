"""What a release holds: the sdist builds the wheel, the wheel installs and runs away from the repository."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import lowrank

ROOT = Path(__file__).parents[1]


def run(*command: str | Path, cwd: Path, path: Path | None = None) -> str:
    environment = {**os.environ, "PYTHONPATH": "" if path is None else str(path)}
    words = [sys.executable, *map(str, command)]
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder where the wheel is installed that was built from the unpacked sdist."""
    room = tmp_path_factory.mktemp("release")
    run("-m", "hatchling", "build", "-t", "sdist", "-d", room, cwd=ROOT)
    (archive,) = room.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        files.extractall(room, filter="data")
    (source,) = (path for path in room.iterdir() if path.is_dir())
    run("-m", "hatchling", "build", "-t", "wheel", "-d", room, cwd=source)
    (wheel,) = room.glob("*.whl")
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile"]
    run(*install, "--target", room / "site", wheel, cwd=room)
    return room / "site"


def test_the_version_is_the_same_everywhere() -> None:
    """In the package, in CITATION.cff and at the top of the changelog, below what is not released yet."""
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    unreleased, *released = re.findall(r"^## (.*)$", changes, re.MULTILINE)
    cited = dict(re.findall(r"^([a-z-]+): (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE))
    assert unreleased == "[Unreleased]"
    assert released[0] == f"[{cited['version']}] - {cited['date-released']}"
    assert cited["version"] == lowrank.__version__


def test_the_workflow_has_the_versions_of_python_that_are_promised() -> None:
    workflow = ROOT / ".github/workflows/tests.yml"
    if not workflow.exists():
        pytest.skip("an sdist has no workflows")
    promised = re.findall(
        r'"Programming Language :: Python :: (3\.\d+)"', (ROOT / "pyproject.toml").read_text()
    )
    run = re.search(r"python: \[(.*)\]", workflow.read_text())
    assert run is not None and re.findall(r'"([\d.]+)"', run[1]) == promised


@pytest.mark.slow
def test_it_is_imported_from_where_it_was_installed(installed: Path, tmp_path: Path) -> None:
    code = "import lowrank, importlib.metadata as m; print(lowrank.__file__, m.version('lowrank-torch'))"
    file, version = run("-c", code, cwd=tmp_path, path=installed).split()
    assert Path(file).is_relative_to(installed) and version == lowrank.__version__


@pytest.mark.slow
def test_the_commands_run(installed: Path, tmp_path: Path) -> None:
    by_module = run("-m", "lowrank", "--help", cwd=tmp_path, path=installed)
    by_script = run(installed / "bin" / "lowrank", "--help", cwd=tmp_path, path=installed)
    assert by_module == by_script and "inspect" in by_script


@pytest.mark.slow
def test_help_imports_nothing_heavy(installed: Path, tmp_path: Path) -> None:
    """It takes hundredths of a second then; torch alone takes seconds."""
    code = (
        "import sys; from contextlib import suppress; from lowrank_cli import main\n"
        "with suppress(SystemExit): main(['--help'])\n"
        "print(sorted({n.partition('.')[0] for n in sys.modules} - set(sys.stdlib_module_names)))"
    )
    printed = run("-S", "-c", code, cwd=tmp_path, path=installed)
    assert printed.splitlines()[-1] == "['__main__', 'lowrank_cli']"


@pytest.mark.slow
def test_the_sdist_has_what_its_tests_need(installed: Path) -> None:
    (source,) = (path for path in installed.parent.iterdir() if (path / "pyproject.toml").exists())
    folders = "tests/helpers.py examples/finetune_llm.py examples/notebooks/vision.ipynb docs/DESIGN.md"
    files = "README.md CHANGELOG.md CONTRIBUTING.md SECURITY.md CITATION.cff LICENSE Makefile mkdocs.yml"
    for needed in f"{folders} {files}".split():
        assert (source / needed).is_file(), needed
