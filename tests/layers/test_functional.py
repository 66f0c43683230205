"""The fused product by itself: its values, its gradients, what it keeps, and how much it does."""

from __future__ import annotations

from collections import Counter
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank.layers.functional import Block, add_lora, check_blocks, fused_lora, lora_linear
from tests.helpers import numbers

IN, OUT, RANK = 24, 20, 3
SHAPES = [(IN,), (0, IN), (1, IN), (7, IN), (2, 0, IN), (3, 5, IN), (2, 3, 4, IN)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = {
    "one": (((0, OUT), RANK, 2.0, False),),
    "anchored": (((0, OUT), RANK, 0.5, True),),
    "middle rows": (((4, 11), RANK, 1.5, False),),
    "three blocks": (((0, 6), 2, 2.0, False), ((6, 13), 5, 1.0, True), ((15, OUT), 1, 3.0, True)),
    "pieces": (((2, 18, 4, 6), RANK, 1.5, False),),
    "interleaved": (
        ((1, 17, 2, 7), 2, 2.0, False),
        ((4, 20, 2, 7), 5, 1.0, True),
        ((6, 15, 1, 4), 1, 3.0, True),
    ),
}
layouts = pytest.mark.parametrize("layout", LAYOUTS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def make_blocks(
    layout: str, *, start: bool = False, dtype: torch.dtype = torch.float32, **kw: Any
) -> list[Block]:
    """Blocks with random factors; with `start`, as training finds them: B zero, or both offsets zero."""
    blocks = []
    for rows, rank, scaling, anchored in LAYOUTS[layout]:
        A, A0 = (torch.randn(rank, IN, dtype=dtype, **kw) / IN**0.5 for _ in range(2))
        B, B0 = (torch.randn(len(numbers(rows)), rank, dtype=dtype, **kw) for _ in range(2))
        if start:
            A, B = (A * 0 if anchored else A), B * 0
        anchor = (A0, B0) if anchored else (None, None)
        blocks.append(Block(rows, A.requires_grad_(), B.requires_grad_(), scaling, *anchor))
    return blocks


def factors(blocks: list[Block]) -> list[Tensor]:
    return [factor for block in blocks for factor in (block.A, block.B)]


def naive(x: Tensor, weight: Tensor, bias: Tensor | None, blocks: list[Block]) -> Tensor:
    """The definition, in fp64, through autograd."""
    delta = torch.zeros_like(weight, dtype=torch.float64)
    for rows, A, B, scaling, A0, B0 in blocks:
        A, B = A.double(), B.double()
        update = B @ A if A0 is None else (B + B0.double()) @ (A + A0.double()) - B0.double() @ A0.double()
        delta = delta.index_add(0, torch.tensor(numbers(rows), device=delta.device), scaling * update)
    return F.linear(x.double(), weight.double() + delta, None if bias is None else bias.double())


@layouts
@dtypes
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_zero_update_is_the_base_bit_for_bit(layout: str, dtype: torch.dtype, autocast: bool) -> None:
    blocks = make_blocks(layout, start=True)
    stored = torch.randn(IN, OUT, dtype=dtype)
    for shape, weight, bias, grad in product(
        SHAPES, (stored.t().contiguous(), stored.t()), (None, torch.randn(OUT, dtype=dtype)), (False, True)
    ):
        x = torch.randn(shape, dtype=dtype)
        for view in (
            x,
            x.expand(3, *shape),
            x.unsqueeze(-2).transpose(0, -2),
            x.repeat(*[1] * len(shape[1:]), 2)[..., ::2],
        ):
            view = view.requires_grad_(grad) if view.is_leaf else view
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                expected, y = F.linear(view, weight, bias), fused_lora(view, weight, bias, blocks)
                assert y.dtype == expected.dtype and torch.equal(y, expected)
                assert torch.equal(add_lora(expected, view, blocks), expected)


@layouts
@dtypes
@devices
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_match_fp64(layout: str, dtype: torch.dtype, device: str, shape: tuple) -> None:
    blocks = make_blocks(layout, device=device)
    x = torch.randn(shape, dtype=dtype, device=device).requires_grad_()
    weight, bias = (torch.randn(s, dtype=dtype, device=device).requires_grad_() for s in ((OUT, IN), (OUT,)))
    leaves = [x, weight, bias, *factors(blocks)]
    y, expected = fused_lora(x, weight, bias, blocks), naive(x, weight, bias, blocks)
    dY = torch.randn_like(y)
    got, wanted = torch.autograd.grad(y, leaves, dY), torch.autograd.grad(expected, leaves, dY.double())
    assert y.dtype == dtype
    tolerance = 8 * torch.finfo(dtype).eps + 1e-5  # the dtype's own rounding, and that of fp32 sums
    for ours, reference, leaf in zip((y, *got), (expected, *wanted), (y, *leaves), strict=True):
        assert ours.dtype == leaf.dtype and ours.shape == reference.shape and ours.is_contiguous()
        scale = reference.abs().max().item() if reference.numel() else 1.0
        torch.testing.assert_close(ours.double(), reference.double(), atol=tolerance * scale, rtol=0.0)


@pytest.mark.parametrize("layout", ["one", "anchored"])
@pytest.mark.parametrize("bias", [False, True])
@devices
@dtypes
def test_the_update_first_gives_the_same_values(
    layout: str, bias: bool, device: str, dtype: torch.dtype
) -> None:
    """Not `exact`: one operation less reads y, and what differs is rounding."""
    blocks = make_blocks(layout, device=device)
    x = torch.randn(2, 5, IN, dtype=dtype, device=device)
    weight, added = (torch.randn(s, dtype=dtype, device=device) for s in ((OUT, IN), OUT))
    with Count() as count:
        y = fused_lora(x, weight, added if bias else None, blocks, exact=False)
    wanted = naive(x, weight, added if bias else None, blocks)
    error, scale = (y - wanted).abs().max(), wanted.abs().max()
    assert error < 4 * torch.finfo(dtype).eps * scale
    assert count.counter["mm"] == 1 and count.counter["add"] <= 1  # that of the anchor


@layouts
def test_gradcheck(layout: str) -> None:
    blocks = make_blocks(layout, dtype=torch.float64)
    x, weight, bias = (
        torch.randn(s, dtype=torch.float64).requires_grad_() for s in ((2, 3, IN), (OUT, IN), OUT)
    )

    def rebuilt(changed: tuple[Tensor, ...]) -> list[Block]:
        pairs = zip(changed[::2], changed[1::2], strict=True)
        return [b._replace(A=A, B=B) for b, (A, B) in zip(blocks, pairs, strict=True)]

    def fused(x: Tensor, weight: Tensor, bias: Tensor, *changed: Tensor) -> Tensor:
        return fused_lora(x, weight, bias, rebuilt(changed))

    def added(y: Tensor, x: Tensor, *changed: Tensor) -> Tensor:
        return add_lora(y, x, rebuilt(changed))

    y = torch.randn(2, 3, OUT, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(fused, (x, weight, bias, *factors(blocks)))
    assert torch.autograd.gradcheck(added, (y, x, *factors(blocks)))


@layouts
@pytest.mark.parametrize("wanted", list(product([False, True], repeat=5)), ids=str)
def test_only_what_is_asked_for_gets_a_gradient(layout: str, wanted: tuple[bool, ...]) -> None:
    blocks = make_blocks(layout)
    x, weight, bias = torch.randn(4, IN), torch.randn(OUT, IN), torch.randn(OUT)
    groups = [[x], [weight], [bias], [b.A for b in blocks], [b.B for b in blocks]]
    for group, want in zip(groups, wanted, strict=True):
        for tensor in group:
            tensor.requires_grad_(want)
    leaves = [tensor for group, want in zip(groups, wanted, strict=True) if want for tensor in group]
    y = fused_lora(x, weight, bias, blocks)
    assert y.requires_grad == any(wanted)
    if leaves:
        y.sum().backward()
        expected = torch.autograd.grad(naive(x, weight, bias, blocks).sum(), leaves)
        for leaf, reference in zip(leaves, expected, strict=True):
            torch.testing.assert_close(leaf.grad, reference)
    assert all(t.grad is None for group in groups for t in group if not t.requires_grad)


class Kept:
    """Bytes that autograd keeps alive for backward, beyond the tensors that are alive anyway."""

    def __init__(self, *alive: Tensor) -> None:
        self.alive = {tensor.untyped_storage().data_ptr() for tensor in alive}
        self.storages: dict[int, int] = {}

    def __enter__(self) -> Kept:
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.hooks.__exit__(*error)

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.alive:
            self.storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    @property
    def bytes(self) -> int:
        return sum(self.storages.values())


@pytest.mark.parametrize(("train_A", "limit_MiB"), [(True, 9.0), (False, 1.0)], ids=["A trained", "A frozen"])
@pytest.mark.parametrize("anchored", [False, True], ids=["plain", "anchored"])
def test_query_key_value_keep_one_input(train_A: bool, limit_MiB: float, anchored: bool) -> None:
    tokens, width, rank = 4096, 1024, 16
    h = torch.randn(tokens, width, dtype=torch.bfloat16, requires_grad=True)  # 8 MiB
    weights = [torch.randn(width, width, dtype=torch.bfloat16) for _ in range(3)]
    A, A0 = (torch.randn(rank, width, requires_grad=train_A) for _ in range(2))
    B, B0 = (torch.randn(width, rank, requires_grad=True) for _ in range(2))
    anchor = (A0.detach(), B0.detach()) if anchored else (None, None)
    with Kept(A, B, A0, B0, *weights) as kept:
        x = h * 1  # an activation, which nothing but the graph holds
        block = Block((0, width), A, B, 2.0, *anchor)
        outputs = [fused_lora(x, weight, None, [block]) for weight in weights]
    columns = 2 if anchored else 1
    entries = tokens * rank + rank * (width + width)  # of x·Aᵀ, and of the factors in half precision
    expected = train_A * x.nbytes + 3 * columns * entries * x.element_size()
    assert len(outputs) == 3 and kept.bytes == expected <= (limit_MiB + 0.25 * anchored) * 2**20


class Count(TorchDispatchMode):
    """Counts operations by name, views apart."""

    def __init__(self) -> None:
        super().__init__()
        self.counter: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.counter[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("frozen", "forward", "backward"),
    [
        ("", {"mm": 2, "addmm_": 1}, {"new_empty": 2, "addmm_": 3, "mm": 2, "empty_like": 1, "copy_": 1}),
        ("A", {"mm": 2, "addmm_": 1}, {"new_empty": 2, "addmm_": 3, "mm": 1, "empty_like": 1, "copy_": 1}),
        ("x", {"mm": 2, "addmm_": 1}, {"new_empty": 2, "addmm_": 2, "mm": 1, "empty_like": 1, "copy_": 1}),
        ("AB", {"mm": 2, "addmm_": 1}, {"new_empty": 1, "addmm_": 2, "mm": 1}),
    ],
)
def test_operations_are_counted(frozen: str, forward: dict[str, int], backward: dict[str, int]) -> None:
    """Three products forward and five backward, and no other pass over the tokens; less where frozen."""
    x, A, B = torch.randn(9, IN), torch.randn(RANK, IN), torch.randn(OUT, RANK)
    for name, tensor in {"x": x, "A": A, "B": B}.items():
        tensor.requires_grad_(name not in frozen)
    with Count() as count:
        y = lora_linear(x, torch.randn(OUT, IN), None, A, B, 2.0)
    count.counter.pop("randn")
    assert count.counter == forward
    dY = torch.ones_like(y)
    with Count() as count:
        torch.autograd.grad(y, [t for t in (x, A, B) if t.requires_grad], dY)
    assert {k: n for k, n in count.counter.items() if k != "detach"} == backward


@layouts
def test_backward_writes_to_nothing_it_was_given(layout: str) -> None:
    blocks = make_blocks(layout)
    x, weight = torch.randn(4, IN, requires_grad=True), torch.randn(OUT, IN)
    y = fused_lora(x, weight, None, blocks)
    given = [x, weight, y, torch.randn_like(y), *(t for b in blocks for t in b if isinstance(t, Tensor))]
    before = [tensor.detach().clone() for tensor in given]
    first = torch.autograd.grad(y, [x, *factors(blocks)], given[3], retain_graph=True)
    second = torch.autograd.grad(y, [x, *factors(blocks)], given[3])
    assert all(torch.equal(now, then) for now, then in zip(given, before, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_expanded_and_transposed_output_gradients() -> None:
    (block,) = make_blocks("one")
    x, weight = torch.randn(6, IN, requires_grad=True), torch.randn(OUT, IN)
    for dY in (torch.randn(()).expand(6, OUT), torch.randn(OUT, 6).t(), torch.randn(1, OUT).expand(6, OUT)):
        leaves = (x, block.A, block.B)
        got = torch.autograd.grad(fused_lora(x, weight, None, [block]), leaves, dY)
        wanted = torch.autograd.grad(naive(x, weight, None, [block]), leaves, dY.double())
        for ours, reference in zip(got, wanted, strict=True):
            torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)


def test_add_lora_leaves_what_the_base_returned() -> None:
    (block,) = make_blocks("one")
    x = torch.randn(5, IN)
    y = torch.tanh(
        F.linear(x, torch.randn(OUT, IN, requires_grad=True))
    )  # tanh keeps its output for backward
    before = y.detach().clone()
    add_lora(y, x, [block]).sum().backward()
    assert torch.equal(y, before) and block.B.grad is not None


def test_second_derivative_is_refused() -> None:
    (block,) = make_blocks("one")
    x = torch.randn(4, IN, requires_grad=True)
    y = fused_lora(x, torch.randn(OUT, IN), None, [block])
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        dx.sum().backward()


class TestDropout:
    def test_draws_nothing_without_it(self) -> None:
        (block,) = make_blocks("one")
        state = torch.get_rng_state()
        fused_lora(torch.ones(4, IN), torch.zeros(OUT, IN), None, [block])
        assert torch.equal(torch.get_rng_state(), state)

    @devices
    @pytest.mark.parametrize("p", [0.05, 0.1, 0.5])
    def test_hides_its_share_from_the_adapter_alone(self, p: float, device: str) -> None:
        """With A = B = I the update shows the mask."""
        x, eye = torch.ones(500, 400, device=device), torch.eye(400, device=device)
        y = fused_lora(x, 3 * eye, None, [Block((0, 400), eye, eye, 1.0)], dropout=p)
        kept = y - 3
        torch.testing.assert_close(kept.unique().sort()[0], torch.tensor([0.0, 1 / (1 - p)], device=device))
        deviation = (p * (1 - p) / kept.numel()) ** 0.5
        assert abs((kept == 0).float().mean().item() - p) < 5 * deviation

    @layouts
    def test_gradients_are_those_of_the_masked_input(self, layout: str) -> None:
        blocks = make_blocks(layout)
        x, weight = torch.randn(2, 6, IN, requires_grad=True), torch.randn(OUT, IN)
        leaves, eye = [x, *factors(blocks)], torch.eye(IN)
        torch.manual_seed(7)
        got = torch.autograd.grad(fused_lora(x, weight, None, blocks, dropout=0.25).sum(), leaves)
        torch.manual_seed(7)
        ones = torch.ones(2, 6, IN)
        mask = fused_lora(ones, torch.zeros(IN, IN), None, [Block((0, IN), eye, eye, 1.0)], dropout=0.25)
        y = F.linear(x, weight).double() + naive(x * mask, torch.zeros(OUT, IN), None, blocks)
        for ours, reference in zip(got, torch.autograd.grad(y.sum(), leaves), strict=True):
            torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4)

    def test_bits_are_fair_for_any_size(self) -> None:
        """Every entry is kept about as often as any other, whatever its place in the packed draws."""
        eye = torch.eye(5)
        block = Block((0, 5), eye, eye, 1.0)
        draws = torch.stack(
            [fused_lora(torch.ones(1, 5), 0 * eye, None, [block], dropout=0.5)[0] > 0 for _ in range(2000)]
        )
        assert ((draws.float().mean(0) - 0.5).abs() < 5 * 0.5 / 2000**0.5).all()
        assert (torch.corrcoef(draws.float().T) - torch.eye(5)).abs().max() < 5 / 2000**0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": (0, OUT + 1)}, "within the weight's 20 rows"),
        ({"rows": (3, 3)}, "within the weight's 20 rows"),
        ({"rows": (0, OUT + 1, 1, 5)}, "within the weight's 20 rows"),
        ({"rows": (0, 14, 3, 8)}, "within the weight's 20 rows"),
        ({"rows": (0, 14, 0, 7)}, "within the weight's 20 rows"),
        ({"rows": (0, 16, 2, 7)}, r"must be \(3, 24\) and \(6, 3\)"),
        ({"rows": (0, OUT - 1)}, r"must be \(3, 24\) and \(19, 3\)"),
        ({"A": torch.ones(RANK, IN - 1)}, r"A \(3, 23\)"),
        ({"B": torch.ones(OUT, RANK + 1)}, r"B \(20, 4\)"),
        ({"A0": torch.ones(RANK, IN)}, "both A0 and B0"),
        ({"A0": torch.ones(1, IN), "B0": torch.ones(OUT, 1)}, "shapes of its offsets"),
    ],
)
def test_blocks_that_do_not_fit_are_named(change: dict[str, Any], message: str) -> None:
    (block,) = make_blocks("one")
    with pytest.raises(ValueError, match=message):
        check_blocks(OUT, IN, [block._replace(**change)])


@layouts
def test_blocks_that_fit_pass(layout: str) -> None:
    check_blocks(OUT, IN, make_blocks(layout))


def test_no_blocks_are_named() -> None:
    with pytest.raises(ValueError, match="expected at least one block"):
        check_blocks(OUT, IN, [])


def test_lora_linear_checks_its_factors() -> None:
    with pytest.raises(ValueError, match=r"must be \(3, 24\) and \(20, 3\)"):
        lora_linear(torch.ones(2, IN), torch.ones(OUT, IN), None, torch.ones(3, IN), torch.ones(OUT, 2), 1.0)


def test_added_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="all but the last"):
        add_lora(torch.ones(3, OUT), torch.ones(2, IN), make_blocks("one"))
