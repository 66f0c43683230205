"""``lowrank diff``: how far two adapters are from each other."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence

import torch
from torch import Tensor

from lowrank.cli.saved import Saved, Update, read, whole
from lowrank.linalg.rows import spread
from lowrank.peft_format.pairs import relative_distance

ROUNDING = 1e-12  # of distances, which are taken in fp64: the same products in other factors


def run(options: Namespace) -> int:
    one, other = read(options.one), read(options.other)
    distances, problems = _compare(one, other)
    distances = {name: 0.0 if distance < ROUNDING else distance for name, distance in distances.items()}
    differs = bool(problems) or any(distances.values())
    if options.json:
        print(json.dumps({"equal": not differs, "distances": distances, "problems": problems}, indent=1))
        return int(differs)
    for problem in problems:
        print(problem)
    for name, distance in sorted(distances.items(), key=lambda pair: -pair[1]):
        if distance > 0:
            print(f"{name}: |ΔW₁ − ΔW₂| / |ΔW₂| = {distance:.3g}")
    print("the two adapters differ" if differs else "the two adapters are equal")
    return int(differs)


def _compare(one: Saved, other: Saved) -> tuple[dict[str, float], list[str]]:
    first, second = one.by_weight(), other.by_weight()
    problems = [f"{name}: only in {one.path}" for name in sorted(first.keys() - second.keys())]
    problems += [f"{name}: only in {other.path}" for name in sorted(second.keys() - first.keys())]
    distances = {}
    for name in sorted(first.keys() & second.keys()):
        out = max(update.rows[1] for update in first[name] + second[name])
        pairs = whole(first[name], out), whole(second[name], out)
        if pairs[0].A.shape[1] != pairs[1].A.shape[1]:
            problems.append(f"{name}: {pairs[0].A.shape[1]} inputs and {pairs[1].A.shape[1]}")
        elif all(torch.equal(a, b) for a, b in zip(pairs[0][:2], pairs[1][:2], strict=True)):
            distances[name] = 0.0
        else:
            distances[name] = relative_distance(*pairs)
        if not _same(_magnitudes(first[name], out), _magnitudes(second[name], out)):
            problems.append(f"{name}: the magnitudes (DoRA) are not the same")
    for name in sorted(one.trained.keys() | other.trained.keys()):
        a, b = one.trained.get(name), other.trained.get(name)
        if not _same(a, b):
            problems.append(f"{name}: trained in full, and not the same")
    return distances, problems


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)


def _magnitudes(updates: Sequence[Update], out: int) -> Tensor | None:
    """Of all ``out`` rows, zero where they are not adapted; None without any."""
    parts = [spread(u.magnitudes, u.rows, out) for u in updates if u.magnitudes is not None]
    return sum(parts[1:], parts[0]) if parts else None
