"""Each example runs in its small form, without downloads, and says what it did."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# name → what it needs beside transformers, further options, what it prints, what it leaves in its folder
EXAMPLES = {
    "with_transformers_trainer": ("accelerate", ["--steps", "4"], "after 4 steps", "adapter/adapter.json"),
    "with_lightning": ("pytorch_lightning", ["--steps", "3"], "^3 steps", "adapter/adapter.json"),
    "with_accelerate": ("accelerate", ["--steps", "3"], "step 3: loss", "adapter/adapter.json"),
    "serve_many_adapters": (None, ["--steps", "3"], "both give the same: True", "polite/adapter.json"),
    "diffusion": ("diffusers", ["--steps", "3"], r"the same within (0|\d.+e-0[5-9])", "adapter.safetensors"),
    "vision": (None, ["--steps", "4"], "the head is saved", "adapter/adapter.json"),
    "own_initializer": (None, ["--steps", "3"], r"LargestRows\(.*loss", None),
}


def test_every_example_is_run_here() -> None:
    """finetune_llm and compare_methods have tests of their own; the others are none."""
    files = {path.stem for path in (ROOT / "examples").glob("*.py")}
    others = {"finetune_llm", "compare_methods", "comparing", "texts", "notebooks"}
    assert files - others == set(EXAMPLES)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_it_runs(name: str, tmp_path: Path) -> None:
    needed, options, printed, left = EXAMPLES[name]
    if needed is not None and importlib.util.find_spec(needed) is None:
        pytest.skip(f"needs {needed}")
    out = [] if left is None else ["--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / f"{name}.py"), "--tiny", *options, *out],
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "LOWRANK_PROGRESS": "0"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(printed, done.stdout, re.MULTILINE), done.stdout
    assert left is None or (tmp_path / left).is_file()


@pytest.mark.slow
def test_methods_are_compared(tmp_path: Path) -> None:
    words = ["swims in rivers", "moves with wings", "grows from seeds", "is felt by people"]
    (tmp_path / "wordnet").mkdir()
    for kind in ("noun", "verb", "adj", "adv"):
        rows = [f'{i:08} {i % 4:02} n 01 word 0 | {words[i % 4]} {i}; "so it is"' for i in range(200)]
        (tmp_path / f"wordnet/data.{kind}").write_text("\n".join(["  1 The licence", *rows]))
    out = tmp_path / "out"
    options = f"--tiny --steps 5 --seeds 2 --jobs 1 --data {tmp_path} --out {out}".split()
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples/compare_methods.py"), *options],
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "MPLBACKEND": "Agg"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^(\w+) +(\d\.\de-\d\d) +([\d,]+) .* 0\.\d{3} ± 0\.\d{3}", done.stdout, re.MULTILINE)
    assert [row[0] for row in rows] == ["LoRA", "PiSSA", "AILoRA", "TLoRA"]
    spent = [int(row[2].replace(",", "")) for row in rows]
    assert spent[0] == spent[1] >= spent[2] > spent[3]
    assert (out / "comparison.png").stat().st_size > 20_000
    for (name, rate, _), method in zip(rows, ("lora", "pissa", "ailora", "tlora"), strict=True):
        records = [json.loads(line) for line in (out / f"{method}-1.jsonl").read_text().splitlines()]
        assert len(records) == 5 and f"{max(record['lr'] for record in records):.1e}" == rate, name
        assert (out / f"{method}-adapter/adapter.json").exists()
