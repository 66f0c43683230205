"""Parameters kept in fp32 that read in the dtype of a half-precision original: a module to train in full.

Each module's class is exchanged for a subclass on which a parameter's name reads as the parameter in the
original's dtype, differentiably. So whatever the module does with it, in its own forward or from outside,
computes as the original, while the optimizer, state dicts and ``parameters()`` see fp32. The price is a cast
at each reading.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor, nn

from lowrank.layers.bases import master_dtype


class ReadsAsOriginal:
    """Marks a module whose parameters read in the dtype of another's. See `keep_masters`."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        bases = type(self).__mro__
        at = bases.index(ReadsAsOriginal)
        names = tuple(name for name, member in vars(bases[at - 1]).items() if isinstance(member, _Reader))
        return _restore, (bases[at + 1], names), self.__dict__


def keep_masters(module: nn.Module, original: nn.Module) -> None:
    """Brings the parameters of ``module`` to fp32 (fp64 stays) and lets them read as those of ``original``,
    of which ``module`` is a copy, in the dtype that these have at the time. Buffers stay as they are.

    Where nothing is in half precision, nor still to be loaded, there is nothing to do.
    """
    parameters = list(module.parameters())
    if not any(p.is_meta or p.dtype != master_dtype(p.dtype) for p in parameters):
        return
    for parameter in parameters:  # in place: what is tied stays tied
        parameter.data = parameter.data.to(master_dtype(parameter.dtype))
    for path, part in module.named_modules():
        names = tuple(name for name, parameter in part._parameters.items() if parameter is not None)
        cls: Any = type(part)
        if names or isinstance(getattr(cls, "dtype", None), property):
            part.__dict__["_original"] = original.get_submodule(path)
            part.__class__ = _class(cls, names)


class _Reader(property):
    """Reads a parameter in the original's dtype."""

    def __init__(self, name: str) -> None:
        super().__init__(lambda module: _read(module, name))


def _read(module: Any, name: str) -> Tensor:
    return module._parameters[name].to(module.__dict__["_original"]._parameters[name].dtype)


@cache
def _class(original: type, names: tuple[str, ...]) -> type:
    members: dict[str, Any] = {name: _Reader(name) for name in names}
    if isinstance(getattr(original, "dtype", None), property):  # transformers derive it from the parameters
        members["dtype"] = property(lambda module: module.__dict__["_original"].dtype)
    if issubclass(original, nn.RNNBase):  # which holds its parameters in a list besides
        members["_flat_weights"] = property(
            lambda module: [getattr(module, name) for name in module._flat_weights_names],
            lambda module, weights: None,
        )
    # Under the original's name: transformers looks classes up by it.
    members |= {"__module__": original.__module__, "__qualname__": original.__qualname__}
    return type(original.__name__, (ReadsAsOriginal, original), members)


def _restore(original: Any, names: tuple[str, ...]) -> nn.Module:
    cls: Any = _class(original, names)
    return cls.__new__(cls)
