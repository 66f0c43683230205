"""Where inputs and gradients are seen: hooks on the modules that hold the projections, while it lasts.

Linear layers are hooked; where other code reads their weight instead of calling them, its gradient is seen.
Attention and experts, whose weights no Linear holds, are watched in ways of their own. Nothing of the base is
made to require grad.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lowrank.calibration.masks import Routed
from lowrank.calibration.meter import Meter
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
                _watch_experts(stack, meter, path, module, held)
        yield


def _watch_linear(
    stack: ExitStack, meter: Meter, path: str, module: nn.Module, held: Sequence[Projection]
) -> None:
    def hook(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        x = args[0] if args else next(iter(kwargs.values()))
        meter.see_input(path, held, x)
        return _tapped(meter, path, held, x, output)

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


def _tapped(
    meter: Meter, name: str, held: Sequence[Projection], x: Tensor, output: Tensor, first: int = 0
) -> Tensor | None:
    """Lets ``meter`` see the gradient of ``output``; returns what is to take its place, or None."""
    if not (meter.gradients.wants(held) and torch.is_grad_enabled()):
        return None
    replaced = None
    if not output.requires_grad or output._is_view():
        # The graph starts here: at a zero that requires grad, and not at the output itself, so that code
        # which then writes into the output still may. A hook on a view would be lost by such writing.
        anchor = torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
        output = replaced = output + anchor
    x, version = x.detach(), x._version

    def see(dy: Tensor) -> None:
        if x._version != version:
            raise ValueError(
                f"the input of {name} was overwritten after it was read, so its gradient is lost; "
                "let that operation make a new tensor, or leave the projection out with exclude="
            )
        meter.gradients.see(name, held, x, dy.detach(), first)

    output.register_hook(see)
    return replaced


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
        tapped = _tapped(meter, path, held, x, y)
        return y if tapped is None else tapped, attention_weights

    _replace_forward(stack, attention, forward)


def _watch_experts(
    stack: ExitStack, meter: Meter, path: str, module: nn.Module, held: Sequence[Projection]
) -> None:
    """Experts call ``F.linear`` with slices of their tensors: each call shows one expert and its tokens."""
    original = module.forward
    config: Any = getattr(module, "config", None)
    if getattr(config, "_experts_implementation", None) is not None:  # a fused kernel would show nothing
        stack.callback(setattr, config, "_experts_implementation", config._experts_implementation)
        config._experts_implementation = "eager"

    def forward(*args: Any, **kwargs: Any) -> Any:
        calls = _LinearCalls(meter, path, module, held, [*args, *kwargs.values()][0])
        with calls:
            output = original(*args, **kwargs)
        if not calls.seen:
            raise ValueError(
                f"{path} cannot be calibrated: it does not use its weights by torch.nn.functional.linear; "
                "choose an initializer and an allocator that need no batches, or leave it out with exclude="
            )
        return output

    _replace_forward(stack, module, forward)


class _LinearCalls(TorchFunctionMode):
    """Shows ``meter`` each ``F.linear`` whose weight is a slice of one of the module's tensors.

    An expert's tokens are those that were indexed last from ``hidden`` (..., features), if they are as many.
    """

    def __init__(
        self, meter: Meter, path: str, module: nn.Module, held: Sequence[Projection], hidden: Tensor
    ) -> None:
        super().__init__()
        self.meter, self.path, self.held = meter, path, held
        self.tensors = {module._parameters[p.param].data_ptr(): p.param for p in held}  # type: ignore[union-attr]
        self.hidden, self.number = hidden.data_ptr(), hidden.shape[:-1].numel()
        self.tokens = torch.empty(0, dtype=torch.long)
        self.seen = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is Tensor.__getitem__ and args[0].data_ptr() == self.hidden and _is_index(args[1]):
            self.tokens = args[1]
        if func is not F.linear:
            return output
        x, weight = args[0], args[1]
        param = self.tensors.get(weight.untyped_storage().data_ptr())
        if param is None:
            return output
        self.seen = True
        first = weight.storage_offset() // weight.shape[1]
        rows = range(first, first + weight.shape[0])
        own = [p for p in self.held if p.param == param and p.rows[0] in rows]
        if not own or not len(x):
            return output
        name = f"{self.path}.{param}[{own[0].block.split('.')[0]}]"
        known = len(self.tokens) == len(x)
        self.meter.see_input(name, own, x, Routed(self.tokens, self.number if known else 0))
        tapped = _tapped(self.meter, name, own, x, output, first)
        return output if tapped is None else tapped


def _is_index(key: Any) -> bool:
    return (
        isinstance(key, Tensor) and key.ndim == 1 and not key.is_floating_point() and key.dtype != torch.bool
    )


def _replace_forward(stack: ExitStack, module: nn.Module, forward: Any) -> None:
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    if before is None:
        stack.callback(module.__dict__.pop, "forward")
    else:
        stack.callback(module.__dict__.__setitem__, "forward", before)
