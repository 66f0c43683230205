"""Where inputs and gradients are seen: hooks on the modules that hold the projections, while it lasts.

Linear layers are hooked; where other code reads their weight instead of calling them, its gradient is seen.
Attention, whose weights no Linear holds, is watched in a way of its own; so are experts, by `experts`.
Nothing of the base is made to require grad.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.calibration.experts import watch_experts
from lowrank.calibration.meter import Meter
from lowrank.calibration.taps import replace_forward, tapped
from lowrank.models.projections import Projection, read_by_weight
from lowrank.models.storage import is_linear, quantized, stored_transposed


@contextmanager
def watched(model: nn.Module, meter: Meter) -> Iterator[None]:
    """Inside, ``meter`` sees what the projections read and, in a backward pass, their gradients.

    Raises:
        ValueError: a projection in a tensor whose use cannot be watched; nothing was changed then.
    """
    by_module: dict[str, list[Projection]] = {}
    for p in meter.needs:
        by_module.setdefault(p.module, []).append(p)
    with ExitStack() as stack:
        for path, held in by_module.items():
            module = model.get_submodule(path)
            above = model.get_submodule(path.rpartition(".")[0])
            if isinstance(module, nn.MultiheadAttention):
                _watch_attention(stack, meter, path, module, held)
            elif isinstance(above, nn.MultiheadAttention) and read_by_weight(model, path):
                _watch_attention_output(stack, meter, path, above, held)
            elif is_linear(module):
                _watch_linear(stack, meter, path, module, held)
            else:
                watch_experts(stack, meter, path, module, held, above)
        yield


def _watch_linear(
    stack: ExitStack, meter: Meter, path: str, module: nn.Module, held: Sequence[Projection]
) -> None:
    def hook(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        x = args[0] if args else next(iter(kwargs.values()))
        meter.see_input(path, held, x)
        return tapped(meter, path, held, x, output)

    stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
    weight = module._parameters.get("weight")
    if weight is not None and meter.gradients.wants(held) and not (quantized(weight) or weight.is_meta):
        _watch_reading(stack, meter, path, module, held)


def _watch_reading(
    stack: ExitStack, meter: Meter, path: str, module: nn.Module, held: Sequence[Projection]
) -> None:
    """Code that reads the weight without calling the layer meets a stand-in, which has the weight's gradient.

    A call of the layer itself uses the original, so that no gradient of a whole weight is formed for it.
    """
    own = module._parameters
    original = cast("nn.Parameter", own["weight"])
    stand_in = nn.Parameter(original.detach(), requires_grad=True)
    transposed = stored_transposed(module)

    def reduce(parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        meter.gradients.see_weight(held, gradient.T if transposed else gradient, path)

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        own["weight"] = original

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        own["weight"] = stand_in

    stand_in.register_post_accumulate_grad_hook(reduce)
    stack.callback(own.__setitem__, "weight", original)
    own["weight"] = stand_in
    stack.callback(module.register_forward_pre_hook(before).remove)
    stack.callback(module.register_forward_hook(after, always_call=True).remove)


def _watch_attention(
    stack: ExitStack, meter: Meter, path: str, module: nn.MultiheadAttention, held: Sequence[Projection]
) -> None:
    """Its arguments are its inputs; the weights' gradients come from stand-ins that share their storage."""

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        for p in held:
            meter.see_input(f"{path}[{p.role}]", [p], named[p.role.value])

    stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
    for param in {p.param for p in held if meter.gradients.wants([p])}:
        own = [p for p in held if p.param == param and meter.gradients.wants([p])]
        original = module._parameters[param]
        assert original is not None
        stand_in = nn.Parameter(original.detach(), requires_grad=True)
        stand_in.register_post_accumulate_grad_hook(lambda parameter, own=own: _reduce(meter, parameter, own))
        module._parameters[param] = stand_in
        stack.callback(module._parameters.__setitem__, param, original)


def _reduce(meter: Meter, parameter: Tensor, held: Sequence[Projection]) -> None:
    gradient, parameter.grad = parameter.grad, None
    assert gradient is not None
    meter.gradients.see_weight(held, gradient.reshape(-1, gradient.shape[-1]))


def _watch_attention_output(
    stack: ExitStack, meter: Meter, path: str, attention: nn.MultiheadAttention, held: Sequence[Projection]
) -> None:
    """The output projection is read by its weight: with the identity in its place, its input comes out."""
    original, own = attention.forward, attention.out_proj._parameters
    weight, bias = own["weight"], own["bias"]
    assert weight is not None

    def forward(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        identity = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
        own["weight"], own["bias"] = nn.Parameter(identity, requires_grad=False), None
        try:
            x, attention_weights = original(*args, **kwargs)
        finally:
            own["weight"], own["bias"] = weight, bias
        y = F.linear(x, weight, bias)
        meter.see_input(path, held, x)
        seen = tapped(meter, path, held, x, y)
        return y if seen is None else seen, attention_weights

    replace_forward(stack, attention, forward)
