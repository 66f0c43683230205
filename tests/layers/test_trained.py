"""A module trained in full on a half-precision base: fp32 masters that compute in the base's dtype."""

from __future__ import annotations

import copy
import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lowrank
from lowrank import checkpoint, presets
from lowrank.layers.trained import TrainedModule
from lowrank.train import fit
from tests import zoo
from tests.helpers import frozen_logits, logits, perturb

peft = pytest.importorskip("peft")

HALVES = [torch.bfloat16, torch.float16]
TRAIN = ("bert.pooler", "classifier")


def base(dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A classifier whose pooler and head are to be trained in full."""
    torch.manual_seed(0)
    return hf.BertForSequenceClassification(hf.BertConfig(**zoo.ENCODER, num_labels=2)).to(dtype).eval()


def wrapped(
    dtype: torch.dtype = torch.bfloat16, train: tuple[str, ...] = ("bert.pooler", "classifier")
) -> nn.Module:
    return lowrank.wrap_model(base(dtype), presets.lora(rank=2, train=train), progress=False)


def batch() -> dict[str, Tensor]:
    return zoo.FAMILIES["bert"][1]()


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    modules = {path: m for path, m in model.named_modules() if isinstance(m, TrainedModule)}
    return {f"{path}.{name}": p for path, m in modules.items() for name, p in m.copy.named_parameters()}


def learnt(model: nn.Module) -> nn.Module:
    """Moves what is trained in full by less than bf16 could tell."""
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in trained_parameters(model).values():
            parameter.add_(1e-4 * torch.randn(parameter.shape, generator=draw))
    return perturb(model)


@pytest.mark.parametrize("dtype", HALVES)
def test_bits_before_training_and_fp32_masters(dtype: torch.dtype) -> None:
    model = wrapped(dtype)
    assert {p.dtype for p in trained_parameters(model).values()} == {torch.float32}
    assert all(p.requires_grad and p.is_leaf for p in trained_parameters(model).values())
    out = logits(model, batch())
    assert out.dtype == dtype and torch.equal(out, frozen_logits(base(dtype), batch()))
    with lowrank.disable_adapters(model):
        assert torch.equal(logits(model, batch()), out)
    assert model.classifier.weight.dtype == dtype and model.classifier.out_features == 2


def test_at_a_small_rate_every_entry_moves() -> None:
    """The gradient is 2 everywhere, so that AdamW's first step is the rate; bf16 rounds many of them away."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 32)).bfloat16()
    nn.init.zeros_(model[0].weight)
    nn.init.ones_(model[0].bias)
    lowrank.wrap_model(model, presets.lora(rank=2, target=("0",), train=("1",)), progress=False)
    before = {name: p.detach().clone() for name, p in trained_parameters(model).items()}

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).float().sum()

    fit(model, [torch.ones(2, 8).bfloat16()], loss, lr=1e-4, schedule="constant", warmup=0, progress=False)
    for name, parameter in trained_parameters(model).items():
        step = before[name] - parameter.detach()
        torch.testing.assert_close(step, torch.full_like(step, 1e-4), rtol=0.01, atol=0)
        assert (parameter.detach().bfloat16() == before[name].bfloat16()).any(), "bf16 would have told it"


def test_the_gradient_is_that_of_an_fp32_copy_cast_in_forward() -> None:
    head = nn.Linear(16, 4).bfloat16().requires_grad_(False)
    trained, x = TrainedModule(head), torch.randn(8, 16).bfloat16()
    trained(x).float().square().sum().backward()
    weight, bias = (p.detach().float().requires_grad_() for p in (head.weight, head.bias))
    nn.functional.linear(x, weight.bfloat16(), bias.bfloat16()).float().square().sum().backward()
    assert torch.equal(trained.copy._parameters["weight"].grad, weight.grad)
    assert torch.equal(trained.copy._parameters["bias"].grad, bias.grad)


