"""Modules that read a layer's weight and never call the layer: what they read is W + ΔW, and trains."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from transformers.models.detr.modeling_detr import DetrMHAttentionMap
from transformers.pytorch_utils import Conv1D

import lowrank
from lowrank import presets
from lowrank.layers import Adapter, LoRALinear
from lowrank.layers.bases import plain_weight
from lowrank.layers.reading import ReadWeight
from tests import zoo
from tests.helpers import numbers, perturb

# -- whole models ---------------------------------------------------------------------------------------


class Beit(nn.Module):
    """As timm's: one weight for query, key and value, and a bias put together from two."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.q_bias, self.v_bias = nn.Parameter(torch.randn(width)), nn.Parameter(torch.randn(width))
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        qkv = F.linear(x, self.qkv.weight, bias).unflatten(-1, (3, self.heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class MaskHead(nn.Module):
    """DETR's: the keys of an image by a convolution with the weight of a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = DetrMHAttentionMap(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x.transpose(1, 2).reshape(x.shape[0], 16, 1, -1))


class Gpt2Attention(nn.Module):
    """Reads a Conv1D, which is stored as (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.c_proj = Conv1D(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.c_proj.weight + self.c_proj.bias


def wavlm() -> nn.Module:
    config = hf.WavLMConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=12,
        conv_dim=(8, 8), conv_kernel=(5, 3), conv_stride=(3, 2), num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2, num_buckets=8, max_bucket_distance=16,
    )  # fmt: skip
    return hf.WavLMModel(config)


def jamba() -> nn.Module:
    config = hf.JambaConfig(
        **{**zoo.DECODER, "num_hidden_layers": 2}, attn_layer_period=2, attn_layer_offset=1, num_experts=1,
        expert_layer_period=2, expert_layer_offset=1, mamba_d_state=4, mamba_dt_rank=4,
    )  # fmt: skip
    return hf.JambaForCausalLM(config)


def falcon_mamba() -> nn.Module:
    config = hf.FalconMambaConfig(
        vocab_size=zoo.VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4, time_step_rank=4
    )
    return hf.FalconMambaForCausalLM(config)


ids = lambda: torch.randint(0, zoo.VOCABULARY, (2, 9))  # noqa: E731
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], str, tuple[str, ...]]] = {
    "wavlm": (wavlm, lambda: torch.randn(2, 200), "attention", ("q_proj", "k_proj", "v_proj", "out_proj")),
    "jamba": (jamba, ids, "dt_proj", ("dt_proj",)),
    "falcon_mamba": (falcon_mamba, ids, "dt_proj", ("dt_proj",)),
    "beit": (lambda: nn.Sequential(Beit()), lambda: torch.randn(2, 5, 16), "qkv", ("qkv",)),
    "detr": (MaskHead, lambda: torch.randn(2, 6, 16), "k_proj", ("k_proj",)),
    "conv1d": (Gpt2Attention, lambda: torch.randn(2, 5, 16), "c_proj", ("c_proj",)),
}


def output(model: nn.Module, x: Tensor) -> Tensor:
    made: Any = model(x)
    return made if isinstance(made, Tensor) else made[0]


def adapted(name: str, preset: Any = presets.lora) -> tuple[nn.Module, Tensor, Tensor]:
    """A model of which only layers are adapted that it does not call; an input; and the base's output."""
    make, inputs, _, targets = MODELS[name]
    model, x = make().eval().requires_grad_(False), inputs()
    with torch.no_grad():
        base = output(model, x)
    lowrank.wrap_model(model, preset(rank=2, target=targets), progress=False)
    assert all(isinstance(layer, LoRALinear) for layer in lowrank.adapted_layers(model).values())
    return model, x, base


@pytest.mark.parametrize("preset", [presets.lora, presets.pissa], ids=["lora", "pissa"])
@pytest.mark.parametrize("name", MODELS)
def test_an_adapter_on_a_weight_that_is_read_acts_and_trains(name: str, preset: Any) -> None:
    model, x, base = adapted(name, preset)
    with torch.no_grad():
        assert torch.equal(output(model, x), base), "an untrained adapter changed the output"
    perturb(model, 1.0)
    changed = output(model, x)
    changed.sin().sum().backward()
    for layer in lowrank.adapted_layers(model).values():
        for parameter in layer.adapters.parameters():
            assert parameter.grad is not None and parameter.grad.any()
    effect = (changed - base).abs().max()
    assert effect > 1e-4
    with torch.no_grad(), lowrank.disable_adapters(model):
        assert torch.equal(output(model, x), base)
    assert (output(lowrank.merge(model), x) - changed).abs().max() < 0.01 * effect


