"""What runs of several methods and seeds came to, as a table and as a picture."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import lowrank
from lowrank.plan import ranks_by_layer
from lowrank.plots import LINES, STYLE


@dataclass(frozen=True)
class Run:
    """What one method came to with one seed."""

    method: str
    seed: int
    rate: float
    parameters: int
    seconds: float
    accuracies: dict[int, float]  # by step

    @property
    def accuracy(self) -> float:
        return self.accuracies[max(self.accuracies)]


def by_method(runs: list[Run]) -> dict[str, list[Run]]:
    methods = dict.fromkeys(each.method for each in runs)
    return {method: [each for each in runs if each.method == method] for method in methods}


def spread(values: list[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def table(runs: list[Run]) -> str:
    """Also at which step a method first reaches what LoRA ends with, each by its mean over seeds."""
    groups = by_method(runs)
    goal = mean(each.accuracy for each in groups["LoRA"])
    lines = [
        "method   learning rate   adapter parameters   seconds   accuracy        LoRA's accuracy at step"
    ]
    for method, group in groups.items():
        scores = [each.accuracy for each in group]
        curve = {step: mean(each.accuracies[step] for each in group) for step in group[0].accuracies}
        reached = next((str(step) for step, score in sorted(curve.items()) if score >= goal), "–")
        rates, seconds = (mean(getattr(each, name) for each in group) for name in ("rate", "seconds"))
        lines.append(
            f"{method:<8} {rates:13.1e}   {group[0].parameters:18,}   {seconds:7.0f}   "
            f"{mean(scores):.3f} ± {spread(scores):.3f}   {reached:>22}"
        )
    return "\n".join(lines)


def draw(runs: list[Run], plan: lowrank.Plan, title: str, file: Path) -> None:
    """Accuracy against steps and against parameters, each with the seeds' spread; and one plan's ranks."""
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    with pyplot.rc_context(STYLE):
        figure, (curves, costs, ranks) = pyplot.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
        for (method, group), (color, line) in zip(by_method(runs).items(), LINES, strict=False):
            steps = sorted(group[0].accuracies)
            seen = [[each.accuracies[step] for each in group] for step in steps]
            curves.plot(steps, list(map(mean, seen)), color=color, linestyle=line, label=method)
            curves.fill_between(steps, list(map(min, seen)), list(map(max, seen)), color=color, alpha=0.15)
            costs.errorbar(
                group[0].parameters, mean(seen[-1]), spread(seen[-1]), color=color, marker="o", capsize=3
            )
            costs.annotate(method, (group[0].parameters, mean(seen[-1])), (8, 4), textcoords="offset points")
        curves.set(xlabel="step", ylabel="accuracy on test texts", title=title)
        curves.legend()
        costs.set(xlabel="trainable adapter parameters", title="at the end, ± one standard deviation")
        costs.margins(x=0.3)
        cells = ranks_by_layer(plan)
        roles, layers = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))
        grid = [[cells.get((role, layer), 0) for layer in layers] for role in roles]
        ranks.grid(False)
        image = ranks.imshow(grid, aspect="auto", cmap="cividis_r", vmin=0)
        ranks.set(xlabel="layer", title="the ranks that TLoRA gave", xticks=range(len(layers)))
        ranks.set_xticklabels(layers)
        ranks.set_yticks(range(len(roles)), roles)
        for y, row in enumerate(grid):
            for x, rank in enumerate(row):
                color = "white" if rank > max(map(max, grid)) / 2 else "black"
                ranks.text(x, y, str(rank), ha="center", va="center", color=color, fontsize=8)
        figure.colorbar(image, ax=ranks)
        figure.savefig(file, dpi=120)
