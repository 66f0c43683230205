"""Which method wins, at which learning rate and rank: many short training runs, one JSON line each.

It can be stopped at any time and takes up where it was. Runs are independent and use a core each. With
`--minutes` the most informative ones are made first; `analyse.py` makes tables and pictures of what is there.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from time import monotonic
from typing import Any

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.studies.cells import Cell, Result, read, wanted
from benchmarks.studies.methods import METHODS
from benchmarks.studies.tasks import TASKS, data_of
from benchmarks.timing import surroundings


def one_run(cell: Cell, device: str) -> Result:
    from benchmarks.studies.run import train

    return train(cell, device)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tasks", nargs="+", choices=TASKS, default=["wordnet", "reviews", "newsgroups", "reuters"]
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 2, 32])
    parser.add_argument("--match", nargs="+", choices=["rank", "parameters"], default=["parameters", "rank"])
    parser.add_argument(
        "--seeds", type=int, default=5, help="at the best two rates of each (default: %(default)s)"
    )
    parser.add_argument("--minutes", type=float, default=None, help="start no run after so long")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2)), help="runs at a time")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/study.jsonl"))
    options = parser.parse_args()

    for task in options.tasks:
        data_of(TASKS[task])  # once, before processes would each do it
    options.out.parent.mkdir(parents=True, exist_ok=True)
    about = surroundings(options.device)
    started = monotonic()
    running: dict[Future[Result], Cell] = {}
    failed: set[Cell] = set()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that are started now
    pool = ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn"))
    with pool, tqdm(desc="runs", unit="run") as bar, options.out.open("a", buffering=1) as file:
        while True:
            late = options.minutes is not None and monotonic() - started > 60 * options.minutes
            todo = _todo(options, [*running.values(), *failed])
            bar.total = bar.n + len(running) + len(todo)
            while todo and not late and len(running) < options.jobs:
                cell = todo.pop(0)
                running[pool.submit(one_run, cell, options.device)] = cell
            if not running:
                break
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                cell = running.pop(future)
                try:
                    result = future.result()
                except Exception:
                    failed.add(cell)
                    tqdm.write(f"{cell} failed:\n{traceback.format_exc()}", file=sys.stderr)
                    continue
                file.write(_line(result, about) + "\n")
                shown = "diverged" if result.score is None else f"{result.score:.4f}"
                bar.set_postfix_str(f"{cell.task} {cell.method} r{cell.rank} {cell.lr:g} → {shown}")
                bar.update()
    if failed:
        raise SystemExit(f"{len(failed)} runs failed")


def _todo(options: argparse.Namespace, running: list[Cell]) -> list[Cell]:
    guesses = {name: METHODS[name].guess for name in options.methods}
    return list(wanted(read(options.out), _settings(options), guesses, seeds=options.seeds, running=running))


def _settings(options: argparse.Namespace) -> list[tuple[str, str, int, str]]:
    """Sweeps in order: what has no rank once; equal rank only where that is not equal parameters too."""
    settings = []
    for rank in options.ranks:
        for match in options.match:
            for task in options.tasks:
                for name in options.methods:
                    method = METHODS[name]
                    once = method.has_rank or rank == options.ranks[0]
                    if once and (match == "parameters" or method.cheaper):
                        settings.append((task, name, rank, match))
    return settings


def _line(result: Result, about: dict[str, Any]) -> str:
    return Result(result.cell, result.score, {**result.details, **about}).to_json()


if __name__ == "__main__":
    main()
