"""Merging goes weight by weight: beyond its result it needs the memory of one weight in fp32."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import pytest
import torch
from torch import nn

import lowrank
from lowrank import presets
from lowrank.models.storage import as_rows
from tests.helpers import perturb
from tests.test_quantized import KINDS

WIDTH, LAYERS = 256, 12


def peak(act: Callable[[], object]) -> int:
    """Bytes that PyTorch's CPU allocator had given out at most, beyond those at the start."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        act()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


@pytest.mark.parametrize("packed", [False, True], ids=["bf16", "int8"])
def test_one_weight_at_a_time_is_in_fp32(packed: bool) -> None:
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))).to(torch.bfloat16)
    if packed:
        KINDS["torchao int8"][0](model)
    perturb(lowrank.wrap_model(model, presets.pissa(rank=2), progress=False))
    wanted = [
        (as_rows(layer.base, "weight").float() + layer.delta_weight()).bfloat16()
        for layer in lowrank.adapted_layers(model).values()
    ]
    result = LAYERS * WIDTH * WIDTH * 2 if packed else 0
    assert peak(lambda: lowrank.merge(model, dequantize=packed)) < result + 4 * (WIDTH * WIDTH * 4)
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(model, wanted, strict=True))


def test_nothing_is_merged_where_one_weight_cannot_be() -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    perturb(lowrank.wrap_model(model, presets.lora(rank=2), progress=False))
    before = [layer.base.weight.clone() for layer in model]
    with torch.no_grad():
        model[2].adapters["default"][0].A[0, 0] = float("nan")
    with pytest.raises(ValueError, match="the adapter of 2 holds NaN or Inf"):
        lowrank.merge(model)
    assert all(torch.equal(layer.base.weight, weight) for layer, weight in zip(model, before, strict=True))
