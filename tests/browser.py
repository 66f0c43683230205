"""A headless Chromium for tests of HTML, where there is one: `make browser` fetches it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

FETCHED = Path(__file__).parents[1] / ".cache" / "browser"


@contextmanager
def browser() -> Iterator[Any]:
    """A running browser of playwright. The test is skipped where there is no browser, or no playwright.

    The one that LOWRANK_BROWSER names comes first, then the fetched one, then Chromium or Chrome on the
    path, then playwright's own.
    """
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    fetched = FETCHED / "chromium"
    path = os.environ.get("LOWRANK_BROWSER") or (str(fetched) if fetched.is_file() else None)
    path = path or shutil.which("chromium") or shutil.which("google-chrome")
    with api.sync_playwright() as play:
        path = path or play.chromium.executable_path
        if not Path(path).is_file():
            pytest.skip("no browser: make browser fetches one, or LOWRANK_BROWSER names one")
        libraries = {"LD_LIBRARY_PATH": str(FETCHED / "lib")} if Path(path) == fetched else {}
        try:
            started = play.chromium.launch(executable_path=path, env={**os.environ, **libraries})
        except api.Error as error:
            pytest.skip(f"{path} does not start: {str(error).splitlines()[0]}")
        try:
            yield started
        finally:
            started.close()
