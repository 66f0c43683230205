"""How an inner module may be called of which nothing is known: guesses, by what its forward takes.

It looks at signatures, widths and buffers, and calls nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from itertools import islice, product
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.models.storage import declared_shape, is_linear

SIDE = 2  # of an image
ATTEMPTS = 24
TENSORS = 3
Shape = tuple[int | None, ...]  # None: as many channels as a layer takes
# Arguments of these names say the sides of the image that the tokens are.
LENGTHS = frozenset("h w height width".split())
SIZES = frozenset("size feat_size hw hw_shape resolution input_resolution grid_size".split())


def likely_calls(block: nn.Module) -> Iterator[Callable[[nn.Module], Any]]:
    """Calls of a copy of ``block`` in fp64 with random tensors, the likeliest first; each may fail."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        parameters = inspect.signature(block.forward).parameters.values()
    except (TypeError, ValueError):  # no Python function
        return
    named = [p for p in parameters if p.kind in kinds]
    required = sum(p.default is p.empty for p in named)
    shapes = [declared_shape(module) for module in block.modules() if is_linear(module)]
    widths = list(dict.fromkeys(shape[1] for shape in shapes if shape))
    names = [p.name.lower() for p in named]
    yield from islice(_calls(names, required, widths, _shapes(block)), ATTEMPTS)


def _calls(
    names: list[str], required: int, widths: list[int], shapes: list[Shape]
) -> Iterator[Callable[[nn.Module], Any]]:
    least = max(1, required)
    for count, shape in product(range(least, max(least, min(TENSORS, len(names))) + 1), shapes):
        inner = [size for size in shape[1:] if size is not None]
        side = isqrt(inner[0]) if len(inner) == 1 else inner[0]
        sides: dict[int, Any] = {i: side for i, name in enumerate(names[:count]) if name in LENGTHS}
        sides |= {i: (side, side) for i, name in enumerate(names[:count]) if name in SIZES}
        tensors = [i for i in range(count) if i not in sides]
        for chosen in product(widths, repeat=len(tensors)) if len(tensors) <= TENSORS else ():
            drawn = [_random(shape, width) for width in chosen]
            args = sides | dict(zip(tensors, drawn, strict=True))
            yield lambda copy, args=args: copy(*(_own(args[i]) for i in sorted(args)))  # type: ignore[misc]


def _shapes(block: nn.Module) -> list[Shape]:
    """A sequence, as long as a table of positions, or an image, its channels last or first.

    Each side of an image is divided by the strides of convolutions.
    """
    convolutions = [module for module in block.modules() if isinstance(module, nn.Conv1d | nn.Conv2d)]
    side = SIDE * max((max(each.stride) for each in convolutions), default=1)
    tokens = [side * side]
    for table in block.buffers():
        pairs = table.shape[0] if table.dim() == 2 and table.shape[1] <= 3 else table.numel()
        rows = isqrt(pairs)  # of indices or coordinates of each token beside each other one
        if (pairs != table.numel() or not table.is_floating_point()) and rows * rows == pairs > 1:
            tokens.insert(0, rows)
    tokens = list(dict.fromkeys(tokens))
    images = [(isqrt(n), isqrt(n)) for n in tokens]
    last, first = ((1, *image, None) for image in images), ((1, None, *image) for image in images)
    return [*((1, n, None) for n in tokens), *last, *first]


def _random(shape: Shape, width: int) -> Tensor:
    draw = torch.Generator().manual_seed(2 + width)
    sizes = [width if size is None else size for size in shape]
    return torch.randn(sizes, generator=draw, dtype=torch.float64)


def _own(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
