"""Projections of one input computed together: the same values, gradients and rules as one by one."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lowrank.layers.ops import Block, fused_lora
from lowrank.layers.shared import Member, SharedInput, fused_group

IN, OUTS, RANKS = 12, (8, 6, 10), (3, 1, 4)


class Layer(nn.Module):
    def __init__(self, out: int, rank: int, *, anchored: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.base = nn.Linear(IN, out, bias=bias).requires_grad_(False)
        self.A, self.B = nn.Parameter(torch.randn(rank, IN)), nn.Parameter(torch.randn(out, rank))
        self.register_buffer("A0", torch.randn(rank, IN) if anchored else None)
        self.register_buffer("B0", torch.randn(out, rank) if anchored else None)
        self.shared: SharedInput | None = None
        self.can_share, self.alone = True, 0

    @property
    def block(self) -> Block:
        out, rank = self.B.shape
        return Block((0, out), self.A, self.B, 2 / rank, self.A0, self.B0)

    def member(self) -> Member | None:
        return Member(self.base.weight, self.base.bias, self.block) if self.can_share else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.shared(self, x) if self.shared is not None else None
        if y is None:
            self.alone += 1
            y = fused_lora(x, self.base.weight, self.base.bias, [self.block])
        return y


class Attention(nn.Module):
    """Three projections and what a model might make of them; `used` are those that it calls."""

    def __init__(self, *, together: bool, used: str = "qkv") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (
            Layer(out, rank, anchored=i == 1, bias=i != 2)
            for i, (out, rank) in enumerate(zip(OUTS, RANKS, strict=True))
        )
        self.used = used
        if together:
            group = SharedInput(self.layers)
            for layer in self.layers:
                layer.shared = group

    @property
    def layers(self) -> list[Layer]:
        return [self.q, self.k, self.v]

    def forward(self, x: Tensor) -> Tensor:
        return sum((getattr(self, name)(x).sin().sum(-1) for name in self.used), torch.zeros(()))


def gradients(model: nn.Module, x: Tensor, run: Callable[[Tensor], Tensor]) -> list[Tensor | None]:
    """The output, dX and all gradients of the parameters of one step."""
    model.zero_grad()
    x = x.detach().requires_grad_()
    y = run(x)
    y.sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


def assert_same(got: list[Tensor | None], wanted: list[Tensor | None]) -> None:
    for ours, reference in zip(got, wanted, strict=True):
        assert (ours is None) == (reference is None)
        if ours is not None and reference is not None:
            torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)


@pytest.fixture
def pair() -> Iterator[tuple[Attention, Attention]]:
    yield Attention(together=True), Attention(together=False)


def members(dtype: torch.dtype = torch.float64) -> list[Member]:
    found = [layer.to(dtype).member() for layer in Attention(together=False).layers]
    return [member for member in found if member is not None]


@pytest.mark.parametrize("shape", [(IN,), (0, IN), (5, IN), (2, 3, IN)], ids=str)
def test_group_is_its_members(shape: tuple[int, ...]) -> None:
    x, group = torch.randn(shape, dtype=torch.float64), members()
    for y, (weight, bias, block) in zip(fused_group(x, group), group, strict=True):
        torch.testing.assert_close(y, fused_lora(x, weight, bias, [block]))


def test_gradcheck() -> None:
    x, group = torch.randn(2, 3, IN, dtype=torch.float64, requires_grad=True), members()
    leaves = [t.requires_grad_() for m in group for t in (m.weight, m.block.A, m.block.B)]

    def run(x: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
        triples = zip(leaves[::3], leaves[1::3], leaves[2::3], strict=True)
        changed = [
            Member(weight, member.bias, member.block._replace(A=A, B=B))
            for member, (weight, A, B) in zip(group, triples, strict=True)
        ]
        return fused_group(x, changed)

    assert torch.autograd.gradcheck(run, (x, *leaves))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_zero_updates_are_the_bases_bit_for_bit(dtype: torch.dtype) -> None:
    x = torch.randn(2, 5, IN, dtype=dtype)
    for layer in (layers := Attention(together=False).layers):
        layer.base.to(dtype)
        nn.init.zeros_(layer.B)
        if layer.A0 is not None:
            nn.init.zeros_(layer.A)
    outputs = fused_group(x, [member for layer in layers if (member := layer.member()) is not None])
    assert all(torch.equal(y, layer.base(x)) for y, layer in zip(outputs, layers, strict=True))


def test_separate_layers_share(pair: tuple[Attention, Attention]) -> None:
    together, one_by_one = pair
    for _ in range(3):
        x = torch.randn(4, 5, IN)
        assert_same(gradients(together, x, together), gradients(one_by_one, x, one_by_one))
        with torch.no_grad():
            for model in pair:
                for parameter in model.parameters():
                    parameter.mul_(0.9)
    assert [layer.alone for layer in together.layers] == [0, 0, 0]


@pytest.mark.parametrize("used", ["q", "vq", "qqk", "kk"])
def test_some_of_them_or_in_any_order(used: str) -> None:
    together, one_by_one = (Attention(together=flag, used=used) for flag in (True, False))
    for _ in range(3):
        x = torch.randn(4, IN)
        assert_same(gradients(together, x, together), gradients(one_by_one, x, one_by_one))
    group = together.q.shared
    assert group is not None and group.apart and not group._waiting  # seen once, and given up


def test_a_changed_input_or_factor_is_computed_anew(pair: tuple[Attention, Attention]) -> None:
    for change in ("input", "factor", "weight"):
        outputs = []
        for model in pair:
            x = torch.ones(3, IN)
            first = model.q(x)
            with torch.no_grad():
                {"input": x, "factor": model.k.B, "weight": model.k.base.weight}[change].mul_(1.5)
            outputs.append((first, model.k(x), model.v(x)))
        for ours, reference in zip(*outputs, strict=True):
            torch.testing.assert_close(ours, reference)


def test_another_input_of_the_same_values_is_another_input(pair: tuple[Attention, Attention]) -> None:
    together, one_by_one = pair
    x, z = torch.randn(3, IN), torch.randn(3, IN)
    for model in pair:
        model.zero_grad()
        (model.q(x).sum() + model.k(z).sum() + model.v(z).sum()).backward()
    for layer, reference in zip(together.layers, one_by_one.layers, strict=True):
        torch.testing.assert_close(layer.B.grad, reference.B.grad)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(pair: tuple[Attention, Attention], reentrant: bool) -> None:
    together, one_by_one = pair
    x = torch.randn(4, 5, IN)
    wanted = gradients(one_by_one, x, one_by_one)
    for _ in range(2):
        assert_same(gradients(together, x, partial(checkpoint, together, use_reentrant=reentrant)), wanted)


def test_checkpointing_of_a_part() -> None:
    """Only q is called: the group is given up between steps, never between a forward and its repetition."""
    together, one_by_one = (Attention(together=flag, used="q") for flag in (True, False))
    for _ in range(3):
        x = torch.randn(4, IN)
        got = gradients(together, x, partial(checkpoint, together, use_reentrant=False))
        assert_same(got, gradients(one_by_one, x, one_by_one))


def test_autocast_casts_and_keeps_the_input_once(pair: tuple[Attention, Attention]) -> None:
    kept = []
    for model in pair:
        storages: dict[int, int] = {}

        def pack(tensor: Tensor, storages: dict[int, int] = storages) -> Tensor:
            if tensor.shape == (64, IN) and tensor.dtype == torch.bfloat16:
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with torch.autocast("cpu", torch.bfloat16), hooks:
            y = model(torch.ones(64, IN, requires_grad=True))
        y.sum().backward()
        kept.append(sum(storages.values()))
    assert kept == [64 * IN * 2, 3 * 64 * IN * 2]


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_without_gradients_or_compiled_each_is_alone(pair: tuple[Attention, Attention]) -> None:
    together, one_by_one = pair
    x = torch.randn(4, IN)
    with torch.no_grad():
        assert torch.equal(together(x), one_by_one(x))
    with torch.inference_mode():
        together(x.clone())
    compiled = torch.compile(together, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), one_by_one(x))
    assert together.q.alone >= 2 and not together.q.shared._waiting  # type: ignore[union-attr]


def test_a_layer_that_cannot_share_keeps_all_apart(pair: tuple[Attention, Attention]) -> None:
    """It may be able to again: the others ask each time."""
    together, one_by_one = pair
    x = torch.randn(4, IN)
    together.v.can_share = False
    assert torch.equal(together(x), one_by_one(x))
    assert [layer.alone for layer in together.layers] == [1, 1, 1]
    together.v.can_share = True
    torch.testing.assert_close(together(x), one_by_one(x))
    assert [layer.alone for layer in together.layers] == [1, 1, 1]


def test_copies_have_groups_of_their_own(pair: tuple[Attention, Attention]) -> None:
    together, _ = pair
    x = torch.randn(4, IN, requires_grad=True)
    together.q(x)  # leaves outputs waiting, which no copy may hold
    for other in (copy.deepcopy(together), pickle.loads(pickle.dumps(together))):
        group = other.q.shared
        assert group is other.k.shared and group is not together.q.shared
        assert group.layers == other.layers and not group._waiting
        assert_same(gradients(other, x, other), gradients(together, x, together))
        assert other.q.alone == 0


def test_a_stranger_is_sent_away(pair: tuple[Attention, Attention]) -> None:
    together, one_by_one = pair
    assert together.q.shared is not None
    assert together.q.shared(one_by_one.q, torch.ones(2, IN)) is None
