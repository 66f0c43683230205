"""What depends on what inside a block: a copy of it is run on a few numbers, and gradients say the rest.

Each linear layer of the copy gives its output cut off from what lies before it, so that a gradient reaches only
the layers whose outputs are used directly, through no other linear layer. What follows from that for roles is in
`consumers`. The block itself is never run, and nothing of it changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.models.storage import is_linear
from lowrank.models.trials import copied, is_plain

NOTHING = 1e-10  # of the largest gradient, in fp64

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
        weights = torch.zeros(tensor.shape, dtype=tensor.dtype)
        weights.flatten(0, -2)[-1] = torch.randn(tensor.shape[-1], generator=draw, dtype=tensor.dtype)
        found = torch.autograd.grad(
            tensor,
            list(self.outputs.values()),
            weights.to(tensor.device),
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
        """One run, the outputs of the layers in ``scales`` multiplied by these. Raises what the code raises."""
        run, handles, twice = Run(), [], set()

        def before(path: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
                if args and _usable(args[0]) and args[0] is not (run.seen[-1][1] if run.seen else None):
                    run.seen.append((path, args[0]))

            return hook

        def after(path: str) -> Callable[..., Any]:
            def hook(module: nn.Module, args: tuple[Any, ...], y: Any) -> Any:
                if not _usable(y):
                    return y
                if path in run.outputs or path in twice:
                    twice.add(path)
                    run.outputs.pop(path, None)
                    return y.detach()
                leaf = y.detach() * scales[path] if scales and path in scales else y.detach().clone()
                run.outputs[path] = leaf.requires_grad_()
                return leaf * 1  # may be written into

            return hook

        for path, module in self.copy.named_modules():
            if path and (is_linear(module) or not any(module.children())):
                handles.append(module.register_forward_pre_hook(before(path)))
            if path and is_linear(module):
                handles.append(module.register_forward_hook(after(path)))
        try:
            with torch.enable_grad():
                given = self.call(self.copy)
        finally:
            for handle in handles:
                handle.remove()
        run.seen += [("", tensor) for tensor in tensors(given) if _usable(tensor)][:2]
        return run


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


def can_be_copied(block: nn.Module) -> bool:
    """Are its numbers stored as they are: not quantized, sharded, or on the meta device?"""
    held = [*block.parameters(), *block.buffers()]
    return all(
        is_plain(tensor) or not (tensor.is_floating_point() or tensor.is_complex() or tensor.is_meta)
        for tensor in held
    )


def refilled(block: nn.Module) -> Any:
    """A copy of ``block`` in fp64: parameters random, the same each time, and buffers as they are."""
    draw = torch.Generator().manual_seed(0)

    def new(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.clone()
        if not isinstance(tensor, nn.Parameter):
            return tensor.double()
        size = tensor.shape[-1] if tensor.dim() > 1 else 1
        numbers = torch.randn(tensor.shape, generator=draw, dtype=torch.float64)
        return (numbers / max(1, size) ** 0.5).to(tensor.device)

    return copied(block, new)


def live(gradient: Tensor, largest: float) -> Tensor:
    """Where it is more than nothing, beside the ``largest`` of all gradients."""
    return gradient.abs() > NOTHING * largest


def _usable(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() >= 2 and value.numel() > 0
