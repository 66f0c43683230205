"""Work grows in proportion to the number of projections: calls are counted at three sizes, not seconds."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lowrank
from lowrank import presets
from lowrank.files import AdapterError
from lowrank.models.projections import find_projections
from lowrank.train import fit

SIZES = 40, 80, 160
Stage = Callable[[], Any]


class Blocks(nn.Module):
    """``n`` blocks with two projections and a norm each."""

    def __init__(self, n: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        parts = {"q_proj": nn.Linear, "norm": lambda a, b: nn.LayerNorm(a), "other": nn.Linear}
        self.layers = nn.ModuleList(
            nn.ModuleDict({name: make(4, 4) for name, make in parts.items()}) for _ in range(n)
        ).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            for part in layer.values():
                x = x + part(x) / 100
        return x


class Undivided(nn.Module):
    """``n`` fused weights whose blocks nothing tells, and an output layer beside each."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"qkv": nn.Linear(4, 12), "out": nn.Linear(4, 4)}) for _ in range(n)
        )


def calls(run: Stage) -> int:
    """Function calls and generator steps of ``run``, in Python and in C."""
    counted = 0

    def count(frame: Any, event: str, arg: Any) -> None:
        nonlocal counted
        counted += event in ("call", "c_call")

    before = sys.getprofile()
    gc.collect()
    gc.disable()  # what other tests left calls back when it is collected
    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(before)
        gc.enable()
    return counted


def wrapped(n: int) -> nn.Module:
    return lowrank.wrap_model(Blocks(n), presets.lora(rank=2), progress=False)


def saved(n: int, folder: Path) -> Path:
    lowrank.save_adapter(wrapped(n), folder / str(n))
    return folder / str(n)


def planned(**said: Any) -> Callable[[int, Path], Stage]:
    """A stage that plans; what is callable in ``said`` is called with the names of all projections."""

    def prepare(n: int, folder: Path) -> Stage:
        model = Blocks(n)
        names = [p.name for p in find_projections(model)]
        policy = presets.lora(rank=2, **{k: v(names) if callable(v) else v for k, v in said.items()})
        return lambda: lowrank.plan_model(model, policy)

    return prepare


def wrapping(n: int, folder: Path) -> Stage:
    model = Blocks(n)
    plan = lowrank.plan_model(model, presets.lora(rank=2))
    return lambda: lowrank.wrap_model(model, plan, progress=False)


def saving(n: int, folder: Path) -> Stage:
    model = wrapped(n)
    return lambda: lowrank.save_adapter(model, folder / str(n))


def loading(n: int, folder: Path) -> Stage:
    model, path = Blocks(n), saved(n, folder)
    return lambda: lowrank.load_adapter(model, path)


def refusing(n: int, folder: Path) -> Stage:
    """Loading onto a model in which half of the projections are missing."""
    model, path = Blocks(n // 2), saved(n, folder)

    def run() -> None:
        with pytest.raises(AdapterError, match="no such weight"):
            lowrank.load_adapter(model, path)

    return run


def unwrapping(n: int, folder: Path) -> Stage:
    model = wrapped(n)
    return lambda: lowrank.unwrap(model)


def training(n: int, folder: Path) -> Stage:
    model = wrapped(n)
    return lambda: fit(model, [torch.ones(2, 4)], lambda m, x: m(x).square().mean(), steps=1, progress=False)


def finding(n: int, folder: Path) -> Stage:
    model = Undivided(n)
    return lambda: find_projections(model)


STAGES = {
    "find fused weights that nothing divides": finding,
    "plan": planned(),
    "plan with many excluded": planned(exclude=("q_proj",)),
    "plan with many trained in full": planned(train=("norm",)),
    "plan with a rank for each": planned(ranks=lambda names: dict.fromkeys(names, 1)),
    "plan with each as a target": planned(target=list),
    "wrap": wrapping,
    "save": saving,
    "load": loading,
    "refuse to load": refusing,
    "unwrap": unwrapping,
    "train": training,
}


@pytest.mark.parametrize("stage", STAGES)
def test_work_grows_in_proportion_to_the_projections(stage: str, tmp_path: Path) -> None:
    STAGES[stage](4, tmp_path)()  # what is done once in a process
    few, more, most = (calls(STAGES[stage](n, tmp_path)) for n in SIZES)
    assert most - more < 2.2 * (more - few)
