"""Which of what is to train the loss does not reach, in words that lead to it in the model.

A module with ``is_layer = True`` is named as one, by its path, whatever it keeps its parameters in; of
two, one inside the other, it is the inner one. Its ``why_idle`` may say in words why they get no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import nn

from lowrank.processes import whole


def unused(model: nn.Module, parameters: Sequence[nn.Parameter]) -> list[str]:
    """What has no gradient: layers by their path, with the parts where it is not all that they train; other
    parameters by their name, or by their shape where ``model`` does not hold them."""
    return [name for names in _chosen(model, parameters, lambda p: p.grad is None).values() for name in names]


def reasons(model: nn.Module, parameters: Sequence[nn.Parameter]) -> list[str]:
    """What the layers that hold some of ``parameters`` without a gradient say of that, each once."""
    idle = {p for p in parameters if p.grad is None}
    said = (getattr(m, "why_idle", "") for m in model.modules() if not idle.isdisjoint(m.parameters()))
    return [why for why in dict.fromkeys(said) if why]


def unmoved(model: nn.Module, parameters: Sequence[nn.Parameter]) -> list[str]:
    """Layers whose gradient is there and exactly zero in all that they train, by their path."""
    found = _chosen(model, parameters, lambda p: p.grad is not None and not whole(p.grad).any())
    layers = _layers(model)
    return [layer for layer, names in found.items() if names == [layer] and layer in layers]


def _chosen(
    model: nn.Module, parameters: Sequence[nn.Parameter], chosen: Callable[[nn.Parameter], bool]
) -> dict[str, list[str]]:
    """By layer, or parameter that is in none: what to call those of its parameters that are chosen."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    layers = _layers(model)
    held: dict[str, list[nn.Parameter]] = {}
    for parameter in parameters:
        name = names.get(parameter, f"one of shape {tuple(parameter.shape)}")
        above = (path for path in _above(name) if path in layers)
        held.setdefault(next(above, name), []).append(parameter)
    found = {}
    for name, members in held.items():
        those = [parameter for parameter in members if chosen(parameter)]
        if name not in layers:
            found[name] = [name] * len(those)
        elif len(those) < len(members):
            parts = ", ".join(names[parameter].removeprefix(f"{name}.") for parameter in those)
            found[name] = [f"{name} ({parts})"] if those else []
        else:
            found[name] = [name]
    return found


def _above(name: str) -> Iterator[str]:
    """The paths of the modules that hold the parameter ``name``, the innermost first."""
    while name := name.rpartition(".")[0]:
        yield name


def _layers(model: nn.Module) -> set[str]:
    return {path for path, module in model.named_modules() if path and getattr(module, "is_layer", False)}