class Odd(nn.Module):
    """Reads its parameters in every way but by calling one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 16)
        self.out = nn.Linear(16, 8, bias=False)
        self.out.weight = self.table.weight  # tied inside
        self.rows = nn.ParameterList([torch.randn(16), torch.randn(16)])
        self.named = nn.ParameterDict({"scale": torch.randn(16)})
        self.norm = nn.LayerNorm(16).float()
        self.free = nn.Parameter(torch.randn(16))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids) * self.named["scale"] + self.rows[0] - self.rows[1] * self.free
        x = self.norm(x.float()).to(self.free.dtype)
        return nn.functional.linear(x, self.out.weight)


class Statistics(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(16, 16), nn.BatchNorm1d(16))
        self.register_buffer("places", torch.arange(3))


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "linear": (lambda: nn.Linear(16, 4), lambda: torch.randn(3, 16)),
    "embedding": (lambda: nn.Embedding(8, 16), lambda: torch.tensor([0, 3, 7])),
    "convolution": (lambda: nn.Conv1d(16, 4, 3), lambda: torch.randn(2, 16, 9)),
    "attention": (lambda: nn.MultiheadAttention(16, 2), lambda: torch.randn(5, 2, 16)),
    "encoder": (lambda: nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0), lambda: torch.randn(5, 2, 16)),
    "lstm": (lambda: nn.LSTM(16, 8, num_layers=2), lambda: torch.randn(5, 2, 16)),
    "batch norm": (Statistics, lambda: torch.randn(6, 16)),
    "normed": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(16, 4)), lambda: torch.randn(3, 16)),
    "odd": (Odd, lambda: torch.tensor([0, 3, 7])),
}


def case(name: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    make, draw = CASES[name]
    module, x = make().bfloat16(), draw()
    if name == "odd":
        module.norm.float()
    return module.requires_grad_(False), x.bfloat16() if x.is_floating_point() else x


def called(module: nn.Module, x: Any) -> Tensor:
    inputs = (x, x, x) if isinstance(module, nn.MultiheadAttention) else (x,)
    if isinstance(module, TrainedModule) and isinstance(module.base, nn.MultiheadAttention):
        inputs = (x, x, x)
    output = module(*inputs)
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_whatever_module_it_is(name: str, training: bool) -> None:
    module, x = case(name)
    module.train(training)
    twin, trained = copy.deepcopy(module), TrainedModule(module)
    with torch.no_grad():
        wanted = called(twin, x)
        found = called(trained, x)
    assert torch.equal(found, wanted) and found.dtype == torch.bfloat16
    parameters = dict(trained.copy.named_parameters())
    assert {p.dtype for p in parameters.values()} == {torch.float32}
    assert set(parameters) == {name for name, _ in module.named_parameters()}
    called(trained, x).float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in parameters.values())
    assert not any(p.requires_grad or p.grad is not None for p in module.parameters())


def test_buffers_stay_as_they_are() -> None:
    module, x = case("batch norm")
    trained = TrainedModule(module.train())
    own, original = dict(trained.copy.named_buffers()), dict(module.named_buffers())
    assert {name: b.dtype for name, b in own.items()} == {name: b.dtype for name, b in original.items()}
    before = {name: buffer.clone() for name, buffer in original.items()}
    trained(x)
    assert not torch.equal(own["1.running_mean"], before["1.running_mean"])
    assert all(torch.equal(original[name], buffer) for name, buffer in before.items())


def test_a_sequential_that_is_walked_and_indexed_computes_in_the_base_dtype() -> None:
    module = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)).bfloat16().requires_grad_(False)
    trained, x = TrainedModule(module), torch.randn(3, 16).bfloat16()
    walked = x
    for layer in trained:
        walked = layer(walked)
    with torch.no_grad():
        assert torch.equal(walked, module(x)) and torch.equal(trained[0](x), module[0](x))
    assert trained[2].weight.dtype == torch.bfloat16 and len(trained) == 3


def test_a_norm_in_fp32_on_purpose_keeps_its_precision() -> None:
    trained = TrainedModule(nn.Sequential(nn.Linear(4, 4).bfloat16(), nn.LayerNorm(4)))
    assert trained[1].weight is trained.copy[1]._parameters["weight"]
    assert trained[0].weight.dtype == torch.bfloat16 and trained[1].weight.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_on_a_base_in_full_precision_nothing_is_exchanged(dtype: torch.dtype) -> None:
    trained = TrainedModule(nn.Linear(4, 4).to(dtype))
    assert type(trained.copy) is nn.Linear and trained.weight is trained.copy.weight
    assert trained.weight.dtype == dtype


def test_a_model_of_transformers_as_trained_module_tells_the_dtype_of_its_base() -> None:
    torch.manual_seed(0)
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**zoo.VISION),
        text_config=hf.LlamaConfig(**zoo.DECODER),
        image_token_index=5,
    )
    model = hf.LlavaForConditionalGeneration(config).bfloat16().eval()
    ids = torch.tensor([[1, 5, 5, 5, 5, 9, 8]])
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 16, 16).bfloat16()}
    wanted = frozen_logits(model, inputs)
    policy = presets.lora(
        rank=2, target=("language_model.layers.0.self_attn.q_proj",), train=("model.vision_tower",)
    )
    lowrank.wrap_model(model, policy, progress=False)
    tower = model.model.vision_tower
    assert isinstance(tower, TrainedModule) and tower.dtype == torch.bfloat16
    assert torch.equal(logits(model, inputs), wanted)


# -- saved, exported, merged, copied ------------------------------------------------------------------------


def test_saved_in_fp32_and_reloaded_bit_for_bit(tmp_path: Path) -> None:
    model = learnt(wrapped())
    lowrank.save_adapter(model, tmp_path)
    again = lowrank.load_adapter(base(), tmp_path)
    mine, theirs = trained_parameters(model), trained_parameters(again)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert torch.equal(logits(model, batch()), logits(again, batch()))
    (file,) = tmp_path.glob("*.safetensors")
    stored = {t.dtype for name, t in load_file(file).items() if name.startswith("train:")}
    assert stored == {torch.float32}


def test_a_folder_of_before_with_bf16_tensors_loads_into_the_masters(tmp_path: Path) -> None:
    model = learnt(wrapped())
    lowrank.save_adapter(model, tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    tensors = {n: t.bfloat16() if n.startswith("train:") else t for n, t in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    config = json.loads((tmp_path / checkpoint.CONFIG).read_text())
    config["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    config["checksum"] = checkpoint.checksum(config)
    (tmp_path / checkpoint.CONFIG).write_text(json.dumps(config))
    again = trained_parameters(lowrank.load_adapter(base(), tmp_path))
    for name, parameter in trained_parameters(model).items():
        assert again[name].dtype == torch.float32
        assert torch.equal(again[name], parameter.bfloat16().float())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT's
def test_exported_in_fp32_and_imported(tmp_path: Path) -> None:
    model = learnt(wrapped())
    lowrank.export_peft(model, tmp_path)
    again = lowrank.import_peft(base(), tmp_path)
    mine, back = trained_parameters(model), trained_parameters(again)
    assert all(torch.equal(mine[name], back[name]) for name in mine) and mine.keys() == back.keys()
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path).eval()
    head = theirs.base_model.model.classifier.modules_to_save["default"]
    assert torch.equal(head.weight.float(), mine["classifier.weight"].detach().to(head.weight.dtype).float())
    torch.testing.assert_close(logits(theirs, batch()), logits(model, batch()), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", HALVES)
def test_merged_by_rounding_once(dtype: torch.dtype) -> None:
    model = learnt(wrapped(dtype))
    masters = {name: p.detach().clone() for name, p in trained_parameters(model).items()}
    before = logits(model, batch())
    merged = lowrank.merge(model)
    assert {p.dtype for p in merged.parameters()} == {dtype} and type(merged.classifier) is nn.Linear
    for name, master in masters.items():
        assert torch.equal(merged.get_parameter(name), master.to(dtype))
    torch.testing.assert_close(logits(merged, batch()), before, rtol=0.05, atol=0.05)


def test_unwrapped_to_the_bits_of_before() -> None:
    model = lowrank.unwrap(learnt(wrapped()))
    wanted = base().state_dict()
    assert model.state_dict().keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_whole_and_independent(how: str) -> None:
    model = learnt(wrapped())
    out = logits(model, batch())
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert torch.equal(logits(twin, batch()), out)
    with torch.no_grad():
        for parameter in trained_parameters(twin).values():
            parameter.add_(1.0)
    assert torch.equal(logits(model, batch()), out) and not torch.equal(logits(twin, batch()), out)
    lowrank.merge(twin)
    assert isinstance(model.classifier, TrainedModule) and torch.equal(logits(model, batch()), out)


def test_its_own_state_dict_loads_again() -> None:
    model, other = learnt(wrapped()), wrapped()
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(model, batch()), logits(other, batch()))
    assert {p.dtype for p in trained_parameters(other).values()} == {torch.float32}


@pytest.mark.parametrize("skeleton", [torch.float32, torch.bfloat16])
def test_a_half_precision_base_that_arrives_later(skeleton: torch.dtype) -> None:
    model = lowrank.wrap_model(on_meta(skeleton), presets.lora(rank=2, train=TRAIN), progress=False)
    fill(model)
    assert torch.equal(logits(model, batch()), frozen_logits(base(), batch()))
    assert {p.dtype for p in trained_parameters(model).values()} == {torch.float32}
    assert all(p.requires_grad for p in trained_parameters(model).values())


def on_meta(dtype: torch.dtype) -> nn.Module:
    with torch.device("meta"):
        model = hf.BertForSequenceClassification(hf.BertConfig(**zoo.ENCODER, num_labels=2))
    return model.to(dtype).eval()


def fill(model: nn.Module) -> nn.Module:
    """Loads the bf16 base into ``model``, and its buffers that no state dict holds."""
    model.load_state_dict(base().state_dict(), strict=False, assign=True)
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                module._buffers[name] = base().get_submodule(path)._buffers[name]
    return model


@pytest.mark.parametrize("source", ["ours", "peft"])
def test_loaded_before_a_half_precision_base(source: str, tmp_path: Path) -> None:
    model = learnt(wrapped())
    (lowrank.save_adapter if source == "ours" else lowrank.export_peft)(model, tmp_path)
    early = on_meta(torch.bfloat16)
    (lowrank.load_adapter if source == "ours" else lowrank.import_peft)(early, tmp_path)
    fill(early)
    mine, theirs = trained_parameters(model), trained_parameters(early)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    if source == "ours":
        assert torch.equal(logits(model, batch()), logits(early, batch()))


def test_converted_to_fp32_afterwards_it_computes_in_fp32() -> None:
    model = wrapped().float()
    assert model.classifier.weight.dtype == torch.float32
    assert logits(model, batch()).dtype == torch.float32


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own
def test_compiled() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)).bfloat16()
    lowrank.wrap_model(model, presets.lora(rank=2, target=("0",), train=("2",)), progress=False)
    x = torch.randn(3, 8).bfloat16()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), rtol=0.02, atol=0.02)
    compiled(x).float().square().sum().backward()
    found = model[2].copy._parameters["weight"].grad.clone()
    model.zero_grad()
    model(x).float().square().sum().backward()
    torch.testing.assert_close(found, model[2].copy._parameters["weight"].grad, rtol=0.02, atol=0.02)


def test_packed_weights_are_refused_with_the_name() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    model[1].weight = nn.Parameter(torch.zeros(4, 8, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"train='1': expected floating-point .*, got weight in torch\.int8"):
        lowrank.wrap_model(model, presets.lora(rank=2, target=("0",), train=("1",)), progress=False)
    assert type(model[0]) is nn.Linear
