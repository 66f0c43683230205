"""The census on a fixed part of the model families, and that its checks see what they are for."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

import lowrank
from benchmarks import census
from benchmarks.censuses import checks
from lowrank import presets
from tests.zoo import batch, build

FAMILIES = """
albert bart bert big_bird biogpt bloom camembert codegen cohere cohere2 convbert convnext ctrl data2vec-text
deberta deberta-v2 deepseek_v3 deit distilbert electra ernie exaone4 falcon fnet funnel gemma gemma2
gemma3_text glm glm4 gpt2 gpt_bigcode gpt_neo gpt_neox gpt_oss gptj granite granitemoe jetmoe layoutlm llama
llama4_text longformer marian mistral mixtral modernbert mpnet mpt nemotron_h olmo2 olmoe opt pegasus
persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_5_text qwen3_moe qwen3_next roberta roformer segformer
siglip_vision_model smollm3 stablelm starcoder2 t5 vit xglm
""".split()


@pytest.mark.filterwarnings("ignore")  # whatever other people's models warn of
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_adapted_without_a_hint(family: str) -> None:
    row = census.counted(f"transformers:{family}")
    assert row["state"] == "checked", row.get("why")
    assert census.passed(row), census.problems(row)


def test_enough_families_are_counted() -> None:
    assert len(set(FAMILIES)) >= 60


# -- the checks ---------------------------------------------------------------------------------------


def test_a_projection_without_a_role_is_seen() -> None:
    layers = nn.ModuleDict(
        {"attention": nn.ModuleDict({"q_proj": nn.Linear(4, 4), "mystery": nn.Linear(4, 4)})}
    )
    plan = lowrank.plan_model(layers, presets.lora(rank=2))
    assert checks.without_role(plan) == ["attention.mystery"]


def test_a_matrix_that_the_plan_does_not_name_is_seen() -> None:
    model = nn.Sequential(OrderedDict(body=nn.Linear(4, 4), lstm=nn.LSTM(4, 4)))
    plan = lowrank.plan_model(model, presets.lora(rank=2))
    assert checks.not_named(model, plan) == []
    del plan.left_out["lstm.weight_hh_l0"]
    assert checks.not_named(model, plan) == ["lstm.weight_hh_l0"]


def test_no_large_matrix_is_left_out_without_a_word_whatever_it_is_called() -> None:
    """Positions and tokens are listed where they hold more than 1 % of the model."""

    class Positions(nn.Module):
        def __init__(self, count: int) -> None:
            super().__init__()
            self.pos_embed, self.body = nn.Parameter(torch.zeros(1, count, 8)), nn.Linear(8, 200)

    for count, said in ((200, ["pos_embed"]), (2, [])):
        model = Positions(count)
        plan = lowrank.plan_model(model, presets.lora(rank=2))
        assert list(plan.left_out) == said
        assert checks.not_named(model, plan) == []
        plan.left_out.clear()
        assert checks.not_named(model, plan) == said


def test_an_output_that_differs_is_seen() -> None:
    here = [torch.tensor([1.0, torch.nan]), torch.tensor([1, 2])]
    assert checks.unlike(here, [tensor.clone() for tensor in here]) == ""
    assert checks.unlike(here, [here[0], torch.tensor([1, 3])]) == "tensor 1: 1 of 2 numbers differ"
    assert checks.unlike(here, here[:1]) == "2 tensors, expected 1"


def test_a_model_that_does_not_move_is_seen() -> None:
    model = lowrank.wrap_model(build("llama"), presets.lora(rank=2), progress=False)
    still = checks.outputs(model, batch("llama"))
    assert checks.trains(model, batch("llama"), still) == ""
    stuck = lowrank.wrap_model(
        build("llama"), presets.lora(rank=2, target="0.self_attn.q_proj"), progress=False
    )
    with lowrank.disable_adapters(stuck):
        assert checks.trains(stuck, batch("llama"), still) == "no output depends on an adapter"


def test_rows_are_kept_and_told_in_a_table(tmp_path: Path) -> None:
    path = tmp_path / "census.jsonl"
    path.write_text(
        '{"name": "a:right", "state": "checked", "checks": {"wraps": ""}}\n'
        '{"name": "a:wrong", "state": "checked", "checks": {"wraps": ""}}\n'
        '{"name": "a:none", "state": "not built", "why": "no"}\n'
        '{"name": "a:wrong", "state": "checked", "checks": {"wraps": "ValueError: a | b"}}\n'
    )
    told = census.table(census.read(path))
    assert "| a | 3 | 2 | 2 | 2 | 1 | 50.0% |" in told
    assert "| a:wrong | wraps: ValueError: a \\| b |  |" in told
