"""What every test gets: no network, one thread, a seed; and gpu tests only where there is a GPU."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("LOWRANK_TUNE", "0")  # no test depends on timings or on what earlier runs have kept
os.environ.setdefault("OMP_NUM_THREADS", "1")  # on models this small threads mostly wait for each other

import pytest
import torch


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    needy = [item for item in items if item.get_closest_marker("gpu")]
    items[:] = [item for item in items if not item.get_closest_marker("gpu")]
    config.hook.pytest_deselected(items=needy)


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled code keeps no record of the layers that it uses, for the rest of the process."""
    monkeypatch.setattr("lowrank.layers.layer._compiled", False)


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random numbers for a test, alone or among others."""
    torch.manual_seed(0)
