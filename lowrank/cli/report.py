"""``lowrank report``: one HTML file about a run, with nothing beside it that it would need."""

from __future__ import annotations

import json
import platform
from argparse import Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lowrank
from lowrank.cli.page import cells, facts, items, page, picture, text
from lowrank.cli.saved import read
from lowrank.files import AdapterError, write
from lowrank.formats.folder import CONFIG, read_config
from lowrank.formats.plan_table import plan_cells, plan_remarks
from lowrank.models.projections import Projection
from lowrank.plan import Plan
from lowrank.spectra import spectrum_figure, update_spectrum
from lowrank.train import History
from lowrank.train.memory_table import MemoryReport


def run(options: Namespace) -> None:
    folder = _adapter_in(options.run)
    plan = _plan(folder)
    log = options.log or _log_in(options.run)
    history = None if log is None else History.load(log)
    title = options.run.resolve().name
    memory = getattr(history, "memory", None)
    write(options.out, page(title, sections(plan, history, _spectra(folder, plan), memory)).encode())
    found = {"out": str(options.out), "adapter": str(folder), "log": log and str(log)}
    said = f"{options.out}: {plan!r}, " + (repr(history) if history is not None else "no log")
    print(json.dumps(found) if options.json else said)


def sections(
    plan: Plan,
    history: History | None,
    spectra: Mapping[Projection, Tensor],
    memory: MemoryReport | None = None,
) -> Iterator[tuple[str, str]]:
    """Headings and their HTML: what was trained, curves, memory, the plan, the updates, versions.

    ``spectra`` are the singular values of ΔW; empty where they are not known.
    """
    summary: dict[str, Any] = {
        "trainable adapter parameters": f"{plan.trainable_parameters:,}",
        "adapted": f"{len(plan.adapted)} of {len(plan)} projections",
        "initialization": plan.init or "of plain LoRA",
        "trained in full": ", ".join(plan.train) or "nothing",
    }
    if history:
        last = history[-1]
        summary |= {"steps": last.step, "last loss": f"{last.loss:.4g}", "time": f"{last.seconds:.1f} s"}
        for step, scores in list(history.evaluations.items())[-1:]:
            summary |= {f"{name} after step {step}": f"{value:.4g}" for name, value in scores.items()}
    yield "", facts(summary)
    if history:
        yield "Training", picture(history.plot(), "Loss, scores and learning rate over the steps")
    if memory is not None:
        yield "Memory", text(str(memory))
    ranks = picture(plan.plot(), "Ranks by layer and role")
    yield "Plan", ranks + cells(plan_cells(plan)) + items(plan_remarks(plan))
    if any(values.any() for values in spectra.values()):
        figure = spectrum_figure(plan, spectra, of="update")
        yield (
            "Updates",
            picture(figure, "Singular values of each update, and the share that the first k hold"),
        )
    versions = {
        "lowrank": lowrank.__version__,
        "torch": torch.__version__,
        "Python": platform.python_version(),
    }
    yield "Versions that wrote this report", facts(versions)


def _plan(folder: Path) -> Plan:
    try:
        return Plan.from_json(read_config(folder)["plan"])
    except (ValueError, LookupError, TypeError) as error:
        raise AdapterError(f"{folder} does not hold a whole plan: {error}") from error


def _spectra(folder: Path, plan: Plan) -> dict[Projection, Tensor]:
    """Of each update; of none where rows of embeddings are trained too, which this does not read."""
    if plan.rows:
        return {}
    updates = read(folder).updates
    return {p: update_spectrum(updates[p.name].pair) for p in plan.adapted}


def _adapter_in(run: Path) -> Path:
    """``run`` itself, or the one folder in it that holds an adapter."""
    found = [run] if (run / CONFIG).is_file() else sorted(path.parent for path in run.glob(f"*/{CONFIG}"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise ValueError(f"{run}: expected one adapter of lowrank, there or in a folder in it, got {names}")
    return found[0]


def _log_in(run: Path) -> Path | None:
    """The one file of JSON lines in ``run``; None where there is none."""
    found = sorted(run.glob("*.jsonl"))
    if len(found) > 1:
        raise ValueError(f"{run} holds {len(found)} logs: name one by --log")
    return found[0] if found else None
