"""Quantized bases of transformers: merged in floating point, saved, and changed by no check of ours."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers.integrations.finegrained_fp8 import FP8Linear

import lowrank
from lowrank import presets
from lowrank.layers.bases import multiplies
from lowrank.models.storage import as_rows
from tests import zoo
from tests.helpers import frozen_logits, logits, perturb

with warnings.catch_warnings():  # their own affairs with PyTorch's newest
    warnings.simplefilter("ignore")
    import bitsandbytes
    from torchao.quantization import Int8WeightOnlyConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*inputs will be cast from"),
    pytest.mark.filterwarnings("ignore:.*Enum subclass"),
]

CONFIGS = {
    "4 bits": lambda: hf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "4 bits nested": lambda: hf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True),
    "8 bits": lambda: hf.BitsAndBytesConfig(load_in_8bit=True),
    "torchao int8": lambda: hf.TorchAoConfig(Int8WeightOnlyConfig()),
}
MARKS = ("hf_quantizer", "is_quantized", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit")
BATCH = zoo.batch("llama")


def plain() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
        return hf.LlamaForCausalLM(hf.LlamaConfig(**{**zoo.DECODER, **sizes})).eval()


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    plain().to(request.param).save_pretrained(folder)
    return folder


def load(folder: Path, kind: str | None = None) -> nn.Module:
    options = {"quantization_config": CONFIGS[kind]()} if kind else {}
    return same_everywhere(hf.AutoModelForCausalLM.from_pretrained(folder, **options).eval())


def same_everywhere(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def square(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


# -- what is left behind ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_merged_model_is_saved_and_read_as_a_plain_one(kind: str, saved: Path, tmp_path: Path) -> None:
    model = perturb(lowrank.wrap_model(load(saved, kind), presets.lora(rank=2), progress=False))
    settings = model.config.quantization_config
    merged = lowrank.merge(model, dequantize=True)
    assert not any(name in vars(merged) for name in MARKS)
    assert not hasattr(merged.config, "quantization_config") and not hasattr(merged.config, "_is_quantized")
    assert settings.to_dict() == CONFIGS[kind]().to_dict(), "the user's own configuration was changed"
    merged.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert type(again.model.layers[0].mlp.up_proj) is nn.Linear
    assert torch.equal(frozen_logits(again, BATCH), frozen_logits(merged, BATCH))
    assert merged.half() is merged, "transformers still refuses to cast it"


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_model_merged_in_part_stays_quantized_in_part(kind: str, saved: Path, tmp_path: Path) -> None:
    policy = presets.lora(rank=2, target=("q_proj", "down_proj"))
    model = perturb(lowrank.wrap_model(load(saved, kind), policy, progress=False))
    settings = model.config.quantization_config
    before = settings.to_dict()
    merged = lowrank.merge(model, dequantize=True)
    assert (
        merged.is_quantized and merged.hf_quantizer.quantization_config is merged.config.quantization_config
    )
    assert settings.to_dict() == before
    layer = merged.model.layers[0]
    untouched = as_rows(layer.self_attn.k_proj, "weight").clone()
    merged.save_pretrained(tmp_path)
    again = load(tmp_path)
    there = again.model.layers[0]
    assert torch.equal(there.self_attn.q_proj.weight, layer.self_attn.q_proj.weight)
    assert torch.equal(there.mlp.down_proj.weight, layer.mlp.down_proj.weight)
    assert type(there.self_attn.q_proj.weight) is nn.Parameter
    assert type(there.self_attn.k_proj.weight) is not nn.Parameter
    torch.testing.assert_close(as_rows(there.self_attn.k_proj, "weight"), untouched)
    error = (logits(again, BATCH) - logits(merged, BATCH)).float().norm()
    assert error <= 1e-3 * logits(merged, BATCH).float().norm()


# -- checks that change nothing ----------------------------------------------------------------------------


def four_bits() -> tuple[nn.Module, nn.Module]:
    """A model with a 4-bit layer that packs its weight when it is called for inference, and that layer."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 64)
    layer = bitsandbytes.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4")
    layer.load_state_dict(linear.state_dict())
    layer = layer.to("cpu")
    layer.support_avx512bf16_for_cpu = True
    return nn.Sequential(layer, nn.ReLU(), nn.Linear(64, 3)).eval(), layer


