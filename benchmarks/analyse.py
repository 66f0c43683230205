"""Tables and pictures of the study's results: `python benchmarks/analyse.py`, into docs/study/.

It shows what was run and nothing else: a cell that has no run has no figure.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.studies.cells import Result, read
from benchmarks.studies.tasks import TASKS

BASELINE = "lora"
# Student's t for a two-sided interval of 95 %, by degrees of freedom.
T95 = dict(enumerate((12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18), start=1))


@dataclass(frozen=True)
class Sweep:
    """All runs of one method in one setting: by learning rate, then by seed."""

    method: str
    runs: dict[float, dict[int, Result]]

    @property
    def best(self) -> float:
        """The rate with the highest mean score, divergence counting as the lowest; ties to the lower one."""
        return max(self.runs, key=lambda lr: (mean(r.comparable for r in self.runs[lr].values()), -lr))

    @property
    def inside(self) -> bool:
        """Is the best rate neither the lowest nor the highest that was tried?"""
        return min(self.runs) < self.best < max(self.runs)

    def scores(self, lr: float) -> dict[int, float]:
        """By seed, of the runs that did not diverge."""
        return {seed: run.score for seed, run in self.runs[lr].items() if run.score is not None}

    @property
    def at_best(self) -> dict[int, float]:
        return self.scores(self.best)

    def detail(self, name: str) -> Any:
        return next(iter(self.runs[self.best].values())).details.get(name)


def sweeps(results: Iterable[Result]) -> dict[tuple[str, int, str], dict[str, Sweep]]:
    """By task, rank and match, then by method."""
    found: dict[tuple[str, int, str], dict[str, Sweep]] = {}
    for result in results:
        cell = result.cell
        setting = found.setdefault((cell.task, cell.rank, cell.match), {})
        sweep = setting.setdefault(cell.method, Sweep(cell.method, {}))
        sweep.runs.setdefault(cell.lr, {})[cell.seed] = result
    return found


def interval(values: list[float]) -> float | None:
    """Half the width of the 95 % interval of a mean; None for fewer than two values."""
    if len(values) < 2:
        return None
    return T95.get(len(values) - 1, 1.96) * stdev(values) / sqrt(len(values))


def differences(one: Sweep, other: Sweep) -> list[float]:
    """Of scores at each one's best rate, by the seeds that both have."""
    seeds = sorted(one.at_best.keys() & other.at_best.keys())
    return [one.at_best[seed] - other.at_best[seed] for seed in seeds]


def paired(one: Sweep, other: Sweep) -> tuple[float, float | None] | None:
    """The mean of the `differences` and its interval; None where there are none."""
    found = differences(one, other)
    return (mean(found), interval(found)) if found else None


def steps_to(run: Result, score: float) -> float | None:
    """The step at which a run's evaluations first reach ``score``, interpolated; None where they do not.

    Nor where its end does not: evaluations on the way are on a quarter of the tests, which may be the easier.
    """
    if run.comparable < score:
        return None
    before = None
    for step, value in ((int(s), v) for s, v in run.details["evaluations"].items()):
        if value >= score:
            if before is None or value == before[1]:
                return float(step)
            return before[0] + (score - before[1]) / (value - before[1]) * (step - before[0])
        before = step, value
    return None


def table(setting: dict[str, Sweep]) -> Iterator[str]:
    """One Markdown row a method, the highest score first."""
    columns = (
        "method|parameters|best rate|score ± s.e. (seeds)|against LoRA (95 %)|steps to LoRA's|rates tried"
    )
    yield f"|{columns}|"
    yield f"|{'---|' * 7}"
    baseline = setting.get(BASELINE)
    for sweep in sorted(setting.values(), key=lambda s: -mean(s.at_best.values() or [-1e9])):
        scores = list(sweep.at_best.values())
        error = f" ± {stdev(scores) / sqrt(len(scores)):.4f}" if len(scores) > 1 else ""
        shown = f"{mean(scores):.4f}{error} ({len(scores)})" if scores else "diverged"
        against = steps = "–"
        if baseline is not None and sweep is not baseline and scores:
            found = paired(sweep, baseline)
            if found is not None:
                against = f"{found[0]:+.4f}" + (
                    f" ± {found[1]:.4f}" if found[1] is not None else " (one seed)"
                )
            first = sweep.runs[sweep.best].get(0)
            reached = steps_to(first, mean(baseline.at_best.values())) if first and baseline.at_best else None
            steps = "not reached" if reached is None else f"{reached:.0f}"
        edge = "" if sweep.inside else " (edge of the sweep)"
        tried = ", ".join(f"{lr:g}" for lr in sorted(sweep.runs))
        yield (
            f"| {sweep.method} | {sweep.detail('trainable'):,} | {sweep.best:g}{edge} | {shown} | {against} "
            f"| {steps} | {tried} |"
        )


def over_tasks(settings: dict[str, dict[str, Sweep]]) -> Iterator[str]:
    """One Markdown row a method: the difference from LoRA in each task, and over all runs that pair.

    Language models are left out, since nats and shares of right answers have no mean, and runs of another
    length.

    Args:
        settings: by task, of one rank and match.
    """
    apart = {name for name, task in TASKS.items() if task.generates or task.length_of}
    settings = {name: setting for name, setting in settings.items() if name not in apart}
    if not settings:
        return
    in_all = set.intersection(*(set(setting) for setting in settings.values()))
    rows: list[tuple[float, str]] = []
    for method in sorted(in_all - {BASELINE}) if len(settings) > 1 and BASELINE in in_all else ():
        by_task = [differences(setting[method], setting[BASELINE]) for setting in settings.values()]
        if not all(by_task):
            continue
        every = [each for task in by_task for each in task]
        half = interval(every)
        cells = [f"{mean(task):+.4f}" for task in by_task]
        cells.append(f"{mean(every):+.4f}" + ("" if half is None else f" ± {half:.4f}") + f" ({len(every)})")
        rows.append((mean(every), f"| {method} | {' | '.join(cells)} |"))
    if rows:
        yield f"|method|{'|'.join(settings)}|all (runs)|"
        yield f"|{'---|' * (len(settings) + 2)}"
        yield from (row for _, row in sorted(rows, reverse=True))


