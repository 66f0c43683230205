"""Folders that are not understood: refused with every reason, and the model is as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import lowrank
from lowrank import AdapterError
from tests import zoo
from tests.peft_format.common import (
    CONFIG,
    TENSORS,
    adapted,
    policy,
    trained_by_peft,
    warnings_of_peft,
    written,
)

pytestmark = warnings_of_peft


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter of query and value of the small BERT, with its head, as PEFT saves it."""
    trained_by_peft("bert", tmp_path / "peft", target_modules=["query", "value"], task_type="SEQ_CLS", r=4)
    return tmp_path / "peft"


def untouched(folder: Path, message: str, family: str = "bert") -> str:
    model = zoo.build(family)
    before, modules = {name: t.clone() for name, t in model.state_dict().items()}, dict(model.named_modules())
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(AdapterError, match=message) as raised:
        lowrank.import_peft(model, folder)
    assert dict(model.named_modules()) == modules and "_lowrank" not in model.__dict__
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags
    return str(raised.value)


FEATURES: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, r"its magnitudes \(DoRA\) are None, and use_dora is True"),
    "a trained bias": ({"bias": "lora_only"}, "bias = 'lora_only'"),
    "lora_bias": ({"lora_bias": True}, "lora_bias = True"),
    "target_parameters": ({"target_parameters": ["experts.w"]}, "target_parameters = "),
    "layer_replication": ({"layer_replication": [[0, 1]]}, "layer_replication"),
    "trainable_token_indices": ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    "aLoRA": ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
    "megatron": ({"megatron_config": {"a": 1}}, "megatron_config"),
    "one of next year": ({"use_telepathy": True}, "use_telepathy = True is a PEFT feature"),
    "another method": ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
    "LoftQ": ({"init_lora_weights": "loftq"}, "'loftq' rewrote the base's weights"),
    "CorDA": ({"init_lora_weights": "corda"}, "'corda' rewrote the base's weights"),
    "LoRA-GA": ({"init_lora_weights": "lora_ga"}, "'lora_ga' rewrote the base's weights"),
    "an unknown start": ({"init_lora_weights": ["x"]}, "init_lora_weights = .'x'. is unknown"),
    "a rank of zero": ({"r": 0}, "the rank of r: expected an integer of at least 1, got 0"),
    "a rank of words": ({"rank_pattern": {"query": "4"}}, "the rank of query: expected an .*, got '4'"),
    "an alpha of words": ({"lora_alpha": None}, "the alpha of lora_alpha: expected a number, got None"),
    "a rank that is not the tensors'": ({"rank_pattern": {"0.*query": 3}}, "0.attention.self.query: exp"),
    "dropout": ({"lora_dropout": 1.5}, "lora_dropout: expected .*, got 1.5"),
    "a pattern without end": ({"rank_pattern": {"(a+)+$": 4}}, "too complex: write out"),
    "a pattern of many choices": ({"rank_pattern": {"a?" * 30: 4}}, "too complex: write out"),
    "a broken pattern": ({"alpha_pattern": {"[": 4}}, "is not a regular expression"),
    "targets that are not there": ({"target_modules": ["query", "value", "key"]}, "key: target_modules na"),
    "targets that do not say so": ({"target_modules": ["query"]}, "value: target_modules does not"),
    "a head that is not named": ({"modules_to_save": None}, "classifier.bias: it is in the folder, but"),
    "a head that is not there": ({"modules_to_save": ["classifier", "pooler"]}, "dense.weight: modules_to"),
    "an adapted head": ({"modules_to_save": ["query", "classifier"]}, "query: it is both adapted and"),
}  # fmt: skip


@pytest.mark.parametrize("case", FEATURES)
def test_a_configuration_that_is_not_understood(case: str, folder: Path) -> None:
    change, message = FEATURES[case]
    (folder / CONFIG).write_text(json.dumps({**written(folder), **change}))
    untouched(folder, message)


