"""Samples of a base's weights: an adapter or a statistic that meets another base is noticed by them.

A few values of each tensor are kept, its last row's among them; a change of other values only is not noticed.
It knows no adapter; `checkpoint` and `measure` say what is compared with what.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.linalg.rows import view
from lowrank.models.experts import stack_of
from lowrank.models.projections import Projection
from lowrank.models.storage import as_rows, packed, rows_of, weight_shape
from lowrank.processes import is_sharded, whole

OF_PROJECTION = 64  # values of an adapted or measured weight, evenly spread
OF_TENSOR = 8, 4  # values of any other tensor: evenly spread, and in its last row


@dataclass(frozen=True, eq=False)
class Sample:
    """Some values of one tensor, and how it is stored.

    dtype: as torch spells it ("bfloat16"); of a packed weight with its class ("Params4bit of uint8").
    shape: of the tensor, dequantized; None in samples of projections, which have shapes of their own.
    values: (n,) fp64 on the CPU, dequantized, rounded to fp32; None where they cannot be read: on the meta
        device, or packed in a way that is not known.
    """

    dtype: str
    shape: tuple[int, ...] | None
    values: Tensor | None

    @property
    def packed(self) -> bool:
        return " of " in self.dtype

    def to_json(self) -> dict[str, Any]:
        """Plain data, for `from_json`; 9 digits tell fp32 values apart."""
        values = None if self.values is None else " ".join(f"{value:.9g}" for value in self.values.tolist())
        return {"dtype": self.dtype, "shape": self.shape, "values": values}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Sample:
        """Raises ValueError, KeyError, TypeError or AttributeError where ``data`` is something else."""
        shape, values = data["shape"], data["values"]
        if values is not None:
            values = torch.tensor([float(value) for value in values.split()], dtype=torch.float64)
        return cls(str(data["dtype"]), None if shape is None else tuple(map(int, shape)), values)


def of_projection(module: nn.Module, p: Projection) -> Sample:
    """A sample of the rows of ``p``, whose weight ``module`` holds."""
    stored = module._parameters[p.param]
    assert stored is not None
    dtype, weight = _dtype(stored), _read_rows(module, p)
    if weight is None:
        return Sample(dtype, None, None)
    if p.shared > 1:  # some values of each expert
        each = [
            _read_rows(module, expert) for expert in p.apart(weight_shape(module, p.param)[0] // p.shared)
        ]
        places = spread(weight.numel(), max(OF_PROJECTION, p.shared))
        taken = [_values(w, places[e :: p.shared]) for e, w in enumerate(each) if w is not None]
        return Sample(dtype, None, torch.cat([values for values in taken if values is not None]))
    return Sample(dtype, None, _values(weight, spread(weight.numel(), OF_PROJECTION)))


def of_projections(model: nn.Module, projections: Iterable[Projection]) -> dict[Projection, Sample]:
    """`of_projection` of each, in a model that is not wrapped; what is no parameter is left out."""
    found = {}
    for p in projections:
        module = model.get_submodule(p.module)
        if module._parameters.get(p.param) is not None:
            found[p] = of_projection(module, p)
    return found


def of_tensor(module: nn.Module, name: str, without: Sequence[int] = ()) -> Sample | None:
    """A sample of a parameter or persistent buffer of ``module``; None where there is nothing to compare.

    What would be of the rows ``without`` is left out.
    Whole numbers that stand for no weight (positions, counters, packed words) are not compared.
    """
    stored: Tensor | None = module._parameters.get(name)
    buffer = stored is None
    if buffer and name not in module._non_persistent_buffers_set:
        stored = module._buffers.get(name)
    if stored is None or not stored.numel() or stored.is_complex():
        return None
    if buffer and not stored.is_floating_point():
        return None
    dtype, coded = _dtype(stored), _packed(stored)
    tensor = _read(module, name) if coded else None if stored.is_meta else whole(stored.detach())
    if tensor is None:
        return None if coded else Sample(dtype, tuple(stored.shape), None)
    count, last = OF_TENSOR
    row = tensor.numel() // tensor.shape[0] if tensor.dim() else 1
    places = torch.cat([spread(tensor.numel(), count), tensor.numel() - row + spread(row, last)])
    if without:
        places = places[~torch.isin(places // row, torch.tensor(without))]
    return Sample(dtype, tuple(tensor.shape), _values(tensor, places))


def difference(here: Sample, there: Sample) -> str | None:
    """How the tensor ``here`` differs from the one ``there`` was taken of, in words; None where it does not.

    Numbers of the same dtype must be equal. Another dtype may differ by its rounding, and a packed weight by
    its quantization, which is not the same to the bit on every device. What cannot be read is not compared.
    """
    if here.shape and there.shape and here.shape != there.shape:
        return f"expected the shape {there.shape}, got {here.shape}"
    if here.values is None or there.values is None:
        return None
    if len(here.values) != len(there.values):
        return f"expected a fingerprint of {len(here.values)} samples, got {len(there.values)}"
    if here.dtype == there.dtype:
        # The scales of a packed weight may be rounded later, as bitsandbytes does on some CPUs, and another
        # device may round to another step.
        allowed = 0.05 if here.packed else 0.0
    else:
        allowed = 0.25 if here.packed or there.packed else max(0.02, _eps(here.dtype), _eps(there.dtype))
    a, b = here.values.float(), there.values.float()
    same = (a == b) | (a.isnan() & b.isnan())
    distance = float((a - b)[~same].norm() / b[b.isfinite()].norm().clamp_min(1e-30))
    if distance <= allowed:
        return None
    share = f"{100 * distance:.3g}%" if distance < 9.99 else "more than 1000%"  # of what may be all zeros
    return f"its weights differ by {share} ({there.dtype} then, {here.dtype} here)"


def differences(here: Mapping[Any, Sample], there: Mapping[Any, Sample]) -> dict[Any, str]:
    """`difference` of what both hold, where there is one."""
    found = {key: difference(here[key], there[key]) for key in there if key in here}
    return {key: text for key, text in found.items() if text is not None}


def _dtype(stored: Tensor) -> str:
    dtype = str(stored.dtype).removeprefix("torch.")
    return f"{type(stored).__name__} of {dtype}" if _packed(stored) else dtype


def _packed(stored: Tensor) -> bool:
    return packed(stored) or not (type(stored) in (nn.Parameter, Tensor) or is_sharded(stored))


def _read(module: nn.Module, param: str) -> Tensor | None:
    """The parameter dequantized, as `as_rows` lays it out; None where it cannot be read."""
    try:
        tensor = as_rows(module, param)
    except (ValueError, RuntimeError):  # RuntimeError: a tensor's class that does not know the operation
        return None
    return None if tensor.is_meta else tensor


def _read_rows(module: nn.Module, p: Projection) -> Tensor | None:
    """The rows of ``p`` in the parameter, without a copy where that can be; None where it cannot be read."""
    stored = module._parameters[p.param]
    if stored is not None and stack_of(module, p.param) is not None and not _packed(stored):
        return None if stored.is_meta else rows_of(module, p.param, p.rows)
    weight = _read(module, p.param)
    return None if weight is None else view(weight, p.rows)


def spread(size: int, count: int) -> Tensor:
    """At most ``count`` places from 0 to ``size`` − 1."""
    return torch.linspace(0, size - 1, min(count, size), dtype=torch.float64).long()


def _values(tensor: Tensor, places: Tensor) -> Tensor | None:
    """The values at ``places``, counted row by row, without a copy of the whole."""
    try:
        taken = tensor[_index(places.to(tensor.device), tensor.shape)] if tensor.dim() else tensor.reshape(1)
        return taken.float().double().cpu()
    except RuntimeError:  # a tensor's class that cannot be indexed
        return None


def _index(places: Tensor, shape: Sequence[int]) -> tuple[Tensor, ...]:
    """`torch.unravel_index`, which imports sympy at its first call: half a second."""
    index = []
    for size in reversed(shape):
        index.append(places % size)
        places = places.div(size, rounding_mode="floor")
    return tuple(reversed(index))


def _eps(dtype: str) -> float:
    kind = getattr(torch, dtype, None)
    return torch.finfo(kind).eps if isinstance(kind, torch.dtype) and kind.is_floating_point else 0.0
