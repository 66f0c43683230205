"""``lowrank combine``: the weighted sum of adapters as one."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import lowrank
from lowrank.cli.models import load, load_onto


def run(options: Namespace) -> None:
    shares = [_share(text) for text in options.adapters]
    model = load(options.base)
    for i, (path, _) in enumerate(shares):
        load_onto(model, path, f"part{i}")
    weights = {f"part{i}": weight for i, (_, weight) in enumerate(shares)}
    lowrank.combine_adapters(model, weights, name="combined", rank=options.rank)
    lowrank.save_adapter(model, options.out, "combined")
    plan = lowrank.plan_of(model, "combined")
    found = {"out": str(options.out), "notes": list(plan.notes)}
    print(json.dumps(found) if options.json else f"{options.out}: {plan!r}; {'; '.join(plan.notes)}")


def _share(text: str) -> tuple[Path, float]:
    """``folder=0.5`` as a folder and its weight; a folder of such a name comes first."""
    folder, equals, weight = text.rpartition("=")
    if not equals or Path(text).exists():
        return Path(text), 1.0
    try:
        return Path(folder), float(weight)
    except ValueError:
        raise ValueError(f"{text}: expected FOLDER=WEIGHT with a number, got {weight!r}") from None
