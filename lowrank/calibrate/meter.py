"""The sums behind the statistics: fed with inputs and gradients, a batch at a time. It hooks nothing."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.batches import Mask
from lowrank.calibrate.masks import Masks
from lowrank.products import fast_precision, full_precision, lower_gram, symmetric
from lowrank.projections import Projection
from lowrank.statistics import ProjectionStatistics, Statistics


class _Seen:
    """An input tensor of the present batch, told again by where it lies.

    An address means something only while its tensor lives: afterwards another may be put there.
    """

    def __init__(self, x: Tensor) -> None:
        self.place = _place(x)
        self.tensor = weakref.ref(x)

    def is_same(self, x: Tensor) -> bool:
        return self.tensor() is not None and self.place == _place(x)


def _place(x: Tensor) -> tuple[Any, ...]:
    return x.data_ptr(), x.storage_offset(), x.shape, x.stride(), x._version, x.dtype


@dataclass
class _Input:
    """What a distinct input has shown so far, and which tensors it was in the present batch."""

    covariance: Tensor | None = None
    moment: Tensor | None = None
    total: Tensor | None = None
    tokens: int = 0
    seen: list[_Seen] = field(default_factory=list)

    def saw(self, x: Tensor) -> bool:
        return any(each.is_same(x) for each in self.seen)


@dataclass
class _Weight:
    """What a projection's gradients have shown so far; ``input`` names what it reads."""

    sensitivity: Tensor | float = 0.0
    gradient: Tensor | None = None
    sketch: Tensor | None = None
    input: str = ""


