"""``lowrank inspect``: what an adapter holds."""

from __future__ import annotations

import json
from argparse import Namespace
from typing import Any

import torch

from lowrank.cli.saved import read
from lowrank.linalg import closest_product


def run(options: Namespace) -> None:
    saved = read(options.adapter)
    rows: list[dict[str, Any]] = []
    for name, update in saved.updates.items():
        A, B, scaling = update.pair
        values = abs(scaling) * closest_product(B.double(), A.double(), 0)[2]
        rows.append(
            {
                "projection": name,
                "role": update.role,
                "rank": update.rank,
                "scaling": scaling,
                "norm": float(values.norm()),
                "largest": float(values.max()) if len(values) else 0.0,
            }
        )
    total = float(torch.tensor([row["norm"] for row in rows], dtype=torch.float64).norm())
    found: dict[str, Any] = {
        "format": saved.format,
        "trainable_parameters": saved.plan.trainable_parameters if saved.plan else None,
        "norm": total,
        "trained": sorted(saved.trained),
        "dora": any(update.magnitudes is not None for update in saved.updates.values()),
        "notes": list(saved.plan.notes) if saved.plan else [],
        "projections": rows,
    }
    if options.json:
        print(json.dumps(found, indent=1))
        return
    width = max(map(len, saved.updates))
    print(f"{'projection'.ljust(width)}  {'role':8}  rank  scaling     |ΔW|  largest singular value")
    for row in rows:
        name, role, rank, *numbers = row.values()
        shown = "  ".join(f"{number:7.4g}" for number in numbers)
        print(f"{name:{width}}  {role or '–':8}  {rank:4}  {shown}")
    print(f"{saved.format} adapter, {len(rows)} projections, |ΔW| {total:.4g} in all")
    if saved.plan:
        print(f"{saved.plan.trainable_parameters:,} trainable adapter parameters")
    if found["dora"]:
        print("with magnitudes (DoRA), which |ΔW| does not count")
    if saved.trained:
        print(f"modules trained in full: {', '.join(sorted(saved.trained))}")
    for note in found["notes"]:
        print(f"note: {note}")
