"""Vision tower, projector and language model are named apart in targets."""

from __future__ import annotations

import pytest
import transformers
from torch import nn

from lowrank.models.families import Role
from lowrank.models.projections import Projection
from lowrank.models.targets import select
from tests.zoo import DECODER, VISION, build


def llava() -> nn.Module:
    vision = transformers.CLIPVisionConfig(**VISION)
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=transformers.LlamaConfig(**DECODER), image_token_index=60
    )
    return transformers.LlavaForConditionalGeneration(config)


def chosen(model: nn.Module, target: str | list[str], exclude: tuple[str, ...] = ()) -> list[Projection]:
    return select(model, target, exclude).projections


def test_the_parts_of_a_vision_language_model_make_the_whole() -> None:
    model = llava()
    parts = {name: chosen(model, f"{name}:all-linear") for name in ("vision", "projector", "language")}
    assert {p.module.split(".")[1] for p in parts["vision"]} == {"vision_tower"}
    assert [p.module.rpartition(".")[2] for p in parts["projector"]] == ["linear_1", "linear_2"]
    assert {p.module.split(".")[1] for p in parts["language"]} == {"language_model"}
    whole = chosen(model, "all-linear")
    assert sum(map(len, parts.values())) == len(whole)
    assert chosen(model, [f"{name}:all-linear" for name in parts]) == whole
    assert chosen(model, "all-linear", ("vision:all-linear",)) == [
        p for p in whole if p not in parts["vision"]
    ]


def test_a_role_in_a_part() -> None:
    queries = chosen(llava(), "language:query")
    assert len(queries) == 2 and {p.role for p in queries} == {Role.QUERY}
    assert all("language_model" in p.module for p in queries)
    assert chosen(llava(), "vision_tower:query") == chosen(llava(), "vision:query") != queries


def test_a_part_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="audio: the model has no such part; it has projector, vision"):
        chosen(llava(), "audio:all-linear")
    with pytest.raises(ValueError, match="vision: the model has no such part; it has one part only"):
        chosen(build("llama"), "vision:all-linear")
    with pytest.raises(ValueError, match="tower: expected one of vision, audio, projector, language"):
        chosen(llava(), "tower:query")
    with pytest.raises(ValueError, match="'projector:query' matches no projection: projector has none"):
        chosen(llava(), "projector:query")


def test_a_weight_that_is_not_divided_counts_in_its_part_only() -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv_proj = nn.Linear(8, 16)

    model = nn.ModuleDict({
        "vision_model": nn.ModuleDict({"attn": nn.ModuleDict({"q_proj": nn.Linear(8, 8)})}),
        "text_model": nn.ModuleDict({"attn": Fused()}),
    })  # fmt: skip
    assert [p.module for p in chosen(model, "vision:query")] == ["vision_model.attn.q_proj"]
    with pytest.raises(ValueError, match="it is not known where"):
        chosen(model, ["vision:query", "language:query"])
