"""Every block of Python in the pages runs, in the order of its page, and every command line can be read.

A page's blocks share one namespace, which starts with what `world` gives: a small model, batches, folders. A
block that needs more than is there (a GPU, a download, another library's trainer) follows an HTML comment
``<!-- not run: why -->``; one that continues nothing follows ``<!-- fresh -->``. A fence of any other form is
an error, so that no block is passed over.
"""

from __future__ import annotations

import os
import pkgutil
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank
from tests import zoo

ROOT = Path(__file__).parents[1]
PAGES = [
    *("README.md", "CONTRIBUTING.md", "SECURITY.md"),
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")),
]
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


@pytest.mark.parametrize("page", [page for page in PAGES if any(blocks(page))])
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


def fences(text: str) -> list[str]:
    """The lines that open a block, at any indentation."""
    return re.findall(r"^([ \t>]*(?:```|~~~).*)$", text, re.MULTILINE)[::2]


@pytest.mark.parametrize("page", PAGES)
def test_no_block_is_passed_over(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert text.count("```") % 2 == 0, "a block is not closed"
    opened = fences(text)
    assert set(opened) <= {"```", "```python", "```bash"}, opened
    assert opened.count("```python") == len(list(blocks(page)))
    plain = re.findall(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert not any(re.search(r"^(import|from) \w+", block, re.MULTILINE) for block in plain), "say ```python"


def test_fences_of_every_form_are_seen() -> None:
    text = "```py\nx\n```\n  ```python\nx\n  ```\n~~~\nx\n~~~\n> ```\n> x\n> ```\n"
    assert fences(text) == ["```py", "  ```python", "~~~", "> ```"]


def command_lines() -> list[tuple[str, str]]:
    """``lowrank command …`` as a line of a block, or in backticks."""
    written = re.compile(r"^(?:\$ )?(lowrank [a-z]+ .*)$|`(lowrank [a-z]+ (?!--help)[^`]+)`", re.MULTILINE)
    return [
        (page, a or b)
        for page in PAGES
        for a, b in written.findall((ROOT / page).read_text(encoding="utf-8"))
    ]


@pytest.mark.parametrize(("page", "line"), command_lines())
def test_every_command_line_can_be_read(page: str, line: str) -> None:
    from lowrank_cli import parser

    parser().parse_args(shlex.split(line.translate({ord("["): None, ord("]"): None}))[1:])


def test_every_public_name_is_in_the_reference() -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    paths = {path: pkgutil.resolve_name(path) for path in re.findall(r"^::: (\S+)", text, re.MULTILINE)}
    parts = [part for part in paths.values() if isinstance(part, ModuleType)]
    shown = [*paths.values(), *(each for part in parts for each in vars(part).values())]
    public = [getattr(module, name) for module in (lowrank, lowrank.train) for name in module.__all__]
    missing = [each for each in public if not isinstance(each, ModuleType) and each not in shown]
    assert not missing


def test_pages_are_found() -> None:
    assert {"README.md", "docs/study/README.md"} <= set(PAGES)
    assert any(code for _, _, code in blocks("README.md"))
    assert {line.split()[1] for _, line in command_lines()} >= {"merge", "plan", "report"}
