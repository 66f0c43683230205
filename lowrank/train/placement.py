"""Tensors of a batch that are not where the model is, in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.batches import model_device, to_device


class MisplacedBatch(ValueError):
    """A batch has tensors on another device than the model, and could not be moved there."""


@contextmanager
def placed(model: nn.Module, batch: Any, place: int) -> Iterator[None]:
    """Around what computes the loss of ``batch``, the one at ``place`` in its epoch.

    Where that raises RuntimeError, as PyTorch does for tensors on two devices, and the batch as `to_device`
    moved it has tensors elsewhere, MisplacedBatch names them instead. A loss may move them itself.
    """
    try:
        yield
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except RuntimeError as error:
        device = model_device(model)
        moved = to_device(batch, device)
        kind = type(batch).__name__
        for name, tensor in tensors(moved, kind):
            said = any(word in str(error) for word in ("device", device.type, tensor.device.type))
            if said and tensor.device != device:
                raise MisplacedBatch(
                    f"batch {place} of its epoch: {name} is on {tensor.device} and the model is on {device}: "
                    f"give {kind} a method to(device) that returns it moved, or move it in loss=; the loss "
                    f"failed with: {error}"
                ) from error
        raise


def tensors(value: Any, name: str, depth: int = 4) -> Iterator[tuple[str, Tensor]]:
    """Each tensor in ``value``, a container or an object with attributes, by how one writes it."""
    if isinstance(value, Tensor):
        yield name, value
        return
    if depth == 0:
        return
    if isinstance(value, Mapping):
        parts = [(f"{name}[{key!r}]", each) for key, each in value.items()]
    elif isinstance(value, list | tuple):
        parts = [(f"{name}[{i}]", each) for i, each in enumerate(value)]
    else:
        slots = [slot for cls in type(value).__mro__ for slot in getattr(cls, "__slots__", ())]
        held = {slot: getattr(value, slot, None) for slot in slots} | getattr(value, "__dict__", {})
        parts = [(f"{name}.{key}", each) for key, each in held.items()]
    for inner, each in parts:
        yield from tensors(each, inner, depth - 1)
