"""Takes adapters out of a model: `merge` keeps what was learnt in the weights, `unwrap` drops it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from lowrank.adapters import (
    adaptation,
    adapter_names,
    adapters_of,
    added_parameters,
    holder,
    one_name,
    plan_of,
    wrapped_root,
)
from lowrank.choosing import check_together
from lowrank.layers.adapter import add_updates, full_delta, weighted
from lowrank.layers.functional import Block
from lowrank.layers.layer import AdaptedLayer
from lowrank.layers.linear import LoRALinear
from lowrank.layers.tree import hung_at, original, without_copies
from lowrank.linalg.rows import shifted
from lowrank.models.experts import Stack, stack_of
from lowrank.models.projections import Projection
from lowrank.models.storage import as_rows, one_expert, quantized
from lowrank.wrapping.checks import check_whole
from lowrank.wrapping.install import bare
from lowrank.wrapping.magnitudes import renew_norms
from lowrank.wrapping.mergeable import check_effects, check_mergeable, holders, stored_weight
from lowrank.wrapping.pretrained import forget_quantization, forget_ties
from lowrank.wrapping.rows import check_rows_mergeable, merge_rows


def unwrap(model: nn.Module) -> nn.Module:
    """Takes all adapters out again: the original modules are back, with their original bits.

    What was trained is dropped: `save_adapter` keeps it, `merge` keeps it in the weights.
    """
    root = wrapped_root(model)
    with bare(root) as fittings:
        fittings.drop(adapter_names(root))
    return model


def remove_adapter(model: nn.Module, name: str) -> nn.Module:
    """Takes the adapter ``name`` out, and drops what it has learnt; the others stay. Returns ``model``.

    With the last one the model is its base again, as after `unwrap`.

    Raises:
        ValueError: the model is not wrapped, or has no adapter of that name.
    """
    root = wrapped_root(model)
    one_name(root, name)
    with bare(root) as fittings:
        fittings.drop([name])
    return model


def merge(
    model: nn.Module,
    names: str | Iterable[str] | None = None,
    *,
    dequantize: bool = False,
    untie: bool = False,
) -> nn.Module:
    """Adds ΔW to the weights, in fp32 and rounded once, and takes the adapters out.

    Modules trained in full hand their weights to the original modules. Adapters that are not merged stay,
    beside the weights as they are then.

    Args:
        names: of the adapters to merge, each with the weight that it acts with, or 1 where it does not act;
            by default those that act now.
        dequantize: a quantized weight, which cannot take ΔW without being quantized again, is replaced by
            W + ΔW in floating point; its layer then needs the memory of an unquantized one.
        untie: a weight that is tied to another module's, which must keep W, becomes a weight of its own. What
            transformers' configuration says of tied embeddings changes with it, so that a saved folder is
            read as it was written.

    Raises:
        ValueError: a weight is tied to another module's, is quantized, or is not all that its layer
            computes with, an adapter holds NaN or Inf, or a layer was passed by when its module ran, so that
            its adapter has had no effect; nothing acts, or a name is unknown; the model is
            sharded; nothing was changed.
    """
    root = wrapped_root(model)
    check_whole(model, "merge")
    acting = adaptation(root).acting
    chosen = [names] if isinstance(names, str) else list(acting.names if names is None else names)
    if not chosen:
        raise ValueError(f"no adapter acts now: name those to merge, of {', '.join(adapter_names(root))}")
    chosen = [one_name(root, name) for name in dict.fromkeys(chosen)]
    check_together(root, {name: float(acting.weights.get(name, 1.0)) for name in chosen})
    adapters = {name: adapters_of(root, name) for name in chosen}
    check_mergeable(root, [p for held in adapters.values() for p in held], dequantize, untie)
    by_weight: dict[tuple[str, str], list[tuple[Projection, Block]]] = {}
    for name, held in adapters.items():
        check_effects(root, name, held)
        for p, adapter in held.items():
            block = weighted(adapter.block, acting.weights.get(name))
            by_weight.setdefault((p.module, p.param), []).append((p, block))
    check_rows_mergeable(root, chosen)
    usual = _usual_dtype(root)
    excess = {
        p.module: _excess(root, p, name)
        for name, held in adapters.items()
        for p in held
        if plan_of(root, name).dora
    }
    if untie and any([_untie(root, held[0][0]) for held in by_weight.values()]):
        forget_ties(root)
    unpacked = [
        _merge_weight(root, held, usual, excess.get(module)) for (module, _), held in by_weight.items()
    ]
    merge_rows(root, {name: acting.weights.get(name) for name in chosen})
    with bare(root) as fittings:
        for trained in fittings.trained.values():
            for name in set(chosen) & set(trained.copies):
                original(trained.base).load_state_dict(trained.copies[name].state_dict())
        fittings.drop(chosen)
        renew_norms(fittings, {module for module, _ in by_weight})
    if any(unpacked):
        forget_quantization(root)
    return model


@torch.no_grad()
def _merge_weight(
    root: nn.Module,
    held: Sequence[tuple[Projection, Block]],
    usual: torch.dtype,
    excess: Tensor | None,
) -> bool:
    """Adds all updates of one weight to it, some rows at a time in fp32; says whether it was quantized.

    With magnitudes, ``excess`` (out,) is by how much each row is scaled then, less 1.
    """
    p = held[0][0]
    stored = stored_weight(root, p)
    dtype, unpacked = stored.dtype, quantized(stored)
    if unpacked:
        dtype = _floating_dtype(stored, usual)
        _unpack(root, p)
    weight = stored_weight(root, p)
    stack = stack_of(holder(root, p), p.param)
    if stack is not None:
        every = [(each, block) for p, block in held for each in p.apart(stack.out)]
        _merge_experts(weight, stack, [block._replace(rows=p.rows) for p, block in every])
        return False
    add_updates(as_rows(holder(root, p), p.param), [block for _, block in held], excess)
    if unpacked:
        weight.data = weight.data.to(dtype)
        _match_bias(holder(root, p), dtype)
    return unpacked


def _merge_experts(weight: Tensor, stack: Stack, blocks: Sequence[Block]) -> None:
    """Adds all updates of a tensor of experts to it, one expert at a time in fp32."""
    by_expert: dict[int, list[Block]] = {}
    for block in blocks:
        expert = block.rows[0] // stack.out
        own = block._replace(rows=shifted(block.rows, -expert * stack.out))
        by_expert.setdefault(expert, []).append(own)
    for expert, own_blocks in by_expert.items():
        matrix = one_expert(weight, stack, expert)
        matrix.copy_(full_delta(own_blocks, stack.out).add_(matrix))


def _untie(root: nn.Module, p: Projection) -> bool:
    """Gives the module of ``p`` a weight of its own where it shared one; says whether it did."""
    weight = stored_weight(root, p)
    if len(holders(root)[id(weight)]) == 1:
        return False
    own = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    holder(root, p).register_parameter(p.param, own)
    return True


def _usual_dtype(root: nn.Module) -> torch.dtype:
    """The floating-point dtype of most of the base's numbers, those apart that are quantized."""
    added = {id(parameter) for parameter in added_parameters(root)}
    numbers: Counter[torch.dtype] = Counter()
    for parameter in root.parameters():
        if id(parameter) not in added and not quantized(parameter):
            numbers[parameter.dtype] += parameter.numel()
    return numbers.most_common(1)[0][0] if numbers else torch.float32


