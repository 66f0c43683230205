"""Exports, read by the real PEFT: the same logits, ranks and scalings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import lowrank
from lowrank import Allocation, Plan, Policy, presets
from tests import helpers, zoo
from tests.helpers import perturb
from tests.peft_format.common import (
    TENSORS,
    adapted,
    assert_same,
    frozen_base,
    logits,
    mixed,
    policy,
    theirs,
    warnings_of_peft,
    written,
)

pytestmark = warnings_of_peft

FAMILIES = [
    "bert", "llama", "gpt2", "t5", "vit", "phi3", "mistral", "distilbert", "falcon", "clip",
    "neox", "bloom", "codegen", "falcon40b",
]  # fmt: skip

METHODS: dict[str, Callable[[str], Policy | Plan]] = {
    "lora": lambda family: policy(family),
    "pissa": lambda family: policy(family, presets.pissa),
    "ailora": lambda family: policy(family, presets.ailora),
    "mixed ranks": mixed,
}


@pytest.mark.parametrize("serving", [False, True], ids=["patterns", "serving"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_computes_the_same(family: str, method: str, serving: bool, tmp_path: Path) -> None:
    model = adapted(family, METHODS[method](family))
    wanted = logits(model, family)
    assert not torch.allclose(wanted, logits(zoo.build(family), family), atol=1e-4)
    report = lowrank.export_peft(model, tmp_path / "peft", serving=serving)
    assert report.error < 1e-6 and set(report.errors) == {p.name for p in lowrank.plan_of(model).adapted}
    assert_same(logits(theirs(tmp_path / "peft", family), family), wanted, frozen_base(family))
    again = lowrank.import_peft(zoo.build(family), tmp_path / "peft")
    assert_same(logits(again, family), wanted, frozen_base(family))
    assert torch.equal(logits(model, family), wanted), "exporting changed the model"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_a_half_precision_base(dtype: torch.dtype, tmp_path: Path) -> None:
    """PEFT casts the activations up where this library casts the factors down: equal but for rounding."""
    model = adapted("llama", policy("llama", presets.pissa), dtype)
    lowrank.export_peft(model, tmp_path / "peft")
    assert {t.dtype for t in load_file(tmp_path / "peft" / TENSORS).values()} == {torch.float32}
    wanted = logits(model, "llama", dtype).float()
    got = logits(theirs(tmp_path / "peft", "llama", dtype), "llama", dtype).float()
    moved = (wanted - logits(zoo.build("llama", dtype), "llama", dtype).float()).norm()
    assert (got - wanted).norm() < 0.05 * moved


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_heads_travel(family: str, tmp_path: Path) -> None:
    """DistilBERT's pre_classifier ends with "classifier": PEFT takes it too, so its weights go along."""
    model = adapted(family, policy(family, train=("classifier",)))
    wanted = logits(model, family)
    lowrank.export_peft(model, tmp_path)
    both = ["classifier", "pre_classifier"]
    assert written(tmp_path)["modules_to_save"] == (both if family == "distilbert" else ["classifier"])
    assert written(tmp_path)["task_type"] == "SEQ_CLS"
    assert_same(logits(theirs(tmp_path, family), family), wanted, frozen_base(family))
    again = lowrank.import_peft(zoo.build(family), tmp_path)
    assert_same(logits(again, family), wanted, frozen_base(family))
    assert sorted(lowrank.plan_of(again).train) == written(tmp_path)["modules_to_save"]


def test_a_head_that_was_not_trained_is_not_asked_for(tmp_path: Path) -> None:
    """With task_type SEQ_CLS, PEFT would look for a classifier in the file."""
    lowrank.export_peft(adapted("bert", policy("bert")), tmp_path)
    assert written(tmp_path)["task_type"] is None and written(tmp_path)["modules_to_save"] is None


def test_what_peft_saves_again_means_the_same(tmp_path: Path) -> None:
    model = adapted("gpt2", mixed("gpt2"))
    wanted = logits(model, "gpt2")
    lowrank.export_peft(model, tmp_path / "ours")
    theirs(tmp_path / "ours", "gpt2").save_pretrained(tmp_path / "theirs")
    assert_same(logits(theirs(tmp_path / "theirs", "gpt2"), "gpt2"), wanted, frozen_base("gpt2"))
    again = lowrank.import_peft(zoo.build("gpt2"), tmp_path / "theirs")
    assert_same(logits(again, "gpt2"), wanted, frozen_base("gpt2"))


def test_ranks_and_scalings_as_the_format_has_them(tmp_path: Path) -> None:
    model = adapted("gpt2", policy("gpt2", presets.pissa, rank=2, alpha=6.0))
    report = lowrank.export_peft(model, tmp_path / "a")
    fused, single = "transformer.h.0.attn.c_attn", "transformer.h.0.mlp.c_fc"
    assert (report.ranks[fused], report.ranks[single]) == (3 * 2 * 2, 2 * 2)
    config = written(tmp_path / "a")
    assert config["fan_in_fan_out"] and config["peft_type"] == "LORA" and config["init_lora_weights"] is True
    assert (config["r"], config["lora_alpha"]) == (4, 4 * 3.0)
    assert set(config["rank_pattern"].values()) == {12} and set(config["alpha_pattern"].values()) == {36.0}
    B = load_file(tmp_path / "a" / TENSORS)[f"base_model.model.{fused}.lora_B.weight"]
    assert not B[:32, 4:].any() and not B[32:64, :4].any() and not B[64:, :8].any()

    lowrank.export_peft(model, tmp_path / "b", serving=True)
    config = written(tmp_path / "b")
    assert (
        config["r"] == config["lora_alpha"] == 12 and config["rank_pattern"] == config["alpha_pattern"] == {}
    )
    shapes = {t.shape[0] for name, t in load_file(tmp_path / "b" / TENSORS).items() if "lora_A" in name}
    assert shapes == {12}