def rename(old: str, new: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {name.replace(old, new): t for name, t in tensors.items()}


TENSOR_CASES: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "DoRA": (
        lambda t: {**t, "base_model.model.x.lora_magnitude_vector": torch.ones(1)},
        "x: the folder has magnitudes",
    ),
    "magnitudes that the configuration does not tell": (
        lambda t: {
            **t,
            next(iter(t)).split(".lora_")[0] + ".lora_magnitude_vector": torch.ones(32),
        },
        r"magnitudes \(DoRA\) are \(32,\), and use_dora is False",
    ),
    "an embedding": (
        rename("lora_A.weight", "lora_embedding_A"),
        "the names of another kind of layer than Linear",
    ),
    "a bias": (
        lambda t: {**t, "base_model.model.x.lora_B.bias": torch.ones(1)},
        "lora_bias is not supported",
    ),
    "experts": (rename("query.lora", "query.base_layer.lora"), "a tensor that no Linear holds"),
    "another prefix": (rename("base_model.model.", "model."), "PEFT's names start with base_model.model."),
    "no such module": (
        rename("layer.1", "layer.7"),
        "layer.7.attention.self.query: the model has no such linear",
    ),
    "a factor is missing": (
        lambda t: {name: x for name, x in t.items() if "layer.0.attention.self.query.lora_B" not in name},
        "self.query: expected factors .*, got {'A': .4, 32.}",
    ),
    "a convolution": (
        lambda t: {name: x[:, :, None, None].clone() if "lora" in name else x for name, x in t.items()},
        r"expected factors .*, got {'A': \(4, 32, 1, 1\)",
    ),
    "whole numbers": (
        lambda t: {name: x.int() if "lora" in name else x for name, x in t.items()},
        "its factors are not floating point",
    ),
    "NaN": (lambda t: {**t, next(iter(t)): next(iter(t.values())) * float("nan")}, "holds NaN or Inf"),
    "another head": (
        lambda t: {name: x if "classifier" not in name else torch.ones(3, 32) for name, x in t.items()},
        "classifier.weight: expected the shape .2, 32., got .3, 32.",
    ),
    "nothing": (lambda t: {name: x for name, x in t.items() if "lora" not in name}, "holds no LoRA factors"),
}


@pytest.mark.parametrize("case", TENSOR_CASES)
def test_tensors_that_do_not_fit(case: str, folder: Path) -> None:
    change, message = TENSOR_CASES[case]
    save_file(change(load_file(folder / TENSORS)), folder / TENSORS)
    untouched(folder, message)


def test_another_base_is_refused_with_every_mismatch(folder: Path) -> None:
    lines = untouched(folder, "was made for another base", "roberta").splitlines()
    assert sum("the model has no such linear module" in line for line in lines) == 4


def test_a_shared_module_is_not_adapted_twice(tmp_path: Path) -> None:
    """PEFT adapts one of its places; here it would be all of them."""
    model = peft.get_peft_model(
        zoo.Shared(), peft.LoraConfig(target_modules=["first"], init_lora_weights=False)
    )
    model.save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="first: it is used in several places"):
        lowrank.import_peft(zoo.Shared(), tmp_path)


def test_a_tied_module_is_not_trained_apart(tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    with pytest.warns(UserWarning, match="tie"):
        model = peft.get_peft_model(zoo.build("tied_llama"), config)
    model.save_pretrained(tmp_path)
    untouched(tmp_path, "lm_head.*tied", "tied_llama")


def test_pickles_are_not_opened(folder: Path) -> None:
    (folder / TENSORS).rename(folder / "adapter_model.bin")
    untouched(folder, "is a pickle, which could run anything")


def test_folders_that_are_none(tmp_path: Path) -> None:
    untouched(tmp_path / "nowhere", f"holds no {CONFIG}")
    lowrank.save_adapter(adapted("bert", policy("bert")), tmp_path)
    untouched(tmp_path, "an adapter of lowrank's own: load_adapter")
    with pytest.raises(ValueError, match="has an adapter 'default' already"):
        lowrank.import_peft(adapted("bert", policy("bert")), tmp_path)
