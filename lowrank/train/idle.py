"""Backward through sharded modules in the same order in all processes, whatever a process's loss depends on.

FSDP2 gathers a module's weights again when backward reaches what it returned, and adds up its gradients,
those that are there one behind the other. Where a process's loss leaves out a module or a parameter, such as
an idle expert, it would wait for ever, or take one for another. So all that a called module returns is
reached, and each of its parameters gets a gradient, of zero where the loss does not depend on it; the loss's
graph says on which it does.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from lowrank.processes import is_sharded, shards


class Idle:
    """Inside, notes the calls of ``model``'s sharded modules; `tied` is what backward is to start from.

    parameters: what is trained; of these, the sharded ones count.
    """

    def __init__(self, model: nn.Module, parameters: Collection[nn.Parameter]) -> None:
        trained = {id(p) for p in parameters if is_sharded(p)}
        self._held = {root: _held(root, trained) for root in shards(model)}
        self._parameter: dict[int, nn.Parameter] = {}  # by the id of the gathered one
        self._unseen: set[nn.Parameter] = set()  # of modules that ran without a graph, to be run again
        self._ties: list[Tensor] = []  # a zero for each call, by which backward reaches it
        self._handles: list[Any] = []

    def __enter__(self) -> Idle:
        for root in self._held:
            # Before FSDP2's own hook, which takes the gathered parameters away.
            self._handles.append(root.register_forward_hook(self._touch, prepend=True))
        return self

    def __exit__(self, *raised: Any) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _touch(self, root: nn.Module, inputs: Any, output: Any) -> Any:
        held = self._held[root]
        if not torch.is_grad_enabled():
            self._unseen.update(parameter for _, _, parameter in held)
            return output
        gathered = [getattr(module, name) for module, name, _ in held]
        self._parameter |= {
            id(each): parameter for each, (_, _, parameter) in zip(gathered, held, strict=True)
        }
        leaves, form = tree_flatten(output)
        at = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        if not any(tensor.requires_grad for tensor in [*(leaves[i] for i in at), *gathered]):
            return output
        *touched, tie = _Touch.apply(len(at), *(leaves[i] for i in at), *gathered)
        self._ties.append(tie)
        for i, tensor in zip(at, touched, strict=True):
            leaves[i] = tensor
        return tree_unflatten(leaves, form)

    def tied(self, value: Tensor | None) -> Tensor | None:
        """``value``, or zero, with a graph that reaches every call since the last time that this was asked.

        None where there is nothing to reach.
        """
        ties, self._ties = self._ties, []
        for tie in ties:
            value = tie if value is None else value + tie.to(value)
        return value

    def used(self, loss: Tensor) -> set[nn.Parameter]:
        """The sharded parameters that ``loss`` depends on; also those that the graph does not tell of, since
        a reentrant checkpoint hides them."""
        found = set(self._unseen)
        seen: set[Any] = set()
        waiting: list[Any] = [loss.grad_fn]
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if hasattr(node, "variable"):
                parameter = self._parameter.get(id(node.variable))
                if parameter is not None:
                    found.add(parameter)
                continue
            following = [after for after, _ in node.next_functions]
            waiting += following[: node.outputs] if hasattr(node, "outputs") else following
        return found


class _Touch(torch.autograd.Function):
    """Its first ``outputs`` arguments as they are, and a zero; the other arguments get gradients of zero."""

    @staticmethod
    def forward(ctx: Any, outputs: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.outputs = outputs
        ctx.set_materialize_grads(False)
        ctx.like = [(p.shape, p.dtype, p.device) for p in tensors[outputs:]]
        # The same memory and no view: in place of a view FSDP2's hooks would get lost.
        return *(tensor.detach() for tensor in tensors[:outputs]), tensors[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        zeros = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like]
        return None, *gradients[: ctx.outputs], *zeros


def _held(root: nn.Module, trained: Collection[int]) -> Sequence[tuple[nn.Module, str, nn.Parameter]]:
    """What is trained and sharded with ``root``, and not with a module inside of it: (owner, name, it)."""
    inner = {module for each in shards(root) if each is not root for module in each.modules()}
    return [
        (module, name, parameter)
        for module in root.modules()
        if module not in inner
        for name, parameter in module._parameters.items()
        if parameter is not None and id(parameter) in trained
    ]
