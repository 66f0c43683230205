"""The Triton kernel: on a GPU where there is one, otherwise under Triton's interpreter, against fp64."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

from lowrank.layers import gemm
from lowrank.layers.functional import Block, fused_lora

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAME = "lowrank.layers.kernels"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []  # so that a run of the gpu tests has them


@pytest.fixture(scope="module")
def kernels() -> Iterator[ModuleType]:
    """The module, imported anew so that Triton sees whether it is to interpret."""
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":
            patch.setenv("TRITON_INTERPRET", "1")
        sys.modules.pop(NAME, None)
        yield importlib.import_module(NAME)
        sys.modules.pop(NAME)


def wanted(dY: Tensor, B: Tensor, S: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    dY, B, S = dY.double(), B.double(), S.double()
    return scaling * dY @ B, scaling * dY.t() @ S


def error(value: Tensor, reference: Tensor) -> float:
    """The largest difference, over the largest entry."""
    return ((value.double() - reference).abs().max() / reference.abs().max()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rank", [1, 3, 8, 16, 33, 64, 100, 256])
def test_both_products_for_any_rank(kernels: ModuleType, rank: int, dtype: torch.dtype) -> None:
    """dS to its dtype's rounding (the interpreter cuts bf16 off), dB to that of fp32 sums."""
    dY, B, S = (torch.randn(s, dtype=dtype, device=DEVICE) for s in ((150, 300), (300, rank), (150, rank)))
    dS, dB = kernels.dS_and_dB(dY, B, S, 0.7)
    dS_wanted, dB_wanted = wanted(dY, B, S, 0.7)
    assert (dS.dtype, dB.dtype) == (dtype, torch.float32)
    assert error(dS, dS_wanted) < 2 * torch.finfo(dtype).eps + 1e-6
    assert error(dB, dB_wanted) < 1e-5


@pytest.mark.parametrize(
    ("tokens", "out"), [(1, 1), (1, 600), (63, 64), (64, 255), (65, 257), (700, 40), (2100, 33)], ids=str
)
def test_both_products_for_ragged_sizes(kernels: ModuleType, tokens: int, out: int) -> None:
    dY, B, S = (torch.randn(s, device=DEVICE) for s in ((tokens, out), (out, 5), (tokens, 5)))
    for value, reference in zip(kernels.dS_and_dB(dY, B, S, 2.0), wanted(dY, B, S, 2.0), strict=True):
        assert error(value, reference) < 1e-5


def test_views_of_any_strides(kernels: ModuleType) -> None:
    """Row blocks are columns of dY and of S; a B may be a transposed view."""
    dY, S = torch.randn(70, 90, device=DEVICE)[:, 11:71], torch.randn(70, 30, device=DEVICE)[:, 4:11]
    B = torch.randn(7, 60, device=DEVICE).t()
    for value, reference in zip(kernels.dS_and_dB(dY, B, S, 1.0), wanted(dY, B, S, 1.0), strict=True):
        assert error(value, reference) < 1e-5


def test_no_tokens_give_zeros(kernels: ModuleType) -> None:
    dS, dB = kernels.dS_and_dB(*(torch.ones(s, device=DEVICE) for s in ((0, 6), (6, 2), (0, 2))), 1.0)
    assert dS.shape == (0, 2) and torch.equal(dB, torch.zeros_like(dB))


