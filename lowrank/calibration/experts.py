"""Watches the products with tensors of experts: each shows an expert, and the tokens that it has.

While it runs, the module meets its tensors as `linalg.stacks` shows them, so that every form counts that
adapters act on: slices, batched and grouped products. The tokens are those that were indexed last, if they
are as many.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lowrank.calibration.masks import Routed
from lowrank.calibration.meter import Meter
from lowrank.calibration.taps import replace_forward, tapped
from lowrank.linalg.stacks import StackedWeight
from lowrank.models.experts import Stack, stack_of
from lowrank.models.projections import Projection


def watch_experts(
    stack: ExitStack,
    meter: Meter,
    path: str,
    module: nn.Module,
    held: Sequence[Projection],
    above: nn.Module,
) -> None:
    """Until ``stack`` closes, ``meter`` sees what the experts in ``module`` read, and their gradients."""
    stored_as = stack_of(module, held[0].param)
    reader = above if stored_as is not None and stored_as.flat else module
    original, own = reader.forward, cast("dict[str, Any]", module._parameters)
    config: Any = getattr(module, "config", None)
    if getattr(config, "_experts_implementation", None) is not None:  # a fused kernel would show nothing
        stack.callback(setattr, config, "_experts_implementation", config._experts_implementation)
        config._experts_implementation = "eager"

    def forward(*args: Any, **kwargs: Any) -> Any:
        tokens = _Tokens([*args, *kwargs.values()][0])
        stored = {p.param: own[p.param] for p in held}
        seen = {param: _Seen(meter, path, module, param, held, tokens) for param in stored}
        own.update({param: each.shown() for param, each in seen.items()})
        try:
            with tokens:
                output = original(*args, **kwargs)
        finally:
            own.update(stored)
        if not any(each.used for each in seen.values()):
            raise ValueError(
                f"{path} cannot be calibrated: it has no product with its weights that is known (F.linear or "
                "@ with one expert's, bmm, grouped_mm); choose an initializer and an allocator that need no "
                "batches, or leave it out with exclude="
            )
        for each in seen.values():
            each.finish()
        return output

    replace_forward(stack, reader, forward)


class _Seen:
    """The products with one tensor of experts in one forward. See `linalg.stacks.Products`."""

    def __init__(
        self,
        meter: Meter,
        path: str,
        module: nn.Module,
        param: str,
        held: Sequence[Projection],
        tokens: _Tokens,
    ) -> None:
        stack, weight = stack_of(module, param), module._parameters[param]
        assert stack is not None and weight is not None
        self.meter, self.name, self.tokens = meter, f"{path}.{param}", tokens
        self.stack: Stack = stack
        self.weight: Tensor = weight
        self.experts, self.transposed = stack.experts, stack.transposed
        self.held: dict[int, list[Projection]] = {}
        self.shared: list[Projection] = []
        for p in held:
            if p.param == param:
                (self.shared if p.shared > 1 else self.held.setdefault(p.rows[0] // stack.out, [])).append(p)
        self.inputs: list[tuple[Tensor, Routed]] = []  # of all experts, where one adapter is for all
        self.used = False

    def shown(self) -> Tensor:
        return StackedWeight.show(self.weight.detach(), self, self.transposed, None)

    def whole(self) -> Tensor:
        return self.stack.matrices(self.weight.detach())

    def one(self, x: Tensor, weight: Tensor, bias: Tensor | None, expert: int) -> Tensor:
        return self._see(expert, x, F.linear(x, weight, bias), self.tokens.of(len(x)))

    def batch(self, y: Tensor, x: Tensor, pick: Tensor | None) -> Tensor:
        for expert in range(self.experts) if pick is None else pick.unique().tolist():
            if pick is None:  # each expert gets every token, and those are zero that are another's
                rows = x[expert].any(-1).nonzero().flatten()
                places: tuple[Tensor, ...] = torch.full_like(rows, expert), rows
                routed = Routed(rows, x.shape[1])
            else:
                places, routed = ((pick == expert).nonzero().flatten(),), Routed(torch.empty(0).long(), 0)
            own, out = x[places], y[places]
            seen = self._see(expert, own.reshape(-1, own.shape[-1]), out.reshape(-1, out.shape[-1]), routed)
            if seen.requires_grad:
                y = y.index_put(places, seen.view(out.shape))
        return y

    def group(self, y: Tensor, x: Tensor, offs: Tensor, multiply: Callable[..., Tensor]) -> Tensor:
        parts, start, routed = [], 0, self.tokens.of(len(x))
        for expert, stop in enumerate(offs.tolist()):
            own = Routed(routed.tokens[start:stop], routed.number)
            parts.append(self._see(expert, x[start:stop], y[start:stop], own))
            start = stop
        return torch.cat([*parts, y[start:]])

    def _see(self, expert: int, x: Tensor, y: Tensor, routed: Routed) -> Tensor:
        """Notes that ``expert`` made y (tokens, out) of x (tokens, in); returns y, whose gradient is seen."""
        self.used = True
        if not len(x):
            return y
        if own := self.held.get(expert):
            name = f"{self.name}[{expert}]"
            self.meter.see_input(name, own, x, routed)
            seen = tapped(self.meter, name, own, x, y, expert * self.stack.out)
            y = y if seen is None else seen
        if self.shared:
            self.inputs.append((x.detach(), routed))
            seen = tapped(self.meter, self.name, self.shared, x, y)
            y = y if seen is None else seen
        return y

    def finish(self) -> None:
        """What all experts read is one input of the adapter that they share: the tokens of each, in turn."""
        if not self.inputs:
            return
        x = torch.cat([x.reshape(-1, x.shape[-1]) for x, _ in self.inputs])
        numbers = {routed.number for _, routed in self.inputs}
        tokens = torch.cat([routed.tokens for _, routed in self.inputs])
        routed = Routed(tokens, numbers.pop() if len(numbers) == 1 else 0)
        self.meter.see_input(self.name, self.shared, x, routed, uses=len(self.inputs))


class _Tokens(TorchFunctionMode):
    """Remembers which tokens were indexed last from ``hidden`` (..., features)."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden, self.number = hidden.data_ptr(), hidden.shape[:-1].numel()
        self.last = torch.empty(0, dtype=torch.long)

    def of(self, rows: int) -> Routed:
        """They, where ``rows`` is how many they are."""
        return Routed(self.last, self.number if len(self.last) == rows else 0)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is Tensor.__getitem__ and args[0].data_ptr() == self.hidden and _is_index(args[1]):
            self.last = args[1]
        return output


def _is_index(key: Any) -> bool:
    return (
        isinstance(key, Tensor) and key.ndim == 1 and not key.is_floating_point() and key.dtype != torch.bool
    )
