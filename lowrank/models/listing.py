"""Many modules in one line: those that differ by numbers only are counted, large ones are never cut off."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch import Tensor, nn

LARGE = 0.01  # of the model's parameters


def listed(modules: Iterable[str], large: Collection[str] = ()) -> str:
    """``head, layers.*.mlp.gate (12)``: modules that differ by numbers only are counted.

    Six kinds, those that hold a ``large`` module first, and all of these.
    """
    kinds: dict[str, list[str]] = {}
    for module in dict.fromkeys(modules):
        pattern = ".".join("*" if part.isdigit() else part for part in module.split("."))
        kinds.setdefault(pattern, []).append(module)
    count = max(6, sum(any(module in large for module in held) for held in kinds.values()))
    if len(kinds) > count:
        kinds = dict(sorted(kinds.items(), key=lambda kind: not any(module in large for module in kind[1])))
    shown = [held[0] if len(held) == 1 else f"{pattern} ({len(held)})" for pattern, held in kinds.items()]
    return ", ".join(shown[:count]) + (f" and {len(shown) - count} kinds more" if len(shown) > count else "")


def large_weights(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Those of ``names``, modules or weights, that hold more than `LARGE` of the model's parameters."""
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    whole = sum(parameter.numel() for parameter in parameters.values())

    def size(name: str) -> int:
        module = modules.get(name)
        held = parameters.get(name) if module is None else getattr(module, "weight", None)
        return held.numel() if isinstance(held, Tensor) else 0

    return {name for name in names if size(name) > LARGE * whole}
