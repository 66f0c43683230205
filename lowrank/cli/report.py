"""``lowrank report``: one HTML file about a run, with nothing beside it that it would need."""

from __future__ import annotations

import json
import platform
from argparse import Namespace
from html import escape
from io import StringIO
from pathlib import Path
from typing import Any

import torch

import lowrank
from lowrank.files import AdapterError, write
from lowrank.formats.folder import CONFIG, read_config
from lowrank.plan import Plan
from lowrank.train import History

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse } td, th { padding: .15em .8em .15em 0; text-align: left }
pre { overflow-x: auto; background: #f6f6f6; padding: 1em; font-size: 12px }
svg { max-width: 100%; height: auto }
"""


def run(options: Namespace) -> None:
    folder = _adapter_in(options.run)
    config = read_config(folder)
    try:
        plan = Plan.from_json(config["plan"])
    except (ValueError, LookupError, TypeError) as error:
        raise AdapterError(f"{folder} does not hold a whole plan: {error}") from error
    log = options.log or _log_in(options.run)
    history = None if log is None else History.load(log)
    write(options.out, page(options.run.resolve().name, plan, history).encode())
    found = {"out": str(options.out), "adapter": str(folder), "log": log and str(log)}
    said = f"{options.out}: {plan!r}, " + (repr(history) if history is not None else "no log")
    print(json.dumps(found) if options.json else said)


def page(title: str, plan: Plan, history: History | None) -> str:
    """The HTML of a report: what was trained, the curves, the plan, versions."""
    facts: dict[str, Any] = {
        "trainable adapter parameters": f"{plan.trainable_parameters:,}",
        "adapted": f"{len(plan.adapted)} of {len(plan)} projections",
        "initialization": plan.init or "of plain LoRA",
        "trained in full": ", ".join(plan.train) or "nothing",
    }
    parts = [f"<h1>{escape(title)}</h1>"]
    if history:
        last = history[-1]
        facts |= {"steps": last.step, "last loss": f"{last.loss:.4g}", "time": f"{last.seconds:.1f} s"}
        for step, scores in list(history.evaluations.items())[-1:]:
            facts |= {f"{name} after step {step}": f"{value:.4g}" for name, value in scores.items()}
    parts += [_table(facts)]
    if history:
        parts += ["<h2>Training</h2>", _svg(history.plot())]
    parts += ["<h2>Plan</h2>", _svg(plan.plot())]
    parts += [f"<details><summary>All projections</summary><pre>{escape(str(plan))}</pre></details>"]
    versions = {
        "lowrank": lowrank.__version__,
        "torch": torch.__version__,
        "Python": platform.python_version(),
    }
    parts += ["<h2>Versions that wrote this report</h2>", _table(versions)]
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n'
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _table(facts: dict[str, Any]) -> str:
    rows = (f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>" for name, value in facts.items())
    return f"<table>{''.join(rows)}</table>"


def _svg(figure: Any) -> str:
    """The figure as an element of the page; nothing is shown on a screen."""
    from matplotlib import pyplot

    text = StringIO()
    figure.savefig(text, format="svg")
    pyplot.close(figure)
    return text.getvalue()[text.getvalue().index("<svg") :]


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
