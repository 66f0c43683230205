"""Copies of a model's factors in the dtype of its activations, made for all its layers by one operation.

A small model on a GPU waits for launches, and to cast A and B in each layer takes two of them. Masters in
fp32 then cost no more than factors in half precision. It multiplies nothing and knows no layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from weakref import ref

import torch
from torch import Tensor, nn

from lowrank.layers.block import Block
from lowrank.layers.transient import Transient

DEVICES = frozenset({"cuda"})  # where a launch takes longer than the cast of a factor


class Copies:
    """The factors of one adapter as products take them: ``low`` (width, in), ``high`` (rows, width).

    Good for one pass: until backward has gone through them, or a factor was written to or moved.
    """

    __slots__ = ("_factors", "_seen", "_stream", "dtype", "high", "low")

    def __init__(self, block: Block, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.low: Tensor | None = None
        self.high: Tensor | None = None
        self._factors = tuple(None if each is None else ref(each) for each in _factors(block))
        self._seen: tuple[tuple[int, int], ...] = ()
        self._stream = 0

    def spend(self) -> None:
        """Backward has gone through them: what comes next may be a step, which may leave no trace."""
        self.low = self.high = None

    def are_of(self, block: Block, dtype: torch.dtype) -> bool:
        return self.dtype is dtype and all(
            each is (None if held is None else held())
            for each, held in zip(_factors(block), self._factors, strict=True)
        )

    def current(self, stream: int) -> bool:
        return self.low is not None and self._stream == stream and self._seen == _state(self.factors())

    def factors(self) -> list[Tensor | None]:
        return [None if each is None else each() for each in self._factors]

    def fill(self, low: Tensor, high: Tensor, stream: int) -> None:
        self.low, self.high, self._stream = low, high, stream
        self._seen = _state(self.factors())


class Casts(Transient):
    """The `Copies` of the adapters of one model, renewed together when the first of them is needed."""

    def __init__(self) -> None:
        self._held: dict[int, Copies] = {}  # by the id of A

    def of(self, block: Block, x: Tensor) -> Copies | None:
        """The factors of ``block`` in x's dtype; None where a call has to cast them for itself.

        That is on a CPU, while a CUDA graph is captured, under the compiler, and for factors that are no
        parameters of their own: sharded, replicated, or weighted in a mixture.
        """
        A, B, device = block.A, block.B, x.device
        if device.type not in DEVICES or torch.compiler.is_compiling():
            return None
        if type(A) is not nn.Parameter or type(B) is not nn.Parameter or not A.device == B.device == device:
            return None
        if block.A0 is None and A.dtype is x.dtype and B.dtype is x.dtype:
            return None
        if A.is_inference() or B.is_inference():
            return None
        stream = 0
        if device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                return None
            stream = torch._C._cuda_getCurrentRawStream(device.index)
        held = self._held.get(id(A))
        if held is None or not held.are_of(block, x.dtype):
            held = self._held[id(A)] = Copies(block, x.dtype)
        if not held.current(stream):
            self._renew(held, device, stream)
        return held

    def _renew(self, wanted: Copies, device: torch.device, stream: int) -> None:
        """All that are of the same dtype and device and out of date; ``wanted`` is among them."""
        alive = {}
        for key, each in self._held.items():
            A, B = each.factors()[:2]
            if A is not None and B is not None:
                alive[key] = each
        self._held = alive
        _fill(
            (
                each
                for each in alive.values()
                if each is wanted
                or (each.dtype is wanted.dtype and not each.current(stream) and _there(each, device))
            ),
            stream,
        )


def _factors(block: Block) -> tuple[Tensor | None, ...]:
    return block.A, block.B, block.A0, block.B0


def _state(factors: Iterable[Tensor | None]) -> tuple[tuple[int, int], ...]:
    return tuple((each.data_ptr(), each._version) for each in factors if each is not None)


def _there(copies: Copies, device: torch.device) -> bool:
    """Are the factors on the device, and not given back for a while, as those of sharded modules are?"""
    return all(
        each is None or (each.device == device and each.untyped_storage().nbytes() > 0)
        for each in copies.factors()
    )


@torch.no_grad()
def _fill(several: Iterable[Copies], stream: int) -> None:
    whole: tuple[list[Tensor], list[Tensor]] = ([], [])  # targets and sources, whose memory is in one piece
    columns: tuple[list[Tensor], list[Tensor]] = ([], [])  # targets that are some columns
    anchored: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])  # sums, and what is added

    def copy(target: Tensor, source: Tensor, into: tuple[list[Tensor], list[Tensor]]) -> None:
        into[0].append(target)
        into[1].append(source)

    for each in several:
        A, B, A0, B0 = each.factors()
        assert A is not None and B is not None
        rank, width = len(A), len(A) if A0 is None else 2 * len(A)
        low = torch.empty(width, A.shape[1], dtype=each.dtype, device=A.device)
        high = torch.empty(len(B), width, dtype=each.dtype, device=A.device)
        if A0 is None or B0 is None:
            copy(low, A, whole)
            copy(high, B, whole)
        else:
            for held, new in zip(anchored, (low[:rank], A0, A), strict=True):
                held.append(new)
            copy(low[rank:], A, whole)
            copy(high[:, :rank], B, columns)
            copy(high[:, rank:], B0, columns)
        each.fill(low, high, stream)
    if anchored[0]:
        whole[0].extend(anchored[0])
        whole[1].extend(torch._foreach_add(anchored[1], anchored[2]))
    for targets, sources in (whole, columns):
        if targets:
            torch._foreach_copy_(targets, sources)
