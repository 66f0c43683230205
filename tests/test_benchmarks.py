"""The benchmark scripts run, and write what they say they write. What they measure is not judged here."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "benchmarks").glob("bench_*.py"))
QUICKEST = {"bench_linear": ["--no-compile"]}  # options that a quick run of a script can also do without

# What each script compares, in its order; cases in bf16 have one contender more.
LINEAR = [
    "frozen", "naive", "PEFT, autocast_adapter_dtype", "PEFT, no autocast_adapter_dtype", "Unsloth order",
    "ours", "ours, the layer", "ours, A frozen", "ours, anchored", "ours, update first",
]  # fmt: skip
MODEL = [
    "frozen", "PEFT, default", "PEFT, no autocast_adapter_dtype",
    "ours, LoRA", "ours, A frozen (TLoRA)", "ours, anchored (PiSSA)",
]  # fmt: skip
SERVING = ["ours, one adapter", "ours, one each", "ours, the base", "PEFT, one adapter", "PEFT, one each"]
TRAIN = ["bare loop", "fit", "HF Trainer", "Lightning"]
BOUNDS = ["frozen", "separate (what is built)", "shared inputs"]
TOP = [
    ("top 16", "ours"),
    ("top 16", "svd_lowrank, 4 iterations"),
    ("top 16", "svd_lowrank, 16 iterations"),
    ("top 16", "svd_lowrank, oversampled, as accurate"),
]
SPECTRUM = [("all", "exact fp32 SVD"), *TOP, ("bottom 16", "ours")]

# MiB kept for backward by query, key and value on one bf16 input (4096, 1024) at rank 16: the input, where A
# trains, three products of it with A, or with A and its anchor, and the factors in half precision.
INPUT, LOW, HALF = 4096 * 1024 * 2 / 2**20, 3 * 4096 * 16 * 2 / 2**20, 3 * 16 * (1024 + 1024) * 2 / 2**20
KEPT = {
    "bench_linear": {
        "frozen": 0, "ours": INPUT + LOW + HALF, "ours, the layer": INPUT + LOW + HALF,
        "ours, A frozen": LOW + HALF, "ours, anchored": INPUT + 2 * (LOW + HALF),
        "ours, update first": INPUT + LOW + HALF, "ours, half factors": INPUT + LOW,
    },
    "bench_model": {
        "ours, LoRA": INPUT + LOW + HALF, "ours, A frozen (TLoRA)": LOW + HALF,
        "ours, anchored (PiSSA)": INPUT + 2 * (LOW + HALF),
    },
}  # fmt: skip


def test_each_script_is_known() -> None:
    assert {script.stem for script in SCRIPTS} == CHECKS.keys()


def in_order(record: dict[str, Any], figure: str) -> bool:
    """A time, or a ratio of times, between the percentiles of its repetitions."""
    return 0 < record["p10"] <= record[figure] <= record["p90"] < math.inf


def check_linear(results: dict[str, Any]) -> None:
    fp32, bf16 = results["cases"].values()
    assert [r["contender"] for r in fp32] == LINEAR
    assert [r["contender"] for r in bf16] == [*LINEAR, "ours, half factors"]
    for case in (fp32, bf16):
        assert all(in_order(record, "ratio") for record in case)
        assert case[0]["ratio"] == 1 == case[0]["limit"] and case[0]["kept_MiB"] == 0


def check_model(results: dict[str, Any]) -> None:
    fp32, bf16 = results["cases"].values()
    assert [r["contender"] for r in fp32] == MODEL
    assert [r["contender"] for r in bf16] == [*MODEL, "ours, half factors"]
    for case in (fp32, bf16):
        assert all(in_order(record, "seconds") for record in case)
        assert case[1]["speedup"] == case[1]["memory"] == 1
        for record in case:
            assert record["tokens_per_second"] == pytest.approx(2 * 32 / record["seconds"])
            assert record["speedup"] == pytest.approx(case[1]["seconds"] / record["seconds"])
            assert record["memory"] == pytest.approx(record["peak_MiB"] / case[1]["peak_MiB"])


def check_bounds(results: dict[str, Any]) -> None:
    assert len(results["cases"]) >= 2
    for name, case in results["cases"].items():
        extra = ["separate, no casts"] if "bfloat16" in name else []
        assert [r["contender"] for r in case] == BOUNDS + extra
        assert all(in_order(record, "seconds") for record in case)
        for record in case:
            assert record["gain"] == pytest.approx(1 - record["seconds"] / case[1]["seconds"])


def check_init(results: dict[str, Any]) -> None:
    cases = {"MiniLM, all 36 projections": SPECTRUM, "1024×1024 gaussian": SPECTRUM}
    cases["1024×1024 k^-0.25"] = SPECTRUM[:-1]
    assert results["spectrum"].keys() == cases.keys()
    for name, case in results["spectrum"].items():
        assert [(record["question"], record["method"]) for record in case] == cases[name]
        assert all(in_order(record, "seconds") for record in case)
        assert case[0]["speedup"] == 1 and case[0]["energy_error"] == case[0]["part_error"] == 0
        for record in case:
            assert record["speedup"] == pytest.approx(case[0]["seconds"] / record["seconds"])
            if record["method"] == "ours":
                assert record["energy_error"] < 1e-4 and record["part_error"] < 1e-2
    for crossing in results["crossings"]:
        assert crossing["milliseconds"].keys() == {"krylov", "gram", "svd"}
        assert crossing["chosen"] in crossing["milliseconds"] and min(crossing["milliseconds"].values()) > 0
    assert all(row["seconds"] > 0 for case in results["starts"].values() for row in case)
    assert results["reloads"]["ours, PiSSA"] == 0


def check_serving(results: dict[str, Any]) -> None:
    (case,) = results["cases"].values()
    assert [r["contender"] for r in case] == SERVING
    assert all(in_order(record, "seconds") for record in case)
    for record, first in zip(case, (0, 0, 0, 3, 3), strict=True):
        assert record["over_one"] == pytest.approx(record["seconds"] / case[first]["seconds"])
    added = results["added"]
    assert added["model_bytes"] == added["parameters_bytes"] > 0 and 0 < added["switch"] < 1


def check_memory(results: dict[str, Any]) -> None:
    (row,) = results["rows"]
    assert row["off"] == pytest.approx(row["told"] / row["measured"] - 1) and abs(row["off"]) < 0.1
    assert row["resident"] >= 0 and sum(row["parts"].values()) > 0


def check_train(results: dict[str, Any]) -> None:
    assert len(results["cases"]) == 2
    for case in results["cases"].values():
        assert [r["contender"] for r in case] == TRAIN
        assert all(in_order(record, "seconds") for record in case) and case[0]["over"] == 0
        for record in case:
            assert record["over"] == pytest.approx(record["seconds"] / case[0]["seconds"] - 1)
    assert results["once"].keys() == {"stall", "scaling"} and results["once"]["scaling"] > 0


def check_launches(results: dict[str, Any]) -> None:
    """Of PEFT's default, which also has fp32 masters, LoRA dispatches fewer operations in each column."""
    for case in results["cases"].values():
        by = {record["contender"]: record for record in case}
        for when in ("forward", "backward", "no_grad"):
            assert 1 == by["frozen"][when] < by["ours, LoRA"][when] < by["PEFT, default"][when]
        assert by["ours, LoRA"]["no_grad"] == by["ours, anchored (PiSSA)"]["no_grad"] == 3


