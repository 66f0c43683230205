"""Without a gradient: the same numbers, fewer calls, and factors laid out once that are never out of date."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowrank
from lowrank import presets
from lowrank.layers import inference
from lowrank.layers.block import Block
from lowrank.layers.functional import add_lora, fused_lora
from lowrank.layers.inference import Kept
from lowrank.layers.linear import LoRALinear
from tests.layers.test_functional import IN, OUT, Count, layouts, make_blocks, naive

BF16 = torch.bfloat16


@layouts
@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [(1, 1), (3, 2), (1000,)], ids=str)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_values_match_fp64(layout: str, dtype: torch.dtype, tokens: tuple[int, ...], mode: Callable) -> None:
    blocks, x = make_blocks(layout), torch.randn(*tokens, IN, dtype=dtype)
    weight, bias = torch.randn(OUT, IN, dtype=dtype), torch.randn(OUT, dtype=dtype)
    with mode():
        y, added = fused_lora(x, weight, bias, blocks), add_lora(F.linear(x, weight, bias), x, blocks)
        kept = fused_lora(x, weight, bias, blocks, kept=Kept())
    wanted = naive(x, weight, bias, blocks)
    for each in (y, added, kept):
        assert each.dtype == dtype
        error = (each.double() - wanted).abs().max() / wanted.abs().max()
        assert error < 8 * torch.finfo(dtype).eps + 1e-5


@layouts
@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [1, 1000])
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_a_zero_update_is_the_base_bit_for_bit(
    layout: str, dtype: torch.dtype, tokens: int, autocast: bool
) -> None:
    blocks, x = make_blocks(layout, start=True), torch.randn(tokens, IN, dtype=dtype)
    weight, bias = torch.randn(OUT, IN, dtype=dtype), torch.randn(OUT, dtype=dtype)
    with torch.no_grad(), torch.autocast("cpu", BF16, enabled=autocast):
        assert torch.equal(fused_lora(x, weight, bias, blocks), F.linear(x, weight, bias))


@pytest.mark.parametrize("anchored", [False, True])
def test_the_base_output_that_add_lora_got_stays(anchored: bool) -> None:
    (block,) = make_blocks("anchored" if anchored else "one")
    y, x = torch.randn(3, OUT), torch.randn(3, IN)
    before = y.clone()
    with torch.no_grad():
        assert not torch.equal(add_lora(y, x, [block]), before)
    assert torch.equal(y, before)


@pytest.mark.parametrize(
    ("layout", "dtype", "operations"),
    [("one", torch.float32, 3), ("one", BF16, 5), ("anchored", BF16, 8)],
)
def test_one_token_takes_few_operations(layout: str, dtype: torch.dtype, operations: int) -> None:
    """The base, the two products and the sum, a cast of x in half precision; three more for a pair."""
    x, weight = torch.randn(1, 1, IN, dtype=dtype), torch.randn(OUT, IN, dtype=dtype)
    with torch.no_grad(), Count() as count:
        fused_lora(x, weight, None, make_blocks(layout))
    for made in ("randn", "div", "mul", "_unsafe_view"):
        count.counter.pop(made, None)
    assert sum(count.counter.values()) == operations, count.counter


# What follows runs on the CPU as an accelerator would: nothing is kept on a CPU, where it gains nothing.


@pytest.fixture
def keeping(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(inference, "FEW_DOWN", 0)
    monkeypatch.setattr(inference, "FEW_UP", 0)
    monkeypatch.setattr(inference, "KEPT_ON_CPU", 10**9)
    yield


def model() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(IN, OUT), nn.Tanh(), nn.Linear(OUT, IN)).to(BF16)
    return lowrank.wrap_model(net, presets.pissa(rank=4), progress=False)


def fresh(net: nn.Module, x: Tensor) -> Tensor:
    """The output of the same model with nothing kept."""
    for layer in net.modules():
        if isinstance(layer, LoRALinear):
            layer.kept.drop()
    with torch.no_grad():
        return net(x)


def step(net: nn.Module) -> None:
    factors = [parameter for parameter in net.parameters() if parameter.requires_grad]
    for factor in factors:
        factor.grad = torch.ones_like(factor)
    torch.optim.SGD(factors, lr=0.1).step()


def fused_step(net: nn.Module) -> None:
    """Which leaves the version of a tensor as it is."""
    factors = [parameter for parameter in net.parameters() if parameter.requires_grad]
    for factor in factors:
        factor.grad = torch.ones_like(factor)
    torch.optim.AdamW(factors, lr=0.1, fused=True).step()


class Writes(torch.optim.Optimizer):
    """Goes by addresses, as optimizers with kernels of their own do."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.data.add_(0.1)