def devices(setting: dict[str, Sweep]) -> str:
    runs = [run for sweep in setting.values() for seeds in sweep.runs.values() for run in seeds.values()]
    return ", ".join(sorted({str(run.details.get("device", "not known")) for run in runs}))


# -- pictures ---------------------------------------------------------------------------------------------


def draw_rates(name: str, setting: dict[str, Sweep], file: Path) -> None:
    """Score against learning rate for each method: the picture that matters most."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    styles = ["-", "--", "-.", ":"]
    for i, sweep in enumerate(setting.values()):
        rates = [lr for lr in sorted(sweep.runs) if sweep.scores(lr)]
        means = [mean(sweep.scores(lr).values()) for lr in rates]
        axes.plot(
            rates, means, marker="o", linestyle=styles[i // 10 % 4], color=f"C{i % 10}", label=sweep.method
        )
    values = [mean(s.at_best.values()) for s in setting.values() if s.at_best]
    axes.set(xscale="log", xlabel="learning rate of the adapters", ylabel="score", title=name)
    if values:
        axes.set_ylim(bottom=max(values) - 0.25 * abs(max(values)))
    axes.legend(fontsize="small", ncols=2)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def draw_pareto(name: str, settings: dict[str, dict[str, Sweep]], file: Path) -> None:
    """Score at the best rate against trainable parameters, over all ranks and matches of a task."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    points: dict[str, list[tuple[int, float]]] = {}
    for setting in settings.values():
        for sweep in setting.values():
            if sweep.at_best:
                at = max(1, sweep.detail("trainable")), mean(sweep.at_best.values())
                points.setdefault(sweep.method, []).append(at)
    for i, (method, places) in enumerate(points.items()):
        places.sort()
        axes.plot(*zip(*places, strict=True), marker="os^vDP"[i % 6], color=f"C{i % 10}", label=method)
    axes.set(
        xscale="log",
        xlabel="trainable parameters beside the head",
        ylabel="score at the best rate",
        title=name,
    )
    axes.legend(fontsize="small", ncols=2)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def draw_ranks(name: str, setting: dict[str, Sweep], file: Path) -> None:
    """The ranks that each method's plan gives, projection by projection."""
    plt = _pyplot()
    rows = {s.method: s.detail("ranks") for s in setting.values() if s.detail("ranks")}
    varied = {method: ranks for method, ranks in rows.items() if len(set(ranks)) > 1}
    if not varied:
        return
    figure, axes = plt.subplots(figsize=(10, 1 + 0.4 * len(varied)), layout="constrained")
    image = axes.imshow(list(varied.values()), aspect="auto", cmap="viridis")
    axes.set_yticks(range(len(varied)), list(varied))
    axes.set(xlabel="projection, in the model's order", title=f"{name}: ranks")
    figure.colorbar(image, ax=axes)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/study.jsonl"))
    parser.add_argument("--out", type=Path, default=Path("docs/study"))
    options = parser.parse_args()
    results = read(options.results)
    if not results:
        raise SystemExit(f"{options.results} holds no results: run benchmarks/study.py first")
    options.out.mkdir(parents=True, exist_ok=True)
    found = sweeps(results)
    lines = [
        "# The study: what was run",
        "",
        f"{len(results)} runs, of benchmarks/results/{options.results.name}; "
        f"made by `python {' '.join(sys.argv)}`.",
        "A score is the accuracy on held-out rows (of a language model: minus the loss of answer tokens). "
        "± is a standard error over seeds; differences are paired by seed, each method at its own best rate, "
        "with an interval of 95 %. One seed decides nothing.",
        "",
    ]
    for rank, match in sorted({(rank, match) for _, rank, match in found}):
        together = {t: setting for (t, r, m), setting in sorted(found.items()) if (r, m) == (rank, match)}
        rows = list(over_tasks(together))
        if rows:
            lines += [
                f"## All classification, rank {rank}, equal {match}: the difference from LoRA",
                "",
                "Methods that were run in each of these tasks. The interval takes every pair of runs for a "
                "draw of its own; tasks differ, so it says nothing of a task that is not here.",
                "",
                *rows,
                "",
            ]
    for (task, rank, match), setting in sorted(found.items()):
        name = f"{task}, rank {rank}, equal {match}"
        stem = f"{task}-r{rank}-{match}"
        draw_rates(name, setting, options.out / f"{stem}-rates.png")
        draw_ranks(name, setting, options.out / f"{stem}-ranks.png")
        lines += [
            f"## {name}",
            "",
            f"On {devices(setting)}.",
            "",
            *table(setting),
            "",
            f"![score against rate]({stem}-rates.png)",
            "",
        ]
        if (options.out / f"{stem}-ranks.png").exists():
            lines += [f"![ranks]({stem}-ranks.png)", ""]
    for task in sorted({task for task, _, _ in found}):
        of_task = {f"{rank} {match}": s for (t, rank, match), s in found.items() if t == task}
        draw_pareto(task, of_task, options.out / f"{task}-parameters.png")
        lines += [f"![{task}: score against parameters]({task}-parameters.png)", ""]
    (options.out / "README.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