@pytest.mark.parametrize("family", ["gpt2", "phi3", "llama"])
def test_an_engine_that_reads_one_rank_and_one_alpha(family: str, tmp_path: Path) -> None:
    model = adapted(family, mixed(family))
    lowrank.export_peft(model, tmp_path, serving=True)
    config, tensors = written(tmp_path), load_file(tmp_path / TENSORS)
    for path, layer in lowrank.adapted_layers(model).items():
        A, B = (tensors[f"base_model.model.{path}.lora_{factor}.weight"] for factor in "AB")
        assert A.shape[0] == B.shape[1] == config["r"]
        delta = config["lora_alpha"] / config["r"] * B @ A
        torch.testing.assert_close(delta, layer.delta_weight(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_a_small_update_survives_a_half_precision_file(dtype: torch.dtype, tmp_path: Path) -> None:
    """The reason for [b, B₀]·[A₀ + a; a]: in [B, −B₀]·[A; A₀] the update is below the rounding of B and A."""
    model = lowrank.wrap_model(zoo.build("llama"), policy("llama", presets.pissa), progress=False)
    perturb(model, 1e-4)
    report = lowrank.export_peft(model, tmp_path, dtype=dtype)
    assert {t.dtype for t in load_file(tmp_path / TENSORS).values()} == {dtype}
    assert 1e-5 < report.error < 0.01

    p, adapter = next(iter(lowrank.adapters.adapters_of(model).items()))
    A, B = (factor.detach().to(dtype).double() for factor in adapter.factors())
    A0, B0 = adapter.A0.to(dtype).double(), adapter.B0.to(dtype).double()
    delta = adapter.product().detach().double()
    cancelling = adapter.scaling * (B @ A - B0 @ A0)
    assert (cancelling - delta).norm() / delta.norm() > 10 * report.errors[p.name]


def test_recompression_is_the_best_of_its_rank_and_says_what_it_costs(tmp_path: Path) -> None:
    model = adapted("gpt2", policy("gpt2", presets.pissa))
    report = lowrank.export_peft(model, tmp_path, recompress=True)
    assert report.ranks["transformer.h.0.attn.c_attn"] == 9 and report.ranks["transformer.h.0.mlp.c_fc"] == 3
    for p, adapter in lowrank.adapters.adapters_of(model).items():
        S = torch.linalg.svdvals(adapter.product().detach().double())
        best = float(S[3:].norm() / S.norm())
        assert best > 0.01 and abs(report.errors[p.name] - best) < 1e-4 * best
    assert f"{report.error:.1e}" in str(report)
    again = lowrank.import_peft(zoo.build("gpt2"), tmp_path)
    assert_same(logits(again, "gpt2"), logits(theirs(tmp_path, "gpt2"), "gpt2"), frozen_base("gpt2"))


def test_an_untrained_adapter_is_exactly_nothing(tmp_path: Path) -> None:
    for name, preset in (("lora", presets.lora), ("pissa", presets.pissa)):
        model = lowrank.wrap_model(zoo.build("llama"), policy("llama", preset), progress=False)
        assert lowrank.export_peft(model, tmp_path / name).error == 0
        again = lowrank.import_peft(zoo.build("llama"), tmp_path / name)
        assert torch.equal(logits(again, "llama"), frozen_base("llama"))


class Ends(nn.Module):
    """Paths that end with one another."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.block = nn.ModuleDict({"fc": nn.Linear(6, 6), "block": nn.ModuleDict({"fc": nn.Linear(6, 6)})})

    def forward(self, x: Tensor) -> Tensor:
        return self.block["block"]["fc"](self.block["fc"](self.fc(x)))


@pytest.mark.parametrize("chosen", ["a", "b", "c", "ac", "ab", "bc", "abc"])
def test_paths_that_end_with_one_another(chosen: str, tmp_path: Path) -> None:
    base = Ends()
    state, x = base.state_dict(), torch.randn(4, 6)
    before = helpers.frozen_logits(base, x)
    plan = lowrank.plan_model(base, presets.lora(rank=2, target="fc"))
    ranks = {p: Allocation((i + 1) * ("abc"[i] in chosen), 1.0 + i) for i, p in enumerate(plan)}
    model = perturb(lowrank.wrap_model(base, Plan(ranks), progress=False))
    lowrank.export_peft(model, tmp_path)
    fresh = Ends()
    fresh.load_state_dict(state)
    wanted = helpers.logits(model, x)
    assert_same(helpers.logits(peft.PeftModel.from_pretrained(fresh, tmp_path), x), wanted, before)
    fresh = Ends()
    fresh.load_state_dict(state)
    assert_same(helpers.logits(lowrank.import_peft(fresh, tmp_path), x), wanted, before)
