"""How far a step can go before the loss turns, for each setting that the study swept: one JSON line each.

It is measured with the new head as it is, and after the head was trained alone for some steps. `--judge` says
what `fit(lr="auto")` would lose against the best rate of each sweep, beside one rate for all and two tables
of a factor for each method.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from math import log
from pathlib import Path
from time import thread_time

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

import lowrank
from benchmarks.studies.cells import read
from benchmarks.studies.methods import HEAD_LR, METHODS, prepare
from benchmarks.studies.run import CALIBRATION, HEADS, budget_of
from benchmarks.studies.tasks import TASKS, build, data_of
from lowrank.train.optim import parameter_groups
from lowrank.train.rate import BATCHES, STEPS, Turns, mean_ratio, measured_rate, turning_steps

Setting = tuple[str, str, int, str]
RANK = 8  # the one that the rule was fitted at
SWEPT = 3  # rates at least, or a sweep says nothing of the best one
VOCABULARY = 49152  # of SmolLM2
PAPERS = {  # the best rate over LoRA's, 2602.04998; of LoRA+ the geometric mean of both rates is LoRA's
    "pissa": 1 / 10, "olora": 1 / 18.2, "lora-ga": 1 / 18.2, "milora": 1 / 3.2, "lora+": 1 / 4,
}  # fmt: skip


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
    settings = dict.fromkeys(_measured_as(result.cell.setting) for result in read(options.study))
    todo = [s for s in settings if s not in known and METHODS[s[1]].has_rank and METHODS[s[1]].peft is None]
    torch.set_num_threads(1)
    with options.out.open("a", buffering=1) as file:
        for setting in tqdm(todo, unit="setting"):
            file.write(json.dumps(measure(setting, options.warm)) + "\n")


def measure(setting: Setting, warm: list[int]) -> dict[str, object]:
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
    slow, fast, *_ = (group["params"] for group in prepared.groups)
    groups = parameter_groups(model, [{"params": slow}, {"params": fast, "lr_ratio": method.b_rate}])
    inside = {id(p) for p in adapters}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in inside]
    batches = data.batches(task.size, BATCHES, seed=99)
    turns: dict[str, Turns | None] = {}
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
        clock = thread_time()
        try:
            turns[str(count)] = turning_steps(prepared.model, batches, parameters=groups)
        except ValueError:
            turns[str(count)] = None
        seconds = thread_time() - clock
    return {
        "setting": setting,
        "turns": turns,
        "mean ratio": round(mean_ratio(groups), 4),
        "seconds": round(seconds, 2),
    }


def judge(study: Path, measured: Path) -> None:
    """Prints the loss against the best swept score, of scores interpolated in the logarithm of the rate."""
    by_setting = {tuple(row["setting"]): row for row in map(json.loads, measured.open())}
    curves: dict[Setting, dict[float, float]] = {}
    for result in read(study):
        if result.cell.seed == 0:
            score = _score_of_chance(result.cell.task) if result.score is None else result.score
            curves.setdefault(result.cell.setting, {})[result.cell.lr] = score
    rows = {setting: by_setting.get(_measured_as(setting), {}) for setting in curves}
    swept = [setting for setting, curve in curves.items() if len(curve) >= SWEPT]
    found = [setting for setting in swept if rows[setting].get("turns", {}).get("0")]
    known = [s for s in found if TASKS[s[0]].length_of is None]
    fitted = [s for s in known if TASKS[s[0]].development and s[2] == RANK]
    elsewhere = [s for s in known if not TASKS[s[0]].development]
    best = {setting[1]: max(curves[setting], key=curves[setting].__getitem__) for setting in fitted}

    def measure_for(s: Setting, steps: int) -> float:
        return measured_rate(Turns(*rows[s]["turns"]["0"]), steps) / rows[s]["mean ratio"]

    rules: dict[str, Callable[[Setting], float | None]] = {
        'lr="auto"': lambda s: measure_for(s, TASKS[s[0]].steps),
        "the same without the run's length": lambda s: measure_for(s, STEPS),
        "1e-3 for all": lambda s: 1e-3,
        "1e-3 times the papers' factor": lambda s: 1e-3 * PAPERS.get(s[1], 1.0),
        "the method's best rate on WordNet": lambda s: best.get(s[1]),
    }
    kinds = {
        "the task that it was fitted on": fitted,
        "other tasks": [s for s in elsewhere if s[2] == RANK and not TASKS[s[0]].generates],
        "a language model": [s for s in elsewhere if s[2] == RANK and TASKS[s[0]].generates],
        "runs of another length": [s for s in found if TASKS[s[0]].length_of is not None],
        "other ranks": [s for s in known if s[2] != RANK],
    }
    for where, settings in kinds.items():
        for name, rule in rules.items():
            losses = {s: _loss(curves[s], rate) for s in settings if (rate := rule(s))}
            if not losses:
                continue
            near, worst = sum(loss <= 0.01 for loss in losses.values()), max(losses, key=losses.__getitem__)
            mean = sum(losses.values()) / len(losses)
            print(
                f"{where}, {name}: within 1 % in {near} of {len(losses)}, mean loss {mean:.2%}, "
                f"worst {losses[worst]:.1%} ({worst[1]} on {worst[0]})"
            )


def _measured_as(setting: Setting) -> Setting:
    """What is measured before a run does not depend on its length."""
    return TASKS[setting[0]].length_of or setting[0], *setting[1:]


def _score_of_chance(task: str) -> float:
    """What a run that diverged counts: no right answer, or every token as likely as any other."""
    return -log(VOCABULARY) if TASKS[task].generates else 0.0


def _loss(curve: dict[float, float], rate: float) -> float:
    """The share of the best score that is missed at ``rate``; the scores of a language model are negative."""
    best = max(curve.values())
    return (best - _at(curve, rate)) / abs(best)


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
