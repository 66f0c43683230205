"""Who may import whom in the package, read from the source: docs/DESIGN.md as a test."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import lowrank

PACKAGE = Path(__file__).parents[1] / "lowrank"

# Lowest first. A file imports from lower layers only; a package's own files may import one another,
# but for the siblings below.
LAYERS = [
    {"batches", "files", "linalg", "notices", "plots", "processes", "progress"},
    {"models"},  # what is known of other people's models
    {"calibration"},
    {"init", "allocate"},
    {"formats"},  # data classes as JSON
    {"plan", "layers"},
    {"policy", "adapters", "comparing"},
    {"choosing"},
    {"wrapping"},  # what wrapping, loading and importing share
    {"merging", "merged_copies", "combining"},
    {"wrap"},
    {"presets", "checkpoint", "swapping", "peft_format"},
    {"train"},  # whatever requires grad; see ONLY for what it may import
    {"memory", "learning_rates", "spectra"},
    {"integrations"},  # one file for each library that drives training, imported by the user
    {"__init__"},  # the public names
    {"cli", "__main__", "demo"},  # the command
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

# Narrower than their place in the table: the only other parts that these may name.
ONLY = {
    "layers": {"files", "linalg", "notices"},  # plain tensors, no model
    "train": {
        "batches",
        "files",
        "notices",
        "plots",
        "processes",
        "progress",
    },  # knows requires_grad, never LoRA
}

# Each file there is one idea, and may import of its own package only these.
SHARED = {"init": {"base"}, "allocate": {"base", "apportion", "budget"}}

# At the top: what they import is their own affair, and nothing below imports them.
FREE = {"__init__", "__main__", "cli", "demo"}

REQUIRED = {"torch", "einops", "safetensors", "tqdm"}

# Files that are themselves imported only where the library that they need is there.
OPTIONAL = {
    "lowrank.integrations.transformers": {"transformers"},
}


def imports(source: str, module: str, package: bool) -> Iterator[tuple[ast.stmt, str]]:
    """Every import in ``source``, those under TYPE_CHECKING and inside functions too, by full name.

    ``from a import b`` gives ``a.b``: whether b is a module is for the caller to see.
    """
    parents = module.split(".") if package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = parents[: len(parents) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node, f"{prefix}.{alias.name}") for alias in node.names)


def complaints(source: str, module: str, package: bool = False) -> list[str]:
    """What is wrong with the imports of ``module`` ("lowrank.init.kaiming"), in words."""
    path = module.split(".")[1:] or ["__init__"]
    part, own = path[0], path[1] if len(path) > 1 else "__init__"
    if part not in LEVEL and part not in ONLY:
        return [f"{module}: no layer is known for {part!r}; give it one in tests/test_layering.py"]

    found = []
    for node, name in imports(source, module, package):
        top, *rest = name.split(".")
        if top != "lowrank" or part in FREE:
            continue
        other = rest[0] if rest and (rest[0] in LEVEL or rest[0] in ONLY) else "__init__"
        sibling = rest[1] if len(rest) > 1 else ""
        where = f"{module}, line {node.lineno}: imports {name}"
        if other == part:
            if part in SHARED and own != "__init__" and sibling not in SHARED[part]:
                found.append(f"{where}, but of {part}/ its files may import only {sorted(SHARED[part])}")
        elif part in ONLY:
            if other not in ONLY[part]:
                found.append(f"{where}, but {part} may import only {sorted(ONLY[part]) or 'itself'}")
        elif LEVEL.get(other, LEVEL[part]) >= LEVEL[part]:
            found.append(f"{where}, which is not below {part}")
    return found


def modules() -> dict[str, Path]:
    """Every file of the package by its dotted name."""
    return {
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted(PACKAGE.rglob("*.py"))
    }


@pytest.mark.parametrize("module", modules())
def test_imports_go_downward(module: str) -> None:
    path = modules()[module]
    assert complaints(path.read_text(), module, path.name == "__init__.py") == []


@pytest.mark.parametrize("module", modules())
def test_nothing_else_is_required(module: str) -> None:
    """At the top of a file only the four dependencies; others may be looked for inside a function."""
    path = modules()[module]
    top = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
    found = imports("\n".join(map(ast.unparse, top)), module, path.name == "__init__.py")
    allowed = {"lowrank", "lowrank_cli"} | REQUIRED | OPTIONAL.get(module, set()) | sys.stdlib_module_names
    assert {name.split(".")[0] for _, name in found} <= allowed


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("lowrank.layers.linear", "from lowrank.models.projections import Role"),
        ("lowrank.layers.linear", "from lowrank import models"),
        ("lowrank.layers.linear", "from ..models.projections import Role"),
        ("lowrank.plan", "import lowrank.policy"),
        ("lowrank.plan", "from lowrank import wrap"),
        ("lowrank.plan", "from lowrank import Policy"),
        (
            "lowrank.plan",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from lowrank.wrap import merge",
        ),
        ("lowrank.plan", "def late():\n    from . import presets"),
        ("lowrank.init.minor", "from lowrank.init.principal import Principal"),
        ("lowrank.init.minor", "from lowrank.init import Principal"),
        ("lowrank.init.minor", "from .principal import Principal"),
        ("lowrank.init.minor", "from lowrank.allocate.uniform import Uniform"),
        ("lowrank.allocate.uniform", "from . import sensitivity"),
        ("lowrank.calibration", "from lowrank.init import Kaiming"),
        ("lowrank.train.loop", "from lowrank.layers import LoRALinear"),
        ("lowrank.wrap", "from lowrank.train import fit"),
        ("lowrank.wrap", "from lowrank.demo import main"),
        ("lowrank.presets", "from lowrank.checkpoint import save_adapter"),
        ("lowrank.utilities", "import torch"),
    ],
)
def test_a_planted_import_is_found(module: str, source: str) -> None:
    assert len(complaints(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("lowrank.layers.linear", "from lowrank.layers.functional import lora_linear\nimport torch"),
        ("lowrank.init.minor", "from lowrank.init.base import Factors\nfrom ..linalg import top_singular"),
        (
            "lowrank.allocate.sensitivity",
            "from .apportion import apportion\nfrom ..models.projections import Role",
        ),
        ("lowrank.train.loop", "from lowrank.batches import Loss\nfrom lowrank.train.optim import schedule"),
        ("lowrank.presets", "from lowrank.init import Kaiming\nfrom lowrank.policy import Policy"),
        ("lowrank.demo", "from lowrank import wrap_model\nfrom lowrank.train import fit"),
        ("lowrank", "from lowrank import train\nfrom lowrank.wrap import merge"),
    ],
)
def test_a_good_import_passes(module: str, source: str) -> None:
    assert complaints(source, module, package=module == "lowrank") == []


def test_public_names_do_not_shadow_modules() -> None:
    """A name that is both would be the module or the object, by the order of imports."""
    parts = {path.stem for path in PACKAGE.glob("[a-z]*.py")} | {
        path.parent.name for path in PACKAGE.glob("*/*.py")
    }
    shadowed = [
        name
        for name in parts
        if hasattr(lowrank, name) and not isinstance(getattr(lowrank, name), ModuleType)
    ]
    assert shadowed == []
