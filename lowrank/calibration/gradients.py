"""Sums of ∇W and of |W ⊙ ∇W| over examples, one example at a time. It hooks nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lowrank.batches import model_device
from lowrank.linalg.precision import fast_precision, full_precision, is_half, wide
from lowrank.linalg.rows import shifted, take
from lowrank.models.projections import Projection
from lowrank.models.storage import rows_of
from lowrank.processes import Processes


class Gradients:
    """``sensitivity`` and ``gradient`` hold the sums, of the projections that ``needs`` names them for."""

    def __init__(
        self, model: nn.Module, needs: Mapping[Projection, frozenset[str]], device: torch.device | None
    ) -> None:
        self.model, self.needs, self.device = model, needs, device
        self.sensitivity: dict[Projection, Tensor] = {}
        self.gradient: dict[Projection, Tensor] = {}
        self.examples = 0
        self.scale = 1.0  # of the loss, by which gradients are divided again
        self.overflow = False  # has one of the present backward pass overflowed?
        self.counted: set[tuple[Projection, str]] = set()  # in the present example, by what shows it
        self.uses: Counter[str] = Counter()  # how often each name was called in the present example
        self.pending: dict[str, list[tuple[Sequence[Projection], int, Tensor, Tensor]]] = {}

    def begin(self) -> None:
        """A new example."""
        self.counted.clear()
        self.repeat()

    def repeat(self) -> None:
        """The same example again: what it has shown already does not count twice."""
        self.overflow = False
        self.uses.clear()
        self.pending.clear()

    def finish(self) -> None:
        """The backward pass is over: layers with uses that the loss did not reach wait no longer."""
        for name in list(self.pending):
            self._finish(name)

    def end(self) -> None:
        """The example counts, with what its loss reached."""
        self.finish()
        self.examples += 1

    def wants(self, held: Sequence[Projection]) -> bool:
        """Is any gradient of ``held`` asked for?"""
        return any(self.needs[p] & {"sensitivity", "gradient"} for p in held)

    @property
    def nothing(self) -> bool:
        """Is every gradient so far zero?"""
        return not any(
            bool(each.any()) for sums in (self.sensitivity, self.gradient) for each in sums.values()
        )

    @torch.no_grad()
    def see(self, name: str, held: Sequence[Projection], x: Tensor, dy: Tensor, first: int) -> None:
        """``dy`` (..., rows) is the gradient of x times ``held``'s tensor from its row ``first`` on.

        A module that is called several times has one gradient, the sum over its uses: it waits for the last.
        """
        self.pending.setdefault(name, []).append((held, first, as_rows(x), as_rows(dy)))
        if len(self.pending[name]) >= self.uses[name]:
            self._finish(name)

    @torch.no_grad()
    def see_weight(self, held: Sequence[Projection], rows: Tensor, name: str = "") -> None:
        """``rows`` (rows, in) is the example's gradient of the whole tensor that holds ``held``.

        Raises ValueError where the module ``name`` was called besides: its sensitivity is that of the sum.
        """
        if self.uses[name] and any("sensitivity" in self.needs[p] for p in held):
            raise ValueError(
                f"{name} is called, and its weight is read by other code too: its sensitivity cannot be "
                "measured; leave it out with exclude="
            )
        for p in held:
            own = take(rows, p.rows)
            self._add(p, own.to(wide(own), copy=True), "weight")

    def _finish(self, name: str) -> None:
        uses = self.pending.pop(name)
        held, first = uses[0][:2]
        x, dy = (
            parts[0] if len(parts) == 1 else torch.cat(parts) for parts in list(zip(*uses, strict=True))[2:]
        )
        half = is_half(x) and is_half(dy)
        inputs = x.to(wide(x))
        for p in held:
            if self.wants([p]):
                outputs = take(dy, shifted(p.rows, -first), dim=1).to(inputs.dtype)
                exact = "gradient" in self.needs[p]
                self._add(p, _weight_gradient(inputs, outputs, half, exact=exact), "call")

    def _add(self, p: Projection, gradient: Tensor, source: str) -> None:
        """Consumes ``gradient``, which is the example's times ``scale``."""
        if (p, source) in self.counted:
            return
        if self.scale != 1:
            if not gradient.isfinite().all():
                self.overflow = True
                return
            self.counted.add((p, source))
            gradient.div_(self.scale)
        if "gradient" in self.needs[p]:
            own = gradient.to(self.device or gradient.device)
            if p in self.gradient:
                self.gradient[p].add_(own)
            else:
                self.gradient[p] = own.clone()
        if "sensitivity" in self.needs[p]:
            weight = p.weight(self.model)
            if weight.is_meta:
                raise ValueError(
                    f"{p.name}: its weight is offloaded, and its sensitivity needs it: load the base whole, "
                    "or leave it out with exclude="
                )
            gradient.mul_(weight.to(gradient.dtype))
            size = gradient.abs_().sum().double() / weight.numel()  # on a CPU a third of what a norm takes
            self.sensitivity[p] = self.sensitivity.get(p, 0) + size

    def reduce(self, processes: Processes) -> None:
        """Adds the sums of all processes."""
        self.examples = int(processes.added(torch.tensor(self.examples)))
        for p, needs in self.needs.items():
            if "sensitivity" in needs:
                own = self.sensitivity.get(p, torch.zeros((), dtype=torch.float64))
                self.sensitivity[p] = processes.added(own)
            if "gradient" in needs:
                self.gradient[p] = processes.added(self.gradient.get(p, self.zeros(p)))

    def zeros(self, p: Projection, shape: tuple[int, int] | None = None) -> Tensor:
        """What a projection shows that no gradient, or no input, reached; by default as its weight is."""
        weight = rows_of(self.model.get_submodule(p.module), p.param, p.rows)
        home = self.device or (model_device(self.model) if weight.is_meta else weight.device)
        return torch.zeros(shape or p.shape, dtype=wide(weight), device=home)


def as_rows(x: Tensor) -> Tensor:
    """(..., features) as (rows, features)."""
    return x.reshape(-1, x.shape[-1])


def _weight_gradient(inputs: Tensor, outputs: Tensor, half: bool, *, exact: bool) -> Tensor:
    """``outputsᵀ·inputs`` of fp32 copies of ``half`` or other numbers.

    Where it need not be exact the inputs are taken around their mean: what is common to all tokens often
    cancels, and its rounding would not.
    """
    if exact or half:
        with (fast_precision if half else full_precision)(inputs.device):
            return outputs.T @ inputs
    mean = inputs.mean(0)
    with fast_precision(inputs.device):
        return (outputs.T @ (inputs - mean)).addr_(outputs.sum(0), mean)
