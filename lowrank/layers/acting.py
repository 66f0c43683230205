"""Which adapters act: what the adapted layers of one model share, so that a choice is one assignment.

It knows names only, no layer. Who may act together is for others to check.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

from torch import Tensor

from lowrank.layers.copied import renew_copies
from lowrank.layers.grouped import ExampleAdapters

T = TypeVar("T")


class Acting:
    """The names of the adapters that act, in order, and the weights of some of them.

    Args:
        names: what acts; a layer that has no adapter of a name ignores it.
        weights: name → 0-dim tensor that ΔW is multiplied by; a name without one acts with exactly 1. A
            tensor, because compiled code keeps a number as a constant.
    """

    def __init__(self, names: Iterable[str] = (), weights: Mapping[str, Tensor] | None = None) -> None:
        self.names = tuple(names)
        self.weights = dict(weights or {})
        self.rows: ExampleAdapters | None = None  # an adapter for each example; then no names act

    def choose(
        self, names: Iterable[str], weights: Mapping[str, Tensor], rows: ExampleAdapters | None = None
    ) -> None:
        self.names, self.weights, self.rows = tuple(names), dict(weights), rows
        renew_copies()

    def among(self, held: Mapping[str, T]) -> Iterator[tuple[T, Tensor | None]]:
        """What of ``held`` acts, each with its weight; None is 1."""
        for name in self.names:
            if name in held:
                yield held[name], self.weights.get(name)

    def why_idle(self, held: Iterable[str]) -> str:
        """Why some of ``held`` get no gradient, and what to do; empty where all of them act."""
        resting = [] if self.rows is not None else [name for name in held if name not in self.names]
        if not resting:
            return ""
        who = " and ".join(map(repr, resting))
        said = f"the adapters {who} do" if len(resting) > 1 else f"the adapter {who} does"
        return (
            f"{said} not act: choose with set_adapters, and train what acts alone, with "
            "parameters=adapter_parameters(model, name, train=True)"
        )

    def __repr__(self) -> str:
        shown = (f"{n}: {float(self.weights[n]):.4g}" if n in self.weights else n for n in self.names)
        return f"{type(self).__name__}({', '.join(shown)})"