@pytest.mark.parametrize("name", ["wavlm", "beit", "conv1d"])
def test_it_trains_in_half_precision_under_autocast_and_checkpointing(name: str) -> None:
    model, x, _ = adapted(name, presets.pissa)
    perturb(model)
    parameters = list(lowrank.adapter_parameters(model))
    loss = lambda: output(model, x).float().sin().sum()  # noqa: E731
    exact = torch.autograd.grad(loss(), parameters)
    again = torch.autograd.grad(checkpoint(loss, use_reentrant=False), parameters)
    assert all(torch.equal(one, other) for one, other in zip(exact, again, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        cast = torch.autograd.grad(loss(), parameters)
    for one, other in zip(exact, cast, strict=True):
        assert other.dtype == torch.float32 and (one - other).norm() < 0.2 * one.norm()


# -- what is read ---------------------------------------------------------------------------------------


def layer_over(base: nn.Module, *rows: tuple[int, ...], anchored: bool = False) -> LoRALinear:
    """One adapter for each block of rows of a base 8 → 6, already moved."""
    adapters = []
    for own in rows or [(0, 6)]:
        B = torch.randn(len(numbers(own)), 2) * anchored
        dtype = torch.float64 if base.weight.dtype == torch.float64 else torch.float32
        adapters.append(Adapter(torch.randn(2, 8), B, 0.5, rows=own, dtype=dtype))
    layer = LoRALinear(base, adapters, in_features=8, out_features=6)
    with torch.no_grad():
        for parameter in layer.adapters.parameters():
            parameter.add_(torch.randn_like(parameter))
    return layer.requires_grad_(True)


BASES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(8, 6).double(),
    "conv1d": lambda: Conv1D(6, 8).double(),
}
USES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": lambda x, w: F.linear(x, w),
    "matmul": lambda x, w: w @ x.T,
    "t": lambda x, w: x @ w.t(),
    "T": lambda x, w: x @ w.T,
    "view": lambda x, w: w.view(-1, 4).sum(0),
    "index": lambda x, w: w[2:4, 1] * 3,
    "einsum": lambda x, w: torch.einsum("bi,oi->bo", x, w),
    "conv": lambda x, w: F.conv1d(x.T[None], w.unsqueeze(-1)),
    "cat": lambda x, w: F.linear(x, torch.cat([w, w])),
    "stack": lambda x, w: torch.stack([w, w]).sum(),
    "float": lambda x, w: w.float() * 2,
    "addmm": lambda x, w: torch.addmm(x.new_ones(6), x, w.t()),
    "function": lambda x, w: Multiply.apply(x, w),
}


