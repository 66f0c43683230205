"""How far the start's curvature lets a step go, for each setting that the study swept: one JSON line each.

`analyse.py` puts it beside the best rates that the sweeps found. A second line of each setting has the new
head trained for some steps before, since a random head's gradient says little.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from time import perf_counter

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

import lowrank
from benchmarks.studies.cells import read
from benchmarks.studies.methods import HEAD_LR, METHODS, prepare
from benchmarks.studies.run import CALIBRATION, HEADS
from benchmarks.studies.run import _budget as budget_of
from benchmarks.studies.tasks import TASKS, build, data_of
from lowrank.train.rate import turning_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--study", type=Path, default=Path("benchmarks/results/study.jsonl"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/rates.jsonl"))
    parser.add_argument("--warm", type=int, nargs="+", default=[0, 30], help="steps of the head alone before")
    options = parser.parse_args()
    known = (
        {tuple(json.loads(line)["setting"]) for line in open(options.out)} if options.out.exists() else set()
    )
    settings = dict.fromkeys(result.cell.setting for result in read(options.study))
    todo = [s for s in settings if s not in known and METHODS[s[1]].has_rank and METHODS[s[1]].peft is None]
    torch.set_num_threads(1)
    with options.out.open("a", buffering=1) as file:
        for setting in tqdm(todo, unit="setting"):
            file.write(json.dumps(measure(setting, options.warm)) + "\n")


def measure(setting: tuple[str, str, int, str], warm: list[int]) -> dict[str, object]:
    task, method = TASKS[setting[0]], METHODS[setting[1]]
    data, head = data_of(task), HEADS[task.model]
    model = build(task, len(data.labels), 0)
    cell = type("Setting", (), {"task": setting[0], "rank": setting[2]})
    budget = budget_of(task, data, cell) if setting[3] == "parameters" else None
    prepared = prepare(
        model, method, rank=setting[2], budget=budget, lr=1e-3, seed=0, head=head,
        calibration=data.calibration(CALIBRATION),
    )  # fmt: skip
    adapters = list(lowrank.adapter_parameters(model))
    inside = {id(p) for p in adapters}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in inside]
    batches = data.batches(task.size, 8, seed=99)
    steps: dict[str, float | None] = {}
    seconds, done = 0.0, 0
    for count in warm:
        if rest and count > done:
            for p in adapters:
                p.requires_grad_(False)
            lowrank.train.fit(
                prepared.model, data.batches(task.size, count - done, seed=98), parameters=rest, lr=HEAD_LR,
                progress=False, schedule="constant", allow_unused=True,
            )  # fmt: skip
            done = count
            for p in adapters:
                p.requires_grad_(True)
        clock = perf_counter()
        try:
            steps[str(count)] = turning_step(prepared.model, batches, parameters=adapters)
        except ValueError:
            steps[str(count)] = None
        seconds = perf_counter() - clock
    return {"setting": setting, "steps": steps, "seconds": round(seconds, 2)}


if __name__ == "__main__":
    main()