def own_step(net: nn.Module) -> None:
    Writes(parameter for parameter in net.parameters() if parameter.requires_grad).step()


def edit(net: nn.Module) -> None:
    with torch.no_grad():
        net[0].part()[0].B.add_(0.5)


def edit_anchor(net: nn.Module) -> None:
    with torch.no_grad():
        net[0].part()[0].A.add_(0.1)
        net[0].part()[0].B0.mul_(2)


def exchange(net: nn.Module) -> None:
    net[0].part()[0].B = nn.Parameter(torch.ones_like(net[0].part()[0].B))


def reassign_data(net: nn.Module) -> None:
    adapter = net[0].part()[0]
    adapter.B.data = torch.ones_like(adapter.B)


def load_state(net: nn.Module) -> None:
    net.load_state_dict(
        {key: value + 0.25 for key, value in net.state_dict().items() if "adapters" in key}, strict=False
    )


def train_through_data(net: nn.Module) -> None:
    """As some optimizers do, after the forward pass that they all need."""
    net(torch.ones(2, IN, dtype=BF16)).sum().backward()
    for factor in net.parameters():
        if factor.grad is not None:
            factor.data.add_(factor.grad, alpha=-0.1)


def average_and_evaluate(net: nn.Module) -> None:
    """As moving averages of weights do, for an evaluation."""
    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1)
    net.eval()


@pytest.mark.usefixtures("keeping")
@pytest.mark.parametrize(
    "change",
    [
        *(step, fused_step, own_step, edit, edit_anchor, exchange, reassign_data, load_state),
        *(train_through_data, average_and_evaluate),
    ],
)
def test_a_changed_factor_is_seen(change: Callable[[nn.Module], None]) -> None:
    net, x = model(), torch.randn(3, IN, dtype=BF16)
    with torch.no_grad():
        before = net(x)
        assert torch.equal(net(x), before)
    change(net)
    with torch.no_grad():
        after = net(x)
    assert not torch.equal(after, before)
    assert torch.equal(after, fresh(net, x))


@pytest.mark.usefixtures("keeping")
def test_swapped_and_chosen_adapters_are_seen(tmp_path: Path) -> None:
    net, x = model(), torch.randn(3, IN, dtype=BF16)
    edit(net)
    lowrank.save_adapter(net, tmp_path / "a")
    lowrank.add_adapter(net, presets.lora(rank=2), name="other", progress=False)
    with torch.no_grad():
        for parameter in net[0].part("other").parameters():
            parameter.add_(0.3)
        first = net(x)
        lowrank.set_adapters(net, "other")
        second = net(x)
        lowrank.set_adapters(net, {"default": 1.0, "other": 0.5})
        both = net(x)
        assert torch.equal(both, fresh(net, x)) and not torch.equal(both, second)
        lowrank.set_adapters(net, "default")
        assert torch.equal(net(x), first) and not torch.equal(first, second)
        net[0].part("default")[0].B.add_(1)
        changed = net(x)
        lowrank.swap_adapter(net, tmp_path / "a", "default")
        assert torch.equal(net(x), first) and not torch.equal(first, changed)
        with lowrank.disable_adapters(net):
            assert not torch.equal(net(x), first)


@pytest.mark.usefixtures("keeping")
def test_another_dtype_is_seen() -> None:
    net, x = model(), torch.randn(3, IN, dtype=BF16)
    edit(net)
    with torch.no_grad():
        net(x)
        net.float()
        wide = net(x.float())
    assert wide.dtype == torch.float32 and torch.equal(wide, fresh(net, x.float()))


@pytest.mark.usefixtures("keeping")
def test_they_are_laid_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = model(), torch.randn(3, IN, dtype=BF16)
    with torch.inference_mode():
        first = net(x)
    made = net[0].kept.laid([adapter.block for adapter in net[0].part().held()], x)
    monkeypatch.setattr(inference, "lay_out", lambda *_: pytest.fail("laid out again"))
    with torch.inference_mode():
        assert torch.equal(net(x), first)
    with torch.no_grad():
        assert torch.equal(net(x), first)
    assert not made.down.is_inference() and not made.down.requires_grad


