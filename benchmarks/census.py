"""Which model families lowrank adapts without a hint: builds each small, and checks it all the way.

Every type that the installed transformers knows, and, where they are installed, timm's families and
denoisers of diffusers, each in a process of its own, one JSON line each.
It can be stopped at any time and takes up where it was.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any
from zlib import crc32

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

SECONDS = 60  # of a core, for one model
WAITING = 10  # times as long on the clock, where other programs use the cores
RESULTS = Path(__file__).parent / "results"
# What is known of models that do not pass.
REASONS = {
    "timm:csatv2": "some of its attentions have one channel, which its normalization makes zero",
    "transformers:ibert": "its layers give a number and its scale, and no adapter can be added to that",
    "transformers:reformer": "its reversible layers pass a gradient only where the embeddings train "
    "(`enable_input_require_grads`), and train on one length only, `axial_pos_shape`",
    "transformers:rwkv": "between training and evaluation it scales weights of adapted layers in place; with "
    "`config.rescale_every = 0` it passes",
    "transformers:squeezebert": "its attention and feed-forward layers are grouped convolutions, which "
    "cannot be adapted; the pooler, which can, has no part in the output",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", help="these names, such as transformers:bert or timm:*")
    parser.add_argument("--every", type=int, default=1, help="each n-th name only (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=max(1, os.cpu_count() or 2), help="models at a time")
    parser.add_argument(
        "--seconds", type=int, default=SECONDS, help="of a core, for one model (default: %(default)s)"
    )
    parser.add_argument("--again", action="store_true", help="count what did not pass once more")
    parser.add_argument("--out", type=Path, default=RESULTS / "census.jsonl")
    options = parser.parse_args()

    from benchmarks.censuses.sources import names

    known, listed = read(options.out), names()
    if options.only:
        listed = [name for each in options.only for name in fnmatch.filter(listed, each) or [each]]
    wanted = [
        name
        for name in listed[:: options.every]
        if name not in known or (options.again and not passed(known[name]))
    ]
    wanted.sort(key=lambda name: crc32(name.encode()))  # mixed: what was counted so far is a fair sample
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("a", buffering=1) as file, tqdm(total=len(wanted), unit="model") as bar:
        for row in count(wanted, options.jobs, options.seconds):
            file.write(json.dumps(row) + "\n")
            bar.update()
            bar.set_postfix_str(row["name"], refresh=False)
            if row["state"] == "checked" and not passed(row):
                tqdm.write(f"{row['name']}: {problems(row)}")
    rows = read(options.out)
    options.out.write_text("".join(json.dumps(rows[name]) + "\n" for name in sorted(rows)))
    options.out.with_suffix(".md").write_text(table(rows))
    print(table(rows))


# -- running --------------------------------------------------------------------------------------------


def count(names: Sequence[str], jobs: int, seconds: int) -> Iterator[dict[str, Any]]:
    """A row for each name, as they are done; what takes more than ``seconds`` of a core is ended.

    Processes are forks of this one, which has imported all that they need.
    """
    import torch
    import transformers
    from transformers import PreTrainedModel  # noqa: F401
    from transformers.models.auto import modeling_auto  # noqa: F401

    from benchmarks.censuses import checks  # noqa: F401

    if any(name.startswith("timm:") for name in names):
        from benchmarks.censuses import vision

        vision.timm()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    context, todo = get_context("fork"), list(names)
    running: dict[Connection, tuple[str, Any, float]] = {}
    while todo or running:
        while todo and len(running) < jobs:
            name = todo.pop(0)
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=_one, args=(name, there, seconds), daemon=True)
            process.start()
            there.close()
            running[here] = name, process, time.monotonic()
        ready = wait(list(running), timeout=1.0)
        for here, (name, process, since) in list(running.items()):
            late = time.monotonic() - since > WAITING * seconds
            if here not in ready and not late:
                continue
            row: dict[str, Any] = {"state": "out of time"}
            if here in ready:
                try:
                    row = here.recv()
                except EOFError:
                    row = {"state": "out of time or crashed"}
            else:
                process.kill()
            process.join()
            del running[here]
            yield {"name": name, **row, "seconds": round(time.monotonic() - since, 1)}


def _one(name: str, there: Connection, seconds: int) -> None:
    import resource
    import warnings

    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    warnings.simplefilter("ignore")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    there.send(counted(name))
    there.close()


def counted(name: str) -> dict[str, Any]:
    """The row of one model, in this process."""
    from benchmarks.censuses.checks import check
    from benchmarks.censuses.sources import NotBuilt, NotRun, make

    try:
        found = check(lambda: make(name))
    except NotBuilt as error:
        return {"state": "not built", "why": str(error)[:200]}
    except NotRun as error:
        return {"state": "not run", "why": str(error)[:200]}
    except Exception as error:  # whatever a stranger's code raises; the count goes on
        return {"state": "failed", "why": f"{type(error).__name__}: {error}"[:300]}
    return {"state": "checked" if found["projections"] else "no projection", **found}


# -- reading --------------------------------------------------------------------------------------------


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The rows by name, the last of each."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {row["name"]: row for row in map(json.loads, lines)}


def passed(row: dict[str, Any]) -> bool:
    return row["state"] == "checked" and not any(row["checks"].values())


def problems(row: dict[str, Any]) -> str:
    return "; ".join(f"{name}: {seen}" for name, seen in row["checks"].items() if seen)


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The counts, and a line for each model that does not pass, as markdown."""
    lines = ["# Census of model families", "", "Default `lora(rank=2)`, no hint, small random models.", ""]
    lines += [
        "| library | types counted | built | run | hold a projection | pass | share |",
        "|" + "---|" * 7,
    ]
    for library in sorted({name.partition(":")[0] for name in rows}):
        own = [row for name, row in rows.items() if name.startswith(library + ":")]
        states = Counter(row["state"] for row in own)
        built = len(own) - states["not built"] - states["out of time"] - states["out of time or crashed"]
        ran, held = built - states["not run"], states["checked"] + states["failed"]
        right = sum(map(passed, own))
        share = f"{right / held:.1%}" if held else "–"
        lines.append(f"| {library} | {len(own)} | {built} | {ran} | {held} | {right} | {share} |")
    wrong = [
        row for _, row in sorted(rows.items()) if row["state"] in ("checked", "failed") and not passed(row)
    ]
    if wrong:
        lines += ["", "## Not passed", "", "| model | what was seen | why |", "|---|---|---|"]
        for row in wrong:
            seen = problems(row) if row["state"] == "checked" else row["why"]
            seen = seen.replace("|", "\\|").replace("\n", " ")[:300]
            lines.append(f"| {row['name']} | {seen} | {REASONS.get(row['name'], '')} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
