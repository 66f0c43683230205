"""What depends on what inside a block, by gradients: a copy of it is run on a few numbers.

Each linear layer of the copy gives its output cut off from what lies before it, so that a gradient reaches
only the layers whose outputs are used directly, through no other linear layer. What follows from that for
roles is in `consumers`. The block itself is never run, and nothing of it changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from lowrank.models.copies import copied
from lowrank.models.storage import is_linear

NOTHING = 1e-10  # of the largest gradient, in fp64
CPU = torch.device("cpu")  # where a wrong guess, such as an index out of range, does no harm

Call = Callable[[nn.Module], Any]  # calls a copy of a block, with the same numbers each time
Scales = Mapping[str, Tensor]  # by layer: a factor for each row of its output, (rows,)


@dataclass
class Run:
    """One run of a copy.

    Args:
        outputs: of each linear layer that was called once, a leaf of the graph, ``(..., rows)``.
        seen: what each inner module was called with first, by its path, and at last what the block gave.
    """

    outputs: dict[str, Tensor] = field(default_factory=dict)
    seen: list[tuple[str, Tensor]] = field(default_factory=list)

    def gradients(self, place: int) -> dict[str, Tensor]:
        """How the last position of ``seen[place]`` depends on each output, ``(positions, rows)``."""
        _, tensor = self.seen[place]
        if not tensor.requires_grad:
            return {}
        draw = torch.Generator().manual_seed(1)
        weights = torch.zeros_like(tensor)
        weights.flatten(0, -2)[-1] = torch.randn(tensor.shape[-1], generator=draw, dtype=tensor.dtype)
        found = torch.autograd.grad(
            tensor,
            list(self.outputs.values()),
            weights,
            retain_graph=True,
            allow_unused=True,
        )
        return {
            name: gradient.flatten(0, -2)
            for name, gradient in zip(self.outputs, found, strict=True)
            if gradient is not None
        }


@dataclass(frozen=True)
class Trial:
    """A block that can be run as often as needed: a copy in fp64 with random numbers, and how to call it."""

    copy: nn.Module
    call: Call

    def run(self, scales: Scales | None = None) -> Run:
        """One run, with outputs multiplied by ``scales``. Raises what the code raises."""
        watch, handles = _Watch(self.copy, scales or {}), []
        for path, module in self.copy.named_modules():
            if path and (is_linear(module) or not any(module.children())):
                handles += watch.hooked(path, module)
        try:
            with torch.enable_grad(), watch:
                given = self.call(self.copy)
        finally:
            for handle in handles:
                handle.remove()
        watch.run.seen += [("", tensor) for tensor in tensors(given) if _usable(tensor)][:2]
        return watch.run


class _Watch(TorchFunctionMode):
    """Notes what layers are called with, and cuts off their outputs, also where only weights are used."""

    def __init__(self, copy: nn.Module, scales: Scales) -> None:
        super().__init__()
        self.run, self.scales, self.twice = Run(), scales, set[str]()
        self.inside = False
        self.weights = {id(m.weight): path for path, m in copy.named_modules() if path and is_linear(m)}
        self.linear = set(self.weights.values())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        y = func(*args, **(kwargs or {}))
        if func is nn.functional.linear and not self.inside:
            said = dict(zip(("input", "weight"), args, strict=False)) | (kwargs or {})
            if path := self.weights.get(id(said["weight"])):
                self.before(path, said["input"])
                return self.after(path, y)
        return y

    def hooked(self, path: str, module: nn.Module) -> list[RemovableHandle]:
        linear = path in self.linear

        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            self.inside = linear
            if args:
                self.before(path, args[0])

        def after(module: nn.Module, args: tuple[Any, ...], y: Any) -> Any:
            self.inside = False
            return self.after(path, y) if linear else y

        return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]

    def before(self, path: str, x: Any) -> None:
        seen = self.run.seen
        again = bool(seen) and x is seen[-1][1] and path not in self.linear
        if _usable(x) and not again:  # a dropout that does nothing
            seen.append((path, x))

    def after(self, path: str, y: Any) -> Any:
        if not _usable(y):
            return y
        if path in self.run.outputs or path in self.twice:
            self.twice.add(path)
            self.run.outputs.pop(path, None)
            return y.detach()
        leaf = y.detach() * self.scales[path] if path in self.scales else y.detach().clone()
        self.run.outputs[path] = leaf.requires_grad_()
        return leaf * 1  # may be written into


def tensors(given: Any) -> Iterator[Tensor]:
    """The tensors in ``given``: itself, or those of a mapping or a sequence, at any depth."""
    if isinstance(given, Tensor):
        yield given
    elif isinstance(given, Mapping):
        for value in given.values():
            yield from tensors(value)
    elif isinstance(given, (list, tuple)):
        for value in given:
            yield from tensors(value)


def refilled(block: nn.Module) -> Any:
    """A copy of ``block`` on the CPU in fp64: weights random, the same each time, and no biases.

    Tables stay as they are. What is zero then stays zero in a normalization, which has seen nothing yet.
    Raises NoCopyError where ``block`` has no copy.
    """
    draw = torch.Generator().manual_seed(0)

    def new(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.to(CPU, copy=True)
        if not isinstance(tensor, nn.Parameter):
            return tensor.to(CPU, torch.float64, copy=True)
        size = tensor.shape[-1] if tensor.dim() > 1 else 1
        numbers = torch.randn(tensor.shape, generator=draw, dtype=torch.float64)
        return numbers / max(1, size) ** 0.5

    copy = copied(block, new, CPU)
    for name, tensor in [*copy.named_parameters(), *copy.named_buffers()]:
        if tensor.dim() == 1 and name.rpartition(".")[2].endswith(("bias", "running_mean")):
            tensor.zero_()
        elif name.endswith("running_var"):
            tensor.fill_(1)
    return copy


def live(gradient: Tensor, largest: float) -> Tensor:
    """Where it is more than nothing, beside the ``largest`` of all gradients."""
    return gradient.abs() > NOTHING * largest


def _usable(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() >= 2 and value.numel() > 0
