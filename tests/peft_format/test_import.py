"""Adapters that PEFT wrote: the same logits here, in fp32, and they train on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import lowrank
from lowrank import AdapterError
from tests import zoo
from tests.helpers import perturb
from tests.peft_format.common import (
    CONFIG,
    TENSORS,
    adapted,
    assert_same,
    frozen_base,
    logits,
    mixed,
    theirs,
    trained_by_peft,
    warnings_of_peft,
    written,
)

pytestmark = warnings_of_peft

FROM_PEFT: dict[str, tuple[str, dict[str, Any]]] = {
    "the defaults of r and alpha": ("bert", {"target_modules": ["query", "value"]}),
    "patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "k_proj", "up_proj", "o_proj"],
            "r": 2,
            "lora_alpha": 3,
            "rank_pattern": {"layers.0.self_attn.q_proj": 5, "q_proj": 3, r"layers\.\d\.mlp\.(up|x)_proj": 4},
            "alpha_pattern": {"^model.layers.1.self_attn.k_proj": 0.5, "layers.0.*q_proj": 50, "q_proj": 7},
        },
    ),
    "rslora": ("llama", {"target_modules": "all-linear", "r": 9, "lora_alpha": 5, "use_rslora": True}),
    "an expression": ("t5", {"target_modules": r".*decoder.*(Self|EncDec)Attention\.(q|v)$", "r": 4}),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "r": 6, "fan_in_fan_out": True}),
    "a fused weight": ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"], "r": 4}),
    "heads interleaved": ("neox", {"target_modules": ["query_key_value"], "r": 4}),
    "excluded modules": ("vit", {"target_modules": ["k_proj", "fc1"], "exclude_modules": ["1.mlp.fc1"]}),
    "some layers": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "a head": ("bert", {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
    "a head of several": ("roberta", {"target_modules": ["query"], "modules_to_save": ["classifier"]}),
    "a rank above the shape": ("vit", {"target_modules": ["fc1"], "r": 40}),
    "orthogonal": ("bert", {"target_modules": ["value", "output.dense"], "init_lora_weights": "orthogonal"}),
    "gaussian": ("bert", {"target_modules": ["value", "output.dense"], "init_lora_weights": "gaussian"}),
}  # fmt: skip


@pytest.mark.parametrize("case", FROM_PEFT)
def test_an_adapter_made_by_peft(case: str, tmp_path: Path) -> None:
    family, options = FROM_PEFT[case]
    wanted = trained_by_peft(family, tmp_path, **options)
    model = lowrank.import_peft(zoo.build(family), tmp_path)
    assert_same(logits(model, family), wanted, frozen_base(family))
    with lowrank.disable_adapters(model):
        assert torch.equal(logits(model, family), frozen_base(family))


def test_the_first_pattern_that_matches_counts(tmp_path: Path) -> None:
    """PEFT saves its patterns sorted, whatever they meant before; what counts is the order in the file."""
    trained_by_peft("llama", tmp_path, target_modules=["q_proj"], alpha_pattern={"layers.0.*q_proj": 50})
    for order in (["q_proj", "layers.0.*q_proj"], ["layers.0.*q_proj", "q_proj"]):
        alphas = {"q_proj": 7, "layers.0.*q_proj": 50}
        config = {**written(tmp_path), "alpha_pattern": {key: alphas[key] for key in order}}
        (tmp_path / CONFIG).write_text(json.dumps(config))
        model = lowrank.import_peft(zoo.build("llama"), tmp_path)
        scalings = [layer.scaling for layer in lowrank.adapted_layers(model).values()]
        assert scalings == ([7 / 8, 7 / 8] if order[0] == "q_proj" else [50 / 8, 7 / 8])
        assert_same(logits(model, "llama"), logits(theirs(tmp_path, "llama"), "llama"), frozen_base("llama"))


def test_half_precision_files_are_read_into_fp32(tmp_path: Path) -> None:
    wanted = trained_by_peft("llama", tmp_path, target_modules="all-linear")
    tensors = load_file(tmp_path / TENSORS)
    save_file({name: t.bfloat16() for name, t in tensors.items()}, tmp_path / TENSORS)
    model = lowrank.import_peft(zoo.build("llama"), tmp_path)
    assert {p.dtype for p in lowrank.adapter_parameters(model)} == {torch.float32}
    assert_same(logits(model, "llama"), logits(theirs(tmp_path, "llama"), "llama"), frozen_base("llama"))
    torch.testing.assert_close(logits(model, "llama"), wanted, rtol=0.05, atol=0.02)


def test_an_import_trains_on_and_saves_in_our_format(tmp_path: Path) -> None:
    trained_by_peft(
        "gpt2", tmp_path / "peft", target_modules=["c_attn"], lora_dropout=0.25, fan_in_fan_out=True
    )
    model = lowrank.import_peft(zoo.build("gpt2"), tmp_path / "peft")
    plan = lowrank.plan_of(model)
    assert plan.dropout == 0.25 and {p.shape for p in plan} == {(96, 32)} and plan.adapted == list(plan)
    before = logits(model, "gpt2")
    model.train()
    optimizer = torch.optim.SGD(lowrank.adapter_parameters(model), lr=0.1)
    model(**zoo.batch("gpt2")).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in lowrank.adapter_parameters(model))
    optimizer.step()
    model.eval()
    assert not torch.equal(logits(model, "gpt2"), before)
    lowrank.save_adapter(model, tmp_path / "ours")
    fresh = lowrank.load_adapter(zoo.build("gpt2"), tmp_path / "ours")
    assert torch.equal(logits(fresh, "gpt2"), logits(model, "gpt2"))


def test_there_and_back_is_the_same_file(tmp_path: Path) -> None:
    model = adapted("t5", mixed("t5"))
    lowrank.export_peft(model, tmp_path / "once")
    again = lowrank.import_peft(zoo.build("t5"), tmp_path / "once")
    lowrank.export_peft(again, tmp_path / "twice")
    assert (tmp_path / "once" / TENSORS).read_bytes() == (tmp_path / "twice" / TENSORS).read_bytes()
    assert written(tmp_path / "once") == written(tmp_path / "twice")


@pytest.mark.filterwarnings("ignore:.*changes the base weights of the model")
@pytest.mark.parametrize("start", ["pissa", "olora", "pissa_niter_4"])
def test_a_start_that_rewrote_the_base_is_refused_and_can_be_converted(start: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=start)
    model = peft.get_peft_model(zoo.build("llama"), config).eval()
    model.peft_config["default"].init_lora_weights = True  # as PEFT's guide has it: keep the start as it is
    model.save_pretrained(tmp_path / "before")
    model.peft_config["default"].init_lora_weights = start
    perturb(model)
    wanted = logits(model, "llama")
    model.save_pretrained(tmp_path / "raw")
    with pytest.raises(AdapterError, match=f"'{start}' rewrote the base's weights.*path_initial_model_for"):
        lowrank.import_peft(zoo.build("llama"), tmp_path / "raw")
    model.save_pretrained(
        tmp_path / "converted", path_initial_model_for_weight_conversion=tmp_path / "before"
    )
    imported = lowrank.import_peft(zoo.build("llama"), tmp_path / "converted")
    torch.testing.assert_close(logits(imported, "llama"), wanted, rtol=1e-4, atol=1e-4)
