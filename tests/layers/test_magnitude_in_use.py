"""Magnitudes inside what training puts around them: packed weights, the compiler, autocast, dropout."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank
from lowrank import presets
from lowrank.models.storage import as_rows
from tests.helpers import frozen_logits, logits, perturb

pytestmark = [
    pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True to a scalar"),
    pytest.mark.filterwarnings("ignore:.*inputs will be cast from"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script.*` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]


def network(seed: int = 3) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(64, 32)).eval()


def inputs() -> Tensor:
    return torch.randn(5, 64, generator=torch.Generator().manual_seed(1))


def adapted(model: nn.Module | None = None, **options: Any) -> nn.Module:
    options = {"rank": 3, "target": "0", **options}
    model = network() if model is None else model
    return lowrank.wrap_model(model, presets.dora(**options), progress=False)


def expected(layer: Any, x: Tensor) -> Tensor:
    """``m · (W + ΔW) / ‖W + ΔW‖`` by rows, times x."""
    (adapter,) = layer.part().held()
    W = as_rows(layer.base, "weight").float() + adapter.scaling * adapter.B @ adapter.A
    W = adapter.magnitude.values()[:, None] * W / W.norm(dim=1, keepdim=True)
    return nn.functional.linear(x, W, layer.base.bias)


# -- packed weights -----------------------------------------------------------------------------------


def torchao_int8(model: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    model.requires_grad_(False)
    quantize_(model, Int8WeightOnlyConfig())
    return model


def bitsandbytes(bits: int) -> Callable[[Any], nn.Module]:
    def quantize(model: Any) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from bitsandbytes.nn import Linear4bit, Linear8bitLt
        if bits == 4:
            packed = Linear4bit(64, 32, compute_dtype=torch.float32, quant_type="nf4")
            packed.support_avx512bf16_for_cpu = False  # the same on every machine
        else:
            packed = Linear8bitLt(64, 32, has_fp16_weights=False)
        packed.load_state_dict(model[0].state_dict())
        model[0] = packed.to("cpu")
        return model.eval()

    return quantize


PACKED = {
    "torchao int8": (torchao_int8, 1e-4),
    "bitsandbytes 4 bits": (bitsandbytes(4), 1e-4),
    "bitsandbytes 8 bits": (bitsandbytes(8), 0.05),  # its input is rounded too
}


@pytest.mark.parametrize("kind", PACKED)
def test_a_packed_weight(kind: str) -> None:
    quantize, error = PACKED[kind]
    x, model = inputs(), quantize(network())
    base = frozen_logits(model, x)
    assert torch.equal(logits(adapted(model), x), base)
    perturb(model)
    layer: Any = model[0]
    got, wanted = model(x), expected(layer, x)
    assert (wanted - base).norm() > 0.2 * wanted.norm()
    assert (got - wanted).norm() <= error * wanted.norm()
    got.square().sum().backward()
    (adapter,) = layer.part().held()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in adapter.trained())
    merged = lowrank.merge(model, dequantize=True)
    assert (logits(merged, x) - wanted).norm() <= max(error, 1e-4) * wanted.norm()


# -- the compiler, autocast, dropout ------------------------------------------------------------------


def step(model: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """The output, and the gradients of what trains."""
    model.zero_grad()
    y = run(x)
    y.float().square().sum().backward()
    return [y.detach(), *(p.grad.clone() for p in lowrank.adapter_parameters(model))]


def test_compiled_in_one_graph() -> None:
    model, x = perturb(adapted()), inputs()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for got, wanted in zip(step(model, compiled, x), step(model, model, x), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    torch.compiler.reset()
    torch.testing.assert_close(compiled(x), expected(model[0], x), rtol=1e-4, atol=1e-4)  # type: ignore[index]


@pytest.mark.parametrize("half", ["autocast", "base"])
def test_half_precision(half: str) -> None:
    """The products are rounded, the norms and the parameters are not."""
    dtype = torch.bfloat16
    model, x = network(), inputs()
    if half == "base":
        model, x = model.to(dtype), x.to(dtype)
    with torch.autocast("cpu", dtype, enabled=half == "autocast"):
        base = frozen_logits(model, x)
        assert torch.equal(logits(adapted(model), x), base)
        perturb(model)
        y = model(x)
    wanted = expected(model[0], x.float()) if half == "autocast" else None  # type: ignore[index]
    assert y.dtype == dtype
    if wanted is not None:
        assert (y.float() - wanted).norm() < 0.02 * wanted.norm()
    assert (y.float() - base.float()).norm() > 0.2 * y.float().norm()
    y.float().square().sum().backward()
    for parameter in lowrank.adapter_parameters(model):
        assert parameter.dtype == torch.float32 and parameter.grad is not None and parameter.grad.any()


def test_dropout_acts_on_the_update_and_not_on_the_norms() -> None:
    x = inputs()
    model, other = perturb(adapted(dropout=0.5)).train(), perturb(adapted(dropout=0.5, dora=False)).train()
    layer, plain = model[0], other[0]  # type: ignore[index]
    (adapter,), (twin,) = (each.part().held() for each in (layer, plain))  # type: ignore[operator,union-attr]
    twin.load_state_dict({key: t for key, t in adapter.state_dict().items() if "magnitude" not in key})
    W = layer.base.weight + adapter.scaling * adapter.B @ adapter.A  # type: ignore[operator,union-attr]
    factor = adapter.magnitude.values() / W.norm(dim=1)
    drawn = []
    for each in (model, other):
        torch.manual_seed(5)
        drawn.append(each(x))
    bias = layer.base.bias  # type: ignore[union-attr]
    torch.testing.assert_close(drawn[0], (drawn[1] - bias) * factor + bias, rtol=1e-4, atol=1e-4)
    torch.manual_seed(6)
    assert not torch.equal(model(x), drawn[0])


# -- reading, and other bases -------------------------------------------------------------------------


def test_a_weight_that_is_read_without_a_call_is_refused() -> None:
    model = adapted()
    layer: Any = model[0]  # type: ignore[index]
    assert layer.weight.shape == (32, 64) and layer.weight.dtype == torch.float32
    with pytest.raises(ValueError, match=r"read without a call.*magnitudes of dora=True"):
        nn.functional.linear(inputs(), layer.weight)
    with lowrank.disable_adapters(model):
        assert torch.equal(layer.weight, layer.base.weight)


def test_on_another_base_the_magnitudes_are_the_saved_ones(tmp_path: Path) -> None:
    model, x = perturb(adapted()), inputs()
    lowrank.save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="other weights"):
        lowrank.load_adapter(network(seed=4), tmp_path)
    other = lowrank.load_adapter(network(seed=4), tmp_path, base="other")
    (mine,), (theirs,) = (each[0].part().held() for each in (model, other))  # type: ignore[index]
    assert torch.equal(mine.magnitude.values(), theirs.magnitude.values())
    assert not torch.equal(mine.magnitude.norms, theirs.magnitude.norms)
    torch.testing.assert_close(logits(other, x), expected(other[0], x), rtol=1e-4, atol=1e-4)  # type: ignore[index]


def test_weights_that_come_after_wrapping_are_followed() -> None:
    """Magnitudes that were not trained start from them; others stay, beside the norms that are there now."""
    model, other, x = adapted(), network(seed=4), inputs()
    model.load_state_dict(other.state_dict(), strict=False)
    assert torch.equal(logits(model, x), logits(other, x))
    trained = perturb(adapted())
    magnitudes = trained[0].part().held()[0].magnitude.values().detach().clone()
    trained.load_state_dict(other.state_dict(), strict=False)
    (adapter,) = trained[0].part().held()
    assert torch.equal(adapter.magnitude.values(), magnitudes)
    torch.testing.assert_close(logits(trained, x), expected(trained[0], x), rtol=1e-4, atol=1e-4)
    again = adapted()
    again.load_state_dict(trained.state_dict())
    assert torch.equal(logits(again, x), logits(trained, x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_another_dtype_is_the_base_in_that_dtype(dtype: torch.dtype) -> None:
    model, x = adapted().to(dtype), inputs().to(dtype)
    assert torch.equal(logits(model, x), logits(network().to(dtype), x))
    trained = perturb(adapted())
    wanted = logits(trained, inputs())
    tolerance = 0.1 if dtype.itemsize == 2 else 1e-4
    torch.testing.assert_close(logits(trained.to(dtype), x).float(), wanted, rtol=tolerance, atol=tolerance)
