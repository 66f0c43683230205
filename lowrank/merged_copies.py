"""`merged`: for a while the adapted linear layers of a model multiply by copies of W + ΔW.

It decides which layers have one; the copy itself is in `layers.copied`. The base's weights stay as they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from lowrank.adapters import adaptation, adapted_layers, wrapped_root
from lowrank.layers.acting import Acting
from lowrank.layers.adapter import RowBlocks
from lowrank.layers.bases import plain_weight
from lowrank.layers.copied import begin, end, mark_stale, renew_copies, unseen
from lowrank.layers.linear import LoRALinear
from lowrank.layers.tree import hung_by_name
from lowrank.layers.weight import AdaptedWeight, original_class
from lowrank.notices import once
from lowrank.progress import bar
from lowrank.wrapping.checks import check_whole


@dataclass(frozen=True)
class MergedCopies:
    """What `merged` made on entry.

    Args:
        layers: the paths of the adapted layers that have a copy.
        by_factors: the paths of those that go by their factors, as outside, and why.
        bytes: what the copies take.
    """

    layers: tuple[str, ...]
    by_factors: dict[str, str]
    bytes: int

    def renew(self) -> None:
        """Makes all copies again, after a change that `merged` does not see."""
        mark_stale()
        renew_copies()

    def __str__(self) -> str:
        reasons = Counter(self.by_factors.values())
        lines = [f"{len(self.layers)} layers have a copy of W + ΔW, {self.bytes / 2**20:.1f} MiB in all"]
        lines += [f"{count} go by their factors: {reason}" for reason, count in reasons.items()]
        return "\n".join(lines)


@contextmanager
def merged(model: nn.Module, *, progress: bool = True) -> Iterator[MergedCopies]:
    """Inside, each adapted linear layer multiplies by a copy of W + ΔW: a call costs what the base's costs.

    For evaluation and for generation in the course of training. The copies are those that `merge` would make,
    bit for bit, and take the memory of the adapted weights once more. ΔW is rounded to the weight's dtype in
    them, so the output differs from the factors' by that rounding. The base's weights are not written to, and
    on exit the copies are dropped.

    A copy serves where no graph is built, in evaluation mode, or in training mode where there is no dropout.
    Calls that build a graph, and `adapters_for_rows`, go by the factors. So do convolutions, embeddings, rows
    that train apart, experts, weights that are read without a call, and layers whose base has to be called
    (quantized, offloaded, or with hooks): a logged notice counts them, and the result lists them.

    A copy is made again when what acts, a factor, a magnitude or the base's weight has changed. Compiled code
    cannot look; for it the copies are made again after an optimizer's step and whenever lowrank changes the
    adapters. After any other change (``B.add_(…)``, ``model.to(…)``) call ``copies.renew()``, and without
    compiling after writing through ``.data``, which leaves no trace.

    Args:
        progress: a progress bar where it takes longer than two seconds.

    Raises:
        ValueError: the model is not wrapped, or is sharded.
    """
    root, acting = wrapped_root(model), adaptation(model).acting
    check_whole(model, "merged")
    adapted = adapted_layers(root)
    by_factors = {path: why for path, layer in adapted.items() if (why := _by_factors(layer, acting))}
    plain = {path: cast(LoRALinear, layer) for path, layer in adapted.items() if path not in by_factors}
    plain = {path: layer for path, layer in plain.items() if isinstance(layer, LoRALinear)}
    entered = [layer for layer in dict.fromkeys(plain.values()) if not layer.copied.on]
    after_step = register_optimizer_step_post_hook(_after_step)
    try:
        begin(entered)
        with bar(None, "merged copies", total=len(entered), shown=progress, delay=2, leave=False) as shown:
            for layer in entered:
                layer.copied.renew(layer, plain_weight(layer.base))
                shown.update()
        made = {path: layer.copied.weight for path, layer in plain.items() if layer.copied.weight is not None}
        copies = MergedCopies(tuple(made), by_factors, sum(map(_bytes, made.values())))
        if by_factors:
            once(f"merged: {copies}")
        yield copies
    finally:
        after_step.remove()
        end(entered)


def _after_step(optimizer: Optimizer, *_: object) -> None:
    mark_stale(parameter for group in optimizer.param_groups for parameter in group["params"])
    renew_copies()


def _by_factors(layer: nn.Module, acting: Acting) -> str | None:
    """Why ``layer``, in which something acts, cannot have a copy; None where it can, or nothing acts."""
    parts = [part for name, part in hung_by_name(layer).items() if name in acting.names]
    if isinstance(layer, LoRALinear):
        weight = plain_weight(layer.base)
        if weight is None:
            return f"the base has to be called: {type(layer.base).__name__}"
        if any(cast(RowBlocks, part).tokens is not None for part in parts):
            return "rows train apart"
        tensors = [weight, *(tensor for part in parts for tensor in part.state_dict(keep_vars=True).values())]
        if any(map(unseen, tensors)):
            return "on the meta device, or an inference tensor"
        return None
    if not parts:
        return None
    if isinstance(layer, AdaptedWeight):
        return f"adapted on the weight: {original_class(layer).__name__}"
    return f"no linear layer: {type(layer.base).__name__}"


def _bytes(copy: Tensor) -> int:
    return copy.numel() * copy.itemsize
