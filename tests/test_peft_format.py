"""PEFT both ways, with the real library on the other side: the same logits and ranks, or a clear refusal."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lowrank
from lowrank import AdapterError, Allocation, Plan, Policy, presets
from lowrank.peft_format import export
from tests import zoo

# PEFT asks transformers for a name that it has given up.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PHI3 = {"qkv_proj": {"query": 32, "key": 16, "value": 16}}
FAMILIES = ["bert", "llama", "gpt2", "t5", "vit", "phi3", "mistral", "distilbert", "falcon", "clip"]

# fp32 sums in another order; the adapters move these logits by 1e-3 to 6.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def logits(model: nn.Module, family: str, dtype: torch.dtype = torch.float32) -> Tensor:
    with torch.no_grad():
        output = model(**zoo.batch(family, dtype))
    return output.logits_per_image if family == "clip" else output.logits


def perturb(model: nn.Module, size: float = 0.1) -> nn.Module:
    """Trains by chance: whatever is trainable moves, each tensor in its own direction."""
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=draw).to(parameter.dtype))
    return model


def policy(family: str, preset: Callable[..., Policy] = presets.lora, **options: Any) -> Policy:
    return preset(**{"rank": 3, "fused": PHI3 if family == "phi3" else {}, **options})


def adapted(family: str, how: Policy | Plan, dtype: torch.dtype = torch.float32) -> nn.Module:
    return perturb(lowrank.wrap_model(zoo.build(family, dtype), how, progress=False))


def mixed(family: str) -> Plan:
    """Ranks from 0 to 4 and as many scalings, by turns."""
    plan = lowrank.plan_model(zoo.build(family), policy(family, presets.pissa))
    return Plan({p: Allocation(i % 5, 0.5 + i % 3) for i, p in enumerate(plan)}, init=plan.init)


def theirs(folder: Path, family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """PEFT's reading of ``folder`` on a fresh base."""
    return peft.PeftModel.from_pretrained(zoo.build(family, dtype), folder)


def written(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CONFIG).read_text())


# -- export, read by PEFT -----------------------------------------------------------------------------

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
    torch.testing.assert_close(logits(theirs(tmp_path / "peft", family), family), wanted, **CLOSE)
    again = lowrank.import_peft(zoo.build(family), tmp_path / "peft")
    torch.testing.assert_close(logits(again, family), wanted, **CLOSE)
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
    torch.testing.assert_close(logits(theirs(tmp_path, family), family), wanted, **CLOSE)
    again = lowrank.import_peft(zoo.build(family), tmp_path)
    torch.testing.assert_close(logits(again, family), wanted, **CLOSE)
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
    torch.testing.assert_close(logits(theirs(tmp_path / "theirs", "gpt2"), "gpt2"), wanted, **CLOSE)
    again = lowrank.import_peft(zoo.build("gpt2"), tmp_path / "theirs")
    torch.testing.assert_close(logits(again, "gpt2"), wanted, **CLOSE)


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

    p, adapter = next(iter(lowrank.adapted.adapters_of(model).items()))
    A, B = (factor.detach().to(dtype).double() for factor in adapter.factors())
    A0, B0 = adapter.A0.to(dtype).double(), adapter.B0.to(dtype).double()
    delta = adapter.product().detach().double()
    cancelling = adapter.scaling * (B @ A - B0 @ A0)
    assert (cancelling - delta).norm() / delta.norm() > 10 * report.errors[p.name]


def test_recompression_is_the_best_of_its_rank_and_says_what_it_costs(tmp_path: Path) -> None:
    model = adapted("gpt2", policy("gpt2", presets.pissa))
    report = lowrank.export_peft(model, tmp_path, recompress=True)
    assert report.ranks["transformer.h.0.attn.c_attn"] == 9 and report.ranks["transformer.h.0.mlp.c_fc"] == 3
    for p, adapter in lowrank.adapted.adapters_of(model).items():
        S = torch.linalg.svdvals(adapter.product().detach().double())
        best = float(S[3:].norm() / S.norm())
        assert best > 0.01 and abs(report.errors[p.name] - best) < 1e-4 * best
    assert f"{report.error:.1e}" in str(report)
    again = lowrank.import_peft(zoo.build("gpt2"), tmp_path)
    torch.testing.assert_close(logits(again, "gpt2"), logits(theirs(tmp_path, "gpt2"), "gpt2"), **CLOSE)


