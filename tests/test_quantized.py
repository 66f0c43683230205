"""Quantized bases: adapters beside the layer's own call, an exact start, and no silent second rounding."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import lowrank
from lowrank import presets
from lowrank.models.storage import as_rows
from tests import helpers, zoo
from tests.helpers import perturb

with warnings.catch_warnings():  # their own affairs with PyTorch's newest
    warnings.simplefilter("ignore")
    import bitsandbytes
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_

pytestmark = [
    pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True to a scalar"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.filterwarnings("ignore:.*inputs will be cast from"),
]


def body(path: str) -> bool:
    return not path.startswith(("classifier", "lm_head", "bert.pooler"))


def torchao(config: Any) -> Callable[[nn.Module], nn.Module]:
    def quantize(model: nn.Module) -> nn.Module:
        model.requires_grad_(False)
        quantize_(model, config(), filter_fn=lambda m, path: isinstance(m, nn.Linear) and body(path))
        return model

    return quantize


def replaced(make: Callable[[nn.Linear], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    def quantize(model: nn.Module) -> nn.Module:
        for path, module in list(model.named_modules()):
            if type(module) is nn.Linear and body(path):
                model.set_submodule(path, make(module))
        return model.eval()

    return quantize


def four_bits(linear: nn.Linear) -> nn.Module:
    bias = linear.bias is not None
    packed = bitsandbytes.nn.Linear4bit(
        linear.in_features, linear.out_features, bias, compute_dtype=linear.weight.dtype, quant_type="nf4"
    )
    packed.load_state_dict(linear.state_dict())
    packed.support_avx512bf16_for_cpu = False  # the same on every machine
    return packed.to(linear.weight.dtype).to("cpu")


def eight_bits(linear: nn.Linear) -> nn.Module:
    bias = linear.bias is not None
    packed = bitsandbytes.nn.Linear8bitLt(
        linear.in_features, linear.out_features, bias, has_fp16_weights=False
    )
    packed.load_state_dict(linear.state_dict())
    return packed.to("cpu")


KINDS: dict[str, tuple[Callable[[nn.Module], nn.Module], float]] = {  # and the error of the rounding, at most
    "torchao int8": (torchao(Int8WeightOnlyConfig), 0.01),
    "torchao int4": (
        torchao(lambda: IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(16))),
        0.1,
    ),
    "bitsandbytes 4 bits": (replaced(four_bits), 0.12),
    "bitsandbytes 8 bits": (replaced(eight_bits), 0.01),
}
FAMILIES = ["llama", "bert", "neox"]
PRESETS = {"lora": presets.lora, "pissa": presets.pissa, "ailora": presets.ailora, "tlora": presets.tlora}


def plain_base(family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """As in the zoo, but in multiples of the 64 numbers that share a scale."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sizes = {"hidden_size": 64, "intermediate_size": 128}
        if family == "llama":
            return hf.LlamaForCausalLM(hf.LlamaConfig(**{**zoo.DECODER, **sizes})).to(dtype).eval()
        if family == "neox":
            return hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**{**zoo.ENCODER, **sizes})).to(dtype).eval()
        config = hf.BertConfig(**{**zoo.ENCODER, **sizes}, num_labels=2)
        return hf.BertForSequenceClassification(config).to(dtype).eval()


