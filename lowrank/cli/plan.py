"""``lowrank plan``: which projections of a local model get how much rank."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lowrank
from lowrank.cli.models import load


def run(options: Namespace) -> None:
    target = options.target[0] if options.target == ["all-linear"] else tuple(options.target)
    policy = getattr(lowrank.presets, options.method)(rank=options.rank, budget=options.budget, target=target)
    needed = bool(policy.allocate.needs)
    if needed and options.data is None:
        raise ValueError(
            f"{options.method} measures the model on data before it plans: name a file by --data"
        )
    rows = list(_rows(options.data, options.examples)) if needed else []
    model = load(options.model, quiet=options.quiet)
    batches = list(_batches(rows, options)) if needed else None
    plan = lowrank.plan_model(model, policy, batches=batches, progress=not options.quiet)
    if options.out is not None:
        plan.save(options.out)
    print(json.dumps(plan.to_json(), indent=1) if options.json else plan)


def _batches(rows: Sequence[dict[str, Any]], options: Namespace) -> Iterator[dict[str, Any]]:
    """An example a batch: a language model's own labels, or "label" where the line has one."""
    import torch
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(options.model, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"{options.model} holds no tokenizer that can be loaded: {error}") from error
    for row in rows:
        encoded = tokenizer(row["text"], return_tensors="pt", truncation=True, max_length=options.tokens)
        labels = torch.tensor([row["label"]]) if "label" in row else encoded["input_ids"].clone()
        yield {**encoded, "labels": labels}


def _rows(file: Path, count: int) -> Iterator[dict[str, Any]]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if number > count:
                return
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{file}, line {number}: not JSON ({error})") from error
            if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                raise ValueError(f'{file}, line {number}: expected an object with "text"')
            yield row