def test_an_untrained_adapter_is_exactly_nothing(tmp_path: Path) -> None:
    for name, preset in (("lora", presets.lora), ("pissa", presets.pissa)):
        model = lowrank.wrap_model(zoo.build("llama"), policy("llama", preset), progress=False)
        assert lowrank.export_peft(model, tmp_path / name).error == 0
        again = lowrank.import_peft(zoo.build("llama"), tmp_path / name)
        assert torch.equal(logits(again, "llama"), logits(zoo.build("llama"), "llama"))


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
    plan = lowrank.plan_model(base, presets.lora(rank=2, target="fc"))
    ranks = {p: Allocation((i + 1) * ("abc"[i] in chosen), 1.0 + i) for i, p in enumerate(plan)}
    model = perturb(lowrank.wrap_model(base, Plan(ranks), progress=False))
    lowrank.export_peft(model, tmp_path)
    fresh = Ends()
    fresh.load_state_dict(state)
    torch.testing.assert_close(peft.PeftModel.from_pretrained(fresh, tmp_path)(x), model(x), **CLOSE)
    fresh = Ends()
    fresh.load_state_dict(state)
    torch.testing.assert_close(lowrank.import_peft(fresh, tmp_path)(x), model(x), **CLOSE)


# -- export, refused ----------------------------------------------------------------------------------


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = self.first
        self.own = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.own(self.second(self.first(x)))