@pytest.mark.usefixtures("keeping")
def test_an_operation_of_one_token() -> None:
    """With the factors laid out an anchored pair costs two products, as a plain one does."""
    net, x = model(), torch.randn(1, IN, dtype=BF16)
    with torch.no_grad():
        net[0](x)
        with Count() as count:
            net[0](x)
    assert sum(count.counter.values()) == 3, count.counter


def test_inference_tensors_are_not_kept() -> None:
    with torch.inference_mode():
        blocks = [Block((0, OUT), torch.randn(2, IN), torch.randn(OUT, 2), 1.0)]
        kept, x = Kept(), torch.randn(300, IN, dtype=BF16)
        before = kept.laid(blocks, x).ups[0].right.clone()
        blocks[0].B.add_(1)
        assert not torch.equal(kept.laid(blocks, x).ups[0].right, before)


@pytest.mark.usefixtures("keeping")
def test_copies_and_state_hold_nothing_of_it() -> None:
    net, x = model(), torch.randn(3, IN, dtype=BF16)
    size, keys = len(pickle.dumps(net)), set(net.state_dict())
    with torch.no_grad():
        net(x)
    assert net[0].kept._held is not None
    assert len(pickle.dumps(net)) == size and set(net.state_dict()) == keys
    twin = copy.deepcopy(net)
    assert twin[0].kept is not net[0].kept and twin[0].kept._held is None
    edit(twin)
    with torch.no_grad():
        assert not torch.equal(twin(x), net(x))


@pytest.mark.usefixtures("keeping")
def test_it_holds_one_copy_of_the_factors() -> None:
    net, x = model(), torch.randn(3, IN, dtype=BF16)
    blocks = [adapter.block for adapter in net[0].part().held()]
    for _ in range(3):
        laid = net[0].kept.laid(blocks, x)
    entries = sum(t.numel() for block in blocks for t in (block.A, block.B, block.A0, block.B0))
    assert sum(t.numel() for t in (laid.down, *(up.right for up in laid.ups))) == entries
    net(torch.randn(2, IN, dtype=BF16))
    assert net[0].kept._held is None, "a call that builds a graph lets go of it"


def test_what_acts_is_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the blocks nor an anchored pair are made anew for each token."""
    net, x = model().eval(), torch.randn(3, IN, dtype=BF16)
    with torch.no_grad():
        first = net(x)
        monkeypatch.setattr(inference, "lay_out", lambda *_: pytest.fail("laid out again"))
        monkeypatch.setattr(LoRALinear, "_products", lambda *_: pytest.fail("found again"))
        assert torch.equal(net(x), first)


@pytest.mark.parametrize("few", [(0, 0), (10**9, 0), (0, 10**9), (10**9, 10**9)], ids=str)
@layouts
def test_each_product_may_be_in_fp32_or_not(
    layout: str, few: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "FEW_DOWN", few[0])
    monkeypatch.setattr(inference, "FEW_UP", few[1])
    blocks, x = make_blocks(layout), torch.randn(5, IN, dtype=BF16)
    weight, bias, kept = torch.randn(OUT, IN, dtype=BF16), torch.randn(OUT, dtype=BF16), Kept()
    wanted = naive(x, weight, bias, blocks)
    with torch.no_grad():
        for y in (fused_lora(x, weight, bias, blocks), fused_lora(x, weight, bias, blocks, kept=kept)):
            error = (y.double() - wanted).abs().max() / wanted.abs().max()
            assert y.dtype == BF16 and error < 8 * torch.finfo(BF16).eps
    laid = kept._held.laid
    assert (laid.down.dtype == torch.float32, laid.ups[0].right.dtype == torch.float32) == (
        few[0] > 0,
        few[1] > 0,
    )


def test_what_is_kept_serves_as_many_tokens_as_it_was_laid_out_for() -> None:
    """One token, some tokens and one again: each as a layer without anything kept has it."""
    net = model().eval()
    edit(net)
    for tokens in (1, 200, 5000, 1, 0, 3):
        x = torch.randn(tokens, IN, dtype=BF16)
        with torch.no_grad():
            assert torch.equal(net(x), copy.deepcopy(net)(x))


def test_autocast_is_seen() -> None:
    """Under autocast nothing is multiplied in fp32, and what was kept before is not used."""
    net, x = model().eval(), torch.randn(3, IN, dtype=BF16)
    edit(net)
    with torch.no_grad():
        outside = net(x)
        with torch.autocast("cpu", BF16):
            assert torch.equal(net(x), copy.deepcopy(net)(x))
        assert torch.equal(net(x), outside)


@pytest.mark.parametrize("tokens", [1, 32])
def test_a_pair_is_laid_out_once_for_some_tokens(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the products are in half precision: 32 tokens need no cast of the factors each time."""
    monkeypatch.setattr(inference, "FEW_DOWN", 0)
    monkeypatch.setattr(inference, "FEW_UP", 0)
    net, x = model().eval(), torch.randn(tokens, IN, dtype=BF16)
    with torch.no_grad():
        net[0](x)
        with Count() as count:
            net[0](x)
    assert sum(count.counter.values()) == 3, count.counter


