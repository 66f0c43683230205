"""How far the start's curvature lets a step go, for each setting that the study swept: one JSON line each.

It is measured with the new head as it is, and after the head was trained alone for some steps. `--judge` says
what `fit(lr="auto")` would lose against the best rate of each sweep, beside one rate for all.
"""

from __future__ import annotations

import argparse
import json
import sys
from math import log
from pathlib import Path
from time import perf_counter

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

import lowrank
from benchmarks.studies.cells import read
from benchmarks.studies.methods import HEAD_LR, METHODS, prepare
from benchmarks.studies.run import CALIBRATION, HEADS, budget_of
from benchmarks.studies.tasks import TASKS, build, data_of
from lowrank.train.rate import BATCHES, measured_rate, turning_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--study", type=Path, default=Path("benchmarks/results/study.jsonl"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/rates.jsonl"))
    parser.add_argument("--warm", type=int, nargs="+", default=[0], help="steps of the head alone before")
    parser.add_argument("--judge", action="store_true", help="measure nothing; judge the rule by both files")
    options = parser.parse_args()
    if options.judge:
        return judge(options.study, options.out)
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
    batches = data.batches(task.size, BATCHES, seed=99)
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


def judge(study: Path, measured: Path) -> None:
    """Prints the loss against the best swept score, of scores interpolated in the logarithm of the rate."""
    turns = {tuple(row["setting"]): row["steps"]["0"] for row in map(json.loads, measured.open())}
    curves: dict[tuple[str, str, int, str], dict[float, float]] = {}
    for result in read(study):
        if result.cell.seed == 0:
            curves.setdefault(result.cell.setting, {})[result.cell.lr] = result.score or 0.0
    fitted = {setting for setting in curves if TASKS[setting[0]].development}
    for where, settings in (("on which it was fitted", fitted), ("others", curves.keys() - fitted)):
        for name, rule in {"lr=auto": measured_rate, "1e-3 for all": lambda _: 1e-3}.items():
            losses = {
                setting: 1 - _at(curves[setting], rule(turns[setting])) / max(curves[setting].values())
                for setting in settings
                if turns.get(setting) and METHODS[setting[1]].b_rate == 1
            }
            if not losses:
                continue
            near, worst = sum(loss <= 0.01 for loss in losses.values()), max(losses, key=losses.__getitem__)
            mean = sum(losses.values()) / len(losses)
            print(
                f"tasks {where}, {name}: within 1 % in {near} of {len(losses)}, mean loss {mean:.2%},",
                end=" ",
            )
            print(f"worst {losses[worst]:.1%} ({worst[1]} on {worst[0]})")


def _at(curve: dict[float, float], rate: float) -> float:
    """The score at ``rate``, between those of the sweep; the nearest one outside."""
    rates = sorted(curve)
    rate = min(max(rate, rates[0]), rates[-1])
    low = max(each for each in rates if each <= rate)
    high = min(each for each in rates if each >= rate)
    share = log(rate / low) / log(high / low) if high > low else 0.0
    return (1 - share) * curve[low] + share * curve[high]


if __name__ == "__main__":
    main()
