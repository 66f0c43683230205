"""A copy of a module that shares nothing with it that can be written to; where there is none, it says so.

All that the module holds is copied: lists, caches, counters, generators, methods bound to it. Only code is
shared. What a class or a file holds is not the module's, and is not copied.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from types import BuiltinFunctionType, CellType, FunctionType, ModuleType, NoneType
from typing import Any

import torch
from torch import Tensor, nn

MOST = 2**28  # numbers in a copy: 2 GiB in fp64
DROPPED = ("forward", "_compiled_call_impl")  # put in the place of the class's own by others


class NoCopyError(Exception):
    """The module holds something that has no copy, or that others may hold too; it says what."""


def copied(
    module: nn.Module,
    new: Callable[[Tensor], Tensor],
    device: torch.device,
    given: Mapping[int, Tensor] | None = None,
) -> Any:
    """``module`` without its hooks, in evaluation mode, with nothing that requires grad.

    Args:
        new: makes the copy's tensor of each plain one: of a parameter, a buffer, or any other.
        device: what it holds in the place of any device.
        given: tensors of the copy by the ids of those of ``module``, which ``new`` is not asked for.

    Raises:
        NoCopyError: it holds a module that is not in it, a tensor that is not `is_plain` or whole numbers,
            an open file or a lock, or the copy would hold more than `MOST` numbers.
    """
    given = given or {}
    _refuse_too_many(
        each.numel() for each in (*module.parameters(), *module.buffers()) if id(each) not in given
    )
    file = io.BytesIO()
    writer = _Writer(file, module, new, device, given)
    try:
        writer.dump(module)
        file.seek(0)
        copy = _Reader(file, writer.kept).load()
    except NoCopyError:
        raise
    except Exception as error:  # whatever a stranger's object raises
        raise NoCopyError(f"{type(error).__name__}: {error}") from error
    for each in copy.modules():  # not by eval(), of which some do more
        each.training = False
    return copy


def is_plain(tensor: object) -> bool:
    """Is it a floating-point tensor with its numbers here, and nothing beside them?"""
    return (
        type(tensor) in (nn.Parameter, Tensor)
        and not tensor.is_meta  # type: ignore[attr-defined]
        and tensor.is_floating_point()  # type: ignore[attr-defined]
        and tensor.element_size() > 1  # type: ignore[attr-defined]
    )


def can_be_copied(module: nn.Module) -> bool:
    """Are its numbers stored as they are: not quantized, sharded, still to come, or on the meta device?

    This is quick, and `copied` may still find something that it cannot copy.
    """
    return all(map(_has_a_copy, (*module.parameters(), *module.buffers())))


def _refuse_too_many(numbers: Iterable[int]) -> None:
    if sum(numbers) > MOST:
        raise NoCopyError(f"a copy would hold more than {MOST} numbers")


def _has_a_copy(tensor: Tensor) -> bool:
    whole = type(tensor) in (nn.Parameter, Tensor) and not (  # a class of its own may share what it holds
        tensor.is_floating_point() or tensor.is_complex() or tensor.is_quantized or tensor.is_meta
    )
    return whole or is_plain(tensor)


class _Writer(pickle.Pickler):
    """Writes a module down, with numbers in the place of what `_Reader` is to take as it is."""

    def __init__(
        self,
        file: io.BytesIO,
        module: nn.Module,
        new: Callable[[Tensor], Tensor],
        device: torch.device,
        given: Mapping[int, Tensor],
    ) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.inside = set(module.modules())
        self.new, self.device, self.given = new, device, given
        self.kept: list[Any] = []
        self.tensors: dict[int, int] = {}  # their places in `kept`, by id
        self.numbers = 0

    def persistent_id(self, value: Any) -> int | None:
        if isinstance(value, Tensor):
            if id(value) not in self.tensors:
                self.tensors[id(value)] = self._keep(self._tensor(value))
            return self.tensors[id(value)]
        if isinstance(value, torch.device):
            return self._keep(self.device)
        if isinstance(value, _AsItIs):
            return self._keep(value.held)
        return self._keep(value) if _is_code(value) else None

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, nn.Module):
            if value not in self.inside:
                raise NoCopyError(f"it holds a {type(value).__name__} that is none of its modules")
            if isinstance(value, torch.jit.ScriptModule):
                raise NoCopyError(f"{type(value).__name__} is compiled by TorchScript")
            state = {
                name: OrderedDict() if "_hooks" in name and isinstance(held, dict) else held
                for name, held in vars(value).items()
                if name not in DROPPED
            }
            return _bare, (type(value),), state, None, None, _fill
        if isinstance(value, FunctionType):
            contents = tuple(cell.cell_contents for cell in value.__closure__ or ())
            return _rebuilt, (_AsItIs(value), contents)
        return NotImplemented

    def _tensor(self, tensor: Tensor) -> Tensor:
        made = self.given.get(id(tensor))
        if made is None:
            if not _has_a_copy(tensor):
                raise NoCopyError(f"it holds a {type(tensor).__name__} of {tensor.dtype}")
            self.numbers += tensor.numel()
            _refuse_too_many([self.numbers])
            made = self.new(tensor if isinstance(tensor, nn.Parameter) else tensor.detach())
        return nn.Parameter(made, requires_grad=False) if isinstance(tensor, nn.Parameter) else made

    def _keep(self, value: Any) -> int:
        self.kept.append(value)
        return len(self.kept) - 1


class _Reader(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, kept: list[Any]) -> None:
        super().__init__(file)
        self.kept = kept

    def persistent_load(self, number: int) -> Any:
        return self.kept[number]


class _AsItIs:
    """Around what the copy is to hold itself."""

    def __init__(self, held: Any) -> None:
        self.held = held


def _is_code(value: Any) -> bool:
    """Is it a class, a module, or a function that holds nothing?"""
    if isinstance(value, FunctionType):
        return not value.__closure__
    if isinstance(value, BuiltinFunctionType):
        return isinstance(value.__self__, (NoneType, ModuleType, type))
    return isinstance(value, (type, ModuleType))


def _bare(kind: type[nn.Module]) -> nn.Module:
    return kind.__new__(kind)


def _fill(module: nn.Module, state: dict[str, Any]) -> None:
    vars(module).update(state)


def _rebuilt(function: FunctionType, contents: tuple[Any, ...]) -> FunctionType:
    """The same function around other values."""
    cells = tuple(map(CellType, contents))
    made = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, cells
    )
    made.__kwdefaults__ = function.__kwdefaults__
    return made
