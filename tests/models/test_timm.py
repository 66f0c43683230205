"""timm's own modules, where timm is installed: the table's rows, and whole families without a hint."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import census
from benchmarks.censuses import vision
from lowrank.models.families import Role
from lowrank.models.influence import refilled
from lowrank.models.layouts import FUSED, layout_of
from tests.helpers import numbers

if importlib.util.find_spec("timm") is None:
    pytest.skip("timm is not installed", allow_module_level=True)
vision.timm()

WIDTH, HEADS, TOKENS = 32, 4, 4
SIZES: dict[str, dict[str, Any]] = {
    "hiera.MaskUnitAttention": dict(dim_out=WIDTH, heads=HEADS, window_size=2, use_mask_unit_attn=True),
    "mvitv2.MultiScaleAttention": dict(
        dim_out=WIDTH, feat_size=(2, 2), num_heads=HEADS, has_cls_token=False, rel_pos_type=""
    ),
    "gcvit.WindowAttentionGlobal": dict(num_heads=HEADS, window_size=(2, 2), use_global=True),
}
TIMM = [
    kind
    for kind in FUSED["qkv"]
    if kind.partition(".")[0] in ("xcit", "edgenext", "davit", "cait", "hiera", "mvitv2", "gcvit")
]
FAMILIES = """
beit cait coat convit convnext crossvit davit deit eva gcvit levit maxxvit mlp_mixer mvitv2 pit pvt_v2
swin_transformer swin_transformer_v2 tnt twins vision_transformer vision_transformer_relpos xcit
""".split()


@pytest.mark.parametrize("kind", TIMM)
def test_each_row_of_the_table_is_what_the_family_computes(kind: str) -> None:
    """Without query rows an attention does not see key rows, nor the other way; values act in proportion."""
    file, _, name = kind.partition(".")
    cls = getattr(importlib.import_module(f"timm.models.{file}"), name)
    attention = refilled(cls(WIDTH, **SIZES.get(kind, dict(num_heads=HEADS))).eval())
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(1, TOKENS, WIDTH, generator=draw, dtype=torch.float64)
    given: list[Any] = [x]
    if file == "mvitv2":
        given.append((2, 2))
    if file == "gcvit":
        given.append(torch.randn(1, 2, 2, WIDTH, generator=draw, dtype=torch.float64))
    rows = attention.qkv.out_features
    layout = layout_of(attention, "qkv")
    assert layout is FUSED["qkv"][kind]
    blocks = {role: numbers(own) for role, own in layout(attention, rows)}
    assert sorted(row for own in blocks.values() for row in own) == list(range(rows))

    def slopes(factors: dict[Role, float]) -> dict[Role, Tensor]:
        """How the output depends on each block, once blocks are multiplied."""
        scale = torch.ones(rows, dtype=torch.float64)
        for role, factor in factors.items():
            scale[blocks[role]] = factor
        delta = torch.zeros(1, TOKENS, rows, dtype=torch.float64, requires_grad=True)
        handle = attention.qkv.register_forward_hook(lambda module, args, y: y * scale + delta)
        y = attention(*given)
        handle.remove()
        y = y if isinstance(y, Tensor) else y[0]
        weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
        (slope,) = torch.autograd.grad((y * weights).sum(), delta)
        return {role: slope[..., own] for role, own in blocks.items()}

    as_is = slopes({})
    assert all(slope.abs().max() > 1e-6 for slope in as_is.values())
    torch.testing.assert_close(slopes({Role.VALUE: 2.0})[Role.VALUE], as_is[Role.VALUE])
    assert not slopes({Role.VALUE: 0.0})[Role.KEY].abs().max() > 1e-12
    if Role.QUERY in blocks:
        assert slopes({Role.QUERY: 0.0})[Role.KEY].abs().max() < 1e-12
        alone = slopes({Role.KEY: 0.0})[Role.QUERY].abs().max()
        assert alone < 1e-12 or file == "mvitv2", "MViT adds the query to what comes out"


@pytest.mark.filterwarnings("ignore")  # whatever other people's models warn of
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_adapted_without_a_hint(family: str) -> None:
    row = census.counted(f"timm:{family}")
    assert row["state"] == "checked", row.get("why")
    assert census.passed(row), census.problems(row)
