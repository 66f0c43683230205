"""``lowrank combine``: the weighted sum of adapters as one."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Collection
from itertools import chain, count
from pathlib import Path

import lowrank
from lowrank.cli.models import load, load_onto


def run(options: Namespace) -> None:
    shares = [_share(text) for text in options.adapters]
    model = load(options.base, quiet=options.quiet)
    weights: dict[str, float] = {}
    for path, weight in shares:
        name = _name(path, weights)
        load_onto(model, path, name)
        weights[name] = weight
    name = _name(options.out, weights)
    lowrank.combine_adapters(model, weights, name=name, rank=options.rank)
    lowrank.save_adapter(model, options.out, name)
    plan = lowrank.plan_of(model, name)
    found = {"out": str(options.out), "notes": list(plan.notes)}
    print(json.dumps(found) if options.json else f"{options.out}: {plan!r}; {'; '.join(plan.notes)}")


def _name(path: Path, taken: Collection[str]) -> str:
    """The folder's name as that of an adapter, which has no dots; numbered where it is taken."""
    name = path.resolve().name.replace(".", "_")
    return next(each for each in chain([name], (f"{name}-{i}" for i in count(2))) if each not in taken)


def _share(text: str) -> tuple[Path, float]:
    """``adapter=0.5`` as a path and a weight; a path of such a name comes first."""
    folder, equals, weight = text.rpartition("=")
    if not equals or Path(text).exists():
        return Path(text), 1.0
    try:
        return Path(folder), float(weight)
    except ValueError:
        raise ValueError(f"{text}: expected ADAPTER=WEIGHT with a number, got {weight!r}") from None
