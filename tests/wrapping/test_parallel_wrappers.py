"""Models inside parallel wrappers are refused before they are adapted; adapted ones work inside of them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

import lowrank
from lowrank import presets
from lowrank.layers.weight import AdaptedWeight
from tests import zoo
from tests.helpers import logits, perturb

replication: Any = sys.modules["torch.nn.parallel.replicate"]  # the function has the module's name

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:torch"),  # FSDP1 is on its way out
    pytest.mark.filterwarnings("ignore:.*FSDP"),
    pytest.mark.filterwarnings("ignore:.*NO_SHARD"),
]


@pytest.fixture(scope="module")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One process, by itself."""
    meet = tmp_path_factory.mktemp("group") / "meet"
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded_tensor(model: nn.Module) -> nn.Module:
    layer = next(m for m in model.modules() if isinstance(m, nn.Linear))
    mesh = init_device_mesh("cpu", (1,))
    layer.weight = nn.Parameter(distribute_tensor(layer.weight.data, mesh, [Shard(0)]))
    return model


WRAPPERS: dict[str, tuple[Callable[[nn.Module], nn.Module], str]] = {
    "DDP": (nn.parallel.DistributedDataParallel, "is wrapped in DistributedDataParallel"),
    "DataParallel": (nn.DataParallel, "is wrapped in DataParallel"),
    "FSDP1": (
        lambda m: FullyShardedDataParallel(m, device_id=torch.device("cpu"), use_orig_params=True),
        "is wrapped in FullyShardedDataParallel",
    ),
    "FSDP2": (lambda m: fully_shard(m, mesh=init_device_mesh("cpu", (1,))), "is wrapped in FSDPModule"),
    "DTensor": (sharded_tensor, "is sharded .a DTensor.: adapt the model first"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An adapter of the small BERT in both formats."""
    root = tmp_path_factory.mktemp("adapters")
    model = lowrank.wrap_model(zoo.build("bert"), presets.lora(rank=2), progress=False)
    lowrank.save_adapter(model, root / "ours")
    lowrank.export_peft(model, root / "peft")
    return root / "ours", root / "peft"


@pytest.mark.parametrize("where", ["model", "child"])
@pytest.mark.parametrize("kind", WRAPPERS)
def test_what_is_parallel_already_is_refused(
    kind: str, where: str, folders: tuple[Path, Path], process_group: None
) -> None:
    wrap, message = WRAPPERS[kind]
    model = zoo.build("bert")
    if where == "model":
        model = wrap(model)
        message = message if kind == "DTensor" else f"the model {message}"
    else:
        model.bert.encoder = wrap(model.bert.encoder)
        message = rf"bert\.encoder.*{message}"
    acts: list[Callable[[], Any]] = [
        lambda: lowrank.plan_model(model, presets.lora(rank=2)),
        lambda: lowrank.wrap_model(model, presets.lora(rank=2), progress=False),
        lambda: lowrank.load_adapter(model, folders[0]),
        lambda: lowrank.import_peft(model, folders[1]),
    ]
    for act in acts:
        with pytest.raises(ValueError, match=message):
            act()
    assert not any("adapters" in name for name, _ in model.named_parameters())


def test_an_adapted_model_goes_into_them(process_group: None) -> None:
    batch = zoo.batch("bert")
    for kind in ("DDP", "FSDP2"):
        model = perturb(lowrank.wrap_model(zoo.build("bert"), presets.lora(rank=2), progress=False))
        model(**batch).loss.backward()
        wanted = [p.grad.clone() for p in lowrank.adapter_parameters(model)]
        model.zero_grad()
        inside = WRAPPERS[kind][0](model)
        inside(**batch).loss.backward()
        for p, gradient in zip(lowrank.adapter_parameters(model), wanted, strict=True):
            got = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad  # type: ignore[union-attr]
            torch.testing.assert_close(got, gradient)


@pytest.mark.parametrize("family", ["torch_encoder", "mixtral", "mamba", "bert"])
def test_replicas_of_data_parallel(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`nn.DataParallel` sets copies of the parameters as plain attributes; here without two GPUs."""

    def copies(tensors: list[Tensor], devices: list[int], detach: bool = False) -> list[list[Tensor]]:
        return [[tensor.detach() if detach else tensor * 1 for tensor in tensors] for _ in devices]

    monkeypatch.setattr(replication, "_get_device_index", lambda device, optional: device)
    monkeypatch.setattr(replication, "_broadcast_coalesced_reshape", copies)
    model, batch = zoo.build(family), zoo.batch(family)
    perturb(lowrank.wrap_model(model, presets.pissa(rank=2), progress=False))
    with torch.enable_grad():
        wanted = model(**batch)
        gradients = torch.autograd.grad(
            wanted.loss, list(lowrank.adapter_parameters(model)), allow_unused=True
        )
        replicas = replication.replicate(model, [0, 1])
        assert any(isinstance(m, AdaptedWeight) for m in model.modules()) == (family != "bert")
        for replica in replicas:
            output = replica(**batch)
            torch.testing.assert_close(output.logits, wanted.logits)
            got = torch.autograd.grad(output.loss, list(lowrank.adapter_parameters(model)), allow_unused=True)
            torch.testing.assert_close(got, gradients)
    torch.testing.assert_close(logits(model, batch), wanted.logits.detach())
