"""Write the notebooks from the examples: `make notebooks`.

Each definition of an example becomes a cell of code, its docstring the first cell of text. `main` reads
a command line, so the last cell calls the script's own with ``--tiny``.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
NOTEBOOKS = ("vision", "own_initializer")


def cell(kind: str, number: int, text: str) -> dict[str, Any]:
    code: dict[str, Any] = {"execution_count": None, "outputs": []} if kind == "code" else {}
    lines = text.strip("\n").splitlines(keepends=True)
    return {"cell_type": kind, "id": f"cell-{number}", "metadata": {}, "source": lines, **code}


def notebook(source: str) -> dict[str, Any]:
    """The notebook (nbformat 4.5) of one example's source."""
    tree, lines = ast.parse(source), source.splitlines()
    title = (ast.get_docstring(tree) or "").partition("\n")[0]
    cells = [("markdown", f"# {title}"), ("code", "import sys\n\nsys.path.insert(0, '..')  # the examples")]
    groups: list[list[str]] = []
    for node in tree.body[1:]:
        if isinstance(node, ast.If):  # the call of main
            continue
        start = min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", []))])
        text = "\n".join(lines[start - 1 : node.end_lineno])
        simple = not isinstance(node, ast.FunctionDef | ast.ClassDef)
        if simple and groups and groups[-1][0] == "simple":
            groups[-1].append(text)
        else:
            groups.append(["simple" if simple else "definition", text])
    cells += [("code", "\n".join(texts)) for _, *texts in groups]
    cells.append(("code", "sys.argv = ['example', '--tiny']\nmain()"))
    return {
        "cells": [cell(kind, number, text) for number, (kind, text) in enumerate(cells)],
        "metadata": {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def written(name: str) -> tuple[Path, str]:
    """Where the notebook of an example lies, and what must be in it."""
    made = notebook((HERE / f"{name}.py").read_text(encoding="utf-8"))
    return HERE / "notebooks" / f"{name}.ipynb", json.dumps(made, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for example in NOTEBOOKS:
        path, text = written(example)
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
