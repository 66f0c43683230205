"""How an inner module may be called of which nothing is known: guesses, by what its forward takes.

It looks at signatures, widths and buffers, and calls nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from itertools import islice, product
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.models.storage import declared_shape, is_linear

HEIGHT, WIDTH = 2, 3
TOKENS = HEIGHT * WIDTH
ATTEMPTS = 16
TENSORS = 3
# What arguments of these names say beside the tensors: the sides of the image that the tokens are.
SIDES: dict[str, Any] = {
    **dict.fromkeys("h height".split(), HEIGHT),
    **dict.fromkeys("w width".split(), WIDTH),
    **dict.fromkeys(
        "size feat_size hw hw_shape resolution input_resolution grid_size".split(), (HEIGHT, WIDTH)
    ),
}


def likely_calls(block: nn.Module, device: torch.device) -> Iterator[Callable[[nn.Module], Any]]:
    """Calls of a copy of ``block`` in fp64 with random tensors, the likeliest first; each may fail."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(block.forward).parameters.values()
    named = [p for p in parameters if p.kind in kinds]
    required = sum(p.default is p.empty for p in named)
    shapes = [declared_shape(module) for module in block.modules() if is_linear(module)]
    widths = list(dict.fromkeys(shape[1] for shape in shapes if shape))
    yield from islice(
        _calls([p.name.lower() for p in named], required, widths, _leads(block), device), ATTEMPTS
    )


def _calls(
    names: list[str], required: int, widths: list[int], leads: list[tuple[int, ...]], device: torch.device
) -> Iterator[Callable[[nn.Module], Any]]:
    least = max(1, required)
    for count, lead in product(range(least, max(least, min(TENSORS, len(names))) + 1), leads):
        sides = {i: SIDES[name] for i, name in enumerate(names[:count]) if i and name in SIDES}
        tensors = count - len(sides)
        if tensors > TENSORS:
            return
        for chosen in product(widths, repeat=tensors):
            draw, own = torch.Generator().manual_seed(2), iter(chosen)
            args = [
                sides[i] if i in sides else torch.randn(*lead, next(own), generator=draw, dtype=torch.float64).to(device)
                for i in range(count)
            ]  # fmt: skip
            yield lambda copy, args=args: copy(*map(_own, args))  # type: ignore[misc]


def _leads(block: nn.Module) -> list[tuple[int, ...]]:
    """Sizes before the last: tokens in a sequence, as many as a table of relative positions has; in an image."""
    tables = [b for b in block.buffers() if b.dim() == 2 and b.shape[0] == b.shape[1] > 1]
    sides = [int(table.shape[0]) for table in tables if not table.is_floating_point()]
    return [(1, side) for side in dict.fromkeys(sides)] or [(1, TOKENS), (1, HEIGHT, WIDTH)]


def _own(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