class Meter:
    """Running sums of the statistics of ``projections``; `statistics` turns them into means."""

    def __init__(
        self,
        model: nn.Module,
        projections: Sequence[Projection],
        needs: frozenset[str],
        device: torch.device | None = None,
        columns: Mapping[Projection, Tensor] | None = None,
    ) -> None:
        self.model, self.needs, self.device = model, needs, device
        self.columns = columns or {}
        self.needs_inputs = bool(needs & {"covariance", "moment", "sketch"})
        self.needs_backward = bool(needs & {"sensitivity", "gradient"})
        self.weights = {p: _Weight() for p in projections}
        self.inputs: dict[str, _Input] = {}
        self.examples = self.batches = self.number = self.batch_size = 0
        self.in_backward = False
        self.masks: Masks
        self.uses: Counter[str] = Counter()  # how often each name was called in the present batch
        self.pending: dict[str, list[tuple[Sequence[Projection], int, Tensor, Tensor]]] = {}
        names = {path.split(".")[-1] for path, _ in model.named_modules()}
        self.encoder_decoder = {"encoder", "decoder"} <= names

    def begin(self, number: int, batch: Any, mask: Mask | None) -> None:
        """A new batch: its masks, and how many examples it has (told by the first input, without a mask)."""
        self.number, self.in_backward = number, False
        self.masks = Masks(batch, mask, number, self.encoder_decoder)
        self.batch_size = self.masks.examples
        self.uses.clear()
        self.pending.clear()
        for each in self.inputs.values():
            each.seen.clear()

    def end(self) -> None:
        """The batch is over. Raises ValueError where the user's mask fitted nothing."""
        for name in list(self.pending):  # the loss did not reach all of their uses
            self._finish(name)
        if self.needs_inputs:
            self.masks.check_used()
        self.batches += 1
        self.examples += self.batch_size

    # -- inputs ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def see_input(self, name: str, held: Sequence[Projection], x: Tensor) -> None:
        """``x`` (..., in) is what the projections ``held`` read; ``name`` is theirs alone.

        The first time, siblings that read the very same tensor are put together, and only one of them
        counts from then on. Raises ValueError where they part later, and for NaN or Inf.
        """
        self.batch_size = self.batch_size or len(x)
        if self.in_backward:  # checkpointing runs a forward again
            return
        self.uses[name] += 1
        if "sketch" in self.needs:
            self._add_sketches(name, held, x)
        if not self.needs & {"covariance", "moment"}:
            return
        weight = self.weights[held[0]]
        if not weight.input:
            same = [n for n, each in self.inputs.items() if each.saw(x) and _siblings(n, name)]
            for p in held:
                self.weights[p].input = same[0] if same else name
        if weight.input == name:
            self._add(name, held, x)
        elif not self.inputs[weight.input].saw(x):
            raise ValueError(
                f"{name} and {weight.input} read the same input at first, but not in batch {self.number}: "
                f"they cannot be measured together; measure them apart, with exclude="
            )

    def _add(self, name: str, held: Sequence[Projection], x: Tensor) -> None:
        running = self.inputs.setdefault(name, _Input())
        running.seen.append(_Seen(x))
        rows, kept = self._rows(name, held, x)
        if "moment" in self.needs:
            flat = rows.reshape(-1, rows.shape[-1])
            running.moment = self._summed(running.moment, flat, x)
            total = flat.sum(0).to(running.moment.device)
            running.total = total if running.total is None else running.total + total
            running.tokens += len(flat) if kept is None else int(kept.sum())
        if "covariance" in self.needs:
            running.covariance = self._summed(running.covariance, _centred(rows, kept), x)

    def _add_sketches(self, name: str, held: Sequence[Projection], x: Tensor) -> None:
        """C times the columns of each: it takes (in, q) where C itself would take (in, in)."""
        centred = _centred(*self._rows(name, held, x))
        for p in held:
            columns = self.columns[p].to(centred)
            with _precision(x.device, half=_half(x)):
                added = (centred.T @ (centred @ columns)).to(self.device or centred.device)
            weight = self.weights[p]
            weight.sketch = added if weight.sketch is None else weight.sketch.add_(added)

    def _rows(self, name: str, held: Sequence[Projection], x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Each example's tokens in fp32 or better, padding zero, and which are kept (examples, tokens, 1)."""
        examples, mask = self._by_example(name, held, x)
        rows = examples.to(_wide(x))
        kept = None if mask is None else mask[..., None]
        if kept is not None:
            rows = torch.where(kept, rows, 0)
        if not torch.isfinite(rows.sum()):
            raise ValueError(f"NaN or Inf in the input of {name} in calibration batch {self.number}")
        return rows, kept

    def _summed(self, total: Tensor | None, rows: Tensor, x: Tensor) -> Tensor:
        """``total`` plus ``rowsᵀ·rows``, its lower triangle, where the statistics are kept."""
        home = self.device or rows.device
        if total is None:
            total = torch.zeros(rows.shape[1], rows.shape[1], dtype=rows.dtype, device=home)
        with _precision(x.device, half=_half(x)):
            if home == rows.device:
                return lower_gram(rows, total)
            return total.add_(lower_gram(rows).to(home))

    def _by_example(self, name: str, held: Sequence[Projection], x: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.masks.by_example(name, held, x.transpose(0, 1) if self._tokens_first(x) else x)

    def _tokens_first(self, x: Tensor) -> bool:
        return x.dim() == 3 and x.shape[1] == self.batch_size != x.shape[0]

    # -- gradients ------------------------------------------------------------------------------------

    @torch.no_grad()
    def see_gradient(
        self, name: str, held: Sequence[Projection], x: Tensor, dy: Tensor, first: int = 0
    ) -> None:
        """``dy`` (..., rows) is the gradient of x times ``held``'s tensor from its row ``first`` on.

        A module that is called several times has one gradient, the sum over its uses: it waits for the last.
        """
        if self._tokens_first(x):
            dy = dy.transpose(0, 1)
        x, _ = self._by_example(name, held, x)
        dy = dy.reshape(*x.shape[:-1], dy.shape[-1])
        self.pending.setdefault(name, []).append((held, first, x, dy))
        if len(self.pending[name]) >= self.uses[name]:
            self._finish(name)

    def _finish(self, name: str) -> None:
        uses = self.pending.pop(name)
        held, first = uses[0][:2]
        pairs = [(x, dy) for _, _, x, dy in uses]
        if len(pairs) > 1:  # an example's tokens of all uses, one after the other
            rows = [len(x) == 1 and x.shape[1] == self.batch_size for x, _ in pairs]
            pairs = [
                (x.transpose(0, 1), dy.transpose(0, 1)) if row else (x, dy)
                for row, (x, dy) in zip(rows, pairs, strict=True)
            ]
            if len({len(x) for x, _ in pairs}) == 1:
                pairs = [tuple(torch.cat(each, 1) for each in zip(*pairs, strict=True))]  # type: ignore[list-item]
        for x, dy in pairs:
            self._see_use(held, first, x, dy)

    def _see_use(self, held: Sequence[Projection], first: int, x: Tensor, dy: Tensor) -> None:
        half = _half(x) and _half(dy)
        for p in held:
            weight = p.weight(self.model).to(_wide(x))
            columns = dy[..., p.rows[0] - first : p.rows[1] - first]
            for inputs, outputs in zip(x, columns, strict=True):
                inputs, outputs = inputs.to(weight.dtype), outputs.to(weight.dtype)
                alone = len(x) == 1 and len(inputs) == self.batch_size
                if "gradient" in self.needs or not alone:
                    gradient = _weight_gradient(inputs, outputs, half, exact="gradient" in self.needs)
                    self._add_gradient(p, gradient)
                if alone:
                    # An example a row: |dy xᵀ| is |dy||x|ᵀ, so they add up before they are formed.
                    with fast_precision(x.device):
                        gradient = outputs.abs().T @ inputs.abs()
                self._add_sensitivity(p, weight, gradient)

    @torch.no_grad()
    def see_weight_gradient(self, held: Sequence[Projection], rows: Tensor) -> None:
        """``rows`` (rows, in) is the batch's gradient of the whole tensor that holds ``held``."""
        for p in held:
            own = rows[p.rows[0] : p.rows[1]]
            weight = p.weight(self.model).to(_wide(own))
            gradient = own.to(weight.dtype).clone()
            self._add_gradient(p, gradient)
            self._add_sensitivity(p, weight, gradient)

    # An example has one part in batch_size of the batch's mean loss: its own is batch_size times that.

    def _add_gradient(self, p: Projection, gradient: Tensor) -> None:
        if "gradient" in self.needs:
            own = gradient.to(self.device or gradient.device) * self.batch_size
            measured = self.weights[p]
            measured.gradient = own if measured.gradient is None else measured.gradient.add_(own)

    def _add_sensitivity(self, p: Projection, weight: Tensor, gradient: Tensor) -> None:
        """Consumes ``gradient``."""
        size = gradient.mul_(weight).abs_().sum().double()  # on a CPU a third of what a norm takes
        measured = self.weights[p]
        measured.sensitivity = measured.sensitivity + size * self.batch_size / weight.numel()

    # -- the end --------------------------------------------------------------------------------------

    def all_reduce(self) -> None:
        """Adds the sums of all processes, where there are several."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        everyone: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, {p: w.input for p, w in self.weights.items()})
        for p, weight in self.weights.items():  # an expert may have seen no token here
            weight.input = next((said[p] for said in everyone if said[p]), "")
        for name in sorted({said for each in everyone for said in each.values() if said}):
            running = self.inputs.setdefault(name, _Input())
            reader = next(p for p, weight in self.weights.items() if weight.input == name)
            for kind in ("covariance", "moment", "total"):
                if kind == "covariance" and "covariance" not in self.needs:
                    continue
                if kind != "covariance" and "moment" not in self.needs:
                    continue
                shape = (reader.in_features,) * (1 if kind == "total" else 2)
                setattr(running, kind, self._added(getattr(running, kind), shape, reader))
            running.tokens = int(self._added(torch.tensor(float(running.tokens)), (), reader))
        for p, weight in self.weights.items():
            if self.needs_backward:
                weight.sensitivity = self._added(
                    torch.as_tensor(weight.sensitivity, dtype=torch.float64), (), p
                )
            if "gradient" in self.needs:
                weight.gradient = self._added(weight.gradient, p.shape, p)
            if "sketch" in self.needs:
                weight.sketch = self._added(weight.sketch, tuple(self.columns[p].shape), p)
        self.examples = int(self._added(torch.tensor(float(self.examples)), (), next(iter(self.weights))))

    def _added(self, own: Tensor | None, shape: tuple[int, ...], p: Projection) -> Tensor:
        weight = p.weight(self.model)
        home = weight.device
        total = torch.zeros(shape, dtype=_wide(weight), device=home) if own is None else own.to(home)
        torch.distributed.all_reduce(total)
        return total.to(self.device or home)

    def statistics(self) -> Statistics:
        """The means. Raises ValueError where a projection's input was never seen."""
        examples = max(self.examples, 1)
        for each in self.inputs.values():
            if each.covariance is not None:
                symmetric(each.covariance).div_(examples)
            if each.moment is not None and each.total is not None:
                symmetric(each.moment).div_(max(each.tokens, 1))
                each.total = each.total / max(each.tokens, 1)
        return Statistics({p: self._statistics_of(p, weight, examples) for p, weight in self.weights.items()})

    def _statistics_of(self, p: Projection, weight: _Weight, examples: int) -> ProjectionStatistics:
        read = self.inputs.get(weight.input, _Input())
        if self.needs & {"covariance", "moment"} and not weight.input:
            stored = p.weight(self.model)
            if not p.block:
                raise ValueError(
                    f"{p.name} was never called on the calibration batches, so its input is unknown"
                )
            nothing = torch.zeros(p.in_features, p.in_features, dtype=_wide(stored), device=stored.device)
            read = _Input(nothing, nothing, nothing[0])  # an expert that no token was routed to
        gradient = weight.gradient
        if "gradient" in self.needs and gradient is None:
            stored = p.weight(self.model)
            gradient = torch.zeros(p.shape, dtype=_wide(stored), device=self.device or stored.device)
        sketch = weight.sketch
        if "sketch" in self.needs:
            sketch = torch.zeros_like(self.columns[p]) if sketch is None else sketch.div_(examples)
        return ProjectionStatistics(
            sketch=sketch,
            covariance=read.covariance if "covariance" in self.needs else None,
            moment=read.moment if "moment" in self.needs else None,
            mean=read.total if "moment" in self.needs else None,
            sensitivity=float(weight.sensitivity) / examples if "sensitivity" in self.needs else None,
            gradient=gradient.div_(examples) if gradient is not None else None,
        )


def _centred(rows: Tensor, kept: Tensor | None) -> Tensor:
    """Each example's tokens around their own mean, (examples · tokens, in); padding stays zero."""
    if kept is None:
        centred = rows - rows.mean(1, keepdim=True)
    else:
        means = rows.sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp_min(1)
        centred = torch.where(kept, rows - means, 0)
    return centred.reshape(-1, rows.shape[-1])


def _weight_gradient(inputs: Tensor, outputs: Tensor, half: bool, *, exact: bool) -> Tensor:
    """``outputsᵀ·inputs`` of fp32 copies of ``half`` or other numbers.

    Where it need not be exact the inputs are taken around their mean: what is common to all tokens often
    cancels, and its rounding would not.
    """
    if exact or half:
        with _precision(inputs.device, half=half):
            return outputs.T @ inputs
    mean = inputs.mean(0)
    with fast_precision(inputs.device):
        return (outputs.T @ (inputs - mean)).addr_(outputs.sum(0), mean)


def _half(x: Tensor) -> bool:
    """Are fast products of fp32 copies of ``x`` no less exact than x itself? TF32 holds all of fp16."""
    return x.dtype == torch.bfloat16 or (x.dtype == torch.float16 and x.is_cuda)


def _precision(device: torch.device, *, half: bool) -> AbstractContextManager[None]:
    return fast_precision(device) if half else full_precision(device)


def _siblings(path: str, other: str) -> bool:
    return path.rpartition(".")[0] == other.rpartition(".")[0]


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