def check_generate(results: dict[str, Any]) -> None:
    for case in results["cases"].values():
        assert [r["contender"] for r in case] == [*MODEL[:4], MODEL[5], "ours, merged copies"]
        assert all(in_order(record, "seconds") for record in case) and case[0]["over_frozen"] == 1


def check_scale(results: dict[str, Any]) -> None:
    small, shapes = results["cases"].values()
    assert [r["stage"] for r in small] == ["find", "plan", "wrap", "save", "load", "unwrap"]
    assert [r["stage"] for r in shapes] == ["find", "plan", "wrap", "unwrap"]
    assert {r["projections"] for r in small} == {36} and all(r["seconds"] > 0 for r in [*small, *shapes])


def check_experts(results: dict[str, Any]) -> None:
    *products, single, half = results["cases"].values()
    contenders = ["frozen", "ours", "ours, shared", "W + ΔW formed"]
    assert all([r["contender"] for r in each] == contenders for each in products)
    for step in (single, half):
        assert [r["contender"] for r in step] == ["attention alone", "ours", "ours, shared", "PEFT"]
    for case in (*products, single, half):
        assert all(in_order(record, "seconds") for record in case) and case[0]["ratio"] == 1
    for _, ours, shared, formed in products:
        assert max(ours["kept"], shared["kept"]) < formed["kept"] / 20


def check_end_to_end(results: dict[str, Any]) -> None:
    stages = ["read the base", "wrap", "two steps", "save", "read the base again", "load"]
    made = [(r["method"], r["stage"]) for r in results["rows"]]
    assert made == [(method, stage) for method in ("PiSSA", "AILoRA", "TLoRA") for stage in stages]
    assert all(r["seconds"] > 0 for r in results["rows"])


CHECKS = {
    "bench_end_to_end": check_end_to_end,
    "bench_experts": check_experts,
    "bench_generate": check_generate,
    "bench_launches": check_launches,
    "bench_scale": check_scale,
    "bench_bounds": check_bounds,
    "bench_init": check_init,
    "bench_linear": check_linear,
    "bench_model": check_model,
    "bench_memory": check_memory,
    "bench_serving": check_serving,
    "bench_train": check_train,
}


def rows(report: str) -> int:
    """How many rows the tables of a report have, without their heads."""
    lines = [line for line in report.splitlines() if line.startswith("|")]
    return len(lines) - 2 * sum(line.startswith("|---") for line in lines)


@pytest.mark.slow
@pytest.mark.timeout(600)  # on cores that others use too
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_quick(script: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(script), "--quick", "--device", "cpu", "--threads", "1"]
    subprocess.run(
        [*command, "--out", str(tmp_path), *QUICKEST.get(script.stem, [])],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE"},
        check=True,
        timeout=540,
        capture_output=True,
    )
    (data,), (report,) = tmp_path.glob("*.json"), tmp_path.glob("*.md")
    results = json.loads(data.read_text())
    facts = results.pop("surroundings")
    assert facts["device"] and facts["date"] and facts["torch"] and script.name in facts["command"]
    CHECKS[script.stem](results)
    for contender, mebibytes in KEPT.get(script.stem, {}).items():
        assert results["kept MiB, shared input"][contender] == mebibytes
    if "cases" in results:
        kept = len(results.get("kept MiB, shared input", ()))
        assert rows(report.read_text()) == sum(map(len, results["cases"].values())) + kept