def test_the_same_bits_twice(kernels: ModuleType) -> None:
    dY, B, S = (torch.randn(s, device=DEVICE) for s in ((500, 520), (520, 16), (500, 16)))
    first, second = (kernels.dS_and_dB(dY, B, S, 1.0) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_no_number_outside_the_matrices_counts(kernels: ModuleType) -> None:
    """What lies beside the views in memory is not read, or not used: it is NaN here."""
    whole = [torch.full((200, 300), torch.nan, device=DEVICE) for _ in range(3)]
    dY, B, S = whole[0][3:73, 5:65], whole[1][2:62, 1:8], whole[2][9:79, 4:11]
    for view in (dY, B, S):
        view.normal_()
    for value, reference in zip(kernels.dS_and_dB(dY, B, S, 1.0), wanted(dY, B, S, 1.0), strict=True):
        assert error(value, reference) < 1e-5


@pytest.mark.parametrize("anchored", [False, True], ids=["plain", "anchored"])
def test_the_product_takes_it_where_it_suits(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, anchored: bool
) -> None:
    """Switched on, and told that it suits, backward gives the gradients that it gives when off."""
    x, weight = torch.randn(40, 24, device=DEVICE, requires_grad=True), torch.randn(50, 24, device=DEVICE)
    A, A0 = (torch.randn(4, 24, device=DEVICE, requires_grad=True) for _ in range(2))
    B, B0 = (torch.randn(30, 4, device=DEVICE, requires_grad=True) for _ in range(2))
    anchor = (A0.detach(), B0.detach()) if anchored else (None, None)
    calls = []

    def suits(dY: Tensor, rank: int) -> bool:
        calls.append((tuple(dY.shape), rank))
        return True

    def gradients() -> tuple[Tensor, ...]:
        y = fused_lora(x, weight, None, [Block((10, 40), A, B, 1.5, *anchor)])
        return torch.autograd.grad(y.sin().sum(), (x, A, B))

    reference = gradients()
    monkeypatch.setattr(kernels, "suits", suits)
    gemm.one_pass(True)
    try:
        got = gradients()
    finally:
        gemm.one_pass(False)
    assert calls == [((40, 30), 8 if anchored else 4)]
    for value, plain in zip(got, reference, strict=True):
        torch.testing.assert_close(value, plain, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(gradients(), reference, strict=True)) and len(calls) == 1


def test_it_suits_only_where_it_moves_fewer_bytes(kernels: ModuleType) -> None:
    """On CUDA, in half precision, with many tokens and a small rank."""

    class OnCuda:
        is_cuda = True

        def __init__(self, tokens: int, out: int, dtype: torch.dtype = torch.bfloat16) -> None:
            self.shape, self.dtype, self.element_size = (tokens, out), dtype, lambda: dtype.itemsize

    assert not kernels.suits(torch.ones(8192, 4096, dtype=torch.bfloat16, device="meta"), 16)
    assert kernels.suits(OnCuda(8192, 4096), 16) and kernels.suits(OnCuda(8192, 4096), 32)
    assert not kernels.suits(OnCuda(8192, 4096), 64) and not kernels.suits(
        OnCuda(8192, 4096, torch.float32), 16
    )
    assert not kernels.suits(OnCuda(0, 4096), 16) and not kernels.suits(OnCuda(64, 4096), 16)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("rank", [1, 8, 32, 64, 256])
def test_it_compiles_for_an_H100_without_one(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into tensor-core instructions, and into the shared memory that there is."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    module = importlib.import_module(NAME)
    monkeypatch.delitem(sys.modules, NAME)
    tiles, names = module.Tiles(8192, 4096, rank), module._parts_kernel.arg_names
    fixed = {"ROWS": tiles.rows, "COLUMNS": tiles.columns, "RANK": tiles.rank, "WIDEN": False}
    fixed |= {"dY_column": 1, "B_column": 1, "S_column": 1}
    fixed |= {"tokens": 1, "out": 1, "rank": 1} if rank == 1 else {}  # Triton takes a 1 as a constant
    types = {"dY": "*bf16", "B": "*bf16", "S": "*bf16", "dS_parts": "*fp32", "dB_parts": "*fp32"}
    signature = {name: "constexpr" if name in fixed else types.get(name, "i32") for name in names}
    source = ASTSource(
        module._parts_kernel,
        signature,
        constexprs={(names.index(name),): value for name, value in fixed.items()},
        attrs={
            (names.index(name),): [["tt.divisibility", 16]] for name in (*types, "dY_row", "B_row", "S_row")
        },
    )
    options = {"num_warps": tiles.warps}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert "wgmma" in compiled.asm["ptx"]
    assert compiled.metadata.shared <= 227 * 1024