def base(kind: str, family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    return KINDS[kind][0](plain_base(family, dtype))


def wrap(model: nn.Module, preset: Any, family: str, **options: Any) -> nn.Module:
    head = ("classifier",) if family == "bert" else ()
    policy = preset(
        **{"rank": 4, "exclude": ("pooler",) if family == "bert" else (), "train": head, **options}
    )
    batches = [zoo.batch(family, seed=1)] if policy.needs else None
    return lowrank.wrap_model(model, policy, batches=batches, progress=False)


def logits(model: nn.Module, family: str) -> Tensor:
    return helpers.logits(model, zoo.batch(family))


def frozen_logits(model: nn.Module, family: str) -> Tensor:
    return helpers.frozen_logits(model, zoo.batch(family))


def train(model: nn.Module, family: str) -> nn.Module:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        model(**zoo.batch(family)).loss.backward()
        optimizer.step()
    return model


def stored(model: nn.Module) -> dict[str, Tensor]:
    """The numbers that the model's own layers keep."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            found[path.removesuffix(".base")] = as_rows(module, "weight").clone()
    return found


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_wrap_train_save_and_take_out(kind: str, family: str, preset: str, tmp_path: Path) -> None:
    model = base(kind, family)
    plain, before, modules = frozen_logits(model, family), stored(model), dict(model.named_modules())
    wrap(model, PRESETS[preset], family)
    assert torch.equal(logits(model, family), plain), "an untrained adapter changed the quantized model"
    assert {p.dtype for p in lowrank.adapter_parameters(model)} == {torch.float32}

    train(model, family)
    trained = logits(model, family)
    assert not torch.equal(trained, plain)
    with lowrank.disable_adapters(model):
        assert torch.equal(logits(model, family), plain)

    lowrank.save_adapter(model, tmp_path)
    assert torch.equal(logits(lowrank.load_adapter(base(kind, family), tmp_path), family), trained)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, family), trained)

    lowrank.unwrap(model)
    assert torch.equal(frozen_logits(model, family), plain) and dict(model.named_modules()) == modules
    after = stored(model)
    assert all(torch.equal(tensor, after[path]) for path, tensor in before.items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_start_sees_the_dequantized_weight(kind: str) -> None:
    plain, model = plain_base("llama"), base(kind, "llama")
    most = KINDS[kind][1]
    for p in lowrank.plan_model(model, presets.lora(rank=4)):
        seen, was = p.weight(model).float(), p.weight(plain)
        assert seen.shape == p.shape and 0 < (seen - was).norm() / was.norm() < most
    wrap(model, presets.pissa, "llama")
    for p, adapter in lowrank.adapters.adapters_of(model).items():
        W = as_rows(lowrank.adapters.holder(model, p), "weight").double()
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        principal = U[:, :4] * S[:4] @ Vh[:4]
        start = adapter.scaling * (adapter.B0 @ adapter.A0).double()
        assert (start - principal).norm() < 1e-3 * principal.norm()


def test_a_weight_that_only_knows_its_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torchao's int4 layouts for GPUs, which have no dequantize."""
    layer = base("torchao int8", "llama").model.layers[0].mlp.down_proj
    wanted = layer.weight.dequantize()
    monkeypatch.delattr(type(layer.weight), "dequantize")
    torch.testing.assert_close(as_rows(layer, "weight"), wanted, rtol=1e-6, atol=1e-7)


def test_four_bits_packed_for_inference_are_not_misread() -> None:
    model = base("bitsandbytes 4 bits", "llama")
    model.model.layers[1].mlp.up_proj.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match=r"up_proj: Principal.* packed its 4 bits anew for inference"):
        wrap(model, presets.pissa, "llama")
    with pytest.raises(ValueError, match="packed its 4 bits anew for inference"):
        as_rows(model.model.layers[1].mlp.up_proj, "weight")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_merging_is_refused_or_done_in_floating_point(kind: str, dtype: torch.dtype) -> None:
    model = base(kind, "llama", dtype)
    perturb(wrap(model, presets.pissa, "llama"))
    trained = logits(model, "llama")
    with pytest.raises(ValueError, match=r"adding ΔW would mean to quantize again.*dequantize=True"):
        lowrank.merge(model)
    assert torch.equal(logits(model, "llama"), trained), "the refusal changed something"

    wanted = {
        p.module: as_rows(lowrank.adapters.holder(model, p), "weight").float() + adapter.product()
        for p, adapter in lowrank.adapters.adapters_of(model).items()
    }
    merged = lowrank.merge(model, dequantize=True)
    for path, weight in wanted.items():
        layer = merged.get_submodule(path)
        assert type(layer) is nn.Linear and type(layer.weight) is nn.Parameter and layer.weight.dtype == dtype
        assert torch.equal(layer.weight, weight.to(dtype))
        assert not layer.weight.requires_grad
    error = (logits(merged, "llama") - trained).float().norm() / trained.float().norm()
    # bitsandbytes' 8 bits round the activations too, and bf16 rounds everything.
    assert error < (1e-5 if dtype == torch.float32 and "8 bits" not in kind else 0.03)


