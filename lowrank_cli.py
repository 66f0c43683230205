"""The command `lowrank`: reads its arguments. The library is imported only once a command runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

METHODS = "lora rslora lora_fa dora pissa milora olora ailora tlora eva corda lora_ga".split()


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(
        prog="lowrank",
        description="Looks at adapter folders and works on them: lowrank's own, PEFT's and diffusers'.",
        epilog="Exit codes: 0 done (diff: equal), 1 diff found differences, 2 an error, in one line.",
    )
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.add_argument("--json", action="store_true", help="print JSON")
        added.add_argument("--quiet", action="store_true", help="show no progress bars")
        return added

    inspect = command("inspect", "what an adapter holds: ranks, scalings and the size of ΔW of each weight")
    inspect.add_argument("adapter", type=Path)

    diff = command("diff", "how far two adapters are from each other, weight by weight")
    diff.add_argument("one", type=Path)
    diff.add_argument("other", type=Path)

    verify = command("verify", "checks that an adapter is whole; with --base, that it fits that model")
    verify.add_argument("adapter", type=Path)
    verify.add_argument("--base", type=Path, help="folder of a model of transformers")

    convert = command("convert", "writes an adapter in another format; the base is loaded to be sure")
    convert.add_argument("adapter", type=Path)
    convert.add_argument("--to", required=True, choices=["peft", "lowrank", "diffusers"])
    convert.add_argument("--base", type=Path, required=True, help="folder of the model that it adapts")
    convert.add_argument("--out", type=Path, required=True)
    convert.add_argument("--serving", action="store_true", help="with --to peft: one rank, scaling in B")

    merge = command("merge", "adds an adapter to a checkpoint, file by file: the model is never in memory")
    merge.add_argument("base", type=Path, help="folder with safetensors files")
    merge.add_argument("adapter", type=Path)
    merge.add_argument("--out", type=Path, required=True, help="a new folder")

    combine = command("combine", "the weighted sum of adapters as one adapter")
    combine.add_argument("adapters", nargs="+", metavar="FOLDER=WEIGHT", help="a folder alone has weight 1")
    combine.add_argument("--base", type=Path, required=True, help="folder of the model that they adapt")
    combine.add_argument("--rank", type=int, help="the closest adapter of this rank; exact without")
    combine.add_argument("--out", type=Path, required=True)

    plan = command("plan", "which projections of a model get how much rank")
    plan.add_argument("model", type=Path, help="folder of a model of transformers")
    plan.add_argument("--method", choices=METHODS, default="lora")
    plan.add_argument("--rank", type=int, default=8)
    plan.add_argument(
        "--budget", type=int, help="trainable adapter parameters, instead of what the rank costs"
    )
    plan.add_argument("--target", nargs="+", default=["all-linear"])
    plan.add_argument(
        "--data", type=Path, help='JSON lines with "text": calibration, where a method needs it'
    )
    plan.add_argument(
        "--examples", type=int, default=64, help="lines of --data to use (default: %(default)s)"
    )
    plan.add_argument("--tokens", type=int, default=256, help="of an example at most (default: %(default)s)")
    plan.add_argument("--out", type=Path, help="also write the plan, as JSON")

    report = command(
        "report", "one HTML file about a run: plan, curves, memory, updates, what was trained, versions"
    )
    report.add_argument("run", type=Path, help="folder that holds an adapter and a log (JSON lines)")
    report.add_argument("--log", type=Path, help="the log, where it is elsewhere")
    report.add_argument("--out", type=Path, default=Path("report.html"))
    return root


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        return int(import_module(f"lowrank.cli.{options.command}").run(options) or 0)
    except (ValueError, OSError, ImportError) as error:
        first, *more = str(error).splitlines() or [type(error).__name__]
        print(
            f"lowrank {options.command}: {' '.join([first, *(line.strip() for line in more)])}",
            file=sys.stderr,
        )
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
