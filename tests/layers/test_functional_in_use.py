"""The fused product inside what training puts around it: autocast, the compiler, checkpointing, processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from lowrank.layers.functional import Block, add_lora, fused_lora
from tests.helpers import numbers

WIDTH, RANK = 32, 4

# The compiler itself makes an instance of autograd's Function and uses torch.jit, and is warned of both.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")

ROWS = {
    "blocks": [(0, WIDTH // 2), (WIDTH // 2, WIDTH)],
    "interleaved": [(0, WIDTH - 2, 2, 4), (2, WIDTH, 2, 4)],
}


class Layer(nn.Module):
    """A frozen square projection, with two row blocks of which the second is anchored."""

    def __init__(
        self,
        *,
        rows: str = "blocks",
        dropout: float = 0.0,
        called: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.rows = ROWS[rows]
        self.base = nn.Linear(WIDTH, WIDTH, dtype=dtype).requires_grad_(False)
        self.A, self.A1 = (nn.Parameter(torch.randn(RANK, WIDTH) / WIDTH**0.5) for _ in range(2))
        self.B, self.B1 = (nn.Parameter(torch.randn(WIDTH // 2, RANK)) for _ in range(2))
        self.register_buffer("A0", torch.randn(RANK, WIDTH))
        self.register_buffer("B0", torch.randn(WIDTH // 2, RANK))
        self.dropout, self.called = dropout, called

    def forward(self, x: Tensor) -> Tensor:
        blocks = [
            Block(self.rows[0], self.A, self.B, 0.5),
            Block(self.rows[1], self.A1, self.B1, 2.0, self.A0, self.B0),
        ]
        dropout = self.dropout if self.training else 0.0
        if self.called:
            return add_lora(self.base(x), x, blocks, dropout=dropout)
        return fused_lora(x, self.base.weight, self.base.bias, blocks, dropout=dropout)

    def plain(self, x: Tensor) -> Tensor:
        """The same by ordinary operations, in fp64."""
        delta = 0.5 * self.B.double() @ self.A.double()
        delta1 = (self.B0 + self.B1).double() @ (
            self.A0 + self.A1
        ).double() - self.B0.double() @ self.A0.double()
        order = torch.tensor([*numbers(self.rows[0]), *numbers(self.rows[1])])
        weight = self.base.weight.double().index_add(0, order, torch.cat((delta, 2.0 * delta1)))
        return F.linear(x.double(), weight, self.base.bias.double())


@pytest.fixture(autouse=True)
def forget_compiled_code() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def step(layer: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """Output and gradients of one training step."""
    x = x.detach().requires_grad_()
    y = run(x)
    wanted = [p for p in layer.parameters() if p.requires_grad]
    return [y.detach(), *torch.autograd.grad(y.square().mean(), [x, *wanted])]


def assert_same(got: list[Tensor], wanted: list[Tensor], tolerance: float = 1e-5) -> None:
    """The same values, to `tolerance` of the largest."""
    for ours, reference in zip(got, wanted, strict=True):
        error = (ours.double() - reference.double()).abs().max()
        assert error <= tolerance * reference.double().abs().max()


def test_one_module_twice_in_one_graph() -> None:
    layer, x = Layer(), torch.randn(5, WIDTH)
    assert_same(
        step(layer, lambda x: layer(layer(x)), x),
        step(layer, lambda x: layer.plain(layer.plain(x)), x),
    )


@pytest.mark.parametrize("called", [False, True], ids=["fused", "added"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_runs_in_its_dtype(called: bool, dtype: torch.dtype) -> None:
    """As F.linear would, also where backward runs inside autocast, or runs inside it alone."""
    layer, x = Layer(called=called, dtype=dtype), torch.randn(5, WIDTH, dtype=dtype)
    reference = step(layer, layer.plain, x)
    for forward, backward in ((True, False), (True, True), (False, True)):
        z = x.detach().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=forward):
            y = layer(z)
        assert y.dtype == (torch.bfloat16 if forward else dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=backward):
            leaves = [z, *(p for p in layer.parameters() if p.requires_grad)]
            grads = torch.autograd.grad(y.float().square().mean(), leaves)
        assert [g.dtype for g in grads] == [leaf.dtype for leaf in leaves]
        assert_same([y, *grads], reference, 0.03)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_recomputes_the_same(reentrant: bool, dropout: float) -> None:
    layer, x = Layer(dropout=dropout), torch.randn(5, WIDTH)
    recomputed = partial(checkpoint, layer, use_reentrant=reentrant)
    outcomes = []
    for run in (layer, recomputed):
        torch.manual_seed(3)
        layer.zero_grad()
        z = x.clone().requires_grad_()
        y = run(z)
        y.square().mean().backward()
        outcomes.append([y.detach(), z.grad, *(p.grad for p in layer.parameters() if p.grad is not None)])
    assert len(outcomes[0]) == 6
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("called", [False, True], ids=["fused", "added"])
def test_compiled_whole_and_once(called: bool, rows: str) -> None:
    """No graph break, and no new compilation from step to step while the parameters change."""
    layer = Layer(called=called, rows=rows)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for _ in range(4):
        x = torch.randn(2, 5, WIDTH)
        assert_same(step(layer, compiled, x), step(layer, layer, x))
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.add_(0.01)
    assert counter.frame_count == 1


@pytest.mark.parametrize("rows", ROWS)
def test_compiled_for_several_lengths_and_with_autocast(rows: str) -> None:
    layer = Layer(rows=rows)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter, dynamic=True)
    counts = []
    for tokens in (3, 8, 21):
        x = torch.randn(2, tokens, WIDTH)
        assert_same(step(layer, compiled, x), step(layer, layer, x))
        counts.append(counter.frame_count)
    assert counts == counts[:1] * 3
    with torch.autocast("cpu", torch.bfloat16):
        got, wanted = step(layer, compiled, x), step(layer, layer, x)
    assert got[0].dtype == torch.bfloat16
    assert_same(got, wanted, 0.02)


def test_compiled_dropout_hides_its_share() -> None:
    layer = Layer(dropout=0.5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.ones(1, WIDTH)
    outputs = torch.stack([compiled(x).detach() for _ in range(400)])
    assert outputs.std(0).min() > 0
    layer.eval()
    deviation = outputs.std(0) / 400**0.5
    assert ((outputs.mean(0) - layer(x)).abs() < 5 * deviation).all()


@pytest.mark.slow
@pytest.mark.parametrize("rows", ROWS)
def test_inductor_accumulates_in_place(rows: str) -> None:
    """Compiled code has no addmm that first copies what it accumulates onto: only that of the base's bias."""
    layer, x = Layer(rows=rows), torch.randn(16, WIDTH)
    compiled = torch.compile(layer, fullgraph=True)
    got, code = run_and_get_code(step, layer, compiled, x)
    assert_same(got, step(layer, layer, x))
    text = "\n".join(code)
    assert text.count("torch.ops.lowrank.addmm_.default(") == 3
    assert text.count("beta=1, out=") == 1


