"""diffusers' denoisers: roles in every stream, gated projections, and query, key and value that it fuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import census
from lowrank import find_projections
from lowrank.linalg.rows import pieces
from lowrank.models.families import Role
from lowrank.models.layouts import FUSED, layout_of
from lowrank.models.targets import select

pytest.importorskip("diffusers")
from benchmarks.censuses.denoisers import DENOISERS, denoiser


@pytest.mark.parametrize("name", sorted(DENOISERS))
def test_a_denoiser_is_adapted_without_a_hint(name: str) -> None:
    row = census.counted(f"diffusers:{name}")
    assert row["state"] == "checked", row.get("why")
    assert census.passed(row), census.problems(row)


def leaves(model: nn.Module, role: str) -> set[str]:
    return {p.name.rpartition("attn.")[2] for p in select(model, role).projections}


@pytest.mark.parametrize("name", ["sd3", "flux", "qwen_image"])
def test_a_role_means_the_image_and_the_text(name: str) -> None:
    model, _ = denoiser(name)
    for role, letter in ((Role.QUERY, "q"), (Role.KEY, "k"), (Role.VALUE, "v")):
        assert {f"to_{letter}", f"add_{letter}_proj"} <= leaves(model, role)
    assert {"to_out.0", "to_add_out"} <= leaves(model, Role.OUTPUT)


@pytest.mark.parametrize("name", ["sd3_fused", "flux_fused"])
def test_a_role_means_rows_of_what_is_fused_and_not_the_layers_beside_it(name: str) -> None:
    model, _ = denoiser(name)
    assert {"to_qkv[key]", "to_added_qkv[key]"} <= leaves(model, Role.KEY)
    assert "to_k" not in leaves(model, Role.KEY) | leaves(model, "all-linear")
    assert set(select(model, "all-linear").left_out.values()) >= {"to_qkv is called instead"}
    with pytest.raises(ValueError, match="to_k: to_qkv is called instead; it cannot be adapted"):
        select(model, "to_k")


def test_fused_rows_are_those_of_the_separate_layers() -> None:
    model, _ = denoiser("unet_fused")
    fused = [p for p in find_projections(model) if "to_qkv" in p.module or "to_kv" in p.module]
    assert {p.block for p in fused} == {"query", "key", "value"}
    for p in fused:
        separate = f"{p.module.rpartition('.')[0]}.to_{p.block[0]}"
        assert torch.equal(p.weight(model), model.get_submodule(separate).weight)


def gated(name: str) -> Any:
    if name == "ClvpGatedLinearUnit":
        from transformers.models.clvp import configuration_clvp, modeling_clvp

        sizes = configuration_clvp.ClvpEncoderConfig(hidden_size=6, intermediate_size=10)
        return modeling_clvp.ClvpGatedLinearUnit(sizes).double()
    from diffusers.models import activations

    return getattr(activations, name.rpartition(".")[2])(6, 10).double()


@pytest.mark.parametrize("name", sorted(FUSED["proj"]))
def test_the_rows_of_a_gated_projection_are_what_it_computes(name: str) -> None:
    torch.manual_seed(0)
    module = gated(name)
    layout = layout_of(module, "proj")
    assert layout is FUSED["proj"][name]
    x, weight = torch.randn(4, 6, dtype=torch.float64), module.proj.weight.detach().clone()

    def at(own: Any, factor: float) -> torch.Tensor:
        with torch.no_grad():
            module.proj.bias.zero_()
            module.proj.weight.copy_(weight)
            for start, stop in pieces(own):
                module.proj.weight[start:stop] *= factor
            return module(x)

    blocks = layout(module, len(weight))
    if len(blocks) == 1:
        assert blocks[0] == (Role.UP, (0, 10)), "an activation, and nothing beside it"
        return
    for role, own in blocks:
        bend = (at(own, 2.0) - 2 * at(own, 1.0) + at(own, 0.0)).abs().max()
        assert bend < 1e-12 if role == Role.UP else bend > 1e-3, "only the gate goes through the activation"
