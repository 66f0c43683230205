"""Runs a function in two processes that meet by gloo, with a limit in time."""

from __future__ import annotations

import faulthandler
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

WORLD = 2


def together(
    function: Callable[..., Any], folder: Path, *arguments: Any, world: int = WORLD, timeout: float = 150
) -> list[Any]:
    """``function(rank, *arguments)`` in each process; their results by rank. Raises what one raised."""
    folder.mkdir(parents=True, exist_ok=True)
    spawned = torch.multiprocessing.spawn(
        _process, (function, str(folder), world, arguments), nprocs=world, join=False
    )
    ends = time.monotonic() + timeout
    try:
        while not spawned.join(timeout=1):
            if time.monotonic() > ends:
                for process in spawned.processes:
                    process.kill()
                raise TimeoutError(f"{function.__name__} was not done after {timeout} s")
    except torch.multiprocessing.ProcessExitedException as error:
        said = [f"rank {rank}:\n{(folder / f'died-{rank}').read_text()}" for rank in range(world)]
        raise RuntimeError("\n".join([str(error), *said])) from error
    return [torch.load(folder / f"result-{rank}.pt", weights_only=False) for rank in range(world)]


def _process(
    rank: int, function: Callable[..., Any], folder: str, world: int, arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    died = open(f"{folder}/died-{rank}", "w")
    os.dup2(died.fileno(), 2)
    faulthandler.enable(died)
    dist.init_process_group("gloo", rank=rank, world_size=world, init_method=f"file://{folder}/meet")
    result = function(rank, *arguments)
    torch.save(result, f"{folder}/result-{rank}.pt")
    dist.barrier()
    os._exit(0)  # gloo's threads may be in the interpreter while it ends, and then abort


def sharded(model: nn.Module, ignored: set[nn.Parameter] | None = None) -> nn.Module:
    """``model`` sharded by FSDP2 over all processes: each block of layers, then the whole."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    lists = [module for path, module in model.named_modules() if path.endswith((".layer", ".layers"))]
    for layer in (layer for module in lists for layer in module.children()):
        fully_shard(layer, mesh=mesh, ignored_params=ignored)
    return fully_shard(model, mesh=mesh, ignored_params=ignored)


def refusal(act: Callable[[], Any]) -> tuple[str, str]:
    """What ``act`` raises: the class's name and the message."""
    try:
        act()
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing", ""
