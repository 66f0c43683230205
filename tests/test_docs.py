"""Every block of Python in README and docs/ runs, in the order of its page.

A page's blocks share one namespace, which starts with what `world` gives: a small model, batches, folders. A
block that needs more than is there (a GPU, a download, another library's trainer) follows an HTML comment
``<!-- not run: why -->``; one that continues nothing follows ``<!-- fresh -->``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank
from tests import zoo

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(
    r"(?:<!--\s*(?P<note>[^>]*?)\s*-->\s*\n)?```python\n(?P<code>.*?)^```", re.MULTILINE | re.DOTALL
)


def blocks(page: str) -> Iterator[tuple[int, str, str]]:
    """Line, note and code of each block."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for found in BLOCK.finditer(text):
        yield text.count("\n", 0, found.start("code")) + 1, found["note"] or "", found["code"]


# Pages about language models; the others classify.
LANGUAGE = {"docs/peft.md", "docs/bases.md", "docs/experts.md"}


def world(page: str) -> dict[str, Any]:
    """The names that a page may use without saying where they come from, and a model in ``my-base``."""
    from transformers import AutoModelForCausalLM

    from lowrank import Policy, presets

    torch.manual_seed(0)
    batches = [zoo.batch("llama" if page in LANGUAGE else "bert", seed=i) for i in range(3)]
    base = zoo.build("llama")
    base.save_pretrained("my-base")

    def classifier() -> nn.Module:
        return zoo.build("bert")

    examples = [{key: values[0] for key, values in batch.items()} for batch in batches]

    return {
        "lowrank": lowrank, "presets": presets, "Policy": Policy, "torch": torch, "nn": nn, "Tensor": Tensor,
        "model": classifier(), "fresh_model": classifier(), "batches": batches, "few_batches": batches[:2],
        "base": classifier(), "data": examples,
        "AutoModelForCausalLM": AutoModelForCausalLM, "config": base.config, "weights": base.state_dict(),
    }  # fmt: skip


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.filterwarnings("default")
def test_every_block_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOWRANK_PROGRESS", "0")
    names = world(page)
    for line, note, code in blocks(page):
        if note.startswith("not run:"):
            compile(code, f"{page}:{line}", "exec")
            continue
        if note == "fresh":
            names = world(page)
        try:
            exec(compile("\n" * (line - 1) + code, page, "exec"), names)
        except Exception as error:
            raise AssertionError(f"{page}, block at line {line}: {type(error).__name__}: {error}") from error
    assert os.getcwd() == str(tmp_path)


def test_pages_are_found() -> None:
    assert "README.md" in PAGES and any(code for _, _, code in blocks("README.md"))