def rescale(net: nn.Module) -> None:
    net[0].part()[0].scaling = 5.0


def put_another(net: nn.Module) -> None:
    net[0].part()[0] = copy.deepcopy(net[0].part()[0])
    edit(net)


def switch_off(net: nn.Module) -> None:
    lowrank.set_adapters(net, ())


def hook_the_base(net: nn.Module) -> None:
    net[0].base.register_forward_hook(lambda module, args, y: y + 1)


def exchange_the_weight(net: nn.Module) -> None:
    net[0].base.weight = nn.Parameter(net[0].base.weight + 1, requires_grad=False)


def weigh(net: nn.Module) -> None:
    lowrank.set_adapters(net, {"default": 0.5})


@pytest.mark.parametrize(
    "change",
    [
        step, edit, edit_anchor, exchange, reassign_data, load_state, train_through_data, rescale,
        put_another, switch_off, hook_the_base, exchange_the_weight, weigh,
    ],
)  # fmt: skip
def test_a_change_is_seen_by_the_next_token(change: Callable[[nn.Module], None]) -> None:
    """As it runs on a CPU: few tokens, in evaluation. A fresh copy of the model says what is right."""
    net, x = model().eval(), torch.randn(3, IN, dtype=BF16)
    edit(net)
    with torch.no_grad():
        before = net(x)
    change(net)
    with torch.no_grad():
        after = net(x)
        assert not torch.equal(after, before)
        assert torch.equal(after, copy.deepcopy(net)(x))


def test_weights_may_be_chosen_in_inference_mode() -> None:
    net, x = model().eval(), torch.randn(3, IN, dtype=BF16)
    edit(net)
    lowrank.set_adapters(net, {"default": 0.5})
    with torch.inference_mode():
        wanted = net(x)
        lowrank.set_adapters(net, {"default": 0.5})
        assert torch.equal(net(x), wanted)


@pytest.mark.parametrize("tokens", [3, 3000], ids=["few", "many"])
def test_a_mixture_is_one_pair(tokens: int) -> None:
    net, x = model().eval(), torch.randn(tokens, IN, dtype=BF16)
    edit(net)
    lowrank.add_adapter(net, presets.lora(rank=2), name="other", progress=False)
    with torch.no_grad():
        for parameter in net[0].part("other").parameters():
            parameter.add_(0.3)
        lowrank.set_adapters(net, {"default": 0.7, "other": -0.5})
        y = net[0](x)
        if tokens == 3:
            with Count() as count:
                net[0](x)
            assert count.counter["mm"] + count.counter["addmm"] == 3, count.counter
    wanted = net[0].base.weight.double() + sum(
        weight * net[0].delta_weight(name).double() for name, weight in (("default", 0.7), ("other", -0.5))
    )
    reference = F.linear(x.double(), wanted, net[0].base.bias.double())
    assert (y.double() - reference).abs().max() / reference.abs().max() < 8 * torch.finfo(BF16).eps
    lowrank.set_adapters(net, {"default": 0.7, "other": 0.5})
    with torch.no_grad():
        assert not torch.equal(net[0](x), y)