def _floating_dtype(stored: Tensor, usual: torch.dtype) -> torch.dtype:
    """The dtype that ``stored`` has in floating point: its own, as torchao's tensors have, else ``usual``."""
    return stored.dtype if stored.is_floating_point() and stored.itemsize > 1 else usual


def _match_bias(layer: nn.Module, dtype: torch.dtype) -> None:
    """Gives ``layer`` a bias of its weight's dtype, which a plain layer needs, a quantized one not always."""
    bias = layer._parameters.get("bias")
    if bias is not None and bias.dtype != dtype:
        layer.register_parameter("bias", nn.Parameter(bias.detach().to(dtype), requires_grad=False))


def _unpack(root: nn.Module, p: Projection) -> None:
    """Puts the dequantized weight, in fp32, in the place of the packed one, in a plain layer."""
    layer = without_copies(hung_at(root, p.module))
    assert isinstance(layer, AdaptedLayer)
    weight = nn.Parameter(as_rows(layer.base, p.param).to(torch.float32, copy=True), requires_grad=False)
    if type(layer.base) is not nn.Linear:
        plain = nn.Linear(layer.in_features, layer.out_features, device="meta").train(layer.training)
        plain.register_parameter("bias", cast("nn.Parameter | None", layer.base.bias))
        layer.base = plain
    layer.base.register_parameter(p.param, weight)


def _excess(root: nn.Module, p: Projection, name: str) -> Tensor:
    layer = without_copies(hung_at(root, p.module))
    assert isinstance(layer, LoRALinear)
    return layer.excess(layer.part(name))