class Multiply(torch.autograd.Function):
    """A kernel of somebody else's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return dY @ weight, dY.t() @ x


@pytest.mark.parametrize(
    "rows",
    [[(0, 6)], [(0, 2), (4, 6)], [(1, 6, 2, 3), (0, 4, 1, 3)]],
    ids=["whole", "blocks", "interleaved"],
)
@pytest.mark.parametrize("anchored", [False, True], ids=["plain", "anchored"])
@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("use", USES)
def test_it_is_the_sum_in_any_operation(use: str, kind: str, anchored: bool, rows: Any) -> None:
    layer, x = layer_over(BASES[kind](), *rows, anchored=anchored), torch.randn(3, 8).double()
    x.requires_grad_()
    leaves = [x, *layer.parameters()]

    def oriented(weight: Tensor) -> Tensor:
        return weight.t().contiguous() if kind == "conv1d" else weight

    delta = x.new_zeros(6, 8)
    for adapter in layer.part():
        delta = delta.index_add(0, torch.tensor(numbers(adapter.rows)), adapter.product())
    sum_ = layer.base.weight + (delta.t() if kind == "conv1d" else delta)
    outcomes = []
    for weight in (layer.weight, sum_):
        y = USES[use](x, oriented(weight))
        outcomes.append([y, *torch.autograd.grad(y.square().sum(), leaves, allow_unused=True)])
    for got, wanted in zip(*outcomes, strict=True):
        assert (got is None) == (wanted is None)
        if got is not None:
            torch.testing.assert_close(got, wanted)


def test_reading_its_shape_computes_nothing() -> None:
    layer = layer_over(nn.Linear(8, 6).to(torch.bfloat16))
    weight, base = layer.weight, layer.base.weight
    assert type(weight) is ReadWeight and isinstance(weight, Tensor) and not isinstance(weight, nn.Parameter)
    for ask in ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda", "itemsize"):
        assert getattr(weight, ask) == getattr(base, ask)
    for call in ("size", "numel", "dim", "stride", "is_contiguous", "is_floating_point", "element_size"):
        assert getattr(weight, call)() == getattr(base, call)()
    assert getattr(weight, "quant_state", None) is None and not hasattr(weight, "SCB")
    assert not weight._known and not layer.used
    assert torch.equal(weight.detach(), (base.float() + layer.delta_weight()).to(torch.bfloat16))
    assert layer.used and len(weight._known) == 1


def test_its_own_forward_does_not_read_it() -> None:
    for base in (nn.Linear(8, 6), Conv1D(6, 8)):
        layer = layer_over(base)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lowrank.layers.layer.read_weight", lambda *args, **kwargs: pytest.fail("read"))
            layer(torch.randn(3, 8)).sum().backward()


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.zero_(),
        lambda w: w.data.normal_(),
        lambda w: w.detach().copy_(w),
        lambda w: nn.init.kaiming_uniform_(w),
        lambda w: torch.mul(w.detach(), 2, out=w.data),
    ],
)
def test_it_cannot_be_written_to(write: Callable[[Tensor], Any]) -> None:
    layer = layer_over(nn.Linear(8, 6))
    with (
        torch.no_grad(),
        pytest.raises(RuntimeError, match=r"computed and not stored: write to layer\.base\.weight"),
    ):
        write(layer.weight)


def test_it_leaves_as_an_ordinary_tensor() -> None:
    layer = layer_over(nn.Linear(8, 6).requires_grad_(False))
    weight, wanted = layer.weight.detach(), layer.base.weight + layer.delta_weight()
    for copied in (
        copy.deepcopy(weight),
        pickle.loads(pickle.dumps(weight)),
        torch.tensor(weight.tolist()),
        torch.from_numpy(weight.numpy()),
        torch.utils.dlpack.from_dlpack(weight),
        torch.tensor(weight.untyped_storage(), dtype=torch.uint8).view(torch.float32).view(6, 8),
    ):
        assert type(copied) is Tensor and torch.equal(copied, wanted)
    assert weight.data_ptr() != 0
    with pytest.raises(RuntimeError, match=r"computed from the adapters: copy the layer"):
        copy.deepcopy(layer.weight)
    torch.testing.assert_close(copy.deepcopy(layer).weight.detach().clone(), wanted)


def test_what_cannot_take_the_update_is_read_as_it_is() -> None:
    for dtype, device in ((torch.float8_e4m3fn, "cpu"), (torch.float32, "meta")):
        layer = layer_over(nn.Linear(8, 6))
        layer.base.weight = nn.Parameter(layer.base.weight.to(dtype).to(device), requires_grad=False)
        assert layer.weight is layer.base.weight
    layer = layer_over(nn.Linear(8, 6))
    layer.acting.names = ()
    assert layer.weight is layer.base.weight


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own
@pytest.mark.parametrize("name", ["beit", "conv1d", "detr"])
def test_compiled_whole_and_once_and_exported(name: str) -> None:
    torch.compiler.reset()
    model, x, _ = adapted(name, presets.pissa)
    perturb(model)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(3):
        parameters = list(lowrank.adapter_parameters(model))
        losses = [run(x).sin().sum() for run in (model, compiled)]
        wanted, got = (torch.autograd.grad(loss, parameters) for loss in losses)
        for one, other in zip(wanted, got, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, wanted, strict=True):
                parameter -= 0.01 * gradient.sign()
    assert counter.frame_count == 1
    for strict in (True, False):
        program = torch.export.export(model, (x,), strict=strict)
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-4)


def test_dropout_does_not_act_in_a_weight_that_is_read() -> None:
    layer = layer_over(nn.Linear(8, 6)).train()
    layer.part().dropout = 0.5
    assert torch.equal(layer.weight.detach(), layer.base.weight.detach() + layer.delta_weight())


def test_the_base_keeps_its_plain_product() -> None:
    layer = layer_over(nn.Linear(8, 6))
    assert plain_weight(layer.base) is layer.base.weight


def test_peft_would_not_act_where_a_weight_is_only_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowrank.layers.layer._compiled", False)  # by a test before
    model, x = nn.Sequential(Beit()), torch.randn(2, 5, 16)
    lowrank.wrap_model(model, presets.lora(rank=2, target=("qkv", "proj")), progress=False)
    for layer in lowrank.adapted_layers(model).values():
        layer.weight.norm()  # looking at a weight proves nothing
    lowrank.export_peft(perturb(model), tmp_path / "unknown")
    model(x)
    with pytest.raises(ValueError, match=r"0\.qkv.*: its weight is read without a call") as raised:
        lowrank.export_peft(model, tmp_path / "known")
    assert "0.proj" not in str(raised.value)


class Columns(nn.Module):
    """Keeps its weight as (in, out), and nothing but its shape and its forward tells."""

    def __init__(self, columns: int, rows: int) -> None:
        super().__init__()
        self.in_features, self.out_features = columns, rows
        self.weight = nn.Parameter(torch.randn(columns, rows) / columns**0.5)
        self.bias = nn.Parameter(torch.randn(rows))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


@pytest.mark.parametrize("rows", [8, 6])
def test_a_strangers_transposed_weight_reads_as_its_layer_multiplies(rows: int) -> None:
    model, x = nn.Sequential(Columns(8, rows)), torch.randn(5, 8)
    perturb(lowrank.wrap_model(model, presets.pissa(rank=2, target="0"), progress=False))
    moved = (model(x) - model[0].base(x)).abs().max()
    assert moved > 0.1
    torch.testing.assert_close(x @ model[0].weight + model[0].bias, model(x))