def test_weights_that_are_not_quantized_are_not_replaced() -> None:
    model = wrap(base("torchao int8", "bert"), presets.lora, "bert", target="pooler.dense", exclude=())
    layer = model.bert.pooler.dense.base
    merged = lowrank.merge(model, dequantize=True)
    assert merged.bert.pooler.dense is layer
    assert type(merged.bert.encoder.layer[0].attention.self.query.weight) is not nn.Parameter


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_move_between_quantized_and_plain_bases(kind: str, tmp_path: Path) -> None:
    """Trained on a quantized base, used on the one that it was made of; another base is still noticed."""
    model = train(wrap(base(kind, "llama"), presets.lora, "llama"), "llama")
    lowrank.save_adapter(model, tmp_path / "ours")
    plain = lowrank.load_adapter(plain_base("llama"), tmp_path / "ours")
    assert (logits(plain, "llama") - logits(model, "llama")).norm() < 0.3 * logits(model, "llama").norm()
    with pytest.raises(lowrank.AdapterError, match="its weights differ by"):
        lowrank.load_adapter(plain_base("llama", seed=1), tmp_path / "ours")

    lowrank.export_peft(model, tmp_path / "peft")
    theirs = peft.PeftModel.from_pretrained(plain_base("llama"), tmp_path / "peft")
    torch.testing.assert_close(logits(theirs, "llama"), logits(plain, "llama"), rtol=1e-5, atol=1e-5)
    again = lowrank.import_peft(base(kind, "llama"), tmp_path / "peft")
    torch.testing.assert_close(logits(again, "llama"), logits(model, "llama"), rtol=1e-5, atol=1e-5)


# -- layers with a forward of their own ---------------------------------------------------------------


class Doubled(nn.Linear):
    """More than a product with its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Written(nn.Linear):
    """The same product, written out."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


class Opaque(nn.Linear):
    """Keeps its weight in bytes that nobody else can read."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features)
        self.bias = linear.bias
        self.weight = nn.Parameter((linear.weight.detach() * 100).round().char().view(torch.uint8), False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.view(torch.int8).to(x.dtype) / 100, self.bias)


def model_of(layer: nn.Module) -> nn.Module:
    return nn.Sequential(layer, nn.ReLU(), nn.Linear(6, 5))


@pytest.mark.parametrize("kind", [Doubled, Written, Opaque])
def test_the_layers_own_call_is_kept(kind: type[nn.Linear]) -> None:
    layer = Opaque(nn.Linear(7, 6)) if kind is Opaque else kind(7, 6)
    model, x = model_of(layer), torch.randn(4, 7)
    plain = helpers.frozen_logits(model, x)
    lowrank.wrap_model(model, presets.lora(rank=2), progress=False)
    assert torch.equal(helpers.logits(model, x), plain)
    adapter = model[0].adapters["default"][0]
    with torch.no_grad():
        adapter.B.normal_()
    x.requires_grad_()
    hidden = layer(x) + adapter.scaling * x @ adapter.A.T @ adapter.B.T
    torch.testing.assert_close(model[0](x), hidden, rtol=1e-5, atol=1e-4)
    leaves = (x, adapter.A, adapter.B)
    got = torch.autograd.grad(model(x).sum(), leaves)
    for ours, wanted in zip(got, torch.autograd.grad(model[1:](hidden).sum(), leaves), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-4)


def test_merging_asks_whether_the_layer_is_a_product() -> None:
    x = torch.randn(4, 7)
    model = lowrank.wrap_model(model_of(Written(7, 6)), presets.pissa(rank=2), progress=False)
    with torch.no_grad():
        model[0].adapters["default"][0].B.normal_()
    changed = model(x)
    torch.testing.assert_close(lowrank.merge(model)(x), changed)
    assert type(model[0]) is Written
    for dequantize in (False, True):
        model = lowrank.wrap_model(model_of(Doubled(7, 6)), presets.pissa(rank=2), progress=False)
        with pytest.raises(ValueError, match="0: the forward of Doubled is more than a product"):
            lowrank.merge(model, dequantize=dequantize)
        assert isinstance(model[0], lowrank.LoRALinear)


def test_bytes_that_nobody_can_read(tmp_path: Path) -> None:
    linear = nn.Linear(7, 6)
    model = model_of(Opaque(linear))
    message = "0: Principal.* starts from its values, but Opaque keeps its weight as torch.uint8, in a way"
    with pytest.raises(ValueError, match=message):
        lowrank.wrap_model(model, presets.pissa(rank=2, target="0"), progress=False)
    lowrank.wrap_model(model, presets.lora(rank=2), progress=False)
    with pytest.raises(ValueError, match="adding ΔW would mean to quantize again"):
        lowrank.merge(model)
    with pytest.raises(ValueError, match="keeps its weight as torch.uint8"):
        lowrank.merge(model, dequantize=True)
    with torch.no_grad():
        model[0].adapters["default"][0].B.normal_()
    lowrank.save_adapter(model, tmp_path)
    fresh = model_of(Opaque(linear))
    fresh[2].load_state_dict(model[2].base.state_dict())
    x = torch.randn(4, 7)
    assert torch.equal(lowrank.load_adapter(fresh, tmp_path)(x), model(x))
