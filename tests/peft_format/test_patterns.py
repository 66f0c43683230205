"""Patterns mean what they mean to PEFT, and neither they nor the number of modules can make a folder slow."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import lowrank
from lowrank import AdapterError, Allocation, Plan, presets
from lowrank.peft_format.config import PeftConfig
from lowrank.peft_format.patterns import Patterns, literal

CONFIG = "adapter_config.json"

PARTS = st.sampled_from(["a", "b", "ab", "layers", "0", "1", "10", "q_proj", "q-proj"])
PATHS = st.lists(PARTS, min_size=1, max_size=5).map(".".join)
KEYS = st.one_of(
    PATHS,
    PATHS.map(re.escape),
    PATHS.map(lambda path: "^" + path),
    PATHS.map(lambda path: path.replace(".", "_")),
    PATHS.map(lambda path: path.replace("0", ".")),
    PATHS.map(lambda path: path.replace("layers", "layers.*")),
    st.sampled_from(["(a|b)", ".", "a.b", "1.", "q.proj", r"\d+.a", "a|b", r"layers\.\d\.a", "..", "^.b"]),
)


@given(st.lists(KEYS, max_size=8, unique=True), PATHS)
def test_the_value_is_that_of_peft(keys: list[str], path: str) -> None:
    patterns = Patterns({key: number for number, key in enumerate(keys)})
    wanted = next((n for n, key in enumerate(keys) if re.match(rf"(.*\.)?({key})$", path)), None)
    assert patterns.value(path, None) == wanted


@given(PATHS)
def test_a_path_is_looked_up(path: str) -> None:
    assert literal(path) is not None and literal(re.escape(path)) == list(path)


@given(st.lists(PATHS, max_size=4), st.lists(PATHS, max_size=3), st.lists(PATHS, max_size=3), PATHS)
def test_what_is_adapted_and_trained(
    targets: list[str], excluded: list[str], trained: list[str], path: str
) -> None:
    config = PeftConfig.read(
        {
            "peft_type": "LORA",
            "target_modules": targets,
            "exclude_modules": excluded,
            "modules_to_save": trained,
        }
    )

    def ends(names: list[str]) -> bool:
        return any(path == name or path.endswith(f".{name}") for name in names)

    inside = any(f".{name}." in f".{path}." for name in trained)
    assert config.adapts(path) == (ends(targets) and not ends(excluded) and not inside)
    assert config.trains(path) == any(path.endswith(name) for name in trained)


class Wide(nn.Module):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"q_proj": nn.Linear(4, 4), "v_proj": nn.Linear(4, 4)}) for _ in range(blocks)
        )
        self.head = nn.Linear(4, 2)
        for parameter in self.parameters():
            parameter.data.normal_(generator=draw)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer["v_proj"](layer["q_proj"](x))
        return self.head(x)


def wide(blocks: int) -> nn.Module:
    """Every module with a rank of its own, so that each needs a pattern."""
    base = Wide(blocks)
    projections = lowrank.plan_model(base, presets.lora(rank=1, target=("q_proj", "v_proj")))
    plan = Plan({p: Allocation(1 + i % 4, 1.0 + i % 3) for i, p in enumerate(projections)})
    return lowrank.wrap_model(base, plan, progress=False)


def calls(blocks: int, folder: Path) -> int:
    """How many functions, of Python and of C, an export and an import call: their work without a clock."""
    model, fresh, number = wide(blocks), Wide(blocks), 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal number
        number += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        lowrank.export_peft(model, folder)
        lowrank.import_peft(fresh, folder)
    finally:
        sys.setprofile(before)
    return number


def test_the_work_grows_with_the_number_of_modules(tmp_path: Path) -> None:
    """Linear is a factor of 4, quadratic of 16."""
    calls(5, tmp_path / "first")  # which imports modules
    few, many = calls(40, tmp_path / "few"), calls(160, tmp_path / "many")
    assert many < 5 * few


def hostile(config: dict[str, Any], folder: Path) -> None:
    (folder / CONFIG).write_text(json.dumps({**json.loads((folder / CONFIG).read_text()), **config}))


STARS = {f"{'.*' * 4}{i}x": 1 for i in range(900)}
HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "many expressions": (
        {"rank_pattern": {f".*{i}": 1 for i in range(2_000)}},
        "2,000 patterns with alternatives",
    ),
    "expressions that take long": ({"rank_pattern": STARS}, "rank_pattern would take too long to match"),
    "alphas that take long": ({"alpha_pattern": STARS}, "alpha_pattern would take too long to match"),
    "more keys than modules": (
        {"rank_pattern": {f"m{i}": 1 for i in range(100_001)}},
        "100,001 patterns are more",
    ),
    "shapes of keys": (
        {"rank_pattern": {f"{i:017b}".replace("1", ".").replace("0", "x"): 1 for i in range(60_000)}},
        "too long to match",
    ),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("case", HOSTILE)
def test_a_folder_cannot_take_for_ever(case: str, tmp_path: Path) -> None:
    config, message = HOSTILE[case]
    lowrank.export_peft(wide(300), tmp_path)
    hostile(config, tmp_path)
    model = Wide(300)
    with pytest.raises(AdapterError, match=message):
        lowrank.import_peft(model, tmp_path)
    assert "_lowrank" not in model.__dict__


@pytest.mark.timeout(60)
def test_thousands_of_names_of_trained_modules(tmp_path: Path) -> None:
    lowrank.export_peft(wide(300), tmp_path)
    hostile({"modules_to_save": [f"no{i}" for i in range(200_000)]}, tmp_path)
    assert lowrank.plan_of(lowrank.import_peft(Wide(300), tmp_path)).train == ()