class Homemade(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = 6, 6, None
        self.weight = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


REFUSED: dict[str, tuple[Callable[[], nn.Module], Policy, str]] = {
    "attention": (
        lambda: zoo.build("torch_encoder"),
        presets.lora(rank=2),
        r"self_attn.in_proj_weight\[query\]: its weight is read without a call",
    ),
    "a fast path": (
        lambda: zoo.build("torch_encoder"),
        presets.lora(rank=2, target="linear1"),
        "encoder.layers.1.linear1: its weight is read without a call",
    ),
    "experts": (
        lambda: zoo.build("mixtral"),
        presets.lora(rank=2, target="up"),
        r"experts.gate_up_proj\[0.up\]: its weight is read without a call",
    ),
    "a shared module": (Shared, presets.lora(rank=2), "first: it is used in several places"),
    "another kind of layer": (
        lambda: nn.Sequential(Homemade(), nn.Linear(6, 6)),
        presets.lora(rank=2),
        "0: PEFT adapts nn.Linear and Conv1D, not Homemade",
    ),
    "a name inside another's": (
        lambda: nn.ModuleDict({"head": nn.Linear(6, 6), "body_head": nn.ModuleDict({"fc": nn.Linear(6, 6)})}),
        presets.lora(rank=2, target="fc", train=("head",)),
        "body_head: it holds adapters",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_peft_cannot_hold_is_refused_by_name(case: str, tmp_path: Path) -> None:
    build, how, message = REFUSED[case]
    model = perturb(lowrank.wrap_model(build(), how, progress=False))
    with pytest.raises(ValueError, match=message):
        lowrank.export_peft(model, tmp_path / "peft")
    assert not list(tmp_path.iterdir())


def test_all_of_them_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as raised:
        lowrank.export_peft(adapted("mamba", presets.lora(rank=2)), tmp_path / "peft")
    lines = str(raised.value).splitlines()
    assert len(lines) == 1 + 2 * 3 and all("_proj: its weight is read" in line for line in lines[1:])


def test_serving_takes_no_trained_modules(tmp_path: Path) -> None:
    model = adapted("bert", policy("bert", train=("classifier",)))
    with pytest.raises(ValueError, match="refuse or ignore modules trained in full .classifier."):
        lowrank.export_peft(model, tmp_path, serving=True)


def test_an_unwrapped_model_and_bad_numbers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the model is not wrapped"):
        lowrank.export_peft(zoo.build("bert"), tmp_path)
    model = adapted("bert", policy("bert"))
    with torch.no_grad():
        next(lowrank.adapter_parameters(model)).fill_(float("inf"))
    with pytest.raises(ValueError, match="lora_A.weight holds NaN or Inf"):
        lowrank.export_peft(model, tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file: name a folder"):
        lowrank.export_peft(adapted("bert", policy("bert")), tmp_path / "file")


# -- all or nothing -----------------------------------------------------------------------------------


def corrupt_tensor(tensors: dict[str, Tensor]) -> None:
    name = next(name for name in tensors if "lora_B" in name)
    tensors[name] = tensors[name] * (1 + 1e-4)


def corrupt_head(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.classifier.bias"] = tensors["base_model.model.classifier.bias"] + 1e-6


def drop_layer(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if "layer.1.intermediate" in name]:
        del tensors[name]


@pytest.mark.parametrize("damage", [corrupt_tensor, corrupt_head, drop_layer])
def test_an_export_that_is_not_the_model_leaves_nothing(
    damage: Callable[[dict[str, Tensor]], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted("bert", policy("bert", train=("classifier",)))
    packed = export.packed

    def damaged(tensors: dict[str, Tensor]) -> bytes:
        tensors = dict(tensors)
        damage(tensors)
        return packed(tensors)

    monkeypatch.setattr(export, "packed", damaged)
    with pytest.raises(ValueError, match="nothing was exported"):
        lowrank.export_peft(model, tmp_path / "below" / "peft")
    assert not list(tmp_path.iterdir())

    monkeypatch.undo()
    lowrank.export_peft(model, tmp_path / "below" / "peft")
    before = {file.name: file.read_bytes() for file in (tmp_path / "below" / "peft").iterdir()}
    monkeypatch.setattr(export, "packed", damaged)
    with pytest.raises(ValueError, match="nothing was exported"):
        lowrank.export_peft(model, tmp_path / "below" / "peft")
    assert {file.name: file.read_bytes() for file in (tmp_path / "below" / "peft").iterdir()} == before


def test_a_wrong_configuration_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patterns = export.peft_patterns
    monkeypatch.setattr(
        export, "peft_patterns", lambda *a: {**patterns(*a), "lora_alpha": 1.0, "alpha_pattern": {}}
    )
    with pytest.raises(ValueError, match="give another ΔW"):
        lowrank.export_peft(adapted("gpt2", policy("gpt2")), tmp_path / "peft")
    assert not list(tmp_path.iterdir())


def test_an_earlier_export_is_replaced_and_other_files_stay(tmp_path: Path) -> None:
    model = adapted("bert", policy("bert"))
    lowrank.export_peft(model, tmp_path)
    (tmp_path / "README.md").write_text("kept")
    perturb(model)
    lowrank.export_peft(model, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {CONFIG, TENSORS, "README.md"}
    torch.testing.assert_close(logits(theirs(tmp_path, "bert"), "bert"), logits(model, "bert"), **CLOSE)


# -- import, written by PEFT --------------------------------------------------------------------------


def trained_by_peft(family: str, folder: Path, **options: Any) -> Tensor:
    """Saves an adapter that PEFT made and chance trained; returns its logits."""
    config = peft.LoraConfig(**{"init_lora_weights": False, **options})
    model = peft.get_peft_model(zoo.build(family), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return logits(model, family)


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
    "orthogonal": ("bert", {"target_modules": ["query"], "init_lora_weights": "orthogonal"}),
    "gaussian": ("bert", {"target_modules": ["query"], "init_lora_weights": "gaussian"}),
}  # fmt: skip


@pytest.mark.parametrize("case", FROM_PEFT)
def test_an_adapter_made_by_peft(case: str, tmp_path: Path) -> None:
    family, options = FROM_PEFT[case]
    wanted = trained_by_peft(family, tmp_path, **options)
    model = lowrank.import_peft(zoo.build(family), tmp_path)
    torch.testing.assert_close(logits(model, family), wanted, **CLOSE)
    with lowrank.disable_adapters(model):
        assert torch.equal(logits(model, family), logits(zoo.build(family), family))


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
        torch.testing.assert_close(
            logits(model, "llama"), logits(theirs(tmp_path, "llama"), "llama"), **CLOSE
        )


def test_half_precision_files_are_read_into_fp32(tmp_path: Path) -> None:
    wanted = trained_by_peft("llama", tmp_path, target_modules="all-linear")
    tensors = load_file(tmp_path / TENSORS)
    save_file({name: t.bfloat16() for name, t in tensors.items()}, tmp_path / TENSORS)
    model = lowrank.import_peft(zoo.build("llama"), tmp_path)
    assert {p.dtype for p in lowrank.adapter_parameters(model)} == {torch.float32}
    torch.testing.assert_close(logits(model, "llama"), logits(theirs(tmp_path, "llama"), "llama"), **CLOSE)
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


# -- import, refused ----------------------------------------------------------------------------------


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
    "DoRA": ({"use_dora": True}, "use_dora = True is a PEFT feature"),
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
    "a rank of zero": ({"r": 0}, "the rank of r is 0"),
    "a rank of words": ({"rank_pattern": {"query": "4"}}, "the rank of query is '4'"),
    "an alpha of words": ({"lora_alpha": None}, "the alpha of lora_alpha is None"),
    "a rank that is not the tensors'": ({"rank_pattern": {"0.*query": 3}}, "0.attention.self.query: its"),
    "dropout": ({"lora_dropout": 1.5}, "lora_dropout is 1.5"),
    "a pattern without end": ({"rank_pattern": {"(a+)+$": 4}}, "too involved to be run"),
    "a pattern of many choices": ({"rank_pattern": {"a?" * 30: 4}}, "too involved to be run"),
    "a broken pattern": ({"alpha_pattern": {"[": 4}}, "is no regular expression"),
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
    "DoRA": (lambda t: {**t, "base_model.model.x.lora_magnitude_vector": torch.ones(1)}, "DoRA"),
    "an embedding": (rename("lora_A.weight", "lora_embedding_A"), "an adapted embedding is not supported"),
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
        "self.query: its factors are {'A': .4, 32.}",
    ),
    "a convolution": (
        lambda t: {name: x[:, :, None, None].clone() if "lora" in name else x for name, x in t.items()},
        r"its factors are {'A': \(4, 32, 1, 1\)",
    ),
    "whole numbers": (
        lambda t: {name: x.int() if "lora" in name else x for name, x in t.items()},
        "its factors are not floating point",
    ),
    "NaN": (lambda t: {**t, next(iter(t)): next(iter(t.values())) * float("nan")}, "holds NaN or Inf"),
    "another head": (
        lambda t: {name: x if "classifier" not in name else torch.ones(3, 32) for name, x in t.items()},
        "classifier.weight: its shape is .3, 32., not .2, 32.",
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
    model = peft.get_peft_model(Shared(), peft.LoraConfig(target_modules=["first"], init_lora_weights=False))
    model.save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="first: it is used in several places"):
        lowrank.import_peft(Shared(), tmp_path)


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
    with pytest.raises(ValueError, match="wrapped already"):
        lowrank.import_peft(adapted("bert", policy("bert")), tmp_path)


# -- a plan, taken to PEFT ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "t5", "phi3"])
def test_a_plan_gives_peft_exactly_its_ranks(family: str) -> None:
    plan = mixed(family)
    model = peft.get_peft_model(
        zoo.build(family), peft.LoraConfig(**plan.to_peft(), fan_in_fan_out=family == "gpt2")
    )
    found = {
        path.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for path, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    wanted: dict[str, tuple[int, float]] = {}
    for p in plan.adapted:
        rank, alpha = wanted.get(p.module, (0, 0.0))
        wanted[p.module] = rank + plan[p].rank, alpha + plan[p].rank * plan[p].scaling
    assert found.keys() == wanted.keys()
    for path, (rank, alpha) in wanted.items():
        assert found[path] == (rank, pytest.approx(alpha / rank, rel=1e-12))


def test_tlora_ranks_in_peft() -> None:
    """What the README shows: only the allocation is taken."""
    batches = [zoo.batch("llama", seed=seed) for seed in (1, 2)]
    plan = lowrank.plan_model(zoo.build("llama"), presets.tlora(rank=3), batches=batches, progress=False)
    model = peft.get_peft_model(zoo.build("llama"), peft.LoraConfig(**plan.to_peft(), task_type="CAUSAL_LM"))
    ranks = {
        path.removeprefix("base_model.model."): module.r["default"]
        for path, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert ranks == {p.module: plan[p].rank for p in plan.adapted}
    assert len(set(ranks.values())) > 1


def test_the_guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code of docs/peft.md runs, in its order."""
    import transformers

    guide = (Path(__file__).parents[1] / "docs" / "peft.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    assert len(blocks) == 5
    monkeypatch.chdir(tmp_path)
    build = staticmethod(lambda name: zoo.build("llama"))
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", build)
    names: dict[str, Any] = {"batches": [zoo.batch("llama", seed=seed) for seed in (1, 2)]}
    for block in blocks:
        exec(block.replace("...  # train it", "train(model)"), names | {"train": perturb}, names)
    assert (tmp_path / "for-peft" / CONFIG).exists() and (tmp_path / "for-serving" / CONFIG).exists()
    assert lowrank.plan_of(names["model"]).adapted