@pytest.mark.gpu
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_captured_in_a_cuda_graph(dropout: float, rows: str) -> None:
    layer, x = (
        Layer(dropout=dropout, rows=rows).cuda(),
        torch.randn(16, WIDTH, device="cuda", requires_grad=True),
    )
    wanted = step(layer, layer, x)
    captured = torch.cuda.make_graphed_callables(layer, (x,))
    got = [each.clone() for each in step(layer, captured, x)]  # the next replay writes into the same memory
    if dropout:
        assert not torch.equal(got[0], step(layer, captured, x)[0])  # each replay draws its own mask
    else:
        assert_same(got, wanted)


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Layer(), nn.Tanh(), Layer())


def data_parallel_grads(x: Tensor) -> list[Tensor]:
    model = nn.parallel.DistributedDataParallel(two_layers())
    model(x).square().mean().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def sharded_grads(x: Tensor) -> list[Tensor]:
    model = two_layers()
    mesh = init_device_mesh("cpu", (2,))
    for module in (model[0], model[2], model):
        fully_shard(module, mesh=mesh)
    for _ in range(2):
        model.zero_grad()
        model(x).square().mean().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return [grad.full_tensor() for grad in grads]  # type: ignore[attr-defined]


def half_of_the_batch(rank: int, folder: str) -> None:
    """One of two processes: its gradients, averaged with the other's, are those of the whole batch."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    reference, x = two_layers(), torch.randn(8, WIDTH)
    reference(x).square().mean().backward()
    wanted = [p.grad for p in reference.parameters() if p.grad is not None]
    for averaged in (data_parallel_grads, sharded_grads):
        assert_same(averaged(x[rank * 4 :][:4]), wanted)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # an orderly exit sometimes aborts: torch's threads outlive the interpreter


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available() or os.name == "nt", reason="needs gloo")
def test_two_processes_agree_with_one(tmp_path: Path) -> None:
    mp.spawn(half_of_the_batch, args=(str(tmp_path),), nprocs=2)
