"""What would make a training step smaller and leave what it computes alone, as changes that can be tried."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_iter, tree_map_only

from lowrank.train.memory_table import MemoryReport

Change = Callable[[nn.Module], object]


def with_helps(report: MemoryReport, tries: Iterable[tuple[str, Callable[[], MemoryReport]]]) -> MemoryReport:
    """``report``, with the peaks of what is smaller where it does not fit; else nothing is tried."""
    if report.fits:
        return report
    peaks = ((what, attempt().peak) for what, attempt in tries)
    return replace(report, helps=tuple((what, peak) for what, peak in peaks if peak < report.peak))


def lighter(model: nn.Module, batch: Any) -> Iterator[tuple[str, Any, Change | None]]:
    """What it is, the batch that the model gets then, and how the model is changed."""
    on = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    if _checkpointing(model) is not None and not on:
        yield "gradient checkpointing", batch, checkpointed
    count = _examples(batch)
    for size in dict.fromkeys((count // 2, 1)):
        if 1 <= size < count:
            times = -(-count // size)
            smaller = tree_map_only(Tensor, partial(_first, count=size), batch)
            yield f"batches of {size}, {'two' if times == 2 else times} for a step", smaller, None


def checkpointed(model: nn.Module) -> None:
    """Switches gradient checkpointing on in a stand-in of a model."""
    enable = _checkpointing(model)
    assert enable is not None
    # What dropout draws does not matter here, and stand-ins have no state of a generator to keep.
    enable({"use_reentrant": False, "preserve_rng_state": False})


def _checkpointing(model: nn.Module) -> Callable[..., Any] | None:
    """What switches gradient checkpointing on in a model of transformers, by its newer and its older name."""
    newer = getattr(model, "activation_checkpointing_enable", None)
    return newer or getattr(model, "gradient_checkpointing_enable", None)


def _examples(batch: Any) -> int:
    """How many examples a batch has along the first dimension of all its tensors; 0 where they differ."""
    sizes = {t.shape[0] for t in tree_iter(batch) if isinstance(t, Tensor) and t.dim()}
    return sizes.pop() if len(sizes) == 1 else 0


def _first(tensor: Tensor, count: int) -> Tensor:
    return tensor[:count] if tensor.dim() else tensor
