"""What a projection dispatches, and what the compiler makes of a step: gates that read no clock."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import lowrank
from lowrank import presets
from lowrank.layers.functional import fused_lora
from tests.helpers import perturb
from tests.layers.test_functional import IN, OUT, Count, make_blocks

SILENT = ("randn", "div", "mul", "new_empty", "empty_like", "detach", "_unsafe_view", "ones_like")


def launches(count: Count) -> int:
    return sum(times for name, times in count.counter.items() if name not in SILENT)


@pytest.mark.parametrize(
    ("layout", "train_A", "dtype", "forward", "backward"),
    [
        ("one", True, torch.float32, 3, 6),
        ("one", False, torch.float32, 3, 5),
        ("anchored", True, torch.float32, 6, 7),
        ("one", True, torch.bfloat16, 5, 7),
        ("one", False, torch.bfloat16, 5, 5),
        ("anchored", True, torch.bfloat16, 8, 8),
    ],
)
def test_operations_of_a_step(
    layout: str, train_A: bool, dtype: torch.dtype, forward: int, backward: int
) -> None:
    """PEFT takes 5 and 7 in fp32, and in bf16 5 and 7 without fp32 masters, 7 and 10 with them."""
    (block,) = make_blocks(layout)
    block.A.requires_grad_(train_A)
    x = torch.randn(100, IN, dtype=dtype, requires_grad=True)
    weight = torch.randn(OUT, IN, dtype=dtype)
    with Count() as count:
        y = fused_lora(x, weight, None, [block])
    assert launches(count) <= forward, count.counter
    dY = torch.ones_like(y)
    with Count() as count:
        y.backward(dY)
    assert launches(count) <= backward, count.counter


POLICIES = {name: getattr(presets, name)(rank=2) for name in ("lora", "pissa", "milora", "olora")}


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # its own, of instances of Function
@pytest.mark.parametrize("preset", POLICIES)
def test_a_step_compiles_whole_and_once_for_all_lengths(preset: str) -> None:
    """No graph break, and after the second length no compilation: forward, backward, and without grad."""
    torch.compiler.reset()
    net = nn.Sequential(nn.Linear(IN, OUT), nn.GELU(), nn.Linear(OUT, IN)).requires_grad_(False)
    perturb(lowrank.wrap_model(net, POLICIES[preset], progress=False))
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(net, backend=counter, fullgraph=True)
    for length in (3, 5, 6, 7, 11, 13):
        x = torch.randn(2, length, IN)
        wanted = torch.autograd.grad(net(x).square().sum(), factors(net))
        for ours, reference in zip(
            torch.autograd.grad(step(x).square().sum(), factors(net)), wanted, strict=True
        ):
            torch.testing.assert_close(ours, reference)
    assert counter.frame_count <= 2
    for length in (3, 5, 6, 7, 11, 13):
        x = torch.randn(2, length, IN)
        with torch.no_grad():
            torch.testing.assert_close(step(x), net(x))
    assert counter.frame_count <= 4


def factors(net: nn.Module) -> list[Tensor]:
    return [parameter for parameter in net.parameters() if parameter.requires_grad]