def pack(layer: Any) -> None:
    """What the layer's own first call does."""
    weight = layer.weight
    weight.data, weight.quant_state = bitsandbytes.functional._convert_weight_packed_for_cpu(
        weight.data, weight.quant_state
    )


def test_merging_does_not_pack_four_bits_by_its_own_check() -> None:
    model, layer = four_bits()
    weight, bits = as_rows(layer, "weight").clone(), layer.weight.data.clone()
    lowrank.wrap_model(model, presets.lora(rank=2, target="0"), progress=False)
    perturb(model)
    wanted = weight + model[0].delta_weight()
    with pytest.raises(ValueError, match="dequantize=True"):
        lowrank.merge(model)
    assert torch.equal(layer.weight.data, bits)
    assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)
    assert multiplies(layer, weight) and torch.equal(layer.weight.data, bits)
    lowrank.merge(model, dequantize=True)
    assert torch.equal(model[0].weight, wanted)


@pytest.mark.parametrize("nested", [False, True], ids=["", "nested"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_four_bits_packed_for_inference_are_read(quant_type: str, nested: bool) -> None:
    torch.manual_seed(0)
    layer = bitsandbytes.nn.Linear4bit(128, 96, quant_type=quant_type, compress_statistics=nested)
    with torch.no_grad():  # each row and each block of 64 has a scale of its own
        layer.weight.mul_(torch.linspace(0.5, 2, 96).unsqueeze(1)).mul_(torch.linspace(1, 3, 128))
    layer = layer.to("cpu")
    before = as_rows(layer, "weight").clone()
    pack(layer)
    bits = layer.weight.data.clone()
    packed = as_rows(layer, "weight")
    assert packed.dtype == before.dtype == torch.float32
    # The same codes; the scales, one for 64 numbers, were rounded to bf16 (8 bits).
    torch.testing.assert_close(packed, before, rtol=2**-8, atol=0)
    assert torch.equal(layer.weight.data, bits) and layer.weight.quant_state.packing_format_for_cpu


def test_an_adapter_loads_on_its_base_packed_for_inference(tmp_path: Path) -> None:
    lowrank.save_adapter(
        perturb(lowrank.wrap_model(four_bits()[0], presets.lora(rank=2, target="0"), progress=False)),
        tmp_path,
    )
    model, layer = four_bits()
    pack(layer)
    loaded = lowrank.load_adapter(model, tmp_path)
    lowrank.save_adapter(loaded, tmp_path)
    lowrank.load_adapter(four_bits()[0], tmp_path)
    model, layer = four_bits()
    layer.weight.data = layer.weight.data.flip(0)
    with pytest.raises(lowrank.AdapterError, match="0: its weights differ by"):
        lowrank.load_adapter(model, tmp_path)


def test_a_layer_packed_for_inference_is_adapted_and_merged() -> None:
    model, layer = four_bits()
    pack(layer)
    weight = as_rows(layer, "weight").clone()
    lowrank.wrap_model(model, presets.pissa(rank=2, target="0"), progress=False)
    perturb(model)
    wanted = weight + model[0].delta_weight()
    lowrank.merge(model, dequantize=True)
    assert torch.equal(model[0].weight, wanted)


def test_calibrating_does_not_pack_four_bits() -> None:
    model, layer = four_bits()
    bits = layer.weight.data.clone()
    (p,) = [p for p in lowrank.find_projections(model) if p.module == "0"]
    x = torch.randn(5, 64)
    measured = lowrank.calibrate(model, [p], {"gradient"}, [x], loss=square, progress=False)[p]
    assert torch.equal(layer.weight.data, bits) and layer.support_avx512bf16_for_cpu
    assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)
    full = nn.Sequential(nn.Linear(64, 64), *model[1:])
    full[0].load_state_dict({"weight": as_rows(layer, "weight"), "bias": layer.bias})
    wanted = lowrank.calibrate(full, [p], {"gradient"}, [x], loss=square, progress=False)[p]
    torch.testing.assert_close(measured.gradient, wanted.gradient, rtol=1e-4, atol=1e-6)


class Cut(nn.Linear):
    """Computes its product without a gradient, as a kernel for inference does."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return super().forward(x)


def test_a_base_that_passes_no_gradient_is_not_trained_on() -> None:
    model = nn.Sequential(nn.Linear(7, 6), Cut(6, 6), nn.Linear(6, 5))
    lowrank.wrap_model(model, presets.lora(rank=2, target=("0", "1")), progress=False)
    x = torch.randn(4, 7)
    with pytest.raises(RuntimeError, match="Cut passes no gradient to its input"):
        model.train()(x)
    assert model.eval()(x).shape == (4, 5)
    with torch.no_grad():
        assert model.train()(x).shape == (4, 5)
    lowrank.wrap_model(lowrank.unwrap(model), presets.lora(rank=2, target=("1",)), progress=False)
    model.train()(x).sum().backward()  # nothing is trained below it
    assert model[1].adapters["default"][0].B.grad.any()


class Counting(nn.Linear):
    """Changes at each call, and draws random numbers."""

    calls = 0

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.register_buffer("seen", torch.zeros(()))
        self.log: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen += 1
        self.log.append(len(x))
        torch.rand(())
        return x @ self.weight.T + self.bias


def test_no_check_changes_a_layer() -> None:
    model = nn.Sequential(Counting(7, 6), nn.ReLU(), nn.Linear(6, 5))
    layer, state = model[0], torch.random.get_rng_state()
    lowrank.wrap_model(model, presets.lora(rank=2), progress=False)
    before = copy.deepcopy(vars(layer))
    state = torch.random.get_rng_state()
    lowrank.merge(perturb(model))
    assert (layer.calls, layer.log, layer.seen.item()) == (0, [], 0) and vars(layer).keys() == before.keys()
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_hook_that_changes_the_output_is_noticed() -> None:
    model = nn.Sequential(nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 5))
    handle = model[0].register_forward_hook(lambda module, args, output: 2 * output)
    lowrank.wrap_model(model, presets.lora(rank=2), progress=False)
    with pytest.raises(ValueError, match="0: the forward of Linear is more than a product with its weight"):
        lowrank.merge(perturb(model))
    handle.remove()
    x = torch.randn(4, 7)
    wanted = model(x)
    torch.testing.assert_close(lowrank.merge(model)(x), wanted)


class Elsewhere(nn.Linear):
    """Runs on some machines only."""

    runs = True

    def forward(self, x: Tensor) -> Tensor:
        if not self.runs:
            raise NotImplementedError("no kernel for this device")
        return 2 * super().forward(x)


def test_a_layer_that_cannot_be_tried_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lowrank.wrap_model(
        nn.Sequential(Elsewhere(7, 6), nn.ReLU(), nn.Linear(6, 5)), presets.lora(rank=2), progress=False
    )
    monkeypatch.setattr(Elsewhere, "runs", False)
    with pytest.raises(ValueError, match="0: the forward of Elsewhere cannot be tried out here: no kernel"):
        lowrank.merge(model)


# -- fp8 ------------------------------------------------------------------------------------------------


class Stored(nn.Linear):
    """A weight in fp8, computed in the input's dtype, as layerwise casting does."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype = torch.float8_e4m3fn) -> None:
        super().__init__(linear.in_features, linear.out_features)
        self.bias = linear.bias
        self.weight = nn.Parameter(linear.weight.detach().to(dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)


def fp8_model(layer: nn.Module) -> nn.Module:
    return nn.Sequential(layer, nn.ReLU(), nn.Linear(layer.out_features, 3))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_is_adapted_and_merged_in_floating_point(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(12, 8)
    model, x = fp8_model(Stored(linear, dtype)), torch.randn(4, 12)
    base, plain_output = copy.deepcopy(model), model(x).detach()
    W = linear.weight.detach().to(dtype).float()
    lowrank.wrap_model(model, presets.pissa(rank=2), progress=False)
    assert torch.equal(model(x), plain_output)
    adapter = model[0].adapters["default"][0]
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    start = adapter.scaling * (adapter.B0 @ adapter.A0).double()
    torch.testing.assert_close(start, U[:, :2] * S[:2] @ Vh[:2], rtol=1e-4, atol=1e-5)
    assert {p.dtype for p in lowrank.adapter_parameters(model)} == {torch.float32}
    perturb(model)
    trained = model(x)
    lowrank.save_adapter(model, tmp_path)
    assert torch.equal(lowrank.load_adapter(copy.deepcopy(base), tmp_path)(x), trained)
    # The fp32 model that it was stored from is the same base; one of other weights is not.
    full = copy.deepcopy(base)
    full[0] = nn.Linear(12, 8)
    full[0].load_state_dict(linear.state_dict())
    lowrank.load_adapter(full, tmp_path)
    full = copy.deepcopy(base)
    full[0] = nn.Linear(12, 8)
    with pytest.raises(lowrank.AdapterError, match="0: its weights differ by"):
        lowrank.load_adapter(full, tmp_path)

    with pytest.raises(ValueError, match=rf"0 is stored as Parameter of {dtype}; .*dequantize=True"):
        lowrank.merge(model)
    wanted = W + model[0].delta_weight()
    lowrank.merge(model, dequantize=True)
    assert type(model[0]) is nn.Linear and torch.equal(model[0].weight, wanted)
    torch.testing.assert_close(model(x), trained)


def test_a_plain_linear_in_fp8_keeps_its_own_call() -> None:
    """Nothing multiplies by it here without help, so what is seen is that the help is asked for."""
    torch.manual_seed(0)
    model = fp8_model(nn.Linear(12, 8))
    model[0].weight = nn.Parameter(model[0].weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    W, bias = model[0].weight.float(), model[0].bias
    calls = []

    def upcast(module: nn.Linear, args: tuple[Tensor]) -> None:
        calls.append(1)
        module.weight = nn.Parameter(module.weight.float(), requires_grad=False)

    def downcast(module: nn.Linear, args: tuple[Tensor], output: Tensor) -> None:
        module.weight = nn.Parameter(module.weight.to(torch.float8_e4m3fn), requires_grad=False)

    model[0].register_forward_pre_hook(upcast)
    model[0].register_forward_hook(downcast)
    x = torch.randn(4, 12)
    lowrank.wrap_model(model, presets.olora(rank=2, target="0"), progress=False)
    perturb(model)
    hidden = nn.functional.linear(x, W, bias) + x @ model[0].delta_weight().T
    torch.testing.assert_close(model[0](x), hidden)
    assert calls == [1] and model[0].base.weight.dtype == torch.float8_e4m3fn


@pytest.mark.parametrize("needs", ["sensitivity", "gradient", "covariance"])
def test_fp8_is_calibrated_as_the_numbers_that_it_holds(needs: str) -> None:
    torch.manual_seed(0)
    stored = fp8_model(Stored(nn.Linear(12, 8)))
    full = copy.deepcopy(stored)
    full[0] = nn.Linear(12, 8)
    full[0].load_state_dict({"weight": stored[0].weight.float(), "bias": stored[0].bias})
    batches = [torch.randn(4, 12) for _ in range(2)]
    found = []
    for model in (stored, full):
        projections = [p for p in lowrank.find_projections(model) if p.module == "0"]
        measured = lowrank.calibrate(
            model,
            projections,
            {needs},
            batches,
            loss=square,
            progress=False,
        )
        found.append(getattr(measured[projections[0]], needs))
    torch.testing.assert_close(torch.as_tensor(found[0]), torch.as_tensor(found[1]))


def fp8_linear(block: tuple[int, int] | None, scale: Tensor) -> tuple[FP8Linear, Tensor]:
    """transformers' own layer, 12 in and 8 out, and the weight that it stands for."""
    torch.manual_seed(0)
    layer = FP8Linear(12, 8, block_size=block, has_bias=True)
    with torch.no_grad():
        numbers = torch.randn(8, 12).to(torch.float8_e4m3fn)
        layer.weight = nn.Parameter(numbers, requires_grad=False)
        layer.weight_scale_inv = nn.Parameter(scale, requires_grad=False)
        layer.bias = nn.Parameter(torch.zeros(8, dtype=torch.bfloat16), requires_grad=False)
    factors = torch.empty(8, 12)
    for i in range(8):
        for j in range(12):
            factors[i, j] = scale if block is None else scale[i // block[0], j // block[1]]
    return layer, numbers.float() * factors


@pytest.mark.parametrize(
    ("block", "shape"), [(None, ()), ((4, 4), (2, 3)), ((3, 5), (3, 3)), ((16, 16), (1, 1))], ids=str
)
def test_the_fp8_layer_of_transformers(block: tuple[int, int] | None, shape: tuple[int, ...]) -> None:
    layer, wanted = fp8_linear(block, torch.rand(shape, generator=torch.Generator().manual_seed(1)) + 0.5)
    assert torch.equal(as_rows(layer, "weight"), wanted)
    model = fp8_model(layer)
    lowrank.wrap_model(model, presets.pissa(rank=2, target="0"), progress=False)
    perturb(model)
    merged_weight = wanted + model[0].delta_weight()
    with pytest.raises(ValueError, match="0 is stored as Parameter of torch.float8_e4m3fn"):
        lowrank.merge(model)
    lowrank.merge(model, dequantize=True)
    assert type(model[0]) is nn.Linear and torch.equal(model[0].weight, merged_weight)
    assert model[0].bias.dtype == torch.float32  # as the weight, and as most of the model
    assert model(torch.randn(4, 12)).shape == (4, 3)


@pytest.mark.parametrize(
    ("name", "scale", "factors"),
    [
        ("weight_scale", torch.tensor(0.5), torch.tensor(0.5)),
        ("weight_scale", torch.arange(1.0, 9), torch.arange(1.0, 9).unsqueeze(1)),
        ("weight_scale", torch.arange(1.0, 9).unsqueeze(1), torch.arange(1.0, 9).unsqueeze(1)),
        ("weight_scale_inv", torch.arange(1.0, 13).unsqueeze(0), torch.arange(1.0, 13)),
        (
            "weight_scale_inv",
            torch.tensor([[126, 130]], dtype=torch.uint8),
            torch.tensor([0.5] * 6 + [8.0] * 6),
        ),
    ],
)
def test_scales_beside_fp8(name: str, scale: Tensor, factors: Tensor) -> None:
    layer = Stored(nn.Linear(12, 8))
    layer.register_buffer(name, scale)
    layer.register_buffer("input_scale", torch.tensor(3.0))  # of the activations
    assert torch.equal(as_rows(layer, "weight"), layer.weight.float() * factors)


@pytest.mark.parametrize(
    ("name", "scale", "message"),
    [
        (
            "scale_weight",
            torch.ones(()),
            r"0: Principal.* Stored keeps its weight as torch.float8_e4m3fn with the scales",
        ),
        ("weight_scale", torch.ones(5), r"scales of shape \(5,\)"),
        ("weight_scale_inv", torch.ones(3, 5), r"scales of shape \(3, 5\)"),
    ],
)
def test_an_unknown_scale_is_not_guessed(name: str, scale: Tensor, message: str) -> None:
    layer = Stored(nn.Linear(12, 8))
    layer.register_buffer(name, scale)
    with pytest.raises(ValueError, match=message):
        lowrank.wrap_model(fp8_model(layer), presets.pissa(rank=2, target="0"), progress=False)
    model = lowrank.wrap_model(fp8_model(layer), presets.lora(rank=2), progress=False)
    with pytest.raises(ValueError, match="keeps its weight as torch.float8_e4m3fn"):
        lowrank.merge(model, dequantize=True)
    assert isinstance(model[0], lowrank.LoRALinear)


def test_what_is_read_without_a_call_cannot_be_adapted_in_fp8() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.MultiheadAttention(8, 2))
    attention = model[1]
    attention.in_proj_weight = nn.Parameter(attention.in_proj_weight.detach().to(torch.float8_e4m3fn), False)
    with pytest.raises(ValueError, match=r"1.in_proj_weight\[query\] is read without a call.*float8_e4m3fn"):
        lowrank.wrap_model(model, presets.lora(rank=2, target=("query",)), progress=False)
